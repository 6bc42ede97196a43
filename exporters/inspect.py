"""What an adapter is, and what a merge of it into a base would meet."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

from dora_serve.adapter import Adapter, LazyTensor
from dora_serve.decomposition import Decomposition, decompose
from dora_serve.errors import CheckpointError, DoraServeError, PlanError
from dora_serve.formats import ReadOptions, read_adapter
from dora_serve.hub import locate, split_spec
from dora_serve.hub_files import What
from dora_serve.hub_headers import Outline, locate_headers, whole
from dora_serve.pipeline_plan import PipelinePlan
from dora_serve.plan import MergePlan
from dora_serve.progress import OnProgress, ignore_progress
from dora_serve.terminal import format_bytes
from exporters.sources import Sources, base_notes, open_base, plan_sources


@dataclass(frozen=True)
class Target:
    """Adapted modules that share their last name: how many, with which ranks and scalings (each with its count)."""

    name: str
    kind: str
    modules: int
    ranks: Mapping[int, int]
    scalings: Mapping[float, int]
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """path: None where the adapter is on the Hub and only its headers were read. source: the path, or the Hub's name
    with the commit. parameters: trained numbers. plan: what a merge into `base` would do, None without one. problems:
    sentences. decomposition: what happens to magnitudes and directions, where that was asked for.
    """

    path: Path | None
    source: str
    format: str
    method: str
    trained_on: str | None
    revision: str | None
    task_type: str | None
    targets: tuple[Target, ...]
    replacements: tuple[str, ...]
    dtypes: Mapping[str, int]
    parameters: int
    nbytes: int
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    plan: Mapping[str, object] | None = None
    decomposition: Decomposition | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "path": str(self.path) if self.path else None,
            "source": self.source,
            "format": self.format,
            "method": self.method,
            "base": self.trained_on,
            "revision": self.revision,
            "task_type": self.task_type,
            "modules": sum(target.modules for target in self.targets),
            "targets": [
                {
                    "name": target.name,
                    "kind": target.kind,
                    "modules": target.modules,
                    "ranks": {str(rank): count for rank, count in target.ranks.items()},
                    "scalings": {str(scaling): count for scaling, count in target.scalings.items()},
                    "parameters": target.parameters,
                }
                for target in self.targets
            ],
            "replacements": list(self.replacements),
            "dtypes": dict(self.dtypes),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "notes": list(self.notes),
            "problems": list(self.problems),
            "plan": dict(self.plan) if self.plan else None,
            "decomposition": self.decomposition.to_json() if self.decomposition else None,
        }


def inspect(
    adapter: str,
    base: str | None,
    read: ReadOptions,
    on_progress: OnProgress = ignore_progress,
    *,
    with_decomposition: bool = False,
) -> Inspection:
    """Read an adapter and, where a base is given, plan its merge; what would stop that is in `problems`.

    Of what lies on the Hub alone the headers are read, by HTTP range, and no weights are fetched.
    with_decomposition: read all weights that are adapted, and say how far magnitudes and directions move.

    Raises AdapterError for one that cannot be read at all, CheckpointError and HubError for a base that cannot.
    """
    with ExitStack() as stack:

        def find(spec: str, what: What) -> Outline:
            if with_decomposition:
                return whole(locate(spec, what=what, on_progress=on_progress))
            return stack.enter_context(locate_headers(spec, what=what, on_progress=on_progress))

        outline = find(adapter, "adapter")
        return _inspect(outline, base, read, find, on_progress if with_decomposition else None)


def _inspect(
    outline: Outline,
    base: str | None,
    read: ReadOptions,
    find: Callable[[str, What], Outline],
    decomposing: OnProgress | None,
) -> Inspection:
    """decomposing: what hears of that, None where it was not asked for."""
    found = outline.located
    contents = read_adapter(found.path, read)
    problems: tuple[str, ...] = ()
    notes = (*contents.notes, *_notes(outline))
    plan, decomposition = None, None
    if base is not None:
        located = find(base, "base").located
        notes += base_notes(contents, located)
        sources = Sources(located, found, open_base(located.path), contents)
        try:
            planned = plan_sources(sources)
            plan = planned.summary()
            decomposition = _decompose(planned, decomposing) if decomposing else None
        except PlanError as error:
            problems = tuple(str(problem) for problem in error.problems)
        except CheckpointError as error:
            problems = (str(error),)
    tensors = _tensors(contents)
    return Inspection(
        path=found.path if outline.fetched == outline.nbytes else None,
        source=_source(outline),
        format=contents.format,
        method=contents.method,
        trained_on=contents.base,
        revision=contents.base_revision,
        task_type=contents.task_type,
        targets=_targets(contents),
        replacements=tuple(
            [f"{change.name} {list(change.tensor.shape)}" for change in contents.replacements]
            + [f"{rows.module}: {len(rows.indices)} token rows" for rows in contents.token_rows]
        ),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
        parameters=sum(prod(tensor.shape) for tensor in tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        notes=notes,
        problems=problems,
        plan=plan,
        decomposition=decomposition,
    )


def _source(outline: Outline) -> str:
    found = outline.located
    if found.repo_id is None or outline.fetched == outline.nbytes:
        return str(found.path)
    named = split_spec(found.spec)
    folder = f":{named.subfolder}" if named and named.subfolder else ""
    return f"{found.repo_id}@{found.revision}{folder}"


def _notes(outline: Outline) -> tuple[str, ...]:
    if outline.fetched == outline.nbytes:
        return ()
    read, whole = format_bytes(outline.fetched), format_bytes(outline.nbytes)
    return (f"Only the header was read, {read} of {whole}; a value that is NaN or infinite is found by a merge.",)


def _decompose(plan: MergePlan | PipelinePlan, on_progress: OnProgress) -> Decomposition:
    if isinstance(plan, PipelinePlan):
        raise DoraServeError(
            "What an adapter changes is told of one model, and this base is a pipeline of several.",
            remedy="Leave out --decompose and --plot.",
        )
    return decompose(plan, on_progress)


def _tensors(adapter: Adapter) -> list[LazyTensor]:
    found: list[LazyTensor] = []
    for module in adapter.modules:
        optional = (module.magnitude, module.lora_bias)
        found += [module.lora_A, module.lora_B, *(tensor for tensor in optional if tensor is not None)]
    for expert in adapter.experts:
        found += [expert.lora_A, expert.lora_B]
    found += [change.tensor for change in adapter.replacements]
    found += [rows.rows for rows in adapter.token_rows]
    return found


def _targets(adapter: Adapter) -> tuple[Target, ...]:
    grouped: dict[tuple[str, str], list[tuple[int, float, int]]] = defaultdict(list)
    for module in adapter.modules:
        size = prod(module.lora_A.shape) + prod(module.lora_B.shape)
        size += prod(module.magnitude.shape) if module.magnitude else 0
        grouped[(module.module.rpartition(".")[2], module.kind)].append((module.rank, module.scaling, size))
    for expert in adapter.experts:
        size = prod(expert.lora_A.shape) + prod(expert.lora_B.shape)
        name = f"{expert.module.rpartition('.')[2]} ({', '.join(expert.parameters)})"
        grouped[(name, "experts")].append((expert.rank, expert.scaling, size))
    return tuple(
        Target(
            name=name,
            kind=kind,
            modules=len(members),
            ranks=dict(Counter(rank for rank, _, _ in members)),
            scalings=dict(Counter(scaling for _, scaling, _ in members)),
            parameters=sum(size for _, _, size in members),
        )
        for (name, kind), members in sorted(grouped.items())
    )
