"""The exact merged values of one tensor, in float64 and as plainly as the papers have them, for the verifier.

`V = W + s B A` (arXiv 2106.09685) and `W' = m * V / ||V||`, the norm over each output (arXiv 2402.09353, equation 5).
Nothing here is shared with the code that merges: what merged cannot also be the judge.

How far from the exact value may an honest merge be? `error_rows` answers for any arithmetic of unit roundoff u, by the
standard model fl(a op b) = (a op b)(1 + d), |d| <= u, for the operations in the order in which PEFT does them:

    delta = s B A            |error| <= (g(r) + 2) u |s| |B| |A|         a dot product of r terms; s rounded; times s
    V = W + delta            |error| <= that + u (|W| + |s| |B| |A|)
    ||V||                    relative: ||error of V|| / ||V|| + g(in) u / 2 + u        the sum of squares; the root
    W' = V * (m / ||V||)     |error| <= (m / ||V||) |error of V| + |W'| (that of the norm + 2 u)

A sum of n terms is off by at most n u of the sum of magnitudes whatever its order, and by g(n) u = min(n, 7 sqrt(n)) u
with a failure probability below 2 exp(-7^2 / 2) = 5e-11 (Higham and Mary, A New Approach to Probabilistic Rounding
Error Analysis, SIAM J. Sci. Comput. 41, 2019, theorem 2.4, lambda = 7). Terms of second order are below 1 % of those
of first order as long as g(n) u < 0.005, which float32 keeps to n of 10^8: SECOND_ORDER covers them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dora_serve.adapter import LazyTensor
from dora_serve.plan import LoraEdit, TensorPlan, VectorScale
from dora_serve.reference_decode import decoded_range
from dora_serve.safetensors_file import TensorEntry, read_range

LAMBDA = 7.0
SECOND_ORDER = 1.01
_EXPONENT_BITS = 0x7FF0000000000000


@dataclass(frozen=True)
class Arithmetic:
    """unit: the roundoff of every stored result. sum_unit: that inside a sum. tiny: half the smallest subnormal."""

    unit: float
    sum_unit: float
    tiny: float


FLOAT32 = Arithmetic(2.0**-24, 2.0**-24, 2.0**-150)
FLOAT64 = Arithmetic(2.0**-53, 2.0**-53, 0.0)


def arithmetic_of(dtype: torch.dtype) -> Arithmetic:
    """Every result rounded to `dtype`, sums gathered in float32: what torch does with 16-bit tensors."""
    info = torch.finfo(dtype)
    return Arithmetic(info.eps / 2, min(FLOAT32.unit, info.eps / 2), info.tiny * info.eps / 2)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between the numbers of `dtype` around each float64 value (its ulp), subnormals included."""
    info = torch.finfo(dtype)
    power = (values.contiguous().view(torch.int64) & _EXPONENT_BITS).view(torch.float64)
    return (power * info.eps).clamp_(min=info.tiny * info.eps)


def round_once(values: Tensor, dtype: torch.dtype, step: Tensor | None = None) -> Tensor:
    """float64 values rounded once to `dtype`, to nearest with ties to even, and still held in float64.

    torch casts float64 to the 16-bit types through float32, which rounds twice, so it is no oracle. step: their
    spacing, where the caller has it.
    """
    if dtype == torch.float64:
        return values
    step = spacing(values, dtype) if step is None else step
    rounded = (values / step).round_().mul_(step)
    fits = rounded.abs() <= torch.finfo(dtype).max
    return rounded if bool(fits.all()) else torch.where(fits, rounded, values * torch.inf)


