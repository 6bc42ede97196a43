"""What a wrong merge would have written: each known mistake as a formula, evaluated on a sample of one module.

All in float64 and in the canonical orientation (out, in), whatever way the tensor is stored. A sample is some whole
rows of the stored matrix, so sums along the other axis need a pass over all of it, made only where it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dora_serve.reference_weight import (
    FLOAT32,
    Reference,
    Update,
    arithmetic_of,
    error_rows,
    exact_rows,
    read_elements,
    round_once,
    row_blocks,
    source_rows,
    spacing,
    within,
)
from dora_serve.safetensors_file import DTYPE_NAMES, TensorEntry

STRICT_SHARE = 0.999
"""A mistake explains a sample outright if all but a thousandth of it is its value rounded once."""

COARSE_UNITS = 2.0
COARSE_SHARE = 0.25
"""It explains it with further rounding if the rest is at most two half spacings (root mean square; one rounding leaves
0.58, rounding every step 1.2) and at most a quarter of the squared error."""

ESTIMATE_SIGMAS = 4.0
"""What is estimated from a sample may be off by so many standard deviations, those of rounding the sample."""

LOW_RANK_TAIL = 1e-4
NOISE_SLACK = 6.0
MOST_TURNS = 60


@dataclass(frozen=True)
class Candidate:
    """A mistake. kind: its slug; text: what happened, as a clause; values: what it would have written (out, in).

    slack: how far off these may be because a number in them was itself estimated from the sample.
    """

    kind: str
    text: str
    values: Callable[[], Tensor]
    slack: Tensor | float = 0.0


@dataclass(frozen=True)
class Sums:
    """Along one axis of W and D = B A: sums of W^2, W D and D^2."""

    weight: Tensor
    cross: Tensor
    delta: Tensor

    def norms(self, scaling: float) -> Tensor:
        """`||W + scaling D||`."""
        squares = self.weight + 2 * scaling * self.cross + scaling**2 * self.delta
        return squares.clamp(min=0).sqrt()


@dataclass(frozen=True)
class Sample:
    """Some stored rows of one module's region.

    rows (k,): which, counted from the region's start. got, weight, delta (= B A), exact, error: (out, in), of which
    either out or in is k. error: what float32 arithmetic may add. magnitude (out here,) or None.
    """

    reference: Reference
    update: Update
    entry: TensorEntry
    rows: Tensor
    got: Tensor
    weight: Tensor
    delta: Tensor
    exact: Tensor
    error: Tensor
    magnitude: Tensor | None
    row_block_elements: int

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    @property
    def transposed(self) -> bool:
        return self.update.edit.region.transposed

    @property
    def scaling(self) -> float:
        return self.update.edit.scaling

    @property
    def is_square(self) -> bool:
        return len(self.update.lora_B) == self.update.lora_A.shape[1]

    @cached_property
    def _along_rows(self) -> Sums:
        dim = 0 if self.transposed else 1
        weight, delta = self.weight, self.delta
        return Sums(weight.square().sum(dim), (weight * delta).sum(dim), delta.square().sum(dim))

    @cached_property
    def _along_columns(self) -> Sums:
        region = self.update.edit.region
        sums = torch.zeros(3, region.width, dtype=torch.float64)
        for start, stop in row_blocks(self.reference, self.row_block_elements, (region.start, region.stop)):
            weight = source_rows(self.reference, start, stop)
            delta = self.update.delta_rows(start - region.start, stop - region.start)
            sums += torch.stack([weight.square().sum(0), (weight * delta).sum(0), delta.square().sum(0)])
        return Sums(*sums)

    @property
    def outputs(self) -> Sums:
        """Over all inputs, for each output here."""
        return self._along_columns if self.transposed else self._along_rows

    @property
    def inputs(self) -> Sums:
        """Over all outputs, for each input here."""
        return self._along_rows if self.transposed else self._along_columns

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T if self.transposed else stored

    def direction(self, scaling: float | None = None) -> Tensor:
        """`V`, or what it would be with another scaling."""
        return self.weight + (self.scaling if scaling is None else scaling) * self.delta

    def stored_norms(self) -> Tensor:
        """The norm of every output of the region as it is stored, (out,), in one pass over it."""
        region = self.update.edit.region
        squares = []
        for start, stop in row_blocks(self.reference, self.row_block_elements, (region.start, region.stop)):
            got = read_elements(self.entry, start * region.width, stop * region.width).to(torch.float64)
            squares.append(got.view(stop - start, region.width).square().sum(0 if region.transposed else 1))
        return (torch.stack(squares).sum(0) if region.transposed else torch.cat(squares)).sqrt()

    def merged(self, scaling: float, norm_scaling: float | None = None) -> Tensor:
        """`W'` with another scaling, for LoRA or DoRA; norm_scaling: another one still inside the norm."""
        direction = self.direction(scaling)
        if self.magnitude is None:
            return direction
        norms = self.outputs.norms(scaling if norm_scaling is None else norm_scaling)
        return _rowwise(self.magnitude / norms, direction)


def take_sample(
    reference: Reference, update: Update, entry: TensorEntry, rows: Tensor, row_block_elements: int
) -> Sample:
    """Read the given rows of a region. Peak memory: about ten times the sample."""
    start = update.edit.region.start
    pieces: dict[str, list[Tensor]] = {"got": [], "weight": [], "delta": [], "exact": [], "error": []}
    for row in rows.tolist():
        at = start + row
        pieces["got"].append(_read_row(entry, at, reference.width))
        pieces["weight"].append(source_rows(reference, at, at + 1))
        pieces["delta"].append(update.delta_rows(row, row + 1))
        pieces["exact"].append(exact_rows(reference, at, at + 1))
        pieces["error"].append(error_rows(reference, at, at + 1, FLOAT32))
    transposed = update.edit.region.transposed
    whole = {name: torch.cat(parts).T if transposed else torch.cat(parts) for name, parts in pieces.items()}
    magnitude = update.magnitude
    if magnitude is not None and not transposed and not update.edit.scales_columns:
        magnitude = magnitude[rows]
    return Sample(reference, update, entry, rows, magnitude=magnitude, row_block_elements=row_block_elements, **whole)


def _read_row(entry: TensorEntry, row: int, width: int) -> Tensor:
    return read_elements(entry, row * width, (row + 1) * width).to(torch.float64).view(1, width)


def _rowwise(factor: Tensor, values: Tensor) -> Tensor:
    return factor.nan_to_num(nan=0.0).unsqueeze(1) * values


@dataclass(frozen=True)
class Fit:
    """How well a candidate explains a sample: outright or not, and the mean square of what is left over.

    Outright, that is what its values rounded once leave over; else what they leave over as they are.
    """

    outright: bool
    left_over: float

    @property
    def key(self) -> tuple[bool, float]:
        """Smaller is better."""
        return not self.outright, self.left_over


def fit(
    got: Tensor, values: Tensor, exact: Tensor, error: Tensor, dtype: torch.dtype, estimate: Tensor | float = 0.0
) -> Fit | None:
    """Judge one candidate's values; None where they do not explain what was got. All (rows, columns)."""
    if not bool(torch.isfinite(values).all()):
        return None
    # The bound on float32 arithmetic was made for the exact values: it grows and shrinks with them.
    size = torch.linalg.vector_norm(values, dim=1, keepdim=True) / torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    slack = 2 * error * torch.nan_to_num(size, nan=1.0, posinf=1.0) + estimate
    left_over = float((got - values).square().mean())
    if float(within(got, values, slack, dtype).double().mean()) >= STRICT_SHARE:
        return Fit(True, float((got - round_once(values, dtype)).square().mean()))
    # Of the sums, not the mean of the quotients: what an earlier, larger value was rounded by is much for a small one.
    unit = float((spacing(values, dtype) / 2 + slack).square().mean())
    coarse = left_over <= COARSE_UNITS**2 * unit
    if coarse and left_over <= COARSE_SHARE * float((got - exact).square().mean()):
        return Fit(False, left_over)
    return None


