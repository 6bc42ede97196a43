"""The commands of docs/publish.md run as they are printed, against the loopback Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.fake_hub import FakeHub
from tests.hub_cases import TOKEN, environment_of
from tests.test_readme import ROOT, commands_of, desk

__all__ = ["desk"]


def test_the_commands_of_the_page_run(desk: Path, tmp_path: Path) -> None:
    commands = commands_of((ROOT / "docs" / "publish.md").read_text(encoding="utf-8"))
    assert [command[1] for command in commands] == ["merge", "push", "push", "verify"]
    with FakeHub().running() as hub:
        hub.log_in(TOKEN, "anna")
        environment = {**os.environ, **environment_of(hub, tmp_path / "cache")}
        for _, *arguments in commands:
            command = [sys.executable, "-m", "exporters.cli", *arguments]
            done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert TOKEN not in done.stdout + done.stderr
        assert set(hub.repositories) == {"anna/dates"}
        assert hub.repositories["anna/dates"].private
