"""A folder of ONNX Runtime GenAI in that runtime: a generator for each row, which keeps the row's cache.

Rows do not share a run, so that what is beside a row cannot change its numbers. Adapters are that runtime's own, over
the same `.onnx_adapter` files.
"""

from __future__ import annotations

import json
import shlex
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_serve.checkpoint import read_json
from dora_serve.errors import CheckpointError, EngineError, UnavailableError
from dora_serve.onnx_engine.adapters import AdapterFile, unreadable
from dora_serve.onnx_engine.graph import MODEL_FILE, slot_table
from dora_serve.onnx_engine.slots import METADATA_KEY, SlotTable

CONFIG_FILE = "genai_config.json"
_NAME = "adapter"
_SHARED = 4096
"""Tokens of a row up to which its cache is reserved at once, where the graph can use that; it grows otherwise."""


def is_genai(folder: Path) -> bool:
    """Whether a folder says how that runtime runs it."""
    return (folder / CONFIG_FILE).is_file()


class Generators:
    """`dora_serve.engine.generation.Cache`: the generators of the rows, by place."""

    def __init__(self, rows: int) -> None:
        self.rows: list[Any] = [None] * rows
        self.filling: int | None = None
        self.most = 0

    def begin_fill(self, row: int, most: int) -> None:
        self.filling, self.most = row, most

    def begin_step(self, count: int, device: torch.device) -> None:
        self.filling = None
        self.rows[count:] = [None] * (len(self.rows) - count)

    def end(self, tokens: int) -> None:
        """Nothing: the generators know."""

    def move(self, source: int, target: int) -> None:
        self.rows[target] = self.rows[source]


@dataclass(frozen=True, eq=False)
class _Loaded:
    """An adapter in the runtime, which keeps it as long as a generator uses it."""

    adapters: Any


class GenaiRunner:
    """`dora_serve.onnx_engine.runner.Runner`."""

    mixed = False
    closeness = 0.0  # a row's numbers are its own

    def __init__(self, folder: Path, *, device: str | None = None, threads: int | None = None) -> None:
        """device: "cpu", "cuda" or "cuda:N"; None for what the folder was made for.

        Raises UnavailableError without the runtime or the device, and for slots that it cannot fill; CheckpointError
        for a folder that it does not load.
        """
        self._og = og = _runtime(folder)
        self.vocabulary, self.context, self._shares = _facts(folder)
        self.table = _table(folder)
        try:
            config = og.Config(str(folder))
            _choose(og, config, device)
            # Its errors are raised as well, and a library does not print; spinning threads take cores from others.
            session: dict[str, Any] = {"log_severity_level": 4, "session.intra_op.allow_spinning": "0"}
            if threads is not None:
                session["intra_op_num_threads"] = threads
            # No token pads: the runtime takes trailing padding off a prompt, and an end token often is what pads.
            config.overlay(json.dumps({"model": {"pad_token_id": -1, "decoder": {"session_options": session}}}))
            self._model = og.Model(config)
        except UnavailableError:
            raise
        except Exception as error:  # the runtime's exceptions have no base of their own
            if (made_for := _made_for(folder)) is not None:
                raise UnavailableError(
                    f"{str(folder)!r} was made for {made_for}, and ONNX Runtime GenAI does not run it here"
                    f"{' on the CPU' if device == 'cpu' else ''}: {_said(error)}",
                    remedy=f"Run it on a machine with {made_for} and onnxruntime-genai-{made_for.lower()}, or export "
                    "for the CPU: dora-export merge ADAPTER --to onnx-adapters --runtime genai -o FOLDER",
                    path=str(folder),
                ) from error
            raise CheckpointError(
                f"{str(folder)!r} cannot be loaded by ONNX Runtime GenAI: {_said(error)}",
                remedy="Export it again: dora-export merge ADAPTER --to onnx-adapters --runtime genai -o FOLDER",
                path=str(folder),
            ) from error
        self.provider = f"GenAI, {self._model.device_type}"
        self._lock = threading.RLock()

    def put(self, file: AdapterFile) -> _Loaded:
        with self._lock:
            loaded = self._og.Adapters(self._model)
            try:
                loaded.load(str(file.path), _NAME)
            except Exception as error:  # the runtime's exceptions have no base of their own
                raise unreadable(file.path, "ONNX Runtime GenAI does not take it") from error
        return _Loaded(loaded)

    def take_out(self, adapter: _Loaded) -> None:
        """Nothing: it goes with the last that knows it."""

    def new_cache(self, rows: int) -> Generators:
        return Generators(rows)

    def forward(self, adapters: Sequence[_Loaded | None], tokens: Tensor, cache: Generators) -> Tensor:
        with self._lock:
            if cache.filling is not None:
                cache.rows[cache.filling] = self._generator(adapters[0], cache.most)
                return self._logits(cache.rows[cache.filling], tokens[0])[None]
            rows = zip(cache.rows, tokens, strict=False)
            return torch.stack([self._logits(generator, row) for generator, row in rows])

    def logits_alone(self, adapter: _Loaded | None, tokens: Sequence[int]) -> Tensor:
        with self._lock:
            return self._logits(self._generator(adapter, len(tokens) + 1), torch.tensor(tokens))

    def _generator(self, adapter: _Loaded | None, most: int) -> Any:
        length = most if self.context is None else min(most, self.context)
        try:
            parameters = self._og.GeneratorParams(self._model)
            shares = self._shares and length <= _SHARED
            parameters.set_search_options(max_length=length, do_sample=False, past_present_share_buffer=shares)
            generator = self._og.Generator(self._model, parameters)
            if adapter is not None:
                generator.set_active_adapter(adapter.adapters, _NAME)
        except Exception as error:  # the runtime's exceptions have no base of their own
            raise _cannot_run(error) from error
        return generator

    def _logits(self, generator: Any, tokens: Tensor) -> Tensor:
        """(vocabulary,) after these further tokens."""
        try:
            generator.append_tokens(tokens.numpy().astype(np.int32)[None])
            logits = np.asarray(generator.get_logits())
        except Exception as error:  # the runtime's exceptions have no base of their own
            raise _cannot_run(error) from error
        return torch.from_numpy(logits.reshape(-1, logits.shape[-1])[-1].astype(np.float32))


