"""What docs/engine.md shows runs as it is printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "base").symlink_to(smollm2)
    return folder


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_python_of_the_page_runs_from_top_to_bottom(desk: Path) -> None:
    printed = _run([sys.executable, "-c", "\n".join(_blocks("python"))], desk)
    assert printed.startswith("DoRA 210 layers, changes the output: True")


def test_the_command_of_the_page_runs(desk: Path) -> None:
    commands = [line[2:] for block in _blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "dora-serve"
        printed = _run([sys.executable, "-m", "dora_serve.cli", *arguments], desk)
        heads = [line.split()[1] for line in printed.splitlines() if line.startswith("--- ")]
        assert heads == ["base", "dates", "style"]
