"""An exported graph in ONNX Runtime beside another backend: its base and its adapters are columns like any other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace as with_changes
from pathlib import Path

from app.backend import BASE, AdapterRow, Backend, Stream, TokenScore
from app.pool_rows import row_of, said_of
from dora_serve.decomposition import Decomposition
from dora_serve.engine.requests import Event, Request
from dora_serve.errors import EngineError
from dora_serve.onnx_engine.engine import OnnxEngine
from dora_serve.progress import OnProgress

MARK = " (ONNX)"
"""At the end of the names of the graph's columns."""
_SUFFIX = ".onnx_adapter"


class WithOnnx:
    """`inner`, and the columns of `engine`. A file that ends in .onnx_adapter is loaded on the graph, whatever else on
    `inner`; scores, paths and analyses are of `inner` alone.
    """

    confined = True

    def __init__(self, inner: Backend, engine: OnnxEngine) -> None:
        self.inner, self.engine = inner, engine
        self.label = inner.label

    def adapters(self) -> tuple[AdapterRow, ...]:
        base = AdapterRow(f"{BASE}{MARK}", str(self.engine.folder), format="onnx", method="the base itself")
        rows = (row_of(entry, MARK) for entry in self.engine.pool.list())
        return (*self.inner.adapters(), base, *rows)

    def load(self, name: str, source: str | Path, *, replace: bool = False) -> str:
        if Path(source).suffix != _SUFFIX:
            if name.endswith(MARK):
                raise EngineError(
                    f"{name!r} would be a column of the graph, and {str(source)!r} is no {_SUFFIX} file.",
                    remedy="Make one: dora-export onnx-adapter ADAPTER --for FOLDER. Or choose another name.",
                )
            return self.inner.load(name, source, replace=replace)
        return said_of(self.engine.pool.load(name.removesuffix(MARK), source, replace=replace), MARK)

    def unload(self, name: str) -> None:
        if name == f"{BASE}{MARK}":
            raise EngineError("The base of the graph stays.", remedy="Choose an adapter.")
        if name.endswith(MARK):
            self.engine.pool.unload(name.removesuffix(MARK))
        else:
            self.inner.unload(name)

    def stream(self, requests: Sequence[Request]) -> Stream:
        """Both at once, each batch in a thread of its own."""
        graphs = [place for place, request in enumerate(requests) if (request.adapter or "").endswith(MARK)]
        others = [place for place in range(len(requests)) if place not in graphs]
        streams: list[tuple[list[int], Stream]] = []
        if others:
            streams.append((others, self.inner.stream([requests[place] for place in others])))
        if graphs:
            streams.append((graphs, self.engine.generate([_unmarked(requests[place]) for place in graphs])))
        return _Together(streams)

    def score(self, request: Request, text: str, token_ids: Sequence[int]) -> tuple[TokenScore, ...]:
        return self.inner.score(with_changes(request, adapter=None), text, token_ids)

    def paths(self, name: str) -> tuple[str, str]:
        self._require_weights(name)
        return self.inner.paths(name)

    def decompose(self, name: str, on_progress: OnProgress) -> Decomposition:
        self._require_weights(name)
        return self.inner.decompose(name, on_progress)

    def _require_weights(self, name: str) -> None:
        if name.endswith(MARK):
            raise EngineError(
                f"{name} is a file for a graph: how it was trained is no longer in it.",
                remedy="Choose the adapter that it was made from.",
            )


def _unmarked(request: Request) -> Request:
    name = (request.adapter or "").removesuffix(MARK)
    return with_changes(request, adapter=None if name == BASE else name)


class _Together:
    """Several streams as one, events as they come. Each stream has the places of its requests."""

    def __init__(self, streams: Sequence[tuple[Sequence[int], Stream]]) -> None:
        self._streams = streams

    def cancel(self, index: int) -> None:
        for places, stream in self._streams:
            if index in places:
                stream.cancel(list(places).index(index))

    def __iter__(self) -> Iterator[Event]:
        arrived: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

        def take(places: Sequence[int], stream: Stream) -> None:
            try:
                for event in stream:
                    arrived.put(with_changes(event, index=places[event.index]))
            except BaseException as error:  # it is raised where the events are read
                arrived.put(error)
            finally:
                arrived.put(None)

        threads = [threading.Thread(target=take, args=one, daemon=True, name="stream") for one in self._streams]
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            event = arrived.get()
            if event is None:
                running -= 1
            elif isinstance(event, BaseException):
                raise event
            else:
                yield event
