"""The values of quantized weights for the verifier: the formulas of `quantized.codings` once more, and as plainly.

In numpy, and shared with nothing that merges. A product of two float32 numbers is exact in float64, so one rounding of
it is what a float32 multiplication gives; sums are handled in the same way where one is needed.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dora_serve.quantized.codings import (
    AwqGroups,
    Float4Groups,
    Float8Blocks,
    FourBit,
    FourBitType,
    GptqGroups,
    HqqGroups,
    Int8Rows,
    MlxGroups,
    Mxfp4Experts,
    QuantizedOnLoad,
    ScaledCodes,
    Transposed,
)
from dora_serve.reference_columns import awq_values, float4_values, gptq_values, mxfp4_values
from dora_serve.safetensors_file import TensorEntry, read_bytes, read_range, read_tensor

Array = NDArray[Any]
_STEP = 1 << 20


def decoded_range(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Values [start, stop) of the flattened tensor, in its dtype. Peak memory: a few times theirs in float64; of what
    was quantized on load, the absmax of its blocks; what lies transposed is read whole."""
    coding = entry.coding
    index = np.arange(start, stop)
    if isinstance(coding, Transposed):
        columns, rows = coding.source.shape
        whole = _whole(coding.source).view(columns, rows)
        return whole.T.reshape(-1)[start:stop]
    if isinstance(coding, HqqGroups):
        return _hqq(entry, coding, index)
    if isinstance(coding, ScaledCodes):
        return _scaled(entry, coding, index)
    if isinstance(coding, GptqGroups):
        return _rounded(torch.from_numpy(gptq_values(coding, entry.shape[1], index)), entry.dtype)
    if isinstance(coding, AwqGroups):
        return _rounded(torch.from_numpy(awq_values(coding, entry.shape[1], index)), entry.dtype)
    if isinstance(coding, Mxfp4Experts):
        return _rounded(torch.from_numpy(mxfp4_values(coding, entry.shape, index)), entry.dtype)
    if isinstance(coding, Float4Groups):
        return _rounded(torch.from_numpy(float4_values(coding, entry.shape[1], index)), entry.dtype)
    if isinstance(coding, FourBit):
        values = _four_bit(coding, index)
    elif isinstance(coding, Int8Rows):
        values = _by_127(_numbers(coding.codes, index), _numbers(coding.scales, index // entry.shape[-1]))
    elif isinstance(coding, MlxGroups):
        values = _mlx(coding, index, entry.shape[1])
    elif isinstance(coding, Float8Blocks):
        row, column = index // entry.shape[-1], index % entry.shape[-1]
        across = coding.scales.shape[-1]
        scale = _numbers(coding.scales, row // coding.block[0] * across + column // coding.block[1])
        values = (_numbers(coding.codes, index) * scale).astype(np.float32)
    else:
        assert isinstance(coding, QuantizedOnLoad)
        values = _quantized_on_load(coding, index)
    return torch.from_numpy(np.ascontiguousarray(values)).to(entry.dtype)


def _whole(entry: TensorEntry) -> Tensor:
    return read_tensor(entry).flatten() if entry.coding is None else decoded_range(entry, 0, prod(entry.shape))


def _numbers(entry: TensorEntry, index: Array) -> Array:
    """The stored numbers of ascending places, or of places near each other, in float64."""
    if not index.size:
        return np.empty(0)
    low, high = int(index.min()), int(index.max()) + 1
    found: Array = read_range(entry, low, high).double().numpy()[index - low]
    return found


def _levels(quant_type: FourBitType) -> Array:
    """What the codes stand for, in float32: the quantiles of QLoRA's appendix E, or sign, exponent and mantissa."""
    if quant_type == "fp4":
        positive = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
        return np.concatenate([positive, -positive])
    negative = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036)
    positive_ones = (0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
    return np.array(negative + positive_ones, dtype=np.float32)


def _four_bit(coding: FourBit, index: Array) -> Array:
    first, last = int(index[0]) // 2, int(index[-1]) // 2 + 1
    stored = np.frombuffer(
        bytes(read_bytes(coding.codes.path, coding.codes.start + first, coding.codes.start + last)), dtype=np.uint8
    )
    codes = np.where(index % 2 == 0, stored[index // 2 - first] // 16, stored[index // 2 - first] % 16)
    blocks = index // coding.blocksize
    absmax = _numbers(coding.absmax, blocks)
    if coding.nested is not None:
        code = read_tensor(coding.nested.code).double().numpy()
        outer = _numbers(coding.nested.absmax, blocks // coding.nested.blocksize)
        product = (code[absmax.astype(np.int64)] * outer).astype(np.float32)
        absmax = (product.astype(np.float64) + float(np.float32(coding.nested.offset))).astype(np.float32)
    exact: Array = _levels(coding.quant_type).astype(np.float64)[codes] * absmax
    return exact.astype(np.float32)


def _mlx(coding: MlxGroups, index: Array, width: int) -> Array:
    """A code's bits, taken from the bytes of its row one by one."""
    row, column = index // width, index % width
    row_bytes = coding.codes.shape[1] * 4
    low, high = int(row.min()) * row_bytes, (int(row.max()) + 1) * row_bytes
    read = read_bytes(coding.codes.path, coding.codes.start + low, coding.codes.start + high)
    stored = np.frombuffer(bytes(read), dtype=np.uint8)
    codes = np.zeros(index.shape)
    for bit in range(coding.bits):
        place = column * coding.bits + bit
        codes += (stored[row * row_bytes - low + place // 8] >> (place % 8) & 1) * 2.0**bit
    group = row * coding.scales.shape[1] + column // coding.group_size
    values: Array = codes * _numbers(coding.scales, group) + _numbers(coding.biases, group)
    return values


def _by_127(codes: Array, scales: Array) -> Array:
    scaled = (codes * scales).astype(np.float32).astype(np.float64)
    values: Array = (scaled * float(np.float32(7.874015718698502e-3))).astype(np.float32)
    return values


def _hqq(entry: TensorEntry, coding: HqqGroups, index: Array) -> Tensor:
    row, column = index // coding.columns, index % coding.columns
    place = row % coding.stored_rows * coding.columns + column
    low, high = int(place.min()), int(place.max()) + 1
    size = coding.word.itemsize
    stored = read_bytes(coding.codes.path, coding.codes.start + low * size, coding.codes.start + high * size)
    words = np.frombuffer(bytes(stored), dtype=np.uint8 if size == 1 else np.int32).astype(np.int64)[place - low]
    below = coding.per_word - 1 - row // coding.stored_rows
    codes = torch.from_numpy(words // 2 ** (coding.bits_apart * below) % 2**coding.bits_apart).double()
    group = row if coding.axis == 1 else column
    zero = torch.from_numpy(_numbers(coding.zero, group)).to(entry.dtype).double()
    scale = torch.from_numpy(_numbers(coding.scale, group)).to(entry.dtype).double()
    return _rounded(_rounded(codes - zero, entry.dtype).double() * scale, entry.dtype)


def _scaled(entry: TensorEntry, coding: ScaledCodes, index: Array) -> Tensor:
    row, column = index // entry.shape[1], index % entry.shape[1]
    across = -(-entry.shape[1] // coding.block[1])
    group = column // coding.block[1] if coding.order is None else _numbers(coding.order, column).astype(np.int64)
    place = row // coding.block[0] * across + group
    if coding.bits is None:
        codes = _numbers(coding.codes, index)
    else:
        codes = _from_words(coding.codes, row * coding.codes.shape[1], column, coding.bits, 1)
    if coding.zeros is not None and coding.zeros_packed and coding.bits is not None:
        codes = codes - _from_words(coding.zeros, group, row, coding.bits, across)
    elif coding.zeros is not None:
        codes = codes - _numbers(coding.zeros, place)
    return _rounded(torch.from_numpy(codes * _numbers(coding.scales, place)), entry.dtype)


def _from_words(entry: TensorEntry, base: Array, along: Array, bits: int, stride: int) -> Array:
    """Codes that lie `stride` words apart, 32 // bits to a word, the first in its lowest bits and shifted by half."""
    per_word = 32 // bits
    words = _numbers(entry, base + along // per_word * stride).astype(np.int64) % 2**32
    codes: Array = (words // 2 ** (bits * (along % per_word)) % 2**bits - 2 ** (bits - 1)).astype(np.float64)
    return codes


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """As an operation in a 16-bit dtype rounds its result: computed in float32 first."""
    return values.float().to(dtype)


def _quantized_on_load(coding: QuantizedOnLoad, index: Array) -> Array:
    kind, size = coding.quantization.kind, coding.quantization.blocksize
    first, last = int(index[0]), int(index[-1]) + 1
    if kind == "int8":
        width = coding.source.shape[-1]
        low, high = first // width, -(-last // width)
        rows = torch.from_numpy(_dense(coding, low * width, high * width)).half().float().numpy().reshape(-1, width)
        largest = np.abs(rows).max(axis=1, keepdims=True)
        inverse = np.float32(127) * (np.float32(1) / largest)  # as torch divides a number by a tensor
        codes = np.rint(rows * inverse)
        whole_rows = _by_127(codes.astype(np.float64), largest.astype(np.float64))
        return whole_rows.reshape(-1)[first - low * width : last - low * width]
    path = coding.source.path.stat()
    absmax, restored = _absmax(coding, path.st_mtime_ns)
    low, high = first // size, -(-last // size)
    blocks = _in_blocks(_dense(coding, low * size, min(high * size, prod(coding.source.shape))), size)
    levels = _levels(kind)
    values = levels[_nearest(blocks, absmax[low:high], levels)] * restored[low:high, None]
    return values.reshape(-1)[first - low * size : last - low * size]


def _dense(coding: QuantizedOnLoad, start: int, stop: int) -> Array:
    """Of the source, in float32, by way of the dtype that it was cast to."""
    source, dtype = coding.source, coding.quantization.dtype
    values = read_range(source, start, stop) if source.coding is None else decoded_range(source, start, stop)
    dense: Array = (values if dtype is None else values.to(dtype)).float().numpy()
    return dense


def _in_blocks(values: Array, size: int) -> Array:
    return np.pad(values, (0, -values.size % size)).reshape(-1, size)


@lru_cache(maxsize=2)
def _absmax(coding: QuantizedOnLoad, _: int) -> tuple[Array, Array]:
    """Of every block of the tensor, by which it is divided and by which it is multiplied again. The second argument
    tells one state of the file from another."""
    size, count = coding.quantization.blocksize, prod(coding.source.shape)
    step = _STEP // size * size
    parts = (_dense(coding, start, min(start + step, count)) for start in range(0, count, step))
    absmax = np.concatenate([np.abs(_in_blocks(part, size)).max(axis=1) for part in parts])
    if not coding.quantization.double:
        return absmax, absmax
    dynamic = _dynamic_levels()
    mean = torch.from_numpy(absmax).mean().numpy()  # the order of the sum is torch's
    outer = _in_blocks(absmax - mean, 256)
    outer_absmax = np.abs(outer).max(axis=1)
    rounded = dynamic[_nearest(outer, outer_absmax, dynamic)] * outer_absmax[:, None]
    return absmax, rounded.reshape(-1)[: absmax.size] + mean


def _dynamic_levels() -> Array:
    """7 exponents of ten with 1, 2, 4 ... 64 fractions each, both signs, zero and one (arXiv 1511.04561)."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1).numpy()
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * middles
        levels += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.array(levels, dtype=np.float32))


def _nearest(blocks: Array, absmax: Array, levels: Array) -> Array:
    """Index of the nearest level of each value over its block's absmax, of which one at a tie is the lower."""
    order = np.argsort(levels, kind="stable")
    inverse = np.float32(1) / np.maximum(absmax, np.float32(1e-38))
    scaled = np.clip(blocks * inverse[:, None], np.float32(-1), np.float32(1))
    ascending = levels[order]
    found: Array = order[np.searchsorted((ascending[:-1] + ascending[1:]) / np.float32(2), scaled, side="left")]
    return found
