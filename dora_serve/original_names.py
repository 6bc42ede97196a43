"""From the names of the models that Stability AI and Black Forest Labs published to those of diffusers.

kohya's sd-scripts trains SDXL and Flux under the original names, with dots or with underscores for them. diffusers
named the same layers anew (its scripts convert_original_stable_diffusion_to_diffusers.py and
convert_flux_to_diffusers.py), and of Flux it split the fused projections.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights
from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.errors import PlanError, Problem

T = TypeVar("T")

_RESNET: Mapping[str, str] = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS: Mapping[str, str] = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}
_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_FLUX_ENDS: Mapping[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
"""Not final_layer.adaLN_modulation.1: diffusers stores its two halves the other way round."""


def in_diffusers_names(adapter: Adapter, component: ShardedCheckpoint) -> Adapter:
    """The adapter of a UNet or a Flux transformer with every module that has an original name under diffusers' own.

    A module of which diffusers made several becomes several, each with its rows of lora_B and of the magnitude.
    Raises PlanError for one whose magnitude is of its inputs: its norm runs over all the rows together.
    """
    rename = _RENAMERS.get(str(component.config.get("_class_name")))
    if rename is None:
        return adapter
    modules: list[LoraWeights] = []
    problems: list[Problem] = []
    for module in adapter.modules:
        names = rename(module.module, component)
        rows = [component.tensors[f"{name}.weight"].shape[0] for name in names if f"{name}.weight" in component.tensors]
        if len(names) == 1:
            modules.append(replace(module, module=names[0]))
        elif len(rows) != len(names) or sum(rows) != module.lora_B.shape[0]:
            wanted = f"the {len(names)} layers {', '.join(names)} with as many rows together"
            problems.append(Problem(module.module, f"a fused layer of {module.lora_B.shape[0]} rows", wanted))
        elif module.magnitude is not None and module.norm.axis == "in":
            got = "a magnitude for each input, whose norm runs over all outputs"
            problems.append(Problem(module.module, got, "one for each output: diffusers splits this layer"))
        else:
            stops = list(accumulate(rows))
            modules += [
                _part(module, name, stop - count, stop) for name, count, stop in zip(names, rows, stops, strict=True)
            ]
    if problems:
        raise PlanError(f"The adapter {str(adapter.path)!r} does not fit the base.", problems)
    return replace(adapter, modules=tuple(modules))


def _part(module: LoraWeights, name: str, start: int, stop: int) -> LoraWeights:
    magnitude = None if module.magnitude is None else _rows(module.magnitude, start, stop)
    return replace(module, module=name, lora_B=_rows(module.lora_B, start, stop), magnitude=magnitude)


def _rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    return tensor.map((stop - start, *tensor.shape[1:]), lambda whole: whole[start:stop])


def _unet(name: str, component: ShardedCheckpoint) -> tuple[str, ...]:
    if name in _flattened(_UNET_ENDS):
        return (_flattened(_UNET_ENDS)[name],)
    match = re.fullmatch(r"(input_blocks|output_blocks|middle_block)[._](\d+)(?:[._](\d+))?[._](.+)", name)
    per_block = component.config.get("layers_per_block")
    if match is None or not isinstance(per_block, int):
        return (name,)
    side, number, part, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        # Of three parts that stand in a row: what comes after the number belongs to the part itself.
        rest = f"{part}.{rest}" if part is not None else rest
        path = {0: "mid_block.resnets.0", 1: "mid_block.attentions.0", 2: "mid_block.resnets.1"}.get(number)
        return (name,) if path is None else (_within(path, rest),)
    if part is None:
        return (name,)
    first = 1 if side == "input_blocks" else 0
    block, layer = divmod(number - first, per_block + 1)
    where = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{block}"
    if rest == "op":
        return (f"{where}.downsamplers.0.conv",)
    if rest == "conv":
        return (f"{where}.upsamplers.0.conv",)
    return (_within(f"{where}.{'resnets' if part == '0' else 'attentions'}.{layer}", rest),)


def _within(path: str, rest: str) -> str:
    """A layer within a block; the name's style, dots or underscores, is that of `rest`."""
    if ".resnets." in path:
        return f"{path}.{_flattened(_RESNET).get(rest, rest)}"
    return f"{path}.{rest}" if "." in rest else f"{path}.{rest}".replace(".", "_")


def _flux(name: str, component: ShardedCheckpoint) -> tuple[str, ...]:
    if name in _flattened(_FLUX_ENDS):
        return _flattened(_FLUX_ENDS)[name]
    match = re.fullmatch(r"(double|single)_blocks[._](\d+)[._](.+)", name)
    if match is None:
        return (name,)
    table = _flattened(_DOUBLE if match[1] == "double" else _SINGLE)
    where = "transformer_blocks" if match[1] == "double" else "single_transformer_blocks"
    leaves = table.get(match[3])
    return (name,) if leaves is None else tuple(f"{where}.{match[2]}.{leaf}" for leaf in leaves)


def _flattened(table: Mapping[str, T]) -> dict[str, T]:
    """The table with its names in both styles."""
    return {**table, **{name.replace(".", "_"): value for name, value in table.items()}}


_RENAMERS: Mapping[str, Callable[[str, ShardedCheckpoint], tuple[str, ...]]] = {
    "UNet2DConditionModel": _unet,
    "FluxTransformer2DModel": _flux,
}
