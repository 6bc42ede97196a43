"""The engine over ONNX Runtime: against PEFT's own generate, and rows that come and go, on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from dora_serve.cli import main
from dora_serve.engine import Request, Sampling
from dora_serve.errors import AdapterError, CheckpointError, EngineError, PlanError, UnavailableError
from dora_serve.formats import read_adapter
from dora_serve.onnx_engine.engine import OnnxEngine
from exporters.onnx_adapters.adapter_file import write_adapter
from exporters.onnx_adapters.options import SlotOptions
from tests.cases import quiet, vary
from tests.engine_tokenizers import word_tokenizer
from tests.onnx_swap import Swap, make, slotted
from tests.test_onnx_adapters import ONE

PROMPTS = [np.random.default_rng(length).integers(3, 96, length).tolist() for length in (2, 5, 9, 13)]
NAMES = (None, "lora", "dora")


@pytest.fixture(scope="module")
def swap(tmp_path_factory: pytest.TempPathFactory) -> Swap:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**ONE, "num_hidden_layers": 2, "eos_token_id": 95})
    every = {"target_modules": "all-linear"}
    adapters = {"lora": {**every, "r": 3}, "dora": {**every, "r": 6, "use_dora": True}}
    return make(vary(transformers.LlamaForCausalLM(config)), tmp_path_factory.mktemp("engine"), adapters)


@pytest.fixture(scope="module", params=["one adapter a run", "mixed batches"])
def exported(request: pytest.FixtureRequest, swap: Swap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported base and its adapter files, of either kind."""
    mixed = request.param == "mixed batches"
    folder = tmp_path_factory.mktemp("exported") / "base"
    base = slotted(swap.dense, folder, SlotOptions(mixed=mixed))
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(swap.model / name, folder / name)
    for name in swap.adapters:
        write_adapter(read_adapter(swap.adapters[name]), base, folder / f"{name}.onnx_adapter")
    return folder


@pytest.fixture
def engine(exported: Path) -> OnnxEngine:
    loaded = OnnxEngine.load(exported, threads=1)
    for name in ("lora", "dora"):
        loaded.pool.load(name, exported / f"{name}.onnx_adapter")
    return loaded


@pytest.fixture(scope="module")
def generated(swap: Swap) -> Callable[[str | None, list[int], int], list[int]]:
    """transformers' own greedy generate of PEFT's model."""
    models: dict[str | None, Any] = {}
    with quiet():
        for name in NAMES:
            model: Any = transformers.LlamaForCausalLM.from_pretrained(swap.model, dtype=torch.float32)
            models[name] = (PeftModel.from_pretrained(model, swap.adapters[name]) if name else model).eval()

    def generate(name: str | None, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.no_grad(), quiet():
            out = models[name].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
            )
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return generate


def test_a_batch_of_all_adapters_is_generate_of_each(
    engine: OnnxEngine, generated: Callable[[str | None, list[int], int], list[int]]
) -> None:
    rows = [(row, name) for row in range(4) for name in NAMES]
    requests = [Request(PROMPTS[row], adapter=name, max_tokens=9 + 2 * row) for row, name in rows]
    # Fewer rows than requests, so that some wait until others end.
    for max_rows in (12, 5, 1):
        for request, done in zip(requests, engine.complete(requests, max_rows=max_rows), strict=True):
            assert done.error is None
            assert list(done.token_ids) == generated(
                request.adapter, list(request.prompt or ()), request.max_tokens or 0
            )
    texts = {done.token_ids for done in engine.complete([Request(PROMPTS[2], adapter=name) for name in NAMES])}
    assert len(texts) == len(NAMES)


def test_the_same_seed_gives_the_same_text_whatever_runs_beside_it(engine: OnnxEngine) -> None:
    assert engine.closeness > 0
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
    assert (
        engine.complete([Request(PROMPTS[0], sampling=Sampling(temperature=1.0, seed=99), max_tokens=12)])
        != together[:1]
    )


