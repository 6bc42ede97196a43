"""Checkpoints that mlx-lm quantized (mlx 0.32, nn/layers/quantized.py; mlx_lm/utils.py), as mlx-community publishes
them: uint32 words in place of a weight, and the scales and biases of its groups beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dora_serve.errors import CheckpointError
from dora_serve.quantized.bitsandbytes import Found
from dora_serve.quantized.codings import MlxGroups
from dora_serve.safetensors_file import TensorEntry

_BITS = (2, 3, 4, 5, 6, 8)
_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_AFFINE = "affine"
_ORIGINAL = "Merge into the unquantized base that it was made from (--base ORIGINAL --merge-into original)."


def says_mlx(settings: object) -> bool:
    """Whether a table of config.json is mlx-lm's, which names no method."""
    return isinstance(settings, dict) and "quant_method" not in settings and {"group_size", "bits"} <= settings.keys()


def find_mlx(tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> Found:
    """Every weight in affine codes; settings are those of all layers, and of some by their names.

    Raises CheckpointError for other modes, experts in one tensor, and codes that do not fit their scales.
    """
    weights: dict[str, TensorEntry] = {}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        codes = tensors.get(f"{module}.weight")
        if leaf == "scales" and codes is not None and codes.dtype == torch.uint32:
            own = settings.get(module)
            weights[codes.name] = _weight(tensors, codes, {**settings, **(own if isinstance(own, dict) else {})})
    modules = [name.removesuffix("weight") for name in weights]
    return Found(weights, frozenset(f"{module}{leaf}" for module in modules for leaf in ("scales", "biases")))


def _weight(tensors: Mapping[str, TensorEntry], codes: TensorEntry, settings: Mapping[str, Any]) -> TensorEntry:
    module = codes.name.removesuffix(".weight")
    scales, biases = tensors[f"{module}.scales"], tensors.get(f"{module}.biases")
    mode = settings.get("mode", _AFFINE)
    if mode != _AFFINE or biases is None:
        said = f"in the mode {mode!r}" if mode != _AFFINE else "without biases"
        raise CheckpointError(
            f"{codes.name!r} in {str(codes.path)!r} is quantized by mlx {said}, and only its affine codes are "
            "read here.",
            remedy=f"{_ORIGINAL} Or dequantize it where mlx-lm runs: `mlx_lm.convert --hf-path BASE -d`.",
            path=str(codes.path),
            tensor=codes.name,
        )
    if len(codes.shape) != 2:
        raise CheckpointError(
            f"{codes.name!r} in {str(codes.path)!r} holds all experts in one tensor {list(codes.shape)} under mlx-lm's "
            "own name, which no other library loads.",
            remedy=_ORIGINAL,
            path=str(codes.path),
            tensor=codes.name,
        )
    group_size, (rows, words) = settings.get("group_size"), codes.shape
    size = group_size if isinstance(group_size, int) and group_size > 0 else 1
    width = scales.shape[-1] * size if scales.shape else 0
    bits = words * 32 // width if width else 0
    wanted = (rows, width // size)
    fits = words * 32 == width * bits and bits in _BITS and scales.dtype in _SCALES and biases.dtype in _SCALES
    if not fits or scales.shape != wanted or biases.shape != wanted:
        raise CheckpointError(
            f"{codes.name!r} in {str(codes.path)!r} does not fit its scales: got {list(codes.shape)} words, scales "
            f"{list(scales.shape)} {scales.dtype}, biases {list(biases.shape)}, groups of {group_size!r}.",
            remedy="Fetch it again, with its config.json.",
            path=str(codes.path),
            tensor=codes.name,
        )
    coding = MlxGroups(codes, scales, biases, bits, size)
    return replace(codes, shape=(rows, width), dtype=torch.float32, coding=coding)
