"""What is said of ONNX exports and of their comparison with torch, in tables for a person at a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dora_serve.terminal import format_bytes, format_number, format_table

if TYPE_CHECKING:
    from exporters.onnx.forecast import Forecast, OnnxForecast, PipelineForecast


def forecast_text(found: OnnxForecast | PipelineForecast) -> str:
    """The ONNX output of an export that was not made."""
    from exporters.onnx.forecast import OnnxForecast

    weights = f"{found.dtype}, weights {found.quantize}" if found.quantize else found.dtype
    rows = [
        ["dtype", weights],
        ["opset", str(found.opset) if found.opset is not None else "the builder's"],
        *_cache_rows(found),
        ["for", found.provider],
        ["size, about", format_bytes(found.bytes)],
        ["memory of the verification, at most about", _memory(found)],
    ]
    notes = [f"Note: {note}" for note in found.notes]
    if not isinstance(found, OnnxForecast):
        parts = [[name, ", ".join(parts) or "stays as safetensors"] for name, parts in found.graphs.items()]
        folders = format_table(parts, ("component", "folders with a model.onnx"))
        return "\n".join([folders, "", format_table(rows, ("ONNX", "")), *notes])
    rows = [["route", found.route], ["architecture", found.architecture], ["files", ", ".join(found.files)], *rows]
    return "\n".join([format_table(rows, ("ONNX", "")), *notes])


def _memory(found: Forecast) -> str:
    if found.memory_bytes is None:
        return "none: --no-verify"
    available = "" if found.available_bytes is None else f" ({format_bytes(found.available_bytes)} available)"
    return f"{format_bytes(found.memory_bytes)}{available}"


def _cache_rows(found: Forecast) -> list[list[str]]:
    from exporters.onnx.forecast import OnnxForecast

    if not isinstance(found, OnnxForecast) or found.opset is None:
        return []
    cached = {True: "yes: seconds", False: "no: 3 to 4 CPU-seconds a layer", None: "not known before the merge"}
    return [["traced graph in the cache", cached[found.cached]]]


def onnx_export_text(onnx: Mapping[str, Any]) -> str:
    """What graphs were written."""
    graphs = ", ".join(f"{graph['file']} ({graph['nodes']} nodes)" for graph in onnx["graphs"])
    weights = f"{onnx['dtype']}, weights {onnx['quantize']}" if onnx["quantize"] else onnx["dtype"]
    how = "traced" if onnx["traced"] else "graph from the cache"
    lines = [f"ONNX: {graphs}, opset {onnx['opset']}, {weights}, {format_bytes(onnx['bytes'])}, {how}"]
    return "\n".join([*lines, *(f"Note: {note}" for note in onnx["notes"])])


def onnx_check_text(check: Any) -> str:
    if check is None:
        return "NOT COMPARED with torch (--no-verify)."
    quantized = check["tolerance"] is None and not check["not_run"]
    allowed = f" ({format_number(check['kl_limit'])} allowed)" if check["kl_limit"] is not None else ""
    limit = f" ({format_number(check['reference_limit'])})" if check["reference_limit"] is not None else ""
    rows = [
        ["prefill, all positions: largest difference", format_number(check["max_abs"])],
        ["decode with cache: largest difference", format_number(check["decode_max_abs"])],
        ["padded batch of 4: largest difference", format_number(check["padded_max_abs"])],
        [f"tolerance, from {check['dtype']}", format_number(check["tolerance"])],
        ["KL divergence from torch, nats", format_number(check["kl"]) + allowed],
        ["same top-1", "" if check["top1"] is None else f"{check['top1']:.1%}"],
        [
            "activations in floats, torch on the codes' numbers (allowed)",
            f"{format_number(check['exact_max_abs'])} ({format_number(check['exact_tolerance'])})",
        ],
        [
            "perplexity of the prompts (torch's)",
            f"{format_number(check['perplexity'])} ({format_number(check['torch_perplexity'])})" if quantized else "",
        ],
        ["from the unmerged model's logits (allowed)", f"{format_number(check['reference_max_abs'])}{limit}"],
        [
            f"greedy continuations of {check['greedy_tokens']} tokens equal",
            f"{check['greedy_equal']} of {check['greedy_total']}" if check["greedy_total"] else "",
        ],
        [
            "tokens a second, prompts included (torch's)",
            f"{format_number(check['tokens_per_second'])} ({format_number(check['torch_tokens_per_second'])})"
            if check["tokens_per_second"]
            else "",
        ],
        [
            "weights equal to the merged tensors, " + ("in steps of their scales" if quantized else "bit for bit"),
            # Of a quantized graph of GenAI's builder there are none to compare.
            f"{check['initializers_equal']} of {check['initializers']}" if check["initializers"] else "",
        ],
    ]
    shown = [row for row in rows if row[1] not in ("", " ()")]
    table = format_table(shown, (f"ONNX Runtime ({check['provider']}) against torch in float32", ""))
    return "\n".join([table, *(f"NOT RUN: {reason}" for reason in check["not_run"])])


def slots_text(values: Mapping[str, Any]) -> list[str]:
    """What a graph with adapter slots was found to do with its first adapter."""
    slots, adapter, check = values["slots"], values["onnx_adapter"], values.get("swap_check")
    kind = ", for mixed batches" if slots["mixed_batches"] else ""
    fixed = f", rank {slots['rank']}" if slots["rank"] else ""
    lines = [
        f"Slots: {slots['count']}{fixed}{kind}",
        f"Adapter file: adapters/{adapter['file']}, {adapter['method']}, {format_bytes(adapter['bytes'])}",
    ]
    if check is None:
        return [*lines, "NOT COMPARED with torch (--no-verify)."]
    return [*lines, "", swap_text(check)]


def swap_text(check: Mapping[str, Any]) -> str:
    """The comparison of a slotted graph and an adapter file with torch's unmerged forward."""
    if check["not_run"]:
        return "\n".join(f"NOT RUN: {reason}" for reason in check["not_run"])
    rows = [
        [
            "without an adapter, from torch's base",
            format_number(check["base_max_abs"]),
            "",
            _optional(check["base_kl"]),
        ],
        ["whole prompts", format_number(check["max_abs"]), format_number(check["tolerance"]), _optional(check["kl"])],
    ]
    if check["decode_max_abs"] is not None:
        rows.append(
            ["through the cache", format_number(check["decode_max_abs"]), format_number(check["tolerance"]), ""]
        )
    rows.append(["a padded batch of 4", format_number(check["padded_max_abs"]), format_number(check["tolerance"]), ""])
    rows.append(["the adapter's effect", format_number(check["effect_max_abs"]), "", ""])
    if check["reference"] != "base":
        rows.append(
            ["without an adapter, from torch's base before it was quantized", "", "", _optional(check["lost_kl"])]
        )
    if check["exact_max_abs"] is not None:
        distances = (format_number(check["exact_max_abs"]), format_number(check["exact_tolerance"]))
        rows.append(["whole prompts, activations in floats", *distances, _optional(check["exact_kl"])])
    if check["without_magnitude_max_abs"] is not None:
        rows.append(["if the magnitude were ignored", format_number(check["without_magnitude_max_abs"]), "", ""])
    title = f"ONNX Runtime ({check['provider']}) with the adapter swapped in, how far from torch's unmerged forward"
    table = format_table(rows, ("", "largest", "allowed", "KL"))
    greedy = f"; {check['greedy_equal']} of {check['greedy_total']} go on alike" if check["greedy_total"] else ""
    layers = f" The file's tensors are the adapter in {check['layers_equal']} of {check['layers']} layers."
    weights = f" {check['initializers_equal']} of {check['initializers']} weights are the base's."
    said = [layers if check["layers"] else "", weights if check["initializers"] else ""]
    return f"{title}\n{table}\n{check['prompts']} prompts{greedy}.{''.join(said)}"


