"""The decoding of a list of requests, batched: rows fill up as others end, and every token is an event.

It knows rows, tokens and requests, and the pool's leases; of how an adapter is applied, and by what, it knows nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dora_serve.engine.requests import Alternative, Completion, Event, FinishReason, Request, Timings
from dora_serve.engine.running import Running
from dora_serve.engine.sampling import choose, draw, new_generator
from dora_serve.engine.sound import is_whole
from dora_serve.engine.text import TextStream
from dora_serve.errors import DoraServeError, EngineError
from dora_serve.progress import OnProgress, Progress, ignore_progress


class Pool(Protocol):
    """Adapters by name. What one is only the engine knows."""

    def acquire(self, name: str) -> tuple[Any, Callable[[], None]]:
        """An adapter ready for use, and what to call once when it is no longer used."""
        ...


class Cache(Protocol):
    """Keys and values of the rows of a batch."""

    def begin_fill(self, row: int, most: int) -> None:
        """The next forward has one row, which becomes row `row` and will have so many tokens at most."""
        ...

    def begin_step(self, count: int, device: torch.device) -> None:
        """The next forward adds a token to each of the first `count` rows."""
        ...

    def end(self, tokens: int) -> None:
        """The forward is done, and gave each of its rows so many tokens."""
        ...

    def move(self, source: int, target: int) -> None:
        """Put row `source` into the place of row `target`."""
        ...

    def clear(self, row: int) -> None:
        """Forget a row whose numbers may not be finite."""
        ...


class Decoder(Protocol):
    """What a generation needs of an engine. batch: of the adapters of its rows, None being the base."""

    tokenizer: Any
    device: torch.device
    end_tokens: frozenset[int]
    running: Running

    @property
    def pool(self) -> Pool: ...
    @property
    def closeness(self) -> float: ...
    def tokenize(self, request: Request) -> list[int]: ...
    def room_for(self, request: Request, prompt_tokens: int) -> int: ...
    def token_text(self, token: int) -> str: ...
    def batch(self, adapters: tuple[Any, ...]) -> Any: ...
    def new_cache(self, rows: int) -> Any: ...
    def release_cache(self, cache: Any) -> None: ...
    def forward(self, batch: Any, tokens: Tensor, cache: Any) -> Tensor: ...
    def logits_alone(self, adapter: Any, tokens: Sequence[int]) -> Tensor: ...


@dataclass(eq=False)
class _Row:
    """A request that is being answered. tokens: the prompt and all that followed, the last one not in the cache yet."""

    index: int
    request: Request
    adapter: Any
    release: Callable[[], None]
    tokens: list[int]
    prompt_tokens: int
    room: int
    generator: torch.Generator
    text: TextStream
    queued: float
    began: float
    first_token: float = 0.0

    @property
    def made(self) -> int:
        return len(self.tokens) - self.prompt_tokens


class Generation:
    """Iterate over it for the events; `cancel` ends one request, from any thread; `close` ends all, and so does letting
    go of it.

    A step of the model is done when the next event is asked for and none is waiting. Several generations may run on one
    engine, each in its own thread: their steps take turns. One that is left half read keeps its adapters in use until
    it is closed or gone; a request of the same thread that would wait for that for ever gets an error.
    """

    def __init__(self, engine: Decoder, requests: Sequence[Request], max_rows: int) -> None:
        self.requests = tuple(requests)
        self._decoding = _Decoding(engine, self.requests, max_rows)
        # It holds the decoding and not this, so that a loop that is left early lets go of all at once.
        self._events = self._decoding.run()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        self._decoding.reader = threading.get_ident()
        return next(self._events)

    def cancel(self, index: int) -> None:
        """End the request at place `index`; it gets an event that says so. One that has ended stays as it is."""
        if not is_whole(index) or not 0 <= index < len(self.requests):
            raise EngineError(f"There is no request {index}: there are {len(self.requests)}.", remedy="Count from 0.")
        self._decoding.cancel({index})

    def close(self) -> None:
        """End all that runs and let go of their adapters. Events that have not been asked for are lost.

        Called while another thread waits for an event, it cancels everything, and that thread gets the last events.
        """
        try:
            self._events.close()
        except ValueError:  # "generator already executing"
            self._decoding.cancel(set(range(len(self.requests))))

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Decoding:
    """What a generation is made of: requests that wait, rows that run, and their cache."""

    def __init__(self, engine: Decoder, requests: Sequence[Request], max_rows: int) -> None:
        self._engine = engine
        self._waiting: deque[tuple[int, Request]] = deque(enumerate(requests))
        self._prompts: dict[int, list[int]] = {}
        self._rows: list[_Row] = []
        self._max_rows = max_rows
        self._cache: Cache
        self._batch: Any = None
        self._cancelled: set[int] = set()
        self._queued = time.perf_counter()
        self._lock = threading.Lock()
        self.reader = 0
        engine.running.add(self)

    def holds_adapters(self) -> bool:
        return any(row.adapter is not None for row in tuple(self._rows))

    def cancel(self, indices: set[int]) -> None:
        with self._lock:
            self._cancelled |= indices

    def run(self) -> Generator[Event]:
        self._cache = self._engine.new_cache(self._max_rows)
        to_the_end = False
        try:
            while self._waiting or self._rows:
                yield from self._drop_cancelled()
                yield from self._admit()
                yield from self._drop_cancelled()
                if self._rows:
                    yield from self._step()
            to_the_end = True
        finally:
            while self._rows:
                self._rows.pop().release()
            self._batch = None
            if not to_the_end:  # what the last forward left in the cache was perhaps not looked at
                self._clear_free()
            self._engine.release_cache(self._cache)
            del self._cache

    def _drop_cancelled(self) -> Iterator[Event]:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
        if not cancelled:
            return
        for index, request in [pair for pair in self._waiting if pair[0] in cancelled]:
            self._waiting.remove((index, request))
            yield Event(index, finish_reason="cancelled", timings=self._no_time())
        for row in [row for row in self._rows if row.index in cancelled]:
            yield self._end(row, "cancelled")

    def _admit(self) -> Iterator[Event]:
        """Give free rows to waiting requests, in their order; one whose adapter has no room yet lets others pass."""
        kept: list[tuple[int, Request]] = []
        without_room: set[str | None] = set()
        while self._waiting and len(self._rows) < self._max_rows:
            index, request = self._waiting.popleft()
            try:
                request.require_sound()
                if request.adapter in without_room:
                    kept.append((index, request))
                    continue
                row = self._new_row(index, request)
                logits = self._fill(row)
            except DoraServeError as error:
                if error.facts.get("full"):
                    without_room.add(request.adapter)
                    kept.append((index, request))
                    continue
                yield Event(index, finish_reason="error", error=error, timings=self._no_time())
                continue
            yield from self._take(row, logits)
        self._waiting.extendleft(reversed(kept))
        if kept and not self._rows:  # another generation holds what these wait for
            if self._engine.running.only_own_thread_holds(self):
                self._waiting.clear()
                for index, request in kept:
                    yield Event(index, finish_reason="error", error=_held(request.adapter), timings=self._no_time())
            else:
                time.sleep(0.005)

    def _new_row(self, index: int, request: Request) -> _Row:
        began = time.perf_counter()
        if index not in self._prompts:
            self._prompts[index] = self._engine.tokenize(request)
        tokens = list(self._prompts[index])
        room = self._engine.room_for(request, len(tokens))
        generator, text = new_generator(request.sampling), TextStream(self._engine.tokenizer, tuple(request.stop))
        adapter, release = None, _nothing
        if request.adapter is not None:
            adapter, release = self._engine.pool.acquire(request.adapter)
        return _Row(
            index=index,
            request=request,
            adapter=adapter,
            release=release,
            tokens=tokens,
            prompt_tokens=len(tokens),
            room=room,
            generator=generator,
            text=text,
            queued=self._queued,
            began=began,
        )

    def _fill(self, row: _Row) -> Tensor:
        """Put a prompt into the cache: by itself, so that its numbers are the same whatever runs beside it."""
        place = len(self._rows)
        try:
            self._cache.begin_fill(place, len(row.tokens) + row.room)
            tokens = torch.tensor([row.tokens], device=self._engine.device)
            logits = self._engine.forward(self._engine.batch((row.adapter,)), tokens, self._cache)
            self._cache.end(len(row.tokens))
        except BaseException:
            row.release()
            raise
        self._rows.append(row)
        self._prompts.pop(row.index)
        self._batch = None
        row.first_token = time.perf_counter()
        return logits[0]

    def _step(self) -> Iterator[Event]:
        """One token for every row."""
        if self._batch is None:
            self._batch = self._engine.batch(tuple(row.adapter for row in self._rows))
        self._cache.begin_step(len(self._rows), self._engine.device)
        tokens = torch.tensor([row.tokens[-1:] for row in self._rows], device=self._engine.device)
        logits = self._engine.forward(self._batch, tokens, self._cache)
        self._cache.end(1)
        # Rows move when one ends, so the list is taken as it is now.
        for row, scores in zip(tuple(self._rows), logits, strict=True):
            yield from self._take(row, scores)

    def _take(self, row: _Row, logits: Tensor) -> Iterator[Event]:
        """Choose a row's next token from its logits (vocabulary,), and end the row where that is the last one."""
        logits, sampling = logits.float(), row.request.sampling
        total = logits.double().logsumexp(dim=-1)  # in float32 a sum over a vocabulary is off by 1e-5
        if not math.isfinite(total):
            yield self._end(row, "error", _not_finite(row.request.adapter))
            return
        noise = draw(len(logits), sampling, row.generator)
        choice = choose(logits, sampling, row.tokens, noise)
        if row.made and choice.margin < self._engine.closeness:
            # Rounding differs with the rows beside it, so this is settled as if there were none.
            choice = choose(self._engine.logits_alone(row.adapter, row.tokens), sampling, row.tokens, noise)
        token = choice.token
        row.tokens.append(token)
        ended = token in self._engine.end_tokens and not row.request.ignore_eos
        text = "" if ended else row.text.push(token)
        yield Event(
            row.index, text, token, float(logits[token] - total), self._alternatives(row.request, logits, total)
        )
        if ended or row.text.stopped:
            yield self._end(row, "stop")
        elif row.made >= row.room:
            yield self._end(row, "length")

    def _alternatives(self, request: Request, logits: Tensor, total: Tensor) -> tuple[Alternative, ...]:
        if not request.top_logprobs:
            return ()
        values, ids = logits.topk(min(request.top_logprobs, len(logits)))
        return tuple(
            Alternative(token, self._engine.token_text(token), value)
            for token, value in zip(ids.tolist(), (values - total).tolist(), strict=True)
        )

    def _end(self, row: _Row, reason: FinishReason, error: DoraServeError | None = None) -> Event:
        """Give the row's place to the last row, and its adapter back."""
        place, last = self._rows.index(row), len(self._rows) - 1
        if reason == "error":
            self._cache.clear(place)
        if place != last:
            self._cache.move(last, place)
            self._rows[place] = self._rows[last]
        self._rows.pop()
        self._batch = None
        if reason == "error":  # in this step it may have been moved, which leaves a copy behind
            self._clear_free()
        row.release()
        now = time.perf_counter()
        timings = Timings(
            waiting=row.began - row.queued,
            first_token=row.first_token - row.began,
            decoding=now - row.first_token,
            prompt_tokens=row.prompt_tokens,
            tokens=row.made,
        )
        return Event(row.index, row.text.close(), finish_reason=reason, timings=timings, error=error)

    def _clear_free(self) -> None:
        for place in range(len(self._rows), self._max_rows):
            self._cache.clear(place)

    def _no_time(self) -> Timings:
        return Timings(time.perf_counter() - self._queued, 0.0, 0.0, 0, 0)


