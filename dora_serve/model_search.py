"""Mistakes that take more than the module at hand to see: another module's magnitudes, update or whole tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dora_serve.adapter import LazyTensor
from dora_serve.hypotheses import Candidate, Fit, Sample, best_of, fit_magnitudes, low_rank
from dora_serve.plan import LoraEdit, MergePlan
from dora_serve.reference_weight import exact_rows, open_reference, read_elements

FAILED_SEARCHES = 8
"""Searches through the whole model are given up after so many that found nothing."""

SEARCHED_TENSORS = 64
SEARCHED_ROWS = 8
ALIKE_SHARE = 0.95


@dataclass
class Search:
    """What the searches through one model share. failed: how many found nothing; last: the one that did."""

    plan: MergePlan
    row_block_elements: int
    failed: int = 0
    last: str = ""
    other_base: bool = False

    @property
    def worth_it(self) -> bool:
        return self.failed < FAILED_SEARCHES and not self.other_base


def search_model(search: Search, sample: Sample) -> Candidate | None:
    """What in the whole model explains a module. The search that found the last one goes first."""
    judged = (sample.got, sample.exact, sample.error, sample.dtype)
    searches: dict[str, Callable[[], Candidate | None]] = {
        "delta": lambda: _first(best_of(_other_deltas(search.plan, sample), *judged)),
        "packing": lambda: _first(best_of(_other_packing(search.plan, sample), *judged)),
        "tensor": lambda: _other_tensor(search, sample),
        "transposed": lambda: _transposed_tensor(sample),
        "adapter": lambda: _other_adapter(sample),
    }
    for name in sorted(searches, key=lambda name: name != search.last):
        found = searches[name]()
        if found is not None:
            search.last = name
            return found
    search.failed += 1
    return None


def _first(best: tuple[Candidate, Fit] | None) -> Candidate | None:
    return best[0] if best else None


def _other_deltas(plan: MergePlan, sample: Sample) -> Iterator[Candidate]:
    """The update of another module of the same shape, or of another expert, in place of this one's."""
    own = sample.update.edit
    for edit in _edits(plan, own.lora_B.shape[0]):
        same = edit.lora_A.shape[1] == own.lora_A.shape[1] and edit.region.transposed == own.region.transposed
        if edit is own or not same:
            continue
        yield Candidate(
            "adapter-of-other",
            f"the update that belongs to {edit.module} was merged into it",
            lambda edit=edit: _with_edit(sample, edit),  # type: ignore[misc]
        )


def _with_edit(sample: Sample, edit: LoraEdit) -> Tensor:
    lora_a, lora_b = edit.lora_A.load().to(torch.float64), edit.lora_B.load().to(torch.float64)
    if sample.transposed:
        direction = sample.weight + edit.scaling * (lora_b @ lora_a[:, sample.rows])
    else:
        direction = sample.weight + edit.scaling * (lora_b[sample.rows] @ lora_a)
    if edit.magnitude is None:
        return direction
    if sample.transposed:
        factor = (sample.got * direction).sum(1) / direction.square().sum(1)
    else:
        magnitude = edit.magnitude.load().to(torch.float64)[sample.rows]
        factor = magnitude / torch.linalg.vector_norm(direction, dim=1)
    return factor.nan_to_num(nan=0.0).unsqueeze(1) * direction


def _other_packing(plan: MergePlan, sample: Sample) -> Iterator[Candidate]:
    """lora_B of an expert taken from the packed factor the other way: expert by expert, or rank by rank."""
    own = sample.update.edit
    for expert in plan.adapter.experts:
        label = re.fullmatch(rf"{re.escape(expert.module)}\.[^.\[]+\[(\d+)\]", own.module)
        count, rank = expert.lora_A.shape[0] // expert.rank, expert.rank
        if label is None or count < 2:
            continue
        packed, number = expert.lora_B.load().to(torch.float64), int(label[1])
        if expert.expert_slowest:
            other = packed.reshape(-1, rank, count)[:, :, number]
        else:
            other = packed[:, number * rank : (number + 1) * rank]
        outputs = own.lora_B.shape[0]
        for start in range(0, len(other) - outputs + 1, outputs):  # gate and up may be stored apart
            edit = replace(own, lora_B=LazyTensor.of(other[start : start + outputs]))
            text = "its part of lora_B was cut out of the experts' the other way (expert by expert, or rank by rank)"
            yield Candidate("expert-packing", text, lambda edit=edit: _with_edit(sample, edit))  # type: ignore[misc]


def _other_tensor(search: Search, sample: Sample) -> Candidate | None:
    """Another tensor's values, merged or not, under this one's name: q and k exchanged, layers shifted."""
    own = sample.reference.plan
    start = sample.update.edit.region.start
    rows = [start + row for row in sample.rows.tolist()[:SEARCHED_ROWS]]
    at = slice(0, len(rows))
    got, exact, error = (
        values.T[at] if sample.transposed else values[at] for values in (sample.got, sample.exact, sample.error)
    )
    return tensor_like(search, own.name, own.shape, rows, (got, exact, error, sample.dtype))


