"""The engine over ONNX Runtime GenAI, against PEFT's own generate. Run with the environment of `make genai-env`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

from app.cli import prepare
from app.onnx_backend import MARK
from app.run import Run
from dora_serve.cli import build_parser, main
from dora_serve.engine import Request
from dora_serve.errors import CheckpointError, EngineError, PlanError, UnavailableError
from dora_serve.onnx_engine.engine import OnnxEngine
from dora_serve.progress import ignore_progress
from exporters.cli import main as export
from tests import onnx_engines
from tests.cases import adapt, vary
from tests.engine_tokenizers import byte_tokenizer
from tests.onnx_engines import PROMPTS, Generated, peft_generate
from tests.onnx_models import GROUPED


def save_model(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    sizes = {**GROUPED, "vocab_size": 259, "hidden_size": 64, "max_position_embeddings": 128, "eos_token_id": 258}
    vary(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, PEFT's adapters `lora` and `dora` of it, and `exported`, the base with slots and files of both."""
    root = tmp_path_factory.mktemp("genai")
    save_model(root / "model")
    start = transformers.LlamaForCausalLM.from_pretrained(root / "model")
    adapt(start, root / "lora", target_modules="all-linear", r=3)
    adapt(start, root / "dora", target_modules="all-linear", r=6, use_dora=True)
    merge = ["merge", str(root / "dora"), "--base", str(root / "model"), "--to", "onnx-adapters", "--runtime", "genai"]
    assert export([*merge, "--genai-python", sys.executable, "-o", str(root / "exported")]) == 0
    assert export(["onnx-adapter", str(root / "lora"), "--for", str(root / "exported")]) == 0
    return root


@pytest.fixture
def engine(root: Path) -> OnnxEngine:
    loaded = OnnxEngine.load(root / "exported", threads=1)
    for name in ("lora", "dora"):
        loaded.pool.load(name, root / "exported" / "adapters" / f"{name}.onnx_adapter")
    return loaded


@pytest.fixture(scope="module")
def generated(root: Path) -> Generated:
    return peft_generate(root / "model", {name: root / name for name in ("lora", "dora")})


def test_requests_of_all_adapters_are_generate_of_each(engine: OnnxEngine, generated: Generated) -> None:
    onnx_engines.a_batch_of_all_adapters_is_generate_of_each(engine, generated)


def test_a_prompt_may_end_with_the_token_that_pads(root: Path, generated: Generated, tmp_path: Path) -> None:
    """The runtime itself takes it off."""
    prompts = [[7, 9, 0], [8, 258, 258]]
    expected = [generated(None, prompt, 6) for prompt in prompts]
    folder = tmp_path / "exported"
    shutil.copytree(root / "exported", folder)
    config = json.loads((folder / "genai_config.json").read_text())
    for pad in (0, 258):
        config["model"]["pad_token_id"] = pad
        (folder / "genai_config.json").write_text(json.dumps(config))
        runner = OnnxEngine.load(folder, threads=1)
        asked = [Request(prompt, max_tokens=6, ignore_eos=True) for prompt in prompts]
        assert [list(done.token_ids) for done in runner.complete(asked)] == expected


def test_the_same_seed_gives_the_same_text_whatever_runs_beside_it(engine: OnnxEngine) -> None:
    onnx_engines.the_same_seed_gives_the_same_text_whatever_runs_beside_it(engine, same_numbers=True)


def test_text_streams_stops_at_a_string_and_can_be_cancelled(engine: OnnxEngine) -> None:
    whole, *_ = engine.complete([Request("abc", adapter="dora", max_tokens=24)])
    stop = whole.text[5:8]
    (stopped,) = engine.complete([Request("abc", adapter="dora", max_tokens=24, stop=(stop,))])
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    onnx_engines.events_stream_and_one_request_can_be_cancelled(engine)


def test_a_text_may_fill_the_context_and_no_more(engine: OnnxEngine, generated: Generated) -> None:
    (done,) = engine.complete([Request(PROMPTS[3], adapter="lora", max_tokens=None, ignore_eos=True)])
    assert len(done.token_ids) + len(PROMPTS[3]) == 128
    assert list(done.token_ids[:20]) == generated("lora", PROMPTS[3], 20)[:20]
    (full,) = engine.complete([Request([5] * 128)])
    assert isinstance(full.error, EngineError)
    assert "128" in str(full.error)


def test_adapters_come_go_and_are_replaced_while_requests_run(
    engine: OnnxEngine, root: Path, generated: Generated
) -> None:
    file = root / "exported" / "adapters" / "lora.onnx_adapter"
    onnx_engines.adapters_come_go_and_are_replaced_while_requests_run(engine, file, generated)


