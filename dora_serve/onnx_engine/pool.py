"""Adapter files by name, loaded and unloaded while requests run."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_serve.engine.pool import BASE_NAME, AdapterInfo, LoadReport
from dora_serve.engine.sound import require
from dora_serve.errors import AdapterError, EngineError, UnavailableError
from dora_serve.onnx_engine.adapters import AdapterFile, Feeding, Inputs, Switch, Tables, read_adapter_file
from dora_serve.onnx_engine.slots import SlotTable

_MADE_BY = "dora-export onnx-adapter ADAPTER --for EXPORTED_BASE"


@dataclass(eq=False)
class OnnxAdapter:
    """A loaded adapter. switch: of a graph for one adapter a run; slot: its place in the tables of one for mixed
    batches. changes_output: whether anything in the file does. users: requests that hold it.
    """

    name: str
    file: AdapterFile
    switch: Feeding | None
    slot: int
    report: LoadReport
    users: int = 0
    is_replaced: bool = False


class OnnxPool:
    """tables: those of a graph for mixed batches, else None. lock: held while a run reads them. folder: the graph's."""

    def __init__(self, table: SlotTable | None, tables: Tables | None, lock: Any, folder: Path) -> None:
        self._table, self._tables, self._running, self._folder = table, tables, lock, folder
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
        switch: Feeding | None = None if table.mixed else Inputs(table, file) if table.required else Switch(file)
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
            entry = OnnxAdapter(name, file, switch, self._put(file), report)
            self._entries[name] = entry
            if old is not None:
                old.is_replaced = True
                self._replaced.append(old)
                self._forget_unused()
        return report

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises EngineError where there is none of that name or requests are using it."""
        with self._lock:
            entry = self._entry(name)
            users = self._users(name)
            if users:
                count = "1 request is" if users == 1 else f"{users} requests are"
                raise EngineError(
                    f"The adapter {name!r} is not unloaded: {count} using it.",
                    remedy="Wait until they end, or cancel them. An adapter can be replaced while it is in use.",
                    adapter=name,
                    in_use=users,
                )
            del self._entries[name]
            self._take_out(entry)

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
            self._take_out(entry)

    def _put(self, file: AdapterFile) -> int:
        if self._tables is None:
            return 0
        with self._running:
            return self._tables.fill(file)

    def _take_out(self, entry: OnnxAdapter) -> None:
        if self._tables is not None:
            with self._running:
                self._tables.replace(entry.slot, None)

    def _file(self, path: Path | str) -> Path:
        require("path", path, isinstance(path, (str, Path)), "an .onnx_adapter file")
        given = Path(os.path.abspath(Path(path).expanduser()))
        if given.is_dir() or given.suffix == ".safetensors":
            raise AdapterError(
                f"{str(given)!r} is an adapter as it was trained, wanted an .onnx_adapter file for this base.",
                remedy=f"Make it: dora-export onnx-adapter {given} --for {self._folder}",
                path=str(given),
            )
        return given

    def _entry(self, name: str) -> OnnxAdapter:
        entry = self._entries.get(name)
        if entry is None:
            loaded = ", ".join(sorted(self._entries)) or "none"
            raise EngineError(
                f"There is no adapter {name!r} (loaded: {loaded}).", remedy="Load it first.", adapter=name
            )
        return entry

    def _require(self, name: str, replace: bool) -> SlotTable:
        if self._table is None:
            raise UnavailableError(
                f"The graph in {str(self._folder)!r} has no adapter slots, so that nothing can be swapped on it.",
                remedy="Export the base with: dora-export merge ADAPTER --to onnx-adapters -o FOLDER",
            )
        if not isinstance(name, str) or not name or name == BASE_NAME:
            raise EngineError(
                f"An adapter cannot be called {name!r}" + (": that is the base's name." if name else "."),
                remedy="Give it another name.",
            )
        if name in self._entries and not replace:
            raise EngineError(
                f"There is an adapter {name!r} already, from {str(self._entries[name].file.path)!r}.",
                remedy="Give this one another name, or load it with replace=True.",
                adapter=name,
            )
        return self._table

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
