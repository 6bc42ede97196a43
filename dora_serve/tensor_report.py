"""What a check of every tensor found. Plain values, so that a report can be shown, stored and compared."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["exact", "float32 arithmetic", "wrong", "missing", "extra", "tied", "buffer"]
FAILING: frozenset[Verdict] = frozenset({"wrong", "missing", "extra"})


@dataclass(frozen=True)
class NormCheck:
    """DoRA's invariant: the norm of each output of W' equals |m|.

    outputs: how many were looked at. wrong: how many are further off than rounding the elements allows.
    largest: the largest | ||W'|| - |m| | / |m|.
    """

    outputs: int
    wrong: int
    largest: float


@dataclass(frozen=True)
class ModuleError:
    """Sums of squares over the part of a tensor that one module's update covers (all of it where none does).

    squared_error: of |got - exact| beyond half a spacing, which is the rounding that any stored value has.
    """

    module: str
    tensor: str
    squared_error: float
    squared_norm: float

    @property
    def relative(self) -> float:
        """Squared error relative to the squared norm of what is wanted."""
        if self.squared_error == 0:
            return 0.0
        return self.squared_error / self.squared_norm if self.squared_norm else math.inf


@dataclass(frozen=True)
class ModuleShare:
    """share: of the sum over all modules of the relative squared error, in [0, 1]."""

    module: str
    tensor: str
    share: float
    relative_error: float


@dataclass(frozen=True)
class TensorResult:
    """One tensor.

    stored_as: its name in the merged folder, None where it is not there. action: what the plan does to it.
    verdict: "exact": every element is the exact value rounded once. "float32 arithmetic": some are not, all are
    within what float32 arithmetic explains. "tied", "buffer": not there (or there as well) and rightly so.
    differing: elements that are not the exact value rounded once; outside: those beyond float32 arithmetic.
    largest_error: |got - exact| in spacings of the merged dtype. wrong_rows: rows of the stored matrix with such.
    """

    name: str
    stored_as: str | None
    modules: tuple[str, ...]
    action: str
    verdict: Verdict
    dtype: str = ""
    elements: int = 0
    differing: int = 0
    outside: int = 0
    non_finite: int = 0
    largest_error: float = 0.0
    parts: tuple[ModuleError, ...] = ()
    norms: NormCheck | None = None
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict in FAILING

    @property
    def squared_error(self) -> float:
        return sum(part.squared_error for part in self.parts)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, in one plain sentence. kind: a short slug; modules: modules, or tensors, concerned."""

    kind: str
    message: str
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorReport:
    """All tensors of the plan, and those that the merged folder has besides. findings: everything that is wrong.

    notes: what a reader may want to know and is not wrong.
    """

    results: tuple[TensorResult, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.findings and not any(result.failed for result in self.results)

    @property
    def exact(self) -> bool:
        """Whether no element of any tensor differs from the exact value rounded once."""
        return self.passed and all(result.differing == 0 for result in self.results)

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by verdict."""
        return dict(Counter(result.verdict for result in self.results))

    @property
    def elements(self) -> int:
        return sum(result.elements for result in self.results)

    @property
    def differing(self) -> int:
        return sum(result.differing for result in self.results)

    @property
    def largest_error(self) -> float:
        return max((result.largest_error for result in self.results), default=0.0)

    @property
    def ranked(self) -> tuple[ModuleShare, ...]:
        """Modules by their share of the error, the worst first. One with a NaN, or not there at all, is before all."""
        broken = [
            ModuleShare(module, result.name, 1.0, math.inf)
            for result in self.results
            if result.failed and (result.non_finite or not result.elements)
            for module in (result.modules or (result.name,))
        ]
        parts = [part for result in self.results if not result.non_finite for part in result.parts]
        finite = [part for part in parts if part.squared_error]
        total = sum(part.relative for part in finite if math.isfinite(part.relative))
        shares = [
            ModuleShare(
                part.module,
                part.tensor,
                part.relative / total if math.isfinite(part.relative) and total else 1.0,
                math.sqrt(part.relative),
            )
            for part in finite
        ]
        return (*broken, *sorted(shares, key=lambda share: -share.relative_error))

    def summary(self) -> dict[str, object]:
        """Plain values for --json: totals, findings, and every tensor that failed."""
        return {
            "passed": self.passed,
            "exact": self.exact,
            "tensors": len(self.results),
            "verdicts": self.counts,
            "elements": self.elements,
            "differing_elements": self.differing,
            "largest_error_in_spacings": _json_number(self.largest_error),
            "norms_checked": sum(result.norms.outputs for result in self.results if result.norms),
            "findings": [asdict(finding) for finding in self.findings],
            "ranked": [
                {
                    key: _json_number(value) if isinstance(value, float) else value
                    for key, value in asdict(share).items()
                }
                for share in self.ranked[:20]
            ],
            "failed": [
                {
                    "name": result.name,
                    "modules": list(result.modules),
                    "verdict": result.verdict,
                    "elements": result.elements,
                    "outside": result.outside,
                    "non_finite": result.non_finite,
                    "largest_error_in_spacings": _json_number(result.largest_error),
                    "note": result.note,
                }
                for result in self.results
                if result.failed
            ],
            "notes": list(self.notes),
        }


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
