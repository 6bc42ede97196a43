"""Formats whose trainers do not install here: hand-written after their code, against their formulas in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_serve.errors import AdapterError, PlanError, UnmergeableError
from dora_serve.formats import ReadOptions, read_adapter
from tests.cases import SIZES, adapt, build, llama, merge_to, plan, read_tensors, rewrite_json, rewrite_tensors, save
from tests.format_oracle import check_reference, check_weights

GROUPED = {"num_key_value_heads": 1}
"""One key for two heads, so that query, key and value differ in shape."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor | None) -> Tensor:
    """The paper's formula, in float64."""
    direction = weight.double() + delta.double()
    if magnitude is None:
        return direction
    return magnitude.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)


def qwen(**changes: Any) -> Any:
    return build("AutoModelForCausalLM", "qwen2", **{**SIZES, "tie_word_embeddings": False, **changes})


# fsdp_qlora


FSDP_LORA = [("lora_AB.0.weight", "lora_AB.1.weight"), ("lora_A.default.weight", "lora_B.default.weight")]


def write_fsdp(base: Path, folder: Path) -> dict[str, Tensor]:
    weights, tensors, wanted = read_tensors(base), {}, {}
    for seed, name in enumerate(("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")):
        module = f"model.layers.1.{name}"
        weight = weights[f"{module}.weight"]
        a, b = random(4, weight.shape[1], seed=seed), random(weight.shape[0], 4, seed=seed + 9)
        m = weight.double().norm(dim=1).float() * (1 + 0.2 * random(len(weight), seed=seed))
        tensors |= {f"{module}.dora_layer.lora_A.weight": a, f"{module}.dora_layer.lora_B.weight": b}
        tensors[f"{module}.magnitude_layer.magnitude"] = m
        wanted[f"{module}.weight"] = dora(weight, b.double() @ a.double(), m)
        if f"{module}.bias" in weights:
            factor = m.double() / (weight.double() + b.double() @ a.double()).norm(dim=1)
            wanted[f"{module}.bias"] = factor * weights[f"{module}.bias"].double()
    folder.mkdir()
    save_file(tensors, folder / "model_state_dict.safetensors")
    return wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp_qlora_has_no_scale_and_scales_the_bias(tmp_path: Path, dtype: torch.dtype) -> None:
    """Qwen 2 has biases on query, key and value."""
    base = save(qwen(**GROUPED), tmp_path / "base", dtype)
    wanted = write_fsdp(base, tmp_path / "adapter")
    assert sum(name.endswith(".bias") for name in wanted) == 2
    assert read_adapter(tmp_path / "adapter").format == "fsdp-qlora"
    check_weights(base, tmp_path / "adapter", tmp_path / "merged", wanted)
    check_reference(base, tmp_path / "adapter", wanted, like=qwen())


@pytest.mark.parametrize("names", FSDP_LORA)
def test_fsdp_qlora_of_plain_lora_asks_for_alpha(tmp_path: Path, names: tuple[str, str]) -> None:
    base = save(llama(), tmp_path / "base")
    a, b = random(4, 16, seed=1), random(16, 4, seed=2)
    module = "model.layers.0.self_attn.q_proj"
    (tmp_path / "adapter").mkdir()
    tensors = {f"{module}.{names[0]}": a, f"{module}.{names[1]}": b}
    if "default" in names[0]:
        tensors[f"{module}.base_layer.weight"] = torch.zeros(128, 1, dtype=torch.uint8)
        tensors[f"{module}.base_layer.weight.absmax"] = torch.zeros(4)
    save_file(tensors, tmp_path / "adapter" / "model_state_dict.safetensors")
    with pytest.raises(AdapterError, match="--lora-alpha"):
        read_adapter(tmp_path / "adapter")
    wanted = {f"{module}.weight": dora(read_tensors(base)[f"{module}.weight"], 4.0 * (b.double() @ a.double()), None)}
    read = ReadOptions(lora_alpha=16.0)
    check_weights(base, tmp_path / "adapter", tmp_path / "merged", wanted, read)


