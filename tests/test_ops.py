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

from dora_serve.ops import (
    RoundingBuffers,
    adapted_linear,
    add_delta,
    delta_weight,
    factored_row_norms,
    merge_weight,
    norm_scale,
    round_once,
    row_norms,
    squared_row_norms,
)

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


# What the engine computes


def wide_factors(out: int, width: int, rank: int, dtype: torch.dtype, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (out, width), A (rank, width) and B (out, rank) in `dtype`, B A of about the size of the weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((out, width), (rank, width), (out, rank))
    weight, lora_a, lora_b = (torch.randn(shape, generator=generator) for shape in shapes)
    return weight.to(dtype), lora_a.to(dtype), (lora_b / rank**0.5).to(dtype)


def factored(weight: Tensor, squares: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Of one layer, taken together with another of its shape that must not matter."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norms = factored_row_norms(
        [lambda: weight * 2, lambda: weight],
        torch.stack([4 * squares, squares]),
        torch.stack([-lora_a, lora_a]),
        torch.stack([lora_b * 2, lora_b]),
        torch.tensor([3.0, scaling], dtype=torch.float64),
        dtype,
    )
    return norms[1]


def direct_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return torch.linalg.vector_norm(weight.double() + scaling * lora_b.double() @ lora_a.double(), dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [1.0, 4 / 3, 0.05, 16.0])
def test_factored_norms_are_those_of_the_sum(dtype: torch.dtype, scaling: float) -> None:
    """The sum of squares has terms that are products in float32, of as many roundings as a row has columns: they may be
    off by that times the spacing of float32 times their size. Nearly always it is the root of that number.
    """
    weight, lora_a, lora_b = wide_factors(64, 96, 5, dtype)
    before = weight.clone()
    norms = factored(weight, squared_row_norms(weight), lora_a, lora_b, scaling)
    assert torch.equal(weight, before), "the base's weights are not written to"
    wanted = direct_norms(weight, lora_a, lora_b, scaling)
    assert norms.dtype == torch.float64
    spacing = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    sizes = row_norms(weight.double()) + scaling * lora_b.double().abs() @ row_norms(lora_a.double())
    assert bool(((norms.square() - wanted.square()).abs() <= 96**0.5 * spacing * sizes.square()).all())
    assert not torch.allclose(wanted, row_norms(weight.double()), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factored_norms_of_rows_that_cancel(dtype: torch.dtype) -> None:
    """s B A is all but -W in some rows: what is left is a thousandth, and squares of it a millionth of the terms."""
    weight, lora_a, lora_b = wide_factors(12, 40, 12, torch.float32)
    weight, lora_a = (lora_b @ lora_a * -0.5).to(dtype), lora_a.to(dtype)
    weight[::2] += 1e-3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    lora_b = lora_b.to(dtype)
    lora_b[3] = 0
    wanted = direct_norms(weight, lora_a, lora_b, 0.5)
    share = wanted / row_norms(weight.double())
    assert float(share[torch.arange(12) != 3].max()) < 2e-2
    norms = factored(weight, squared_row_norms(weight), lora_a, lora_b, 0.5)
    torch.testing.assert_close(norms, wanted, rtol=1e-9, atol=0)


def test_factored_norms_where_the_adapters_own_terms_cancel() -> None:
    """Two rows of A all but alike, with opposite signs in B, as one adapter taken from another has them: B A is of the
    size of the weight, and its parts a thousand times that. The norm is wanted to half of float32's digits at least.
    """
    weight, lora_a, _ = wide_factors(6, 40, 1, torch.float32)
    generator = torch.Generator().manual_seed(4)
    lora_a = torch.cat([lora_a, lora_a + 1e-3 * torch.randn(1, 40, generator=generator)])
    lora_b = torch.tensor([[1000.0, -1000.0]]).repeat(6, 1)
    wanted = direct_norms(weight, lora_a, lora_b, 1.0)
    assert 0.5 < float((wanted / row_norms(weight.double())).mean()) < 3
    norms = factored(weight, squared_row_norms(weight), lora_a, lora_b, 1.0)
    torch.testing.assert_close(norms, wanted, rtol=2**-12, atol=0)


def test_factored_norms_of_rows_of_zeros() -> None:
    """In the weight, in B, in both; and of a sum that is zero to the last bit."""
    weight, lora_a, lora_b = wide_factors(5, 8, 2, torch.float32)
    lora_a, lora_b = (lora_a * 4).round() / 4, (lora_b * 4).round() / 4  # so that products are exact
    weight[0] = 0
    lora_b[1] = 0
    weight[2] = lora_b[2] = 0
    weight[3] = -(lora_b[3] @ lora_a)
    norms = factored(weight, squared_row_norms(weight), lora_a, lora_b, 1.0)
    torch.testing.assert_close(norms, direct_norms(weight, lora_a, lora_b, 1.0), rtol=1e-6, atol=0)
    assert norms[2:4].tolist() == [0.0, 0.0]
    assert norms[0] > 0


def test_factored_norms_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large weight is taken some rows at a time."""
    weight, lora_a, lora_b = wide_factors(50, 24, 3, torch.float32)
    weight[7] = -(lora_b[7] @ lora_a)
    squares = squared_row_norms(weight)
    torch.testing.assert_close(squares, weight.double().square().sum(dim=1), rtol=1e-15, atol=0)
    whole = factored(weight, squares, lora_a, lora_b, 1.0)
    monkeypatch.setattr("dora_serve.ops._BLOCK_ELEMENTS", 24 * 7)
    assert torch.equal(squared_row_norms(weight), squares)
    torch.testing.assert_close(factored(weight, squares, lora_a, lora_b, 1.0), whole, rtol=1e-6, atol=0)


RANKS = (3, 1, 4)
"""Of the three adapters of a batch."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("looked_up", "own"), [(False, False), (True, False), (False, True)])
def test_adapted_linear_is_the_formula_row_by_row(dtype: torch.dtype, looked_up: bool, own: bool) -> None:
    """Rows with one of three adapters, of which two are DoRA and one has a bias, or with none; as factors of all
    adapters of which each row chooses, or as each row's own with zeros below. Products of the factors round in their
    dtype, float32 at least; a bfloat16 result is rounded once more.
    """
    generator = torch.Generator().manual_seed(6)
    factor_dtype = torch.promote_types(dtype, torch.float32)
    rows, tokens, width, out = 6, 4, 10, 7
    slots = [1, -1, 0, 2, 1, 0]

    def draw(*shape: int, kind: torch.dtype = factor_dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    x, weight = draw(rows, tokens, width, kind=dtype), draw(out, width, kind=dtype)
    base = x @ weight.T
    a, b = [draw(rank, width) for rank in RANKS], [draw(rank, out) for rank in RANKS]
    scales, biases = [draw(out).abs(), None, draw(out).abs()], [None, draw(out), None]

    def vector(table: list[Tensor | None], slot: int, neutral: float) -> Tensor:
        found = None if slot < 0 else table[slot]
        return torch.full((out,), neutral, dtype=factor_dtype) if found is None else found

    scale = torch.stack([vector(scales, slot, 1.0) for slot in slots])[:, None]
    bias = torch.stack([vector(biases, slot, 0.0) for slot in slots])[:, None]
    if own:
        lora_a, lora_b = torch.zeros(rows, 4, width, dtype=factor_dtype), torch.zeros(rows, 4, out, dtype=factor_dtype)
        for row, slot in enumerate(slots):
            if slot >= 0:
                lora_a[row, : RANKS[slot]], lora_b[row, : RANKS[slot]] = a[slot], b[slot]
        chosen = None
    else:
        lora_a, lora_b = torch.cat(a), torch.cat(b)
        owners = [place for place, rank in enumerate(RANKS) for _ in range(rank)]
        chosen = torch.tensor([[owner == slot for owner in owners] for slot in slots])[:, None]
    given = x.to(factor_dtype) @ lora_a.T if looked_up else x
    result = adapted_linear(
        base, given, None if looked_up else lora_a, lora_b, chosen=chosen, norm_scale=scale, bias=bias
    )
    assert result.dtype == dtype
    assert result.shape == (rows, tokens, out)
    spacing = torch.finfo(factor_dtype).eps
    for row, slot in enumerate(slots):
        low_rank = torch.zeros(tokens, out).double()
        size = torch.zeros(tokens, out).double()
        if slot >= 0:
            low_rank = (x[row].double() @ a[slot].double().T) @ b[slot].double()
            size = (x[row].double().abs() @ a[slot].double().abs().T) @ b[slot].double().abs()
        wanted = scale[row].double() * (base[row].double() + low_rank) + bias[row].double()
        allowed = (width + 6) * spacing * (scale[row].double() * (base[row].double().abs() + size) + bias[row].abs())
        allowed = allowed + torch.finfo(dtype).eps / 2 * wanted.abs() * (dtype != factor_dtype)
        assert bool(((result[row].double() - wanted).abs() <= allowed).all()), (row, slot)
        if slot < 0:
            assert torch.equal(result[row], base[row]), "a row without an adapter is the base's, bit for bit"
        else:
            assert not torch.allclose(result[row], base[row], rtol=1e-2)


def test_adapted_linear_of_one_adapter_needs_no_choice() -> None:
    generator = torch.Generator().manual_seed(6)
    x, base = (torch.randn(shape, generator=generator) for shape in ((2, 3, 10), (2, 3, 7)))
    lora_a, lora_b = torch.randn(3, 10, generator=generator), torch.randn(3, 7, generator=generator)
    before = base.clone()
    result = adapted_linear(base, x, lora_a, lora_b)
    torch.testing.assert_close(result, before + x @ lora_a.T @ lora_b)
    assert torch.equal(base, before), "what it was given is not written to"


def test_a_row_is_not_concerned_by_an_adapter_that_takes_it_beyond_float32() -> None:
    x = torch.tensor([[[1e30]], [[1e-30]]])
    lora_a, lora_b = torch.tensor([[1.0], [1e30]]), torch.tensor([[2.0], [3.0]])
    chosen = torch.tensor([[[True, False]], [[False, True]]])
    got = adapted_linear(torch.zeros(2, 1, 1), x, lora_a, lora_b, chosen=chosen)
    torch.testing.assert_close(got.flatten(), torch.tensor([2e30, 3.0]))
