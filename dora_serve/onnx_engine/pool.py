"""Adapter files by name, loaded and unloaded while requests run."""

from __future__ import annotations

import os
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_serve.engine.adapter_names import not_loaded, require_name, require_unused
from dora_serve.engine.pool import AdapterInfo, LoadReport
from dora_serve.engine.sound import require
from dora_serve.errors import AdapterError, UnavailableError
from dora_serve.onnx_engine.adapters import AdapterFile, read_adapter_file
from dora_serve.onnx_engine.runner import Runner
from dora_serve.onnx_engine.slots import SlotTable


@dataclass(eq=False)
class OnnxAdapter:
    """A loaded adapter. ready: what its runner gave for it. users: requests that hold it."""

    name: str
    file: AdapterFile
    ready: Any
    report: LoadReport
    users: int = 0


class OnnxPool:
    """folder: the graph's."""

    def __init__(self, runner: Runner, folder: Path) -> None:
        self._runner, self._folder = runner, folder
        self._entries: dict[str, OnnxAdapter] = {}
        self._replaced: list[OnnxAdapter] = []
        self._lock = threading.RLock()

    def load(self, name: str, path: Path | str, *, replace: bool = False, **_: object) -> LoadReport:
        """Read an `.onnx_adapter` file; requests may name it from then on.

        Raises EngineError for a name that is taken (unless `replace`), UnavailableError for a graph without slots,
        AdapterError and PlanError for a file that is unsound or of another base. Then nothing has changed.
        """
        table = self._require(name, replace)
        began = time.perf_counter()
        file = read_adapter_file(self._file(path), table)
        with self._lock:
            self._require(name, replace)
            old = self._entries.get(name)
            report = LoadReport(
                name=name,
                modules=len(file.slots),
                method=file.method,
                rank=file.rank,
                nbytes=file.nbytes,
                seconds=time.perf_counter() - began,
                changes_output=file.changes_anything,
                replaced=old is not None,
            )
            self._entries[name] = OnnxAdapter(name, file, self._runner.put(file), report)
            if old is not None:
                self._replaced.append(old)
                self._forget_unused()
        return report

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises EngineError where there is none of that name or requests are using it."""
        with self._lock:
            entry = self._entry(name)
            require_unused(name, self._users(name))
            del self._entries[name]
            self._runner.take_out(entry.ready)

    def list(self) -> tuple[AdapterInfo, ...]:
        """All adapters, by name."""
        with self._lock:
            return tuple(self._info(self._entries[name]) for name in sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def acquire(self, name: str) -> tuple[OnnxAdapter, Callable[[], None]]:
        """The adapter, and what to call once when it is no longer used. Raises EngineError where there is none."""
        with self._lock:
            entry = self._entry(name)
            entry.users += 1
        return entry, lambda: self._release(entry)

    def _release(self, entry: OnnxAdapter) -> None:
        with self._lock:
            entry.users -= 1
            self._forget_unused()

    def _forget_unused(self) -> None:
        for entry in [one for one in self._replaced if not one.users]:
            self._replaced.remove(entry)
            self._runner.take_out(entry.ready)

    def _file(self, path: Path | str) -> Path:
        require("path", path, isinstance(path, (str, Path)), "an .onnx_adapter file")
        given = Path(os.path.abspath(Path(path).expanduser()))
        if given.is_dir() or given.suffix == ".safetensors":
            command = shlex.join(["dora-export", "onnx-adapter", str(given), "--for", str(self._folder)])
            raise AdapterError(
                f"{str(given)!r} is an adapter as it was trained, wanted an .onnx_adapter file for this base.",
                remedy=f"Make it: {command}",
                path=str(given),
            )
        return given

    def _entry(self, name: str) -> OnnxAdapter:
        entry = self._entries.get(name)
        if entry is None:
            raise not_loaded(name, self._entries)
        return entry

    def _require(self, name: str, replace: bool) -> SlotTable:
        table = self._runner.table
        if table is None:
            raise UnavailableError(
                f"The graph in {str(self._folder)!r} has no adapter slots, so that nothing can be swapped on it.",
                remedy="Export the base with: dora-export merge ADAPTER --to onnx-adapters -o FOLDER",
            )
        require_name(name, {known: entry.file.path for known, entry in self._entries.items()}, replace)
        return table

    def _users(self, name: str) -> int:
        return sum(one.users for one in (*self._entries.values(), *self._replaced) if one.name == name)

    def _info(self, entry: OnnxAdapter) -> AdapterInfo:
        report = entry.report
        return AdapterInfo(
            name=entry.name,
            path=entry.file.path,
            format="onnx_adapter",
            method=report.method,
            rank=report.rank,
            modules=report.modules,
            nbytes=report.nbytes,
            tier="device",
            pinned=False,
            in_use=self._users(entry.name),
            load_seconds=report.seconds,
            changes_output=report.changes_output,
        )
