"""Exporters by name: what `--to` chooses from. Each turns a merged folder into what is deployed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dora_serve.checkpoint import side_files
from dora_serve.errors import CheckpointError
from dora_serve.forward_report import ForwardReport
from dora_serve.pipeline_plan import PipelinePlan
from dora_serve.pipeline_verify import PipelineReport
from dora_serve.plan import MergePlan
from dora_serve.progress import OnProgress, Progress
from dora_serve.quantized.codings import Quantization
from dora_serve.verify import VerifyReport
from exporters.onnx.check.answers import Inputs, token_inputs
from exporters.onnx_adapters.options import SlotOptions

if TYPE_CHECKING:
    from exporters.onnx.check.components import GraphCheck
    from exporters.onnx.check.report import OnnxCheck
    from exporters.onnx.export import OnnxExport
    from exporters.onnx.forecast import OnnxForecast
    from exporters.onnx.options import OnnxOptions
    from exporters.onnx_adapters.adapter_file import SlottedBase
    from exporters.onnx_adapters.check import SwapCheck


@dataclass(frozen=True)
class ExportOptions:
    """What a user says of one exporter and the others do not look at. max_kl: of ONNX graphs, in nats a position."""

    onnx: OnnxOptions | None = None
    max_kl: float | None = None
    slots: SlotOptions = field(default_factory=SlotOptions)


@dataclass(frozen=True)
class ExportInput:
    """merged: the merged model's folder, which an exporter may empty. out: where to write, existing and empty but for
    hidden names. plan: what was merged, with the base and the adapter as they were. name: of the adapter, for a file.
    verification: None where it was switched off. metadata: of the sources, for the artifact's header.
    """

    merged: Path
    out: Path
    plan: MergePlan
    name: str
    options: ExportOptions
    verification: VerifyReport | None
    metadata: Mapping[str, str]
    device: str
    on_progress: OnProgress


@dataclass(frozen=True)
class Exported:
    """What an exporter made. checked: whether it was compared with the model; failures: what did not hold."""

    values: Mapping[str, object] = field(default_factory=dict)
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exporter:
    """preflight: raises what can be known before anything is merged. run: writes and compares. forecast: what it would
    write, where that is not the merged checkpoint.
    """

    preflight: Callable[[MergePlan, ExportOptions], None]
    run: Callable[[ExportInput], Exported]
    forecast: Callable[[MergePlan, ExportOptions, str], OnnxForecast | None] = lambda plan, options, name: None


def _nothing_to_check(plan: MergePlan, options: ExportOptions) -> None:
    """Any merge can be written as safetensors."""


def _check_onnx_architecture(plan: MergePlan, options: ExportOptions) -> None:
    from exporters.onnx.architectures import architecture_of
    from exporters.onnx.export import require_graphs
    from exporters.onnx.genai import require_genai
    from exporters.onnx.loading import require
    from exporters.onnx.options import OnnxOptions, require_possible

    chosen = options.onnx or OnnxOptions()
    require("onnx", "onnxscript", "onnxruntime", "transformers")
    require_possible(chosen)
    if ("architectures",) not in plan.config_changes:
        architecture = architecture_of(plan.base.folder, becomes_dense=True)
        if chosen.runtime == "genai":
            require_genai(chosen, architecture)
        elif plan.base.quantization is None:
            require_graphs(plan.base.folder, chosen)


def export_safetensors(given: ExportInput) -> Exported:
    """The merged folder is the output."""
    return place(given.merged, given.out)


def place(merged: Path, out: Path) -> Exported:
    """Move all that was merged into the output."""
    for path in merged.iterdir():
        path.rename(out / path.name)
    return Exported()


def export_onnx_folder(given: ExportInput) -> Exported:
    """ONNX graphs beside the configuration and tokenizer, compared with torch in ONNX Runtime."""
    from exporters.onnx.architectures import architecture_of
    from exporters.onnx.export import export_onnx
    from exporters.onnx.genai import copy_missing, export_genai
    from exporters.onnx.options import OnnxOptions

    say, options = _in_words(given.on_progress), given.options.onnx or OnnxOptions()
    if options.runtime == "genai":
        exported = export_genai(given.merged, given.out, options, architecture_of(given.merged), say)
    else:
        exported = export_onnx(given.merged, given.out, options, metadata=given.metadata, on_progress=say)
    copy_missing(given.merged, given.out, side_files(given.merged))
    exported = _noted(exported, options)
    values: dict[str, object] = {"onnx": exported.to_json()}
    if given.verification is None:
        return Exported(values)
    check = compare_onnx(
        given.out, given.merged, given.verification.forward, given.device, given.on_progress, given.options
    )
    return Exported({**values, "onnx_check": check.to_json()}, check.failures)


def _noted(exported: OnnxExport, options: OnnxOptions) -> OnnxExport:
    """With what is to be said of the provider."""
    from exporters.onnx.forecast import provider_notes

    return replace(exported, notes=(*exported.notes, *provider_notes(options)))


def compare_onnx(
    folder: Path,
    merged: Path,
    forward: ForwardReport | None,
    device: str,
    on_progress: OnProgress,
    options: ExportOptions | None = None,
) -> OnnxCheck:
    """Graphs against the merged folder and, through what the verification recorded, the unmerged model."""
    from exporters.onnx.check.check import check_onnx

    samples, reference = _samples(forward)
    return check_onnx(
        folder,
        merged,
        samples,
        reference_logits=reference,
        device=device,
        max_kl=options.max_kl if options else None,
        genai_python=options.onnx.genai_python if options and options.onnx else None,
        on_progress=_in_words(on_progress),
    )


def _check_four_bit(plan: MergePlan, options: ExportOptions) -> None:
    from exporters.four_bit import require_four_bit
    from exporters.onnx.loading import require

    require("transformers")
    require_four_bit(plan.base, {tensor.dtype for tensor in plan.tensors.values()})


def export_four_bit_folder(given: ExportInput, *, double: bool) -> Exported:
    """The merged model in bitsandbytes' nf4, compared with the dense one and with the unmerged model."""
    from exporters.four_bit import export_four_bit

    made = export_four_bit(
        given.merged,
        given.out,
        Quantization("nf4", double),
        metadata=given.metadata,
        forward=given.verification.forward if given.verification else None,
        device=given.device,
        on_progress=given.on_progress,
    )
    failures = (f"{made.differing} elements of the 4-bit codes do not stand for what they should.",)
    return Exported({"four_bit": asdict(made)}, failures if made.differing else ())


