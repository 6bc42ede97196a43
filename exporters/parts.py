"""One model or a pipeline of several: what a command does with either, by way of the models that it is made of."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from dora_serve.forward_report import ForwardOptions
from dora_serve.output import require_space
from dora_serve.pipeline_plan import PipelinePlan
from dora_serve.pipeline_verify import PipelineReport, in_component, verify_pipeline
from dora_serve.plan import MergePlan
from dora_serve.progress import OnProgress, ignore_progress
from dora_serve.verify import VerifyReport, verify
from exporters.safetensors import write_model

AnyPlan: TypeAlias = MergePlan | PipelinePlan
AnyReport: TypeAlias = VerifyReport | PipelineReport


@dataclass(frozen=True)
class Written:
    """unchanged: adapted tensors that came out as they were in the base."""

    seconds: float
    unchanged: tuple[str, ...] = ()


def models_of(plan: AnyPlan) -> Mapping[str, MergePlan]:
    """The models to be written, by folder relative to the output; that of a single model is the output itself."""
    return plan.components if isinstance(plan, PipelinePlan) else {"": plan}


def write_plan(
    plan: AnyPlan,
    folder: Path,
    metadata_of: Callable[[MergePlan], Mapping[str, str]],
    *,
    device: str = "cpu",
    on_progress: OnProgress = ignore_progress,
) -> Written:
    """Every model of the plan, and what else belongs to a pipeline, into `folder`, which exists and is empty.

    Raises what `write_model` raises.
    """
    started = time.monotonic()
    if not isinstance(plan, PipelinePlan):
        report = write_model(plan, folder, metadata=metadata_of(plan), device=device, on_progress=on_progress)
        return Written(report.seconds, report.unchanged)
    require_space(folder, plan.nbytes)
    unchanged: list[str] = []
    for name, part in plan.components.items():
        (folder / name).mkdir()
        say = in_component(name, on_progress)
        report = write_model(part, folder / name, metadata=metadata_of(part), device=device, on_progress=say)
        unchanged += [f"{name}: {tensor}" for tensor in report.unchanged]
    for source, relative in plan.side_files:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / relative)
    return Written(time.monotonic() - started, tuple(unchanged))


def verify_plan(plan: AnyPlan, merged: Path, options: ForwardOptions, on_progress: OnProgress) -> AnyReport:
    """`verify` or `verify_pipeline`."""
    if isinstance(plan, PipelinePlan):
        return verify_pipeline(plan, merged, options, on_progress=on_progress)
    return verify(plan, merged, options, on_progress=on_progress)


def reports_of(report: AnyReport) -> tuple[VerifyReport, ...]:
    """The report of each model."""
    return tuple(report.components.values()) if isinstance(report, PipelineReport) else (report,)
