"""What an engine's pool says of its adapters, for the page."""

from __future__ import annotations

from app.backend import AdapterRow
from dora_serve.engine.pool import AdapterInfo, LoadReport


def row_of(entry: AdapterInfo, mark: str = "", *, base_nbytes: int | None = None) -> AdapterRow:
    """mark: what the page puts after the name. base_nbytes: of the base in memory, where it is known."""
    return AdapterRow(
        name=f"{entry.name}{mark}",
        source=str(entry.path),
        format=entry.format,
        method=entry.method,
        rank=entry.rank,
        modules=entry.modules,
        nbytes=entry.nbytes,
        share_of_base=entry.nbytes / base_nbytes if base_nbytes else None,
        tier=entry.tier,
        in_use=entry.in_use,
        load_seconds=entry.load_seconds,
        changes_output=entry.changes_output,
    )


def said_of(report: LoadReport, mark: str = "") -> str:
    """What a load did, as a sentence."""
    changes = ". It changes nothing: is it the trained one?" if report.changes_output is False else "."
    did = "Replaced" if report.replaced else "Added"
    return (
        f"{did} {report.name}{mark}: {report.method} of rank {report.rank} on {report.modules} modules, "
        f"in {report.seconds:.2f} s{changes}"
    )
