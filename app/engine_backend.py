"""The engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as with_changes
from pathlib import Path

from app.backend import AdapterRow, Stream, TokenScore
from app.pool_rows import row_of, said_of
from dora_serve.checkpoint import open_checkpoint
from dora_serve.decomposition import Decomposition, decompose
from dora_serve.engine import Engine, Request, score
from dora_serve.engine.text import TextStream
from dora_serve.errors import EngineError
from dora_serve.formats import read_adapter
from dora_serve.hub import locate
from dora_serve.progress import OnProgress
from dora_serve.resolve import plan_merge


class EngineBackend:
    """base: the folder or Hub id that `engine` was loaded from, to look at its weights on disk."""

    confined = True

    def __init__(self, engine: Engine, base: str) -> None:
        self.engine, self.label = engine, base.rstrip("/").rpartition("/")[2] or base
        self._base = base
        self._base_nbytes = sum(parameter.nbytes for parameter in engine.model.parameters())

    def adapters(self) -> tuple[AdapterRow, ...]:
        return tuple(row_of(entry, base_nbytes=self._base_nbytes) for entry in self.engine.pool.list())

    def load(self, name: str, source: str | Path, *, replace: bool = False) -> str:
        return said_of(self.engine.pool.load(name, source, replace=replace))

    def unload(self, name: str) -> None:
        self.engine.pool.unload(name)

    def stream(self, requests: Sequence[Request]) -> Stream:
        return self.engine.generate(requests)

    def score(self, request: Request, text: str, token_ids: Sequence[int]) -> tuple[TokenScore, ...]:
        prompt = self.engine.tokenize(with_changes(request, adapter=None))
        (found,) = score(self.engine, token_ids, [None], prompt=prompt)
        # Text as it grows, so that characters of several tokens are shown, with the last of these.
        grown = TextStream(self.engine.tokenizer, ())
        pieces = [grown.push(token) for token in found.token_ids]
        pieces[-1] += grown.close()
        return tuple(TokenScore(piece, value) for piece, value in zip(pieces, found.logprobs, strict=True))

    def paths(self, name: str) -> tuple[str, str]:
        entry = next((entry for entry in self.engine.pool.list() if entry.name == name), None)
        if entry is None:
            raise EngineError(f"There is no adapter {name!r}.", remedy="Choose one of those that are loaded.")
        return str(entry.path), self._base

    def decompose(self, name: str, on_progress: OnProgress) -> Decomposition:
        adapter, base = self.paths(name)
        checkpoint = open_checkpoint(locate(base, what="base").path)
        return decompose(plan_merge(checkpoint, read_adapter(Path(adapter))), on_progress)
