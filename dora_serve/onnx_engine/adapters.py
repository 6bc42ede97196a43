"""Adapter files of ONNX Runtime, checked against the slots of a graph before a run is tried with them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from dora_serve.errors import AdapterError, PlanError, Problem, no_such_path
from dora_serve.onnx_engine.adapter_format import DamagedFile, read_parameters
from dora_serve.onnx_engine.slots import ADAPTER_IDS, Slot, SlotTable, guard_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

_REMEDY = "Make it for this export: dora-export onnx-adapter ADAPTER --for EXPORTED_BASE"


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A loaded adapter. tensors: by the names of the graph's inputs, without the guard."""

    path: Path
    tensors: Mapping[str, Array]
    slots: tuple[str, ...]
    rank: int
    is_dora: bool

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def changes_anything(self) -> bool:
        """Whether a slot is given more than what it has by default."""
        changed = (
            self.tensors[f"{module}.lora_B"].any() or bool((abs(self.tensors[f"{module}.norm_scale"] - 1) > 1e-6).any())
            for module in self.slots
        )
        return any(changed)

    @property
    def method(self) -> str:
        return "DoRA" if self.is_dora else "LoRA"


def read_adapter_file(path: Path, table: SlotTable) -> AdapterFile:
    """An `.onnx_adapter` file that fits the slots.

    Raises AdapterError for what is no adapter file, or a damaged one, PlanError for one of another base or export, or
    that does not fit the slots: a slot that is not there, a rank above a fixed one, half a slot.
    """
    if not path.is_file():
        raise AdapterError(no_such_path("The adapter file", path), remedy="Check the path.", path=str(path))
    try:
        tensors = dict(read_parameters(path))
    except (DamagedFile, OSError) as error:
        raise unreadable(path, str(error)) from error
    problems = _problems(tensors, table)
    if problems:
        raise PlanError(
            f"The adapter file {str(path)!r} does not fit this graph: "
            f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'}.",
            problems,
            remedy=_REMEDY,
        )
    tensors.pop(table.guard)
    filled = [slot for slot in table.slots.values() if slot.lora_A in tensors]
    return AdapterFile(
        path=path,
        tensors=tensors,
        slots=tuple(slot.module for slot in filled),
        rank=max((tensors[slot.lora_A].shape[1] for slot in filled), default=0),
        is_dora=any(bool((tensors[slot.norm_scale] != 1).any()) for slot in filled),
    )


def unreadable(path: Path, reason: str) -> AdapterError:
    return AdapterError(
        f"{str(path)!r} is no adapter file of ONNX Runtime, or a damaged one: {reason}.",
        remedy=_REMEDY,
        path=str(path),
    )


def _problems(tensors: Mapping[str, Array], table: SlotTable) -> list[Problem]:
    guard = guard_of(tensors)
    if guard != table.guard:
        got = "no base" if guard is None else f"the base {guard}"
        return [
            Problem("the file", f"an adapter for {got}", f"one for {table.guard}", "it was made for another export")
        ]
    if tensors[guard].shape != (0,):
        return [Problem(guard, f"a tensor of {list(tensors[guard].shape)}", "an empty one", "the file is damaged")]
    problems, left = [], set(tensors) - {guard}
    problems += [
        Problem(name, "values that are not finite", "numbers", "the file is damaged, or the adapter was never sound")
        for name in sorted(left)
        if not np.isfinite(tensors[name].astype(np.float32, copy=False)).all()
    ]
    for slot in table.slots.values():
        names = {slot.lora_A, slot.lora_B, slot.norm_scale}
        here = names & left
        left -= names
        if here and here != names:
            problems.append(Problem(slot.module, f"only {', '.join(sorted(here))}", "all three tensors of the slot"))
        elif here:
            problems += _misfit(slot, tensors, table)
    problems += [
        Problem(name, "a tensor of no slot of this graph", "a slot that the graph has") for name in sorted(left)
    ]
    return problems


def _misfit(slot: Slot, tensors: Mapping[str, Array], table: SlotTable) -> list[Problem]:
    shapes = [list(tensors[name].shape) for name in (slot.lora_A, slot.lora_B, slot.norm_scale)]
    rank = shapes[0][1] if len(shapes[0]) == 2 else -1
    wanted = [[slot.in_features, rank], [rank, slot.out_features], [slot.out_features]]
    if shapes != wanted:
        return [
            Problem(
                slot.module,
                f"tensors of {shapes}",
                f"[{slot.in_features}, r], [r, {slot.out_features}] and [{slot.out_features}]",
            )
        ]
    if table.rank is not None and rank != table.rank:
        return [Problem(slot.module, f"rank {rank}", f"{table.rank}, the rank that was exported")]
    wrong = sorted({str(tensors[name].dtype) for name in (slot.lora_A, slot.lora_B, slot.norm_scale)} - {table.dtype})
    return [Problem(slot.module, f"tensors of {', '.join(wrong)}", table.dtype)] if wrong else []


class Feeding(Protocol):
    """What a graph is given besides its tokens and cache."""

    def inputs(self, rows: int) -> Mapping[str, Array]:
        """Further inputs for a batch of so many rows."""
        ...

    def options(self) -> Any:
        """The RunOptions of a run, or None."""
        ...