def _check_slots(plan: MergePlan, options: ExportOptions) -> None:
    from exporters.onnx.architectures import architecture_of
    from exporters.onnx.export import require_graphs
    from exporters.onnx.genai import require_genai
    from exporters.onnx.loading import require
    from exporters.onnx.options import OnnxOptions, require_possible
    from exporters.onnx_adapters.export import require_one_graph, require_servable

    require("onnx", "onnxscript", "onnxruntime", "transformers")
    if plan.base.quantization is not None:
        raise CheckpointError(
            f"The base {str(plan.base.folder)!r} is {plan.base.quantization}, and adapters are kept apart here from a "
            "base that is exported as its folder has it.",
            remedy="Merge the adapter (--to onnx), or give a dense base without --base-quantization.",
            path=str(plan.base.folder),
        )
    require_servable(plan.adapter, options.slots)
    architecture = architecture_of(plan.base.folder)
    require_one_graph(architecture)
    chosen = options.onnx or OnnxOptions()
    require_possible(chosen)
    if chosen.runtime == "genai":
        require_genai(chosen, architecture)
    else:
        require_graphs(plan.base.folder, chosen)


def export_onnx_adapters(given: ExportInput) -> Exported:
    """The base as ONNX with adapter slots, and the adapter as a file for them, compared with torch unmerged."""
    from exporters.onnx.options import OnnxOptions
    from exporters.onnx_adapters.export import export_slotted

    base, adapter = given.plan.base.folder, given.plan.adapter
    made = export_slotted(
        base,
        given.out,
        adapter,
        given.name,
        given.options.slots,
        given.options.onnx,
        metadata={key: value for key, value in given.metadata.items() if "adapter" not in key},
        on_progress=given.on_progress,
    )
    table = made.base.table
    values: dict[str, object] = {
        "onnx": _noted(made.onnx, given.options.onnx or OnnxOptions()).to_json(),
        "slots": {
            "count": len(table.slots),
            "mixed_batches": table.mixed,
            "rank": table.rank,
            "required_inputs": table.required,
            "base_sha256": table.fingerprint,
            "without": list(table.without),
        },
        "onnx_adapter": asdict(made.adapter),
    }
    if given.verification is None:
        return Exported(values)
    check = compare_swapped(
        made.base,
        made.adapter_path,
        given.plan,
        given.verification.forward,
        given.device,
        given.on_progress,
        given.options,
    )
    return Exported({**values, "swap_check": asdict(check)}, check.failures)


