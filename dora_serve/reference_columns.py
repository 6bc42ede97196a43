"""The values of codes that lie the other way round, and of float4, for the verifier: once more, and as plainly.

In numpy, like reference_decode.py, and shared with nothing that merges. All that is returned is exact in float64, but
for the one rounding that a formula of `quantized.codings` has before its last.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_serve.column_reader import ColumnReader
from dora_serve.quantized.codings import AwqGroups, Float4Groups, GptqGroups, Mxfp4Experts
from dora_serve.safetensors_file import TensorEntry, read_range, read_tensor

Array = NDArray[Any]


def gptq_values(coding: GptqGroups, inputs: int, index: Array) -> Array:
    """Of places in the flattened (outputs, inputs)."""
    output, place = index // inputs, index % inputs
    low, high = int(output[0]), int(output[-1]) + 1
    words = _columns(coding.codes, coding.codes.shape[1], (0, coding.codes.shape[0]), (low, high))
    codes = _field(words, place, output - low, coding.bits)
    group = place // coding.group if coding.order is None else read_tensor(coding.order).long().numpy()[place]
    if coding.zeros is None:
        zero: Array = np.array(2.0 ** (coding.bits - 1))
    else:
        zero = _field(read_tensor(coding.zeros).numpy().T, output, group, coding.bits) + int(coding.less_one)
    values: Array = (codes - zero) * read_tensor(coding.scales).double().numpy()[group, output]
    return values


def awq_values(coding: AwqGroups, inputs: int, index: Array) -> Array:
    """Of places in the flattened (outputs, inputs)."""
    output, place = index // inputs, index % inputs
    low, high = int(output[0]) // 8, int(output[-1]) // 8 + 1
    words = _columns(coding.codes, coding.codes.shape[1], (0, inputs), (low, high))
    group = place // coding.group
    codes = _eighth(words[place, output // 8 - low], output)
    zeros = _eighth(read_tensor(coding.zeros).numpy()[group, output // 8], output)
    values: Array = (codes - zeros) * read_tensor(coding.scales).double().numpy()[group, output]
    return values


def mxfp4_values(coding: Mxfp4Experts, shape: tuple[int, ...], index: Array) -> Array:
    """Of places in the flattened (experts, inputs, outputs)."""
    _, inputs, outputs = shape
    row = index // outputs
    found = []
    for expert in range(int(row[0]) // inputs, int(row[-1]) // inputs + 1):
        inside = index[row // inputs == expert]
        place, output = inside // outputs % inputs, inside % outputs
        low, high = int(place.min()) // 32, int(place.max()) // 32 + 1
        rows = expert * outputs, (expert + 1) * outputs
        stored = _columns(coding.codes, inputs // 2, rows, (low * 16, high * 16))
        exponents = _columns(coding.scales, inputs // 32, rows, (low, high))
        half = stored[output, place // 2 - low * 16].astype(np.int64)
        codes = np.where(place % 2 == 0, half % 16, half // 16)
        found.append(_float4(codes) * _power(exponents[output, place // 32 - low]))
    return np.concatenate(found)


def float4_values(coding: Float4Groups, columns: int, index: Array) -> Array:
    """Of places in the flattened (rows, columns)."""
    first, last = int(index[0]) // 2, int(index[-1]) // 2 + 1
    half = read_range(coding.codes, first, last).long().numpy()[index // 2 - first]
    codes = np.where(index % 2 == 0, half % 16, half // 16)
    group = index // columns * coding.scales.shape[1] + index % columns // coding.group
    scales = read_range(coding.scales, int(group[0]), int(group[-1]) + 1)
    if coding.divisor is None:
        scale = _power(scales.numpy())
    else:
        divided = scales.double().numpy() / read_tensor(coding.divisor).double().item()
        scale = divided.astype(np.float32).astype(np.float64)
    values: Array = _float4(codes) * scale[group - int(group[0])]
    return values


def _columns(entry: TensorEntry, width: int, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
    stored: Array = _reader(entry, width, entry.path.stat().st_mtime_ns).read(rows, columns).numpy()
    return stored


@lru_cache(maxsize=2)
def _reader(entry: TensorEntry, width: int, _: int) -> ColumnReader:
    """It keeps a stripe for the ranges that follow. The last argument tells one state of the file from another."""
    return ColumnReader(entry, width)


def _field(words: Array, along: Array, across: Array, bits: int) -> Array:
    """The `along`-th number of so many bits down column `across`: the column is one long number, lowest bits first."""
    lowest = along * bits
    last = words.shape[0] - 1
    pair = [words[np.minimum(lowest // 32 + more, last), across].astype(np.int64) % 2**32 for more in (0, 1)]
    numbers = pair[0].astype(np.uint64) + (pair[1].astype(np.uint64) << np.uint64(32))
    found: Array = (numbers >> (lowest % 32).astype(np.uint64)) % np.uint64(2**bits)
    return found.astype(np.float64)


def _eighth(words: Array, output: Array) -> Array:
    """The code of an output in its word: even ones fill the lower half in turn, odd ones the upper."""
    eighth = output % 8
    shift = 4 * (eighth // 2 + np.where(eighth % 2 == 0, 0, 4))
    codes: Array = (words.astype(np.int64) % 2**32 // 2**shift % 16).astype(np.float64)
    return codes


def _float4(codes: Array) -> Array:
    """Sign, two bits of exponent with a bias of 1, one of mantissa; the lowest exponent is subnormal."""
    exponent, mantissa = codes // 2 % 4, codes % 2
    size = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    signed: Array = np.where(codes >= 8, -size, size)
    return signed


def _power(exponents: Array) -> Array:
    """2 ** (e - 127); the last is beyond float32, in which the formula has it."""
    power: Array = np.ldexp(1.0, exponents.astype(np.int64) - 127)
    return np.where(exponents == 255, np.inf, power)