class Switch:
    """One adapter for a whole run, or the base: what ONNX Runtime's own adapters are.

    (`run_with_iobinding` ignores them with no more than a warning, so runs go through `run`.)
    """

    def __init__(self, adapter: AdapterFile | None = None) -> None:
        # Held here: RunOptions do not keep the adapters that they name, and a run would read memory that is gone.
        self._loaded = None if adapter is None else _load(adapter.path)

    def inputs(self, rows: int) -> Mapping[str, Array]:
        return {}

    def options(self) -> Any:
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = 3  # one warning for each slot otherwise
        if self._loaded is not None:
            options.add_active_adapter(self._loaded)
        return options


class Inputs:
    """One adapter for a whole run, or the base, its tensors fed as ordinary inputs."""

    def __init__(self, table: SlotTable, adapter: AdapterFile | None = None) -> None:
        self._tensors: dict[str, Array] = {}
        dtype = np.dtype(table.dtype)
        if table.required:
            self._tensors[table.guard] = np.zeros(0, dtype)
            for slot in table.slots.values():
                self._tensors[slot.lora_A] = np.zeros((slot.in_features, table.rank or 0), dtype)
                self._tensors[slot.lora_B] = np.zeros((table.rank or 0, slot.out_features), dtype)
                self._tensors[slot.norm_scale] = np.ones(slot.out_features, dtype)
        self._tensors |= {} if adapter is None else adapter.tensors

    def inputs(self, rows: int) -> Mapping[str, Array]:
        return self._tensors

    def options(self) -> None:
        return None


def _load(path: Path) -> Any:
    import onnxruntime

    loaded = onnxruntime.LoraAdapter()
    try:
        loaded.Load(str(path))
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise unreadable(path, "ONNX Runtime does not take it") from error
    return loaded


class Tables:
    """The tensors of a graph for mixed batches: adapters side by side in numbered slots, 0 being the base.

    A slot is filled, replaced and emptied between runs. The tables grow as they must, in slots and in rank; where a
    rank is smaller than the largest the rest is zeros. Memory: slots x (the largest rank's factors). Safe to call from
    several threads, but not while a run reads them.
    """

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._held: list[AdapterFile | None] = [None]
        self._rank, self._slots = table.rank or 0, 1
        self._lock = threading.Lock()
        self._arrays: dict[str, Array] = {}
        self._make(1)

    def __len__(self) -> int:
        return len(self._held)

    def fill(self, adapter: AdapterFile) -> int:
        """Put an adapter into a free slot; the slot's number."""
        with self._lock:
            slot = next((place for place, one in enumerate(self._held) if one is None and place), len(self._held))
            if slot == len(self._held):
                self._held.append(None)
            self._put(slot, adapter)
            return slot

    def replace(self, slot: int, adapter: AdapterFile | None) -> None:
        """Put another adapter, or none, into a slot. Raises IndexError for slot 0 and for one that is not there."""
        with self._lock:
            if not 0 < slot < len(self._held):
                raise IndexError(f"there is no slot {slot} to fill")
            self._put(slot, adapter)

    def feeds(self, ids: Sequence[int]) -> dict[str, Array]:
        """The inputs of a run whose rows take these slots."""
        return {**self._arrays, ADAPTER_IDS: np.asarray(ids, dtype=np.int64)}

    def _put(self, slot: int, adapter: AdapterFile | None) -> None:
        self._held[slot] = adapter
        rank = max([self._table.rank or 0, *(one.rank for one in self._held if one is not None)])
        if len(self._held) > self._slots or rank > self._rank:
            self._rank = rank
            self._make(self._slots if len(self._held) <= self._slots else 2 * self._slots)
        else:
            self._write(slot)

    def _make(self, slots: int) -> None:
        dtype = np.dtype(self._table.dtype)
        self._slots = slots
        if self._table.required:
            self._arrays[self._table.guard] = np.zeros(0, dtype)
        for slot in self._table.slots.values():
            self._arrays[slot.lora_A] = np.zeros((slots, slot.in_features, self._rank), dtype)
            self._arrays[slot.lora_B] = np.zeros((slots, self._rank, slot.out_features), dtype)
            self._arrays[slot.norm_scale] = np.ones((slots, slot.out_features), dtype)
        for place in range(1, len(self._held)):
            self._write(place)

    def _write(self, place: int) -> None:
        adapter = self._held[place]
        tensors: Mapping[str, Array] = {} if adapter is None else adapter.tensors
        for slot in self._table.slots.values():
            lora_a, lora_b = self._arrays[slot.lora_A][place], self._arrays[slot.lora_B][place]
            lora_a[:], lora_b[:], self._arrays[slot.norm_scale][place] = 0, 0, 1
            if slot.lora_A in tensors:
                rank = tensors[slot.lora_A].shape[1]
                lora_a[:, :rank], lora_b[:rank] = tensors[slot.lora_A], tensors[slot.lora_B]
                self._arrays[slot.norm_scale][place] = tensors[slot.norm_scale]


class TableRows:
    """Slots of tables for the rows of one run."""

    def __init__(self, tables: Tables, slots: Sequence[int]) -> None:
        self._tables, self._slots = tables, slots

    def inputs(self, rows: int) -> Mapping[str, Array]:
        return self._tables.feeds(self._slots)

    def options(self) -> None:
        return None


class OneSlot:
    """One adapter, or the base, for all rows of a graph for mixed batches."""

    def __init__(self, table: SlotTable, adapter: AdapterFile | None = None) -> None:
        self._tables = Tables(table)
        self._slot = 0 if adapter is None else self._tables.fill(adapter)

    def inputs(self, rows: int) -> Mapping[str, Array]:
        return self._tables.feeds([self._slot] * rows)

    def options(self) -> None:
        return None
