"""What the published diffusion transformers call their layers, and what diffusers made of each.

Black Forest Labs, Stability AI, Tencent, Alibaba and others published their models under names of their own, which
kohya's scripts, musubi-tuner and ComfyUI keep, with dots or with underscores for them. diffusers named the layers anew,
split fused projections and, of some modulations, stored the two halves the other way round (its
loaders/single_file_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

Leaves = Mapping[str, tuple[str, ...]]
"""From a layer's original name to those that diffusers made of it, in the order of their rows."""


@dataclass(frozen=True)
class Layout:
    """blocks: from the original path of a list of blocks to diffusers' and the layers in a block. ends: all other
    layers. swapped: which of diffusers' layers have the halves of their rows the other way round; `{last}` stands for
    the number of the last block.
    """

    blocks: Mapping[str, tuple[str, Leaves]] = field(default_factory=dict)
    ends: Leaves = field(default_factory=dict)
    swapped: tuple[str, ...] = ()

    def rename(self, name: str) -> tuple[str, ...]:
        """diffusers' names of an original layer; the name itself where it is none."""
        found = self._ends.get(_flat(name))
        if found is not None:
            return found
        for pattern, path, leaves in self._patterns:
            match = pattern.fullmatch(name)
            if match is not None and (named := leaves.get(_flat(match[2]))) is not None:
                return tuple(f"{path}.{match[1]}.{leaf}" for leaf in named)
        return (name,)

    def is_swapped(self, name: str, config: Mapping[str, object]) -> bool:
        """Whether a layer of diffusers' has the second half of the original's rows first."""
        count = config.get("num_layers")
        last = str(count - 1) if isinstance(count, int) else ""
        return name in {one.replace("{last}", last) for one in self.swapped}

    @cached_property
    def _ends(self) -> Leaves:
        return {_flat(name): leaves for name, leaves in self.ends.items()}

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], str, Leaves], ...]:
        return tuple(self._patterns_of_blocks())

    def _patterns_of_blocks(self) -> Iterator[tuple[re.Pattern[str], str, Leaves]]:
        for original, (path, leaves) in self.blocks.items():
            dots_or_not = re.escape(original).replace(r"\.", "[._]")
            pattern = re.compile(rf"{dots_or_not}[._](\d+)[._](.+)")
            yield pattern, path, {_flat(name): named for name, named in leaves.items()}


def _flat(name: str) -> str:
    return name.replace(".", "_")


