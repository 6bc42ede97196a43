"""Prompts from a file, their answers in a table, and the share of exact matches where the file says what is right."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.spreadsheet import csv_text
from dora_serve.errors import DoraServeError

MOST_PROMPTS = 1000
MOST_BYTES = 20_000_000
"""Of a file: far more than so many prompts take."""
_PROMPT_KEYS, _ANSWER_KEYS = ("prompt", "question", "input"), ("answer", "completion", "expected", "output")


@dataclass(frozen=True)
class PromptItem:
    prompt: str
    answer: str | None = None


def read_prompts(path: Path) -> tuple[PromptItem, ...]:
    """From .txt (one a line), .jsonl or .csv (`prompt`, and `answer` where there is a right one).

    Raises DoraServeError for a file that is none of these, holds nothing, or more than MOST_PROMPTS.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size > MOST_BYTES:
        raise DoraServeError(f"{path.name!r} has {size:,} bytes.", remedy=f"Give {MOST_BYTES:,} at most.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        items = _parse(path.suffix.lower(), text)
    except (OSError, ValueError, csv.Error) as error:
        raise DoraServeError(
            f"{path.name!r} cannot be read as prompts: {error}",
            remedy="Give a .txt with one a line, or a .jsonl or .csv with `prompt` and, where it is known, `answer`.",
        ) from error
    if not items:
        raise DoraServeError(f"{path.name!r} holds no prompts.", remedy="Give at least one.")
    if len(items) > MOST_PROMPTS:
        raise DoraServeError(f"{path.name!r} holds {len(items):,} prompts.", remedy=f"Give {MOST_PROMPTS} at most.")
    return items


def exact_matches(items: Sequence[PromptItem], answers: Sequence[str | None]) -> tuple[int, int]:
    """How many of the answers equal what was expected, but for white space around them, and of how many."""
    judged = [(item.answer, answer) for item, answer in zip(items, answers, strict=True) if item.answer is not None]
    return sum((answer or "").strip() == (wanted or "").strip() for wanted, answer in judged), len(judged)


def table_csv(items: Sequence[PromptItem], answers: Mapping[str, Sequence[str]]) -> str:
    """A line for each prompt: what was expected, and each column's answer."""
    rows = [
        [item.prompt, item.answer or "", *(column[place] for column in answers.values())]
        for place, item in enumerate(items)
    ]
    return csv_text([["prompt", "answer", *answers], *rows])


def _parse(suffix: str, text: str) -> tuple[PromptItem, ...]:
    if suffix == ".txt":
        return tuple(PromptItem(line.strip()) for line in text.splitlines() if line.strip())
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return tuple(PromptItem(row) if isinstance(row, str) else _item(row) for row in rows)
    if suffix == ".csv":
        return tuple(_item(row) for row in csv.DictReader(io.StringIO(text)))
    raise ValueError(f"its suffix is {suffix or 'missing'}")


def _item(row: object) -> PromptItem:
    if not isinstance(row, dict):
        raise ValueError(f"a line holds a {type(row).__name__}, wanted an object or a text")
    prompt = next((row[key] for key in _PROMPT_KEYS if isinstance(row.get(key), str)), None)
    answer = next((row[key] for key in _ANSWER_KEYS if isinstance(row.get(key), str)), None)
    if not prompt:
        raise ValueError("a line has no `prompt`")
    return PromptItem(prompt, answer)
