"""The launched app, driven by gradio_client: every adapter answers for itself, and what is wrong is said."""

from __future__ import annotations

import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from peft import PeftModel
from safetensors.torch import load

from app.backend import BASE
from app.desk import Settings
from app.engine_backend import EngineBackend
from dora_serve.engine import Engine
from tests.app_cases import PROMPT, client, launched, make_folders
from tests.cases import quiet, rewrite_tensors

NAMES = [BASE, "lora", "dora"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def engine(folders: Path) -> Engine:
    engine = Engine.load(folders / "base")
    for name in ("lora", "dora"):
        engine.pool.load(name, folders / "adapters" / name)
    return engine


@pytest.fixture(scope="module")
def url(engine: Engine, folders: Path) -> Iterator[str]:
    with launched(EngineBackend(engine, str(folders / "base")), folders) as url:
        yield url


def _generate(one: Any, columns: list[str], prompt: str = PROMPT, **settings: Any) -> list[dict[str, Any]]:
    given = {"chat": False, "max_tokens": 12, **settings}
    answers: list[dict[str, Any]] = one.predict(prompt, columns, api_name="/generate", **given)
    return answers


def _alone(engine: Engine, column: str, prompt: str = PROMPT, **settings: Any) -> str:
    request = Settings(**{"chat": False, "max_tokens": 12, **settings}).request(column, prompt)
    return engine.complete([request])[0].text


def _add(one: Any, where: str = "", files: list[Path] | None = None, name: str = "", replace: bool = False) -> str:
    uploaded = [handle_file(path) for path in files or []]
    result = one.predict(where, uploaded or None, name, replace, [BASE], api_name="/add_adapter")
    return str(result[0])


def _names(one: Any) -> list[str]:
    return [row["name"] for row in one.predict(api_name="/adapters")]


def test_three_columns_stream_and_end_as_the_engine_answers(url: str, engine: Engine) -> None:
    job = client(url).submit(PROMPT, NAMES, chat=False, max_tokens=40, seed=1, temperature=0.8, api_name="/generate")
    answers = job.result(timeout=60)
    looks = job.outputs()
    assert len(looks) > 1
    wanted = [_alone(engine, name, max_tokens=40, seed=1, temperature=0.8) for name in NAMES]
    assert [answer["text"] for answer in answers] == wanted
    assert len(set(wanted)) == 3
    for before, after in zip(looks[0], looks[-1], strict=True):
        assert after["text"].startswith(before["text"])
        assert after["finish"] in ("stop", "length")
        assert after["first_token"] > 0


def test_twenty_clients_are_each_answered_by_their_own_adapter(url: str, engine: Engine) -> None:
    wanted = {name: _alone(engine, name) for name in NAMES}
    assert len(set(wanted.values())) == 3

    def ask(number: int) -> tuple[str, str]:
        name = NAMES[number % 3]
        return name, _generate(client(url), [name])[0]["text"]

    with ThreadPoolExecutor(20) as pool:
        for name, text in pool.map(ask, range(20)):
            assert text == wanted[name]


def test_one_client_s_stop_does_not_touch_another_s(url: str) -> None:
    first, second = client(url), client(url)
    jobs = [
        one.submit(PROMPT, ["lora", "dora"], chat=False, max_tokens=200, api_name="/generate")
        for one in (first, second)
    ]
    while not all(job.outputs() for job in jobs):
        time.sleep(0.02)
    assert first.predict(1, api_name="/stop") == "Stopped."
    mine, other = (job.result(timeout=60) for job in jobs)
    assert [answer["finish"] for answer in mine] == ["length", "cancelled"]
    assert [answer["finish"] for answer in other] == ["length", "length"]
    assert first.predict(-1, api_name="/stop") == "Nothing is running."


@pytest.mark.parametrize(
    ("prompt", "columns", "said"),
    [
        ("", NAMES, "prompt is empty"),
        ("x" * 10**6, NAMES, "1,000,000"),
        ("x", [], "0 col"),
        ("x", "base", "not a text and a list"),
        (None, NAMES, "not a text and a list"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(url: str, prompt: Any, columns: Any, said: str) -> None:
    with pytest.raises(AppError, match=said):
        _generate(client(url), columns, prompt)


def test_one_column_s_error_leaves_the_others(url: str, engine: Engine) -> None:
    answers = _generate(client(url), [BASE, "gone"])
    assert answers[0]["text"] == _alone(engine, BASE)
    assert "There is no adapter 'gone'" in answers[1]["error"]
    (answer,) = _generate(client(url), [BASE], "the " * 400)
    assert "the context has room for 256" in answer["error"]
    (answer,) = _generate(client(url), [BASE], temperature=-1.0)
    assert "temperature is -1.0" in answer["error"]


def test_an_adapter_is_added_used_replaced_and_removed(url: str, folders: Path, engine: Engine) -> None:
    one = client(url)
    assert "Added mine: LoRA of rank 4 on 6 modules" in _add(one, str(folders / "adapters" / "lora"), name="mine")
    assert "mine" in _names(one)
    assert _generate(one, ["mine"])[0]["text"] == _alone(engine, "lora")
    already = _add(one, str(folders / "adapters" / "dora"), name="mine")
    assert "already" in already
    assert "or replace that one." in already
    assert "Replaced mine: DoRA of rank 2" in _add(one, str(folders / "adapters" / "dora"), name="mine", replace=True)
    assert _generate(one, ["mine"])[0]["text"] == _alone(engine, "dora")
    assert "Removed mine" in one.predict("mine", [BASE], api_name="/remove_adapter")[0]
    assert "mine" not in _names(one)
    assert "There is no adapter" in one.predict("mine", [BASE], api_name="/remove_adapter")[0]


def test_an_adapter_is_replaced_while_others_generate(url: str, folders: Path, engine: Engine) -> None:
    one, other = client(url), client(url)
    _add(one, str(folders / "adapters" / "lora"), name="swap")
    job = one.submit(PROMPT, ["swap"], chat=False, max_tokens=200, api_name="/generate")
    while not job.outputs():
        time.sleep(0.02)
    assert "Replaced" in _add(other, str(folders / "adapters" / "dora"), name="swap", replace=True)
    assert job.result(timeout=60)[0]["text"] == _alone(engine, "lora", max_tokens=200)
    assert _generate(other, ["swap"])[0]["text"] == _alone(engine, "dora")
    assert "Removed" in other.predict("swap", [BASE], api_name="/remove_adapter")[0]


def test_an_adapter_is_uploaded_and_used(url: str, folders: Path, engine: Engine, tmp_path: Path) -> None:
    one = client(url)
    folder = folders / "adapters" / "dora"
    files = [folder / "adapter_model.safetensors", folder / "adapter_config.json"]
    assert "Added loose" in _add(one, files=files, name="loose")
    called = shutil.copyfile(files[0], tmp_path / "style.safetensors")
    assert "Added style" in _add(one, files=[files[1], called])
    one.predict("style", [BASE], api_name="/remove_adapter")
    path = tmp_path / "packed.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, f"inside/{file.name}")
    assert "Added packed" in _add(one, files=[path])
    texts = [answer["text"] for answer in _generate(one, ["loose", "packed"])]
    assert texts == [_alone(engine, "dora")] * 2
    assert len(list((folders / "uploads").iterdir())) == 2
    assert "Replaced packed: LoRA" in _add(one, str(folders / "adapters" / "lora"), name="packed", replace=True)
    for name in ("loose", "packed"):
        one.predict(name, [BASE], api_name="/remove_adapter")
    assert not list((folders / "uploads").iterdir())
    assert (folders / "adapters" / "lora").is_dir()


def test_bad_uploads_are_said_and_change_nothing(url: str, folders: Path, tmp_path: Path) -> None:
    one = client(url)
    before = _names(one)
    climbing = tmp_path / "climbing.zip"
    with zipfile.ZipFile(climbing, "w") as archive:
        archive.writestr("../../evil.json", "{}")
        archive.writestr("adapter_config.json", "{}")
    assert "climbs out of its folder" in _add(one, files=[climbing])
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"\xff" * 400)
    config = folders / "adapters" / "lora" / "adapter_config.json"
    assert "Not added." in _add(one, files=[noise, config])
    assert "wanted a .safetensors with its adapter_config.json" in _add(one, files=[noise])
    said = _add(one, str(folders / "adapters" / "other"))
    assert "Not added." in said
    assert "got" in said
    assert "in no folder that this page may read" in _add(one, str(folders / "base"))
    assert "in no folder that this page may read" in _add(one, "/etc")
    assert "No adapter is named" in _add(one)
    assert "Both a folder and files" in _add(one, "x", files=[noise])
    assert "cannot be called &#x27;base&#x27;" in _add(one, str(folders / "adapters" / "lora"), name="base")
    lora = str(folders / "adapters" / "lora")
    for name in ("x" * 65, "a\u202eb", "two\nlines"):
        assert "a name of 64 visible characters" in _add(one, lora, name=name)
    assert _names(one) == before
    assert not list((folders / "uploads").iterdir())
    assert not (folders / "evil.json").exists()


def test_an_unknown_hub_id_is_said(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = _add(client(url), "nobody/nothing-of-the-kind")
    assert "Not added." in said
    assert "nobody/nothing-of-the-kind" in said


def test_an_adapter_that_changes_nothing_is_said_to(url: str, folders: Path) -> None:
    import shutil

    one = client(url)
    folder = folders / "adapters" / "idle"
    shutil.copytree(folders / "adapters" / "lora", folder)
    rewrite_tensors(
        folder / "adapter_model.safetensors",
        lambda tensors: [value.zero_() for name, value in tensors.items() if "lora_B" in name],
    )
    assert "It changes nothing" in _add(one, str(folder))
    one.predict("idle", [BASE], api_name="/remove_adapter")


def test_the_analysis_is_drawn_and_tabulated(url: str) -> None:
    one = client(url)
    said, picture, numbers = one.predict(["lora", "dora"], api_name="/inspect")
    assert not said
    assert "<svg" in picture
    assert "currentColor" in picture
    assert "<td>dora</td><td>all</td><td>6</td>" in numbers
    assert "<td>lora</td><td>q_proj</td><td>2</td>" in numbers
    assert "No adapter is chosen" in one.predict([], api_name="/inspect")[0]
    assert "There is no adapter" in one.predict(["gone"], api_name="/inspect")[0]


def test_an_adapter_is_merged_verified_and_handed_over(url: str, folders: Path) -> None:
    one = client(url)
    said, report, download = one.predict("dora", "safetensors", api_name="/export")
    assert "Exported to" in said
    assert "Verified: the merged model is the unmerged one" in report
    with zipfile.ZipFile(download["value"]) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
        weights = load(archive.read("dora-safetensors/model.safetensors"))
    assert {"config.json", "dora_export.json", "model.safetensors"} <= names
    merged = _merged_by_peft(folders / "base", folders / "adapters" / "dora")
    assert weights.keys() == merged.keys()
    for key, value in weights.items():
        # PEFT merges in float32, and so is off by some of its spacings.
        assert torch.allclose(value, merged[key], rtol=1e-5, atol=1e-6), key
    assert "There is no adapter" in _exported(one, "gone")
    assert "No adapter is chosen" in _exported(one, None)


@pytest.mark.parametrize(
    ("to", "files", "shown"),
    [
        ("onnx", {"model.onnx"}, "ONNX Runtime (CPUExecutionProvider) against torch"),
        ("onnx-adapters", {"model.onnx", "adapters/"}, "8 of 8 go on alike"),
    ],
)
def test_an_export_may_be_onnx(url: str, to: str, files: set[str], shown: str, tmp_path: Path) -> None:
    """Its stages are told while it runs, its tables shown, and ONNX Runtime takes what is downloaded."""
    job = client(url).submit("dora", to, api_name="/export")
    stages: list[str] = []
    while not job.done():
        stages += [unit.desc for unit in job.status().progress_data or () if unit.desc not in stages[-1:]]
        time.sleep(0.02)
    said, report, download = job.result()
    assert "Exported to" in said
    assert len(set(stages)) > 2, stages
    assert "Verified: the merged model is the unmerged one" in report
    assert shown in report
    with zipfile.ZipFile(download["value"]) as archive:
        archive.extractall(tmp_path)
    found = {path.relative_to(tmp_path / f"dora-{to}").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert all([name for name in found if name.startswith(file)] for file in files)
    session = onnxruntime.InferenceSession(tmp_path / f"dora-{to}" / "model.onnx", providers=["CPUExecutionProvider"])
    assert "input_ids" in [one.name for one in session.get_inputs()]


def _exported(one: Any, name: str | None) -> str:
    return str(one.predict(name, "safetensors", api_name="/export")[0])


def _merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    with quiet():
        start = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged: Any = PeftModel.from_pretrained(start, str(adapter))
        return dict(merged.merge_and_unload().state_dict())


def test_a_prompt_set_is_run_in_all_columns_and_scored(url: str, engine: Engine, tmp_path: Path) -> None:
    one = client(url)
    right = _alone(engine, "dora", max_tokens=4)
    path = tmp_path / "set.jsonl"
    path.write_text(f'{{"prompt": "{PROMPT}", "answer": "{right}"}}\n{{"prompt": "moon star", "answer": "never"}}\n')
    said, scores, table, download = one.predict(handle_file(path), NAMES, 4, False, api_name="/run_prompt_set")
    assert "2 prompts in 3 columns" in said
    assert "50% exact" in scores
    for prompt, answer in ((PROMPT, right), ("moon star", "never")):
        texts = [prompt, answer, *(_alone(engine, name, prompt, max_tokens=4) for name in NAMES)]
        assert f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>" in table
    assert download
    assert "no file of prompts" in one.predict(None, NAMES, 4, False, api_name="/run_prompt_set")[0]


def test_a_client_that_goes_away_in_the_middle_lets_go_of_its_adapter(url: str, engine: Engine) -> None:
    one = client(url)
    job = one.submit(PROMPT, ["dora"], chat=False, max_tokens=200, temperature=1.2, api_name="/generate")
    while not job.outputs():
        time.sleep(0.02)
    job.cancel()
    for thread in [thread for thread in threading.enumerate() if thread.name == "run"]:
        thread.join(60)
    assert not any(entry.in_use for entry in engine.pool.list())
