"""What the page needs of whatever decodes: the engine in this process, or a server somewhere else.

Requests and events are the engine's own (dora_serve.engine.requests), so that there is one set of words for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dora_serve.decomposition import Decomposition
from dora_serve.engine.requests import Event, Request
from dora_serve.progress import OnProgress

BASE = "base"
"""What the base is called in lists of columns; no adapter may be."""


@dataclass(frozen=True)
class AdapterRow:
    """One loaded adapter; None for what a backend does not tell. nbytes: in memory; share_of_base: of the base's own.
    load_seconds: what loading took.
    """

    name: str
    source: str
    format: str | None = None
    method: str | None = None
    rank: int | None = None
    modules: int | None = None
    nbytes: int | None = None
    share_of_base: float | None = None
    tier: str | None = None
    in_use: int | None = None
    load_seconds: float | None = None
    changes_output: bool | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token of a text, and the log-probability (nats) that the base gives it there."""

    text: str
    logprob: float


class Stream(Protocol):
    """Answers that are on their way. `cancel` may be called from any thread."""

    def __iter__(self) -> Iterator[Event]: ...
    def cancel(self, index: int) -> None: ...


class Backend(Protocol):
    """Everything raises errors of the DoraServeError family, and may be called from several threads at once.

    label: the base, for people. confined: whether paths given to `load` are of this machine, so that the page has to
    see that they lie in folders that it may read.
    """

    label: str
    confined: bool

    def adapters(self) -> tuple[AdapterRow, ...]: ...

    def load(self, name: str, source: str | Path, *, replace: bool = False) -> str:
        """Load an adapter from a folder (a Path) or what a person typed, and say in a sentence what it is."""
        ...

    def unload(self, name: str) -> None: ...

    def stream(self, requests: Sequence[Request]) -> Stream:
        """Answer all requests, together where the backend can."""
        ...

    def score(self, request: Request, text: str, token_ids: Sequence[int]) -> tuple[TokenScore, ...]:
        """The tokens of an answer to `request`, with what the base thinks of each. token_ids: where they are known."""
        ...

    def paths(self, name: str) -> tuple[str, str]:
        """Where a loaded adapter and the base lie on this machine (or a Hub id, for the base)."""
        ...

    def decompose(self, name: str, on_progress: OnProgress) -> Decomposition:
        """The weight decomposition analysis of a loaded adapter."""
        ...
