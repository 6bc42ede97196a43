"""One adapter for several components of a pipeline: which module is whose, and a merge plan for each component.

A file of diffusers' says `unet.`, `transformer.`, `text_encoder.` and so on in front of each module, and the readers of
kohya's names put that there (formats/kohya_names.py). An adapter without it was trained on one component alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dora_serve.adapter import Adapter, ExpertLora, LoraWeights, Replacement, TokenRows
from dora_serve.errors import PlanError, Problem
from dora_serve.names import ParameterNames
from dora_serve.original_names import in_diffusers_names
from dora_serve.pipeline_folder import PipelineFolder
from dora_serve.plan import MergePlan
from dora_serve.resolve import plan_merge

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "unet": ("transformer",),
    "transformer": ("unet",),
    "diffusion_model": ("transformer", "unet"),
    "text_encoder_3": ("text_encoder_2", "text_encoder"),
}
"""Names that trainers give to a component, and the folders that it may be in where there is none of that name: kohya's
scripts call every denoiser a unet, and a T5 the third text encoder."""


@dataclass(frozen=True)
class PipelinePlan:
    """A merge plan for every component with safetensors weights, by folder; most of them copy every tensor.

    side_files: all else of the pipeline, (from, relative to).
    """

    base: PipelineFolder
    adapter: Adapter
    components: Mapping[str, MergePlan]
    side_files: tuple[tuple[Path, Path], ...]
    notes: tuple[str, ...] = ()

    @property
    def adapted(self) -> tuple[str, ...]:
        """The components that the adapter changes."""
        return tuple(name for name, plan in self.components.items() if _has_changes(plan.adapter))

    @property
    def nbytes(self) -> int:
        return sum(plan.nbytes for plan in self.components.values())

    def summary(self) -> dict[str, object]:
        """As MergePlan's, over all components, and each of those that are adapted."""
        parts = {name: plan.summary() for name, plan in self.components.items()}
        return {
            "base": str(self.base.folder),
            "adapter": str(self.adapter.path),
            "format": self.adapter.format,
            "method": self.adapter.method,
            "tensors": sum(len(plan.tensors) for plan in self.components.values()),
            "actions": _added(parts, "actions"),
            "bytes": self.nbytes,
            "files": _named(parts, "files", "/"),
            "dtypes": _added(parts, "dtypes"),
            "quantization": ", ".join(
                f"{name}: {said}" for name, part in parts.items() if (said := part["quantization"])
            )
            or None,
            "config_changes": _named(parts, "config_changes", ": "),
            "untied": [f"{name}/{one}" for name, plan in self.components.items() for one in plan.untied],
            "notes": list(self.notes),
            "components": {name: parts[name] for name in self.adapted},
        }


def plan_pipeline(base: PipelineFolder, adapter: Adapter, *, dtype: torch.dtype | None = None) -> PipelinePlan:
    """Plan the merge of `adapter` into the components that its modules are in; every other is copied.

    Raises PlanError with every problem of every component at once, CheckpointError for a base that is quantized.
    """
    problems: list[Problem] = []
    plans: dict[str, MergePlan] = {}
    for name, part in _split(base, adapter, problems).items():
        try:
            checkpoint = base.components[name]
            plans[name] = plan_merge(checkpoint, in_diffusers_names(part, checkpoint), dtype=dtype)
        except PlanError as error:
            problems += [replace(problem, subject=f"{name}: {problem.subject}") for problem in error.problems]
    if problems:
        count = f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'}"
        raise PlanError(
            f"The adapter {str(adapter.path)!r} does not fit the pipeline {str(base.folder)!r}: {count}.",
            problems,
            remedy="Give the pipeline that the adapter was trained on with --base; "
            "`dora-export inspect ADAPTER --base BASE` shows both sides.",
        )
    notes = [f"{name}: {note}" for name, plan in plans.items() for note in plan.notes if note not in adapter.notes]
    if base.pickled:
        notes.append(f"{', '.join(base.pickled)}: the weights are pickles, which are copied and not read.")
    notes += [f"{name}: model_index.json names it, and the base has no such folder." for name in base.absent]
    side = tuple((base.folder / path, path) for path in base.side_files)
    return PipelinePlan(base, adapter, plans, side, (*adapter.notes, *notes))


def _has_changes(adapter: Adapter) -> bool:
    return bool(adapter.modules or adapter.experts or adapter.replacements or adapter.token_rows)


def _split(base: PipelineFolder, adapter: Adapter, problems: list[Problem]) -> dict[str, Adapter]:
    """The adapter of each component, with the names that modules have there; empty for one that it leaves alone."""
    place = _router(base, problems)
    modules: dict[str, list[LoraWeights]] = defaultdict(list)
    experts: dict[str, list[ExpertLora]] = defaultdict(list)
    replacements: dict[str, list[Replacement]] = defaultdict(list)
    token_rows: dict[str, list[TokenRows]] = defaultdict(list)
    for module in adapter.modules:
        if found := place(module.module, f"{module.module}.weight"):
            modules[found[0]].append(replace(module, module=found[1]))
    for expert in adapter.experts:
        if found := place(expert.module, f"{expert.module}.{expert.parameters[0]}"):
            experts[found[0]].append(replace(expert, module=found[1]))
    for change in adapter.replacements:
        if found := place(change.name, change.name):
            replacements[found[0]].append(replace(change, name=found[1]))
    for rows in adapter.token_rows:
        if found := place(rows.module, f"{rows.module}.weight"):
            token_rows[found[0]].append(replace(rows, module=found[1]))
    return {
        name: replace(
            adapter,
            modules=tuple(modules[name]),
            experts=tuple(experts[name]),
            replacements=tuple(replacements[name]),
            token_rows=tuple(token_rows[name]),
        )
        for name in base.components
    }


def _router(base: PipelineFolder, problems: list[Problem]) -> Callable[[str, str], tuple[str, str] | None]:
    """From a name in the adapter, and the parameter that it is about, to a component and the name in it."""
    names = {name: ParameterNames.of(checkpoint) for name, checkpoint in base.components.items()}
    listing = ", ".join(base.components)

    def place(name: str, parameter: str) -> tuple[str, str] | None:
        first, _, rest = name.partition(".")
        for component in (first, *_ALIASES.get(first, ())):
            if component in base.components:
                return component, rest
        if first in base.pickled:
            hint = "convert it with diffusers' save_pretrained, which writes safetensors"
            problems.append(Problem(name, f"weights of {first} that are pickles", "safetensors", hint))
            return None
        holding = [component for component, known in names.items() if known.find(parameter)]
        if base.denoiser in holding:
            return base.denoiser or "", name
        if len(holding) == 1:
            return holding[0], name
        got = f"a module of {' or '.join(holding)}" if holding else "a module of no component"
        problems.append(Problem(name, got, f"a name that begins with its component ({listing})"))
        return None

    return place


def _added(parts: Mapping[str, Mapping[str, object]], key: str) -> dict[str, int]:
    total = Counter[str]()
    for part in parts.values():
        counts = part[key]
        assert isinstance(counts, dict)
        total.update(counts)
    return dict(total)


def _named(parts: Mapping[str, Mapping[str, object]], key: str, mark: str) -> dict[str, object]:
    named: dict[str, object] = {}
    for name, part in parts.items():
        table = part[key]
        assert isinstance(table, dict)
        named |= {f"{name}{mark}{inner}": value for inner, value in table.items()}
    return named
