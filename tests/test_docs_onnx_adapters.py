"""What docs/onnx-adapters.md shows runs as it is printed, on SmolLM2 and its example adapters."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.test_readme import ROOT, blocks, commands_of, desk, run

__all__ = ["desk"]
PAGE = (ROOT / "docs" / "onnx-adapters.md").read_text(encoding="utf-8")


def test_the_page_runs_from_top_to_bottom(desk: Path) -> None:
    commands = commands_of(PAGE)
    assert [arguments[0] for _, *arguments in commands] == ["merge", "onnx-adapter"]
    for program, *arguments in commands:
        assert program == "dora-export"
        # The proof takes two minutes here, and tests/test_cli_onnx_adapters.py sees it on a small model.
        unproven = ["--no-verify"] if arguments[0] == "merge" else []
        run([sys.executable, "-m", "exporters.cli", *arguments, *unproven], desk)
    files = {path.name for path in (desk / "exported" / "adapters").iterdir()}
    assert files == {"dates-dora.onnx_adapter", "style-dora.onnx_adapter"}
    printed = run([sys.executable, "-c", "\n".join(blocks(PAGE, "python"))], desk)
    base, _, adapted = printed.partition("\ndates ")
    assert base.startswith("None ")
    assert '"date": "2024-02-29"' in adapted
    assert '"date": "2024-02-29"' not in base