def test_verify_sees_a_file_of_another_adapter(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The swapped graph against PEFT's files, then with the LoRA's file in the place of the DoRA's."""
    asked = ["--base", str(root / "model"), "--genai-python", sys.executable, "--json"]
    assert export(["verify", str(root / "exported"), "--adapter", str(root / "dora"), *asked]) == 0
    found = json.loads(capsys.readouterr().out)["swap_check"]
    assert found["kl"] < 1e-8
    assert found["effect_max_abs"] > 100 * found["tolerance"]
    assert found["greedy_equal"] == found["greedy_total"] > 0
    assert found["without_magnitude_max_abs"] > found["tolerance"]
    (root / "other").mkdir()
    for path in root.joinpath("exported").iterdir():
        if path.is_file():
            (root / "other" / path.name).symlink_to(path)
    (root / "other" / "adapters").mkdir()
    (root / "other" / "adapters" / "dora.onnx_adapter").symlink_to(root / "exported" / "adapters" / "lora.onnx_adapter")
    assert export(["verify", str(root / "other"), "--adapter", str(root / "dora"), *asked]) == 1


def test_int4_serves_the_adapter_over_its_own_numbers(root: Path, tmp_path: Path) -> None:
    merge = ["merge", str(root / "dora"), "--base", str(root / "model"), "--to", "onnx-adapters", "--runtime", "genai"]
    out = tmp_path / "int4"
    assert export([*merge, "--quantize", "int4", "--genai-python", sys.executable, "-o", str(out)]) == 0
    check = json.loads((out / "dora_export.json").read_text())["swap_check"]
    assert check["reference"] == "dequantized"
    assert check["max_abs"] < 0.1 * check["effect_max_abs"]
    engine = OnnxEngine.load(out, threads=1)
    engine.pool.load("dora", out / "adapters" / "dora.onnx_adapter")
    base, dora = engine.complete([Request(PROMPTS[3], adapter=name, max_tokens=12) for name in (None, "dora")])
    assert base.token_ids != dora.token_ids


def test_what_it_cannot_serve_is_refused(root: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", seed=3)
    start = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    adapt(start, tmp_path / "lora", target_modules="all-linear", r=3)
    merge = ["merge", str(tmp_path / "lora"), "--base", str(tmp_path / "model"), "--to", "onnx-adapters", "--no-verify"]
    assert export([*merge, "--runtime", "genai", "--genai-python", sys.executable, "-o", str(tmp_path / "other")]) == 0
    engine = OnnxEngine.load(root / "exported", threads=1)
    with pytest.raises(PlanError, match="another export"):
        engine.pool.load("other", tmp_path / "other" / "adapters" / "lora.onnx_adapter")
    with pytest.raises(SystemExit):
        export([*merge, "--runtime", "genai", "--mixed-batches", "-o", str(tmp_path / "mixed")])
    with pytest.raises(UnavailableError, match="no CUDA"):
        OnnxEngine.load(root / "exported", device="cuda")
    config = json.loads((tmp_path / "other" / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    (tmp_path / "other" / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UnavailableError, match=r"was made for CUDA.*onnxruntime-genai-cuda.*for the CPU"):
        OnnxEngine.load(tmp_path / "other")
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    (tmp_path / "other" / "genai_config.json").write_text(json.dumps(config))
    (tmp_path / "other" / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot be loaded by ONNX Runtime GenAI"):
        OnnxEngine.load(tmp_path / "other")


def test_generate_and_the_page_take_such_a_folder(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path))
    files = [f"--adapter={name}={root}/exported/adapters/{name}.onnx_adapter" for name in ("lora", "dora")]
    given = ["generate", str(root / "exported"), *files, "--prompt", "a c e", "--max-tokens", "6", "--json"]
    assert main(given) == 0
    columns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [column["adapter"] for column in columns] == ["base", "lora", "dora"]
    assert len({tuple(column["token_ids"]) for column in columns}) == 3
    asked = ["app", str(root / "model"), "--adapter", f"dora={root / 'dora'}", "--onnx", str(root / "exported")]
    shared = prepare(build_parser().parse_args(asked), ignore_progress)
    names = ["base", "dora", f"base{MARK}", f"dora{MARK}", f"lora{MARK}"]
    assert shared.columns() == names
    requests = [Request("a c e", adapter=None if name == "base" else name, max_tokens=12) for name in names]
    *_, last = Run(shared.backend, requests).looks()
    texts = {name: answer.token_ids for name, answer in zip(names, last, strict=True)}
    assert texts["base"] == texts[f"base{MARK}"] != texts["dora"] == texts[f"dora{MARK}"]