def within(got: Tensor, exact: Tensor, error: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Where `got` is a value within `error` of `exact`, rounded once: rounding is monotone, so the ends tell."""
    return (round_once(exact - error, dtype) <= got) & (got <= round_once(exact + error, dtype))


def read_elements(source: TensorEntry | Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a flattened tensor, in its own dtype."""
    if isinstance(source, Tensor):
        return source.reshape(-1)[start:stop]
    return read_range(source, start, stop) if source.coding is None else decoded_range(source, start, stop)


@dataclass(frozen=True)
class Update:
    """A LoraEdit, loaded as float64: lora_A (r, in), lora_B (out, r), magnitude (out,) or None.

    norms: ||V|| of each column of the region where the magnitude is the columns' (`LoraEdit.scales_columns`), so that
    no block of rows holds what a norm is taken over; a magnitude for several columns, of a kernel, is given for each.
    """

    edit: LoraEdit
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    norms: Tensor | None = None

    def delta_rows(self, start: int, stop: int) -> Tensor:
        """`B A` in rows [start, stop) of the region, in the orientation in which it is stored."""
        if self.edit.region.transposed:
            return self.lora_A[:, start:stop].T @ self.lora_B.T
        return self.lora_B[start:stop] @ self.lora_A

    def absolute_rows(self, start: int, stop: int) -> Tensor:
        """`|B| |A|` in the same rows."""
        return replace(self, lora_A=self.lora_A.abs(), lora_B=self.lora_B.abs()).delta_rows(start, stop)

    def overlap(self, start: int, stop: int) -> tuple[int, int]:
        """The part of the tensor's rows [start, stop) that lies in the region."""
        return max(start, self.edit.region.start), min(stop, self.edit.region.stop)


@dataclass(frozen=True)
class Reference:
    """A TensorPlan with what it takes to compute any of its rows, in memory but for a source on disk.

    The tensor is a matrix of `rows` by `width` (the plan's Region says how).
    """

    plan: TensorPlan
    source: TensorEntry | Tensor
    rows: int
    width: int
    updates: tuple[Update, ...]
    replaced: tuple[tuple[Tensor, Tensor], ...]
    added: tuple[tuple[int, float, Tensor], ...]
    scaled: tuple[tuple[int, Tensor, Tensor], ...] = ()


def open_reference(plan: TensorPlan, row_block_elements: int) -> Reference:
    """Load a plan's factors. Peak memory: they, in float64, and a few row blocks."""
    count = math.prod(plan.shape)
    if plan.loras:
        width = plan.loras[0].region.width
    else:
        width = plan.shape[-1] if len(plan.shape) > 1 else 1
    reference = Reference(
        plan=plan,
        source=plan.source.load() if isinstance(plan.source, LazyTensor) else plan.source,
        rows=count // width if width else 0,
        width=width,
        updates=tuple(_load(edit) for edit in plan.loras),
        replaced=tuple((torch.tensor(edit.indices), edit.rows.load().to(torch.float64)) for edit in plan.rows),
        added=tuple((edit.start, edit.scaling, edit.vector.load().to(torch.float64)) for edit in plan.vectors),
        scaled=tuple(_scaled(scale, row_block_elements) for scale in plan.scales),
    )
    updates = tuple(
        _with_column_norms(reference, update, row_block_elements)
        if update.magnitude is not None and update.edit.scales_columns
        else update
        for update in reference.updates
    )
    return replace(reference, updates=updates)


def _with_column_norms(reference: Reference, update: Update, row_block_elements: int) -> Update:
    assert update.magnitude is not None
    width = update.edit.region.width
    norms = column_norms(reference, update, row_block_elements)
    of_kernel = width // len(update.magnitude)
    norms = norms.view(-1, of_kernel).square().sum(dim=1).sqrt().repeat_interleave(of_kernel)
    return replace(update, magnitude=update.magnitude.repeat_interleave(of_kernel), norms=norms)


def _scaled(scale: VectorScale, row_block_elements: int) -> tuple[int, Tensor, Tensor]:
    """Where it starts, m / ||V|| of the weight's outputs, and its relative error in float32 arithmetic."""
    weight = open_reference(replace(scale.weight, loras=(scale.edit,), scales=()), row_block_elements)
    (update,) = weight.updates
    assert update.magnitude is not None
    region = scale.edit.region
    norms = update.norms
    if norms is None:
        blocks = row_blocks(weight, row_block_elements, (region.start, region.stop))
        norms = torch.cat([_direction(weight, update, start, stop).norm(dim=1) for start, stop in blocks])
    factor = torch.where((norms == 0) & (update.magnitude == 0), 0.0, update.magnitude / norms)
    return scale.start, factor, factor_error(update, norms, slice(None), FLOAT32)


def _direction(reference: Reference, update: Update, start: int, stop: int) -> Tensor:
    """V in the tensor's rows [start, stop), which lie in the region."""
    offset = update.edit.region.start
    delta = update.delta_rows(start - offset, stop - offset)
    return source_rows(reference, start, stop) + update.edit.scaling * delta


def _load(edit: LoraEdit) -> Update:
    magnitude = edit.magnitude.load().to(torch.float64) if edit.magnitude is not None else None
    return Update(edit, edit.lora_A.load().to(torch.float64), edit.lora_B.load().to(torch.float64), magnitude)


def row_blocks(
    reference: Reference, row_block_elements: int, within_rows: tuple[int, int] | None = None
) -> Iterator[tuple[int, int]]:
    """The matrix in blocks of whole rows, of about `row_block_elements` elements."""
    start, stop = within_rows or (0, reference.rows)
    step = max(1, row_block_elements // max(1, reference.width))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def column_norms(reference: Reference, update: Update, row_block_elements: int) -> Tensor:
    """`||V||` of each column of a region as it is stored, (width,), in one pass over its rows."""
    region = update.edit.region
    squares = torch.zeros(region.width, dtype=torch.float64)
    for first, last in row_blocks(reference, row_block_elements, (region.start, region.stop)):
        squares += _direction(reference, update, first, last).square().sum(0)
    return squares.sqrt()


def source_rows(reference: Reference, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of what is updated: the source, its replaced rows put in. float64 (rows, width)."""
    width = reference.width
    values = read_elements(reference.source, start * width, stop * width).to(torch.float64).view(stop - start, width)
    for indices, rows in reference.replaced:
        here = (indices >= start) & (indices < stop)
        values[indices[here] - start] = rows[here]
    return values


def exact_rows(reference: Reference, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the merged tensor. float64 (rows, width)."""
    values = source_rows(reference, start, stop)
    for update in reference.updates:
        first, last = update.overlap(start, stop)
        if first >= last:
            continue
        offset = update.edit.region.start
        part = values[first - start : last - start]
        part += update.edit.scaling * update.delta_rows(first - offset, last - offset)
        if update.magnitude is not None:
            part *= _factor(update, part, first - offset, last - offset)
    for first, scaling, vector in reference.added:
        values[max(first - start, 0) : max(first + len(vector) - start, 0), 0] += (
            scaling * vector[max(start - first, 0) : max(stop - first, 0)]
        )
    for first, factor, _ in reference.scaled:
        here = slice(max(first - start, 0), max(first + len(factor) - start, 0))
        values[here, 0] *= factor[max(start - first, 0) : max(stop - first, 0)]
    return values


def _factor(update: Update, direction: Tensor, start: int, stop: int) -> Tensor:
    """`m / (||V|| + eps)`, shaped to multiply rows [start, stop) of V. An output of zeros with m = 0 stays zero."""
    assert update.magnitude is not None
    norm = update.edit.norm
    magnitude = update.magnitude if update.norms is not None else update.magnitude[start:stop]
    if norm.axis is None:
        factor = magnitude
    else:
        norms = update.norms if update.norms is not None else torch.linalg.vector_norm(direction, dim=1)
        norms = norms + norm.eps
        factor = torch.where((norms == 0) & (magnitude == 0), 0.0, magnitude / norms)
    return factor if update.norms is not None else factor.unsqueeze(1)


def sum_growth(terms: int) -> float:
    """g(n) of this module's bound."""
    return min(float(terms), LAMBDA * math.sqrt(terms))


def factor_error(update: Update, norms: Tensor, outputs: slice, arithmetic: Arithmetic) -> Tensor:
    """The relative error of `m / ||V||` with its last product, for the outputs with these ||V||. (len(norms),)

    `||error of V||` is bounded through |s| sum_k |B_ok| ||A_k||, which is at least the norm of |s| |B| |A|, and ||W||
    through ||V|| and the same.
    """
    rank, inputs = update.lora_A.shape
    norm = update.edit.norm
    if norm.axis is None:
        return torch.full_like(norms, 2 * arithmetic.unit)
    if norm.axis == "out":
        lengths = torch.linalg.vector_norm(update.lora_A, dim=1)
        spread = abs(update.edit.scaling) * (update.lora_B[outputs].abs() @ lengths)
    else:
        lengths, inputs = torch.linalg.vector_norm(update.lora_B, dim=0), update.lora_B.shape[0]
        spread = abs(update.edit.scaling) * (lengths @ update.lora_A[:, outputs].abs())
        if update.magnitude is not None and update.norms is not None:  # of a kernel: its columns share one norm
            of_kernel = len(norms) // update.edit.magnitude.shape[0] if update.edit.magnitude else 1
            inputs *= of_kernel
            spread = spread.view(-1, of_kernel).square().sum(dim=1).sqrt().repeat_interleave(of_kernel)
    of_delta = sum_growth(rank) * arithmetic.sum_unit + 2 * arithmetic.unit
    direction = of_delta * spread + arithmetic.unit * (norms + 2 * spread)
    of_norm = sum_growth(inputs) * arithmetic.sum_unit / 2 + arithmetic.unit
    return torch.where(norms > 0, direction / norms, 0.0) + of_norm + 2 * arithmetic.unit


def error_rows(reference: Reference, start: int, stop: int, arithmetic: Arithmetic) -> Tensor:
    """How far from exact_rows the same formula in `arithmetic` may come, before the last rounding. (rows, width)."""
    weight = source_rows(reference, start, stop)
    error = torch.zeros_like(weight)
    for update in reference.updates:
        first, last = update.overlap(start, stop)
        if first >= last:
            continue
        offset, here = update.edit.region.start, slice(first - start, last - start)
        error[here] = _update_error(update, weight[here], first - offset, last - offset, arithmetic)
    for first, scaling, vector in reference.added:
        here = slice(max(first - start, 0), max(first + len(vector) - start, 0))
        term = (scaling * vector[max(start - first, 0) : max(stop - first, 0)]).abs()
        error[here, 0] += arithmetic.unit * (weight[here, 0].abs() + 3 * term) + arithmetic.tiny
    for first, factor, relative in reference.scaled:
        here = slice(max(first - start, 0), max(first + len(factor) - start, 0))
        there = slice(max(start - first, 0), max(stop - first, 0))
        error[here, 0] += (weight[here, 0] * factor[there]).abs() * relative[there] + arithmetic.tiny
    return error * SECOND_ORDER


def _update_error(update: Update, weight: Tensor, start: int, stop: int, arithmetic: Arithmetic) -> Tensor:
    rank, scaling = update.edit.lora_A.shape[0], update.edit.scaling
    absolute = abs(scaling) * update.absolute_rows(start, stop)
    error = (sum_growth(rank) * arithmetic.sum_unit + 2 * arithmetic.unit) * absolute
    error += arithmetic.unit * (weight.abs() + absolute) + (rank + 3) * arithmetic.tiny
    if update.magnitude is None:
        return error
    direction = weight + scaling * update.delta_rows(start, stop)
    factor = _factor(update, direction, start, stop)
    if update.norms is not None:
        relative = factor_error(update, update.norms, slice(None), arithmetic)
    else:
        norms = torch.linalg.vector_norm(direction, dim=1)
        relative = factor_error(update, norms, slice(start, stop), arithmetic).unsqueeze(1)
    return factor.abs() * error + (factor * direction).abs() * relative + arithmetic.tiny
