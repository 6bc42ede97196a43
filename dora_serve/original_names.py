"""From the names under which a denoiser was published to those of diffusers.

kohya's sd-scripts trains SDXL and the diffusion transformers under the original names, with dots or with underscores
for them. diffusers named the same layers anew (its script convert_original_stable_diffusion_to_diffusers.py for UNets;
original_transformers.py has the transformers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

import torch

from dora_serve.adapter import Adapter, LazyTensor, LoraWeights
from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.errors import PlanError, Problem
from dora_serve.original_transformers import LAYOUTS

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
_DENOISER = re.compile(r"^(unet|transformer(_2)?|prior|diffusion_model)\.")
"""What stands for a denoiser in front of its modules' names."""


def of_component(adapter: Adapter, base: ShardedCheckpoint) -> Adapter:
    """The adapter with the names that its modules have in `base`, where that is the denoiser of a pipeline by itself.

    Raises PlanError as in_diffusers_names does.
    """
    if "_class_name" not in base.config:
        return adapter
    modules = tuple(replace(module, module=_DENOISER.sub("", module.module)) for module in adapter.modules)
    return in_diffusers_names(replace(adapter, modules=modules), base)


def in_diffusers_names(adapter: Adapter, component: ShardedCheckpoint) -> Adapter:
    """The adapter of a denoiser with every module that has an original name under diffusers' own.

    A module of which diffusers made several becomes several, each with its rows of lora_B and of the magnitude; one
    whose halves diffusers swapped has its rows swapped. Raises PlanError for one that is split and whose magnitude is
    of its inputs: its norm runs over all the rows together.
    """
    kind = str(component.config.get("_class_name"))
    layout = LAYOUTS.get(kind)
    if layout is None and kind != "UNet2DConditionModel":
        return adapter
    modules: list[LoraWeights] = []
    problems: list[Problem] = []
    for module in adapter.modules:
        names = _unet(module.module, component) if layout is None else layout.rename(module.module)
        rows = [component.tensors[f"{name}.weight"].shape[0] for name in names if f"{name}.weight" in component.tensors]
        if layout is not None and names != (module.module,) and layout.is_swapped(names[0], component.config):
            modules.append(_swapped(module, names[0]))
        elif len(names) == 1:
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


def _swapped(module: LoraWeights, name: str) -> LoraWeights:
    """The same layer with the second half of its rows first; a norm over all of them does not see that."""
    magnitude = module.magnitude
    if magnitude is not None and module.norm.axis != "in":
        magnitude = _halves_swapped(magnitude)
    return replace(module, module=name, lora_B=_halves_swapped(module.lora_B), magnitude=magnitude)


def _halves_swapped(tensor: LazyTensor) -> LazyTensor:
    half = tensor.shape[0] // 2
    return tensor.map(tensor.shape, lambda whole: torch.cat([whole[half:], whole[:half]]))


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


def _flattened(table: Mapping[str, str]) -> dict[str, str]:
    """The table with its names in both styles."""
    return {**table, **{name.replace(".", "_"): value for name, value in table.items()}}
