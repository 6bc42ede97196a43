"""What transformers calls a checkpoint's tensors at run time: run as a program, so that a merge need not import it.

transformers 5 renames, fuses and splits tensors while it loads them (transformers/conversion_mapping.py), and an
adapter carries the names of the model that was trained. The program builds the model without memory (meta device) and
prints, as JSON, where each of its parameters comes from, which of them are tied, and which the checkpoint lacks.

    python -m dora_serve.runtime_names FOLDER [ARCHITECTURE]
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
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
    """origins: by run-time parameter name. tied: run-time name to the name of the parameter that it shares.

    missing: parameters that nothing in the checkpoint gives a value, and that are not tied to one that has.
    transposed: modules whose 3-D parameters are (experts, in, out). linear: those that transformers replaces where it
    quantizes a model that it loads.
    """

    origins: Mapping[str, Origin]
    tied: Mapping[str, str]
    missing: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()


def runtime_names(folder: Path, architecture: str | None = None) -> RuntimeNames | None:
    """Ask transformers, in a process of its own; None where it is not installed or cannot build this model.

    architecture: the class that the checkpoint was loaded into for the training, where its config.json names another.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    command = [sys.executable, "-m", "dora_serve.runtime_names", str(folder), *([architecture] if architecture else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    return parse(json.loads(done.stdout.splitlines()[-1]))


def parse(table: Mapping[str, Any]) -> RuntimeNames:
    """What `describe` found, as it came through JSON."""
    origins = {
        name: Origin(entry["operation"], tuple(map(tuple, entry["groups"])), entry["part"], entry["parts"])
        for name, entry in table["origins"].items()
    }
    lists = (tuple(table[key]) for key in ("missing", "transposed", "linear"))
    return RuntimeNames(origins, table["tied"], *lists)


def describe(folder: Path, architecture: str | None = None) -> dict[str, Any]:
    """What the program prints. Imports transformers; raises whatever that raises for a model it cannot build."""
    import torch
    import transformers
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    from dora_serve.checkpoint import open_checkpoint
    from dora_serve.quantized.view import dense_view

    config = AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, architecture or (config.architectures or ["AutoModel"])[0])
    with torch.device("meta"):
        model = model_class(config) if model_class is not transformers.AutoModel else model_class.from_config(config)
    state = dict(model.state_dict())
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings: Any = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    by_source = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, dict[str, list[str]]] = {}
    for key in dense_view(open_checkpoint(folder)).tensors:
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        collected.setdefault(renamed, {}).setdefault(pattern or "", []).append(key)
    origins: dict[str, Any] = {}
    for renamed, by_pattern in collected.items():
        converter = by_source.get(next(iter(by_pattern)))
        origins.update(_origins_of(renamed, by_pattern, converter))
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    transposed = [name for name, module in model.named_modules() if getattr(module, "is_transposed", False)]
    return {
        "origins": origins,
        "tied": tied,
        "missing": _missing(model, origins.keys(), tied),
        "transposed": transposed,
        "linear": _quantizable(model),
    }


def _quantizable(model: Any) -> list[str]:
    """The modules that quantizers/quantizer_bnb_4bit.py would replace, with no module named to be skipped."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, Conv1D)]
    return [name for name in linear if should_convert_module(name, kept)]


def _missing(model: Any, given: Collection[str], tied: Mapping[str, str]) -> list[str]:
    sharing: dict[str, set[str]] = {}
    for target, source in tied.items():
        sharing.setdefault(source, {source}).add(target)
    had = set(given) | {name for group in sharing.values() if group & set(given) for name in group}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    wanted = [name for name, _ in model.named_parameters() if name not in had]
    return [name for name in wanted if not any(pattern.search(name) for pattern in optional)]


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
    first, targets = converter.target_patterns[0], converter.target_patterns
    named = [renamed.replace(first, target) for target in targets]
    if operations == [("Chunk", 0)]:
        return {name: entry("chunk", groups, part, len(targets)) for part, name in enumerate(named)}
    return {name: entry(" + ".join(name for name, _ in operations), groups) for name in named}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which layer 10 comes after layer 9, as transformers orders the experts it stacks."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe(Path(sys.argv[1]), *sys.argv[2:3])))