def compare_swapped(
    base: SlottedBase,
    adapter_path: Path,
    plan: MergePlan,
    forward: ForwardReport | None,
    device: str,
    on_progress: OnProgress,
    options: ExportOptions | None = None,
) -> SwapCheck:
    """A slotted graph with an adapter file against torch's unmerged forward, on the verification's own prompts."""
    from exporters.onnx_adapters.check import check_swap

    chosen = options or ExportOptions()
    return check_swap(
        base,
        adapter_path,
        plan.base.folder,
        plan.adapter,
        _samples(forward)[0],
        device=device,
        max_kl=chosen.max_kl,
        genai_python=chosen.onnx.genai_python if chosen.onnx else None,
        on_progress=_in_words(on_progress),
    )


def forecast_onnx(plan: MergePlan, options: ExportOptions, name: str) -> OnnxForecast:
    """Of `--to onnx`. name: of the adapter, as for ExportInput."""
    from exporters.onnx.forecast import forecast
    from exporters.onnx.options import OnnxOptions

    return forecast(plan, options.onnx or OnnxOptions())


def forecast_slots(plan: MergePlan, options: ExportOptions, name: str) -> OnnxForecast:
    """Of `--to onnx-adapters`."""
    from exporters.onnx.forecast import forecast
    from exporters.onnx.options import OnnxOptions
    from exporters.onnx_adapters.naming import ADAPTERS, SUFFIX

    return forecast(plan, options.onnx or OnnxOptions(), adapter_file=f"{ADAPTERS}/{name}{SUFFIX}")


def export_onnx_pipeline(
    merged: Path,
    out: Path,
    plan: PipelinePlan,
    verification: PipelineReport | None,
    options: ExportOptions,
    metadata: Mapping[str, Mapping[str, str]],
    device: str,
    on_progress: OnProgress,
) -> Exported:
    """A diffusers pipeline as ONNX folders in Optimum's layout, each graph compared with torch in ONNX Runtime.

    metadata: by component.
    """
    from exporters.onnx.components import export_pipeline
    from exporters.onnx.forecast import provider_notes
    from exporters.onnx.genai import copy_missing
    from exporters.onnx.options import OnnxOptions

    chosen, say = options.onnx or OnnxOptions(), _in_words(on_progress)
    names = tuple(plan.components)
    made = export_pipeline(merged, out, names, chosen, metadata=metadata, on_progress=say)
    # Pickles are not among what a model's folder has beside its weights, and belong to the pipeline.
    copy_missing(plan.base.folder, out, tuple(relative for _, relative in plan.side_files))
    values = made.to_json()
    values["notes"] = [*made.notes, *provider_notes(chosen)]
    if verification is None:
        return Exported({"onnx_pipeline": values})
    found = compare_onnx_pipeline(out, merged, plan, verification, device, on_progress)
    failures = tuple(failure for one in found for failure in one.failures)
    return Exported({"onnx_pipeline": values, "onnx_check": [one.to_json() for one in found]}, failures)


def compare_onnx_pipeline(
    out: Path, merged: Path, plan: PipelinePlan, verification: PipelineReport, device: str, on_progress: OnProgress
) -> tuple[GraphCheck, ...]:
    """The graphs of a pipeline against the merged components and what the verification recorded of the unmerged."""
    from exporters.onnx.check.components import check_components

    forwards = {name: report.forward for name, report in verification.components.items()}
    return check_components(
        out, merged, tuple(plan.components), forwards, device=device, on_progress=_in_words(on_progress)
    )


def _in_words(on_progress: OnProgress) -> Callable[[str], None]:
    return lambda stage: on_progress(Progress(stage, 0, None, ""))


EXPORTERS: Mapping[str, Exporter] = {
    "safetensors": Exporter(_nothing_to_check, export_safetensors),
    "onnx": Exporter(_check_onnx_architecture, export_onnx_folder, forecast_onnx),
    "onnx-adapters": Exporter(_check_slots, export_onnx_adapters, forecast_slots),
    "nf4": Exporter(_check_four_bit, partial(export_four_bit_folder, double=False)),
    "nf4-double": Exporter(_check_four_bit, partial(export_four_bit_folder, double=True)),
}

_SCORING = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification", "ForMaskedLM")


def _samples(forward: ForwardReport | None) -> tuple[list[Inputs], list[Tensor] | None]:
    """The verification's own inputs and, for models whose answers are logits, the unmerged model's on them."""
    if forward is None or not forward.samples:
        return token_inputs([[1, 2, 3, 4, 5], [5, 4, 3]]), None
    samples: list[Inputs] = [
        {name: value for name, value in sample.inputs.items() if name != "attention_mask"} for sample in forward.samples
    ]
    scores = (forward.architecture or "").endswith(_SCORING)
    if not scores and any(sample.grows is None for sample in forward.samples):
        return samples, None
    return samples, [logits.float() for logits in forward.unmerged_logits]
