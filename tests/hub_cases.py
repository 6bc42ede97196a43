"""What the tests of publishing share: a tiny model merged by the command, and the command against the loopback Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fake_hub import FakeHub
from tests.tiny_models import SIZES, adapt, build, save
from tests.warm import Ended, Warm

TOKEN = "hf_thisisatokenandmustnotleakatall"
CARD = "---\nlicense: cc-by-4.0\nlanguage:\n- de\n- en\n---\n# The base\n"


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path


@dataclass
class Desk:
    """A person at a machine: a Hub, a cache of one's own, and what was printed so far."""

    hub: FakeHub
    warm: Warm
    environment: dict[str, str]
    said: str = ""

    def run(self, *arguments: str | Path) -> Ended:
        ended = self.warm.run([str(argument) for argument in arguments], environment=self.environment)
        self.said += ended.output + ended.errors
        return ended

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        ended = self.run(*arguments, "--json")
        assert ended.code == code, ended.output + ended.errors
        assert ended.errors == ""
        return json.loads(ended.output)

    def error(self, *arguments: str | Path) -> str:
        ended = self.run(*arguments)
        assert ended.code == 1, ended.output + ended.errors
        assert ended.output == ""
        assert "Traceback" not in ended.errors
        return ended.errors


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    process = Warm(tmp_path_factory.mktemp("warm") / "runs")
    yield process
    process.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A Llama of five shards with a card, and a DoRA on it that says it was trained on a model of the Hub."""
    folder = tmp_path_factory.mktemp("inputs")
    model = build("AutoModelForCausalLM", "llama", **SIZES)
    base = save(model, folder / "base")
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="5KB")  # type: ignore[operator]
    (base / "README.md").write_text(CARD)
    (base / "LICENSE").write_text("Attribution")
    adapt(model, folder / "adapter", r=4, lora_alpha=8, use_dora=True, target_modules="all-linear")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "anna/llama"
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return Inputs(base, folder / "adapter")


@pytest.fixture(scope="module")
def merged(inputs: Inputs, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the merge of the two wrote. Read only."""
    return merge(warm, inputs, tmp_path_factory.mktemp("merged") / "dora")


def merge(warm: Warm, inputs: Inputs, out: Path, options: Sequence[str] = ()) -> Path:
    ended = warm.run(["merge", inputs.adapter, "--base", inputs.base, "-o", out, *options])
    assert ended.code == 0, ended.errors
    return out


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub().running() as running:
        running.log_in(TOKEN, "anna")
        yield running


@pytest.fixture
def desk(hub: FakeHub, warm: Warm, tmp_path: Path) -> Iterator[Desk]:
    """Somebody who is logged in as anna. Whatever the test did, the token was shown and written nowhere."""
    found = Desk(hub, warm, environment_of(hub, tmp_path / "cache"))
    yield found
    assert TOKEN not in found.said
    files = (path for path in tmp_path.rglob("*") if path.is_file())
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def environment_of(hub: FakeHub, cache: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "*",
        "no_proxy": "*",
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