# Dynamic Low-Rank Adaptation


def write_dynamic(base: Path, folder: Path) -> dict[str, Tensor]:
    """r0 = 6, alpha = 8, two components pruned, one of which the optimizer made nonzero again; the whole state."""
    weights, wanted = read_tensors(base), {}
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    masks = {}
    for seed, name in enumerate(("self_attn.q_proj", "mlp.down_proj")):
        module = f"model.layers.0.{name}"
        weight = weights[f"{module}.weight"]
        a, b, c = random(6, weight.shape[1], seed=seed), random(len(weight), 6, seed=5 + seed), random(6, seed=7 + seed)
        mask = torch.tensor([False, True, False, False, True, False])
        c[1] = 0
        tensors[f"model.{module}.linear.weight"] = tensors.pop(f"model.{module}.weight")
        tensors |= {f"model.{module}.lora_a_linear.weight": a, f"model.{module}.lora_b_linear.weight": b}
        tensors[f"model.{module}.lora_scaler"] = c
        masks[f"{module}.lora_scaler"] = mask
        kept = torch.where(mask, torch.zeros(6), c).double()
        wanted[f"{module}.weight"] = weight.double() + 8 / 6 * (b.double() @ torch.diag(kept) @ a.double())
    (folder / "checkpoint").mkdir(parents=True)
    save_file(tensors, folder / "checkpoint" / "model.safetensors")
    torch.save({"sensitivity_score_dict": {}, "finally_mask_dict": masks}, folder / "prune_state_dict.pt")
    return wanted


def test_dynamic_low_rank(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    wanted = write_dynamic(base, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="--allow-pickle"):
        read_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"published configurations have 8.*--lora-alpha"):
        read_adapter(tmp_path / "adapter", ReadOptions(allow_pickle=True))
    read = ReadOptions(allow_pickle=True, lora_alpha=8.0)
    adapter = read_adapter(tmp_path / "adapter", read)
    assert adapter.format == "dynamic"
    assert {module.rank for module in adapter.modules} == {4}
    merge_to(base, tmp_path / "adapter", tmp_path / "merged", read=read)
    merged = read_tensors(tmp_path / "merged")
    for name, tensor in read_tensors(base).items():
        assert torch.equal(merged[name], wanted[name].float() if name in wanted else tensor), name
    check_reference(base, tmp_path / "adapter", wanted, read)


