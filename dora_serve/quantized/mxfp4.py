"""MXFP4 as gpt-oss is published in it: the fused experts in blocks of 32 inputs (transformers' integrations/
mxfp4.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from dora_serve.quantized.bitsandbytes import Found
from dora_serve.quantized.codings import Mxfp4Experts
from dora_serve.quantized.unsound import unsound
from dora_serve.safetensors_file import TensorEntry

_CODES, _SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16
_unsound = partial(unsound, "MXFP4 parameter")


def find_mxfp4(tensors: Mapping[str, TensorEntry], dtype: torch.dtype) -> Found:
    """Every parameter that is stored as `_blocks` and `_scales`.

    dtype: to which values are rounded once, the one that the model computes in. Raises CheckpointError where one of the
    two is missing or does not fit.
    """
    weights: dict[str, TensorEntry] = {}
    parts: set[str] = set()
    for name in tensors:
        stem = next((name.removesuffix(end) for end in (_CODES, _SCALES) if name.endswith(end)), None)
        if stem is None or stem in weights:
            continue
        weights[stem] = _weight(tensors, stem, dtype)
        parts |= {f"{stem}{_CODES}", f"{stem}{_SCALES}"}
    return Found(weights, frozenset(parts))


def _weight(tensors: Mapping[str, TensorEntry], stem: str, dtype: torch.dtype) -> TensorEntry:
    codes, scales = tensors.get(f"{stem}{_CODES}"), tensors.get(f"{stem}{_SCALES}")
    if codes is None or scales is None or stem in tensors:
        there = [end for end in (_CODES, _SCALES, "") if f"{stem}{end}" in tensors]
        got = " and ".join(f"{stem}{end}" for end in there)
        raise _unsound(stem, codes or scales or tensors[stem], got, f"{_CODES} and {_SCALES}, and nothing beside")
    shape = codes.shape
    if codes.dtype != torch.uint8 or len(shape) != 4 or 0 in shape or shape[3] != _BLOCK_BYTES:
        got = f"blocks {list(shape)} {codes.dtype}"
        raise _unsound(stem, codes, got, f"bytes [experts, outputs, inputs / 32, {_BLOCK_BYTES}]")
    if scales.dtype != torch.uint8 or scales.shape != shape[:3]:
        raise _unsound(stem, scales, f"scales {list(scales.shape)} {scales.dtype}", f"bytes {list(shape[:3])}")
    experts, outputs, blocks = shape[:3]
    values = experts, blocks * 32, outputs
    return replace(codes, name=stem, dtype=dtype, shape=values, coding=Mxfp4Experts(codes, scales))
