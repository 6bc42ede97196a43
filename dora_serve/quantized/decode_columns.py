"""Codes that lie the other way round into values: a row of the weight is a column of what is stored.

Peak memory: a stripe of columns (column_reader.py) and what is asked for, a few times over; the scales and zeros of the
tensor, a few hundredths of its bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dora_serve.column_reader import ColumnReader
from dora_serve.quantized.codings import AWQ_ORDER, FLOAT4, AwqGroups, GptqGroups, Mxfp4Experts
from dora_serve.safetensors_file import TensorEntry, read_tensor

Rows = Callable[[int, int], Tensor]
"""Rows [first, last) of the matrix of values."""

_WORD = 32


def gptq_rows(entry: TensorEntry, coding: GptqGroups) -> Rows:
    """(code - zero) * scale as GPTQModel's and AutoRound's own layers in torch have it, for any order of the inputs."""
    outputs, inputs = entry.shape
    words = coding.codes.shape[0]
    reader = ColumnReader(coding.codes, outputs)
    scales = read_tensor(coding.scales).T
    if coding.zeros is None:
        zeros = torch.full(scales.shape, 1 << (coding.bits - 1), dtype=scales.dtype)
    else:
        stored = unpacked(read_tensor(coding.zeros).T.contiguous(), coding.bits)
        zeros = (stored + int(coding.less_one)).to(scales.dtype)
    groups = torch.arange(inputs) // coding.group if coding.order is None else read_tensor(coding.order).long()

    def rows(first: int, last: int) -> Tensor:
        codes = unpacked(reader.read((0, words), (first, last)), coding.bits).T.to(entry.dtype)
        return _scaled(codes, zeros[first:last], scales[first:last], groups)

    return rows


def awq_rows(entry: TensorEntry, coding: AwqGroups) -> Rows:
    """(code - zero) * scale as AutoAWQ's own layer."""
    _, inputs = entry.shape
    width = coding.codes.shape[1]
    reader = ColumnReader(coding.codes, width)
    scales = read_tensor(coding.scales).T
    zeros = _in_awq_order(read_tensor(coding.zeros)).T.to(scales.dtype)
    groups = torch.arange(inputs) // coding.group

    def rows(first: int, last: int) -> Tensor:
        low, high = first // 8, -(-last // 8)
        codes = _in_awq_order(reader.read((0, inputs), (low, high)))[:, first - low * 8 : last - low * 8]
        return _scaled(codes.T.to(entry.dtype), zeros[first:last], scales[first:last], groups)

    return rows


def mxfp4_rows(entry: TensorEntry, coding: Mxfp4Experts) -> Rows:
    """Powers of two times float4, which is exact but at the ends of the dtype's range."""
    _, inputs, outputs = entry.shape
    blocks = inputs // 32
    codes, scales = ColumnReader(coding.codes, blocks * 16), ColumnReader(coding.scales, blocks)
    levels = torch.tensor(FLOAT4)

    def of_expert(expert: int, first: int, last: int) -> Tensor:
        low, high = first // 32, -(-last // 32)
        stored = expert * outputs, (expert + 1) * outputs
        pairs = codes.read(stored, (low * 16, high * 16)).reshape(outputs, high - low, 16)
        values = levels[torch.stack((pairs & 15, pairs >> 4), dim=-1).int()].flatten(2)
        values *= power_of_two(scales.read(stored, (low, high))).unsqueeze(-1)
        return values.flatten(1)[:, first - low * 32 : last - low * 32].T

    def rows(first: int, last: int) -> Tensor:
        experts = range(first // inputs, -(-last // inputs))
        return torch.cat(
            [
                of_expert(expert, max(first - expert * inputs, 0), min(last - expert * inputs, inputs))
                for expert in experts
            ]
        )

    return rows


def unpacked(words: Tensor, bits: int) -> Tensor:
    """(n * bits / 32, m) words of int32 as (n, m) codes that run down them, the first in the lowest bits."""
    runs = words.unflatten(0, (-1, bits))  # 32 codes fill so many words
    places = torch.arange(_WORD) * bits
    word, shift = places // _WORD, places % _WORD
    codes = runs[:, word] >> shift.int().view(1, -1, 1)
    for place in torch.nonzero(shift + bits > _WORD).flatten().tolist():
        inside = _WORD - int(shift[place])
        codes[:, place] &= (1 << inside) - 1
        codes[:, place] |= runs[:, int(word[place]) + 1] << inside
    whole: Tensor = (codes & ((1 << bits) - 1)).flatten(0, 1)
    return whole


def power_of_two(exponents: Tensor) -> Tensor:
    """Of bytes with a bias of 127 (E8M0), in float32."""
    return torch.pow(2.0, exponents.float() - 127)


def _in_awq_order(words: Tensor) -> Tensor:
    """(n, m) words of int32 as (n, 8 m) codes of 4 bits."""
    shifts = 4 * torch.tensor(AWQ_ORDER, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1)


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """codes (rows, inputs), zeros and scales (rows, groups), all of one dtype."""
    return (codes - zeros[:, groups]) * scales[:, groups]
