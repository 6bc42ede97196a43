"""An exported base in ONNX Runtime, with the torch engine's own interface: requests in, events out.

    engine = OnnxEngine.load("exported")
    engine.pool.load("dates", "exported/adapters/dates-dora.onnx_adapter")
    for event in engine.generate([Request("On 3 May"), Request("On 3 May", adapter="dates")]):
        print(event.index, event.text)

A graph that was exported for mixed batches answers all requests of a step in one run; any other in one run for each
adapter among them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_serve.checkpoint import read_json
from dora_serve.engine.generation import Generation, complete
from dora_serve.engine.loading import load_tokenizer
from dora_serve.engine.prompt_tokens import PromptTokens, context_of, end_tokens
from dora_serve.engine.requests import Completion, Request
from dora_serve.engine.running import Running
from dora_serve.engine.sound import is_whole, require
from dora_serve.errors import EngineError
from dora_serve.onnx_engine.adapters import Feeding, Inputs, Switch, TableRows, Tables
from dora_serve.onnx_engine.cache import GroupedCache
from dora_serve.onnx_engine.graph import MODEL_FILE, Graph
from dora_serve.onnx_engine.pool import OnnxAdapter, OnnxPool
from dora_serve.progress import OnProgress, Progress, ignore_progress

_Rows = tuple[OnnxAdapter | None, ...]


def is_exported(folder: Path) -> bool:
    """Whether a folder holds a graph and no weights of another kind."""
    return (folder / MODEL_FILE).is_file() and not any(folder.glob("*.safetensors"))


class OnnxEngine:
    """tokenizer: None for a folder without one, whose requests are token ids. max_rows: so many requests decode at a
    time. provider: of ONNX Runtime, which runs the graph.
    """

    device = torch.device("cpu")  # where logits are looked at; the graph runs where its provider is

    def __init__(self, folder: Path, graph: Graph, tokenizer: Any = None, *, max_rows: int = 16) -> None:
        self.folder, self.tokenizer, self.max_rows = folder, tokenizer, max_rows
        self._graph, self._lock = graph, threading.RLock()
        self._tables = Tables(graph.table) if graph.table is not None and graph.table.mixed else None
        required = graph.table is not None and graph.table.required
        self._base: Feeding = Inputs(graph.table) if graph.table is not None and required else Switch()
        config = read_json(folder)
        text = config.get("text_config")
        self._prompts = PromptTokens(tokenizer, graph.vocabulary, context_of(text) or context_of(config))
        self.end_tokens = end_tokens((read_json(folder, "generation_config.json"), config, tokenizer))
        self.running = Running()
        self.pool = OnnxPool(graph.table, self._tables, self._lock, folder)
        self.closeness = 1e-3 if self._is_steady() else 0.0
        """Choices of a token that are closer than this, in logits, are made by a forward of that request alone: rows
        beside it and padding change a row's numbers by some 1e-5 in float32. Where a graph computes in something
        coarser, as with weights in blocks, they change by more than can be settled so, and it is 0."""

    @staticmethod
    def load(
        folder: str | Path,
        *,
        device: str | None = None,
        threads: int | None = None,
        max_rows: int = 16,
        on_progress: OnProgress = ignore_progress,
    ) -> OnnxEngine:
        """An engine on a folder that `dora-export merge ... --to onnx-adapters` (or `--to onnx`) made.

        device: "cpu", "cuda" or "cuda:N"; None for the CPU. threads: of ONNX Runtime, None for its own choice.
        Raises CheckpointError for what is no exported causal language model, UnavailableError for what is missing here.
        """
        place = Path(folder)
        on_progress(Progress("loading the graph", 0, None, ""))
        graph = Graph(place / MODEL_FILE, device=device or "cpu", threads=threads)
        return OnnxEngine(place, graph, load_tokenizer(place), max_rows=max_rows)

    @property
    def provider(self) -> str:
        return self._graph.provider

    @property
    def mixed(self) -> bool:
        """Whether one run serves several adapters."""
        return self._tables is not None

    def generate(self, requests: Sequence[Request], *, max_rows: int | None = None) -> Generation:
        """Answer all requests, at most `max_rows` at a time; iterate over what this returns for the events.

        A request that cannot be answered gets an event with its error, and the others go on. One with a seed gives the
        same text whatever runs beside it, as far as `closeness` reaches.
        """
        requests = (requests,) if isinstance(requests, Request) else tuple(requests)
        if not all(isinstance(request, Request) for request in requests):
            raise EngineError("What is to be generated is not a list of Requests.", remedy="Give Request(...) objects.")
        rows = self.max_rows if max_rows is None else max_rows
        require("max_rows", rows, is_whole(rows) and rows > 0, "a whole number, 1 or more")
        return Generation(self, requests, min(rows, max(1, len(requests))))

    def complete(self, requests: Sequence[Request], *, max_rows: int | None = None) -> tuple[Completion, ...]:
        """Answer all requests and return when the last has ended."""
        return complete(self.generate(requests, max_rows=max_rows))

    # What a generation needs

    def tokenize(self, request: Request) -> list[int]:
        return self._prompts.tokenize(request)

    def room_for(self, request: Request, prompt_tokens: int) -> int:
        return self._prompts.room_for(request, prompt_tokens)

    def token_text(self, token: int) -> str:
        return self._prompts.token_text(token)

    def batch(self, adapters: _Rows) -> _Rows:
        return adapters

    def new_cache(self, rows: int) -> GroupedCache:
        return GroupedCache(rows)

    def forward(self, batch: _Rows, tokens: Tensor, cache: GroupedCache) -> Tensor:
        """Logits (rows, vocabulary) of the last of tokens (rows, tokens)."""
        ids = tokens.numpy()
        if cache.filling:
            mask = np.ones_like(ids)
            logits, past = self._run(ids, mask, self._graph.empty_cache(1), batch)
            # In a graph for mixed batches all rows may run together, in another those of one adapter.
            cache.filled(None if self.mixed else batch[0], past, ids.shape[1])
            return torch.from_numpy(logits[:, -1])
        found: list[Tensor] = [torch.empty(0)] * cache.count
        for group in cache.groups():
            places = [cache.place_of(member) for member in group.members]
            group.mask = np.pad(group.mask, ((0, 0), (0, 1)), constant_values=1)
            rows = tuple(batch[place] for place in places)
            logits, group.past = self._run(ids[places], group.mask, group.past, rows)
            for place, row in zip(places, logits, strict=True):
                found[place] = torch.from_numpy(row[-1])
        return torch.stack(found)

    def logits_alone(self, adapter: OnnxAdapter | None, tokens: Sequence[int]) -> Tensor:
        """The logits (vocabulary,) after a text, in float32, from a run that has nothing else in it."""
        ids = np.array([tokens], dtype=np.int64)
        logits, _ = self._run(ids, np.ones_like(ids), self._graph.empty_cache(1), (adapter,))
        return torch.from_numpy(logits[0, -1]).float()

    def _run(self, ids: Any, mask: Any, past: Any, rows: _Rows) -> Any:
        with self._lock:
            return self._graph.run(ids, mask, past, self._feeding(rows))

    def _feeding(self, rows: _Rows) -> Feeding:
        if self._tables is not None:
            return TableRows(self._tables, [0 if adapter is None else adapter.slot for adapter in rows])
        return self._base if rows[0] is None or rows[0].switch is None else rows[0].switch

    def _is_steady(self) -> bool:
        """Whether a step on a cache, beside another row, gives the numbers of a run of the whole, but for float32's."""
        tokens = [token % self._graph.vocabulary for token in (5, 3, 7, 11, 2, 13)]
        alone = self.logits_alone(None, tokens)
        cache = self.new_cache(2)
        for row, prompt in enumerate((tokens[:-1], tokens[:2])):
            cache.begin_fill(row)
            self.forward((None,), torch.tensor([prompt]), cache)
        cache.begin_step(2, self.device)
        beside = self.forward((None, None), torch.tensor([tokens[-1:], tokens[2:3]]), cache)[0].float()
        return float((beside - alone).abs().max()) <= 1e-4 * max(1.0, float(alone.abs().max()) / 10)
