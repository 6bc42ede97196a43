"""From an adapter of any format to one that means the same by the paper's formula and the base's own names.

A magnitude that is set against another norm is exchanged for m itself, `factor * ||V||`, where each output has one
factor: computed in float64 and rounded once to float32, which needs the base. What each input has cannot be said so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dora_serve.adapter import PAPER_NORM, Adapter, LazyTensor, LoraWeights, Replacement
from dora_serve.errors import UnmergeableError
from dora_serve.formats.diffusers import COMPONENT
from dora_serve.names import ParameterNames
from dora_serve.plan import LoraEdit, MergePlan, TensorPlan
from dora_serve.reference_weight import open_reference, row_blocks, source_rows

BLOCK_ELEMENTS = 1 << 20
_OF_PIPELINES = ("diffusers", "kohya", "onetrainer", "ai-toolkit")
"""Formats that put a part of a pipeline in front of a name; in others `transformer.` and `decoder.` are names of
modules, GPT-2's for one."""


@dataclass(frozen=True)
class Plain:
    """adapter: with the paper's norm alone, its modules named as in the base. kernels: of each convolution, the shape
    of its weight, where the base is known. notes: what was done, for the user.
    """

    adapter: Adapter
    kernels: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()


def needs_base(adapter: Adapter) -> str | None:
    """Why the meaning cannot be told without the base, None where it can."""
    for module in adapter.modules:
        if module.row_order != "base":
            return f"the outputs of {module.module} are in the order of {module.row_order}"
        if is_flat(module.module):
            return f"{module.module!r} has underscores for dots, and only the base tells which"
        if module.rank == 0:
            return f"{module.module} has a magnitude alone"
        if module.magnitude is not None and module.norm.axis != "in" and module.norm != PAPER_NORM:
            return f"the magnitude of {module.module} is not m of the paper"
        if module.kind == "conv":
            return f"{module.module} is a convolution, whose kernel only the base tells"
        if adapter.keeps_ties and module.kind == "embedding":
            return f"{module.module} shares its update with what is tied to it, if anything is"
    return None


def is_flat(module: str) -> bool:
    """Whether a module's path has underscores for dots."""
    name = COMPONENT.sub("", module)
    return "." not in name and re.search(r"_\d+_", name) is not None


def plain(adapter: Adapter, plan: MergePlan | None) -> Plain:
    """The adapter by the paper's meaning; `plan` is its merge into its base, where that is known.

    Raises UnmergeableError, with every module that has no such meaning.
    """
    require_single_component(adapter)
    _require_adapter(adapter)
    if plan is None:
        _require_outputs(adapter.modules)
        return Plain(_without_component(adapter), {})
    adapter = plan.adapter
    _require_outputs(adapter.modules)
    edits = _edits(plan)
    names = _base_names(adapter, plan, edits)
    _require_untied(adapter, plan)
    modules, replacements, notes = [], list(adapter.replacements), []
    kernels: dict[str, tuple[int, ...]] = {}
    recomputed = 0
    for module in adapter.modules:
        found = edits[module.module]
        name = names[module.module]
        if module.kind == "conv":
            kernels[name] = found[0][0].shape
        if module.magnitude is not None and module.norm != PAPER_NORM:
            module = replace(module, magnitude=_paper_magnitude(found), norm=PAPER_NORM)
            recomputed += 1
        width = found[0][1].lora_A.shape[1]
        modules.append(replace(module.of_width(width), module=name))
    for tensor in plan.tensors.values():
        if tensor.scales:
            replacements.append(_scaled_bias(tensor))
            notes.append(f"{tensor.name} is scaled with its weight: it is written as a trained bias.")
    if recomputed:
        notes.append(f"{recomputed} modules had magnitudes of another norm: m was computed, and rounded to float32.")
    plain_adapter = replace(adapter, modules=tuple(modules), replacements=tuple(replacements))
    return Plain(plain_adapter, kernels, tuple(notes))


def require_single_component(adapter: Adapter) -> None:
    """Raises UnmergeableError for a file that holds adapters of several parts of a pipeline."""
    components = sorted({match[1] for module in adapter.modules if (match := COMPONENT.match(module.module))})
    if len(components) > 1 and adapter.format in _OF_PIPELINES:
        raise UnmergeableError(
            f"The file holds adapters of {', '.join(components)}, and an adapter of the formats to convert to has one "
            "model.",
            remedy="Merge it into the pipeline's folder instead, or take the parts of the file apart.",
            components=components,
        )


def _require_adapter(adapter: Adapter) -> None:
    beside = [change.name for change in adapter.replacements if change.role == "beside"]
    if beside:
        raise UnmergeableError(
            f"The file holds the whole model that was trained, with parts that its base does not have ({beside[0]}), "
            "and no other format says that.",
            remedy="Merge it (dora-export merge), which is exact.",
            tensors=beside,
        )


