"""The engine over ONNX Runtime GenAI, against PEFT's own generate. Run with the environment of `make genai-env`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from app.cli import prepare
from app.onnx_backend import MARK
from app.run import Run
from dora_serve.cli import build_parser, main
from dora_serve.engine import Request, Sampling
from dora_serve.errors import CheckpointError, EngineError, PlanError, UnavailableError
from dora_serve.onnx_engine.engine import OnnxEngine
from dora_serve.progress import ignore_progress
from exporters.cli import main as export
from tests.cases import adapt, quiet, vary
from tests.engine_tokenizers import byte_tokenizer
from tests.onnx_models import GROUPED

PROMPTS = [np.random.default_rng(length).integers(3, 250, length).tolist() for length in (2, 5, 9, 13)]
NAMES = (None, "lora", "dora")
Generated = Callable[[str | None, list[int], int], list[int]]


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
    """transformers' own greedy generate of PEFT's model."""
    models: dict[str | None, Any] = {}
    with quiet():
        for name in NAMES:
            model: Any = transformers.LlamaForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
            models[name] = (PeftModel.from_pretrained(model, root / name) if name else model).eval()

    def generate(name: str | None, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.no_grad(), quiet():
            out = models[name].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
            )
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return generate


def test_requests_of_all_adapters_are_generate_of_each(engine: OnnxEngine, generated: Generated) -> None:
    rows = [(row, name) for row in range(4) for name in NAMES]
    requests = [Request(PROMPTS[row], adapter=name, max_tokens=9 + 2 * row) for row, name in rows]
    for max_rows in (12, 5):  # the latter lets some wait until others end
        for request, done in zip(requests, engine.complete(requests, max_rows=max_rows), strict=True):
            assert done.error is None
            assert list(done.token_ids) == generated(
                request.adapter, list(request.prompt or ()), request.max_tokens or 0
            )
    assert len({done.token_ids for done in engine.complete([Request(PROMPTS[2], adapter=one) for one in NAMES])}) == 3


def test_the_same_seed_gives_the_same_text_whatever_runs_beside_it(engine: OnnxEngine) -> None:
    requests = [
        Request(PROMPTS[row % 4], adapter=NAMES[row % 3], sampling=Sampling(temperature=1.0, seed=row), max_tokens=12)
        for row in range(9)
    ]
    together = engine.complete(requests)
    assert len({done.token_ids for done in together}) == 9
    for max_rows, order in ((1, range(9)), (4, reversed(range(9)))):
        chosen = list(order)
        again = engine.complete([requests[row] for row in chosen], max_rows=max_rows)
        assert [done.token_ids for done in again] == [together[row].token_ids for row in chosen]
        assert [done.logprobs for done in again] == [together[row].logprobs for row in chosen]


def test_text_streams_stops_at_a_string_and_can_be_cancelled(engine: OnnxEngine) -> None:
    whole, *_ = engine.complete([Request("abc", adapter="dora", max_tokens=24)])
    stop = whole.text[5:8]
    (stopped,) = engine.complete([Request("abc", adapter="dora", max_tokens=24, stop=(stop,))])
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    generation = engine.generate(
        [
            Request(PROMPTS[0], max_tokens=60, ignore_eos=True),
            Request(PROMPTS[1], adapter="dora", max_tokens=5, ignore_eos=True),
        ]
    )
    events = [next(generation) for _ in range(4)]
    assert {event.index for event in events} == {0, 1}
    generation.cancel(0)
    ended = {event.index: event.finish_reason for event in generation if event.finish_reason}
    assert ended == {0: "cancelled", 1: "length"}


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
    running = engine.generate([Request(PROMPTS[3], adapter="dora", max_tokens=8, ignore_eos=True)])
    tokens = [next(running).token_id for _ in range(3)]
    with pytest.raises(EngineError, match="1 request is using it"):
        engine.pool.unload("dora")
    report = engine.pool.load("dora", root / "exported" / "adapters" / "lora.onnx_adapter", replace=True)
    assert (report.replaced, report.method, report.rank) == (True, "LoRA", 3)
    tokens += [event.token_id for event in running if event.token_id is not None]
    assert tokens == generated("dora", PROMPTS[3], 8)  # what it began with
    (after,) = engine.complete([Request(PROMPTS[3], adapter="dora", max_tokens=8)])
    assert list(after.token_ids) == generated("lora", PROMPTS[3], 8)
    engine.pool.unload("dora")
    (gone,) = engine.complete([Request(PROMPTS[3], adapter="dora")])
    assert isinstance(gone.error, EngineError)


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