_MODULATED_TIME = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
}
_UNMODULATED_ENDS = {"img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",)}
_ENDS = {**_UNMODULATED_ENDS, "final_layer.adaLN_modulation.1": ("norm_out.linear",)}
_JOINT_ATTENTION = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
_CHROMA_DOUBLE = {
    **_JOINT_ATTENTION,
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_FLUX_DOUBLE = {**_CHROMA_DOUBLE, "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",)}
_CHROMA_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",)}
_FLUX_SINGLE = {**_CHROMA_SINGLE, "modulation.lin": ("norm.linear",)}
_FLUX = Layout(
    {
        "double_blocks": ("transformer_blocks", _FLUX_DOUBLE),
        "single_blocks": ("single_transformer_blocks", _FLUX_SINGLE),
    },
    {**_ENDS, **_MODULATED_TIME},
    ("norm_out.linear",),
)
_CHROMA = Layout(
    {
        "double_blocks": ("transformer_blocks", _CHROMA_DOUBLE),
        "single_blocks": ("single_transformer_blocks", _CHROMA_SINGLE),
        "distilled_guidance_layer.layers": (
            "distilled_guidance_layer.layers",
            {"in_layer": ("linear_1",), "out_layer": ("linear_2",)},
        ),
    },
    _UNMODULATED_ENDS,
)
_FLUX_2 = Layout(
    {
        "double_blocks": (
            "transformer_blocks",
            {
                **_JOINT_ATTENTION,
                "img_mlp.0": ("ff.linear_in",),
                "img_mlp.2": ("ff.linear_out",),
                "txt_mlp.0": ("ff_context.linear_in",),
                "txt_mlp.2": ("ff_context.linear_out",),
            },
        ),
        "single_blocks": (
            "single_transformer_blocks",
            {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        ),
    },
    {
        **_ENDS,
        **{
            f"{name}_in.{side}_layer": (f"time_guidance_embed.{embedder}.linear_{number}",)
            for name, embedder in (("time", "timestep_embedder"), ("guidance", "guidance_embedder"))
            for number, side in enumerate(("in", "out"), 1)
        },
        **{
            f"{name}.lin": (f"{name}.linear",)
            for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        },
    },
    ("norm_out.linear",),
)
_SD3 = Layout(
    {
        "joint_blocks": (
            "transformer_blocks",
            {
                "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "x_block.adaLN_modulation.1": ("norm1.linear",),
                "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "context_block.attn.proj": ("attn.to_add_out",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
                "context_block.adaLN_modulation.1": ("norm1_context.linear",),
            },
        )
    },
    {
        "x_embedder.proj": ("pos_embed.proj",),
        "context_embedder": ("context_embedder",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    ("norm_out.linear", "transformer_blocks.{last}.norm1_context.linear"),
)
"""The text's half of the last block ends there, and is modulated as the final layer is."""

_HUNYUAN_VIDEO = Layout(
    {
        "double_blocks": (
            "transformer_blocks",
            {
                "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "img_attn_proj": ("attn.to_out.0",),
                "txt_attn_proj": ("attn.to_add_out",),
                "img_mlp.fc1": ("ff.net.0.proj",),
                "img_mlp.fc2": ("ff.net.2",),
                "txt_mlp.fc1": ("ff_context.net.0.proj",),
                "txt_mlp.fc2": ("ff_context.net.2",),
                "img_mod.linear": ("norm1.linear",),
                "txt_mod.linear": ("norm1_context.linear",),
            },
        ),
        "single_blocks": (
            "single_transformer_blocks",
            {
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
                "modulation.linear": ("norm.linear",),
            },
        ),
        "txt_in.individual_token_refiner.blocks": (
            "context_embedder.token_refiner.refiner_blocks",
            {
                "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "self_attn_proj": ("attn.to_out.0",),
                "mlp.fc1": ("ff.net.0.proj",),
                "mlp.fc2": ("ff.net.2",),
                "adaLN_modulation.1": ("norm_out.linear",),
            },
        ),
    },
    {
        "img_in.proj": ("x_embedder.proj",),
        "txt_in.input_embedder": ("context_embedder.proj_in",),
        "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
        "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
        "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
        "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
        "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    ("norm_out.linear",),
)
_WAN_BLOCK = {
    **{
        f"{old}.{leaf}": (f"{new}.{named}",)
        for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for leaf, named in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "cross_attn.k_img": ("attn2.add_k_proj",),
    "cross_attn.v_img": ("attn2.add_v_proj",),
    "ffn.0": ("ffn.net.0.proj",),
    "ffn.2": ("ffn.net.2",),
    "before_proj": ("proj_in",),
    "after_proj": ("proj_out",),
}
_WAN = Layout(
    {"blocks": ("blocks", _WAN_BLOCK), "vace_blocks": ("vace_blocks", _WAN_BLOCK)},
    {
        "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
        "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
        "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
        "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
        "time_projection.1": ("condition_embedder.time_proj",),
        "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
        "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
        "head.head": ("proj_out",),
    },
)
_LUMINA_BLOCK = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "adaLN_modulation.1": ("norm1.linear",),
}
_STREAMS = ("layers", "noise_refiner", "context_refiner")
_LUMINA_2 = Layout(
    {name: (name, _LUMINA_BLOCK) for name in _STREAMS},
    {
        "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
        "t_embedder.mlp.0": ("time_caption_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_caption_embed.timestep_embedder.linear_2",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
        "final_layer.linear": ("norm_out.linear_2",),
    },
)
_Z_IMAGE_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
}
_Z_IMAGE = Layout(
    {name: (name, _Z_IMAGE_BLOCK) for name in _STREAMS},
    {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    },
)
_LTX = Layout(
    ends={
        "patchify_proj": ("proj_in",),
        "adaln_single.linear": ("time_embed.linear",),
        "adaln_single.emb.timestep_embedder.linear_1": ("time_embed.emb.timestep_embedder.linear_1",),
        "adaln_single.emb.timestep_embedder.linear_2": ("time_embed.emb.timestep_embedder.linear_2",),
    }
)

LAYOUTS: Mapping[str, Layout] = {
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _CHROMA,
    "Flux2Transformer2DModel": _FLUX_2,
    "SD3Transformer2DModel": _SD3,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "Lumina2Transformer2DModel": _LUMINA_2,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "LTXVideoTransformer3DModel": _LTX,
}
"""By diffusers' class. Qwen-Image and HiDream have their original names there."""
