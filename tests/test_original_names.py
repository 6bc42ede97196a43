"""Published names of diffusion transformers, against diffusers' own conversion of single-file checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from dora_serve.original_transformers import LAYOUTS

CONVERTERS: Mapping[str, str] = {
    "FluxTransformer2DModel": "flux_transformer_checkpoint",
    "ChromaTransformer2DModel": "chroma_transformer_checkpoint",
    "Flux2Transformer2DModel": "flux2_transformer_checkpoint",
    "SD3Transformer2DModel": "sd3_transformer_checkpoint",
    "HunyuanVideoTransformer3DModel": "hunyuan_video_transformer",
    "WanTransformer3DModel": "wan_transformer",
    "WanVACETransformer3DModel": "wan_transformer",
    "SkyReelsV2Transformer3DModel": "wan_transformer",
    "Lumina2Transformer2DModel": "lumina2",
    "ZImageTransformer2DModel": "z_image_transformer_checkpoint",
    "LTXVideoTransformer3DModel": "ltx_transformer_checkpoint",
}
BLOCKS = 2
ROWS = {"linear1": 7 * 3072, "attention.qkv": 2304 + 2 * 768}
"""Where the conversion has the widths of the published model written in it; elsewhere any number of rows will do."""


def rows_of(name: str) -> int:
    return next((count for leaf, count in ROWS.items() if name.endswith(leaf)), 12)


class Checkpoint(dict[str, Tensor]):
    """A single file's tensors, with a stand-in for whatever the conversion asks for besides."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, default[0] if default else torch.zeros(rows_of(key.rpartition(".")[0]), 1))


def converted(kind: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    convert: Callable[..., Mapping[str, Tensor]] = getattr(
        single_file_utils, f"convert_{CONVERTERS[kind]}_to_diffusers"
    )
    return convert(Checkpoint(tensors))


def test_every_layout_is_compared() -> None:
    assert set(LAYOUTS) == set(CONVERTERS)


@pytest.mark.parametrize("kind", CONVERTERS)
def test_names_rows_and_halves_are_those_of_diffusers(kind: str) -> None:
    layout = LAYOUTS[kind]
    names = list(layout.ends)
    names += [
        f"{path}.{number}.{leaf}"
        for path, (_, leaves) in layout.blocks.items()
        for number in range(BLOCKS)
        for leaf in leaves
    ]
    absent = (f"joint_blocks.{BLOCKS - 1}.context_block.mlp", f"joint_blocks.{BLOCKS - 1}.context_block.attn.proj")
    names = [name for name in names if not name.startswith(absent)]  # the text's half ends before the last block's
    given = {}
    for number, name in enumerate(names):
        given[f"{name}.weight"] = 1e5 * number + torch.arange(rows_of(name))[:, None].double()
    theirs = converted(kind, given)
    for name in names:
        whole = given[f"{name}.weight"]
        for written in (name, name.replace(".", "_")):
            leaves = layout.rename(written)
            assert all(f"{leaf}.weight" in theirs for leaf in leaves), f"{written} -> {leaves}"
            parts = [theirs[f"{leaf}.weight"] for leaf in leaves]
            if layout.is_swapped(leaves[0], {"num_layers": BLOCKS}):
                parts = [torch.cat([parts[0][len(whole) // 2 :], parts[0][: len(whole) // 2]])]
            assert torch.equal(torch.cat(parts), whole), written


def test_what_is_no_original_name_stays() -> None:
    for layout in LAYOUTS.values():
        for name in ("transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn", "proj_out", "", "blocks.x.ffn.0"):
            assert layout.rename(name) == (name,)