def _runtime(folder: Path) -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise UnavailableError(
            f"{str(folder)!r} is a folder of ONNX Runtime GenAI, whose graph counts positions in a way of its own, and "
            "onnxruntime-genai is not installed here.",
            remedy="Run the same with a Python that has it (make genai-env, or a new environment with: pip install "
            f"'dora-serve[genai]'): PYTHON -m dora_serve.cli generate {shlex.quote(str(folder))} ... Or export without "
            "--runtime genai.",
            path=str(folder),
            python=sys.executable,
        ) from error
    return onnxruntime_genai


def _facts(folder: Path) -> tuple[int, int | None, bool]:
    """Vocabulary, context, and whether the cache can be reserved at once, as the configuration says."""
    said: Any = read_json(folder, CONFIG_FILE)
    try:
        vocabulary, context = int(said["model"]["vocab_size"]), int(said["model"]["context_length"])
        return vocabulary, context, bool(said["search"]["past_present_share_buffer"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{CONFIG_FILE} in {str(folder)!r} does not say what it has to: {error!r}.",
            remedy="Export it again.",
            path=str(folder),
        ) from error


def _table(folder: Path) -> SlotTable | None:
    """The slots of the graph, whose metadata the runtime does not show."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    path = folder / MODEL_FILE
    try:
        graph = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}.", path=str(path)) from error
    said = {entry.key: entry.value for entry in graph.metadata_props}
    table = slot_table(said.get(METADATA_KEY), path)
    if table is not None and (table.mixed or table.required):
        what = "slots for mixed batches" if table.mixed else "slots without default values"
        raise UnavailableError(
            f"The graph in {str(folder)!r} has {what}, and ONNX Runtime GenAI swaps one adapter for a whole run.",
            remedy="Export it without --mixed-batches and --slot-inputs.",
            path=str(folder),
        )
    return table


def _choose(og: Any, config: Any, device: str | None) -> None:
    """Let the folder run on another device than the one that it was made for."""
    if device is None:
        return
    config.clear_providers()
    if device.startswith("cuda"):
        if not og.is_cuda_available():
            raise UnavailableError(
                "This onnxruntime-genai has no CUDA.",
                remedy="Install onnxruntime-genai-cuda in its place, or say --device cpu.",
            )
        config.append_provider("cuda")
        config.set_provider_option("cuda", "device_id", device.partition(":")[2] or "0")


def _made_for(folder: Path) -> str | None:
    """The provider that the builder was told, None for the CPU."""
    said: Any = read_json(folder, CONFIG_FILE)
    options = said["model"]["decoder"].get("session_options", {}).get("provider_options") or [{}]
    return next((name.upper() for name in options[0]), None)


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _cannot_run(error: Exception) -> EngineError:
    return EngineError(f"ONNX Runtime GenAI cannot run the graph: {_said(error)}")
