"""Where the tables of the benchmarks go: between two marks of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def write_table(name: str, table: str) -> None:
    """Put a table in the place of the one between `<!-- name -->` and `<!-- /name -->`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    text = DOCUMENT.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise SystemExit(f"{DOCUMENT} has no {begin.strip()} ... {end.strip()} to write the table between")
    DOCUMENT.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
