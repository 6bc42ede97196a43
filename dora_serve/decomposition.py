"""What an adapter does to magnitudes and to directions: the weight decomposition analysis of arXiv 2402.09353, 3.2.

A weight is a magnitude m and a direction for each output. The paper writes outputs as columns, of the transposed
layout; here, as everywhere in this project, W is (out, in), so they are rows: m_i = ||w_i||. Between the base W and the
adapted W', over the outputs i of a module,

    delta_magnitude = mean |m'_i - m_i|            delta_direction = mean (1 - cos(w'_i, w_i))

In the paper's figure 2 the two correlate by 0.83 over the modules of LoRA, by -0.31 of DoRA and by -0.62 of full
fine-tuning: LoRA moves both together, the others trade one for the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.ops import delta_weight
from dora_serve.plan import LoraEdit, MergePlan, TensorPlan
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.reference_weight import exact_rows, open_reference, read_elements, row_blocks, source_rows
from dora_serve.safetensors_file import TensorEntry

BLOCK_ELEMENTS = 1 << 20
"""Elements of a block of rows: 8 MB in float64, of which there are four at a time."""


@dataclass(frozen=True)
class ModuleChange:
    """One adapted module. kind: its last name, e.g. "q_proj"; layer: the first number in its path, if there is one.

    magnitude: the mean of m over the outputs, to set delta_magnitude against.
    """

    module: str
    kind: str
    layer: int | None
    outputs: int
    magnitude: float
    delta_magnitude: float
    delta_direction: float


@dataclass(frozen=True)
class Trend:
    """How delta_magnitude goes with delta_direction over modules: Pearson's correlation, and the line of least squares.

    Each is None where the modules are fewer than two, or all alike in one of the two.
    """

    modules: int
    correlation: float | None
    slope: float | None
    intercept: float | None


@dataclass(frozen=True)
class Decomposition:
    """An adapter's changes, module by module in the order of the base, and their trend: of all, and by kind."""

    path: Path
    method: str
    modules: tuple[ModuleChange, ...]
    trend: Trend
    by_kind: Mapping[str, Trend]

    def to_json(self) -> dict[str, object]:
        return {
            "path": str(self.path),
            "method": self.method,
            "trend": vars(self.trend),
            "by_kind": {kind: vars(trend) for kind, trend in self.by_kind.items()},
            "modules": [vars(change) for change in self.modules],
        }


def decompose(plan: MergePlan, on_progress: OnProgress = ignore_progress) -> Decomposition:
    """Analyse every LoRA and DoRA update that `plan` holds. Peak memory: some blocks of rows and a module's factors.

    W is what the update is added to: the base's tensor, or the adapter's own where it replaces that. Computed in
    float64 on the stored tensors. Raises CheckpointError where the base cannot be read.
    """
    edits = [(tensor, edit) for tensor in plan.tensors.values() for edit in tensor.loras]
    changes = []
    for done, (tensor, edit) in enumerate(edits):
        on_progress(Progress("comparing weights", done, len(edits), "modules"))
        changes.append(_change(tensor, edit))
    on_progress(Progress("comparing weights", len(edits), len(edits), "modules"))
    kinds = dict.fromkeys(change.kind for change in changes)
    by_kind = {kind: trend([change for change in changes if change.kind == kind]) for kind in kinds}
    return Decomposition(plan.adapter.path, plan.adapter.method, tuple(changes), trend(changes), by_kind)


def trend(changes: Sequence[ModuleChange]) -> Trend:
    """The trend over some modules, delta_magnitude being a function of delta_direction."""
    direction = torch.tensor([change.delta_direction for change in changes], dtype=torch.float64)
    magnitude = torch.tensor([change.delta_magnitude for change in changes], dtype=torch.float64)
    if len(changes) < 2:
        return Trend(len(changes), None, None, None)
    x, y = direction - direction.mean(), magnitude - magnitude.mean()
    xx, yy, xy = (float(pair.sum()) for pair in (x * x, y * y, x * y))
    if xx <= 0:
        return Trend(len(changes), None, None, None)
    slope = xy / xx
    intercept = float(magnitude.mean()) - slope * float(direction.mean())
    return Trend(len(changes), xy / (xx * yy) ** 0.5 if yy > 0 else None, slope, intercept)