def best_of(
    candidates: Iterable[Candidate], got: Tensor, exact: Tensor, error: Tensor, dtype: torch.dtype
) -> tuple[Candidate, Fit] | None:
    """The candidate that explains the sample best, and how well; the first of those that do it alike."""
    best: tuple[Candidate, Fit] | None = None
    for candidate in candidates:
        judged = fit(got, candidate.values(), exact, error, dtype, candidate.slack)
        if judged is not None and (best is None or _clearly_better(judged.key, best[1].key)):
            best = candidate, judged
    return best


def _clearly_better(new: tuple[bool, float], old: tuple[bool, float]) -> bool:
    return new[0] < old[0] or (new[0] == old[0] and new[1] < 0.9 * old[1])


def scaling_candidates(sample: Sample, *, rank_stabilised: bool) -> Iterator[Candidate]:
    """Another scaling of B A, by the mistakes that are made. rank_stabilised: what the adapter asks for."""
    own, rank = sample.scaling, sample.update.lora_A.shape[0]
    root = math.sqrt(rank)
    alpha = own * (root if rank_stabilised else rank)
    wanted, other = ("sqrt(r)", "r") if rank_stabilised else ("r", "sqrt(r)")
    other_value = alpha / (rank if rank_stabilised else root)
    options = [
        ("scaling-missing", 1.0, f"B A was added without its scaling of {own:.6g}"),
        (
            "rslora",
            other_value,
            f"the scaling is lora_alpha / {other} = {other_value:.6g}, wanted lora_alpha / {wanted} = {own:.6g}",
        ),
        ("scaling-undivided", alpha, f"the scaling is lora_alpha = {alpha:.6g} itself, wanted {own:.6g}"),
        ("sign", -own, "B A was subtracted, not added"),
    ]
    seen = [own]
    for kind, scaling, text in options:
        if any(math.isclose(scaling, value, rel_tol=1e-9) for value in seen):
            continue
        seen.append(scaling)
        yield Candidate(kind, text, lambda scaling=scaling: sample.merged(scaling))  # type: ignore[misc]
        if sample.magnitude is not None and kind == "scaling-missing":
            inside = "the scaling was left out of the norm"
            yield Candidate("norm-scaling", inside, lambda: sample.merged(own, 1.0))
            outside = "the scaling was applied inside the norm only"
            yield Candidate("norm-scaling", outside, lambda: sample.merged(1.0, own))


