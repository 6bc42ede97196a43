"""Bases whose linear layers are quantized by a library's own function, and the dense ones of what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cases import LINEARS, rewrite_json, rewrite_tensors


def write_quantized(
    root: Path,
    dense: Path,
    quantize: Callable[[Tensor], tuple[Mapping[str, Tensor], Tensor]],
    settings: Mapping[str, Any],
) -> Path:
    """`root/quantized`, and `dense` rewritten to what its codes stand for.

    quantize: a weight into what is stored of it, by the last part of its name, and its values.
    """
    tensors, restored = {}, {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if not name.endswith(".weight") or name.split(".")[-2] not in LINEARS:
            tensors[name] = restored[name] = weight
            continue
        stored, restored[name] = quantize(weight)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in stored.items()}
    save_file(restored, dense / "model.safetensors", {"format": "pt"})
    folder = root / "quantized"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((dense / "config.json").read_text())
    rewrite_json(folder / "config.json", quantization_config=settings)
    return folder


def put_part(folder: Path, name: str, value: Tensor | None) -> None:
    """Give a stored tensor another value, or take it away where that is None."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    rewrite_tensors(folder / "model.safetensors", change)
