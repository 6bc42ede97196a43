"""A DoRA, or any other adapter, as the plain LoRA of a given rank that is nearest to it: of each module the truncated
singular value decomposition of W' - W, which is of full rank for a DoRA (formats.md, section 0)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.adapter import PAPER_NORM, LazyTensor, LoraWeights
from dora_serve.comparison import Comparison
from dora_serve.errors import UnmergeableError
from dora_serve.forward_difference import compare_adapters
from dora_serve.low_rank import low_rank
from dora_serve.plan import LoraEdit, MergePlan, TensorPlan
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.reference_weight import exact_rows, open_reference, row_blocks, source_rows
from exporters.convert.meaning import BLOCK_ELEMENTS, Plain, plain


@dataclass(frozen=True)
class ModuleLoss:
    """What the approximation of a module leaves over, as a share of ||W' - W|| and of ||W||. rank: of the result."""

    module: str
    rank: int
    of_update: float
    of_weight: float


@dataclass(frozen=True)
class Approximation:
    """given: the approximating adapter. logits: it against the exact one, None with why_not for a base that cannot be
    run; base: the base without an adapter against the exact one, to set that against.
    """

    given: Plain
    modules: tuple[ModuleLoss, ...]
    logits: Comparison | None = None
    base: Comparison | None = None
    inputs: str = ""
    why_not: str | None = None


def approximate(
    plan: MergePlan,
    rank: int,
    *,
    prompts: Path | None = None,
    device: str | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Approximation:
    """Approximate the planned adapter by LoRA of rank `rank` a module, and measure what is lost. Writes nothing.

    A LoRA whose rank is not above `rank` stays as it is. Memory: one module's W' - W in float64, some times over, and
    then a model in float32 for the logits.

    Raises UnmergeableError for what a plain LoRA cannot hold by any means.
    """
    adapter = plan.adapter
    scaled = [tensor.name for tensor in plan.tensors.values() if tensor.scales]
    if scaled or adapter.experts:
        what = f"scales biases ({', '.join(scaled[:3])})" if scaled else "adapts parameters of experts"
        raise UnmergeableError(
            f"The adapter {what}, which a plain LoRA cannot.", remedy="Merge it (dora-export merge) and serve that."
        )
    edits: dict[str, list[tuple[TensorPlan, LoraEdit]]] = {}
    for tensor in plan.tensors.values():
        for edit in tensor.loras:
            edits.setdefault(edit.module, []).append((tensor, edit))
    modules: list[LoraWeights] = []
    losses: list[ModuleLoss] = []
    for done, module in enumerate(adapter.modules):
        on_progress(Progress("approximating", done, len(adapter.modules), "modules"))
        weights, loss = _module(module, edits[module.module], rank)
        modules.append(weights)
        losses.append(loss)
    on_progress(Progress("approximating", len(adapter.modules), len(adapter.modules), "modules"))
    near = replace(adapter, modules=tuple(modules))
    measured = compare_adapters(
        plan.base.folder, adapter, near, prompts=prompts, device=device, on_progress=on_progress
    )
    return Approximation(
        given=plain(near, replace(plan, adapter=near)),
        modules=tuple(losses),
        logits=measured.other,
        base=measured.base,
        inputs=measured.inputs,
        why_not=measured.why_not,
    )


def _module(
    module: LoraWeights, edits: Sequence[tuple[TensorPlan, LoraEdit]], rank: int
) -> tuple[LoraWeights, ModuleLoss]:
    if module.magnitude is None and module.rank <= rank:
        return module, ModuleLoss(module.module, module.rank, 0.0, 0.0)
    update = torch.cat([_update(tensor, edit) for tensor, edit in edits])
    norm = sum(_weight_square(tensor, edit) for tensor, edit in edits) ** 0.5
    found = low_rank(update, rank)
    weights = replace(
        module,
        lora_A=LazyTensor.of(found.lora_A),
        lora_B=LazyTensor.of(found.lora_B),
        scaling=1.0,
        magnitude=None,
        norm=PAPER_NORM,
    )
    of_weight = found.error / norm if norm else 0.0
    return weights, ModuleLoss(module.module, found.lora_A.shape[0], found.relative_error, of_weight)


def _update(tensor: TensorPlan, edit: LoraEdit) -> Tensor:
    """W' - W of a region as (out, in), in float64."""
    region = edit.region
    parts = [merged - own for own, merged in _blocks(tensor, edit)]
    update = torch.cat(parts)
    return update.T.contiguous() if region.transposed else update


def _weight_square(tensor: TensorPlan, edit: LoraEdit) -> float:
    return sum(float(own.square().sum()) for own, _ in _blocks(tensor, edit))


def _blocks(tensor: TensorPlan, edit: LoraEdit) -> Iterator[tuple[Tensor, Tensor]]:
    reference = open_reference(replace(tensor, loras=(edit,), scales=()), BLOCK_ELEMENTS)
    for start, stop in row_blocks(reference, BLOCK_ELEMENTS, (edit.region.start, edit.region.stop)):
        yield source_rows(reference, start, stop), exact_rows(reference, start, stop)


def worst(approximation: Approximation, count: int) -> Mapping[str, ModuleLoss]:
    """The modules that lose most of their weights' length."""
    ordered = sorted(approximation.modules, key=lambda loss: -loss.of_weight)
    return {loss.module: loss for loss in ordered[:count]}
