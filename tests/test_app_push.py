"""Publishing from the page: `dora-serve app` as it is run, driven by gradio_client, against the loopback Hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.app_cases import client, free_port, make_folders
from tests.fake_hub import FakeHub, Fault
from tests.hub_cases import TOKEN

ROOT = Path(__file__).parent.parent
OF_THE_MACHINE = "hf_ofthemachinethatservesthepage00"


@dataclass
class Page:
    """The app in a process of its own, on a machine that is logged in as somebody else."""

    url: str
    hub: FakeHub
    home: Path
    process: subprocess.Popen[bytes]
    heard: list[str] = field(default_factory=list)

    def push(self, repo_id: str = "anna/dora", token: str = TOKEN, name: str | None = "dora", **options: Any) -> str:
        said, left = self.one.predict(name, "safetensors", repo_id, token, **options, api_name="/push")
        assert left == ""
        self.heard.append(said)
        return str(said)

    def __post_init__(self) -> None:
        self.one = client(self.url)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    root = make_folders(tmp_path_factory.mktemp("app"))
    home = root / "home"
    home.mkdir()
    port = free_port()
    with FakeHub().running() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_TOKEN": OF_THE_MACHINE,
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "DORA_SERVE_CACHE": str(home / "cache"),
            "TMPDIR": str(home),
            "NO_PROXY": "*",
            "no_proxy": "*",
        }
        adapter = f"dora={root / 'adapters' / 'dora'}"
        command = [sys.executable, "-m", "dora_serve.cli", "app", str(root / "base"), "--adapter", adapter]
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=(home / "output").open("wb"),
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{port}"
        while not _answers(url):
            assert process.poll() is None, (home / "output").read_text()
            time.sleep(0.2)
        yield Page(url, hub, home, process)
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(autouse=True)
def fresh(page: Page) -> Iterator[None]:
    """A Hub that knows anna and the machine's owner; and whatever was done, no token was said or kept."""
    hub = page.hub
    hub.repositories.clear()
    hub.faults.clear()
    hub.stored.clear()
    hub.requests.clear()
    hub.tokens, hub.users = set(), {}
    hub.log_in(TOKEN, "anna")
    hub.log_in(OF_THE_MACHINE, "owner")
    yield
    for token in (TOKEN, OF_THE_MACHINE):
        assert token not in "".join(page.heard)
        files = (path for path in page.home.rglob("*") if path.is_file())
        assert not [path for path in files if token.encode() in path.read_bytes()]


def test_an_export_is_published_and_linked(page: Page) -> None:
    assert "is not exported to safetensors yet" in page.push()
    assert "Exported to" in page.one.predict("dora", "safetensors", api_name="/export")[0]
    said = page.push()
    assert "Published (private)" in said
    assert f'href="{page.hub.endpoint}/anna/dora"' in said
    files = page.hub.files("anna/dora")
    assert {"model.safetensors", "dora_export.json", "README.md"} <= set(files)
    assert b"| elements that are not the formula rounded once | 0 of" in files["README.md"]
    assert page.hub.repositories["anna/dora"].private
    assert "0 files sent" in page.push()
    assert "Published (public)" in page.push("anna/open", public=True)
    assert not page.hub.repositories["anna/open"].private
    assert {request.token for request in page.hub.requests} <= {TOKEN, None, OF_THE_MACHINE}
    assert not [one for one in page.hub.requests if one.token == OF_THE_MACHINE and "anna" in one.path]


def test_what_had_the_name_before_is_not_published(page: Page) -> None:
    """The export is of the adapter that was exported, and not of one that has its name now."""
    assert "Exported to" in page.one.predict("dora", "safetensors", api_name="/export")[0]
    folder = next(page.home.parent.rglob("adapters/dora"))
    other = shutil.copytree(folder.with_name("lora"), folder.with_name("other-lora"))
    for path in (other, folder):
        page.one.predict(str(path), None, "dora", True, ["base"], api_name="/add_adapter")
        assert ("is not exported" in page.push("anna/dora")) == (path == other)


def test_what_is_wrong_is_a_sentence(page: Page) -> None:
    page.one.predict("dora", "safetensors", api_name="/export")
    # Nobody publishes as the owner of the machine.
    assert "No token is given" in page.push("owner/dora", token="  ")
    assert not [one for one in page.hub.requests if one.method == "POST"]
    assert "No adapter is chosen" in page.push(name=None)
    assert "wanted user/name" in page.push("dora")
    assert "may have expired" in page.push(token="hf_" + "0" * 30)
    assert "forbids" in page.push("bert/dora")
    page.hub.faults.append(Fault("POST .*/batch", 507))
    assert "no room for" in page.push()
    page.hub.faults.append(Fault("POST .*/commit/", 418, body={"error": f"Bearer {TOKEN}"}))
    assert "Bearer hf_***" in page.push()
    assert "Published" in page.push()


def test_the_field_of_the_token_hides_it(page: Page) -> None:
    config = page.one.config
    fields = {part["props"].get("elem_id"): part["props"] for part in config["components"]}
    assert fields["ds-token"]["type"] == "password"