def _change(plan: TensorPlan, edit: LoraEdit) -> ModuleChange:
    if not edit.is_paper:
        return _change_of_rows(plan, edit)
    region = edit.region
    outputs = region.out_in[0]
    lora_a, lora_b = edit.lora_A.load().double(), edit.lora_B.load().double()
    magnitude = edit.magnitude.load().double() if edit.magnitude is not None else None
    own = torch.zeros(outputs, dtype=torch.float64)
    new, dot = torch.zeros_like(own), torch.zeros_like(own)
    source = plan.source if isinstance(plan.source, TensorEntry) else plan.source.load()
    step = max(1, BLOCK_ELEMENTS // max(1, region.width))
    for start in range(region.start, region.stop, step):
        stop = min(start + step, region.stop)
        weight = read_elements(source, start * region.width, stop * region.width).double().view(-1, region.width)
        rows = slice(start - region.start, stop - region.start)
        if region.transposed:  # rows are inputs, so every block holds a part of every output
            direction = weight + delta_weight(lora_a[:, rows], lora_b, edit.scaling).T
            where, dim = slice(None), 0
        else:
            direction = weight + delta_weight(lora_a, lora_b[rows], edit.scaling)
            where, dim = rows, 1
        own[where] += (weight * weight).sum(dim=dim)
        new[where] += (direction * direction).sum(dim=dim)
        dot[where] += (weight * direction).sum(dim=dim)
    return _module_change(edit, own, new, dot, magnitude)


def _change_of_rows(plan: TensorPlan, edit: LoraEdit) -> ModuleChange:
    """The same for any norm, from W' itself."""
    region = edit.region
    reference = open_reference(replace(plan, loras=(edit,)), BLOCK_ELEMENTS)
    own = torch.zeros(region.out_in[0], dtype=torch.float64)
    new, dot = torch.zeros_like(own), torch.zeros_like(own)
    for start, stop in row_blocks(reference, BLOCK_ELEMENTS, (region.start, region.stop)):
        weight, merged = source_rows(reference, start, stop), exact_rows(reference, start, stop)
        where = slice(None) if region.transposed else slice(start - region.start, stop - region.start)
        dim = 0 if region.transposed else 1
        own[where] += (weight * weight).sum(dim=dim)
        new[where] += (merged * merged).sum(dim=dim)
        dot[where] += (weight * merged).sum(dim=dim)
    return _module_change(edit, own, new, dot, None)


def _module_change(edit: LoraEdit, own: Tensor, new: Tensor, dot: Tensor, magnitude: Tensor | None) -> ModuleChange:
    delta_magnitude, delta_direction = _from_sums(own, new, dot, magnitude)
    return ModuleChange(
        module=edit.module,
        kind=edit.module.rpartition(".")[2],
        layer=_layer(edit.module),
        outputs=edit.region.out_in[0],
        magnitude=float(own.sqrt().mean()),
        delta_magnitude=float(delta_magnitude.mean()),
        delta_direction=float(delta_direction.mean()),
    )


def _from_sums(own: Tensor, new: Tensor, dot: Tensor, magnitude: Tensor | None) -> tuple[Tensor, Tensor]:
    """(|m' - m|, 1 - cos) of each output, from ||w||^2, ||v||^2 and w . v, all (out,).

    With a magnitude W' = m V / ||V||: its norms are |m|, and its direction is that of V, or the opposite where m is
    negative. A row of zeros has no direction: beside another it counts as unchanged, beside any other as orthogonal.
    """
    norms = new.sqrt() if magnitude is None else magnitude.abs()
    cosine = dot / (own * new).sqrt()
    if magnitude is not None:
        cosine = cosine * magnitude.sign()
    defined = (own > 0) & (new > 0) & (norms > 0)
    undefined = ((own > 0) | (norms > 0)).double()
    turned = torch.where(defined, (1 - cosine).clamp(min=0), undefined)
    return (norms - own.sqrt()).abs(), turned


def _layer(module: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(found[1]) if found else None
