"""How the values of a tensor are made of what is stored: facts alone, which the merge and its judge both read.

Values are numbered as in the flattened tensor. Nothing is decoded here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dora_serve.safetensors_file import TensorEntry

FourBitType = Literal["nf4", "fp4"]


@dataclass(frozen=True)
class Nested:
    """bitsandbytes' double quantization of the absmax of the blocks: code[absmax_code] * absmax + offset.

    absmax: float32, one for `blocksize` codes; code: the 256 values that they stand for.
    """

    absmax: TensorEntry
    code: TensorEntry
    blocksize: int
    offset: float


@dataclass(frozen=True)
class FourBit:
    """bitsandbytes' Params4bit: value = code[nibble] * absmax of its block, in float32, rounded once to the dtype.

    codes: two to a byte, the first in the high half, whatever dtype they are stored in. absmax: one for `blocksize`
    values, float32, or uint8 where it is nested.
    """

    codes: TensorEntry
    absmax: TensorEntry
    quant_type: FourBitType
    blocksize: int
    nested: Nested | None

    @property
    def label(self) -> str:
        double = ", double quantization" if self.nested else ""
        return f"bitsandbytes {self.quant_type}, blocks of {self.blocksize}{double}"


@dataclass(frozen=True)
class Int8Rows:
    """bitsandbytes' Int8Params (LLM.int8()): value = code * SCB of its row / 127, in float32."""

    codes: TensorEntry
    scales: TensorEntry

    @property
    def label(self) -> str:
        return "bitsandbytes int8"


@dataclass(frozen=True)
class HqqGroups:
    """HQQ: value = (code - zero) * scale of its group, each step rounded to the compute dtype.

    The tensor is a matrix of groups: with axis 1 (groups, group_size), one group a row; with axis 0 (group_size,
    groups), one group a column. codes: `per_word` rows of it share one word, a row and those that lie whole numbers of
    `stored_rows` further down, the first in the highest bits. scale, zero: one a group.
    """

    codes: TensorEntry
    scale: TensorEntry
    zero: TensorEntry
    axis: Literal[0, 1]
    columns: int
    per_word: int
    word: torch.dtype
    bits_apart: int

    @property
    def stored_rows(self) -> int:
        return self.codes.nbytes // self.word.itemsize // self.columns

    @property
    def label(self) -> str:
        return f"HQQ {self.bits_apart} bit, axis {self.axis}"


@dataclass(frozen=True)
class Float8Blocks:
    """float8 with a scale for each block of rows and columns: value = code * scale, in float32, rounded once."""

    codes: TensorEntry
    scales: TensorEntry
    block: tuple[int, int]

    @property
    def label(self) -> str:
        return "float8 in blocks"


@dataclass(frozen=True)
class ScaledCodes:
    """compressed-tensors: value = (code - zero) * scale in the dtype of the scales, which holds the difference exactly.

    codes: (rows, columns) int8 or float8; or, with bits, words of int32 in which a row's codes lie from the lowest bits
    on, 32 // bits to a word, shifted by half their range. scales: one for the tensor, or a grid of one for each block
    of rows and columns; zeros: as many, None for none, or packed down the columns as the codes are along the rows.
    order: the group of each column, None where they follow each other.
    """

    codes: TensorEntry
    scales: TensorEntry
    zeros: TensorEntry | None
    bits: int | None
    block: tuple[int, int]
    order: TensorEntry | None
    zeros_packed: bool

    @property
    def label(self) -> str:
        kind = f"{self.bits} bit, packed" if self.bits else str(self.codes.dtype).removeprefix("torch.")
        return f"compressed-tensors {kind}"


@dataclass(frozen=True)
class GptqGroups:
    """GPTQ: value = (code - zero) * scale of its group, in the dtype of the scales, which holds the difference exactly.

    All is stored the other way round. codes: (inputs * bits / 32, outputs) words of int32, down which the codes of an
    output follow each other from the lowest bits on, those of 3 bits across the words' borders. scales: (groups,
    outputs). zeros: (groups, outputs * bits / 32), likewise along its rows; None for the middle of the codes' range.
    less_one: whether they are stored less one. group: inputs that share a scale; order: the group of each input, None
    where they follow each other.
    """

    codes: TensorEntry
    scales: TensorEntry
    zeros: TensorEntry | None
    bits: int
    less_one: bool
    group: int
    order: TensorEntry | None

    @property
    def label(self) -> str:
        return f"GPTQ {self.bits} bit"


AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word hold the code of each of its eight outputs, from the lowest on."""


@dataclass(frozen=True)
class AwqGroups:
    """AWQ's gemm layout: value = (code - zero) * scale of its group, in the dtype of the scales.

    All is stored the other way round. codes: (inputs, outputs / 8) words of int32, eight codes of 4 bits in AWQ_ORDER;
    zeros: (groups, outputs / 8), likewise; scales: (groups, outputs). group: inputs that share a scale.
    """

    codes: TensorEntry
    scales: TensorEntry
    zeros: TensorEntry
    group: int

    @property
    def label(self) -> str:
        return "AWQ 4 bit"


FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the codes of float4 (e2m1) stand for: sign, two bits of exponent, one of mantissa."""


@dataclass(frozen=True)
class Mxfp4Experts:
    """gpt-oss' experts: value = FLOAT4[code] * 2 ** (scale - 127), in float32, rounded once.

    The values are (experts, inputs, outputs). codes: (experts, outputs, inputs / 32, 16) bytes, two codes in each, the
    first in the low half; scales: (experts, outputs, inputs / 32) bytes (OCP Microscaling Formats 1.0).
    """

    codes: TensorEntry
    scales: TensorEntry

    @property
    def label(self) -> str:
        return "MXFP4"


@dataclass(frozen=True)
class Float4Groups:
    """compressed-tensors' float4: value = FLOAT4[code] * scale of its group, in float32, rounded once.

    codes: (rows, columns / 2) bytes, the first code in the low half. scales: (rows, columns / group), float8 over the
    tensor's `divisor` (NVFP4), or the exponents of powers of two plus 127, where that is None (MXFP4).
    """

    codes: TensorEntry
    scales: TensorEntry
    divisor: TensorEntry | None
    group: int

    @property
    def label(self) -> str:
        return f"compressed-tensors {'MXFP4' if self.divisor is None else 'NVFP4'}"


@dataclass(frozen=True)
class MlxGroups:
    """mlx's affine quantization: value = code * scale + bias of its group, in float64, rounded once to float32.

    codes: (rows, words) of uint32, in which the codes of a row lie as one stream of bits, the first in the lowest.
    scales, biases: (rows, groups).
    """

    codes: TensorEntry
    scales: TensorEntry
    biases: TensorEntry
    bits: int
    group_size: int

    @property
    def label(self) -> str:
        return f"mlx {self.bits} bit, groups of {self.group_size}"


@dataclass(frozen=True)
class Quantization:
    """What a trainer's quantization made of a dense weight: the kind, and the dtype that it was cast to before.

    double: of the blocks' absmax as well. dtype: None for the one that is stored.
    """

    kind: Literal["nf4", "fp4", "int8"]
    double: bool = False
    dtype: torch.dtype | None = None
    blocksize: int = 64

    @property
    def label(self) -> str:
        if self.kind == "int8":
            return "bitsandbytes int8"
        double = ", double quantization" if self.double else ", single quantization"
        return f"bitsandbytes {self.kind}, blocks of {self.blocksize}{double}"


@dataclass(frozen=True)
class QuantizedOnLoad:
    """A dense tensor as it is after bitsandbytes has quantized and dequantized it, as a trainer does that loads it."""

    source: TensorEntry
    quantization: Quantization

    @property
    def label(self) -> str:
        return f"{self.quantization.label}, quantized here"


@dataclass(frozen=True)
class Transposed:
    """A matrix whose values are stored, or coded, the other way round: bitsandbytes turns a Conv1D before it quantizes.

    source: (columns, rows), with or without a coding of its own.
    """

    source: TensorEntry

    @property
    def label(self) -> str:
        return self.source.coding.label if self.source.coding else "transposed"


Coding = (
    FourBit
    | Int8Rows
    | HqqGroups
    | Float8Blocks
    | ScaledCodes
    | GptqGroups
    | AwqGroups
    | Mxfp4Experts
    | Float4Groups
    | MlxGroups
    | QuantizedOnLoad
    | Transposed
)
