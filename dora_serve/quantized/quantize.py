"""bitsandbytes' quantization, block by block, as its portable kernels and those for CUDA compute it.

Checked against bitsandbytes 0.50: `backends/default/ops.py` to the bit. Its native kernel for CPUs looks the codes of
the absmax up in a table of 2^16 steps, and so takes a neighbour where a value lies within a step of the middle; the
mean that double quantization subtracts depends on the order of its sum, and so on the device, in its last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dora_serve.quantized.codings import FourBitType, Quantization

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Normal float (arXiv 2305.14314, appendix E)."""

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
"""Times 1 / 12: sign, two bits of exponent, one of mantissa."""

_LEAST = 1e-38
NESTED_BLOCKSIZE = 256
_STEP_BLOCKS = 1 << 12


def code_of(quant_type: FourBitType) -> Tensor:
    """The 16 values that the codes stand for, in float32."""
    return torch.tensor(_NF4) if quant_type == "nf4" else torch.tensor(_FP4) / 12.0


def dynamic_code() -> Tensor:
    """The 256 values of bitsandbytes' signed dynamic map (arXiv 1511.04561), ascending, in float32."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / 2
        values += (10.0 ** (exponent - 6) * means).tolist()
        values += (-(10.0 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values))


@dataclass(frozen=True)
class BlockScales:
    """absmax (blocks,): what the values are divided by. restored (blocks,): what the codes are multiplied by, which
    double quantization has rounded. nested_codes, nested_absmax and offset say how, where there is any."""

    absmax: Tensor
    restored: Tensor
    nested_codes: Tensor | None = None
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None


def block_scales(stored: Callable[[int, int], Tensor], count: int, quantization: Quantization) -> BlockScales:
    """The absmax of all blocks of `count` values, of which `stored` gives ranges."""
    size = quantization.blocksize
    absmax = torch.empty(-(-count // size))
    for first in range(0, len(absmax), _STEP_BLOCKS):
        last = min(first + _STEP_BLOCKS, len(absmax))
        absmax[first:last] = _blocks(stored(first * size, min(last * size, count)).float(), size).abs().amax(dim=1)
    if not quantization.double:
        return BlockScales(absmax, absmax)
    offset, code = absmax.mean(), dynamic_code()
    outer = _blocks(absmax - offset, NESTED_BLOCKSIZE)
    outer_absmax = outer.abs().amax(dim=1)
    codes = _nearest(outer, outer_absmax, code)
    restored = (code[codes] * outer_absmax.unsqueeze(1)).flatten()[: len(absmax)] + offset
    return BlockScales(absmax, restored, codes.flatten()[: len(absmax)].to(torch.uint8), outer_absmax, offset)


def nearest_codes(values: Tensor, absmax: Tensor, first_block: int, quantization: Quantization) -> Tensor:
    """The 4-bit codes (uint8) of float32 values that begin with a block; absmax is that of all blocks."""
    assert quantization.kind != "int8"
    code, order = code_of(quantization.kind).sort()
    return order.to(torch.uint8)[_nearest_places(values, absmax, first_block, quantization, code)]


def nearest_values(values: Tensor, absmax: Tensor, first_block: int, quantization: Quantization) -> Tensor:
    """What these codes stand for, in float32, before it is multiplied by an absmax again."""
    assert quantization.kind != "int8"
    code = code_of(quantization.kind).sort().values
    return code[_nearest_places(values, absmax, first_block, quantization, code)]


def _nearest_places(
    values: Tensor, absmax: Tensor, first_block: int, quantization: Quantization, code: Tensor
) -> Tensor:
    blocks = _blocks(values, quantization.blocksize)
    return _nearest(blocks, absmax[first_block : first_block + len(blocks)], code).flatten()[: values.numel()]


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """LLM.int8(): codes (rows, columns) int8 and the absmax of each row in float32. All passes through float16."""
    half = weight.to(torch.float16)
    scales = half.abs().amax(dim=1).float()
    return torch.round(half * (127.0 / scales.unsqueeze(1))).to(torch.int8), scales


def _blocks(values: Tensor, size: int) -> Tensor:
    """(blocks, size), the last filled up with zeros."""
    missing = -values.numel() % size
    return (functional.pad(values, (0, missing)) if missing else values).view(-1, size)


def _nearest(blocks: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """Of each value over the absmax of its block, the index of the nearest of the ascending `code`, the lower in a
    tie."""
    scaled = (blocks * (1.0 / absmax.clamp(min=_LEAST)).unsqueeze(1)).clamp_(-1, 1)
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)
