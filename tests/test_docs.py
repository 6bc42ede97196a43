"""What docs/engine.md shows runs as it is printed."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.test_readme import ROOT, blocks, commands_of, desk, run

__all__ = ["desk"]
PAGE = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_runs_from_top_to_bottom(desk: Path) -> None:
    printed = run([sys.executable, "-c", "\n".join(blocks(PAGE, "python"))], desk)
    assert printed.startswith("DoRA 210 layers, changes the output: True")


def test_the_command_of_the_page_runs(desk: Path) -> None:
    commands = commands_of(PAGE)
    assert commands
    for program, *arguments in commands:
        assert program == "dora-serve"
        printed = run([sys.executable, "-m", "dora_serve.cli", *arguments], desk)
        heads = [line.split()[1] for line in printed.splitlines() if line.startswith("--- ")]
        assert heads == ["base", "dates", "style"]