def lora_candidates(sample: Sample) -> Iterator[Candidate]:
    """Mistakes of LoRA and DoRA alike, scalings apart."""
    yield Candidate("left-out", "the values are the base's: the adapter was not merged in", lambda: sample.weight)
    text = "the adapter was merged in twice"
    if sample.magnitude is None and sample.update.lora_A.shape[0] == 4:
        text += ", or alpha / r and alpha / sqrt(r) were exchanged, which for r = 4 is the same"
    yield Candidate("merged-twice", text, lambda: _twice(sample))
    if sample.is_square:
        text = "B A was added transposed, or A and B were exchanged"
        yield Candidate("delta-transposed", text, lambda: _with_delta(sample, _transposed_delta(sample)))


def other_norm_candidates(sample: Sample) -> Iterator[Candidate]:
    """Mistakes with a magnitude that is set against another norm than the paper's (`LoraEdit.is_paper`)."""
    yield Candidate("left-out", "the values are the base's: the adapter was not merged in", lambda: sample.weight)
    yield Candidate("magnitude-dropped", "the magnitude was dropped: the values are W + s B A", sample.direction)
    norm, magnitude = sample.update.edit.norm, sample.magnitude
    if magnitude is None or sample.transposed:
        return
    direction = sample.direction()
    if norm.axis == "in" and sample.is_square:
        whole = magnitude[sample.rows]
        text = "the magnitude belongs to the inputs, and was set against the norms of the outputs"
        yield Candidate("norm-axis", text, lambda: _rowwise(whole / sample.outputs.norms(sample.scaling), direction))
    if norm.axis is None:
        text = "the magnitude is m / ||V|| already, and was divided by the norm once more"
        yield Candidate(
            "norm-twice", text, lambda: _rowwise(magnitude / sample.outputs.norms(sample.scaling), direction)
        )


def scale_candidate(sample: Sample) -> Iterator[Candidate]:
    """LoRA with the scaling that fits best, by least squares."""
    own, size = sample.scaling, float(sample.delta.square().sum())
    if sample.magnitude is not None or not own or not size:
        return
    scale = float(((sample.got - sample.weight) * sample.delta).sum()) / size
    text = f"the scaling is {scale:.4g}, wanted {own:.6g} ({scale / own:.4g} times as much)"
    off = ESTIMATE_SIGMAS * math.sqrt(float((spacing(sample.got, sample.dtype).square() / 12).mean()) / size)
    yield Candidate("scaling", text, lambda: sample.merged(scale), off * sample.delta.abs())


