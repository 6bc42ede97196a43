"""bitsandbytes' checkpoints: which tensors are codes, and what belongs to them (bitsandbytes 0.50, nn/modules.py and
functional.QuantState)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import cast

import torch

from dora_serve.errors import CheckpointError
from dora_serve.quantized.codings import FourBit, FourBitType, Int8Rows, Nested
from dora_serve.quantized.quantize import code_of
from dora_serve.safetensors_file import TensorEntry, read_range, read_tensor

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class Found:
    """weights: tensors that are codes, by name, as entries of their values. parts: what else belongs to them."""

    weights: Mapping[str, TensorEntry]
    parts: frozenset[str]


def find_bitsandbytes(tensors: Mapping[str, TensorEntry]) -> Found:
    """Every 4-bit and int8 weight. Raises CheckpointError for one that is incomplete or inconsistent."""
    weights: dict[str, TensorEntry] = {}
    parts: set[str] = set()
    for name in tensors:
        weight, state, quant_type = name.partition(_STATE)
        module, _, leaf = name.rpartition(".")
        if state:
            weights[weight] = _four_bit(tensors, weight, name, quant_type)
            parts |= {name, *(f"{weight}.{part}" for part in _PARTS if f"{weight}.{part}" in tensors)}
        elif leaf == "SCB":
            weights[f"{module}.weight"] = _int8(tensors, f"{module}.weight", name)
            parts |= {name, f"{module}.weight_format"}
    return Found(weights, frozenset(parts & tensors.keys()))


def _four_bit(tensors: Mapping[str, TensorEntry], weight: str, state_name: str, quant_type: str) -> TensorEntry:
    state = _read_state(tensors[state_name])
    codes, absmax = _part(tensors, weight), _part(tensors, f"{weight}.absmax")
    shape, blocksize, dtype = state.get("shape"), state.get("blocksize"), _DTYPES.get(str(state.get("dtype")))
    if quant_type not in ("nf4", "fp4") or state.get("quant_type") != quant_type:
        raise _unsound(codes, f"the quant_type {quant_type!r} and {state.get('quant_type')!r}", "nf4 or fp4 in both")
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise _unsound(codes, f"the shape {shape!r}", "a list of sizes")
    if blocksize not in _BLOCKSIZES:
        raise _unsound(codes, f"the blocksize {blocksize!r}", f"one of {', '.join(map(str, _BLOCKSIZES))}")
    if dtype is None:
        raise _unsound(codes, f"the dtype {state.get('dtype')!r}", f"one of {', '.join(_DTYPES)}")
    assert isinstance(blocksize, int)
    count, nested = prod(shape), "nested_offset" in state
    blocks = -(-count // blocksize)
    if codes.nbytes != (count + 1) // 2:
        raise _unsound(codes, f"{codes.nbytes} bytes of codes for {count} values", f"{(count + 1) // 2}")
    wanted = torch.uint8 if nested else torch.float32
    if prod(absmax.shape) != blocks or absmax.dtype != wanted:
        got = f"an absmax of {list(absmax.shape)} {absmax.dtype}"
        raise _unsound(codes, got, f"[{blocks}] {wanted} for blocks of {blocksize}")
    _require_known_map(tensors, weight, quant_type)
    coding = FourBit(
        codes=codes,
        absmax=absmax,
        quant_type=cast(FourBitType, quant_type),
        blocksize=blocksize,
        nested=_nested(tensors, weight, state, blocks) if nested else None,
    )
    return replace(codes, dtype=dtype, shape=tuple(shape), coding=coding)


def _nested(tensors: Mapping[str, TensorEntry], weight: str, state: Mapping[str, object], blocks: int) -> Nested:
    absmax, code = _part(tensors, f"{weight}.nested_absmax"), _part(tensors, f"{weight}.nested_quant_map")
    blocksize, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if blocksize not in _BLOCKSIZES or not isinstance(offset, float | int):
        raise _unsound(absmax, f"nested_blocksize {blocksize!r} and nested_offset {offset!r}", "a size and a number")
    assert isinstance(blocksize, int)
    if absmax.dtype != torch.float32 or prod(absmax.shape) != -(-blocks // blocksize):
        raise _unsound(absmax, f"{list(absmax.shape)} {absmax.dtype}", f"[{-(-blocks // blocksize)}] torch.float32")
    if code.shape != (256,) or code.dtype != torch.float32:
        raise _unsound(code, f"{list(code.shape)} {code.dtype}", "[256] torch.float32")
    return Nested(absmax, code, blocksize, float(offset))


def _require_known_map(tensors: Mapping[str, TensorEntry], weight: str, quant_type: str) -> None:
    """bitsandbytes' kernels have the 16 values built in and never look at those that are stored with the codes."""
    stored = _part(tensors, f"{weight}.quant_map")
    built_in = code_of(cast(FourBitType, quant_type))
    if stored.shape != (16,) or not torch.allclose(read_tensor(stored).float(), built_in, rtol=0, atol=1e-4):
        raise _unsound(stored, "other values", f"the sixteen of {quant_type}")


def _int8(tensors: Mapping[str, TensorEntry], weight: str, scales_name: str) -> TensorEntry:
    codes, scales = _part(tensors, weight), tensors[scales_name]
    if codes.dtype != torch.int8 or len(codes.shape) != 2:
        raise _unsound(codes, f"{list(codes.shape)} {codes.dtype} beside an SCB", "a matrix of torch.int8")
    if scales.dtype != torch.float32 or prod(scales.shape) != codes.shape[0]:
        raise _unsound(scales, f"{list(scales.shape)} {scales.dtype}", f"[{codes.shape[0]}] torch.float32")
    layout = tensors.get(f"{scales_name.removesuffix('SCB')}weight_format")
    if layout is not None and (layout.nbytes != 1 or read_tensor(layout).item() != 0):
        raise _unsound(
            layout,
            "codes in the order of an old GPU kernel",
            "row-major ones, which bitsandbytes has written since 0.42",
        )
    return replace(codes, dtype=torch.float32, coding=Int8Rows(codes, scales))


def _read_state(entry: TensorEntry) -> Mapping[str, object]:
    """The JSON object that bitsandbytes packs into a tensor of bytes."""
    state: object = None
    if entry.dtype == torch.uint8 and entry.nbytes <= _STATE_BYTES:
        try:
            state = json.loads(bytes(read_tensor(entry).flatten().tolist()))
        except (ValueError, RecursionError):
            state = None
    if state is None and not read_range(entry, 0, 1).any():
        raise CheckpointError(
            f"{entry.name!r} is zeros, so what its codes mean is not known.",
            remedy="Where a base on the Hub is only looked at, its values are not fetched: name a folder instead.",
            path=str(entry.path),
            tensor=entry.name,
        )
    if not isinstance(state, dict):
        raise _unsound(entry, "no JSON object", "that of a quant_state")
    return state


def _part(tensors: Mapping[str, TensorEntry], name: str) -> TensorEntry:
    entry = tensors.get(name)
    if entry is None:
        raise CheckpointError(
            f"The base lacks {name!r}, without which the 4-bit or int8 codes beside it mean nothing.",
            remedy="Fetch or save the base again.",
            tensor=name,
        )
    return entry


def _unsound(entry: TensorEntry, got: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{entry.name!r} in {str(entry.path)!r} is no sound bitsandbytes tensor: got {got}, wanted {wanted}.",
        remedy="Fetch or save the base again.",
        path=str(entry.path),
        tensor=entry.name,
    )
