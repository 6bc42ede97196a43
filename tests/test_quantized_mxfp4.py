"""gpt-oss as it is published, its experts in MXFP4: transformers dequantizes it and PEFT runs it, on a CPU."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dora_serve.checkpoint import open_checkpoint
from dora_serve.errors import CheckpointError
from dora_serve.quantized.decode import open_values
from dora_serve.quantized.view import dense_view
from dora_serve.reference_decode import decoded_range
from exporters.cli import main
from tests.cases import (
    ATTENTION,
    adapt,
    ask_here,
    build,
    distance,
    load,
    logits,
    quiet,
    read_tensors,
    rewrite_json,
    rewrite_tensors,
    save,
    tokens,
)
from tests.test_quantized_merge import SIZE

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PROJECTIONS = ("gate_up_proj", "down_proj")
LAYER = "model.layers.1.mlp.experts"


@dataclass(frozen=True)
class World:
    """root: a gpt-oss with its experts in blocks, the same as transformers dequantizes it, and adapters."""

    root: Path
    model: Any


def blocks(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Random codes of every kind, and exponents around those of small weights, for (experts, inputs, outputs)."""
    experts, inputs, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator)
    scales = torch.randint(118, 123, (experts, outputs, inputs // 32), generator=generator)
    return codes.to(torch.uint8), scales.to(torch.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("mxfp4")
    sizes = {**SIZE, "intermediate_size": 64, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = build("AutoModelForCausalLM", "gpt_oss", **sizes, tie_word_embeddings=False)
    for number, layer in enumerate(model.model.layers):
        for name in PROJECTIONS:
            parameter = getattr(layer.mlp.experts, name)
            codes, scales = blocks(parameter.shape, number)
            parameter.data = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)
    save(model, root / "dense")
    save(model, root / "blocks")

    def into_blocks(tensors: dict[str, Tensor]) -> None:
        for number in range(2):
            for name in PROJECTIONS:
                stem = f"model.layers.{number}.mlp.experts.{name}"
                codes, scales = blocks(tensors.pop(stem).shape, number)
                tensors |= {f"{stem}_blocks": codes, f"{stem}_scales": scales}

    rewrite_tensors(root / "blocks" / "model.safetensors", into_blocks)
    rewrite_json(root / "blocks" / "config.json", quantization_config={"quant_method": "mxfp4"})
    adapt(model, root / "attention", target_modules=list(ATTENTION), use_dora=True)
    adapt(model, root / "experts", target_modules=["q_proj"], target_parameters=EXPERTS)
    return World(root, model)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)
    monkeypatch.setattr("dora_serve.column_reader.STRIPE_BYTES", 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_are_what_transformers_makes_of_them(world: World, tmp_path: Path, dtype: torch.dtype) -> None:
    """Every code and every exponent, those at the ends as well, where a value overflows or is subnormal."""
    said = json.loads((world.root / "blocks" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, "dtype": str(dtype).removeprefix("torch.")}))
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 256, (8, 32, 16, 16), generator=generator).to(torch.uint8)
    scales = torch.randperm(8 * 32 * 16, generator=generator).remainder(255).view(8, 32, 16).to(torch.uint8)
    stored = {f"{LAYER}.down_proj_blocks": codes, f"{LAYER}.down_proj_scales": scales}
    save_file(stored, tmp_path / "model.safetensors")
    wanted = convert_moe_packed_tensors(codes, scales, dtype=dtype)
    entry = dense_view(open_checkpoint(tmp_path)).tensors[f"{LAYER}.down_proj"]
    assert (entry.shape, entry.dtype) == (wanted.shape, dtype)
    read, flat = open_values(entry), wanted.flatten()
    width, expert = wanted.shape[2], wanted.shape[1] * wanted.shape[2]
    for start, stop in ((0, 5), (33 * width + 3, 70 * width), (expert - 2, 2 * expert + 1), (0, flat.numel())):
        assert torch.equal(read(start, stop), flat[start:stop])
        assert torch.equal(decoded_range(entry, start, stop), flat[start:stop])


@pytest.mark.parametrize("adapter", ["attention", "experts"])
def test_a_merge_into_blocks_is_what_peft_computes_on_them(world: World, adapter: str, tmp_path: Path) -> None:
    out, twin = tmp_path / "merged", tmp_path / "twin"
    words = ["merge", str(world.root / adapter), "--device", "cpu"]
    assert main([*words, "--base", str(world.root / "blocks"), "-o", str(out)]) == 0
    assert main([*words, "--base", str(world.root / "dense"), "-o", str(twin), "--no-verify"]) == 0
    ours, theirs = read_tensors(out), read_tensors(twin)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    stored = load_file(world.root / "blocks" / "model.safetensors")
    assert torch.equal(ours[f"{LAYER}.down_proj_bias"], stored[f"{LAYER}.down_proj_bias"])
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    record = json.loads((out / "dora_export.json").read_text())
    assert record["quantization"] == "MXFP4"
    assert record["verification"]["passed"]
    assert record["verification"]["forward"]["ran"]
    with quiet():
        quantized = AutoModelForCausalLM.from_pretrained(world.root / "blocks", dtype=torch.float32).eval()
        unmerged = PeftModel.from_pretrained(copy.deepcopy(quantized), world.root / adapter).eval()
    merged, wanted = logits(load(out, world.model), tokens(quantized)), logits(unmerged, tokens(quantized))
    allowed = 1e-5 * float(wanted.square().mean().sqrt())
    assert distance(merged, wanted) < allowed
    assert distance(logits(quantized, tokens(quantized)), wanted) > 100 * allowed


def test_verify_finds_a_fault_in_an_expert(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    base = ["--base", str(world.root / "blocks"), "--device", "cpu"]
    assert main(["merge", str(world.root / "experts"), *base, "-o", str(out), "--no-verify"]) == 0
    assert main(["verify", str(out), "--adapter", str(world.root / "experts"), *base]) == 0
    rewrite_tensors(out / "model.safetensors", lambda all_: all_[f"{LAYER}.gate_up_proj"][2].mul_(1.01))
    capsys.readouterr()
    assert main(["verify", str(out), "--adapter", str(world.root / "experts"), *base]) == 1
    assert f"{LAYER}.gate_up_proj" in capsys.readouterr().out


STEM = f"{LAYER}.down_proj"
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (lambda all_: all_.pop(f"{STEM}_scales"), "got .*_blocks, wanted"),
    "no blocks": (lambda all_: all_.pop(f"{STEM}_blocks"), "got .*_scales, wanted"),
    "two of them": (lambda all_: all_.update({STEM: torch.zeros(4, 64, 64)}), "nothing beside"),
    "other scales": (
        lambda all_: all_.update({f"{STEM}_scales": all_[f"{STEM}_scales"][:, :9]}),
        r"wanted bytes \[4, 64, 2\]",
    ),
    "blocks of floats": (lambda all_: all_.update({f"{STEM}_blocks": all_[f"{STEM}_blocks"].float()}), "torch.float32"),
    "blocks of 8 bytes": (
        lambda all_: all_.update({f"{STEM}_blocks": all_[f"{STEM}_blocks"].view(4, 64, 4, 8)}),
        "inputs / 32, 16",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_unsound_blocks_are_refused(world: World, tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((world.root / "blocks" / name).read_bytes())
    rewrite_tensors(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        dense_view(open_checkpoint(tmp_path))