def _twice(sample: Sample) -> Tensor:
    own = sample.scaling
    if sample.magnitude is None:
        return sample.direction(2 * own)
    outputs = sample.outputs
    factor = torch.nan_to_num(sample.magnitude / outputs.norms(own), nan=0.0)
    # ||W' + s D||^2 from sums: ||W'|| = |m|, <W', D> = factor (<W, D> + s ||D||^2).
    cross = factor * (outputs.cross + own * outputs.delta)
    squares = sample.magnitude.square() + 2 * own * cross + own**2 * outputs.delta
    return _rowwise(sample.magnitude / squares.clamp(min=0).sqrt(), sample.exact + own * sample.delta)


def _transposed_delta(sample: Sample) -> Tensor:
    """`(B A)^T` at the sample's place: row i is (A^T B^T)[i]."""
    lora_a, lora_b = sample.update.lora_A, sample.update.lora_B
    if sample.transposed:
        return lora_a.T @ lora_b[sample.rows].T
    return lora_a[:, sample.rows].T @ lora_b.T


def _with_delta(sample: Sample, delta: Tensor) -> Tensor:
    """`W'` with another B A, for which the norms of whole outputs are known only where the sample holds them."""
    direction = sample.weight + sample.scaling * delta
    if sample.magnitude is None:
        return direction
    if not sample.transposed:
        return _rowwise(sample.magnitude / torch.linalg.vector_norm(direction, dim=1), direction)
    return _rescaled(sample, direction)


def _rescaled(sample: Sample, direction: Tensor) -> Tensor:
    """Each output scaled to fit what was got: what is left where its true norm would need another pass."""
    return _rowwise((sample.got * direction).sum(1) / direction.square().sum(1), direction)


def dora_candidates(sample: Sample) -> Iterator[Candidate]:
    """Mistakes with the magnitude and with the norm."""
    magnitude = sample.magnitude
    if magnitude is None:
        return
    own, outputs = sample.scaling, sample.outputs
    base_norms, norms = outputs.norms(0.0), outputs.norms(own)
    yield Candidate("magnitude-dropped", "the magnitudes were dropped: the values are W + s B A", sample.direction)
    yield Candidate("delta-missing", "only the magnitudes were applied: B A was not added", lambda: sample.merged(0.0))
    yield Candidate(
        "norm-of-base",
        "the norm was taken of W in place of W + s B A",
        lambda: _rowwise(magnitude / base_norms, sample.direction()),
    )
    yield Candidate(
        "norm-missing",
        "W + s B A was multiplied by the magnitudes without being divided by its norm",
        lambda: _rowwise(magnitude, sample.direction()),
    )
    yield Candidate(
        "magnitude-dropped",
        "W + s B A was divided by its norm and not multiplied by the magnitudes",
        lambda: _rowwise(1 / norms, sample.direction()),
    )
    yield Candidate(
        "magnitude-dropped",
        "the magnitudes are those of the base: the trained ones were dropped",
        lambda: _rowwise(base_norms / norms, sample.direction()),
    )
    if sample.is_square:
        whole = sample.update.magnitude
        assert whole is not None
        along = whole if not sample.transposed else whole[sample.rows]
        yield Candidate(
            "magnitude-transposed",
            "the magnitudes were applied to the inputs in place of the outputs",
            lambda: _rowwise(1 / norms, sample.direction()) * along,
        )


def axis_candidates(sample: Sample) -> Iterator[Candidate]:
    """The norm along the wrong axis; needs the norms of whole inputs."""
    magnitude = sample.magnitude
    if magnitude is None:
        return
    norms = sample.inputs.norms(sample.scaling)
    text = "the norm was taken along the wrong axis, over the outputs"
    yield Candidate("norm-axis", text, lambda: _rowwise(magnitude, sample.direction()) / norms)
    if sample.is_square:
        whole = sample.update.magnitude
        assert whole is not None
        along = whole if not sample.transposed else whole[sample.rows]
        yield Candidate(
            "norm-axis",
            "the norm was taken, and the magnitudes applied, along the wrong axis",
            lambda: sample.direction() * (along / norms),
        )