def _optional(value: float | None) -> str:
    return "" if value is None else format_number(value)


def pipeline_export_text(made: Any) -> str:
    """What graphs of a pipeline were written."""
    rows = [
        [
            folder,
            str(graph["nodes"]),
            format_bytes(one["bytes"]),
            ", ".join(graph["inputs"]),
            _few(graph["outputs"]),
        ]
        for folder, one in made["graphs"].items()
        for graph in one["graphs"]
    ]
    table = format_table(rows, ("ONNX", "nodes", "size", "inputs", "outputs"))
    return "\n".join([table, *(f"Note: {note}" for note in made["notes"])])


def graphs_text(checks: Any) -> str:
    """The comparison of a pipeline's graphs with torch."""
    if checks is None:
        return "NOT COMPARED with torch (--no-verify)."
    rows = [
        [
            one["folder"],
            format_number(one["max_abs"]),
            format_number(one["batched_max_abs"]),
            format_number(one["tolerance"]),
            format_number(one["reference_max_abs"]),
            format_number(one["reference_limit"]),
            format_number(one["relative"]),
            f"{one['initializers_equal']} of {one['initializers']}",
        ]
        for one in checks
    ]
    title = "ONNX Runtime against torch in float32"
    columns = (
        "graph",
        "largest",
        "in a batch",
        "allowed",
        "from the unmerged",
        "allowed",
        "rms, relative",
        "weights equal",
    )
    reasons = [f"NOT RUN: {one['folder']}: {reason}" for one in checks for reason in one["not_run"]]
    return "\n".join([title, format_table(rows, columns), *reasons])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
