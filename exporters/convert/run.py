"""One conversion: read, say what it means in the other format, and write that; or measure what is lost, then write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dora_serve.adapter import Adapter
from dora_serve.checkpoint import open_checkpoint
from dora_serve.errors import DoraServeError
from dora_serve.formats import ReadOptions, read_adapter
from dora_serve.hub import Located, locate
from dora_serve.output import new_folder
from dora_serve.plan import MergePlan
from dora_serve.progress import OnProgress, ignore_progress
from dora_serve.resolve import plan_merge
from exporters.convert.approximate import Approximation, approximate
from exporters.convert.meaning import Plain, needs_base, plain, require_single_component
from exporters.convert.to_kohya import to_kohya
from exporters.convert.to_mlx import to_mlx
from exporters.convert.to_peft import to_peft
from exporters.convert.to_vllm import to_vllm
from exporters.convert.written import Written, write
from exporters.record import conversion_record, write_record

TARGETS: Mapping[str, Callable[[Plain, str | None], Written]] = {"peft": to_peft, "mlx": to_mlx, "kohya": to_kohya}
LORA, VLLM = "lora", "vllm"
_WHY_BASE = {
    LORA: "the error is measured on the base's weights",
    VLLM: "norm scales are those of the adapter on one base",
}


@dataclass(frozen=True)
class ConvertRequest:
    """What a user asks of `convert`. rank: of `to="lora"`, which is written as PEFT's."""

    adapter: str
    to: str
    base: str | None = None
    rank: int | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    prompts: Path | None = None
    device: str | None = None


@dataclass(frozen=True)
class Conversion:
    """All that will be written, still in memory. located: where the adapter came from. sources: what it was made from,
    which it must not be written over.
    """

    source: Adapter
    located: Located
    to: str
    written: Written
    notes: tuple[str, ...]
    sources: tuple[Path, ...]
    approximation: Approximation | None = None


def convert(request: ConvertRequest, on_progress: OnProgress = ignore_progress) -> Conversion:
    """Everything before the first byte is written.

    The base is read only where the adapter's meaning needs it, or where it is named: then the adapter must fit it too.

    Raises UnmergeableError, with everything that the other format cannot say; what reading and planning raise.
    """
    found = locate(request.adapter, what="adapter", on_progress=on_progress)
    adapter = read_adapter(found.path, request.read)
    require_single_component(adapter)
    why = _WHY_BASE.get(request.to) or needs_base(adapter)
    plan = _plan(request, adapter, why, on_progress)
    sources = (found.path, plan.base.folder) if plan is not None else (found.path,)
    if request.to == LORA:
        assert plan is not None
        assert request.rank is not None
        near = approximate(plan, request.rank, prompts=request.prompts, device=request.device, on_progress=on_progress)
        written = to_peft(near.given, request.base)
        notes = (*adapter.notes, *near.given.notes, *written.notes)
        return Conversion(adapter, found, request.to, written, notes, sources, near)
    given = plain(adapter, plan)
    if request.to == VLLM:
        assert plan is not None
        written = to_vllm(given, request.base, open_checkpoint(plan.base.folder), on_progress)
    else:
        written = TARGETS[request.to](given, request.base)
    notes = (*adapter.notes, *given.notes, *written.notes)
    return Conversion(adapter, found, request.to, written, notes, sources)


def write_conversion(
    conversion: Conversion, out: Path, *, overwrite: bool = False, command: tuple[str, ...] = ()
) -> Path:
    """Write it into a new folder with a `dora_export.json`, all or nothing. Raises OutputError."""
    with new_folder(out, overwrite=overwrite, inputs=conversion.sources) as folder:
        write(conversion.written, folder)
        written = sorted(path for path in folder.iterdir() if path.is_file())
        made = conversion_record(
            conversion.located, conversion.source, conversion.to, command, conversion.notes, written
        )
        write_record(folder, made)
    return out


def _plan(request: ConvertRequest, adapter: Adapter, why: str | None, on_progress: OnProgress) -> MergePlan | None:
    """The merge into the base, None where it is neither named nor needed."""
    if request.base is None and why is None:
        return None
    spec = request.base or adapter.base
    if spec is None:
        raise DoraServeError(
            f"The base is needed for this conversion: {why}.",
            remedy="Name it with --base: a folder, or a Hub id such as user/name@revision.",
        )
    revision = adapter.base_revision if request.base is None and not Path(spec).exists() else None
    located = locate(spec, what="base", revision=revision, on_progress=on_progress)
    return plan_merge(open_checkpoint(located.path), adapter)
