"""Checkpoints in float8 with a grid of scales, as DeepSeek and Qwen publish them (transformers'
integrations/finegrained_fp8.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from dora_serve.errors import CheckpointError
from dora_serve.quantized.bitsandbytes import Found
from dora_serve.quantized.codings import Float8Blocks
from dora_serve.safetensors_file import TensorEntry

_SUFFIX = "_scale_inv"
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


def find_float8(tensors: Mapping[str, TensorEntry], block: tuple[int, int], dtype: torch.dtype) -> Found:
    """Every float8 weight with a `weight_scale_inv`, one scale for a block of rows and columns.

    dtype: to which values are rounded once, the one that the model computes in. Raises CheckpointError where the scales
    do not fit.
    """
    weights: dict[str, TensorEntry] = {}
    for name, scales in tensors.items():
        codes = tensors.get(name.removesuffix(_SUFFIX))
        if not name.endswith(_SUFFIX) or codes is None or codes.dtype not in _CODES:
            continue
        wanted = tuple(-(-size // part) for size, part in zip(codes.shape, block, strict=False))
        if scales.dtype not in _SCALES or len(codes.shape) != 2 or scales.shape != wanted:
            raise CheckpointError(
                f"{name!r} in {str(scales.path)!r} does not fit its weight: got scales {list(scales.shape)} "
                f"{scales.dtype} for {list(codes.shape)} codes, wanted {list(wanted)} floats.",
                remedy="Merge into the original weights in bfloat16: the publisher's, or those that it was made from.",
                path=str(scales.path),
                tensor=name,
            )
        weights[codes.name] = replace(codes, dtype=dtype, coding=Float8Blocks(codes, scales, block))
    return Found(weights, frozenset(f"{name}{_SUFFIX}" for name in weights))