def _without_component(adapter: Adapter) -> Adapter:
    return replace(adapter, modules=tuple(replace(one, module=_bare(adapter, one.module)) for one in adapter.modules))


def _bare(adapter: Adapter, module: str) -> str:
    """A module's name in the one model that it is of."""
    if adapter.format not in _OF_PIPELINES:
        return module
    return COMPONENT.sub("", module).removeprefix("diffusion_model.")


def _require_outputs(modules: Sequence[LoraWeights]) -> None:
    wrong = [module for module in modules if module.magnitude is not None and module.norm.axis == "in"]
    if wrong:
        shown = ", ".join(module.module for module in wrong[:4]) + (", ..." if len(wrong) > 4 else "")
        kind = "an embedding whose magnitude is each token's" if wrong[0].kind == "embedding" else "each input's"
        raise UnmergeableError(
            f"The magnitudes of {len(wrong)} modules ({shown}) are {kind}, and no other format has such a norm.",
            remedy="Merge it (dora-export merge), which is exact; or approximate it: --to lora --rank R.",
            modules=[module.module for module in wrong],
        )


def _require_untied(adapter: Adapter, plan: MergePlan) -> None:
    shared = [module for module in adapter.modules if adapter.keeps_ties and module.kind == "embedding"]
    text = plan.base.config.get("text_config")
    said = [table.get("tie_word_embeddings") for table in (plan.base.config, text) if isinstance(table, dict)]
    if shared and not any(value is False for value in said):
        raise UnmergeableError(
            f"{shared[0].module} shares its update with the head that is tied to it, and in other formats it does not.",
            remedy="Merge it (dora-export merge), which is exact.",
            module=shared[0].module,
        )


Edits = Mapping[str, Sequence[tuple[TensorPlan, LoraEdit]]]


def _edits(plan: MergePlan) -> Edits:
    """The edits of each module, in the order of its outputs."""
    found: dict[str, list[tuple[TensorPlan, LoraEdit]]] = {}
    for tensor in plan.tensors.values():
        for edit in tensor.loras:
            found.setdefault(edit.module, []).append((tensor, edit))
    return found


def _base_names(adapter: Adapter, plan: MergePlan, edits: Edits) -> dict[str, str]:
    """By an adapter's module, its name in the running model."""
    stored = {module.module: _bare(adapter, module.module) for module in adapter.modules}
    flat = [module.module for module in adapter.modules if is_flat(module.module)]
    if not flat:
        return stored
    known = ParameterNames.of(plan.base).known
    runtime = {origin.groups[0][0]: name for name, origin in known.origins.items() if origin.groups} if known else {}
    for module in flat:
        tensor = edits[module][0][0].name
        stored[module] = runtime.get(tensor, tensor).removesuffix(".weight")
    return stored


def _paper_magnitude(edits: Sequence[tuple[TensorPlan, LoraEdit]]) -> LazyTensor:
    """m of the paper, (out,) in float32: the factor of each output times ||V||."""
    parts = []
    for tensor, edit in edits:
        factor, norms = output_factor(tensor, edit)
        parts.append(factor * norms)
    return LazyTensor.of(torch.cat(parts).float())


def output_factor(tensor: TensorPlan, edit: LoraEdit) -> tuple[Tensor, Tensor]:
    """What each output of an edit is multiplied by, and ||V||: (out,) each, in float64."""
    assert edit.magnitude is not None
    reference = open_reference(replace(tensor, loras=(edit,), scales=()), BLOCK_ELEMENTS)
    (update,) = reference.updates
    region, magnitude = edit.region, edit.magnitude.load().double()
    squares = torch.zeros(region.out_in[0], dtype=torch.float64)
    for start, stop in row_blocks(reference, BLOCK_ELEMENTS, (region.start, region.stop)):
        delta = update.delta_rows(start - region.start, stop - region.start)
        direction = source_rows(reference, start, stop) + edit.scaling * delta
        if region.transposed:
            squares += direction.square().sum(dim=0)
        else:
            squares[start - region.start : stop - region.start] = direction.square().sum(dim=1)
    norms = squares.sqrt()
    return magnitude if edit.norm.axis is None else magnitude / (norms + edit.norm.eps), norms


def _scaled_bias(tensor: TensorPlan) -> Replacement:
    """A bias times its weight's factor, as a tensor that takes its place, in float32."""
    reference = open_reference(tensor, BLOCK_ELEMENTS)
    value = source_rows(reference, 0, reference.rows)[:, 0]
    for start, factor, _ in reference.scaled:
        value[start : start + len(factor)] *= factor
    return Replacement(tensor.name, LazyTensor.of(value.float()), "bias")
