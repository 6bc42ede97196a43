"""A base with adapter slots as a folder, and further adapters for one that was exported before."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_serve.adapter import Adapter
from dora_serve.checkpoint import side_files
from dora_serve.errors import PlanError, Problem, UnavailableError
from dora_serve.formats import ReadOptions, read_adapter
from dora_serve.hub import locate
from dora_serve.onnx_engine.slots import SlotTable
from dora_serve.output import new_file
from dora_serve.progress import OnProgress, Progress, ignore_progress
from exporters.manifest import read_record
from exporters.onnx.architectures import architecture_of, kind_of
from exporters.onnx.export import OnnxExport, export_onnx
from exporters.onnx.genai import copy_missing, export_genai
from exporters.onnx.linears import Linear, find_linears
from exporters.onnx.options import OnnxOptions
from exporters.onnx_adapters.adapter_file import SlottedBase, WrittenAdapter, open_slotted, write_adapter
from exporters.onnx_adapters.fitting import adapted_layers, unservable
from exporters.onnx_adapters.naming import ADAPTERS, SUFFIX, file_stem
from exporters.onnx_adapters.options import SlotOptions
from exporters.onnx_adapters.slots import insert_slots
from exporters.record import adapter_record, add_to_record, hash_files

if TYPE_CHECKING:
    import onnx_ir


@dataclass(frozen=True)
class SlottedExport:
    """What was written: the graph, its slots, and the first adapter."""

    onnx: OnnxExport
    base: SlottedBase
    adapter: WrittenAdapter
    adapter_path: Path


def require_servable(adapter: Adapter, options: SlotOptions) -> None:
    """What can be known before the base is exported. Raises PlanError with everything that no slot can hold."""
    problems = list(unservable(adapter))
    for module in adapter.modules:
        if options.rank is not None and module.rank > options.rank:
            problems.append(Problem(module.module, f"rank {module.rank}", f"at most {options.rank}, the --slot-rank"))
        if options.mixed and module.kind == "embedding":
            hint = "export without --mixed-batches"
            problems.append(Problem(module.module, "an adapter on an embedding", "on a linear layer", hint))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise PlanError(
            f"The adapter {str(adapter.path)!r} cannot be swapped in and out of a graph: {count}.",
            problems,
            remedy="Merge it instead: dora-export merge ADAPTER --to onnx.",
        )


def require_one_graph(architecture: str) -> None:
    """Raise UnavailableError for a model that is exported as several graphs: an adapter file fits one."""
    kind = kind_of(architecture)
    if kind not in ("decoder", "plain"):
        raise UnavailableError(
            f"{architecture} is exported as several graphs ({kind}), and an adapter file fits one graph.",
            remedy="Merge the adapter instead: dora-export merge ADAPTER --to onnx.",
            architecture=architecture,
        )


def export_slotted(
    base_folder: Path,
    out: Path,
    adapter: Adapter,
    name: str,
    options: SlotOptions,
    onnx: OnnxOptions | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    on_progress: OnProgress = ignore_progress,
) -> SlottedExport:
    """The base as ONNX with slots, its configuration and tokenizer, and `adapters/<name>.onnx_adapter`, into `out`.

    The caller makes the whole atomic. Raises what `export_onnx`, `insert_slots` and `write_adapter` raise.
    """

    def say(stage: str) -> None:
        on_progress(Progress(stage, 0, None, ""))

    architecture = architecture_of(base_folder)
    require_one_graph(architecture)
    if onnx is not None and onnx.runtime == "genai":
        exported = export_genai(base_folder, out, onnx, architecture, say, fused=False)
    else:
        exported = export_onnx(base_folder, out, onnx, metadata=metadata, on_progress=say)
    copy_missing(base_folder, out, side_files(base_folder))
    say("putting slots into the graph")
    put_slots(exported.path, adapter, options)
    base = open_slotted(out)
    (out / ADAPTERS).mkdir()
    path = out / ADAPTERS / f"{name}{SUFFIX}"
    return SlottedExport(exported, base, write_adapter(adapter, base, path, on_progress), path)


def put_slots(graph: Path, adapter: Adapter | None, options: SlotOptions) -> SlotTable:
    """Insert slots into a graph file, which is replaced; its weights stay where they are, in the file beside it."""
    import onnx_ir

    model = onnx_ir.load(graph)
    named = adapted_layers(adapter, find_linears(model), graph) if adapter is not None else frozenset()

    def wanted(linear: Linear) -> bool:
        everywhere = options.which == "all" or (options.which == "layers" and linear.is_layer)
        return everywhere or linear.module in named

    table = insert_slots(model, wanted, options)
    _save_graph(model, graph)
    return table


def _save_graph(model: onnx_ir.Model, graph: Path) -> None:
    """The graph alone: tensors of the data file stay references to it, new ones lie in the graph."""
    import onnx_ir

    fresh = graph.with_name(f".{graph.name}.slots")
    onnx_ir.save(model, fresh)
    os.replace(fresh, graph)


def add_adapter(
    spec: str,
    exported: Path,
    out: Path | None = None,
    *,
    read: ReadOptions | None = None,
    command: tuple[str, ...] = (),
    overwrite: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> tuple[Path, WrittenAdapter, Mapping[str, object]]:
    """Another adapter for a base that was exported before: `out`, by default `adapters/<name>.onnx_adapter` of its
    folder. What it was made of is returned, and goes into the folder's dora_export.json; for a file elsewhere, into
    `<out>.json` beside it.

    spec: the adapter, a folder or a Hub id, in any format that is read.

    The base's weights are read from the graph, a block of rows at a time, and no model is loaded. Raises
    CheckpointError for what is no exported base, PlanError for an adapter that does not fit it, OutputError; then
    nothing is written.
    """
    base = open_slotted(exported)
    located = locate(spec, what="adapter", on_progress=on_progress)
    adapter = read_adapter(located.path, read)
    target = out or base.path.parent / ADAPTERS / f"{file_stem(spec)}{SUFFIX}"
    target, folder = Path(os.path.abspath(target.expanduser())), Path(os.path.abspath(base.path.parent))
    record = read_record(folder) if folder in target.parents else None
    beside = (f"{target.name}.json",) if record is None else ()
    inputs = (base.path, *adapter.files)
    with new_file(target, overwrite=overwrite, inputs=inputs, beside=beside) as fresh:
        written = write_adapter(adapter, base, fresh, on_progress)
        facts = adapter_record(located, adapter, command, hash_files(adapter.files), written, hash_files([fresh]))
        for name in beside:
            fresh.with_name(name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if record is not None:
        add_to_record(folder, record, target, facts)
    return target, written, facts
