"""How long work tells its caller where it is. Libraries report; only a command line (or a page) shows."""

from __future__ import annotations

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
