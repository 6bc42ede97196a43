"""Whether magnitudes are what they are called: m, the norm of a weight, or m / ||V|| already (TensorRT-LLM writes
these under the same name, formats.md 9, point 6).

Nothing in a file says so, and a base with rows of length 1 looks the same both ways: so it is asked, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dora_serve.errors import AdapterError
from dora_serve.plan import LoraEdit, TensorPlan
from dora_serve.reference_weight import read_elements
from dora_serve.safetensors_file import TensorEntry

NEAR = 0.2
"""Training moves magnitudes by some per cent: what is closer to 1 than this may be a quotient."""

SAMPLED, _SAMPLED_ROWS = 8, 64


def require_norms(tensors: Iterable[TensorPlan]) -> None:
    """Raises AdapterError where nearly all magnitudes are near 1, and neither the adapted weights nor the base's are.

    Reads some rows of some weights.
    """
    edits = [
        (tensor, edit)
        for tensor in tensors
        for edit in tensor.loras
        if edit.magnitude is not None and edit.is_paper and not edit.region.transposed
    ]
    sampled = edits[:: max(1, len(edits) // SAMPLED)]
    require_plausible([(_median(edit), partial(_norms, tensor, edit)) for tensor, edit in sampled])


@dataclass(frozen=True)
class RowLengths:
    """Medians over the rows of a module: of W + s B A, by which a magnitude is divided, and of W, where it began."""

    adapted: float
    base: float


def require_plausible(sampled: Sequence[tuple[float, Callable[[], RowLengths]]]) -> None:
    """The same of some modules, each by the median of its magnitudes and its rows' lengths, the latter taken only
    where the former are all near 1."""
    if not sampled or any(abs(magnitude - 1) >= NEAR for magnitude, _ in sampled):
        return
    medians = [magnitude for magnitude, _ in sampled]
    lengths = [length() for _, length in sampled]
    near = [
        abs(magnitude / length.adapted - 1) <= NEAR or abs(magnitude / length.base - 1) <= NEAR
        for magnitude, length in zip(medians, lengths, strict=True)
    ]
    if 2 * sum(near) >= len(sampled):
        return
    norms = [length.adapted for length in lengths]
    raise AdapterError(
        f"The magnitudes are near 1 (the median of a module's is {min(medians):.3g} to {max(medians):.3g}), and the "
        f"rows of W + s B A are of length {min(norms):.3g} to {max(norms):.3g}: they may be m / ||V|| already, as "
        "TensorRT-LLM's normalize_weights.py writes them, and nothing in the files says so.",
        remedy="Say --magnitudes norm-scale if they are, or --magnitudes norm if they are m after all.",
        option="--magnitudes",
    )


def _median(edit: LoraEdit) -> float:
    assert edit.magnitude is not None
    return float(edit.magnitude.load().double().abs().median())


def _norms(tensor: TensorPlan, edit: LoraEdit) -> RowLengths:
    """Of some rows."""
    region = edit.region
    count = min(_SAMPLED_ROWS, region.stop - region.start)
    source = tensor.source if isinstance(tensor.source, TensorEntry) else tensor.source.load()
    start = region.start * region.width
    weight = read_elements(source, start, start + count * region.width).double().view(count, region.width)
    delta = edit.lora_B.load()[:count].double() @ edit.lora_A.load().double()
    adapted, base = (torch.linalg.vector_norm(rows, dim=1).median() for rows in (weight + edit.scaling * delta, weight))
    return RowLengths(float(adapted), float(base))
