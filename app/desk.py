"""What one browser has before it: the columns, the conversation, the answers and the votes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from app.backend import BASE, Backend, TokenScore
from app.run import Answer, Run
from app.votes import ALL_BAD, TIE, Vote, shuffled
from dora_serve.engine.requests import Request
from dora_serve.engine.sampling import Sampling
from dora_serve.errors import DoraServeError

MOST_COLUMNS = 6
MOST_CHARACTERS = 200_000
"""Of a prompt: far more than a context holds, and little enough to be refused at once."""

MOST_DESKS = 1000
LETTERS = "ABCDEF"
"""Of the columns, while their names are hidden."""


@dataclass(frozen=True)
class Settings:
    """What all columns have in common. chat: through the base's chat template, else the prompt is just continued."""

    chat: bool = True
    system: str = ""
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def request(self, column: str, prompt: str, turns: Sequence[Turn] = ()) -> Request:
        """The request of a column, after the earlier turns of a chat."""
        messages = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for turn in turns:
            if column in turn.answers:
                messages.append({"role": "user", "content": turn.prompt})
                messages.append({"role": "assistant", "content": turn.answers[column]})
        messages.append({"role": "user", "content": prompt})
        return Request(
            prompt=None if self.chat else prompt,
            messages=messages if self.chat else None,
            adapter=None if column == BASE else column,
            sampling=Sampling(self.temperature, self.top_p, self.top_k, self.repetition_penalty, self.seed),
            max_tokens=self.max_tokens,
        )


@dataclass(frozen=True)
class Turn:
    """A question, and what each column answered."""

    prompt: str
    answers: Mapping[str, str]


@dataclass
class Desk:
    """columns: in the order in which they are shown. turns: those before the prompt. hidden: a blind run that nobody
    has voted on yet. runs: those under way, and the places of their columns; several may write at a time.
    """

    columns: tuple[str, ...] = ()
    prompt: str = ""
    settings: Settings = field(default_factory=Settings)
    turns: tuple[Turn, ...] = ()
    requests: tuple[Request, ...] = ()
    answers: tuple[Answer, ...] = ()
    scores: dict[str, tuple[TokenScore, ...]] = field(default_factory=dict)
    hidden: bool = False
    votes: list[Vote] = field(default_factory=list)
    voted: bool = False
    runs: list[tuple[Run, tuple[int, ...]]] = field(default_factory=list)
    again: int = 0
    files: TemporaryDirectory[str] | None = None
    writing: threading.Lock = field(default_factory=threading.Lock)

    def ask(
        self, backend: Backend, prompt: str, columns: Sequence[str], settings: Settings, *, blind: bool = False
    ) -> Iterator[None]:
        """Put one prompt to all columns, and come back whenever their answers have grown.

        In a chat that goes on in the same columns, each has its own earlier answers before it.
        """
        require_askable(prompt, columns)
        self.stop()
        turns = self._turns_so_far() if settings.chat and self.settings.chat else ()
        order = shuffled(columns) if blind else tuple(columns)
        requests = tuple(settings.request(column, prompt, turns) for column in order)
        with self.writing:
            self.columns, self.prompt, self.settings, self.turns = order, prompt, settings, turns
            self.hidden, self.voted, self.again = blind, False, 0
            self.scores.clear()
            self.requests = requests
            self.answers = tuple(Answer(request.adapter) for request in self.requests)
        return self._follow(backend, tuple(range(len(order))))

    def ask_again(self, backend: Backend, place: int) -> Iterator[None]:
        """Answer in one column anew, with the next seed."""
        if not 0 <= place < len(self.requests):
            raise DoraServeError("There is no answer in that column yet.", remedy="Ask something first.")
        self.cancel(place)
        self.again += 1
        request = self.requests[place]
        sampling = replace(request.sampling, seed=self.settings.seed + self.again)
        fresh = replace(request, sampling=sampling)
        with self.writing:
            self.requests = _with(self.requests, place, fresh)
            self.answers = _with(self.answers, place, Answer(fresh.adapter))
            self.scores.pop(self.columns[place], None)
        return self._follow(backend, (place,))

    def cancel(self, place: int) -> None:
        """End the answer of one column."""
        for run, places in tuple(self.runs):
            if place in places:
                run.cancel(places.index(place))

    def stop(self) -> None:
        """End all answers."""
        for run, _ in tuple(self.runs):
            run.cancel_all()

    def clear(self) -> None:
        """Begin anew; the votes stay."""
        self.stop()
        with self.writing:
            self.columns, self.prompt, self.turns, self.requests, self.answers = (), "", (), (), ()
            self.scores.clear()
            self.hidden = self.voted = False

    def vote(self, place: int | None, *, all_bad: bool = False) -> Vote:
        """Say which column is best, None for a tie or all bad; one vote for each prompt, the last one counts."""
        if not self.answers or (place is not None and not 0 <= place < len(self.columns)):
            raise DoraServeError("There is nothing to vote on yet.", remedy="Ask something first.")
        if any(answer.finish is None for answer in self.answers):
            raise DoraServeError("The answers are not complete yet.", remedy="Vote when they are, or stop them.")
        vote = Vote(
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            prompt=self.prompt,
            system=self.settings.system,
            columns=self.columns,
            answers=tuple(answer.text for answer in self.answers),
            winner=self.columns[place] if place is not None else ALL_BAD if all_bad else TIE,
            blind=self.hidden,  # a vote that is changed afterwards is not blind any more
            seed=self.settings.seed,
        )
        if self.voted:
            self.votes.pop()
        self.votes.append(vote)
        self.voted, self.hidden = True, False
        return vote

    def score(self, backend: Backend) -> None:
        """Have the base judge the answers that it has not judged yet."""
        for column, request, answer in zip(self.columns, self.requests, self.answers, strict=True):
            if column not in self.scores and answer.finish not in (None, "error") and answer.text:
                self.scores[column] = backend.score(request, answer.text, answer.token_ids)

    def written(self, name: str, text: str) -> str:
        """The path of a file with `text`, for a download."""
        path = self.path(name)
        path.write_text(text, encoding="utf-8")
        return str(path)

    def path(self, name: str) -> Path:
        """Where a file for a download may be written; it goes when the desk does."""
        self.files = self.files or TemporaryDirectory(prefix="dora-serve-", ignore_cleanup_errors=True)
        return Path(self.files.name) / name

    def name(self, place: int) -> str:
        """What a column is called, as long as it is hidden by a letter."""
        return f"Column {LETTERS[place]}" if self.hidden else self.columns[place]

    def _follow(self, backend: Backend, places: tuple[int, ...]) -> Iterator[None]:
        run = Run(backend, [self.requests[place] for place in places])
        self.runs.append((run, places))
        requests = [self.requests[place] for place in places]
        looks = run.looks()
        try:
            for answers in looks:
                with self.writing:
                    for place, request, answer in zip(places, requests, answers, strict=True):
                        # Another run may have taken the column meanwhile.
                        if place < len(self.requests) and self.requests[place] is request:
                            self.answers = _with(self.answers, place, answer)
                yield
        finally:
            looks.close()  # type: ignore[attr-defined]
            self.runs.remove((run, places))

    def _turns_so_far(self) -> tuple[Turn, ...]:
        kept = {
            column: answer.text
            for column, answer in zip(self.columns, self.answers, strict=True)
            if answer.finish not in (None, "error") and answer.text
        }
        return (*self.turns, Turn(self.prompt, kept)) if kept else self.turns


