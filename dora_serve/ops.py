"""The mathematics, as pure functions of tensors.

DoRA (arXiv 2402.09353, equation 5) with a frozen base: `V = W + s B A`, `W' = m * V / ||V||`, the norm taken over each
output row and `s` inside it. Plain LoRA (arXiv 2106.09685) is `W' = V`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

MAX_RANK = 1 << 16
"""The largest denominator of a scaling: of alpha / r, or of alpha / sqrt(r) where r is a square."""


@lru_cache
def as_ratio(scaling: float) -> tuple[float, float]:
    """numerator and denominator of the fraction that `scaling` is the nearest float64 of; (scaling, 1) if it is none.

    With 16-bit factors many an element of `W + s B A` lies exactly in the middle of two numbers of the output, and the
    float64 nearest to alpha / r = 4 / 3 would move it to one side. So products come first, and the division last.
    """
    ratio = Fraction(scaling).limit_denominator(MAX_RANK)
    is_exact = ratio.denominator & (ratio.denominator - 1) == 0
    if is_exact or float(ratio) != scaling:
        return scaling, 1.0
    return float(ratio.numerator), float(ratio.denominator)


def delta_weight(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """`s B A`: lora_a (r, in), lora_b (out, r) -> (out, in)."""
    numerator, denominator = as_ratio(scaling)
    delta = (lora_b * numerator) @ lora_a
    return delta if denominator == 1 else delta.div_(denominator)


def row_norms(direction: Tensor) -> Tensor:
    """`||V||` over each output row: (out, in) -> (out,)."""
    norms: Tensor = torch.linalg.vector_norm(direction, dim=1)
    return norms


def norm_scale(magnitude: Tensor, norms: Tensor) -> Tensor:
    """`m / ||V||`: both (out,). A magnitude of 0 gives 0, for a row of zeros too, where any other gives inf."""
    return torch.where(magnitude == 0, magnitude, magnitude / norms)


def add_delta(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, *, out: Tensor | None = None) -> Tensor:
    """`V = W + s B A`: weight (out, in), lora_a (r, in), lora_b (out, r); `out` may be `weight` itself."""
    numerator, denominator = as_ratio(scaling)
    total = torch.addmm(weight, lora_b, lora_a, beta=denominator, alpha=numerator, out=out)
    return total if denominator == 1 else total.div_(denominator)


def squared_row_norms(weight: Tensor) -> Tensor:
    """`||w_i||^2` of each output row: weight (out, in) -> (out,) in float64. Memory: a block of rows in float64."""
    squares = torch.empty(weight.shape[0], dtype=torch.float64, device=weight.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        squares[start : start + step] = weight[start : start + step].double().square().sum(dim=1)
    return squares


def factored_row_norms(
    weights: Sequence[Callable[[], Tensor]],
    squares: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scalings: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`||W + s B A||` of each output row of n layers of one shape, without forming `B A`: (n, out) in float64.

    weights: of each layer, what gives its weight (out, in); one at a time is held. squares (n, out): their
    `squared_row_norms`. lora_a (n, r, in), lora_b (n, out, r), scalings (n,) in float64:

    `||w_i + s b_i A||^2 = ||w_i||^2 + s b_i . (2 A w_i + A A^T s b_i)` (arXiv 2603.22276 factors it so).

    dtype: in which the terms of the adapter are taken, float32 or float64; a row whose terms cancel is computed
    straight from `W + s B A` in float64.
    """
    near_a, near_b = lora_a.to(dtype), lora_b.to(dtype) * scalings.to(dtype)[:, None, None]
    columns, gram, product = near_a.mT.contiguous(), near_a @ near_a.mT, torch.empty_like(near_b)
    step = max(1, _BLOCK_ELEMENTS // max(1, near_a.shape[2]))
    for place, load in enumerate(weights):
        for rows, block in zip(product[place].split(step), load().split(step), strict=True):
            torch.mm(block.to(dtype), columns[place], out=rows)
    total = torch.baddbmm(product, near_b, gram, beta=2).mul_(near_b).sum(dim=2).add(squares)
    reach = (near_b.abs() @ gram.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(2)).squeeze(2)  # no row of s B A is longer
    cancelled = total < _CANCELLED * (squares + reach.square())
    for place in cancelled.any(dim=1).nonzero().flatten().tolist():
        weight = weights[place]()
        exact_a, exact_b = lora_a[place].double(), lora_b[place].double() * scalings[place]
        for rows in cancelled[place].nonzero().flatten().split(step):
            total[place, rows] = (weight[rows].double() + exact_b[rows] @ exact_a).square_().sum(dim=1)
    return total.sqrt_()


_BLOCK_ELEMENTS = 1 << 22
_CANCELLED = 1e-2
"""Where less than this share is left of what the terms of a row's square may be, float32 loses more than two digits."""


def adapted_linear(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor,
    *,
    chosen: Tensor | None = None,
    norm_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`norm_scale * (W x + s B (A x)) + bias` for a batch whose rows may each have another adapter.

    base (rows, tokens, out) is W x; x (rows, tokens, in), or A x already, (rows, tokens, R), where lora_a is None.
    Either lora_a (rows, r, in) and lora_b (rows, r, out) hold each row's own factors, with s folded into lora_b; or
    lora_a (R, in) and lora_b (R, out) hold those of all adapters in the batch, one below the other, and chosen
    (rows, 1, R) is True where a rank belongs to the row's own adapter, None where all rows have the same.
    norm_scale (rows, 1, out) is 1 for a row without DoRA; bias (out,) or (rows, 1, out). All but `W x` is computed in
    the factors' dtype, and the result rounded once to that of `base`.
    """
    dtype = lora_b.dtype
    wide = base if base.dtype == dtype else base.to(dtype)  # even a call that does nothing is dear in a step
    low_rank = x if x.dtype == dtype else x.to(dtype)
    if lora_b.ndim == 3:
        low_rank = low_rank if lora_a is None else torch.bmm(low_rank, lora_a.transpose(1, 2))
        total = torch.baddbmm(wide, low_rank, lora_b)
    else:
        low_rank = low_rank if lora_a is None else functional.linear(low_rank, lora_a)
        # Chosen, not multiplied by 0: another adapter's A may take this row's x beyond what the dtype holds.
        low_rank = low_rank if chosen is None else torch.where(chosen, low_rank, 0)
        total = torch.addmm(wide.flatten(0, -2), low_rank.flatten(0, -2), lora_b).view(base.shape)
    if norm_scale is not None:
        total *= norm_scale
    if bias is not None:
        total += bias
    return total if base.dtype == dtype else total.to(base.dtype)


def merge_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None) -> Tensor:
    """`W'` of some output rows: weight (out, in), lora_a (r, in), lora_b (out, r), magnitude (out,) or None.

    Row i of the result depends on row i of `weight`, `lora_b` and `magnitude` alone, so any block of rows may be
    merged by itself. Computes in the dtype of its arguments, which are all the same.
    """
    direction = add_delta(weight, lora_a, lora_b, scaling)
    if magnitude is None:
        return direction
    return direction.mul_(norm_scale(magnitude, row_norms(direction)).unsqueeze(1))


_MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


@dataclass(frozen=True)
class RoundingBuffers:
    """Scratch for `round_once`, each of the block's shape: float32, int32, and the output's dtype."""

    single: Tensor
    marks: Tensor
    rounded: Tensor


def round_once(exact: Tensor, dtype: torch.dtype, buffers: RoundingBuffers | None = None) -> Tensor:
    """float64 values (rows, columns) rounded to `dtype`, to nearest, ties to even, in one rounding.

    torch casts float64 to a 16-bit float through float32, and so rounds twice: a value just beside the middle of two
    16-bit numbers first becomes the middle, then goes to the even one (1 + 2**-8 + 2**-40 becomes 1.0 in bfloat16).
    Where the float32 value could be such a middle, it is moved one float32 step towards the exact value first.

    buffers: where to put the result and what leads to it; without them it is allocated.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return exact.to(dtype) if buffers is None else buffers.rounded.copy_(exact)
    single = exact.to(torch.float32) if buffers is None else buffers.single.copy_(exact)
    below = (1 << (_MANTISSA_BITS[torch.float32] - _MANTISSA_BITS[dtype] - 1)) - 1
    if single.numel():
        doubtful = _doubtful_rows(single, below, None if buffers is None else buffers.marks)
        rows = np.flatnonzero(doubtful.cpu().numpy())
        if rows.size:
            _step_towards(single, exact, below, rows)
    return single.to(dtype) if buffers is None else buffers.rounded.copy_(single)


def _doubtful_rows(single: Tensor, below: int, marks: Tensor | None) -> Tensor:
    """(rows,) whether one of a row could be a middle: it has zeros `below` the first bit that is dropped."""
    if below == 0x7FFF:
        # The half of a float32 that is dropped is the least of all int16 in a middle, so that one pass finds it.
        return single.view(torch.int16).amin(dim=1) == torch.iinfo(torch.int16).min
    return torch.bitwise_and(single.view(torch.int32), below, out=marks).amin(dim=1) == 0


def _step_towards(single: Tensor, exact: Tensor, below: int, rows: NDArray[np.int64]) -> None:
    """Move what could be a middle and differs from `exact` one step towards it, in place, in some rows.

    The 16-bit numbers themselves have such zeros as well; they are what `exact` is, or a step leaves them what they
    are rounded to. A handful of elements: numpy's small calls cost a tenth of torch's.
    """
    if single.device.type == "cpu":
        near, true = single.numpy(), exact.numpy()
        marked = np.flatnonzero(near.view(np.int32)[rows] & below == 0)
        where = (rows[marked // single.shape[1]], marked % single.shape[1])
        near[where] = _nearer(near[where], true[where])
        return
    index = torch.from_numpy(rows).to(single.device)
    marked_there = (single.view(torch.int32)[index] & below == 0).nonzero(as_tuple=True)
    there = (index[marked_there[0]], marked_there[1])
    moved = _nearer(single[there].cpu().numpy(), exact[there].cpu().numpy())
    single[there] = torch.from_numpy(moved).to(single.device)


def _nearer(near: NDArray[np.float32], true: NDArray[np.float64]) -> NDArray[np.float32]:
    towards = np.where(true > near, np.float32(np.inf), np.float32(-np.inf))
    return np.where(near == true, near, np.nextafter(near, towards, dtype=np.float32))
