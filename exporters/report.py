"""Reports in words and tables, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_serve.comparison import Comparison, Tolerance
from dora_serve.decomposition import Decomposition, ModuleChange
from dora_serve.forward_report import ForwardReport
from dora_serve.pipeline_verify import PipelineReport
from dora_serve.tensor_report import TensorReport
from dora_serve.terminal import format_bytes, format_number, format_seconds, format_table
from exporters.inspect import Inspection
from exporters.onnx_report import (
    forecast_text,
    graphs_text,
    onnx_check_text,
    onnx_export_text,
    pipeline_export_text,
    slots_text,
    swap_text,
)
from exporters.parts import AnyPlan, AnyReport
from exporters.pipeline import Export, Foreseen
from exporters.pull import PulledReport
from exporters.record import RECORD_NAME
from exporters.verify_folder import FolderReport


def plan_text(foreseen: Foreseen) -> str:
    """What a merge would do, for --dry-run."""
    plan, summary = foreseen.plan, dict[str, Any](foreseen.plan.summary())
    lines = [_headline(plan), "", format_table(_rows(summary["actions"]), ("what happens", "tensors"))]
    for name, part in summary.get("components", {}).items():
        lines += ["", format_table(_rows(part["actions"]), (f"of these in {name}", "tensors"))]
    if foreseen.onnx is not None:
        return "\n".join([*lines, "", forecast_text(foreseen.onnx), *(f"Note: {note}" for note in plan.notes)])
    files = [[name, str(count)] for name, count in summary["files"].items()]
    lines += ["", format_table(files, ("file", "tensors")), f"{format_bytes(plan.nbytes)} in all"]
    if summary["config_changes"]:
        changes = [f"{path} = {value!r}" for path, value in summary["config_changes"].items()]
        lines += ["", "config.json: " + "; ".join(changes)]
    lines += [f"Note: {note}" for note in plan.notes]
    return "\n".join(lines)


def export_text(export: Export) -> str:
    """What was done, the verification's table, and where it lies."""
    plan = export.plan
    lines = [f"{_headline(plan)}: {_actions(plan)}, {format_bytes(plan.nbytes)} in {_duration(export.merged.seconds)}"]
    lines += [f"Note: {note}" for note in plan.notes]
    if export.merged.unchanged:
        lines.append(f"Note: {_unchanged(export)}")
    if export.verification is None:
        lines.append("NOT VERIFIED (--no-verify): nothing shows that these weights equal the unmerged model.")
    else:
        lines += ["", verification_text(export.verification)]
    if "four_bit" in export.exported.values:
        lines += ["", _four_bit_text(export.exported.values["four_bit"])]
    pipeline: Any = export.exported.values.get("onnx_pipeline")
    if pipeline is not None:
        lines += ["", pipeline_export_text(pipeline), graphs_text(export.exported.values.get("onnx_check"))]
    onnx: Any = export.exported.values.get("onnx")
    if onnx is not None:
        lines += ["", onnx_export_text(onnx)]
        if "slots" in export.exported.values:
            lines += slots_text(export.exported.values)
        else:
            lines.append(onnx_check_text(export.exported.values.get("onnx_check")))
    return "\n".join([*lines, "", f"Written to {export.out}"])


def _four_bit_text(made: Any) -> str:
    """What quantizing the merged model cost it."""
    worst, error = made["worst"]
    text = (
        f"{made['tensors']} weights as {made['label']}, {format_bytes(made['nbytes'])}: off by "
        f"{made['relative_error']:.1%} of their norm ({worst}: {error:.1%})"
    )
    logits = made["logits"]
    if logits is None:
        return f"{text}. What that does to the logits was not measured."
    perplexity = f", perplexity {logits['perplexity']:.3g}" if logits["perplexity"] else ""
    return (
        f"{text}.\nAgainst the unmerged model: logits off by {logits['rms']:.3g} (root mean square), KL "
        f"{logits['kl']:.3g} nats, the same top-1 in {logits['top1']:.1%} of positions{perplexity}."
    )


