"""The arithmetic of a merge: rounded once, and the formulas of the papers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dora_serve.ops import RoundingBuffers, add_delta, delta_weight, merge_weight, norm_scale, round_once, row_norms

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NUMPY = {torch.float16: np.float16, torch.float32: np.float32}
FORMATS = {torch.bfloat16: (8, -126, 127), torch.float16: (11, -14, 15), torch.float32: (24, -126, 127)}
"""Digits of the significand, and the exponents of the smallest and the largest normal number."""


def nearest(value: float, dtype: torch.dtype) -> float:
    """`value` in `dtype` by the definition of IEEE 754, in integers: to nearest, ties to even, beyond to infinity."""
    if math.isnan(value) or math.isinf(value) or value == 0:
        return value
    digits, lowest, highest = FORMATS[dtype]
    exponent = max(math.frexp(value)[1] - 1, lowest)
    step = Fraction(2) ** (exponent - digits + 1)
    count = round(abs(Fraction(value)) / step)  # Python rounds a tie between integers to the even one
    if count * step >= Fraction(2) ** (highest + 1):
        return math.copysign(math.inf, value)
    return math.copysign(float(count * step), value)


def rounded(values: list[float], dtype: torch.dtype) -> list[float]:
    result = round_once(torch.tensor([values], dtype=torch.float64), dtype)
    assert result.dtype == dtype
    return [float(value) for value in result[0].double()]


def same(first: float, second: float) -> bool:
    """Equal with the sign of zero, or both not a number."""
    return (math.isnan(first) and math.isnan(second)) or (
        first == second and math.copysign(1, first) == math.copysign(1, second)
    )


def middles(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """On the middle between two neighbours of `dtype`, and by the least and by more besides it."""
    digits, lowest, highest = FORMATS[dtype]
    counts = st.integers(0, 2 ** (digits + 1))
    exponents = st.integers(lowest - digits, highest - digits + 1)
    nudges = st.sampled_from([0.0, 0.0, 2.0**-52, -(2.0**-52), 2.0**-30, -(2.0**-30), 2.0**-24, 0.25])

    def value(count: int, exponent: int, nudge: float, sign: int) -> float:
        return sign * math.ldexp(count / 2, exponent) * (1 + nudge)

    return st.builds(value, counts, exponents, nudges, st.sampled_from([1, -1]))


@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
@settings(max_examples=400, deadline=None, database=None)
@given(data=st.data())
def test_every_value_is_rounded_once(dtype: torch.dtype, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(width=64) | st.floats(-70000, 70000) | middles(dtype), min_size=1))
    for value, got in zip(values, rounded(values, dtype), strict=True):
        assert same(got, nearest(value, dtype)), f"{value!r}: got {got!r}, wanted {nearest(value, dtype)!r}"


@pytest.mark.parametrize("dtype", [*NARROW.values(), torch.float32])
def test_the_corners(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    least = info.tiny * info.eps  # the smallest subnormal
    beyond = info.max * (1 + info.eps / 4)  # the middle between the largest and what would come next
    values = [0.0, -0.0, least / 2, -least / 2, math.nextafter(least / 2, 1), least * 1.5, least * 2.5, info.tiny]
    values += [info.tiny - least / 2, info.max, -info.max, beyond, math.nextafter(beyond, 0), 1e300, -1e300, 1e-320]
    values += [math.inf, -math.inf, math.nan, 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40]
    for value, got in zip(values, rounded(values, dtype), strict=True):
        assert same(got, nearest(value, dtype)), f"{value!r}: got {got!r}, wanted {nearest(value, dtype)!r}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numpy_rounds_the_same(dtype: torch.dtype) -> None:
    """numpy casts float64 to float16 in one rounding. All its numbers, the middles between them, and what is beside."""
    held = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double()
    middle = (held[1:] + held[:-1]) / 2
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-math.inf, math.inf)]
    values = torch.stack([held[1:], middle, *beside])
    with np.errstate(over="ignore"):
        wanted = values.numpy().astype(NUMPY[dtype])
    assert torch.equal(round_once(values, dtype), torch.from_numpy(wanted))


def test_torch_itself_rounds_twice() -> None:
    """What `round_once` is for: were this to change, it could go."""
    value = torch.tensor([[1 + 2.0**-8 + 2.0**-40]], dtype=torch.float64)
    assert float(value.to(torch.bfloat16)) == 1.0
    assert float(round_once(value, torch.bfloat16)) == 1 + 2**-7


def test_float64_stays_what_it_is() -> None:
    values = torch.tensor([[1 / 3, -0.0, math.inf, 5e-324]], dtype=torch.float64)
    assert torch.equal(round_once(values, torch.float64), values)


@pytest.mark.parametrize("dtype", [*NARROW.values(), torch.float32])
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (0, 4), (4, 0)])
def test_buffers_change_nothing(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = (values * 256).round() / 256 + 2.0**-40
    buffers = RoundingBuffers(
        torch.full(shape, math.nan), torch.full(shape, -1, dtype=torch.int32), torch.full(shape, math.nan, dtype=dtype)
    )
    before = values.clone()
    with_buffers = round_once(values, dtype, buffers)
    assert torch.equal(with_buffers, round_once(values, dtype))
    assert with_buffers.data_ptr() == buffers.rounded.data_ptr()
    assert torch.equal(values, before)


# The formulas


def factors(out: int = 5, width: int = 7, rank: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight (out, width), A (rank, width), B (out, rank) and magnitude (out,), in float64."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((out, width), (rank, width), (out, rank), (out,))
    weight, lora_a, lora_b, magnitude = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return weight, lora_a, lora_b, magnitude


def by_hand(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None) -> Tensor:
    """Element by element, as the papers have it."""
    result = weight.clone()
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            result[i, j] += scaling * sum(float(lora_b[i, k]) * float(lora_a[k, j]) for k in range(lora_a.shape[0]))
        if magnitude is not None:
            norm = math.sqrt(sum(float(value) ** 2 for value in result[i]))
            result[i] *= float(magnitude[i]) / norm
    return result


@pytest.mark.parametrize("with_magnitude", [False, True])
def test_merged_weight_is_the_formula(with_magnitude: bool) -> None:
    weight, lora_a, lora_b, magnitude = factors()
    chosen = magnitude if with_magnitude else None
    merged = merge_weight(weight, lora_a, lora_b, 1.7, chosen)
    torch.testing.assert_close(merged, by_hand(weight, lora_a, lora_b, 1.7, chosen), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(merged, weight)


def test_rows_of_a_dora_weight_are_as_long_as_their_magnitude() -> None:
    weight, lora_a, lora_b, magnitude = factors()
    merged = merge_weight(weight, lora_a, lora_b, 0.5, magnitude)
    torch.testing.assert_close(row_norms(merged), magnitude.abs(), rtol=1e-14, atol=0)


def test_rows_may_be_merged_in_any_blocks() -> None:
    weight, lora_a, lora_b, magnitude = factors()
    whole = merge_weight(weight, lora_a, lora_b, 1.7, magnitude)
    blocks = [
        merge_weight(weight[rows], lora_a, lora_b[rows], 1.7, magnitude[rows])
        for rows in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    torch.testing.assert_close(torch.cat(blocks), whole, rtol=1e-14, atol=0)


def test_delta_and_sum() -> None:
    weight, lora_a, lora_b, _ = factors()
    before = weight.clone()
    torch.testing.assert_close(add_delta(weight, lora_a, lora_b, 2.0), before + delta_weight(lora_a, lora_b, 2.0))
    assert torch.equal(weight, before)
    assert add_delta(weight, lora_a, lora_b, 2.0, out=weight) is weight
    torch.testing.assert_close(weight, before + 2 * lora_b @ lora_a)


def test_a_row_without_direction() -> None:
    """0 / 0 stays nothing; a magnitude over a row of zeros has no direction to scale, and shows."""
    magnitude = torch.tensor([0.0, 2.0, -3.0, 0.0], dtype=torch.float64)
    norms = torch.tensor([0.0, 0.0, 1.5, 4.0], dtype=torch.float64)
    assert norm_scale(magnitude, norms).tolist() == [0.0, math.inf, -2.0, 0.0]
