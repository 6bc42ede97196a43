"""`dora-serve vllm`: what it starts. tests/vllm starts it."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dora_serve.cli import main
from dora_serve.norm_scale_file import fingerprint, read_norm_scales
from exporters.convert.run import ConvertRequest, convert, write_conversion
from tests.cases import LINEARS, adapt, llama, rewrite_json, save

Planned = Callable[..., tuple[dict[str, str], list[str]]]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Planned:
    """Runs `dora-serve vllm ... --dry-run` as if vLLM were installed: what is set, and the words of the command."""
    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec if name == "vllm" else find(name, *rest))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0" if name == "vllm" else version(name))

    def run(*arguments: Any) -> tuple[dict[str, str], list[str]]:
        before, _, after = " ".join(["vllm", *map(str, arguments)]).partition(" -- ")
        command = [*before.split(), "--dry-run", *(["--", *after.split()] if after else [])]
        assert main(command) == 0, capsys.readouterr().err
        words = shlex.split(capsys.readouterr().out)
        program = words.index(sys.executable)
        return dict(word.split("=", 1) for word in words[:program]), words[program + 1 :]

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    model = llama()
    adapt(model, folder / "dora", target_modules=list(LINEARS), use_dora=True)
    adapt(model, folder / "wide", target_modules=["q_proj"], r=12)
    return {"base": save(model, folder / "base"), "dora": folder / "dora", "wide": folder / "wide"}


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_settings_follow_from_the_adapters(planned: Planned, folders: dict[str, Path]) -> None:
    environment, words = planned(
        folders["base"], "--adapter", f"a={folders['dora']}", "--adapter", f"b={folders['wide']}", "-- --port 8001"
    )
    assert environment == {}
    assert words[:5] == ["-m", "vllm.entrypoints.cli.main", "serve", str(folders["base"]), "--enable-lora"]
    assert option(words, "--max-lora-rank") == "16"
    assert option(words, "--max-loras") == "2"
    modules = [json.loads(word) for word in words if word.startswith("{")]
    assert modules == [{"name": "a", "path": str(folders["dora"])}, {"name": "b", "path": str(folders["wide"])}]
    assert words[-2:] == ["--port", "8001"]


def test_adapters_may_come_later_where_that_is_asked_for(planned: Planned, folders: dict[str, Path]) -> None:
    environment, words = planned("user/model@abc", "--runtime-loading", "--max-rank", 33)
    assert environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    assert words[3:6] == ["user/model", "--revision", "abc"]
    assert option(words, "--max-lora-rank") == "64"
    assert option(words, "--max-loras") == "4"
    assert "--lora-modules" not in words


def test_an_adapter_of_another_format_is_converted(
    planned: Planned, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    write_conversion(convert(ConvertRequest(str(folders["dora"]), "mlx")), tmp_path / "mlx")
    _, words = planned(folders["base"], "--adapter", f"a={tmp_path / 'mlx'}")
    path = Path(json.loads(option(words, "--lora-modules"))["path"])
    assert path.parent == tmp_path / "cache" / "vllm"
    stored = read_norm_scales(path)
    assert stored is not None
    assert stored.base == fingerprint(folders["base"])


def test_the_rank_is_the_largest_that_the_configuration_names(
    planned: Planned, folders: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM refuses an adapter for a rank above --max-lora-rank in its configuration, be it that of no module."""
    folder = shutil.copytree(folders["dora"], tmp_path / "dora")
    rewrite_json(folder / "adapter_config.json", r=20, rank_pattern=dict.fromkeys(LINEARS, 4))
    _, words = planned(folders["base"], "--adapter", f"a={folder}")
    assert option(words, "--max-lora-rank") == "32"


def test_what_vllm_cannot_serve_is_refused_before_it_is_started(
    planned: Planned, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(llama(), tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapt(llama(), tmp_path / "rows", target_modules=["q_proj"], trainable_token_indices=[3])
    adapt(llama(), tmp_path / "bias", target_modules=["q_proj"], lora_bias=True)
    for name, said in (("head", "lm_head.weight as a whole"), ("rows", "trained rows"), ("bias", "biases of its own")):
        assert main(["vllm", str(folders["base"]), "--adapter", f"a={tmp_path / name}", "--dry-run"]) == 1
        assert said in capsys.readouterr().err
    adapters = ["--adapter", f"a={folders['dora']}", "--dry-run"]
    assert main(["vllm", str(folders["base"]), *adapters, "--", "--lora-modules", "b=c"]) == 1
    assert "takes the place of --adapter" in capsys.readouterr().err


def test_a_list_of_plugins_gets_ours_too(
    planned: Planned, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for listed, wanted in (
        ("", "dora_serve"),
        ("lora_hf_hub_resolver", "lora_hf_hub_resolver,dora_serve"),
        ("dora_serve,other", None),
    ):
        monkeypatch.setenv("VLLM_PLUGINS", listed)
        assert planned(folders["base"])[0].get("VLLM_PLUGINS") == wanted


def test_what_cannot_be_started_is_said(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert main(["vllm", str(folders["base"]), "--dry-run"]) == 1
    assert "pip install 'dora-serve[vllm]'" in capsys.readouterr().err


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["vllm", "base", "--max-loras", "0"], ["generate", "base", "--prompt", "x", "--", "--port", "1"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "takes nothing after --" in capsys.readouterr().err
