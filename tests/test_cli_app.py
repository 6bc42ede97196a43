"""`dora-serve app`: what it is told, what it needs, and what a Space runs."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from app.cli import prepare
from app.shared import Shared
from app.uploads import unpack
from dora_serve.cli import build_parser, main
from dora_serve.errors import UnavailableError
from dora_serve.progress import ignore_progress
from tests.app_cases import client, free_port, launched, make_folders
from tests.fake_openai import fake_server

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("cli"))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def _options(*arguments: str) -> argparse.Namespace:
    options: argparse.Namespace = build_parser().parse_args(["app", *arguments])
    return options


def test_it_is_private_unless_asked_otherwise() -> None:
    options = _options()
    assert (options.host, options.share, options.auth, options.base) == ("127.0.0.1", False, None, None)
    assert _options("--auth", "me:a:b").auth == ("me", "a:b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--auth", "me"], "no USER:PASSWORD"),
        (["--adapter", "x"], "no NAME=PATH"),
        (["--adapter", "a=x", "--adapter", "a=y"], "two adapters are called 'a'"),
        (["--port", "x"], "--port"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["app", *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_base_and_adapters_are_loaded_and_their_folders_may_be_read(folders: Path, cache: Path) -> None:
    adapters = folders / "adapters"
    shared = prepare(_options(str(folders / "base"), "--adapter", f"mine={adapters / 'dora'}"), ignore_progress)
    assert shared.columns() == ["base", "mine"]
    assert shared.first_columns(shared.columns()) == ["base", "mine"]
    assert shared.source(str(adapters / "lora")) == adapters / "lora"
    assert shared.uploads.parent == cache
    elsewhere = prepare(_options(str(folders / "base"), "--folder", str(folders)), ignore_progress)
    assert elsewhere.columns() == ["base"]
    assert elsewhere.folders == (folders,)


def test_a_server_is_reached(folders: Path) -> None:
    with fake_server() as server:
        shared = prepare(_options("--server", server.url), ignore_progress)
        assert shared.columns() == ["base", "style"]
        assert shared.first_columns(shared.columns()) == ["base", "style"]
        assert shared.source("/anything") == "/anything"
        with launched(shared.backend, folders) as url:
            assert client(url).predict("x", ["base"], api_name="/generate")[0]["text"] == "big-base says <b> x"
    with pytest.raises(UnavailableError, match="does not answer"):
        prepare(_options("--server", f"http://127.0.0.1:{free_port()}"), ignore_progress)


def test_what_is_missing_is_said(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["app", str(folders / "nothing")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["app", str(folders / "base"), "--adapter", f"x={folders / 'adapters' / 'other'}"]) == 1
    assert "got" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", str(folders / "base"), "--port", str(port)]) == 1
    assert "Choose another --port." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", str(folders / "base")]) == 1
    assert "pip install 'dora-serve[app]'" in capsys.readouterr().err


def test_uploads_do_not_outlive_the_app(folders: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own: those of another app on the same cache stay."""
    dora = folders / "adapters" / "dora"
    files = [dora / "adapter_model.safetensors", dora / "adapter_config.json"]
    seen = []

    def interrupted(shared: Shared, options: argparse.Namespace) -> None:
        shared.backend.load("mine", unpack(files, shared.uploads))
        seen.extend(cache.rglob("upload-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("app.cli.serve", interrupted)
    other = unpack(files, prepare(_options(str(folders / "base")), ignore_progress).uploads)
    assert main(["app", str(folders / "base")]) == 130
    assert len(seen) == 2
    assert list(cache.rglob("upload-*")) == [other]
    assert list(cache.glob("uploads-*")) == [other.parent]


def test_a_cache_that_cannot_be_made_is_said(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["app", str(folders / "base")]) == 1
    assert "Set DORA_SERVE_CACHE to a folder of your own." in capsys.readouterr().err


def test_a_space_serves_the_example_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_BASE", "base-of-the-space")
    space: dict[str, Any] = runpy.run_path(str(ROOT / "app" / "space.py"))
    options = build_parser().parse_args(space["arguments"]())
    assert (options.base, options.host) == ("base-of-the-space", "0.0.0.0")
    assert [name for name, _ in options.adapter][:2] == ["dates-dora", "dates-lora"]
    assert all(os.path.isdir(path) for _, path in options.adapter)


def test_the_space_s_files_agree_with_the_project() -> None:
    front = (ROOT / "app" / "README.md").read_text(encoding="utf-8").split("---")[1]
    facts = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert (ROOT / facts["app_file"]).is_file()
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={facts['sdk_version']}" in constraints
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in (ROOT / "app" / "requirements.txt").read_text(encoding="utf-8").split():
        assert f'"{line}"' in project, line
    assert {re.split("[<>=]", line)[0] for line in (ROOT / "app" / "requirements.txt").read_text().split()} >= {"torch"}