def test_dynamic_low_rank_without_a_mask_for_a_module(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    write_dynamic(base, tmp_path / "adapter")
    torch.save({"finally_mask_dict": {}}, tmp_path / "adapter" / "prune_state_dict.pt")
    with pytest.raises(AdapterError, match="finally_mask_dict has nothing"):
        read_adapter(tmp_path / "adapter", ReadOptions(allow_pickle=True, lora_alpha=8.0))


def test_the_fixed_rank_baseline(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    a, b = random(4, 16, seed=1), random(16, 4, seed=2)
    module = "model.layers.0.self_attn.q_proj"
    names = {f"{module}.lora_a_linear.weight": a, f"{module}.lora_b_linear.weight": b}
    (tmp_path / "adapter").mkdir()
    save_file({f"model.{name}": value for name, value in names.items()}, tmp_path / "adapter" / "model.safetensors")
    wanted = {f"{module}.weight": dora(read_tensors(base)[f"{module}.weight"], 2.0 * (b.double() @ a.double()), None)}
    check_weights(base, tmp_path / "adapter", tmp_path / "merged", wanted, ReadOptions(lora_alpha=8.0))


# torchtune


TUNE_NAMES = {"attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj"}
TUNE_NAMES |= {"attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj"}


def tune_to_hf(rows: Tensor) -> Tensor:
    """Rows of heads of 8: index (pair, half) of torchtune's is (half, pair) of transformers'."""
    order = [head * 8 + 2 * pair + half for head in range(len(rows) // 8) for half in range(2) for pair in range(4)]
    return rows[order]


def hf_to_tune(rows: Tensor) -> Tensor:
    order = [head * 8 + 4 * half + pair for head in range(len(rows) // 8) for pair in range(4) for half in range(2)]
    return rows[order]


def write_torchtune(base: Path, folder: Path, *, pairs: bool, exported: bool) -> dict[str, Tensor]:
    """A DoRA as torchtune trains and saves it, for a family of whose queries and keys it permutes the rows, or not."""
    weights, tensors, wanted = read_tensors(base), {}, {}
    for seed, (tune, hf) in enumerate(TUNE_NAMES.items()):
        module, rotary = f"model.layers.1.{hf}", tune in ("attn.q_proj", "attn.k_proj")
        weight = weights[f"{module}.weight"]
        own = hf_to_tune(weight) if rotary and pairs else weight  # what torchtune trained on
        a, b = random(4, own.shape[1], seed=seed), random(len(own), 4, seed=seed + 9)
        m = own.double().norm(dim=1).float() * (1 + 0.2 * random(len(own), seed=seed))
        merged = dora(own, 1.5 * (b.double() @ a.double()), m)
        wanted[f"{module}.weight"] = tune_to_hf(merged) if rotary and pairs else merged
        if exported:
            key = f"base_model.model.{module}"
            saved = tune_to_hf(b) if rotary else b  # whatever the family
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": saved, f"{key}.lora_magnitude_vector": m}
        else:
            key = f"layers.1.{tune}"
            tensors |= {f"{key}.lora_a.weight": a, f"{key}.lora_b.weight": b, f"{key}.magnitude": m}
    folder.mkdir()
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return wanted


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize(("family", "pairs"), [(llama, True), (qwen, False)])
def test_torchtune(tmp_path: Path, family: Callable[..., Any], pairs: bool, exported: bool) -> None:
    base = save(family(**GROUPED), tmp_path / "base")
    wanted = write_torchtune(base, tmp_path / "adapter", pairs=pairs, exported=exported)
    read = ReadOptions(format="torchtune")
    check_weights(base, tmp_path / "adapter", tmp_path / "merged", wanted, read)
    check_reference(base, tmp_path / "adapter", wanted, read, like=family())


def test_torchtune_is_found(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    write_torchtune(base, tmp_path / "native", pairs=True, exported=False)
    assert read_adapter(tmp_path / "native").format == "torchtune"
    write_torchtune(base, tmp_path / "export", pairs=True, exported=True)
    with pytest.raises(AdapterError, match="--format torchtune"):
        read_adapter(tmp_path / "export")
    (tmp_path / "export" / "adapter_model.pt").touch()  # torchtune leaves its own file beside its export
    assert read_adapter(tmp_path / "export").format == "torchtune"


def test_torchtune_on_a_base_without_heads(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    write_torchtune(base, tmp_path / "adapter", pairs=True, exported=False)
    rewrite_json(base / "config.json", head_dim=None, num_attention_heads=None)
    with pytest.raises(AdapterError, match="head_dim"):
        plan(base, tmp_path / "adapter")


# Megatron-Bridge


def test_megatron(tmp_path: Path) -> None:
    base = save(llama(**GROUPED), tmp_path / "base")
    weights, wanted, tensors = read_tensors(base), {}, {}
    layer = "model.layers.0"
    q, k, v = (weights[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
    gate, up = (weights[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    # One group: its two queries, its key, its value.
    fused = {"self_attention.linear_qkv": torch.cat([q, k, v]), "mlp.linear_fc1": torch.cat([gate, up])}
    fused["self_attention.linear_proj"] = weights[f"{layer}.self_attn.o_proj.weight"]
    for seed, (name, weight) in enumerate(fused.items()):
        a, b = random(4, weight.shape[1], seed=seed), random(len(weight), 4, seed=seed + 3)
        m = weight.norm(dim=1) * (1 + 0.2 * random(len(weight), seed=seed))
        merged = dora(weight, 2.0 * (b.double() @ a.double()), m)
        key = f"decoder.layers.0.{name}.adapter"
        tensors |= {f"{key}.linear_in.weight": a, f"{key}.linear_out.weight": b, f"{key}.weight_magnitude": m}
        if name.endswith("qkv"):
            parts = zip("qkv", merged.split([16, 8, 8]), strict=True)
            wanted |= {f"{layer}.self_attn.{part}_proj.weight": rows for part, rows in parts}
        elif name.endswith("fc1"):
            parts = zip(("gate", "up"), merged.chunk(2), strict=True)
            wanted |= {f"{layer}.mlp.{part}_proj.weight": rows for part, rows in parts}
        else:
            wanted[f"{layer}.self_attn.o_proj.weight"] = merged
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "weights.safetensors")
    with pytest.raises(AdapterError, match="--lora-alpha"):
        read_adapter(tmp_path / "adapter")
    read = ReadOptions(lora_alpha=8.0)
    assert read_adapter(tmp_path / "adapter", read).format == "megatron"
    check_weights(base, tmp_path / "adapter", tmp_path / "merged", wanted, read)
    check_reference(base, tmp_path / "adapter", wanted, read)


def test_megatron_groups_of_several_heads(tmp_path: Path) -> None:
    """Two groups of two queries: queries of a group lie together, with its key and value behind them."""
    model = llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    base = save(model, tmp_path / "base")
    weights = read_tensors(base)
    q, k, v = (weights[f"model.layers.0.self_attn.{name}_proj.weight"].view(2, -1, 8, 32) for name in "qkv")
    fused = torch.cat([q, k, v], dim=1).reshape(-1, 32)
    a, b = random(4, 32, seed=1), random(len(fused), 4, seed=2)
    key = "decoder.layers.0.self_attention.linear_qkv.adapter"
    save_file({f"{key}.linear_in.weight": a, f"{key}.linear_out.weight": b}, tmp_path / "adapter.safetensors")
    merged = (fused.double() + b.double() @ a.double()).view(2, 4, 8, 32)
    rows = {"q": merged[:, :2], "k": merged[:, 2], "v": merged[:, 3]}
    wanted = {f"model.layers.0.self_attn.{name}_proj.weight": part.reshape(-1, 32) for name, part in rows.items()}
    read = ReadOptions(lora_alpha=4.0)
    check_weights(base, tmp_path / "adapter.safetensors", tmp_path / "merged", wanted, read)


def test_megatrons_export_without_magnitudes_is_refused(tmp_path: Path) -> None:
    base = llama()
    adapt(base, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    drop = lambda tensors: [tensors.pop(name) for name in list(tensors) if "magnitude" in name]  # noqa: E731
    rewrite_tensors(tmp_path / "adapter" / "adapter_model.safetensors", drop)
    with pytest.raises(AdapterError, match="lora_magnitude_vector is missing"):
        read_adapter(tmp_path / "adapter")


# TensorRT-LLM


@pytest.mark.parametrize("kind", ["peft", "nvlabs"])
def test_magnitudes_near_1_are_asked_about(tmp_path: Path, kind: str) -> None:
    start = llama()
    base = save(start, tmp_path / "base")
    adapt(start, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], use_dora=True, lora_alpha=6)
    weights, wanted = read_tensors(base), {}
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: 0.02 * value if "lora_B" in name else value for name, value in load_file(file).items()}
    for key in [name for name in tensors if name.endswith("lora_magnitude_vector")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        a, b = (tensors[key.replace("lora_magnitude_vector", f"lora_{part}.weight")].double() for part in "AB")
        direction = weights[f"{module}.weight"].double() + 1.5 * (b @ a)
        quotient = (tensors.pop(key).double() / direction.norm(dim=1)).float()  # what normalize_weights.py puts there
        wanted[f"{module}.weight"] = quotient.double()[:, None] * direction
        if kind == "peft":
            tensors[key] = quotient
        else:
            tensors[key.replace("lora_magnitude_vector", "weight_m_wdecomp.weight")] = quotient[:, None]
    save_file(tensors, file)
    if kind == "nvlabs":
        (tmp_path / "adapter" / "adapter_config.json").write_text(
            json.dumps({"peft_type": "DORA", "r": 4, "lora_alpha": 6})
        )
    with pytest.raises(AdapterError, match=r"--magnitudes norm-scale"):
        plan(base, tmp_path / "adapter")
    check_weights(base, tmp_path / "adapter", tmp_path / "out", wanted, ReadOptions(magnitudes="norm-scale"))
    check_reference(base, tmp_path / "adapter", wanted, ReadOptions(format="tensorrt-llm"))
    norms = plan(base, tmp_path / "adapter", read=ReadOptions(magnitudes="norm"))
    assert {edit.norm.axis for tensor in norms.edited for edit in tensor.loras} == {"out"}


def test_honest_magnitudes_are_not_asked_about(tmp_path: Path) -> None:
    start = llama()
    base = save(start, tmp_path / "base")
    adapt(start, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], use_dora=True)
    plan(base, tmp_path / "adapter")
    # A base whose rows have length 1 looks the same both ways, and is taken at its word.
    unit = llama()
    with torch.no_grad():
        for name, parameter in unit.named_parameters():
            if "proj" in name:
                parameter.div_(parameter.norm(dim=1, keepdim=True))
    adapt(unit, tmp_path / "unit", target_modules=["q_proj", "down_proj"], use_dora=True)
    rewrite_tensors(
        tmp_path / "unit" / "adapter_model.safetensors",
        lambda tensors: [value.mul_(0.1) for name, value in tensors.items() if "lora_B" in name],
    )
    plan(save(unit, tmp_path / "unit base"), tmp_path / "unit")


def test_tensorrts_own_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.lora_weights.npy").touch()
    with pytest.raises(AdapterError, match="without their shapes"):
        read_adapter(tmp_path)


# What is refused


def test_bayesian_lora_is_refused(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora_A_quantizer.x": torch.ones(1), f"{key}.lora_E.default": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnmergeableError, match="Bayesian-LoRA"):
        read_adapter(tmp_path)


def test_modules_of_a_family_that_megatron_names_otherwise(tmp_path: Path) -> None:
    save_file({"encoder.block.adapter.linear_in.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="is not known here"):
        read_adapter(tmp_path / "x.safetensors", ReadOptions(lora_alpha=1.0))


FAULTS: Mapping[str, tuple[str, dict[str, Tensor], str]] = {
    "fsdp half": ("fsdp-qlora", {"a.dora_layer.lora_A.weight": torch.ones(2, 2)}, "wanted two factors"),
    "fsdp magnitude": (
        "fsdp-qlora",
        {
            "a.dora_layer.lora_A.weight": torch.ones(2, 3),
            "a.dora_layer.lora_B.weight": torch.ones(3, 2),
            "a.magnitude_layer.magnitude": torch.ones(2),
        },
        r"wanted \[3\]",
    ),
    "torchtune half": (
        "torchtune",
        {"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 2)},
        "wanted lora_a and lora_b",
    ),
    "torchtune name": (
        "torchtune",
        {"fusion.layers.0.x.lora_a.weight": torch.ones(2, 2)},
        "no text model of torchtune",
    ),
    "dynamic": ("dynamic", {"model.a.lora_a_linear.weight": torch.ones(2, 2)}, "wanted both factors"),
    "megatron": (
        "megatron",
        {"decoder.layers.0.mlp.linear_fc2.adapter.linear_in.weight": torch.ones(2, 2)},
        "wanted linear_in and linear_out",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path: Path, fault: str) -> None:
    name, tensors, message = FAULTS[fault]
    save_file(tensors, tmp_path / "model_state_dict.safetensors")
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "model_state_dict.safetensors", ReadOptions(format=name, lora_alpha=1.0))


def test_an_adapter_of_another_model_does_not_fit(tmp_path: Path) -> None:
    base = save(llama(num_hidden_layers=1), tmp_path / "base")
    write_fsdp(save(llama(), tmp_path / "other"), tmp_path / "adapter")
    with pytest.raises(PlanError, match=r"layers\.1"):
        plan(base, tmp_path / "adapter")
