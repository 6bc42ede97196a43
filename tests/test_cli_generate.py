"""`dora-serve generate`: one batch, a column each, errors in words or JSON."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from dora_serve.cli import main
from dora_serve.engine import Engine, Request, Sampling
from dora_serve.errors import AdapterError
from dora_serve.onnx_engine.pool import OnnxPool

ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"


def _columns(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def _usage(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["generate", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_base_and_every_adapter_answer_in_one_batch(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"dates": "dates-dora", "other": "style-lora"}
    given = [part for name, folder in names.items() for part in ("--adapter", f"{name}={ADAPTERS / folder}")]
    options = ["--chat", "--system", "Be brief.", "--max-tokens", "12", "--temperature", "0.7", "--seed", "5", "--json"]
    assert main(["generate", str(smollm2), *given, "--prompt", "On 3 May 1999", *options]) == 0
    columns = _columns(capsys)
    assert [column["adapter"] for column in columns] == ["base", "dates", "other"]

    engine = Engine.load(smollm2)
    for name, folder in names.items():
        engine.pool.load(name, ADAPTERS / folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "On 3 May 1999"}]
    for column, name in zip(columns, (None, *names), strict=True):
        request = Request(messages=messages, adapter=name, sampling=Sampling(temperature=0.7, seed=5), max_tokens=12)
        (alone,) = engine.complete([request])
        assert (column["text"], column["token_ids"]) == (alone.text, list(alone.token_ids))
        assert column["finish_reason"] == alone.finish_reason
        assert column["timings"]["tokens"] == len(alone.token_ids)
    assert len({column["text"] for column in columns}) == 3


def test_a_person_sees_whose_column_it_is(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = f"dates={ADAPTERS / 'dates-dora'}"
    assert main(["generate", str(smollm2), "--adapter", adapter, "--prompt", "Hello", "--max-tokens", "3"]) == 0
    printed = capsys.readouterr()
    heads = [line for line in printed.out.splitlines() if line.startswith("--- ")]
    assert heads[0].startswith("--- base (3 tokens")
    assert heads[1].startswith("--- dates (DoRA, rank 4, 210 modules, 3 tokens")
    assert printed.err == ""


def test_what_cannot_be_answered_is_said_in_its_column(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "one two three " * 4000
    assert main(["generate", str(smollm2), "--prompt", prompt, "--json"]) == 1
    (column,) = _columns(capsys)
    assert column["finish_reason"] == "error"
    assert column["error"]["type"] == "EngineError"
    assert "the context has room for 8192" in column["error"]["message"]
    assert main(["generate", str(smollm2), "--prompt", "\udcff"]) == 1
    printed = capsys.readouterr()
    assert "error: The tokenizer does not take this text" in printed.out
    assert printed.err == ""


def test_an_adapter_that_is_not_there_stops_the_command(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = f"x={smollm2 / 'nothing'}"
    assert main(["generate", str(smollm2), "--adapter", adapter, "--prompt", "x", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "AdapterError"
    assert error["remedy"]


def test_a_base_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["generate", str(ADAPTERS / "dates-dora"), "--prompt", "x"]) == 1
    assert "adapter" in capsys.readouterr().err


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no NAME=PATH" in _usage(capsys, "base", "--adapter", "dates", "--prompt", "x")
    assert "the base's own name" in _usage(capsys, "base", "--adapter", "base=x", "--prompt", "x")
    assert "two adapters are called 'a'" in _usage(
        capsys, "base", "--adapter", "a=x", "--adapter", "a=y", "--prompt", "x"
    )
    assert "--prompt" in _usage(capsys, "base")
    assert "--prompt is empty" in _usage(capsys, "base", "--prompt", "")
    assert "temperature is -1.0, wanted 0 or more" in _usage(capsys, "base", "--prompt", "x", "--temperature", "-1")
    for rank in ("-1", "0"):
        assert f"--max-rank {rank}: wanted a whole" in _usage(capsys, "base", "--prompt", "x", "--max-rank", rank)
    assert "max_tokens is 0" in _usage(capsys, "base", "--prompt", "x", "--max-tokens", "0")


@pytest.mark.parametrize(
    "option",
    [
        *(["--dtype", "float16"], ["--max-rank", "256"], ["--lora-alpha", "8"], ["--format", "peft"]),
        *(["--magnitudes", "norm"], ["--norm-eps", "0"], ["--allow-missing-magnitudes"], ["--allow-pickle"]),
        ["--ignore-config", "x"],
    ],
)
def test_what_a_graph_has_settled_is_not_asked_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    said = _usage(capsys, str(tmp_path), "--prompt", "x", *option)
    assert f"{option[0]} is of a base that torch runs" in said
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 1  # no usage, but this is no graph


def test_a_command_that_mends_it_can_be_pasted(tmp_path: Path) -> None:
    (tmp_path / "an adapter").mkdir()
    pool = OnnxPool(None, tmp_path / "a base")  # type: ignore[arg-type]
    with pytest.raises(AdapterError) as raised:
        pool._file(tmp_path / "an adapter")
    words = shlex.split(str(raised.value.remedy).removeprefix("Make it: "))
    assert words[2:] == [str(tmp_path / "an adapter"), "--for", str(tmp_path / "a base")]


def test_errors_are_lines_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "x", "--json"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["error"]["type"] == "CheckpointError"
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path), "--prompt", "", "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    error = json.loads(line)["error"]
    assert error["type"] == "UsageError"
    assert error["remedy"] == "dora-serve generate --help"


def test_a_slip_in_a_path_is_said_before_the_base_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "load", None)  # which nothing may call
    adapter = tmp_path / "adaptr"
    assert main(["generate", "base", "--adapter", f"a={adapter}", "--prompt", "x"]) == 1
    assert f"{str(adapter)!r} does not exist" in capsys.readouterr().err
