"""Every tensor of a merged folder, re-read from disk and compared with an independent computation.

Unadapted tensors must equal the base's byte for byte (or rounded once, where the folder is stored in another dtype).
Of an adapted tensor every element is compared with the exact value (reference_weight.py), in units of the spacing of
the dtype it is stored in, and gets one of three verdicts, whoever made the folder:

    exact                 every element is the exact value, rounded once: what `merge` promises
    float32 arithmetic    some are not, and all are within what float32 arithmetic explains: PEFT's default
    wrong                 some are further off, and `diagnose` says why where it can

Values within the error of float64 itself around a tie may be rounded either way, so they count as exact either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.diagnose import Suspect, diagnose
from dora_serve.plan import MergePlan, TensorPlan
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.reference_weight import (
    FLOAT32,
    FLOAT64,
    SECOND_ORDER,
    Reference,
    Update,
    error_rows,
    exact_rows,
    factor_error,
    open_reference,
    read_elements,
    round_once,
    row_blocks,
    source_rows,
    spacing,
    within,
)
from dora_serve.safetensors_file import DTYPE_NAMES, TensorEntry, read_bytes
from dora_serve.structure_check import check_structure
from dora_serve.tensor_report import ModuleError, NormCheck, TensorReport, TensorResult

ROW_BLOCK_ELEMENTS = 1 << 18
"""Elements of a row block: 2 MB in float64, of which a check holds about ten."""

COMPARE_BYTES = 1 << 22
ROUNDED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Advance = Callable[[int], None]


def check_tensors(
    plan: MergePlan,
    merged: ShardedCheckpoint,
    *,
    on_progress: OnProgress = ignore_progress,
    row_block_elements: int = ROW_BLOCK_ELEMENTS,
) -> TensorReport:
    """Compare a merged checkpoint with what `plan` says it should hold, and name what is wrong.

    Peak memory: some row blocks in float64 and the factors of one module. Nothing raises for a wrong value; reading
    raises CheckpointError where a file cannot be read or ends early.
    """
    structure = check_structure(plan, merged)
    total = sum(entry.nbytes for entry in structure.found.values())
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(Progress("checking tensors", done, total))

    results: list[TensorResult] = []
    suspects: list[Suspect] = []
    for name, entry in structure.found.items():
        measured = _check(plan.tensors[name], entry, advance, row_block_elements)
        results.append(measured.result)
        if measured.result.verdict == "wrong":
            suspects.append(
                Suspect(plan.tensors[name], entry, measured.result, measured.row_error, measured.row_outside)
            )
    findings = diagnose(plan, suspects, structure.absent, row_block_elements)
    return TensorReport((*results, *structure.absent), (*structure.findings, *findings), structure.notes)


@dataclass(frozen=True)
class _Measured:
    """row_error (rows,): squared error of each row of the tensor's matrix; row_outside: elements that are wrong.

    Of an error, half a spacing is the rounding that any stored value has, and only the rest is counted.
    """

    result: TensorResult
    row_error: Tensor = field(default_factory=lambda: torch.zeros(0))
    row_outside: Tensor = field(default_factory=lambda: torch.zeros(0))


def _check(plan: TensorPlan, entry: TensorEntry, advance: Advance, row_block_elements: int) -> _Measured:
    modules = [edit.module for edits in (plan.loras, plan.rows, plan.vectors) for edit in edits]
    modules += [scale.edit.module for scale in plan.scales]
    result = TensorResult(
        name=plan.name,
        stored_as=entry.name,
        modules=tuple(dict.fromkeys(modules)),
        action=plan.action,
        verdict="exact",
        dtype=DTYPE_NAMES[entry.dtype],
        elements=math.prod(entry.shape),
    )
    if entry.shape != plan.shape:
        advance(entry.nbytes)
        note = f"has the shape {list(entry.shape)}, wanted {list(plan.shape)}"
        return _Measured(replace(result, verdict="wrong", elements=0, note=note))
    if plan.is_copy and entry.dtype == plan.dtype and _equal_bytes(plan, entry):
        advance(entry.nbytes)
        return _Measured(result)
    if entry.dtype not in ROUNDED_DTYPES or plan.dtype not in ROUNDED_DTYPES:
        advance(entry.nbytes)
        return _Measured(_unlike(plan, entry, result))
    return _compare(open_reference(plan, row_block_elements), entry, result, advance, row_block_elements)


def _equal_bytes(plan: TensorPlan, entry: TensorEntry) -> bool:
    source = plan.source
    assert isinstance(source, TensorEntry)
    for start in range(0, entry.nbytes, COMPARE_BYTES):
        stop = min(start + COMPARE_BYTES, entry.nbytes)
        got = read_bytes(entry.path, entry.start + start, entry.start + stop)
        if got != read_bytes(source.path, source.start + start, source.start + stop):
            return False
    return True


def _unlike(plan: TensorPlan, entry: TensorEntry, result: TensorResult) -> TensorResult:
    """The result for whole numbers and for dtypes that nothing is rounded to: equal elements or wrong ones."""
    if entry.dtype != plan.dtype or not isinstance(plan.source, TensorEntry):
        wanted = DTYPE_NAMES[plan.dtype]
        return replace(result, verdict="wrong", note=f"is stored as {DTYPE_NAMES[entry.dtype]}, wanted {wanted}")
    differing = 0
    for start in range(0, result.elements, COMPARE_BYTES):
        stop = min(start + COMPARE_BYTES, result.elements)
        got, wanted_values = (read_elements(source, start, stop) for source in (entry, plan.source))
        size = entry.dtype.itemsize
        differs = got.view(torch.uint8).view(-1, size) != wanted_values.view(torch.uint8).view(-1, size)
        differing += int(differs.any(dim=1).sum())
    return replace(result, verdict="wrong", differing=differing, outside=differing)


@dataclass
class _Sums:
    """What is gathered over the row blocks of one tensor."""

    row_error: Tensor
    row_norm: Tensor
    row_outside: Tensor
    differing: int = 0
    non_finite: int = 0
    largest: float = 0.0


@dataclass
class _Norms:
    """DoRA's norms of one region. squares, rounding (out,): sums over its inputs of got^2 and (spacing / 2)^2."""

    update: Update
    squares: Tensor
    rounding: Tensor
    outputs: int = 0
    wrong: int = 0
    largest: float = 0.0


