"""compressed-tensors' checkpoints, as llm-compressor writes them for vLLM (compressed_tensors 0.20: compressors/
pack_quantized, compressors/naive_quantized, quantization/lifecycle/forward.py): integers of 1, 2, 4 or 8 bits packed
into words, and int8 or float8 as they are, with a scale for the tensor, a row, a group of columns or a block. Those of
float4 are in compressed_float4.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch

from dora_serve.errors import CheckpointError
from dora_serve.quantized.bitsandbytes import Found
from dora_serve.quantized.codings import ScaledCodes
from dora_serve.quantized.compressed_float4 import float4_weight
from dora_serve.quantized.unsound import unsound
from dora_serve.safetensors_file import TensorEntry, read_tensor

_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_BITS = (1, 2, 4, 8)
"""Of a code. Those of 3, 5, 6 and 7 began in a new word once 32 was full until 0.17, and go on into the next since."""

_OF_WEIGHT = (
    *("weight_packed", "weight_scale", "weight_global_scale"),
    *("weight_zero_point", "weight_shape", "weight_g_idx"),
)
_OF_ACTIVATIONS = (
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
    *("q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point"),
)
"""Of the rounding of activations and of the cache, which a dense model does without."""

_ORIGINAL = "Merge into the original weights (--base ORIGINAL --merge-into original), or decompress it with "
_OTHER = f"{_ORIGINAL}compressed-tensors first, save that, and give it as the base."
_unsound = partial(unsound, "layer of compressed-tensors")


def find_compressed(tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> Found:
    """Every weight that is such codes. settings: the quantization_config.

    Raises CheckpointError for the family's other layouts, and for codes that are incomplete or inconsistent.
    """
    _require_plain(tensors, settings)
    schemes = list(_schemes(settings))
    weights: dict[str, TensorEntry] = {}
    for name, codes in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed" and codes.dtype == torch.uint8:
            weights[f"{module}.weight"] = float4_weight(tensors, module, codes, schemes)
        elif leaf == "weight_packed":
            weights[f"{module}.weight"] = _packed(tensors, module, codes, schemes)
        elif leaf == "weight" and codes.dtype in _CODES:
            weights[name] = _plain(tensors, module, codes, schemes)
    modules = {name.removesuffix(".weight") for name in weights}
    parts = {f"{module}.{part}" for module in modules for part in (*_OF_WEIGHT, *_OF_ACTIVATIONS)}
    parts |= {name for name in tensors if weights and name.rpartition(".")[2] in _OF_ACTIVATIONS}
    return Found(weights, frozenset(parts & tensors.keys()))


def rounds_activations(settings: Mapping[str, Any]) -> bool:
    """Whether the quantized model rounds more than its weights as it runs."""
    groups = settings.get("config_groups")
    tables = groups.values() if isinstance(groups, dict) else ()
    return bool(settings.get("kv_cache_scheme")) or any(
        isinstance(table, dict) and (table.get("input_activations") or table.get("output_activations"))
        for table in tables
    )


def _require_plain(tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> None:
    sparsity = settings.get("sparsity_config")
    sparse = sparsity.get("format") if isinstance(sparsity, dict) else None
    transforms = settings.get("transform_config")
    rotated = isinstance(transforms, dict) and transforms.get("config_groups")
    other = next((name for name in tensors if name.endswith(".bitmask") or _is_scaled_twice(tensors, name)), None)
    if sparse not in (None, "dense") or rotated or other:
        why = f"sparse ({sparse})" if sparse not in (None, "dense") else "rotated as it runs (transform_config)"
        raise CheckpointError(
            f"The base is stored by compressed-tensors in a layout that is not read here: its weights are "
            f"{why if sparse or rotated else f'scaled twice though they are no float4, or sparse ({other})'}.",
            remedy=_OTHER,
            method="compressed-tensors",
        )


def _is_scaled_twice(tensors: Mapping[str, TensorEntry], name: str) -> bool:
    """Whether a tensor is a scale for all of a weight that is no float4, where it means nothing that is known."""
    module, _, leaf = name.rpartition(".")
    codes = tensors.get(f"{module}.weight_packed")
    return leaf == "weight_global_scale" and (codes is None or codes.dtype != torch.uint8)


def _schemes(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What config.json says of the weights, for each group of layers, and the group's targets."""
    groups = settings.get("config_groups")
    for table in groups.values() if isinstance(groups, dict) else ():
        weights = table.get("weights") if isinstance(table, dict) else None
        if isinstance(weights, dict):
            yield {**weights, "targets": table.get("targets")}


def _symmetric(module: str, schemes: list[Mapping[str, Any]]) -> bool | None:
    """Whether a layer's codes are said to have no zero points: by the group that names it, else one that matches it by
    an expression, else one of a class (utils/match.py, match_targets). None where the groups that may be its differ."""
    found: tuple[list[bool], ...] = ([], [], [])
    for scheme in schemes:
        targets = scheme["targets"]
        for target in targets if isinstance(targets, list) else ():
            rank = _rank(module, target) if isinstance(target, str) else None
            if rank is not None:
                found[rank].append(scheme.get("symmetric") is not False)
    said = set(next(filter(None, found), [scheme.get("symmetric") is not False for scheme in schemes]))
    return said.pop() if len(said) == 1 else None


def _rank(module: str, target: str) -> int | None:
    """How closely a target means a layer, 0 the closest; None where it does not."""
    if target == module:
        return 0
    if target.startswith("re:"):
        try:
            return 1 if re.match(target.removeprefix("re:"), module) else None
        except re.error:
            return None
    return 2 if target[:1].isupper() and "." not in target else None  # Linear