def rounding_candidates(sample: Sample) -> Iterator[Candidate]:
    """More than one rounding on the way, as the tools that do it do it."""
    dtype = sample.dtype
    yield from storage_candidates(sample.exact, dtype)
    source = sample.reference.source
    if torch.finfo(source.dtype).eps < torch.finfo(dtype).eps:
        text = f"cast twice: the base was cast to {DTYPE_NAMES[dtype]} before the adapter was merged in"
        yield Candidate(
            "cast-twice", text, lambda: _stepwise(sample, round_once(sample.weight, dtype), sample.delta, None)
        )
    if torch.finfo(dtype).bits >= 32:
        return
    short = DTYPE_NAMES[dtype]
    rounded_factors = _rounded_factors(sample)
    for delta, adapter in ((sample.delta, ""), (rounded_factors, f"the adapter was cast to {short}, and ")):
        texts = {
            "delta": f"cast twice: {adapter}B A was rounded to {short} before it was added",
            "steps": f"cast twice: {adapter}every step was rounded to {short}",
        }
        if adapter:
            whole = f"cast twice: the adapter was cast to {short} before it was merged in"
            yield Candidate("cast-twice", whole, lambda delta=delta: _stepwise(sample, sample.weight, delta, None))  # type: ignore[misc]
        for step, text in texts.items():
            yield Candidate(
                "cast-twice",
                text,
                lambda delta=delta, step=step: _stepwise(sample, sample.weight, delta, step),  # type: ignore[misc]
            )


def storage_candidates(exact: Tensor, dtype: torch.dtype) -> Iterator[Candidate]:
    """The right values, stored through a coarser dtype or cut off."""
    for coarser in (torch.bfloat16, torch.float16, torch.float32):
        if torch.finfo(coarser).eps > torch.finfo(dtype).eps:
            text = f"cast twice: the values went through {DTYPE_NAMES[coarser]} and are stored as {DTYPE_NAMES[dtype]}"
            yield Candidate("cast-twice", text, lambda coarser=coarser: round_once(exact, coarser))  # type: ignore[misc]
    step = spacing(exact, dtype)
    text = f"the values were cut off, not rounded, to {DTYPE_NAMES[dtype]}"
    yield Candidate("truncated", text, lambda: torch.trunc(exact / step) * step)


def _rounded_factors(sample: Sample) -> Tensor:
    lora_a, lora_b = (round_once(factor, sample.dtype) for factor in (sample.update.lora_A, sample.update.lora_B))
    if sample.transposed:
        return lora_b @ lora_a[:, sample.rows]
    return lora_b[sample.rows] @ lora_a


def _stepwise(sample: Sample, weight: Tensor, delta: Tensor, step: str | None) -> Tensor:
    """The formula with roundings to the stored dtype on the way: of s B A alone ("delta"), or of everything."""

    def cast(values: Tensor) -> Tensor:
        return round_once(values, sample.dtype)

    update = sample.scaling * delta
    direction = weight + (cast(update) if step else update)
    if step == "steps":
        direction = cast(direction)
    if sample.magnitude is None:
        return direction
    # Where the sample holds no whole output, the exact norm stands in for that of the rounded V: rounding hides it.
    norms = (
        torch.linalg.vector_norm(direction, dim=1) if not sample.transposed else sample.outputs.norms(sample.scaling)
    )
    if step != "steps":
        return _rowwise(sample.magnitude / norms, direction)
    return cast(_rowwise(cast(cast(sample.magnitude) / cast(norms)), direction))


def within_stepwise_rounding(sample: Sample) -> bool:
    """Whether all of the sample is within twice what rounding every step to the stored dtype may do.

    Twice, because the base and the adapter may have been cast beforehand, which adds the same again.
    """
    start = sample.update.edit.region.start
    arithmetic = arithmetic_of(sample.dtype)
    errors = [error_rows(sample.reference, start + row, start + row + 1, arithmetic) for row in sample.rows.tolist()]
    error = sample.canonical(torch.cat(errors))
    return bool(within(sample.got, sample.exact, 2 * error, sample.dtype).all())


