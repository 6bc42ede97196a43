"""An adapter against the slots of a graph: what each slot gets, and everything that does not fit, all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dora_serve.adapter import Adapter, LoraWeights, Replacement
from dora_serve.checkpoint import ShardedCheckpoint, read_json
from dora_serve.errors import PlanError, Problem
from dora_serve.names import ParameterNames
from dora_serve.onnx_engine.slots import Slot, SlotTable
from dora_serve.ops import add_delta, norm_scale, row_norms
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.resolve import HINTED_PROBLEMS
from dora_serve.row_order import in_base_order
from dora_serve.safetensors_file import TensorEntry
from exporters.onnx.linears import Linear
from exporters.onnx.weight_blocks import array_of, weight_blocks

if TYPE_CHECKING:
    from pathlib import Path

_WANTED = "LoRA or DoRA factors on single layers"
_MERGE = "merge it instead: dora-export merge ADAPTER --to onnx"


@dataclass(frozen=True)
class SlotTensors:
    """What fills a slot, in float64 and unrounded: lora_A (in, r), lora_B (r, out), norm_scale (out,)."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    norm_scale: torch.Tensor


def fit_adapter(
    adapter: Adapter, table: SlotTable, linears: Mapping[str, Linear], graph: Path
) -> Mapping[str, LoraWeights]:
    """Which module of the adapter fills which slot. Reads no weights, but for those that the adapter brings whole.

    Raises PlanError with every problem: a module that the graph does not have or has no slot for, factors of another
    size, a rank above a fixed one, two updates of one slot, and all that has no unmerged form here.
    """
    adapter = in_base_order(adapter, read_json(graph.parent))
    problems = [*unservable(adapter), *_replaced(adapter, linears)]
    names = _names(linears, graph)
    fitted: dict[str, LoraWeights] = {}
    for weights in adapter.modules:
        found = _find(weights, table, names, hinted=len(problems) < HINTED_PROBLEMS)
        if isinstance(found, Problem):
            problems.append(found)
        elif found.module in fitted:
            problems.append(
                Problem(weights.module, f"a second update of the slot {found.module}", "one update of each")
            )
        else:
            fitted[found.module] = weights.of_width(found.in_features)
    if problems:
        said = f" It says it was trained on {adapter.base!r}." if adapter.base else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise PlanError(
            f"The adapter {str(adapter.path)!r} does not fit the slots of {str(graph)!r}: {count}.{said}",
            problems,
            remedy="Give the export of the base that the adapter was trained on.",
        )
    return fitted


def slot_tensors(
    fitted: Mapping[str, LoraWeights],
    linears: Mapping[str, Linear],
    on_progress: OnProgress = ignore_progress,
) -> Iterator[tuple[str, SlotTensors]]:
    """The tensors of every slot, one slot at a time: each norm over the weights that the graph itself serves.

    Raises PlanError for a row of `W + s B A` that is zero, which no magnitude can scale.
    """
    for done, (module, weights) in enumerate(fitted.items()):
        on_progress(Progress("taking norms", done, len(fitted), "layers"))
        lora_a, lora_b = weights.lora_A.load().double(), weights.lora_B.load().double()
        scale = _scale(weights, lora_a, lora_b, linears[module])
        if not torch.isfinite(scale).all():
            raise PlanError(
                f"The DoRA of {module} cannot be served.",
                [Problem(module, "a row of W + s B A that is zero or not finite", "rows that a magnitude can scale")],
                remedy="Was it trained on this base?",
            )
        yield module, SlotTensors(lora_a.T.contiguous(), (lora_b.T * (weights.scaling * scale)).contiguous(), scale)


def _scale(weights: LoraWeights, lora_a: torch.Tensor, lora_b: torch.Tensor, linear: Linear) -> torch.Tensor:
    """(out,) in float64: ones for plain LoRA."""
    if weights.magnitude is None:
        return torch.ones(len(lora_b), dtype=torch.float64)
    magnitude = weights.magnitude.load().double()
    if weights.norm.axis is None:  # it is m / ||V|| already
        return magnitude
    scale = torch.empty_like(magnitude)
    for start, rows in weight_blocks(linear):
        part = slice(start, start + len(rows))
        norms = row_norms(add_delta(rows, lora_a, lora_b[part], weights.scaling)) + weights.norm.eps
        scale[part] = norm_scale(magnitude[part], norms)
    return scale


def _names(linears: Mapping[str, Linear], graph: Path) -> ParameterNames:
    """The graph's layers under the rules by which a merge finds the tensors of a checkpoint."""
    entries = {
        f"{module}.weight": TensorEntry(
            f"{module}.weight", torch.float32, (one.out_features, one.in_features), graph, 0, 0
        )
        for module, one in linears.items()
    }
    return ParameterNames(ShardedCheckpoint(graph.parent, {}, entries, None, {}, {}), lambda: None)


