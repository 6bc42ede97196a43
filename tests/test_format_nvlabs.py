"""NVlabs' format, hand-written after its code, against the formula of the paper in plain float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_serve.errors import AdapterError
from dora_serve.formats import ReadOptions, read_adapter
from tests.cases import llama, merge_to, read_tensors, rewrite_json, save
from tests.format_oracle import check_reference, check_weights

CONFIG: Mapping[str, Any] = {
    "peft_type": "DORA",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj"],
    "Wdecompose_target_modules": ["k_proj"],
    "dora_simple": True,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "fan_in_fan_out": False,
    "enable_lora": None,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "yahma/llama-7b-hf",
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(base: Path, folder: Path) -> dict[str, Tensor]:
    """An adapter on q, down (LoRA and magnitude) and k (magnitude alone); returns W' by stored name, in float64."""
    weights, tensors, wanted = read_tensors(base), {}, {}
    for layer in range(2):
        for seed, name in enumerate(("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")):
            module = f"model.layers.{layer}.{name}"
            weight = weights[f"{module}.weight"].double()
            out, width = weight.shape
            key = f"base_model.model.{module}"
            m = weight.norm(dim=1, keepdim=True).float() * (1 + 0.2 * random(out, 1, seed=seed + 10 * layer))
            direction = weight
            if name != "self_attn.k_proj":
                a, b = random(4, width, seed=3 + seed), random(out, 4, seed=4 + seed)
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                direction = weight + 1.5 * (b.double() @ a.double())
            tensors[f"{key}.weight_m_wdecomp.weight"] = m
            wanted[f"{module}.weight"] = m.double() * direction / direction.norm(dim=1, keepdim=True)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_the_formula(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save(llama(), tmp_path / "base", dtype)
    wanted = write(base, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").format == "nvlabs"
    check_weights(base, tmp_path / "adapter", tmp_path / "merged", wanted)
    check_reference(base, tmp_path / "adapter", wanted)


def test_a_pickle_is_read_where_it_is_allowed(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    wanted = write(base, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(read_tensors(tmp_path / "adapter"), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(AdapterError, match="--allow-pickle"):
        read_adapter(tmp_path / "adapter")
    check_weights(base, tmp_path / "adapter", tmp_path / "merged", wanted, ReadOptions(allow_pickle=True))


def test_magnitudes_that_the_llava_fork_put_elsewhere(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    wanted = write(base, tmp_path / "adapter")
    tensors = read_tensors(tmp_path / "adapter")
    aside = {name: tensors.pop(name) for name in list(tensors) if "wdecomp" in name}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"non_lora_trainables\.bin"):
        read_adapter(tmp_path / "adapter")
    torch.save(aside, tmp_path / "adapter" / "non_lora_trainables.bin")
    check_weights(base, tmp_path / "adapter", tmp_path / "merged", wanted, ReadOptions(allow_pickle=True))


def test_biases_and_saved_modules_are_replaced(tmp_path: Path) -> None:
    base = save(llama(attention_bias=True), tmp_path / "base")
    write(base, tmp_path / "adapter")
    tensors = read_tensors(tmp_path / "adapter")
    bias, head = random(16, seed=1), random(40, 16, seed=2)
    tensors |= {"base_model.model.model.layers.0.self_attn.q_proj.bias": bias, "base_model.model.lm_head.weight": head}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="not understood"):
        read_adapter(tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter" / "adapter_config.json", bias="all", modules_to_save=["lm_head"])
    merge_to(base, tmp_path / "adapter", tmp_path / "merged")
    merged = read_tensors(tmp_path / "merged")
    assert torch.equal(merged["model.layers.0.self_attn.q_proj.bias"], bias)
    assert torch.equal(merged["lm_head.weight"], head)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
FAULTS: Mapping[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no magnitude": (lambda tensors: tensors.pop(f"{Q}.weight_m_wdecomp.weight"), "weight_m_wdecomp is missing"),
    "one factor": (lambda tensors: tensors.pop(f"{Q}.lora_A.weight"), "wanted lora_A, lora_B"),
    "rank": (lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(3, 16)}), "rank"),
    "short": (lambda tensors: tensors.update({f"{Q}.weight_m_wdecomp.weight": torch.ones(3, 1)}), "3 magnitudes"),
    "flat": (lambda tensors: tensors.update({f"{Q}.weight_m_wdecomp.weight": torch.ones(1, 16)}), r"wanted \[out, 1\]"),
    "shards": (lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(64)}), "shards"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path: Path, fault: str) -> None:
    base = save(llama(), tmp_path / "base")
    write(base, tmp_path / "adapter")
    tensors = read_tensors(tmp_path / "adapter")
    plant, message = FAULTS[fault]
    plant(tensors)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "adapter")


def test_an_unknown_key_and_a_fused_layer_are_refused(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    write(base, tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter" / "adapter_config.json", use_rslora=True)
    with pytest.raises(AdapterError, match="--ignore-config"):
        read_adapter(tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter" / "adapter_config.json", use_rslora=None, enable_lora=[True, False, True])
    with pytest.raises(AdapterError, match="enable_lora"):
        read_adapter(tmp_path / "adapter")
