"""HQQ's checkpoints in safetensors: `HQQLinear.state_dict` puts W_q and its settings in place of a weight (hqq 0.2.8,
core/quantize.py; the dequantization is that of 0.1, with which fsdp_qlora trained)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod

import torch

from dora_serve.errors import CheckpointError
from dora_serve.quantized.bitsandbytes import Found
from dora_serve.quantized.codings import HqqGroups
from dora_serve.quantized.unsound import unsound
from dora_serve.safetensors_file import TensorEntry, read_tensor

_SETTINGS = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero"),
)
_OFFLOADED = ("zero_scale", "zero_q", "scale_q", "meta_zero", "meta_scale", "meta")

_PACKINGS: Mapping[str, tuple[int, int, torch.dtype]] = {
    "8bit_u8": (1, 8, torch.uint8),
    "4bit_u8": (2, 4, torch.uint8),
    "3bit_32": (10, 3, torch.int32),
    "2bit_u8": (4, 2, torch.uint8),
    "1bit_u8": (8, 1, torch.uint8),
}
"""Codes in a word, bits of one, and the word (core/bitpack.py)."""

_DTYPES = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16}
_SETTING_BYTES = 64
_unsound = partial(unsound, "HQQ layer")


def find_hqq(tensors: Mapping[str, TensorEntry]) -> Found:
    """Every HQQ weight of a checkpoint. Raises CheckpointError for one that is incomplete or inconsistent."""
    weights: dict[str, TensorEntry] = {}
    parts: set[str] = set()
    for name, codes in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "W_q":
            weights[f"{module}.weight"] = _weight(tensors, module, codes)
            parts |= {name, *(f"{module}.{part}" for part in ("scale", "zero", *_SETTINGS))}
    return Found(weights, frozenset(parts & tensors.keys()))


def _weight(tensors: Mapping[str, TensorEntry], module: str, codes: TensorEntry) -> TensorEntry:
    offloaded = [part for part in _OFFLOADED if f"{module}.{part}" in tensors]
    if offloaded:
        raise CheckpointError(
            f"{module} in {str(codes.path)!r} has {', '.join(offloaded)}: its scales and zeros are quantized or packed "
            "in a way that HQQ has given up and that no safetensors file holds whole.",
            remedy="Load it with the hqq that wrote it, and save `layer.dequantize()` of each layer as its weight.",
            path=str(codes.path),
        )
    settings = {part: tensors.get(f"{module}.{part}") for part in ("shape", "axis", "packing", "group_size")}
    shape = _numbers(module, codes, settings["shape"])
    (axis,) = _numbers(module, codes, settings["axis"], 1)
    packing = bytes(_numbers(module, codes, settings["packing"])).decode("ascii", "replace")
    if packing not in _PACKINGS:
        raise _unsound(module, codes, f"the packing {packing!r}", f"one of {', '.join(_PACKINGS)}")
    per_word, bits_apart, word = _PACKINGS[packing]
    count = prod(shape)
    group_entry = settings["group_size"]
    group = _numbers(module, codes, group_entry, 1)[0] if group_entry else shape[-1] if axis == 1 else shape[0]
    if len(shape) != 2 or axis not in (0, 1) or group < 1 or not count or count % group:
        got = f"shape {list(shape)}, axis {axis} and group_size {group}"
        raise _unsound(module, codes, got, "a matrix that is cut into whole groups along axis 0 or 1")
    columns, rows = (group, count // group) if axis == 1 else (count // group, group)
    stored_rows = -(-rows // per_word)
    if codes.nbytes != stored_rows * columns * word.itemsize:
        raise _unsound(module, codes, f"{codes.nbytes} bytes of codes", f"{stored_rows * columns * word.itemsize}")
    scale, zero = tensors.get(f"{module}.scale"), tensors.get(f"{module}.zero")
    if scale is None or zero is None or {prod(scale.shape), prod(zero.shape)} != {count // group}:
        got = ", ".join(str(list(entry.shape)) if entry else "none" for entry in (scale, zero))
        raise _unsound(module, codes, f"scale and zero of {got}", f"{count // group} of each")
    dtype = _compute_dtype(module, codes, tensors.get(f"{module}.compute_dtype"), scale)
    coding = HqqGroups(codes, scale, zero, 0 if axis == 0 else 1, columns, per_word, word, bits_apart)
    return replace(codes, name=f"{module}.weight", dtype=dtype, shape=tuple(shape), coding=coding)


def _compute_dtype(module: str, codes: TensorEntry, entry: TensorEntry | None, scale: TensorEntry) -> torch.dtype:
    if entry is None:
        return scale.dtype
    name = bytes(_numbers(module, codes, entry)).decode("ascii", "replace")
    if name not in _DTYPES:
        raise _unsound(module, codes, f"the compute_dtype {name!r}", f"one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _numbers(module: str, codes: TensorEntry, entry: TensorEntry | None, count: int | None = None) -> tuple[int, ...]:
    """A setting, which HQQ encodes as a tensor of numbers or of characters."""
    whole = entry is not None and not entry.dtype.is_floating_point and entry.nbytes <= _SETTING_BYTES * 8
    if entry is None or not whole or (count is not None and prod(entry.shape) != count):
        raise _unsound(module, codes, "settings that are missing or malformed", f"those of {', '.join(_SETTINGS[:5])}")
    values = read_tensor(entry).flatten().tolist()
    if any(value < 0 for value in values) or (entry.dtype == torch.uint8 and max(values, default=0) > 127):
        raise _unsound(module, codes, f"{entry.name} = {values[:8]}", "numbers or ASCII characters")
    return tuple(int(value) for value in values)
