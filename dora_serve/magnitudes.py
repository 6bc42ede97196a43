"""Whether magnitudes are what they are called: m, the norm of a weight, or m / ||V|| already (TensorRT-LLM writes
these under the same name, formats.md 9, point 6).

Nothing in a file says so, and a base with rows of length 1 looks the same both ways: so it is asked, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dora_serve.errors import AdapterError
from dora_serve.plan import LoraEdit, TensorPlan
from dora_serve.reference_weight import read_elements
from dora_serve.safetensors_file import TensorEntry

NEAR = 0.2
"""Training moves magnitudes by some per cent: what is closer to 1 than this may be a quotient."""

_SAMPLED_EDITS, _SAMPLED_ROWS = 8, 64


def require_norms(tensors: Iterable[TensorPlan]) -> None:
    """Raises AdapterError where nearly all magnitudes are near 1, and the weights that they belong to are not.

    Reads some rows of some weights.
    """
    edits = [
        (tensor, edit)
        for tensor in tensors
        for edit in tensor.loras
        if edit.magnitude is not None and edit.is_paper and not edit.region.transposed
    ]
    medians = [_median(edit) for _, edit in edits]
    if not edits or sum(abs(median - 1) < NEAR for median in medians) < 0.9 * len(edits):
        return
    step = max(1, len(edits) // _SAMPLED_EDITS)
    sampled = edits[::step]
    norms = [_norm(tensor, edit) for tensor, edit in sampled]
    far = [norm for norm, (_, edit) in zip(norms, sampled, strict=True) if abs(_median(edit) / norm - 1) > NEAR]
    if 2 * len(far) <= len(sampled):
        return
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


def _norm(tensor: TensorPlan, edit: LoraEdit) -> float:
    """The median length of some rows of W + s B A."""
    region = edit.region
    count = min(_SAMPLED_ROWS, region.stop - region.start)
    source = tensor.source if isinstance(tensor.source, TensorEntry) else tensor.source.load()
    start = region.start * region.width
    weight = read_elements(source, start, start + count * region.width).double().view(count, region.width)
    delta = edit.lora_B.load()[:count].double() @ edit.lora_A.load().double()
    return float(torch.linalg.vector_norm(weight + edit.scaling * delta, dim=1).median())
