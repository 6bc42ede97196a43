"""Why a merged tensor is wrong: known mistakes are tried on some of its rows, and the one that explains them is named.

Every guess is computed from the base and the adapter on its own (hypotheses.py) and believed only where it gives the
stored values to within rounding. What none explains is said to be unexplained.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_serve.adapter import LazyTensor
from dora_serve.hypotheses import (
    Candidate,
    Sample,
    axis_candidates,
    best_of,
    dora_candidates,
    lora_candidates,
    other_norm_candidates,
    rounding_candidates,
    scale_candidate,
    scaling_candidates,
    storage_candidates,
    take_sample,
    within_stepwise_rounding,
)
from dora_serve.model_search import SEARCHED_ROWS, Search, magnitude_candidate, search_model, tensor_like
from dora_serve.plan import MergePlan, TensorPlan
from dora_serve.reference_weight import (
    FLOAT32,
    Reference,
    Update,
    error_rows,
    exact_rows,
    open_reference,
    read_elements,
    round_once,
    source_rows,
)
from dora_serve.safetensors_file import DTYPE_NAMES, TensorEntry
from dora_serve.tensor_report import Finding, TensorResult

SAMPLE_ELEMENTS = 1 << 18
FEWEST_ROWS, MOST_ROWS = 8, 64
LIKENESS = 2.0**-20
"""How far, relatively, a value may be from another tensor's to be the same: some roundings of float32."""

FEW_ELEMENTS = 16
"""Up to so many wrong elements, in a tensor of which they are at most a hundredth, are damage and not a method."""


@dataclass(frozen=True)
class Suspect:
    """A wrong tensor: its plan, where it lies, its result, and by row of its matrix the error and wrong elements."""

    plan: TensorPlan
    entry: TensorEntry
    result: TensorResult
    row_error: Tensor
    row_outside: Tensor


@dataclass(frozen=True)
class _Diagnosis:
    """subject: a module, or a tensor that none adapts. text: a clause about it."""

    kind: str
    subject: str
    text: str


def diagnose(
    plan: MergePlan,
    suspects: Sequence[Suspect],
    absent: Sequence[TensorResult],
    row_block_elements: int,
) -> tuple[Finding, ...]:
    """Findings for all wrong tensors, those of one kind gathered into one. Nothing is reported for none."""
    search = Search(plan, row_block_elements)
    adapted = [suspect for suspect in suspects if suspect.plan.loras and not suspect.result.note]
    plain = [suspect for suspect in suspects if not suspect.plan.loras or suspect.result.note]
    diagnoses = [_diagnose_plain(search, suspect) for suspect in plain]
    search.other_base = _is_other_base(plan, plain, diagnoses, absent)
    for suspect in sorted(adapted, key=lambda suspect: -suspect.result.outside):
        diagnoses += _diagnose_adapted(search, suspect)
    return tuple(_gather(plan, diagnoses, search))


def _is_other_base(
    plan: MergePlan, plain: Sequence[Suspect], diagnoses: Sequence[_Diagnosis], absent: Sequence[TensorResult]
) -> bool:
    """Whether most of what the adapter leaves alone differs, and nothing simpler explains it."""
    gone = {result.name for result in absent}
    copied = [tensor for tensor in plan.tensors.values() if tensor.is_copy and tensor.name not in gone]
    # Norms and biases often are the same constants in every base of a family: matrices tell.
    matrices = [tensor for tensor in copied if len(tensor.shape) > 1] or copied
    names = {
        suspect.plan.name for suspect, found in zip(plain, diagnoses, strict=True) if found.kind == "unadapted-changed"
    }
    changed = sum(tensor.nbytes for tensor in matrices if tensor.name in names)
    return 2 * changed >= sum(tensor.nbytes for tensor in matrices) > 0