def test_events_stream_and_one_request_can_be_cancelled(engine: OnnxEngine) -> None:
    generation = engine.generate(
        [
            Request(PROMPTS[0], max_tokens=30, ignore_eos=True),
            Request(PROMPTS[1], adapter="dora", max_tokens=5, ignore_eos=True),
        ]
    )
    events = [next(generation) for _ in range(4)]
    assert {event.index for event in events} == {0, 1}
    generation.cancel(0)
    rest = list(generation)
    ended = {event.index: event.finish_reason for event in rest if event.finish_reason}
    assert ended == {0: "cancelled", 1: "length"}


def test_adapters_come_go_and_are_replaced_while_requests_run(
    engine: OnnxEngine, exported: Path, generated: Callable[[str | None, list[int], int], list[int]]
) -> None:
    running = engine.generate([Request(PROMPTS[3], adapter="dora", max_tokens=8, ignore_eos=True)])
    tokens = [next(running).token_id for _ in range(3)]
    with pytest.raises(EngineError, match="1 request is using it"):
        engine.pool.unload("dora")
    report = engine.pool.load("dora", exported / "lora.onnx_adapter", replace=True)
    assert (report.replaced, report.method, report.rank) == (True, "LoRA", 3)
    tokens += [event.token_id for event in running if event.token_id is not None]
    assert tokens == generated("dora", PROMPTS[3], 8)  # what it began with
    (after,) = engine.complete([Request(PROMPTS[3], adapter="dora", max_tokens=8)])
    assert list(after.token_ids) == generated("lora", PROMPTS[3], 8)
    engine.pool.unload("dora")
    (gone,) = engine.complete([Request(PROMPTS[3], adapter="dora")])
    assert isinstance(gone.error, EngineError)
    assert [(entry.name, entry.method, entry.in_use) for entry in engine.pool.list()] == [("lora", "LoRA", 0)]


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(engine: OnnxEngine, exported: Path, swap: Swap) -> None:
    with pytest.raises(AdapterError, match="dora-export onnx-adapter"):
        engine.pool.load("other", swap.adapters["lora"])
    with pytest.raises(AdapterError, match="does not exist"):
        engine.pool.load("other", exported / "nothing.onnx_adapter")
    with pytest.raises(EngineError, match="already"):
        engine.pool.load("lora", exported / "dora.onnx_adapter")
    with pytest.raises(EngineError, match="base's name"):
        engine.pool.load("base", exported / "dora.onnx_adapter")
    assert [entry.name for entry in engine.pool.list()] == ["dora", "lora"]


def test_a_file_of_another_base(engine: OnnxEngine, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = vary(transformers.LlamaForCausalLM(transformers.LlamaConfig(**ONE)), 5)
    other = make(model, tmp_path, {"lora": {"target_modules": "all-linear"}})
    with pytest.raises(PlanError, match="another export"):
        engine.pool.load("other", other.file("lora"))


def test_a_graph_without_slots_serves_its_base_alone(swap: Swap, tmp_path: Path) -> None:
    shutil.copytree(swap.dense, tmp_path / "plain")
    shutil.copyfile(swap.model / "config.json", tmp_path / "plain" / "config.json")
    engine = OnnxEngine.load(tmp_path / "plain", threads=1)
    (done,) = engine.complete([Request(PROMPTS[0], max_tokens=3)])
    assert len(done.token_ids) == 3
    with pytest.raises(UnavailableError, match="no adapter slots"):
        engine.pool.load("lora", swap.file("lora"))


def test_what_is_no_graph(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        OnnxEngine.load(tmp_path)
    (tmp_path / "model.onnx").write_text("no graph")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        OnnxEngine.load(tmp_path)


def test_generate_on_the_command_line(exported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "base")
    word_tokenizer(tuple("a b c d e f g h".split())).save_pretrained(folder)
    adapters = [f"--adapter={name}={folder / name}.onnx_adapter" for name in ("lora", "dora")]
    given = ["generate", str(folder), *adapters, "--prompt", "a c e", "--max-tokens", "4", "--json"]
    assert main(given) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["adapter"] for line in lines] == ["base", "lora", "dora"]
    assert len({tuple(line["token_ids"]) for line in lines}) == 3
    assert main(["generate", str(folder), f"--adapter=x={tmp_path}", "--prompt", "a"]) == 1
    assert "onnx-adapter" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", str(folder), "--dtype", "float16", "--prompt", "a"])