def _find(weights: LoraWeights, table: SlotTable, names: ParameterNames, *, hinted: bool) -> Slot | Problem:
    """The slot of a module, or what is wrong with it."""
    parameter = f"{weights.module}.weight"
    places = names.find(parameter)
    if len(places) != 1:
        nearest = [name.removesuffix(".weight") for name in names.nearest(parameter)] if hinted else []
        hint = f"the nearest names there are {', '.join(nearest)}" if nearest else None
        return Problem(weights.module, "no such layer in the graph", "a layer with an adapter slot", hint)
    module = places[0].tensor.removesuffix(".weight")
    slot = table.slots.get(module)
    if slot is None:
        how = (
            "the graph for mixed batches has none on embeddings" if table.mixed else "export the base with --slots all"
        )
        return Problem(weights.module, f"the layer {module}, which has no adapter slot", "one that has", how)
    if (slot.kind == "embedding") != (weights.kind == "embedding"):
        return Problem(weights.module, f"factors for a layer of kind {weights.kind}", f"for one of kind {slot.kind}")
    weights = weights.of_width(slot.in_features)
    wanted, got = (slot.out_features, slot.in_features), (weights.lora_B.shape[0], weights.lora_A.shape[1])
    if got != wanted:
        factors = f"lora_A {list(weights.lora_A.shape)} and lora_B {list(weights.lora_B.shape)}"
        return Problem(
            weights.module, factors, f"[r, {wanted[1]}] and [{wanted[0]}, r]", "this is a base of another size"
        )
    if table.rank is not None and weights.rank > table.rank:
        hint = f"export the base with --slot-rank {weights.rank}, or without a fixed rank"
        return Problem(
            weights.module, f"rank {weights.rank}", f"at most {table.rank}, the rank that was exported", hint
        )
    return slot


def adapted_layers(adapter: Adapter, linears: Mapping[str, Linear], graph: Path) -> frozenset[str]:
    """The layers of a graph that an adapter changes, of those that it names as the graph does."""
    adapter, names = in_base_order(adapter, read_json(graph.parent)), _names(linears, graph)
    found = (names.find(f"{weights.module}.weight") for weights in adapter.modules)
    return frozenset(places[0].tensor.removesuffix(".weight") for places in found if len(places) == 1)


def unservable(adapter: Adapter) -> Iterator[Problem]:
    """What has no unmerged form in any graph: each by name, never left out in silence."""
    for expert in adapter.experts:
        yield Problem(expert.module, "LoRA on a parameter of experts", _WANTED, _MERGE)
    for rows in adapter.token_rows:
        yield Problem(rows.module, "trained token rows", _WANTED, _MERGE)
    for weights in adapter.modules:
        if weights.magnitude is not None and weights.norm.axis == "in":
            yield Problem(weights.module, "a magnitude for each input", "one for each output", _MERGE)
        if weights.magnitude is not None and weights.norm.scales_bias:
            yield Problem(weights.module, "a magnitude that scales the bias too", "one of W x alone", _MERGE)
        if adapter.keeps_ties and weights.kind == "embedding":
            yield Problem(weights.module, "an update shared with what is tied to it", "one of this layer", _MERGE)
        if weights.lora_bias is not None:
            yield Problem(weights.module, "a trained bias (lora_B.bias)", _WANTED, _MERGE)
        if weights.kind == "conv":
            yield Problem(weights.module, "an adapter on a convolution", _WANTED, _MERGE)
    if adapter.config.get("layer_replication"):
        yield Problem("layer_replication", "layers that the base does not have", _WANTED, _MERGE)


def _replaced(adapter: Adapter, linears: Mapping[str, Linear]) -> Iterator[Problem]:
    for replacement in adapter.replacements:
        if not _is_the_base(replacement, linears):
            kind = "a trained bias" if replacement.role == "bias" else "a whole trained tensor"
            yield Problem(replacement.name, kind, _WANTED, _MERGE)


def _is_the_base(replacement: Replacement, linears: Mapping[str, Linear]) -> bool:
    """Whether a saved tensor is what the graph has anyway: peft saves an embedding along with an adapter on it."""
    module, _, leaf = replacement.name.rpartition(".")
    linear = linears.get(module)
    if linear is None or leaf != "weight" or linear.storage == "packed":
        return False
    own, saved = torch.from_numpy(array_of(linear.weight).copy()), replacement.tensor.load()
    if linear.kind == "linear" and linear.storage == "in_out":
        own = own.T
    return own.shape == saved.shape and torch.equal(saved.to(own.dtype), own)
