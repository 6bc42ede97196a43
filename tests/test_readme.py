"""The README's commands and Python run as they are printed, and its demo is what `make demo` runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands_of(page: str) -> list[list[str]]:
    """What follows the prompts of a page's console blocks, split as a shell would."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [shlex.split(line[2:]) for line in lines if line.startswith("$ ")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A folder like the reader's: the example adapters, and the base that `demo-base` finds made already."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "base").symlink_to(smollm2)
    return folder


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_commands_and_the_python_run_as_printed(desk: Path) -> None:
    commands = commands_of(README)
    assert {command[1] for command in commands} == {"demo-base", "inspect", "merge", "verify", "generate"}
    modules = {"dora-export": "exporters.cli", "dora-serve": "dora_serve.cli"}
    for program, *arguments in commands:
        assert run([sys.executable, "-m", modules[program], *arguments], desk).strip()
    (python,) = blocks(README, "python")
    assert run([sys.executable, "-c", python], desk).startswith("True 0 of ")


def test_make_demo_exports_the_shipped_adapter() -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    # Under `make test` this is a make within a make, which says where it is.
    last = shlex.split(next(line for line in done.stdout.splitlines() if "dora-export merge" in line))
    assert last[1:3] == ["merge", "examples/adapters/dates-dora"]
    assert last[last.index("--to") + 1] == "onnx"
    assert (ROOT / last[2] / "adapter_model.safetensors").is_file()


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