class Desks:
    """A desk for each browser, by what Gradio calls it; the one that was used longest ago goes first."""

    def __init__(self) -> None:
        self._desks: OrderedDict[str, Desk] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, session: str | None) -> Desk:
        with self._lock:
            desk = self._desks.setdefault(session or "", Desk())
            self._desks.move_to_end(session or "")
            dropped = [self._desks.popitem(last=False)[1] for _ in range(len(self._desks) - MOST_DESKS)]
        for old in dropped:
            old.stop()
        return desk

    def leave(self, session: str | None) -> None:
        """The browser has gone: nothing goes on for it."""
        with self._lock:
            desk = self._desks.pop(session or "", None)
        if desk is not None:
            desk.stop()


def require_askable(prompt: str, columns: Sequence[str]) -> None:
    """Raise DoraServeError for a prompt that is empty, absurdly long or no text, and for no columns, too many, or one
    twice; whatever a program sent in their places."""
    if not isinstance(prompt, str) or not isinstance(columns, (list, tuple)) or not all(map(_is_text, columns)):
        raise DoraServeError("What is asked is not a text and a list of columns.", remedy="Give both.")
    if not _is_text(prompt):
        raise DoraServeError("The prompt holds what is no Unicode text.", remedy="Take its half characters out.")
    if not prompt.strip():
        raise DoraServeError("The prompt is empty.", remedy="Write something.")
    if len(prompt) > MOST_CHARACTERS:
        raise DoraServeError(
            f"The prompt has {len(prompt):,} characters.", remedy=f"Shorten it to {MOST_CHARACTERS:,} at most."
        )
    if not 1 <= len(columns) <= MOST_COLUMNS or len(set(columns)) != len(columns):
        raise DoraServeError(
            f"{len(columns)} columns are chosen: wanted 1 to {MOST_COLUMNS}, each another one.",
            remedy="Choose the base and some adapters.",
        )


def _is_text(value: object) -> bool:
    """Whether it can be sent on: half of a surrogate pair, as JSON may hold it, is no character."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _with(values: tuple[Any, ...], place: int, value: object) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])
