"""What a person at a terminal sees, and what a pipe does not."""

from __future__ import annotations

import io
import re

import pytest

from dora_serve.progress import Progress
from dora_serve.terminal import TerminalProgress, format_bytes, format_progress, format_seconds, format_table


class Terminal(io.StringIO):
    """A terminal of one line: what stands there after all that was written."""

    def isatty(self) -> bool:
        return True

    @property
    def line(self) -> str:
        shown: list[str] = []
        column = 0
        for character in self.getvalue():
            if character == "\r":
                column = 0
            else:
                assert character.isprintable(), "plain text only"
                shown[column : column + 1] = [character]
                column += 1
        return "".join(shown).rstrip()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def show(terminal: Terminal, clock: Clock) -> TerminalProgress:
    return TerminalProgress(terminal, clock=clock)


def test_nothing_is_shown_in_a_pipe(clock: Clock) -> None:
    pipe = io.StringIO()
    with TerminalProgress(pipe, clock=clock) as show:
        for second in range(60):
            clock.now += 1
            show(Progress("merging", second, 100))
    assert pipe.getvalue() == ""


def test_nothing_is_shown_of_a_short_stage(show: TerminalProgress, terminal: Terminal, clock: Clock) -> None:
    for stage in ("reading", "merging", "writing"):
        for done in range(19):
            show(Progress(stage, done, 19))
            clock.now += 0.1
        show(Progress(stage, 19, 19))
    assert terminal.getvalue() == ""


def test_a_long_stage_shows_one_line_and_leaves_none(show: TerminalProgress, terminal: Terminal, clock: Clock) -> None:
    show(Progress("merging", 0, 1_000_000_000))
    clock.now += 4
    show(Progress("merging", 400_000_000, 1_000_000_000))
    assert terminal.line == "merging   40 %  400 MB of 1.00 GB  100 MB/s  6 s left"
    clock.now += 1
    show(Progress("merging", 999_000_000, 1_000_000_000))
    assert terminal.line == "merging   99 %  999 MB of 1.00 GB  200 MB/s  0 s left"
    show(Progress("merging", 1_000_000_000, 1_000_000_000))
    assert terminal.line == ""
    assert terminal.getvalue().endswith("\r")


def test_a_stage_that_counts_nothing_is_shown_at_once(show: TerminalProgress, terminal: Terminal, clock: Clock) -> None:
    """Loading a base reports once, however long it takes."""
    show(Progress("loading the base", 0, None, ""))
    assert terminal.line == "loading the base"
    clock.now += 4
    show(Progress("loading the base", 0, None, ""))
    assert terminal.line == "loading the base"
    show(Progress("merging", 0, 100))
    assert terminal.line == ""
    show(Progress("waiting", 0, None, ""))
    show.clear()
    assert terminal.line == ""


def test_a_shorter_line_covers_a_longer_one(show: TerminalProgress, terminal: Terminal, clock: Clock) -> None:
    show(Progress("a stage with a long name", 0, 100))
    clock.now += 3
    show(Progress("a stage with a long name", 50, 100))
    clock.now += 3
    show(Progress("short", 0, None))
    assert terminal.line == ""
    clock.now += 3
    show(Progress("short", 30, None))
    assert terminal.line == "short  30 B  10 B/s"


def test_a_stage_of_the_same_name_starts_anew(show: TerminalProgress, terminal: Terminal, clock: Clock) -> None:
    for _ in range(2):
        show(Progress("forward", 0, 10, "prompts"))
        clock.now += 1.5
        show(Progress("forward", 5, 10, "prompts"))
        clock.now += 1.5
        show(Progress("forward", 10, 10, "prompts"))
    assert terminal.getvalue() == ""


def test_the_line_is_not_redrawn_at_every_report(show: TerminalProgress, terminal: Terminal, clock: Clock) -> None:
    show(Progress("merging", 0, 1000))
    clock.now += 3
    for done in range(1, 1000):
        show(Progress("merging", done, 1000))
        clock.now += 0.001
    assert terminal.getvalue().count("\r") <= 11


def test_an_error_finds_the_line_clean(terminal: Terminal, clock: Clock) -> None:
    def fail() -> None:
        with TerminalProgress(terminal, clock=clock) as show:
            show(Progress("merging", 0, 10))
            clock.now += 3
            show(Progress("merging", 5, 10))
            assert terminal.line != ""
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert terminal.line == ""


def test_a_line_never_wraps(show: TerminalProgress, terminal: Terminal, clock: Clock) -> None:
    show(Progress("x" * 200, 0, 10))
    clock.now += 3
    show(Progress("x" * 200, 5, 10))
    assert len(terminal.line) == 79


@pytest.mark.parametrize(
    ("progress", "since", "seconds", "line"),
    [
        (
            Progress("fetching", 3_000_000, 10_000_000),
            1_000_000,
            4.0,
            "fetching   30 %  3.00 MB of 10.0 MB  500 kB/s  14 s left",
        ),
        (Progress("fetching", 3_000_000, None), 0, 3.0, "fetching  3.00 MB  1.00 MB/s"),
        (Progress("forward", 3, 12, "prompts"), 0, 6.0, "forward   25 %  3 of 12 prompts  0.5 prompts/s  18 s left"),
        (Progress("stalled", 0, 10), 0, 6.0, "stalled    0 %  0 B of 10 B"),
        (Progress("empty", 0, 0), 0, 6.0, "empty  0 B"),
        (Progress("begun", 5, 10), 5, 0.0, "begun   50 %  5 B of 10 B"),
    ],
)
def test_the_line(progress: Progress, since: int, seconds: float, line: str) -> None:
    assert format_progress(progress, since=since, seconds=seconds) == line


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *(
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (12_345, "12.3 kB"),
            (999_499, "999 kB"),
            (999_500, "1.00 MB"),
        ),
        *((98_000_000, "98.0 MB"), (2_470_000_000, "2.47 GB"), (10**15, "1.00 PB"), (333.3, "333 B")),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_bytes_have_three_digits_at_most() -> None:
    for exponent in range(170):
        text = format_bytes(1.2**exponent)
        assert re.fullmatch(r"\d{1,3} B|\d\.\d\d .B|\d\d\.\d .B|\d{3} .B", text), text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3780, "1 h 03 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_table_aligns_words_left_and_numbers_right() -> None:
    rows = [["q_proj", "12", "1.5e-03", "ok"], ["down_proj", "3", "", "99 % of it"]]
    assert format_table(rows, ["module", "n", "error", "note"]).splitlines() == [
        "module      n    error  note",
        "---------  --  -------  ----------",
        "q_proj     12  1.5e-03  ok",
        "down_proj   3           99 % of it",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert format_table([], ["module", "n"]) == "module  n\n------  -"


def test_a_row_that_is_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        format_table([["a"], ["b", "c"]], ["x", "y"])
