"""Adapters by name, in three tiers: ready on the device, ready in host memory, or only known on disk.

What was used last stays nearest; what a request is using, and what is pinned, stays where it is. Replacing an adapter
does not touch requests that run: they hold the one that they began with. Safe to call from several threads.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dora_serve.adapter import Adapter
from dora_serve.engine.adapter_names import not_loaded, require_name, require_unused
from dora_serve.engine.factors import Base, PreparedAdapter, prepare
from dora_serve.engine.known_scales import known_scales
from dora_serve.engine.sound import is_whole, require
from dora_serve.errors import AdapterError, EngineError
from dora_serve.formats import ReadOptions, read_adapter
from dora_serve.hub import locate
from dora_serve.progress import OnProgress, Progress, ignore_progress

Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Limits:
    """Of a tier: adapters, bytes, both or neither."""

    count: int | None = None
    nbytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("nbytes", self.nbytes)):
            require(name, value, value is None or (is_whole(value) and value >= 0), "a whole number, or none")

    def hold(self, sizes: list[int]) -> bool:
        """Whether adapters of these sizes fit."""
        return (self.count is None or len(sizes) <= self.count) and (self.nbytes is None or sum(sizes) <= self.nbytes)


@dataclass(frozen=True)
class LoadReport:
    """modules: how many layers the adapter touches. changes_output: whether the output of any of them changes on a
    probe, None where there was none. replaced: whether there was an adapter of that name.
    """

    name: str
    modules: int
    method: str
    rank: int
    nbytes: int
    seconds: float
    changes_output: bool | None
    replaced: bool


@dataclass(frozen=True)
class AdapterInfo:
    """One line of `list`. in_use: requests that hold an adapter of this name, be it one that was replaced."""

    name: str
    path: Path
    format: str
    method: str
    rank: int
    modules: int
    nbytes: int
    tier: Tier
    pinned: bool
    in_use: int
    load_seconds: float
    changes_output: bool | None


@dataclass(eq=False)
class _Entry:
    """One load of an adapter. files: what they were when it was read, to notice that they are others now. norm_scales:
    of one that went to the disk, since they are small and cost more than all that is read there.
    """

    name: str
    path: Path
    options: ReadOptions | None
    format: str
    files: Mapping[Path, tuple[int, int]]
    prepared: PreparedAdapter | None
    report: LoadReport
    norm_scales: Mapping[str, Tensor] = field(default_factory=dict)
    tier: Tier = "device"
    pinned: bool = False
    users: int = 0
    loading: threading.Lock = field(default_factory=threading.Lock)


class AdapterPool:
    """probe: whether an adapter changes anything; None to leave it out."""

    def __init__(
        self,
        base: Base,
        device: torch.device,
        *,
        max_rank: int = 256,
        device_limits: Limits | None = None,
        host_limits: Limits | None = None,
        probe: Callable[[PreparedAdapter], bool] | None = None,
    ) -> None:
        self._base, self._device, self._probe, self.max_rank = base, device, probe, max_rank
        self._limits: dict[Tier, Limits] = {"device": device_limits or Limits(), "host": host_limits or Limits()}
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used first
        self._replaced: list[_Entry] = []  # by others of their names, while requests still hold them
        self._lock = threading.RLock()

    def load(
        self,
        name: str,
        path: Path | str,
        *,
        replace: bool = False,
        pin: bool = False,
        options: ReadOptions | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> LoadReport:
        """Read an adapter of any known format and make it ready; requests may name it from then on.

        path: a folder or file, or a Hub id (user/name[@revision][:folder]).

        Raises EngineError for a name that is taken (unless `replace`) or a device tier that is full of adapters in use,
        AdapterError for files that are unsound, PlanError where it does not fit the base. Then nothing has changed.
        """
        self._require_name(name, replace)
        began = time.perf_counter()
        require("path", path, isinstance(path, (str, Path)), "a folder or a Hub id")
        folder = locate(path, what="adapter", on_progress=on_progress).path if isinstance(path, str) else path
        on_progress(Progress(f"loading the adapter {name!r}", 0, None, ""))
        folder = Path(os.path.abspath(folder.expanduser()))
        before = _stamps(folder)
        adapter = read_adapter(folder, options)
        prepared = prepare(name, adapter, self._base, self.max_rank, known_scales(adapter, self._base))
        files = _unchanged(adapter, before)
        changes = None if self._probe is None else self._probe(prepared)
        with self._lock:
            self._require_name(name, replace)
            old = self._entries.get(name)
            report = LoadReport(
                name=name,
                modules=len(prepared.modules),
                method=prepared.method,
                rank=prepared.rank,
                nbytes=prepared.nbytes,
                seconds=time.perf_counter() - began,
                changes_output=changes,
                replaced=old is not None,
            )
            entry = _Entry(name, folder, options, adapter.format, files, prepared, report, pinned=pin)
            self._make_room(entry, without=old)
            if old is not None:
                entry.pinned |= old.pinned
                if old.users:
                    self._replaced.append(old)
            self._entries[name] = entry
            self._entries.move_to_end(name)
        return report

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises EngineError where there is none of that name or requests are using it."""
        with self._lock:
            self._entry(name)
            require_unused(name, self._users(name))
            del self._entries[name]

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter on the device whatever else is loaded, or no longer. Raises EngineError where there is none,
        or the device tier has no room for it."""
        entry = self._entry(name)
        if pinned:
            with self.lease(name):  # which brings it there
                entry.pinned = True
        entry.pinned = pinned

    def list(self) -> tuple[AdapterInfo, ...]:
        """All adapters, by name."""
        with self._lock:
            return tuple(_info(self._entries[name], self._users(name)) for name in sorted(self._entries))

    def _users(self, name: str) -> int:
        """Requests that hold an adapter of this name, be it one that was replaced."""
        return sum(entry.users for entry in (*self._entries.values(), *self._replaced) if entry.name == name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @contextmanager
    def lease(self, name: str) -> Iterator[PreparedAdapter]:
        """The adapter on the device, where it stays until the block ends. Raises what `acquire` raises."""
        prepared, release = self.acquire(name)
        try:
            yield prepared
        finally:
            release()

    def acquire(self, name: str) -> tuple[PreparedAdapter, Callable[[], None]]:
        """The adapter on the device, and what to call once when it is no longer used.

        Raises EngineError where there is none of that name, its files have changed since it was loaded, or the device
        tier is full of adapters in use (`facts["full"]` is true then: a later call may succeed).
        """
        with self._lock:
            entry = self._entry(name)
            entry.users += 1  # from here on it is not taken away
            self._entries.move_to_end(name)
        try:
            prepared = self._on_device(entry)
        except BaseException:
            self._release(entry)
            raise
        return prepared, lambda: self._release(entry)

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            if not entry.users and entry in self._replaced:
                self._replaced.remove(entry)
            if not entry.users and entry.tier == "host":  # it did not get to the device after all
                self._trim_host()

    def _on_device(self, entry: _Entry) -> PreparedAdapter:
        with entry.loading:
            with self._lock:
                if entry.tier == "device":
                    assert entry.prepared is not None
                    return entry.prepared
                self._make_room(entry)
                prepared = entry.prepared
            # Neither reading nor copying holds up the others.
            prepared = self._read_again(entry) if prepared is None else prepared.to(self._device)
            with self._lock:
                self._make_room(entry)
                entry.prepared, entry.tier = prepared, "device"
                self._trim_host()
        return prepared

    def _read_again(self, entry: _Entry) -> PreparedAdapter:
        before = _stamps(entry.path)
        if any(before.get(path) != stamp for path, stamp in entry.files.items()):
            how = "have changed" if all(path in before for path in entry.files) else "are gone"
            raise EngineError(
                f"The adapter {entry.name!r} was moved out of memory, and since it was loaded its files in "
                f"{str(entry.path)!r} {how}.",
                remedy="Load it again in its own place.",
                adapter=entry.name,
            )
        adapter = read_adapter(entry.path, entry.options)
        prepared = prepare(entry.name, adapter, self._base, self.max_rank, entry.norm_scales)
        _unchanged(adapter, before)
        return prepared

    def _entry(self, name: str) -> _Entry:
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                raise not_loaded(name, self._entries)
            return entry

    def _require_name(self, name: str, replace: bool) -> None:
        require_name(name, {known: entry.path for known, entry in self._entries.items()}, replace)

    def _make_room(self, entry: _Entry, without: _Entry | None = None) -> None:
        """Move the least recently used from the device to the host, and on to the disk, until `entry` fits.

        without: one that is going. Raises EngineError where all that is in its way is in use or pinned; then nothing
        was moved. `facts["full"]` says whether it is in use, so that there will be room one day.
        """
        here = [other for other in self._entries.values() if other.tier == "device" and other not in (entry, without)]
        staying = [other for other in (*here, *self._replaced) if other.users or other.pinned]
        if without is not None and without.users:
            staying.append(without)
        leaving = [other for other in here if other not in staying]
        limits, size, moved = self._limits["device"], entry.report.nbytes, 0
        while not limits.hold([one.report.nbytes for one in (*staying, *leaving[moved:])] + [size]):
            if moved == len(leaving):
                held = ", ".join(sorted({one.name for one in staying}))
                why = f"in use or pinned are {held}" if held else "it is larger than the whole limit"
                remedy = "Wait until requests end, unpin one, or give" if held else "Give"
                raise EngineError(
                    f"There is no room on the device for the adapter {entry.name!r} ({size:,} bytes, limits: "
                    f"{limits.count} adapters, {limits.nbytes} bytes): {why}.",
                    remedy=f"{remedy} the engine larger device_limits.",
                    adapter=entry.name,
                    full=any(one.users for one in staying),
                )
            moved += 1
        for other in leaving[:moved]:
            assert other.prepared is not None
            other.prepared, other.tier = other.prepared.to(torch.device("cpu")), "host"
        self._trim_host()

    def _trim_host(self) -> None:
        """Let go of the least recently used in host memory, down to its limit; what is used is on its way up."""
        hosted = [other for other in self._entries.values() if other.tier == "host" and not other.users]
        while hosted and not self._limits["host"].hold([one.report.nbytes for one in hosted]):
            other = hosted.pop(0)
            assert other.prepared is not None
            other.norm_scales = {
                name: factors.norm_scale
                for name, factors in other.prepared.modules.items()
                if factors.norm_scale is not None
            }
            other.prepared, other.tier = None, "disk"


_Stamps = Mapping[Path, tuple[int, int]]
"""Of files: size, and when they were written, in nanoseconds."""


def _stamps(path: Path) -> _Stamps:
    """Of a file, or of all files in a folder; none of what is not there, which the reader will say."""
    found = {}
    with contextlib.suppress(OSError):
        for file in path.iterdir() if path.is_dir() else [path]:
            stat = file.stat()
            found[file] = (stat.st_size, stat.st_mtime_ns)
    return found


def _unchanged(adapter: Adapter, before: _Stamps) -> _Stamps:
    """The stamps of an adapter's files. Raises AdapterError where they are not what they were before it was read."""
    now = _stamps(adapter.path)
    if any(path not in before or before[path] != now.get(path) for path in adapter.files):
        raise AdapterError(
            f"The adapter {str(adapter.path)!r} changed while it was read.",
            remedy="Load it again when it is written.",
            path=str(adapter.path),
        )
    return {path: before[path] for path in adapter.files}


def _info(entry: _Entry, users: int) -> AdapterInfo:
    report = entry.report
    return AdapterInfo(
        name=entry.name,
        path=entry.path,
        format=entry.format,
        method=report.method,
        rank=report.rank,
        modules=report.modules,
        nbytes=report.nbytes,
        tier=entry.tier,
        pinned=entry.pinned,
        in_use=users,
        load_seconds=report.seconds,
        changes_output=report.changes_output,
    )
