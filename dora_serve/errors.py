"""The errors a user can meet.

Every one keeps its facts as attributes and says what to do next in `remedy`, so that the command line (and a
notebook, and a server) can turn it into a sentence without parsing text. Anything else that is raised is a bug
and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class DoraServeError(Exception):
    """Base of the family. `message` says what was got and what was wanted; `remedy` says what mends it."""

    def __init__(self, message: str, *, remedy: str | None = None, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.facts = facts

    def __str__(self) -> str:
        between = "" if self.message.endswith("\n") else " "
        return f"{self.message}{between}{self.remedy}" if self.remedy else self.message


class AdapterError(DoraServeError):
    """The adapter's own files are wrong: missing, corrupt, inconsistent or not understood."""


class UnmergeableError(AdapterError):
    """The adapter is well formed, but no dense weights equal it exactly (formats.md 9)."""


class CheckpointError(DoraServeError):
    """A base or merged checkpoint cannot be read: missing, truncated, corrupt or hostile."""


class OutputError(DoraServeError):
    """The output cannot be written: it exists, it overlaps an input, or the disk is full."""


class HubError(DoraServeError):
    """A Hub repository cannot be had or written to: no network, no such repository, no permission, no space."""


class PublishError(DoraServeError):
    """A folder that must not be published: unproven, changed since it was written, or with files that do not belong."""


class UnavailableError(DoraServeError):
    """Something optional is needed and not installed, or this machine cannot do what was asked."""


class EngineError(DoraServeError):
    """A request, or an adapter, that the engine cannot serve. It concerns that one alone: the others go on."""


class VerificationError(DoraServeError):
    """What was written does not equal the unmerged model; `facts["report"]` holds the report."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a planned merge.

    subject: the module or tensor concerned; got, wanted: what was found and what would have been right;
    hint: what to do about it, if that is known.
    """

    subject: str
    got: str
    wanted: str
    hint: str | None = None

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.subject}: got {self.got}, wanted {self.wanted}{hint}"


class PlanError(DoraServeError):
    """The adapter does not fit the base. `problems` holds every one of them, not only the first."""

    def __init__(self, message: str, problems: Sequence[Problem], *, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy, problems=[str(problem) for problem in problems])
        self.problems = tuple(problems)

    def __str__(self) -> str:
        shown = [f"\n  - {problem}" for problem in self.problems[:20]]
        if len(self.problems) > 20:
            shown.append(f"\n  - and {len(self.problems) - 20} more")
        tail = f"\n{self.remedy}" if self.remedy else ""
        return f"{self.message}{''.join(shown)}{tail}"


def no_such_path(what: str, path: Path) -> str:
    """A sentence for a path that is not there."""
    return f"{what} {str(path)!r} does not exist."


def in_a_line(error: BaseException) -> str:
    """Other people's error for a sentence of ours: its class and the first line of what it says."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {first if len(first) <= 300 else f'{first[:300]}...'}"
