"""Votes on which answer is best: blind or not, counted, and exported."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from app.spreadsheet import csv_text

TIE, ALL_BAD = "tie", "all bad"
_COLUMNS = ("when", "prompt", "system", "winner", "blind", "seed")


@dataclass(frozen=True)
class Vote:
    """winner: a column's name, TIE or ALL_BAD. columns, answers: as they stood. when: ISO 8601, UTC. blind: whether
    the names were hidden until the vote."""

    when: str
    prompt: str
    system: str
    columns: tuple[str, ...]
    answers: tuple[str, ...]
    winner: str
    blind: bool
    seed: int


@dataclass(frozen=True)
class Count:
    """wins: votes that it won, of `shown`, those that it stood in."""

    name: str
    wins: int
    shown: int


def tally(votes: Sequence[Vote]) -> tuple[Count, ...]:
    """Every column that has been voted on, the one with most wins first, then ties and all bad."""
    names = dict.fromkeys(name for vote in votes for name in vote.columns)
    counts = [
        Count(name, sum(vote.winner == name for vote in votes), sum(name in vote.columns for vote in votes))
        for name in names
    ]
    counts.sort(key=lambda count: -count.wins)
    none = [Count(word, sum(vote.winner == word for vote in votes), len(votes)) for word in (TIE, ALL_BAD)]
    return (*counts, *(count for count in none if count.wins))


def shuffled(columns: Sequence[str], seed: int | None = None) -> tuple[str, ...]:
    """The columns in an order that says nothing of what they are."""
    order = list(columns)
    random.Random(seed).shuffle(order)
    return tuple(order)


def to_json(votes: Sequence[Vote]) -> str:
    counts = [asdict(count) for count in tally(votes)]
    return json.dumps({"tally": counts, "votes": [asdict(vote) for vote in votes]}, indent=2, ensure_ascii=False)


def to_csv(votes: Sequence[Vote]) -> str:
    """A line for each vote: its facts, then a name and an answer for each column."""
    width = max((len(vote.columns) for vote in votes), default=0)
    pairs = [f"{what}_{number}" for number in range(1, width + 1) for what in ("column", "answer")]
    rows: list[list[object]] = [[*_COLUMNS, *pairs]]
    for vote in votes:
        shown = [part for pair in zip(vote.columns, vote.answers, strict=True) for part in pair]
        rows.append([*(getattr(vote, name) for name in _COLUMNS), *shown])
    return csv_text(rows)
