"""A merged model as an ordinary Hugging Face folder, in the base's own layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from dora_serve.checkpoint import CONFIG_NAME
from dora_serve.merge import merge
from dora_serve.plan import MergePlan, MergeReport
from dora_serve.progress import OnProgress, ignore_progress


def write_model(
    plan: MergePlan,
    folder: Path,
    *,
    metadata: Mapping[str, str],
    device: str = "cpu",
    on_progress: OnProgress = ignore_progress,
) -> MergeReport:
    """Weights, index, configuration and side files into `folder`, which exists and is empty.

    Same shards and index as the base. Raises what `dora_serve.merge.merge` raises.
    """
    report = merge(plan, folder, metadata=metadata, device=device, on_progress=on_progress)
    _write_index(plan, folder)
    for source, relative in plan.side_files:
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(relative) == CONFIG_NAME and plan.config_changes:
            target.write_text(_changed_config(plan), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    return report


def _write_index(plan: MergePlan, folder: Path) -> None:
    if plan.base.index is None:
        return
    weight_map = {name: tensor.file for name, tensor in sorted(plan.tensors.items())}
    metadata = dict(plan.base.index_metadata) | {"total_size": plan.nbytes}
    if plan.untied or len(plan.tensors) != len(plan.base.tensors):
        metadata.pop("total_parameters", None)
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / plan.base.index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _changed_config(plan: MergePlan) -> str:
    config = json.loads(json.dumps(plan.base.config))
    for path, value in plan.config_changes.items():
        table = config
        for key in path[:-1]:
            table = table[key]
        if value is None:
            table.pop(path[-1], None)
        else:
            table[path[-1]] = value
    return json.dumps(config, indent=2) + "\n"
