"""A graph in ONNX Runtime: rows of one adapter, or of all in a graph for mixed batches, in one run a step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_serve.onnx_engine.adapters import AdapterFile, Feeding, Inputs, Switch, TableRows, Tables
from dora_serve.onnx_engine.cache import GroupedCache
from dora_serve.onnx_engine.graph import MODEL_FILE, Graph


class OrtRunner:
    """`dora_serve.onnx_engine.runner.Runner`. An adapter is a Feeding, or its slot in a graph for mixed batches."""

    context: int | None = None

    def __init__(self, folder: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        """Raises what Graph raises."""
        self._graph = Graph(folder / MODEL_FILE, device=device, threads=threads)
        self._lock = threading.RLock()
        self.table, self.vocabulary = self._graph.table, self._graph.vocabulary
        self.provider = self._graph.provider
        self._tables = Tables(self.table) if self.table is not None and self.table.mixed else None
        self.mixed = self._tables is not None
        self._base = self._feeding_of(None)
        self.closeness = 1e-3 if self._is_steady() else 0.0
        """Rows beside a row and padding change its numbers by some 1e-5 in float32. Where a graph computes in something
        coarser, as with weights in blocks, they change by more than can be settled by a run of its own, and it is 0."""

    def put(self, file: AdapterFile) -> Feeding | int:
        if self._tables is None:
            return self._feeding_of(file)
        with self._lock:
            return self._tables.fill(file)

    def take_out(self, adapter: Feeding | int) -> None:
        if self._tables is not None and isinstance(adapter, int):
            with self._lock:
                self._tables.replace(adapter, None)

    def new_cache(self, rows: int) -> GroupedCache:
        return GroupedCache(rows)

    def forward(self, adapters: Sequence[Any], tokens: Tensor, cache: GroupedCache) -> Tensor:
        ids = tokens.numpy()
        if cache.filling:
            mask = np.ones_like(ids)
            logits, past = self._run(ids, mask, self._graph.empty_cache(1), adapters)
            # In a graph for mixed batches all rows may run together, in another those of one adapter.
            cache.filled(None if self.mixed else adapters[0], past, ids.shape[1])
            return torch.from_numpy(logits[:, -1])
        found: list[Tensor] = [torch.empty(0)] * cache.count
        for group in cache.groups():
            places = [cache.place_of(member) for member in group.members]
            group.mask = np.pad(group.mask, ((0, 0), (0, 1)), constant_values=1)
            logits, group.past = self._run(ids[places], group.mask, group.past, [adapters[place] for place in places])
            for place, row in zip(places, logits, strict=True):
                found[place] = torch.from_numpy(row[-1])
        return torch.stack(found)

    def logits_alone(self, adapter: Any, tokens: Sequence[int]) -> Tensor:
        ids = np.array([tokens], dtype=np.int64)
        logits, _ = self._run(ids, np.ones_like(ids), self._graph.empty_cache(1), [adapter])
        return torch.from_numpy(logits[0, -1]).float()

    def _feeding_of(self, file: AdapterFile | None) -> Feeding:
        required = self.table is not None and self.table.required
        return Inputs(self.table, file) if self.table is not None and required else Switch(file)

    def _run(self, ids: Any, mask: Any, past: Any, adapters: Sequence[Any]) -> Any:
        feeding: Feeding
        if self._tables is not None:
            feeding = TableRows(self._tables, [0 if adapter is None else adapter for adapter in adapters])
        else:
            feeding = self._base if adapters[0] is None else adapters[0]
        with self._lock:
            return self._graph.run(ids, mask, past, feeding)

    def _is_steady(self) -> bool:
        """Whether a step on a cache, beside another row, gives the numbers of a run of the whole, but for float32's."""
        tokens = [token % self.vocabulary for token in (5, 3, 7, 11, 2, 13)]
        alone = self.logits_alone(None, tokens)
        cache = self.new_cache(2)
        for row, prompt in enumerate((tokens[:-1], tokens[:2])):
            cache.begin_fill(row)
            self.forward((None,), torch.tensor([prompt]), cache)
        cache.begin_step(2, torch.device("cpu"))
        beside = self.forward((None, None), torch.tensor([tokens[-1:], tokens[2:3]]), cache)[0].float()
        return float((beside - alone).abs().max()) <= 1e-4 * max(1.0, float(alone.abs().max()) / 10)
