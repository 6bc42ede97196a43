"""What a command works on: an adapter and its base, found, opened, and planned."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dora_serve.adapter import Adapter
from dora_serve.checkpoint import ShardedCheckpoint, open_checkpoint
from dora_serve.errors import DoraServeError
from dora_serve.formats import ReadOptions, read_adapter
from dora_serve.hub import Located, hub_repository, locate
from dora_serve.original_names import of_component
from dora_serve.pipeline_folder import PipelineFolder, is_pipeline, open_pipeline
from dora_serve.pipeline_plan import PipelinePlan, plan_pipeline
from dora_serve.plan import MergePlan
from dora_serve.progress import OnProgress, ignore_progress
from dora_serve.quantized.base import BaseChoice, choose_base
from dora_serve.resolve import plan_merge


@dataclass(frozen=True)
class Sources:
    """Where both were found, and what is in them. notes: what a user should be told of the choice of the base."""

    base: Located
    adapter: Located
    checkpoint: ShardedCheckpoint | PipelineFolder
    contents: Adapter
    notes: tuple[str, ...] = ()


def open_sources(
    adapter: str,
    base: str | None,
    read: ReadOptions,
    on_progress: OnProgress = ignore_progress,
    choice: BaseChoice | None = None,
) -> Sources:
    """Find and read the adapter, then the base that is named or that the adapter says it was trained on.

    Raises AdapterError, CheckpointError, HubError; DoraServeError where no base is named anywhere, or where it may be
    quantized in more than one way and `choice` does not say in which.
    """
    found = locate(adapter, what="adapter", on_progress=on_progress)
    contents = read_adapter(found.path, read)
    spec = base or contents.base
    if spec is None:
        raise DoraServeError(
            f"The adapter {adapter!r} does not say what it was trained on.",
            remedy="Name the base model with --base: a folder, or a Hub id such as user/name@revision.",
        )
    revision = contents.base_revision if base is None and not Path(spec).exists() else None
    located = locate(spec, what="base", revision=revision, on_progress=on_progress)
    checkpoint = open_base(located.path)
    if isinstance(checkpoint, PipelineFolder):
        _require_plain_choice(choice)
        return Sources(located, found, checkpoint, contents)
    contents = of_component(contents, checkpoint)
    chosen = choose_base(checkpoint, contents, choice or BaseChoice())
    return Sources(located, found, chosen.checkpoint, contents, chosen.notes)


def _require_plain_choice(choice: BaseChoice | None) -> None:
    if choice not in (None, BaseChoice()):
        raise DoraServeError(
            "--base-quantization and --merge-into are for the base of one model, and this one is a pipeline.",
            remedy="Leave them out, or name the folder of the component with --base.",
        )


def open_base(path: Path) -> ShardedCheckpoint | PipelineFolder:
    """A model, or a diffusers pipeline. Raises CheckpointError."""
    return open_pipeline(path) if is_pipeline(path) else open_checkpoint(path)


def plan_sources(sources: Sources, dtype: torch.dtype | None = None) -> MergePlan | PipelinePlan:
    """The plan of the merge, which notes another base than the adapter's own. Raises PlanError."""
    plan: MergePlan | PipelinePlan
    if isinstance(sources.checkpoint, PipelineFolder):
        plan = plan_pipeline(sources.checkpoint, sources.contents, dtype=dtype)
    else:
        plan = plan_merge(sources.checkpoint, sources.contents, dtype=dtype)
    return replace(plan, notes=(*plan.notes, *sources.notes, *base_notes(sources.contents, sources.base)))


def base_notes(adapter: Adapter, base: Located) -> tuple[str, ...]:
    """What to say where both name a Hub repository for the base, and not the same one. A note only: copies abound."""
    trained_on = hub_repository(adapter.base) if adapter.base else None
    if trained_on is None or base.repo_id is None or trained_on.lower() == base.repo_id.lower():
        return ()
    said = f"The adapter says that it was trained on {trained_on}, and the base is {base.repo_id}"
    if _letters_and_digits(trained_on) == _letters_and_digits(base.repo_id):
        return (f"{said}: of the same name, and not necessarily of the same weights.",)
    return (f"{said}: if the one is no copy of the other, the result is neither model.",)


def _letters_and_digits(repo_id: str) -> str:
    return re.sub(r"[^a-z0-9]", "", repo_id.rpartition("/")[2].lower())
