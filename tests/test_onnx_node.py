"""The same files in another language: adapters swapped by onnxruntime-node, beside onnxruntime here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from dora_serve.engine import Request
from dora_serve.formats import read_adapter
from dora_serve.onnx_engine.engine import OnnxEngine
from exporters.onnx.check.answers import token_inputs
from exporters.onnx_adapters.adapter_file import write_adapter
from exporters.onnx_adapters.check import check_swap
from exporters.onnx_adapters.options import SlotOptions
from tests.cases import vary
from tests.onnx_swap import Swap, make, peft_logits, read_arrays, write_arrays
from tests.test_onnx_adapters import FLOAT32, ONE, relative

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "onnx-node"
PROMPT = [5, 17, 44, 9, 80]


@pytest.fixture(scope="module")
def swap(tmp_path_factory: pytest.TempPathFactory) -> Swap:
    torch.manual_seed(0)
    every = {"target_modules": "all-linear"}
    adapters = {"lora": {**every, "r": 3}, "dora": {**every, "r": 5, "use_dora": True}}
    model = vary(transformers.LlamaForCausalLM(transformers.LlamaConfig(**ONE)))
    return make(model, tmp_path_factory.mktemp("node"), adapters, SlotOptions(required=True))


def node(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert (EXAMPLE / "node_modules" / ".complete").exists(), "make node installs what this test runs"
    command = ["node", str(EXAMPLE / "swap.mjs"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_onnxruntime_node_swaps_the_same_files(swap: Swap) -> None:
    ran = node(swap.base.path.parent, ",".join(map(str, PROMPT)), swap.file("lora"), swap.file("dora"))
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["adapter"] for row in rows] == [None, "lora.onnx_adapter", "dora.onnx_adapter"]
    engine = OnnxEngine.load(swap.base.path.parent)
    for name in ("lora", "dora"):
        engine.pool.load(name, swap.file(name))
    for name, row in zip((None, "lora", "dora"), rows, strict=True):
        (wanted,) = peft_logits(swap, name, [PROMPT])
        assert relative(row["logits"], wanted[-1]) < FLOAT32
        (done,) = engine.complete([Request(PROMPT, adapter=name, max_tokens=8, ignore_eos=True)])
        assert row["tokens"] == list(done.token_ids)


def test_an_adapter_of_another_base_is_refused_there_too(swap: Swap, tmp_path: Path) -> None:
    arrays = read_arrays(swap.file("lora"))
    kept = {name: array for name, array in arrays.items() if not name.startswith("base_sha256.")}
    write_arrays({**kept, "base_sha256.0123456789abcdef": np.zeros(0, np.float32)}, tmp_path / "other")
    ran = node(swap.base.path.parent, "5,17", tmp_path / "other")
    assert ran.returncode != 0
    assert "another base" in ran.stderr


def test_a_graph_without_defaults_passes_the_check(swap: Swap, tmp_path: Path) -> None:
    file = tmp_path / "dora.onnx_adapter"
    write_adapter(read_adapter(swap.adapters["dora"]), swap.base, file)
    samples = token_inputs([PROMPT, PROMPT[:2]])
    found = check_swap(swap.base, file, swap.model, read_adapter(swap.adapters["dora"]), samples)
    assert found.failures == ()