def _compare(
    reference: Reference, entry: TensorEntry, result: TensorResult, advance: Advance, row_block_elements: int
) -> _Measured:
    sums = _Sums(_zeros(reference.rows), _zeros(reference.rows), _zeros(reference.rows))
    norms = [
        _Norms(update, _zeros(update.edit.region.width), _zeros(update.edit.region.width))
        for update in reference.updates
        if update.magnitude is not None and update.edit.is_paper
    ]
    adapted = not reference.plan.is_copy and result.action not in ("cast", "dequantized")
    for start, stop in row_blocks(reference, row_block_elements):
        width = reference.width
        got = read_elements(entry, start * width, stop * width).to(torch.float64).view(stop - start, width)
        _compare_rows(reference, entry.dtype, start, stop, got, sums, adapted=adapted)
        for norm in norms:
            _add_norms(reference, norm, got, start, stop, entry.dtype)
        advance(got.numel() * entry.dtype.itemsize)
    checks = [_finish_norms(norm) for norm in norms]
    outside = int(sums.row_outside.sum())
    norm_check = None
    if checks:
        largest = max(check.largest for check in checks)
        norm_check = NormCheck(sum(c.outputs for c in checks), sum(c.wrong for c in checks), largest)
    wrong = outside > 0 or (norm_check is not None and norm_check.wrong > 0)
    finished = replace(
        result,
        verdict="wrong" if wrong else ("float32 arithmetic" if sums.differing else "exact"),
        differing=sums.differing,
        outside=outside,
        non_finite=sums.non_finite,
        largest_error=math.inf if sums.non_finite else sums.largest,
        parts=_parts(reference, sums),
        norms=norm_check,
    )
    return _Measured(finished, sums.row_error, sums.row_outside)


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def _compare_rows(
    reference: Reference, dtype: torch.dtype, start: int, stop: int, got: Tensor, sums: _Sums, *, adapted: bool
) -> None:
    exact = exact_rows(reference, start, stop)
    if not exact.numel():
        return
    step = spacing(exact, dtype)
    rounded = round_once(exact, dtype, step)
    error = (got - exact).abs_()
    sums.row_norm[start:stop] = exact.square().sum(dim=1)
    if bool((got == rounded).all()) and bool(torch.isfinite(got).all()):
        sums.largest = max(sums.largest, float((error / step).max()))
        return
    # What the base itself stores as infinite (a causal mask, say) may be copied; what is computed must be finite.
    broken = ~torch.isfinite(got)
    if not adapted:
        broken &= got != exact
    error = torch.where(broken | (got == exact), 0.0, error)
    sums.largest = max(sums.largest, float((error / step).nan_to_num(nan=math.inf).max()))
    sums.row_error[start:stop] = (error - step / 2).nan_to_num(nan=0.0, posinf=0.0).clamp_(min=0).square().sum(dim=1)
    sums.row_norm[start:stop] = torch.where(torch.isfinite(exact), exact, 0.0).square().sum(dim=1)
    suspicious = broken | (got != rounded)
    bound = error_rows(reference, start, stop, FLOAT32)
    # The judge's own error and that of the merge, which are both of float64.
    differs = broken | (suspicious & ~within(got, exact, bound * (2 * FLOAT64.unit / FLOAT32.unit), dtype))
    outside = broken | (differs & ~within(got, exact, bound, dtype))
    sums.differing += int(differs.sum())
    sums.non_finite += int(broken.sum())
    sums.row_outside[start:stop] = outside.sum(dim=1).to(torch.float64)