def _not_finite(adapter: str | None) -> EngineError:
    whose = "The base" if adapter is None else f"The adapter {adapter!r}"
    return EngineError(
        f"{whose} makes logits that are NaN or infinite.",
        remedy="Its values are too large for the base's dtype, or its training diverged: try float32, or an earlier "
        "checkpoint.",
        adapter=adapter,
    )


def _held(adapter: str | None) -> EngineError:
    return EngineError(
        f"There is no room on the device for the adapter {adapter!r}: another generation, which this same thread has "
        "read in part, holds what would have to go.",
        remedy="Read that one to its end or close it, read each in a thread of its own, or give the engine larger "
        "device_limits.",
        adapter=adapter,
    )


def _nothing() -> None:
    """What there is to release where there is no adapter."""


def complete(generation: Generation, on_progress: OnProgress = ignore_progress) -> tuple[Completion, ...]:
    """Run to the end, and put the events of each request together, in the order of the requests."""
    events: list[list[Event]] = [[] for _ in generation.requests]
    tokens = 0
    for event in generation:
        events[event.index].append(event)
        tokens += event.token_id is not None
        on_progress(Progress("generating", tokens, None, "tokens"))
    return tuple(_completion(request, found) for request, found in zip(generation.requests, events, strict=True))


def _completion(request: Request, events: Sequence[Event]) -> Completion:
    tokens: list[Any] = [event for event in events if event.token_id is not None]
    last = events[-1]
    assert last.finish_reason is not None
    return Completion(
        adapter=request.adapter,
        text="".join(event.text for event in events),
        token_ids=tuple(event.token_id for event in tokens),
        logprobs=tuple(event.logprob for event in tokens),
        alternatives=tuple(event.alternatives for event in tokens),
        finish_reason=last.finish_reason,
        timings=last.timings,
        error=last.error,
    )
