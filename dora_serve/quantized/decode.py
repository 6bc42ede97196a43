"""Codes into values, a range at a time: what the library that wrote them computes, operation by operation.

Peak memory: what is asked for, a few times over, in float32. With double quantization done here, also the absmax of
every block of the tensor: a sixteenth of its bytes in float32. A Conv1D, which is coded the other way round, is held
whole; those of the GPT-2 family are small.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from dora_serve.quantized.codings import (
    FLOAT4,
    AwqGroups,
    Float4Groups,
    Float8Blocks,
    FourBit,
    GptqGroups,
    HqqGroups,
    Int8Rows,
    MlxGroups,
    Mxfp4Experts,
    QuantizedOnLoad,
    ScaledCodes,
    Transposed,
)
from dora_serve.quantized.decode_columns import awq_rows, gptq_rows, mxfp4_rows, power_of_two
from dora_serve.quantized.quantize import BlockScales, block_scales, code_of, nearest_values, quantize_rows
from dora_serve.safetensors_file import TensorEntry, read_bytes, read_range, read_tensor

Decoder = Callable[[int, int], Tensor]
"""Values [start, stop) of the flattened tensor, in its dtype."""

INT8_UNIT = 7.874015718698502e-3
"""1 / 127 as bitsandbytes has it (functional.int8_vectorwise_dequant)."""


def open_decoder(entry: TensorEntry) -> Decoder:
    """What gives ranges of the values of an entry that has a coding. What it takes for all ranges, it keeps.

    Raises CheckpointError where a file cannot be read.
    """
    coding = entry.coding
    if isinstance(coding, FourBit):
        return _four_bit(entry, coding)
    if isinstance(coding, Int8Rows):
        return _by_rows(entry, _int8(coding))
    if isinstance(coding, HqqGroups):
        return lambda start, stop: _hqq(entry, coding, start, stop)
    if isinstance(coding, Float8Blocks):
        return _by_rows(entry, _float8(entry, coding))
    if isinstance(coding, ScaledCodes):
        return _by_rows(entry, _scaled(entry, coding))
    if isinstance(coding, GptqGroups):
        return _by_rows(entry, gptq_rows(entry, coding))
    if isinstance(coding, AwqGroups):
        return _by_rows(entry, awq_rows(entry, coding))
    if isinstance(coding, Mxfp4Experts):
        return _by_rows(entry, mxfp4_rows(entry, coding))
    if isinstance(coding, Float4Groups):
        return _by_rows(entry, _float4(coding))
    if isinstance(coding, MlxGroups):
        return _by_rows(entry, _mlx(entry, coding))
    if isinstance(coding, Transposed):
        return _transposed(entry, coding)
    assert isinstance(coding, QuantizedOnLoad)
    return _quantized_on_load(entry, coding)


def _by_rows(entry: TensorEntry, rows: Callable[[int, int], Tensor]) -> Decoder:
    """A range by way of the whole rows that it touches."""
    width = entry.shape[-1]

    def decode(start: int, stop: int) -> Tensor:
        first, last = start // width, -(-stop // width)
        return rows(first, last).to(entry.dtype).flatten()[start - first * width : stop - first * width]

    return decode


def _by_blocks(
    blocksize: int, values: Callable[[int, int], Tensor], absmax: Callable[[int, int], Tensor], start: int, stop: int
) -> Tensor:
    """`values * absmax` in float32 for a range, of which `values` are read from the start of a block on."""
    first, last = start // blocksize, -(-stop // blocksize)
    near = values(first * blocksize, stop)
    missing = (last - first) * blocksize - near.numel()
    blocks = (functional.pad(near, (0, missing)) if missing else near).view(-1, blocksize)
    blocks *= absmax(first, last).unsqueeze(1)
    return blocks.flatten()[start - first * blocksize : stop - first * blocksize]


def _four_bit(entry: TensorEntry, coding: FourBit) -> Decoder:
    pairs = code_of(coding.quant_type)[torch.arange(256).unsqueeze(1) >> torch.tensor([4, 0]) & 15]
    nested = coding.nested
    codes_of_absmax = None if nested is None else read_tensor(nested.code).float()

    def absmax(first: int, last: int) -> Tensor:
        stored = read_range(coding.absmax, first, last)
        if nested is None or codes_of_absmax is None:
            return stored.float()
        outer, size = first // nested.blocksize, nested.blocksize
        scales = read_range(nested.absmax, outer, -(-last // size)).float().repeat_interleave(size)
        return codes_of_absmax[stored.int()] * scales[first - outer * size :][: last - first] + nested.offset

    def values(start: int, stop: int) -> Tensor:
        # Blocks are of an even number of values, so the first of one is the first half of a byte.
        where = coding.codes.start
        stored = read_bytes(coding.codes.path, where + start // 2, where + (stop + 1) // 2)
        return pairs[torch.frombuffer(stored, dtype=torch.uint8).int()].flatten()[: stop - start]

    return lambda start, stop: _by_blocks(coding.blocksize, values, absmax, start, stop).to(entry.dtype)


def _int8(coding: Int8Rows) -> Callable[[int, int], Tensor]:
    width = coding.codes.shape[-1]

    def rows(first: int, last: int) -> Tensor:
        codes = read_range(coding.codes, first * width, last * width).view(-1, width)
        return codes * read_range(coding.scales, first, last).unsqueeze(1) * INT8_UNIT

    return rows


def _float8(entry: TensorEntry, coding: Float8Blocks) -> Callable[[int, int], Tensor]:
    width = entry.shape[1]
    scales, (height, across) = read_tensor(coding.scales).float(), coding.block

    def rows(first: int, last: int) -> Tensor:
        codes = read_range(coding.codes, first * width, last * width).view(-1, width).float()
        grid = scales[torch.arange(first, last) // height]
        return codes * grid.repeat_interleave(across, dim=1)[:, :width]

    return rows


def _float4(coding: Float4Groups) -> Callable[[int, int], Tensor]:
    half, across = coding.codes.shape[1], coding.scales.shape[1]
    divisor = None if coding.divisor is None else read_tensor(coding.divisor).float()
    pairs_of = torch.tensor(FLOAT4)[torch.arange(256).unsqueeze(1) >> torch.tensor([0, 4]) & 15]

    def rows(first: int, last: int) -> Tensor:
        pairs = read_range(coding.codes, first * half, last * half).view(-1, half)
        stored = read_range(coding.scales, first * across, last * across).view(-1, across)
        scales = power_of_two(stored) if divisor is None else stored.float() / divisor
        values = pairs_of[pairs.int()].view(last - first, across, coding.group)
        return (values * scales.unsqueeze(-1)).flatten(1)

    return rows


def _scaled(entry: TensorEntry, coding: ScaledCodes) -> Callable[[int, int], Tensor]:
    """(code - zero) * scale in the scales' dtype (compressed_tensors 0.20, lifecycle/forward_helpers.py)."""
    width = entry.shape[1]
    rows, columns = coding.block
    across = -(-width // columns)
    groups = torch.arange(width) // columns if coding.order is None else read_tensor(coding.order).long()

    def codes(first: int, last: int) -> Tensor:
        if coding.bits is None:
            return read_range(coding.codes, first * width, last * width).view(-1, width).to(entry.dtype)
        words = coding.codes.shape[1]
        packed = read_range(coding.codes, first * words, last * words).view(-1, words)
        return _unpacked(packed, coding.bits)[:, :width].to(entry.dtype)

    def zeros(low: int, high: int) -> Tensor:
        assert coding.zeros is not None
        if not coding.zeros_packed or coding.bits is None:
            return read_range(coding.zeros, low * across, high * across).view(-1, across).to(entry.dtype)
        per_word = 32 // coding.bits
        start, stop = low // per_word, -(-high // per_word)
        packed = read_range(coding.zeros, start * across, stop * across).view(-1, across)
        whole = _unpacked(packed.T.contiguous(), coding.bits).T
        return whole[low - start * per_word : high - start * per_word].to(entry.dtype)

    def decode(first: int, last: int) -> Tensor:
        low, high = first // rows, -(-last // rows)
        grid = torch.arange(first, last) // rows - low
        values = codes(first, last)
        if coding.zeros is not None:
            values = values - zeros(low, high)[grid][:, groups]
        return values * read_range(coding.scales, low * across, high * across).view(-1, across)[grid][:, groups]

    return decode


def _mlx(entry: TensorEntry, coding: MlxGroups) -> Callable[[int, int], Tensor]:
    """code * scale + bias: what mlx's product of a quantized matrix takes, before it rounds."""
    words, groups = coding.codes.shape[1], coding.scales.shape[1]
    places = torch.arange(entry.shape[1]) * coding.bits
    word, shift = places // 32, places % 32

    def rows(first: int, last: int) -> Tensor:
        stored = read_range(coding.codes, first * words, last * words).view(-1, words).long()
        following = functional.pad(stored, (0, 1))[:, word + 1]  # a code may end in the next word
        codes = (stored[:, word] | following << 32) >> shift & (1 << coding.bits) - 1
        scales, biases = (
            read_range(of, first * groups, last * groups).view(-1, groups, 1).double()
            for of in (coding.scales, coding.biases)
        )
        return (codes.view(-1, groups, coding.group_size) * scales + biases).flatten(1)

    return rows


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """(n, m) words of int32 as (n, m * (32 // bits)) codes, shifted into the range of signed ones."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1) - (1 << (bits - 1))


def _hqq(entry: TensorEntry, coding: HqqGroups, start: int, stop: int) -> Tensor:
    """(code - zero) * scale in the compute dtype, which is the entry's, as HQQ's own layer on any device."""
    columns, size = coding.columns, coding.word.itemsize
    part = coding.stored_rows * columns  # so many values, one after the other, have the same bits of their words
    pieces = []
    for index in range(start // part, -(-stop // part)):
        first, last = max(start, index * part), min(stop, (index + 1) * part)
        at = coding.codes.start + (first - index * part) * size
        words = torch.frombuffer(read_bytes(coding.codes.path, at, at + (last - first) * size), dtype=coding.word)
        shift = coding.bits_apart * (coding.per_word - 1 - index)
        pieces.append((words >> shift) & ((1 << coding.bits_apart) - 1))
    codes = torch.cat(pieces).to(entry.dtype)
    if coding.axis == 1:
        groups = torch.arange(start, stop) // columns
        low, high = start // columns, -(-stop // columns)
    else:
        groups = torch.arange(start, stop) % columns
        low, high = 0, columns
    zero, scale = (read_range(of, low, high).to(entry.dtype)[groups - low] for of in (coding.zero, coding.scale))
    return (codes - zero) * scale


def open_values(entry: TensorEntry) -> Decoder:
    """Ranges of the values of any entry, coded or not."""
    return open_decoder(entry) if entry.coding else lambda start, stop: read_range(entry, start, stop)


def _transposed(entry: TensorEntry, coding: Transposed) -> Decoder:
    columns, rows = coding.source.shape
    whole = open_values(coding.source)(0, rows * columns).view(columns, rows).T.flatten()
    return lambda start, stop: whole[start:stop]


def _quantized_on_load(entry: TensorEntry, coding: QuantizedOnLoad) -> Decoder:
    quantization, source, width = coding.quantization, coding.source, coding.source.shape[-1]

    read = open_values(source)

    def stored(start: int, stop: int) -> Tensor:
        values = read(start, stop)
        return values.to(quantization.dtype) if quantization.dtype is not None else values

    if quantization.kind == "int8":

        def rows(first: int, last: int) -> Tensor:
            codes, scales = quantize_rows(stored(first * width, last * width).view(-1, width))
            return codes * scales.unsqueeze(1) * INT8_UNIT

        return _by_rows(entry, rows)

    size = quantization.blocksize
    scales: BlockScales = block_scales(stored, prod(source.shape), quantization)

    def values(start: int, stop: int) -> Tensor:
        return nearest_values(stored(start, stop).float(), scales.absmax, start // size, quantization)

    def absmax(first: int, last: int) -> Tensor:
        return scales.restored[first:last]

    return lambda start, stop: _by_blocks(size, values, absmax, start, stop).to(entry.dtype)
