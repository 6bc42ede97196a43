"""The engine over ONNX Runtime: against PEFT's own generate, and rows that come and go, on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from dora_serve.cli import main
from dora_serve.engine import Request
from dora_serve.errors import AdapterError, CheckpointError, EngineError, PlanError, UnavailableError
from dora_serve.formats import read_adapter
from dora_serve.onnx_engine.engine import OnnxEngine
from exporters.onnx_adapters.adapter_file import write_adapter
from exporters.onnx_adapters.options import SlotOptions
from tests import onnx_engines
from tests.cases import vary
from tests.engine_tokenizers import word_tokenizer
from tests.onnx_engines import PROMPTS, Generated, peft_generate
from tests.onnx_models import GROUPED
from tests.onnx_swap import Swap, make, slotted


@pytest.fixture(scope="module")
def swap(tmp_path_factory: pytest.TempPathFactory) -> Swap:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**GROUPED, "eos_token_id": 95})
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
def generated(swap: Swap) -> Generated:
    return peft_generate(swap.model, swap.adapters)


def test_a_batch_of_all_adapters_is_generate_of_each(engine: OnnxEngine, generated: Generated) -> None:
    onnx_engines.a_batch_of_all_adapters_is_generate_of_each(engine, generated)


def test_the_same_seed_gives_the_same_text_whatever_runs_beside_it(engine: OnnxEngine) -> None:
    assert engine.closeness > 0
    onnx_engines.the_same_seed_gives_the_same_text_whatever_runs_beside_it(engine, same_numbers=False)


def test_events_stream_and_one_request_can_be_cancelled(engine: OnnxEngine) -> None:
    onnx_engines.events_stream_and_one_request_can_be_cancelled(engine)


def test_adapters_come_go_and_are_replaced_while_requests_run(
    engine: OnnxEngine, exported: Path, generated: Generated
) -> None:
    file = exported / "lora.onnx_adapter"
    onnx_engines.adapters_come_go_and_are_replaced_while_requests_run(engine, file, generated)


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
    model = vary(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})), 5)
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