@dataclass(frozen=True)
class Magnitudes:
    """What a DoRA sample was scaled by, its direction being right but for the scaling of B A.

    scaling: of B A; magnitude (out here,): norm of each output; tolerance: its relative error, from rounding; values:
    of the fit; left_over: as in Fit.
    """

    scaling: float
    magnitude: Tensor
    tolerance: float
    values: Tensor
    left_over: float


def fit_magnitudes(sample: Sample) -> Magnitudes | None:
    """Fit `got = a (W + s' B A)` with one a for each output and one s' for all; None where that does not explain it."""
    got, weight, delta = sample.got, sample.weight, sample.delta
    ww, wd, dd = weight.square().sum(1), (weight * delta).sum(1), delta.square().sum(1)
    gw, gd = (got * weight).sum(1), (got * delta).sum(1)
    determinant = ww * dd - wd.square()
    usable = determinant > 1e-9 * ww * dd
    if int(usable.sum()) < 1 or got.shape[1] < 4:
        return None
    of_weight = (gw * dd - gd * wd)[usable] / determinant[usable]
    of_delta = (gd * ww - gw * wd)[usable] / determinant[usable]
    weights = dd[usable]
    fitted = float((of_delta * of_weight * weights).sum() / (of_weight.square() * weights).sum())
    rounding = float((spacing(got, sample.dtype).square() / 12).mean())
    own_scale = ESTIMATE_SIGMAS * math.sqrt(rounding / float((of_weight.square() * weights).sum()))
    for scaling, doubt in ((sample.scaling, 0.0), (fitted, own_scale)):
        direction = sample.direction(scaling)
        size = direction.square().sum(1)
        factor = (got * direction).sum(1) / size
        values = _rowwise(factor, direction)
        slack = _rowwise(ESTIMATE_SIGMAS * (rounding / size).sqrt(), direction.abs())
        slack += _rowwise(factor.abs() * doubt, delta.abs())
        judged = fit(got, values, sample.exact, sample.error, sample.dtype, slack)
        if judged is None:
            continue
        relative = sample.error.square().sum(1).sqrt() / sample.exact.square().sum(1).sqrt()
        tolerance = 2 * (torch.finfo(sample.dtype).eps / math.sqrt(got.shape[1]) + float(relative.nan_to_num().max()))
        return Magnitudes(scaling, factor * sample.outputs.norms(scaling), tolerance, values, judged.left_over)
    return None


def low_rank(sample: Sample) -> int | None:
    """The rank of what was added to the base, where it is as low as an adapter's; None where it is not low.

    `got = g (W + B' A')` with unknown g (1 for LoRA) and unknown A', B': g is fitted where A' does not reach, in turn
    with the directions that A' reaches. A rank is accepted once what is left is rounding, or a ten-thousandth.
    """
    got, weight = sample.got, sample.weight
    rank = sample.update.lora_A.shape[0]
    smallest = min(got.shape)
    noise = float((spacing(got, sample.dtype).square() / 12).sum()) * NOISE_SLACK
    for limit in (rank, 2 * rank):
        if 2 * limit > smallest:
            return None
        factor = torch.ones(len(got), dtype=torch.float64)
        for _ in range(1 if sample.magnitude is None else MOST_TURNS):
            energy, basis = _principal(got - factor.unsqueeze(1) * weight, limit)
            if sample.magnitude is None:
                break
            rest = weight - (weight @ basis) @ basis.T
            before, factor = factor, (got * rest).sum(1) / (weight * rest).sum(1)
            if bool(((factor - before).abs() <= 1e-9 * factor.abs()).all()):
                break
        head, tail = float(energy[:limit].sum()), float(energy[limit:].sum())
        if tail <= max(noise, LOW_RANK_TAIL * head) and head > 10 * tail:
            left = energy.flip(0).cumsum(0).flip(0)
            return int((left > max(noise, LOW_RANK_TAIL * head)).sum())
    return None


def _principal(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared singular values, the largest first, and the first right singular vectors (columns, count)."""
    rows, columns = values.shape
    if columns <= rows:
        energy, vectors = torch.linalg.eigh(values.T @ values)
        return energy.flip(0).clamp(min=0), vectors.flip(1)[:, :count]
    energy, vectors = torch.linalg.eigh(values @ values.T)
    basis = torch.linalg.qr(values.T @ vectors.flip(1)[:, :count])[0]
    return energy.flip(0).clamp(min=0), basis