def _rows_to_sample(row_outside: Tensor, row_error: Tensor, width: int) -> Tensor:
    """Wrong rows, half of them the worst and half spread over all wrong ones, as sorted indices."""
    count = min(MOST_ROWS, max(FEWEST_ROWS, SAMPLE_ELEMENTS // max(1, width)))
    wrong = row_outside.nonzero().flatten()
    if not len(wrong):
        wrong = torch.arange(len(row_outside))
    if len(wrong) <= count:
        return wrong
    worst = wrong[row_error[wrong].argsort(descending=True)[: count // 2]]
    spread = wrong[torch.linspace(0, len(wrong) - 1, count - count // 2).long()]
    return torch.tensor(sorted({*worst.tolist(), *spread.tolist()}))


# One wrong tensor that LoRA or DoRA updates


def _diagnose_adapted(search: Search, suspect: Suspect) -> Iterator[_Diagnosis]:
    if not suspect.result.outside:
        worst = suspect.result.norms.largest if suspect.result.norms else 0.0
        text = f"its row norms differ from the magnitudes by up to {worst:.2g} of them"
        yield _Diagnosis("norm", suspect.result.modules[0], text)
        return
    reference = open_reference(suspect.plan, search.row_block_elements)
    left = suspect.row_outside.clone()
    for update in reference.updates:
        region = update.edit.region
        rows = slice(region.start, region.stop)
        if bool(left[rows].any()):
            yield _diagnose_region(search, suspect, reference, update)
        left[rows] = 0
    if bool(left.any()):
        yield _diagnose_rows(search, suspect, reference, left)


def _diagnose_region(search: Search, suspect: Suspect, reference: Reference, update: Update) -> _Diagnosis:
    module, region = update.edit.module, update.edit.region
    outside = suspect.row_outside[region.start : region.stop]
    rows = _rows_to_sample(outside, suspect.row_error[region.start : region.stop], region.width)
    sample = take_sample(reference, update, suspect.entry, rows, search.row_block_elements)
    if suspect.result.non_finite:
        return _non_finite(suspect, module)
    judged = (sample.got, sample.exact, sample.error, sample.dtype)
    if not update.edit.is_paper:  # what can go wrong with other norms is not known here
        found = best_of(other_norm_candidates(sample), *judged)
        return _Diagnosis(found[0].kind, module, found[0].text) if found else _unexplained(suspect, module)
    found = best_of(_candidates(search.plan, sample), *judged) or best_of(axis_candidates(sample), *judged)
    best = found[0] if found else None
    if best is None and not bool(sample.got.any()):
        return _Diagnosis("zeroed", module, "its values are zeros")
    if best is None and _are_few(outside, region.width):
        return _damage(suspect, reference, module, outside, region.start)
    if found is None or not found[1].outright:
        best = magnitude_candidate(search.plan, sample, found[1] if found else None) or best
    if best is None and within_stepwise_rounding(sample):
        share = float(outside.sum()) / (len(outside) * region.width)
        text = (
            f"cast twice: {share:.2%} of its elements are off by rounding to {DTYPE_NAMES[sample.dtype]} on the way, "
            f"the worst by {suspect.result.largest_error:.2g} spacings"
        )
        return _Diagnosis("cast-twice", module, text)
    if best is None and search.worth_it:
        best = search_model(search, sample)
    if best is None:
        return _unexplained(suspect, module)
    wrong = int((outside > 0).sum())
    partly = (
        f" (in {wrong} of its {len(outside)} stored rows)" if wrong < 0.9 * len(outside) and _is_method(best) else ""
    )
    return _Diagnosis(best.kind, module, best.text + partly)


def _is_method(candidate: Candidate) -> bool:
    """Whether the mistake would be seen in every row, so that rows without it are worth a word."""
    return candidate.kind not in ("cast-twice", "truncated", "magnitude-permuted", "magnitude-changed")


def _non_finite(suspect: Suspect, subject: str) -> _Diagnosis:
    count = suspect.result.non_finite
    return _Diagnosis("non-finite", subject, f"{count} of its elements {'is' if count == 1 else 'are'} NaN or infinite")


def _candidates(plan: MergePlan, sample: Sample) -> Iterator[Candidate]:
    """Mistakes that the sample itself can show, the likely ones first."""
    rank_stabilised = bool(plan.adapter.config.get("use_rslora"))
    yield from lora_candidates(sample)
    yield from scaling_candidates(sample, rank_stabilised=rank_stabilised)
    yield from dora_candidates(sample)
    yield from rounding_candidates(sample)
    yield from scale_candidate(sample)


def _are_few(outside: Tensor, width: int) -> bool:
    count = int(outside.sum())
    return count == 1 or (count <= FEW_ELEMENTS and 100 * count <= len(outside) * width)


def _damage(suspect: Suspect, reference: Reference, subject: str, outside: Tensor, first_row: int) -> _Diagnosis:
    """A few wrong elements among right ones, told bit by bit."""
    count = int(outside.sum())
    row = first_row + int(outside.nonzero()[0])
    exact = round_once(exact_rows(reference, row, row + 1), suspect.entry.dtype).flatten()
    got = read_elements(suspect.entry, row * reference.width, (row + 1) * reference.width)
    off = (got.to(torch.float64) - exact).abs()
    column = int(off.argmax())
    bits = _flipped_bits(got[column], exact[column].to(got.dtype))
    where = f"element [{row}, {column}] is {float(got[column]):.6g}, wanted {float(exact[column]):.6g}"
    how = f": bit {bits[0]} is flipped" if len(bits) == 1 else ""
    text = f"{count} of its elements {'is' if count == 1 else 'are'} damaged ({where}{how})"
    return _Diagnosis("flipped", subject, text)


def _flipped_bits(got: Tensor, wanted: Tensor) -> list[int]:
    size = got.dtype.itemsize
    numbers = [int.from_bytes(bytes(value.reshape(1).view(torch.uint8).tolist()), "little") for value in (got, wanted)]
    difference = numbers[0] ^ numbers[1]
    return [bit for bit in range(8 * size) if difference >> bit & 1]


def _unexplained(suspect: Suspect, subject: str) -> _Diagnosis:
    result = suspect.result
    error = math.sqrt(sum(part.squared_error for part in result.parts))
    norm = math.sqrt(sum(part.squared_norm for part in result.parts))
    relative = f", {error / norm:.2g} of its norm" if norm else ""
    text = f"{result.outside} of its {result.elements} elements are wrong{relative}, and no known mistake explains it"
    return _Diagnosis("unexplained", subject, text)


# One wrong tensor without LoRA


def _diagnose_plain(search: Search, suspect: Suspect) -> _Diagnosis:
    subject = suspect.plan.name
    if suspect.result.note:
        return _diagnose_note(search, suspect)
    if not len(suspect.row_outside):
        return _Diagnosis("unadapted-changed", subject, f"{suspect.result.outside} of its elements are not the base's")
    reference = open_reference(suspect.plan, search.row_block_elements)
    return _diagnose_rows(search, suspect, reference, suspect.row_outside)


def _diagnose_note(search: Search, suspect: Suspect) -> _Diagnosis:
    """A tensor whose shape or dtype is wrong: is it another one?"""
    subject, shape, dtype = suspect.plan.name, suspect.entry.shape, suspect.entry.dtype
    if shape == suspect.plan.shape:
        return _Diagnosis("wrong-dtype", subject, suspect.result.note)
    if len(shape) == 2 and dtype.is_floating_point and search.worth_it:
        rows = list(range(min(SEARCHED_ROWS, shape[0])))
        got = read_elements(suspect.entry, 0, len(rows) * shape[1]).to(torch.float64).view(len(rows), shape[1])
        error = got.abs() * LIKENESS
        like = tensor_like(search, subject, shape, rows, (got, got, error, dtype))
        if like is not None:
            return _Diagnosis(like.kind, subject, like.text)
        search.failed += 1
    turned = ": it is stored transposed" if shape == suspect.plan.shape[::-1] else ""
    return _Diagnosis("wrong-shape", subject, suspect.result.note + turned)


def _diagnose_rows(search: Search, suspect: Suspect, reference: Reference, outside: Tensor) -> _Diagnosis:
    plan, dtype = suspect.plan, suspect.entry.dtype
    subject = plan.name
    rows = _rows_to_sample(outside, suspect.row_error, reference.width).tolist()
    got = torch.cat([read_elements(suspect.entry, row * reference.width, (row + 1) * reference.width) for row in rows])
    got = got.to(torch.float64).view(len(rows), reference.width)
    exact = torch.cat([exact_rows(reference, row, row + 1) for row in rows])
    error = torch.cat([error_rows(reference, row, row + 1, FLOAT32) for row in rows])
    if suspect.result.non_finite:
        return _non_finite(suspect, subject)
    if reference.width == 1:  # a vector: its elements are one sample, not one row each
        got, exact, error = got.T, exact.T, error.T
    judged = (got, exact, error, dtype)
    found = best_of(_plain_candidates(search.plan, reference, rows, exact, dtype), *judged)
    if found is not None:
        return _Diagnosis(found[0].kind, subject, found[0].text)
    if not bool(got.any()):
        return _Diagnosis("zeroed", subject, "its values are zeros")
    if _are_few(outside, reference.width):
        return _damage(suspect, reference, subject, outside, 0)
    if search.worth_it and plan.is_copy and reference.width > 1:
        few = slice(0, SEARCHED_ROWS)
        like = tensor_like(search, plan.name, plan.shape, rows[few], (got[few], exact[few], error[few], dtype))
        if like is not None:
            return _Diagnosis(like.kind, subject, like.text)
        search.failed += 1
    if plan.loras:
        count = int(outside.sum())
        return _Diagnosis("unadapted-changed", plan.name, f"{count} elements that no update covers are not the base's")
    if plan.is_copy or plan.action == "cast":
        share = suspect.result.outside / max(1, suspect.result.elements)
        return _Diagnosis("unadapted-changed", subject, f"{share:.3g} of its elements are not the base's")
    return _unexplained(suspect, subject)


def _plain_candidates(
    plan: MergePlan, reference: Reference, rows: list[int], exact: Tensor, dtype: torch.dtype
) -> Iterator[Candidate]:
    own = reference.plan
    vector = reference.width == 1

    def stacked(values: list[Tensor]) -> Tensor:
        joined = torch.cat(values)
        return joined.T if vector else joined

    yield from storage_candidates(exact, dtype)
    source = stacked([source_rows(reference, row, row + 1) for row in rows])
    if own.vectors:
        yield Candidate("left-out", "the values are the base's: lora_bias was not merged in", lambda: source)
        whole = torch.zeros(reference.rows, dtype=torch.float64)
        for start, _, values in reference.added:
            whole[start : start + len(values)] += values
        added = whole[rows].view(1, -1)
        yield Candidate("scaling-missing", "lora_bias was added without its scaling", lambda: source + added)
    base = plan.base.tensors.get(own.name)
    if base is not None and base.shape == own.shape and (own.rows or isinstance(own.source, LazyTensor)):
        width = reference.width
        stored = stacked(
            [read_elements(base, row * width, (row + 1) * width).to(torch.float64).view(1, -1) for row in rows]
        )
        text = "the values are the base's: the trained ones were not put in their place"
        yield Candidate("left-out", text, lambda: stored)
        yield Candidate(
            "rows-added", "the trained values were added to the base's, not put in their place", lambda: stored + exact
        )
    scale = _bias_scale(plan, own) if vector and own.is_copy else None
    if scale is not None and len(scale) == reference.rows:
        text = "the bias was multiplied by m / ||V||, which DoRA leaves alone"
        yield Candidate("bias-scaled", text, lambda: exact * scale[rows].view(1, -1))


def _bias_scale(plan: MergePlan, bias: TensorPlan) -> Tensor | None:
    """`m / ||V||` of the module that a bias belongs to, where it is DoRA on the whole of one tensor."""
    weight = plan.tensors.get(bias.name.removesuffix("bias") + "weight") if bias.name.endswith("bias") else None
    if weight is None or len(weight.loras) != 1 or weight.loras[0].magnitude is None or not weight.loras[0].is_paper:
        return None
    reference = open_reference(weight, SAMPLE_ELEMENTS)
    update = reference.updates[0]
    if update.norms is not None:
        norms = update.norms
    else:
        step = max(1, SAMPLE_ELEMENTS // max(1, reference.width))
        norms = torch.cat(
            [
                torch.linalg.vector_norm(
                    source_rows(reference, start, min(start + step, reference.rows))
                    + update.edit.scaling * update.delta_rows(start, min(start + step, reference.rows)),
                    dim=1,
                )
                for start in range(0, reference.rows, step)
            ]
        )
    assert update.magnitude is not None
    return update.magnitude / norms


# From diagnoses to findings


def _gather(plan: MergePlan, diagnoses: Sequence[_Diagnosis], search: Search) -> Iterator[Finding]:
    adapted = {edit.module for tensor in plan.tensors.values() for edit in tensor.loras}
    by_kind: dict[str, list[_Diagnosis]] = defaultdict(list)
    for diagnosis in diagnoses:
        by_kind[diagnosis.kind].append(diagnosis)
    if search.other_base:
        swallowed = [found for kind in ("unadapted-changed", "unexplained") for found in by_kind.pop(kind, [])]
        subjects = tuple(dict.fromkeys(found.subject for found in swallowed))
        yield Finding(
            "another-base",
            "Tensors that the adapter leaves alone differ from the base: this was merged into another base "
            f"({len(subjects)} tensors and modules, {_listing(subjects)}).",
            subjects,
        )
    for kind, found in by_kind.items():
        subjects = tuple(dict.fromkeys(diagnosis.subject for diagnosis in found))
        text = found[0].text
        if kind == "left-out" and len(adapted) > 1 and adapted <= set(subjects):
            yield Finding(
                "unmerged-base",
                f"All {len(adapted)} adapted modules hold the base's values: this is the unmerged base itself.",
                subjects,
            )
        elif len(subjects) == 1:
            yield Finding(kind, f"{subjects[0]}: {text}.", subjects)
        else:
            among = _among(subjects, adapted)
            differs = any(diagnosis.text != text for diagnosis in found)
            example = f", as in {subjects[0]}" if differs else ""
            yield Finding(kind, f"{among} ({_listing(subjects)}){example}: {text}.", subjects)


def _among(subjects: tuple[str, ...], adapted: set[str]) -> str:
    if adapted == set(subjects):
        return f"All {len(adapted)} adapted modules"
    if adapted >= set(subjects):
        return f"{len(subjects)} of the {len(adapted)} adapted modules"
    return f"{len(subjects)} tensors"


def _listing(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
