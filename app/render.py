"""Pieces of the page as HTML. Whatever a person, a model or a file wrote is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

from app.backend import BASE, AdapterRow
from app.desk import Desk
from app.highlight import differences, plain, surprise
from app.run import Answer
from app.votes import Vote, tally
from dora_serve.terminal import format_bytes

View = Literal["plain", "differences", "surprise"]

_FINISHES = {"stop": "ended by itself", "length": "cut off at the limit", "cancelled": "stopped"}
_SHOWN_CHARACTERS = 4000
"""Of a prompt: the page repeats it in every column."""


def column(desk: Desk, place: int, view: View, adapters: Sequence[AdapterRow]) -> str:
    """One column: whose it is, the conversation, the answer and its figures."""
    name, answer = desk.columns[place], desk.answers[place]
    row = next((row for row in adapters if row.name == name), None)
    chips = [] if desk.hidden else ["no adapter: the control"] if name == BASE else _facts(row)
    asked = f'<div class="ds-user">{_short(desk.prompt)}</div>' if desk.settings.chat else ""
    return (
        f'<div class="ds-column" data-finish="{answer.finish or "running"}">'
        f'<div class="ds-head"><span class="ds-name">{escape(desk.name(place))}</span>{_chips(chips)}</div>'
        f'<div class="ds-talk">{_past(desk, name)}{asked}<div class="ds-answer">{_text(desk, place, view)}</div>'
        f"{_cursor(answer)}</div>"
        f'<div class="ds-stats">{_stats(answer)}</div></div>'
    )


def empty_column() -> str:
    return '<div class="ds-column ds-empty"></div>'


def scoreboard(votes: Sequence[Vote]) -> str:
    """The running tally."""
    if not votes:
        return '<div class="ds-tally ds-quiet">No votes yet.</div>'
    counts = tally(votes)
    most = max(1, *(count.wins for count in counts))
    rows = "".join(
        f'<div class="ds-count"><span>{escape(count.name)}</span>'
        f'<i style="--share:{count.wins / most:.3f}"></i><b>{count.wins} of {count.shown}</b></div>'
        for count in counts
    )
    return f'<div class="ds-tally">{rows}</div>'


def message(text: str, *, good: bool = False) -> str:
    """A sentence that a person should read; empty for none."""
    return (
        f'<div class="ds-message {"ds-good" if good else "ds-bad"}" role="status">{escape(text)}</div>' if text else ""
    )


def adapter_table(adapters: Sequence[AdapterRow]) -> str:
    """All that is loaded; a dash for what the backend does not tell."""
    if not adapters:
        return '<div class="ds-quiet">No adapter is loaded.</div>'
    rows = [
        (
            row.name,
            row.method or "–",
            row.format or "–",
            _or_dash(row.rank),
            _or_dash(row.modules),
            _memory(row) or "–",
            row.tier or "–",
            f"{row.load_seconds:.2f} s" if row.load_seconds is not None else "–",
            {True: "yes", False: "NO", None: "–"}[row.changes_output],
            _or_dash(row.in_use),
            row.source,
        )
        for row in adapters
    ]
    return table(_TABLE_HEADER, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where the page is too narrow for it."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    whole = f'<table class="ds-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="ds-scroll">{whole}</div>'


_TABLE_HEADER = "name,method,format,rank,modules,in memory,tier,loaded in,changes the output,in use,from".split(",")


def _past(desk: Desk, name: str) -> str:
    """The earlier turns of a column. While it is hidden not what it said, which was seen with its name."""
    turns = [turn for turn in desk.turns if name in turn.answers]
    if desk.hidden and turns:
        count = "1 earlier turn" if len(turns) == 1 else f"{len(turns)} earlier turns"
        return f'<div class="ds-past">({count}, shown again after the vote)</div>'
    return "".join(
        f'<div class="ds-user">{_short(turn.prompt)}</div><div class="ds-past">{plain(turn.answers[name])}</div>'
        for turn in turns
    )


def _text(desk: Desk, place: int, view: View) -> str:
    answer = desk.answers[place]
    if desk.hidden:  # an error names its adapter, and of the colours the base has the fewest
        failed = "" if answer.error is None else '<div class="ds-error">Failed: why is shown after the vote.</div>'
        return f"{plain(answer.text)}{failed}"
    if answer.error is not None:
        return f'{plain(answer.text)}<div class="ds-error">{escape(answer.error)}</div>'
    scores = desk.scores.get(desk.columns[place])
    if view == "surprise" and scores:
        return surprise(scores)
    if view == "differences" and place != control(desk) and answer.finish is not None:
        return differences(answer.text, desk.answers[control(desk)].text)
    return plain(answer.text)


def control(desk: Desk) -> int:
    """The column that the others are compared with: the base, or the first where there is none."""
    return desk.columns.index(BASE) if BASE in desk.columns else 0


def _facts(row: AdapterRow | None) -> list[str]:
    if row is None:
        return ["not loaded any more"]
    facts = [row.method, f"rank {row.rank}" if row.rank else None, f"{row.modules} modules" if row.modules else None]
    return [fact for fact in (*facts, _memory(row)) if fact]


def _memory(row: AdapterRow) -> str | None:
    """What an adapter costs beside the base, which all of them share."""
    if row.nbytes is None:
        return None
    share = f" = {row.share_of_base:.1%} of the base" if row.share_of_base is not None else ""
    return f"{format_bytes(row.nbytes)}{share}"


def _chips(facts: Sequence[str]) -> str:
    return "".join(f'<span class="ds-chip">{escape(fact)}</span>' for fact in facts)


def _stats(answer: Answer) -> str:
    parts = []
    if answer.rate is not None:
        parts.append(f"<b>{answer.rate:.1f}</b> tokens/s")
    if answer.first_token is not None:
        parts.append(f"first token <b>{answer.first_token:.2f}</b> s")
    if answer.tokens:
        parts.append(f"<b>{answer.tokens}</b> token{'s' if answer.tokens > 1 else ''}")
    if answer.finish in _FINISHES:
        parts.append(_FINISHES[answer.finish])
    return "".join(f"<span>{part}</span>" for part in parts) or "<span>waiting</span>"


def _cursor(answer: Answer) -> str:
    return "" if answer.finish else '<span class="ds-cursor"></span>'


def _short(text: str) -> str:
    return plain(text) if len(text) <= _SHOWN_CHARACTERS else f"{plain(text[:_SHOWN_CHARACTERS])} …"


def _or_dash(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