def verification_text(report: AnyReport) -> str:
    """The tables of a verification, and what is wrong where something is."""
    if isinstance(report, PipelineReport):
        return _pipeline_text(report)
    parts = []
    if report.tensors is not None:
        parts.append(format_table(_tensor_rows(report.tensors), ("every tensor", "result")))
    if report.forward is not None:
        parts.append(_forward_text(report.forward))
    if report.notes:
        parts.append("\n".join(f"Note: {note}" for note in report.notes))
    if not report.passed:
        parts.append("FAILED:\n" + "\n".join(f"  - {failure}" for failure in report.failures[:20]))
        if report.tensors is not None and report.tensors.ranked:
            rows = [
                [item.module, f"{item.share:.1%}", format_number(item.relative_error)]
                for item in report.tensors.ranked[:8]
            ]
            parts.append(format_table(rows, ("module", "share of the error", "relative error")))
    elif report.changes_nothing:
        parts.append("Verified, but the adapter changes nothing that can be seen: is it the right, trained one?")
    elif report.forward is not None and not report.forward.ran:
        parts.append("Verified by its tensors alone: the forward was not run.")
    else:
        parts.append("Verified: the merged model is the unmerged one, as exactly as its dtype can say it.")
    return "\n\n".join(parts)


def _pipeline_text(report: PipelineReport) -> str:
    parts = [f"{name}:\n\n{verification_text(report.components[name])}" for name in report.adapted]
    copied = [name for name, one in report.components.items() if name not in report.adapted and one.passed]
    if copied:
        parts.append(f"Copied, byte for byte: {', '.join(copied)}.")
    wrong = [failure for failure in report.failures if not failure.startswith(tuple(f"{n}: " for n in report.adapted))]
    if wrong:
        parts.append("FAILED:\n" + "\n".join(f"  - {failure}" for failure in wrong[:20]))
    return "\n\n".join(parts)


def folder_text(report: FolderReport) -> str:
    """The verification of a folder; of an ONNX folder also the graph's."""
    text = verification_text(report.model)
    if report.swap is not None:
        failures = "\n".join(f"  - {failure}" for failure in report.onnx_failures)
        verdict = f"FAILED:\n{failures}" if failures else "Verified: base and adapter file are the unmerged model."
        return "\n\n".join(["A merge of the same adapter, for comparison:", text, swap_text(report.swap), verdict])
    if report.graphs:
        failures = "\n".join(f"  - {failure}" for failure in report.onnx_failures)
        verdict = f"FAILED:\n{failures}" if failures else "Verified: the graphs are that merged pipeline."
        return "\n\n".join(["The merge that the graphs are compared with:", text, graphs_text(report.graphs), verdict])
    if report.onnx is None:
        return text
    failures = "\n".join(f"  - {failure}" for failure in report.onnx_failures)
    verdict = f"FAILED:\n{failures}" if failures else "Verified: the graph is that merged model."
    return "\n\n".join(["The merge that the graph is compared with:", text, onnx_check_text(report.onnx), verdict])


def pulled_text(report: PulledReport) -> str:
    """The files of what was published, against the hashes in its record."""
    found = report.hashes
    rows = [
        [f"as {RECORD_NAME} says", str(len(found.matching))],
        ["changed", str(len(found.changed))],
        ["missing", str(len(found.missing))],
    ]
    rows += [["without a recorded hash", str(len(found.unproven))]] if found.unproven else []
    lines = [f"{report.pulled.name}: {format_bytes(found.nbytes)}", "", format_table(rows, ("files", ""))]
    if found.extra:
        shown = ", ".join(found.extra[:6]) + (", ..." if len(found.extra) > 6 else "")
        lines.append(f"Note: not of the export, and not judged: {shown}")
    if report.proof != "verified":
        how = "failed its verification" if report.proof == "failed" else "was not verified"
        lines.append(f"Note: the record says that this export {how} when it was made.")
    if not found.passed:
        return "\n".join([*lines, "", "FAILED:", *(f"  - {failure}" for failure in found.failures[:20])])
    said = "Byte for byte what was written; by its record it was verified then."
    return "\n".join([*lines, "", said if report.proof == "verified" else "Byte for byte what was written."])


def inspection_text(inspection: Inspection) -> str:
    """An adapter at a glance."""
    facts = [
        ["format", f"{inspection.format} {inspection.method}"],
        [
            "trained on",
            (inspection.trained_on or "not said") + (f"@{inspection.revision}" if inspection.revision else ""),
        ],
        ["task", inspection.task_type or "not said"],
        ["parameters", f"{inspection.parameters:,} ({format_bytes(inspection.nbytes)})"],
        ["dtypes", ", ".join(f"{dtype} ({count} tensors)" for dtype, count in inspection.dtypes.items())],
    ]
    lines = [inspection.source, "", format_table(facts, ("adapter", ""))]
    if inspection.targets:
        rows = [
            [target.name, target.kind, str(target.modules), _counted(target.ranks), _counted(target.scalings)]
            for target in inspection.targets
        ]
        lines += ["", format_table(rows, ("target", "kind", "modules", "rank", "scaling"))]
    if inspection.replacements:
        lines += ["", "Replaced whole: " + "; ".join(inspection.replacements[:12])]
    lines += [f"Note: {note}" for note in inspection.notes]
    if inspection.plan is not None:
        actions = inspection.plan["actions"]
        lines += ["", f"It fits {inspection.plan['base']}.", format_table(_rows(actions), ("what happens", "tensors"))]
    if inspection.decomposition is not None:
        lines += ["", decomposition_text(inspection.decomposition)]
    if inspection.problems:
        lines += ["", "It cannot be merged:"] + [f"  - {problem}" for problem in inspection.problems[:20]]
        if len(inspection.problems) > 20:
            lines.append(f"  - and {len(inspection.problems) - 20} more")
    return "\n".join(lines)