def _add_norms(reference: Reference, norms: _Norms, got: Tensor, start: int, stop: int, dtype: torch.dtype) -> None:
    update = norms.update
    first, last = update.overlap(start, stop)
    if first >= last:
        return
    part = got[first - start : last - start]
    rounding = (spacing(part, dtype) / 2).square()
    if update.edit.region.transposed:
        norms.squares += part.square().sum(dim=0)
        norms.rounding += rounding.sum(dim=0)
        return
    offset = update.edit.region.start

    def direction_norms() -> Tensor:
        delta = update.delta_rows(first - offset, last - offset)
        direction = source_rows(reference, first, last) + update.edit.scaling * delta
        return direction.square().sum(dim=1).sqrt()

    outputs = slice(first - offset, last - offset)
    _judge_norms(norms, part.square().sum(dim=1), rounding.sum(dim=1), outputs, direction_norms)


def _finish_norms(norms: _Norms) -> NormCheck:
    update = norms.update
    if update.norms is not None:
        known = update.norms
        _judge_norms(norms, norms.squares, norms.rounding, slice(None), lambda: known)
    return NormCheck(norms.outputs, norms.wrong, norms.largest)


def _judge_norms(
    norms: _Norms, squares: Tensor, rounding: Tensor, outputs: slice, direction_norms: Callable[[], Tensor]
) -> None:
    """||W'|| = |m|: by the triangle inequality the norm moves by no more than the norm of the elements' errors.

    Of rounding, these are half a spacing each; of float32 arithmetic, |m| times the relative error of the factor,
    which holds that of V (reference_weight.py), and that is looked at only where rounding does not explain it.
    """
    assert norms.update.magnitude is not None
    wanted = norms.update.magnitude[outputs].abs()
    off = (squares.sqrt() - wanted).abs()
    allowed = rounding.sqrt()
    norms.outputs += len(wanted)
    relative = torch.where(off == 0, 0.0, off / wanted)
    norms.largest = max(norms.largest, float(relative.nan_to_num(nan=math.inf).max()) if len(wanted) else 0.0)
    if bool((off <= allowed).all()):
        return
    relative_error = factor_error(norms.update, direction_norms(), outputs, FLOAT32)
    norms.wrong += int((~(off <= allowed + SECOND_ORDER * relative_error * wanted)).sum())


def _parts(reference: Reference, sums: _Sums) -> tuple[ModuleError, ...]:
    """Errors by module; what no module covers goes under the tensor's own name."""
    name = reference.plan.name
    parts = []
    rest_error, rest_norm = float(sums.row_error.sum()), float(sums.row_norm.sum())
    for update in reference.updates:
        region = update.edit.region
        error = float(sums.row_error[region.start : region.stop].sum())
        norm = float(sums.row_norm[region.start : region.stop].sum())
        parts.append(ModuleError(update.edit.module, name, error, norm))
        rest_error, rest_norm = rest_error - error, rest_norm - norm
    covered = sum(update.edit.region.stop - update.edit.region.start for update in reference.updates)
    if covered < reference.rows:
        parts.append(ModuleError(name, name, max(0.0, rest_error), max(0.0, rest_norm)))
    return tuple(parts)