def tensor_like(
    search: Search,
    own: str,
    shape: tuple[int, ...],
    rows: list[int],
    judged: tuple[Tensor, Tensor, Tensor, torch.dtype],
) -> Candidate | None:
    """The planned tensor of this shape, other than `own`, whose rows these are. judged: got, exact, error, dtype."""
    got = judged[0]
    width = got.shape[1]
    for name in _alike_tensors(search.plan, own, shape):
        other = search.plan.tensors[name]
        if isinstance(other.source, LazyTensor):
            continue
        base = torch.cat(
            [read_elements(other.source, row * width, (row + 1) * width).to(torch.float64).view(1, -1) for row in rows]
        )
        options = [Candidate("swapped", f"it holds the base's {name}", lambda base=base: base)]  # type: ignore[misc]
        if not other.is_copy:
            reference = open_reference(other, search.row_block_elements)
            if reference.width == width:
                merged = torch.cat([exact_rows(reference, row, row + 1) for row in rows])
                options.insert(0, Candidate("swapped", f"it holds the values of {name}", lambda merged=merged: merged))  # type: ignore[misc]
        best = best_of(options, *judged)
        if best is not None:
            return best[0]
    return None


def _alike_tensors(plan: MergePlan, own: str, shape: tuple[int, ...]) -> list[str]:
    """Other planned tensors of the same shape, those of the same layer first."""
    names = [name for name, tensor in plan.tensors.items() if tensor.shape == shape and name != own]
    parts = own.split(".")

    def distance(name: str) -> int:
        return sum(one != other for one, other in zip(parts, name.split("."), strict=False))

    return sorted(names, key=distance)[:SEARCHED_TENSORS]


def _transposed_tensor(sample: Sample) -> Candidate | None:
    """The whole tensor stored the other way round, for a square one: got[i, j] is what [j, i] should be."""
    if not sample.is_square:
        return None
    rows = sample.rows
    got, exact, error = (
        values[rows] if sample.transposed else values[:, rows] for values in (sample.got, sample.exact, sample.error)
    )
    if bool((exact == exact.T).all()):
        return None
    candidate = Candidate("tensor-transposed", "it is stored transposed", lambda: exact.T)
    return _first(best_of([candidate], got, exact, error.T, sample.dtype))


def _other_adapter(sample: Sample) -> Candidate | None:
    rank = low_rank(sample)
    if rank is None:
        return None
    text = (
        f"what was added to the base has rank {rank}, as an adapter's update has, and is not this adapter's: "
        "another adapter, or another checkpoint of its training"
    )
    return Candidate("another-adapter", text, lambda: sample.got)


def magnitude_candidate(plan: MergePlan, sample: Sample, beaten: Fit | None) -> Candidate | None:
    """What is wrong with the magnitudes of a DoRA module whose direction is right but for a scaling.

    beaten: how well something simpler fits, to which this must be clearly superior.
    """
    own = sample.magnitude
    if own is None:
        return None
    fitted = fit_magnitudes(sample)
    if fitted is None or (beaten is not None and fitted.left_over > beaten.left_over / 2):
        return None
    tolerance = fitted.tolerance
    same_scaling = fitted.scaling == sample.scaling
    scaling = "" if same_scaling else f"the scaling is {fitted.scaling:.4g}, wanted {sample.scaling:.6g}"

    def candidate(kind: str, text: str) -> Candidate:
        return Candidate(kind, " and ".join(filter(None, (scaling, text))), lambda: fitted.values)

    if _alike(fitted.magnitude, own, tolerance):
        return None if same_scaling else candidate("scaling", "")
    if _alike(fitted.magnitude, sample.outputs.norms(fitted.scaling), tolerance):
        return candidate("magnitude-dropped", "the magnitudes were dropped: the values are W + s B A")
    whole = sample.update.magnitude
    assert whole is not None
    if _is_permutation(sample.stored_norms(), whole.abs(), tolerance):
        return candidate("magnitude-permuted", "the magnitudes are in another order: each output has that of another")
    here = torch.arange(len(whole)) if sample.transposed else sample.rows
    for edit in _edits(plan, len(whole)):
        if edit.magnitude is not None and edit.module != sample.update.edit.module:
            other = edit.magnitude.load().to(torch.float64)[here]
            if _alike(fitted.magnitude, other, tolerance):
                return candidate("magnitude-of-other", f"the magnitudes are those of {edit.module}")
    ratio = float((fitted.magnitude / own).median())
    if _alike(fitted.magnitude, ratio * own, tolerance):
        return candidate("magnitude-changed", f"the magnitudes are {ratio:.4g} times the adapter's")
    return candidate(
        "magnitude-changed",
        f"the direction is right and the magnitudes are not the adapter's ({ratio:.4g} times, in the median)",
    )


def _alike(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Equal but for a few, whose rounding a few large elements decide."""
    return float(((first - second).abs() <= tolerance * second.abs()).double().mean()) >= ALIKE_SHARE


def _is_permutation(norms: Tensor, magnitude: Tensor, tolerance: float) -> bool:
    """Whether the norms are the magnitudes in another order: alike when both are sorted, and not alike one by one.

    Magnitudes of another training may be alike when sorted, but each is like its own as well; of permuted ones most
    are off by what two of a neighbourhood differ by, at the least.
    """
    if not _alike(norms.sort().values, magnitude.sort().values, tolerance):
        return False
    off = (norms - magnitude).abs()
    strangers = (magnitude - magnitude.roll(len(magnitude) // 2)).abs()
    return float(off[off > tolerance * magnitude].median()) > 0.1 * float(strangers.median())


def _edits(plan: MergePlan, outputs: int) -> Iterator[LoraEdit]:
    for tensor in plan.tensors.values():
        for edit in tensor.loras:
            if edit.lora_B.shape[0] == outputs:
                yield edit
