"""Answers on their way to a page: a thread takes the events in, and the page looks at how far they are.

So the batch goes on decoding while a browser draws, and one that has gone away stops it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from app.backend import Backend
from dora_serve.engine.requests import Event, Request
from dora_serve.errors import DoraServeError

FRAME_SECONDS = 0.07
"""Between two looks: a page cannot draw much faster, and each costs a message."""

PATIENCE_SECONDS = 30.0
"""Nobody has looked for so long: the browser is gone, and its requests are cancelled."""


@dataclass(frozen=True)
class Answer:
    """A column as far as it is. token_ids: where the backend tells them. first_token: seconds from the start of the
    run until the first token was there. rate: tokens a second, after the first. finish: None while it runs, then the
    engine's reason. error: a sentence.
    """

    adapter: str | None
    text: str = ""
    tokens: int = 0
    token_ids: tuple[int, ...] = ()
    first_token: float | None = None
    rate: float | None = None
    finish: str | None = None
    error: str | None = None


class Run:
    """Begins at once. Safe to use from several threads."""

    def __init__(self, backend: Backend, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self._answers = [Answer(request.adapter) for request in self.requests]
        self._changed = threading.Condition()
        self._began = self._looked = time.perf_counter()
        self._stream = backend.stream(self.requests)
        self._thread = threading.Thread(target=self._take_in, name="run", daemon=True)
        self._thread.start()

    def answers(self) -> tuple[Answer, ...]:
        with self._changed:
            return tuple(self._answers)

    def cancel(self, index: int) -> None:
        """End one request; those that have ended stay as they are."""
        if 0 <= index < len(self.requests):
            self._stream.cancel(index)

    def cancel_all(self) -> None:
        for index in range(len(self.requests)):
            self._stream.cancel(index)

    def looks(self) -> Iterator[tuple[Answer, ...]]:
        """The answers, again whenever they have changed, until all have ended. Leaving early cancels all."""
        try:
            seen: tuple[Answer, ...] = ()
            while True:
                with self._changed:
                    self._looked = time.perf_counter()
                    self._changed.wait_for(lambda: tuple(self._answers) != seen, timeout=1.0)  # noqa: B023
                    now = tuple(self._answers)
                if now != seen:
                    seen = now
                    yield now
                if all(answer.finish for answer in now):
                    return
                time.sleep(FRAME_SECONDS)
        finally:
            if not all(answer.finish for answer in self.answers()):
                self.cancel_all()

    def _take_in(self) -> None:
        try:
            for event in self._stream:
                now = time.perf_counter()
                with self._changed:
                    self._answers[event.index] = _after(self._answers[event.index], event, now - self._began)
                    self._changed.notify_all()
                    forgotten = now - self._looked > PATIENCE_SECONDS
                if forgotten:
                    self.cancel_all()
        except DoraServeError as error:
            self._fail(str(error))
        except Exception as error:  # a column must never stay open for ever
            self._fail(f"Something went wrong in the program itself: {type(error).__name__}: {error}")
            raise
        finally:
            self._fail("The backend ended without a word.")

    def _fail(self, message: str) -> None:
        """End all that has not ended."""
        with self._changed:
            for place, answer in enumerate(self._answers):
                if answer.finish is None:
                    self._answers[place] = replace(answer, finish="error", error=message)
            self._changed.notify_all()


def _after(answer: Answer, event: Event, elapsed: float) -> Answer:
    if event.finish_reason is not None:
        timings = event.timings
        rate = timings.tokens_per_second if timings is not None else None
        return replace(
            answer,
            text=answer.text + event.text,
            tokens=timings.tokens if timings is not None and timings.tokens else answer.tokens,
            rate=rate or answer.rate,
            finish=event.finish_reason,
            error=str(event.error) if event.error is not None else None,
        )
    first = elapsed if answer.first_token is None else answer.first_token
    rate = answer.tokens / (elapsed - first) if elapsed > first else None
    ids = answer.token_ids if event.token_id is None else (*answer.token_ids, event.token_id)
    text, tokens = answer.text + event.text, answer.tokens + 1
    return replace(answer, text=text, tokens=tokens, token_ids=ids, first_token=first, rate=rate)