def decomposition_text(found: Decomposition) -> str:
    """How far magnitudes and directions move, by kind of module, and how the two go together."""
    rows = []
    for kind, trend in {**found.by_kind, "all": found.trend}.items():
        group = [change for change in found.modules if kind in ("all", change.kind)]
        means = [sum(values) / max(1, len(group)) for values in zip(*map(_changes, group), strict=True)] or [0.0] * 3
        rows.append([kind, str(trend.modules), *map(format_number, (*means, trend.correlation, trend.slope))])
    header = ("what changes", "modules", "m", "mean |m' - m|", "mean 1 - cos", "correlation", "slope")
    return format_table(rows, header)


def _changes(change: ModuleChange) -> tuple[float, float, float]:
    return change.magnitude, change.delta_magnitude, change.delta_direction


def _headline(plan: AnyPlan) -> str:
    adapter = plan.adapter
    return f"{adapter.path.name} ({adapter.method}, {adapter.format}) into {plan.base.folder.name}"


def _actions(plan: AnyPlan) -> str:
    actions = plan.summary()["actions"]
    assert isinstance(actions, dict)
    return ", ".join(f"{count} {action}" for action, count in actions.items())


def _unchanged(export: Export) -> str:
    names = export.merged.unchanged
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} adapted tensors came out as they were in the base: {shown}"


def _rows(table: object) -> list[list[str]]:
    assert isinstance(table, Mapping)
    return [[str(name), str(count)] for name, count in table.items()]


def _tensor_rows(report: TensorReport) -> list[list[str]]:
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in report.counts.items())
    rows = [
        ["tensors", f"{len(report.results)}: {verdicts}"],
        ["elements that are not the formula rounded once", f"{report.differing:,} of {report.elements:,}"],
        ["largest error, in spacings of the dtype", format_number(report.largest_error)],
    ]
    norms = [result.norms for result in report.results if result.norms]
    if norms:
        wrong = sum(norm.wrong for norm in norms)
        rows.append(["row norms that differ from |m|", f"{wrong:,} of {sum(norm.outputs for norm in norms):,}"])
    return rows


def _forward_text(report: ForwardReport) -> str:
    if not report.ran:
        return f"Forward: not run. {report.reason}"
    wide, deployed = report.wide_dtype, report.deployed_dtype
    measured = (
        ("base (the effect)", report.base, None),
        (f"formula rounded to {deployed}, run in {wide}", report.rounded, None),
        (f"merged, run in {wide}", report.merged_wide, report.tolerance_wide),
        (f"unmerged, run in {deployed}", report.unmerged_deployed, None),
        (f"merged, run in {deployed}", report.merged_deployed, report.tolerance_deployed),
    )
    rows = [_forward_row(label, found, limit) for label, found, limit in measured if found is not None]
    whose = "PEFT's" if report.reference == "peft" else "the paper's"
    what = f"{report.output.capitalize()} of {report.architecture} on {report.device}"
    title = (
        f"{what}: {report.inputs}, {report.positions} positions, how far from {whose} unmerged forward in "
        f"{report.wide_dtype}"
    )
    header = ("model", "largest", "rms", "allowed", "KL", "allowed", "same top-1", "perplexity", "greedy equal")
    notes = [f"Note: {note}" for note in report.notes]
    return "\n".join([title, format_table(rows, header), *notes])


def _forward_row(label: str, found: Comparison, limit: Tolerance | None) -> list[str]:
    greedy = found.greedy
    return [
        label,
        format_number(found.largest),
        format_number(found.rms),
        format_number(limit.rms if limit else None),
        format_number(found.kl),
        format_number(limit.kl if limit else None),
        f"{found.top1:.1%}",
        format_number(found.perplexity),
        f"{greedy.equal} of {greedy.compared}" if greedy else "",
    ]


def _counted(values: Mapping[Any, int]) -> str:
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count})" for value, count in sorted(values.items()))


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else format_seconds(seconds)
