"""Whether a merged pipeline is the unmerged one: every tensor of it, and the forward of each adapted component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dora_serve.checkpoint import CONFIG_NAME, open_checkpoint, read_json
from dora_serve.errors import CheckpointError, DoraServeError
from dora_serve.forward_report import ForwardOptions
from dora_serve.pipeline_files import changed_files
from dora_serve.pipeline_folder import INDEX_NAME
from dora_serve.pipeline_plan import PipelinePlan
from dora_serve.plan import MergePlan
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.structure_check import config_difference
from dora_serve.tensor_check import check_tensors
from dora_serve.verify import VerifyReport, verify


@dataclass(frozen=True)
class PipelineReport:
    """components: the report of each component with weights, by folder; one that is not adapted has no forward.
    index: what model_index.json says otherwise than the base's, and which files that are no model's are other, in
    sentences.
    """

    components: Mapping[str, VerifyReport]
    adapted: tuple[str, ...]
    index: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.index and all(report.passed for report in self.components.values())

    @property
    def failures(self) -> tuple[str, ...]:
        found = [f"{name}: {failure}" for name, report in self.components.items() for failure in report.failures]
        return (*self.index, *found)

    @property
    def exact(self) -> bool:
        """Whether every element of every component is the exact value rounded once."""
        return all(report.tensors is not None and report.tensors.exact for report in self.components.values())

    @property
    def changes_nothing(self) -> bool:
        """Whether no adapted component shows the adapter."""
        return bool(self.adapted) and all(self.components[name].changes_nothing for name in self.adapted)

    def to_json(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "adapted": list(self.adapted),
            "components": {name: report.to_json() for name, report in self.components.items()},
        }


def verify_pipeline(
    plan: PipelinePlan,
    merged: Path,
    options: ForwardOptions | None = None,
    *,
    on_progress: OnProgress = ignore_progress,
) -> PipelineReport:
    """Check the pipeline `merged` against `plan`. Raises what `verify` raises. Peak memory: one component, and outputs.

    Raises DoraServeError for the reference "peft": PEFT itself reads no adapter of several models.
    """
    options = options or ForwardOptions()
    require_native(options)
    reports = {}
    for name, part in plan.components.items():
        say = in_component(name, on_progress)
        if name in plan.adapted:
            tokenizer = plan.base.folder / name.replace("text_encoder", "tokenizer")
            # Prompts are for what reads text: denoisers and VAEs have inputs of their own.
            own = options if name.startswith("text_encoder") else replace(options, prompts=None)
            reports[name] = verify(part, merged / name, own, tokenizer_folder=tokenizer, on_progress=say)
        else:
            reports[name] = check_copy(part, merged / name, say)
    return PipelineReport(reports, plan.adapted, (*_index_failures(plan, merged), *changed_files(plan, merged)))


def require_native(options: ForwardOptions) -> None:
    """Raise DoraServeError where PEFT's own unmerged forward is asked for."""
    if options.reference == "peft":
        raise DoraServeError(
            "PEFT loads an adapter into one model, and this one belongs to the components of a pipeline.",
            remedy="Leave out --reference peft.",
        )


def in_component(name: str, on_progress: OnProgress) -> OnProgress:
    """Progress that says which component it is about."""

    def say(progress: Progress) -> None:
        on_progress(replace(progress, stage=f"{progress.stage} ({name})"))

    return say


def check_copy(plan: MergePlan, merged: Path, on_progress: OnProgress = ignore_progress) -> VerifyReport:
    """Whether the folder of a component holds what is planned, without running it."""
    try:
        checkpoint = open_checkpoint(merged)
        tensors = check_tensors(plan, checkpoint, on_progress=on_progress)
    except CheckpointError as error:
        return VerifyReport(None, None, str(error))
    if plan.base.config and not checkpoint.config:
        return VerifyReport(tensors, None, config=f"{CONFIG_NAME} is not there")
    return VerifyReport(tensors, None, config=config_difference(plan, checkpoint))


def _index_failures(plan: PipelinePlan, merged: Path) -> tuple[str, ...]:
    """What would make another pipeline of it: its own class, and those of its components."""
    try:
        index = read_json(merged, INDEX_NAME)
    except CheckpointError as error:
        return (str(error),)
    if not index:
        return (f"{str(merged)!r} has no {INDEX_NAME}, so diffusers cannot load it.",)
    return tuple(
        f"{INDEX_NAME} says {key} = {index.get(key)!r}, wanted {wanted!r}."
        for key, wanted in plan.base.index.items()
        if (key == "_class_name" or key in plan.components) and index.get(key) != wanted
    )