def _packed(
    tensors: Mapping[str, TensorEntry], module: str, codes: TensorEntry, schemes: list[Mapping[str, Any]]
) -> TensorEntry:
    stated = tensors.get(f"{module}.weight_shape")
    if stated is None or stated.dtype.is_floating_point or stated.nbytes > 64 or prod(stated.shape) != 2:
        raise _unsound(module, codes, "no weight_shape of two sizes", "one beside its codes")
    rows, columns = (int(size) for size in read_tensor(stated).flatten().tolist())
    if codes.dtype != torch.int32 or len(codes.shape) != 2 or codes.shape[0] != rows or rows < 1 or columns < 1:
        got = f"codes {list(codes.shape)} {codes.dtype} for a weight [{rows}, {columns}]"
        raise _unsound(module, codes, got, "words of int32, rows of them as the weight has")
    said = {scheme.get("num_bits") for scheme in schemes}
    fitting = [bits for bits in _BITS if bits in said and -(-columns // (32 // bits)) == codes.shape[1]]
    if len(fitting) != 1:
        got = f"{codes.shape[1]} words for {columns} columns, and num_bits {', '.join(map(str, said)) or 'none'}"
        raise _unsound(module, codes, got, "1, 2, 4 or 8 of them, which fit: others lie as the version has it")
    return _entry(tensors, module, codes, (rows, columns), fitting[0], schemes)


def _plain(
    tensors: Mapping[str, TensorEntry], module: str, codes: TensorEntry, schemes: list[Mapping[str, Any]]
) -> TensorEntry:
    if len(codes.shape) != 2 or not prod(codes.shape):
        raise _unsound(module, codes, f"codes {list(codes.shape)}", "a matrix")
    return _entry(tensors, module, codes, (codes.shape[0], codes.shape[1]), None, schemes)


def _entry(
    tensors: Mapping[str, TensorEntry],
    module: str,
    codes: TensorEntry,
    shape: tuple[int, int],
    bits: int | None,
    schemes: list[Mapping[str, Any]],
) -> TensorEntry:
    scales = tensors.get(f"{module}.weight_scale")
    if scales is None or scales.dtype not in _SCALES:
        raise _unsound(module, codes, "no weight_scale of floats", "one beside its codes")
    block = _block(module, codes, scales, shape, schemes)
    across = -(-shape[1] // block[1])
    zeros = tensors.get(f"{module}.weight_zero_point")
    zeros_packed = False
    symmetric = _symmetric(module, schemes)
    if zeros is None and symmetric is False:
        raise _unsound(module, codes, "no weight_zero_point", "one beside its codes, which config.json says have one")
    if zeros is not None and symmetric:
        # Versions differ: some loaders subtract them, others never read them. None that was written is but zero.
        if prod(zeros.shape) > prod(scales.shape) or read_tensor(zeros).float().any():
            got = "a weight_zero_point that is not zero, and symmetric codes in config.json"
            raise _unsound(module, codes, got, "one or the other")
        zeros = None
    if zeros is not None:
        per_word = 32 // (bits or 8)
        packed = (-(-shape[0] // per_word), across)
        zeros_packed = bits is not None and zeros.dtype == torch.int32 and zeros.shape == packed and block[0] == 1
        plain = not zeros.dtype.is_floating_point or zeros.dtype in _CODES
        if not zeros_packed and (prod(zeros.shape) != prod(scales.shape) or not plain):
            got = f"weight_zero_point {list(zeros.shape)} {zeros.dtype} for scales {list(scales.shape)}"
            raise _unsound(module, codes, got, "one for each scale")
    order = tensors.get(f"{module}.weight_g_idx")
    order = order if order is not None and _is_used(module, codes, order, shape[1], block[1]) else None
    coding = ScaledCodes(codes, scales, zeros, bits, block, order, zeros_packed)
    return replace(codes, name=f"{module}.weight", dtype=scales.dtype, shape=shape, coding=coding)


def _block(
    module: str, codes: TensorEntry, scales: TensorEntry, shape: tuple[int, int], schemes: list[Mapping[str, Any]]
) -> tuple[int, int]:
    """Rows and columns that share a scale, which the scales' shape tells (forward.py, dequantize)."""
    rows, columns = shape
    if prod(scales.shape) == 1:
        return rows, columns
    if len(scales.shape) == 2 and 0 not in scales.shape:
        high, across = scales.shape
        if high == rows and columns % across == 0:
            return 1, columns // across
        for scheme in schemes:
            block = scheme.get("block_structure")
            sizes = block if isinstance(block, list) and len(block) == 2 else []
            if len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
                height, width = sizes
                if (-(-rows // height), -(-columns // width)) == (high, across):
                    return height, width
    raise _unsound(module, codes, f"scales {list(scales.shape)} for a weight {list(shape)}", "a grid that fits it")


def _is_used(module: str, codes: TensorEntry, order: TensorEntry, columns: int, group: int) -> bool:
    """Whether columns are in groups by an index of their own; -1 is one that was never set."""
    if order.dtype.is_floating_point or order.shape != (columns,):
        raise _unsound(module, codes, f"weight_g_idx {list(order.shape)}", f"[{columns}] whole numbers")
    index = read_tensor(order).long()
    if (index == -1).any():
        return False
    if index.min() < 0 or not (torch.bincount(index, minlength=columns // group) == group).all():
        raise _unsound(module, codes, "a weight_g_idx of uneven groups", f"{group} columns in each")
    return True
