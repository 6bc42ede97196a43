"""How long work tells its caller where it is. Libraries report; only a command line (or a page) shows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Progress:
    """`done` of `total` `unit`s of a stage; total is None where it is not known. unit "B" means bytes."""

    stage: str
    done: int
    total: int | None
    unit: str = "B"


OnProgress: TypeAlias = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The default listener."""


class Meter:
    """Adds up the bytes of transfers that run side by side, and reports them one at a time."""

    def __init__(self, stage: str, total: int, on_progress: OnProgress) -> None:
        self._stage, self._total, self._on_progress = stage, total, on_progress
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            # Kept within its bounds: a transfer that starts over may be counted twice, a file that is shared never.
            self._done = max(0, min(self._done + count, self._total))
            self._report()

    def finish(self) -> None:
        with self._lock:
            if self._done < self._total:
                self._done = self._total
                self._report()

    def _report(self) -> None:
        if self._total:
            self._on_progress(Progress(self._stage, self._done, self._total))
