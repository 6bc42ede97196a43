"""One export from end to end: locate, read, plan, merge, verify, export, record, put into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from dora_serve.devices import require_device
from dora_serve.errors import DoraServeError, VerificationError
from dora_serve.formats import ReadOptions
from dora_serve.forward_check import require_package
from dora_serve.forward_report import ForwardOptions
from dora_serve.output import new_folder
from dora_serve.pipeline_plan import PipelinePlan
from dora_serve.pipeline_verify import PipelineReport, require_native
from dora_serve.progress import OnProgress, ignore_progress
from dora_serve.quantized.base import BaseChoice
from dora_serve.safetensors_file import replace_metadata
from dora_serve.verify import VerifyReport
from exporters.onnx_adapters.naming import file_stem
from exporters.parts import AnyPlan, AnyReport, Written, models_of, reports_of, verify_plan, write_plan
from exporters.record import Provenance, hash_files, record, safetensors_metadata, verified_metadata, write_record
from exporters.registry import EXPORTERS, Exported, ExportInput, ExportOptions, export_onnx_pipeline, place
from exporters.sources import Sources, open_sources, plan_sources

if TYPE_CHECKING:
    from exporters.onnx.forecast import OnnxForecast, PipelineForecast

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
FAILED_SUFFIX = ".FAILED-VERIFICATION"


@dataclass(frozen=True)
class ExportRequest:
    """What a user asks of `merge`. device: "auto" verifies on the GPU where there is one and merges on the CPU.

    unproven: finish what fails its verification too, with the failures in its record. hash_output: also of what is not
    verified.
    """

    adapter: str
    base: str | None
    out: Path | None
    to: str = "safetensors"
    dtype: str | None = None
    device: str = "auto"
    verify: bool = True
    overwrite: bool = False
    keep_failed: bool = False
    unproven: bool = False
    hash_output: bool = False
    reference: Literal["native", "peft"] = "native"
    prompts: Path | None = None
    base_choice: BaseChoice = field(default_factory=BaseChoice)
    read: ReadOptions = field(default_factory=ReadOptions)
    options: ExportOptions = field(default_factory=ExportOptions)
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Export:
    """What was made. record: the contents of dora_export.json. failures: of a verification, where they were allowed."""

    out: Path
    plan: AnyPlan
    merged: Written
    verification: AnyReport | None
    exported: Exported
    record: Mapping[str, object]
    failures: tuple[str, ...] = ()


def plan_export(request: ExportRequest, on_progress: OnProgress = ignore_progress) -> tuple[Sources, AnyPlan]:
    """Everything before the first byte is written."""
    require_device(request.device)
    sources = open_sources(request.adapter, request.base, request.read, on_progress, request.base_choice)
    plan = plan_sources(sources, DTYPES[request.dtype] if request.dtype else None)
    if isinstance(plan, PipelinePlan):
        _require_for_pipeline(request, plan)
    else:
        EXPORTERS[request.to].preflight(plan, request.options)
    return sources, plan


@dataclass(frozen=True)
class Foreseen:
    """What an export would do. onnx: what it would write in place of the merged checkpoint, where it would."""

    plan: AnyPlan
    onnx: OnnxForecast | PipelineForecast | None = None

    def to_json(self) -> dict[str, object]:
        shown: dict[str, object] = {} if self.onnx is None else {"onnx": self.onnx.to_json()}
        return {**self.plan.summary(), **shown}


def plan_only(request: ExportRequest, on_progress: OnProgress = ignore_progress) -> Foreseen:
    """Plan, and look ahead; nothing is written. Raises what `plan_export` raises."""
    sources, plan = plan_export(request, on_progress)
    found: OnnxForecast | PipelineForecast | None = None
    if not isinstance(plan, PipelinePlan):
        found = EXPORTERS[request.to].forecast(plan, request.options, file_stem(sources.adapter.spec))
    elif request.to == "onnx":
        from exporters.onnx.forecast import forecast_pipeline
        from exporters.onnx.options import OnnxOptions

        found = forecast_pipeline(plan, request.options.onnx or OnnxOptions())
    if found is not None and not request.verify:
        found = replace(found, memory_bytes=None)
    return Foreseen(plan, found)


def run_export(request: ExportRequest, on_progress: OnProgress = ignore_progress) -> Export:
    """Merge, verify and export into `request.out`, which appears only once all of it held.

    Raises VerificationError where it did not; then nothing is kept, or with `keep_failed` a folder whose name says so.
    With `unproven` it is written all the same, and its record says what failed.
    """
    assert request.out is not None
    sources, plan = plan_export(request, on_progress)
    exporter = EXPORTERS[request.to]
    merge_device, verify_device = _devices(request.device)
    inputs = (sources.base.path, sources.adapter.path)
    with new_folder(request.out, overwrite=request.overwrite, inputs=inputs) as folder:
        stage = folder / ".merged"
        stage.mkdir()
        adapter_hashes = hash_files(plan.adapter.files)
        models = models_of(plan)
        base_files = [file.path for model in models.values() for file in model.base.files.values()]
        root = sources.base.path if isinstance(plan, PipelinePlan) else None
        # As long as what takes its place once the verification has read the base anyway.
        names = [path.relative_to(root).as_posix() if root else path.name for path in base_files]
        pending = {name: "pending".ljust(64, ".") for name in names} if request.verify else None
        provenance = Provenance(sources.base, sources.adapter, request.command, adapter_hashes, pending)
        metadata = partial(safetensors_metadata, provenance=provenance)
        merged = write_plan(plan, stage, metadata, device=merge_device, on_progress=on_progress)
        verification = None
        failures: tuple[str, ...] = ()
        if request.verify:
            options = ForwardOptions(request.reference, request.prompts, verify_device)
            verification = verify_plan(plan, stage, options, on_progress)
            failures = _failures(verification)
            if failures and not request.unproven:
                raise _failed(request, folder, stage, failures, verification)
            provenance = replace(provenance, base_hashes=hash_files(base_files, on_progress, root=root))
            metadata = partial(verified_metadata, provenance=provenance, verdict=_verdict(verification))
            for name, model in models.items():
                for file in model.files:
                    replace_metadata(stage / name / file, metadata(model))
        if isinstance(plan, PipelinePlan):
            assert not isinstance(verification, VerifyReport)
            if request.to == "onnx":
                said = {name: metadata(model) for name, model in models.items()}
                exported = export_onnx_pipeline(
                    stage, folder, plan, verification, request.options, said, verify_device, on_progress
                )
            else:
                exported = place(stage, folder)
        else:
            assert not isinstance(verification, PipelineReport)
            exported = exporter.run(
                ExportInput(
                    merged=stage,
                    out=folder,
                    plan=plan,
                    name=file_stem(sources.adapter.spec),
                    options=request.options,
                    verification=verification,
                    metadata=metadata(plan),
                    device=verify_device,
                    on_progress=on_progress,
                )
            )
        if exported.failures and not request.unproven:
            raise _failed(request, folder, stage, exported.failures, verification)
        shutil.rmtree(stage)
        failures += exported.failures
        hashing = request.verify or request.hash_output
        written = sorted(path for path in folder.rglob("*") if path.is_file())
        values = record(
            plan,
            provenance,
            exporter=request.to,
            output_hashes=hash_files(written, on_progress, root=folder) if hashing else None,
            sizes={path.relative_to(folder).as_posix(): path.stat().st_size for path in written},
            verification=verification.to_json() if verification else None,
            artifacts={**exported.values, **({"failures": list(failures)} if failures else {})},
        )
        write_record(folder, values)
    return Export(request.out, plan, merged, verification, exported, values, failures)


def _devices(device: str) -> tuple[str, str]:
    """(for the merge's arithmetic, for the verification's forward)."""
    if device != "auto":
        return device, device
    return "cpu", "cuda" if torch.cuda.is_available() else "cpu"


def _require_for_pipeline(request: ExportRequest, plan: PipelinePlan) -> None:
    """What a pipeline cannot be exported to, or verified with."""
    if request.to == "onnx":
        from exporters.onnx.components import require_exportable
        from exporters.onnx.options import OnnxOptions

        if request.options.max_kl is not None:
            raise DoraServeError(
                "A pipeline's models have no predictions whose KL divergence could be judged.",
                remedy="Leave out --max-kl.",
            )
        require_exportable(request.options.onnx or OnnxOptions(), plan.adapted, plan.base.folder)
    elif request.to != "safetensors":
        raise DoraServeError(
            f"A pipeline of several models is written as safetensors or ONNX, not as {request.to}.",
            remedy="Leave out --to; or name one component's folder with --base.",
        )
    if request.verify:
        require_native(ForwardOptions(request.reference))
        require_package("diffusers", "diffusers")


def _failures(report: AnyReport) -> tuple[str, ...]:
    """What is wrong with a merge of our own: of that, every element must be exact."""
    differing = sum(one.tensors.differing for one in reports_of(report) if one.tensors is not None)
    exact = all(one.tensors is not None and one.tensors.exact for one in reports_of(report))
    if not report.passed or exact:
        return report.failures
    return (f"{differing} elements are not the exact value rounded once.",)


def _verdict(report: AnyReport) -> str:
    if not report.passed:
        return f"FAILED: {' '.join(report.failures)[:200]}"
    tensors = [one.tensors for one in reports_of(report) if one.tensors is not None]
    forwards = [one.forward for one in reports_of(report) if one.forward is not None]
    forward = "forward passed" if forwards and all(one.passed for one in forwards) else "forward not run"
    differing, elements = (sum(values) for values in zip(*((t.differing, t.elements) for t in tensors), strict=True))
    return f"passed: {differing} of {elements} elements differ, {forward}"


def _failed(
    request: ExportRequest,
    folder: Path,
    stage: Path,
    failures: tuple[str, ...],
    report: AnyReport | None,
) -> VerificationError:
    """The error of a failed check, after what failed was kept under a telling name where that was asked for."""
    assert request.out is not None
    kept = "Nothing was kept; say --keep-failed to look at what was written."
    if request.keep_failed:
        target = Path(os.path.abspath(request.out)).with_name(request.out.name + FAILED_SUFFIX)
        shutil.rmtree(target, ignore_errors=True)
        stage.rename(target)
        kept = f"What was written is kept as {str(target)!r}; do not use it."
    shown = "".join(f"\n  - {failure}" for failure in failures[:12])
    return VerificationError(
        f"The export of {request.adapter!r} failed its verification:{shown}",
        remedy=kept,
        report=report.to_json() if report else None,
        failures=list(failures),
    )
