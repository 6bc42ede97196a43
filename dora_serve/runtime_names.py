"""What transformers calls a checkpoint's tensors at run time: run as a program, so that a merge need not import it.

transformers 5 renames, fuses and splits tensors while it loads them (transformers/conversion_mapping.py), and an
adapter carries the names of the model that was trained. The program builds the model without memory (meta device) and
prints, as JSON, where each of its parameters comes from and which of them are tied.

    python -m dora_serve.runtime_names FOLDER
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Origin:
    """How one run-time parameter is made of stored tensors.

    groups: stored names; one group of one name is a plain rename. operation: "rename"; "concat" (the groups, one name
    each, along dim 0); "experts" (each group stacked along a new dim 0, the groups then concatenated along dim 1);
    "chunk" (part `part` of `parts` of the one stored tensor along dim 0); or the name of what is not understood.
    """

    operation: str
    groups: tuple[tuple[str, ...], ...]
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class RuntimeNames:
    """origins: by run-time parameter name. tied: run-time name to the name of the parameter that it shares."""

    origins: Mapping[str, Origin]
    tied: Mapping[str, str]


def runtime_names(folder: Path) -> RuntimeNames | None:
    """Ask transformers, in a process of its own; None where it is not installed or cannot build this model."""
    if importlib.util.find_spec("transformers") is None:
        return None
    command = [sys.executable, "-m", "dora_serve.runtime_names", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    table = json.loads(done.stdout.splitlines()[-1])
    origins = {
        name: Origin(entry["operation"], tuple(map(tuple, entry["groups"])), entry["part"], entry["parts"])
        for name, entry in table["origins"].items()
    }
    return RuntimeNames(origins, table["tied"])


def _describe(folder: Path) -> dict[str, Any]:
    import torch
    import transformers
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    from dora_serve.checkpoint import open_checkpoint

    config = AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    with torch.device("meta"):
        model = model_class(config) if model_class is not transformers.AutoModel else model_class.from_config(config)
    state = dict(model.state_dict())
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings: Any = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    by_source = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, dict[str, list[str]]] = {}
    for key in open_checkpoint(folder).tensors:
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        collected.setdefault(renamed, {}).setdefault(pattern or "", []).append(key)
    origins: dict[str, Any] = {}
    for renamed, by_pattern in collected.items():
        converter = by_source.get(next(iter(by_pattern)))
        origins.update(_origins_of(renamed, by_pattern, converter))
    return {"origins": origins, "tied": dict(getattr(model, "all_tied_weights_keys", None) or {})}


def _origins_of(renamed: str, by_pattern: dict[str, list[str]], converter: Any) -> dict[str, Any]:
    def entry(operation: str, groups: list[list[str]], part: int = 0, parts: int = 1) -> dict[str, Any]:
        return {"operation": operation, "groups": groups, "part": part, "parts": parts}

    if converter is None:
        return {renamed: entry("rename", [next(iter(by_pattern.values()))])}
    operations = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    groups = [sorted(by_pattern[key], key=_natural) for key in converter.source_patterns if key in by_pattern]
    if operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return {renamed: entry("experts", groups)}
    if operations == [("Concatenate", 0)]:
        return {renamed: entry("concat", groups)}
    if operations == [("Chunk", 0)]:
        first, targets = converter.target_patterns[0], converter.target_patterns
        return {
            renamed.replace(first, target): entry("chunk", groups, part, len(targets))
            for part, target in enumerate(targets)
        }
    return {renamed: entry(" + ".join(name for name, _ in operations), groups)}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which layer 10 comes after layer 9, as transformers orders the experts it stacks."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_describe(Path(sys.argv[1]))))
