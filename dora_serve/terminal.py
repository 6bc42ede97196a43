"""What a command shows a person: progress on one line that comes and goes, sizes, and tables."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TextIO

from dora_serve.progress import Progress

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?\s?(%|x|×|[kMGT]?B|s)?", re.IGNORECASE)


class TerminalProgress:
    """An OnProgress that redraws one line of a terminal, and a context that takes the line away when it ends.

    Nothing is shown where the stream is no terminal, nor in the first `patience` seconds of a stage that counts; one
    without a unit is shown at once, since it may report no second time. The line is redrawn at most every `interval`
    seconds and leaves nothing behind. clock: seconds, as time.monotonic.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        patience: float = 2.0,
        interval: float = 0.1,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._shows = self._stream.isatty()
        self._clock, self._patience, self._interval = clock, patience, interval
        self._stage: str | None = None
        self._began = self._drawn = 0.0
        self._first = 0
        self._width = 0

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()

    def __call__(self, progress: Progress) -> None:
        if not self._shows:
            return
        now = self._clock()
        if progress.stage != self._stage:
            self.clear()
            self._stage, self._began, self._first = progress.stage, now, progress.done
            if not progress.unit:
                self._draw(progress.stage)
        elif progress.done == progress.total:
            self.clear()
            self._stage = None  # the next of this name is another one
        elif now - self._began >= self._patience and now - self._drawn >= self._interval:
            self._drawn = now
            self._draw(format_progress(progress, since=self._first, seconds=now - self._began))

    def clear(self) -> None:
        """Take the line away, before something else is printed."""
        if self._width:
            self._draw("")

    def _draw(self, line: str) -> None:
        # The last column stays free: a terminal may wrap after it. Spaces, not escape codes, wipe what was longer.
        line = line[: _columns(self._stream) - 1]
        back = "" if line else "\r"
        self._stream.write(f"\r{line.ljust(self._width)}{back}")
        self._stream.flush()
        self._width = len(line)


def format_progress(progress: Progress, *, since: int, seconds: float) -> str:
    """One line: stage, share, amounts, rate and time left.

    since: what was done when the stage began to be watched, `seconds` ago; the rate is that of the whole stage.
    """

    def amount(count: float) -> str:
        return format_bytes(count) if progress.unit == "B" else f"{count:,.3g} {progress.unit}"

    done, total = progress.done, progress.total
    rate = (done - since) / seconds if seconds > 0 else 0.0
    parts = [progress.stage]
    if total:
        share = f"{100 * done // total:3d} %"
        parts += [
            share,
            f"{amount(done)} of {amount(total)}" if progress.unit == "B" else f"{done:,} of {amount(total)}",
        ]
    elif progress.unit:
        parts.append(amount(done))
    if rate > 0:
        parts.append(f"{amount(rate)}/s")
        if total:
            parts.append(f"{format_seconds((total - done) / rate)} left")
    return "  ".join(parts)


def format_bytes(count: float) -> str:
    """Three digits and a decimal unit, as disks and networks are sold: 2.47 GB."""
    for unit in _UNITS:
        # 999.5 would be rounded to 1e+03.
        if abs(count) < 999.5 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:#.3g} {unit}".replace(". ", " ")


def format_seconds(seconds: float) -> str:
    """Whole seconds below a minute, then the two largest units: 3 s, 2 min 05 s, 1 h 03 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Columns of plain text under a header and a rule; those of numbers stand to the right.

    Raises ValueError where a row is not as long as the header.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(rows) and all(_NUMBER.fullmatch(cell) or not cell for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        placed = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        ]
        return "  ".join(placed).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # no real terminal behind it
        return 80


def format_number(value: float | None) -> str:
    """Three digits; nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if math.isfinite(value) else str(value)
