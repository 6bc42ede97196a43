"""`dora-export verify` for any folder: merged safetensors by themselves, ONNX by way of a merge of our own.

The weights of an ONNX graph are renamed, transposed and fused, so the graph is compared with a fresh merge that is
itself verified first: its initializers bit for bit, its logits in ONNX Runtime.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dora_serve.checkpoint import read_json
from dora_serve.errors import CheckpointError, no_such_path
from dora_serve.forward_report import ForwardOptions
from dora_serve.pipeline_folder import INDEX_NAME
from dora_serve.pipeline_plan import PipelinePlan
from dora_serve.pipeline_verify import PipelineReport
from dora_serve.plan import MergePlan
from dora_serve.progress import OnProgress, ignore_progress
from dora_serve.resolve import MERGEABLE_DTYPES
from dora_serve.verify import verify
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx_adapters.adapter_file import open_slotted
from exporters.onnx_adapters.naming import ADAPTERS, SUFFIX, file_stem
from exporters.parts import AnyReport, verify_plan, write_plan
from exporters.registry import ExportOptions, compare_onnx, compare_onnx_pipeline, compare_swapped
from exporters.safetensors import write_model
from exporters.sources import Sources, plan_sources

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.onnx", "pytorch_model*.bin")


@dataclass(frozen=True)
class FolderReport:
    """model: the check of the merged weights (for ONNX, of the merge that the graph is compared with). onnx: the
    comparison of the graph, graphs those of a pipeline, or swap that of a base with slots and an adapter file;
    onnx_failures what is wrong with
    it. All empty for safetensors.
    """

    model: AnyReport
    onnx: Mapping[str, object] | None = None
    onnx_failures: tuple[str, ...] = ()
    swap: Mapping[str, object] | None = None
    graphs: tuple[Mapping[str, object], ...] = ()

    @property
    def passed(self) -> bool:
        return self.model.passed and not self.onnx_failures

    @property
    def failures(self) -> tuple[str, ...]:
        return (*self.model.failures, *self.onnx_failures)

    def to_json(self) -> dict[str, object]:
        both = {"onnx_check": self.onnx or list(self.graphs) or None, "swap_check": self.swap}
        return {**self.model.to_json(), "passed": self.passed, "failures": list(self.failures), **both}


def verify_folder(
    folder: Path,
    sources: Sources,
    options: ForwardOptions,
    on_progress: OnProgress = ignore_progress,
    *,
    export: ExportOptions | None = None,
) -> FolderReport:
    """Check a merged folder, whoever made it. export: how its ONNX graphs are judged.

    Raises PlanError for an adapter that does not fit the base.
    """
    graphs = sorted(folder.glob("*.onnx"))
    if (folder / ADAPTERS).is_dir() and graphs:
        return _verify_slotted(folder, sources, options, export, on_progress)
    if (folder / INDEX_NAME).is_file() and any(folder.glob(f"*/{MODEL_FILE}")):
        return _verify_onnx_pipeline(folder, sources, options, on_progress)
    if not graphs or any(folder.glob("*.safetensors")):
        return FolderReport(verify_plan(plan_sources(sources), folder, options, on_progress))
    with tempfile.TemporaryDirectory(prefix="dora-export-verify-") as scratch:
        plan = _plan_of_one(sources, _merged_dtype(folder))
        write_model(plan, Path(scratch), metadata={"format": "pt"}, on_progress=on_progress)
        report = verify(plan, Path(scratch), options, on_progress=on_progress)
        device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
        check = compare_onnx(folder, Path(scratch), report.forward, device, on_progress, export)
    return FolderReport(report, check.to_json(), check.failures)


def _verify_onnx_pipeline(
    folder: Path, sources: Sources, options: ForwardOptions, on_progress: OnProgress
) -> FolderReport:
    """The graphs of a pipeline, whoever made them, beside a merge of our own."""
    from exporters.onnx.check.whole import check_whole

    plan = plan_sources(sources)
    if not isinstance(plan, PipelinePlan):
        raise CheckpointError(
            f"{str(folder)!r} is a pipeline of ONNX graphs, and the base {sources.base.spec!r} is one model.",
            remedy="Name the pipeline that was merged into with --base.",
            path=str(folder),
        )
    with tempfile.TemporaryDirectory(prefix="dora-export-verify-") as scratch:
        merged = Path(scratch)
        write_plan(plan, merged, lambda part: {"format": "pt"}, on_progress=on_progress)
        report = verify_plan(plan, merged, options, on_progress)
        assert isinstance(report, PipelineReport)
        device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
        found = compare_onnx_pipeline(folder, merged, plan, report, device, on_progress)
        missing = check_whole(folder, merged, plan)
    failures = [failure for one in found for failure in one.failures] + list(missing)
    return FolderReport(report, onnx_failures=tuple(failures), graphs=tuple(one.to_json() for one in found))


def _plan_of_one(sources: Sources, dtype: torch.dtype | None = None) -> MergePlan:
    plan = plan_sources(sources, dtype)
    if isinstance(plan, PipelinePlan):
        raise CheckpointError(
            f"The base {sources.base.spec!r} is a pipeline of several models, and an ONNX folder holds one.",
            remedy="Name the folder of the component that was exported with --base.",
        )
    return plan


def _verify_slotted(
    folder: Path, sources: Sources, options: ForwardOptions, export: ExportOptions | None, on_progress: OnProgress
) -> FolderReport:
    """Of a base with adapter slots: the file of this adapter on it, whoever made that, beside a merge of our own."""
    base = open_slotted(folder)
    with tempfile.TemporaryDirectory(prefix="dora-export-verify-") as scratch:
        plan = _plan_of_one(sources)
        write_model(plan, Path(scratch), metadata={"format": "pt"}, on_progress=on_progress)
        report = verify(plan, Path(scratch), options, on_progress=on_progress)
    device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    file = _adapter_file(folder, sources)
    check = compare_swapped(base, file, plan, report.forward, device, on_progress, export)
    return FolderReport(report, None, check.failures, asdict(check))


def _adapter_file(folder: Path, sources: Sources) -> Path:
    """The file that is called as the adapter is, or the only one. Raises CheckpointError where that tells none."""
    files = sorted((folder / ADAPTERS).glob(f"*{SUFFIX}"))
    named = [path for path in files if path.stem == file_stem(sources.adapter.spec)]
    if len(named) == 1:
        return named[0]
    if len(files) == 1:
        return files[0]
    raise CheckpointError(
        f"{str(folder / ADAPTERS)!r} holds {', '.join(path.name for path in files) or 'no adapter file'}, and none is "
        f"called {file_stem(sources.adapter.spec)}{SUFFIX}.",
        remedy="Make it: dora-export onnx-adapter ADAPTER --for FOLDER",
        path=str(folder),
    )


def require_merged_folder(folder: Path, *, adapter: str, base: str) -> None:
    """Raise CheckpointError where `folder` can be no merged model: not there, a file, or an adapter.

    It is asked before `adapter` and `base`, which may be on the Hub, are fetched; the command that mends it names them.
    """
    if not folder.exists():
        raise CheckpointError(no_such_path("The merged folder", folder), remedy="Check the path.", path=str(folder))
    around = folder if folder.is_dir() else folder.parent
    weights = [path for pattern in _WEIGHTS for path in around.glob(pattern) if not path.name.startswith("adapter_")]
    if (around / "adapter_config.json").is_file() and not weights:
        got = "an adapter" if folder.is_dir() else "a file of an adapter"
        meant = ["dora-export", "merge", str(around), "--base", base, "-o", "OUT"]
        remedy = f"Merge it, which verifies it too: {shlex.join(meant)}"
    elif not folder.is_dir():
        got = "a file"
        meant = ["dora-export", "verify", str(around) if weights else "MERGED", "--adapter", adapter, "--base", base]
        remedy = f"Name the folder: {shlex.join(meant)}"
    else:
        return
    raise CheckpointError(
        f"{str(folder)!r} is {got}, wanted the folder of a merged model.", remedy=remedy, path=str(folder)
    )


def _merged_dtype(folder: Path) -> torch.dtype | None:
    """What the merge was written in before it became a graph, as its configuration says; None for the base's own."""
    config = read_json(folder)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return dtype if dtype in MERGEABLE_DTYPES else None
