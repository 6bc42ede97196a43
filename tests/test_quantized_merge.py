"""Merges into quantized bases, made by transformers and bitsandbytes: the oracle is PEFT's unmerged forward on them."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from exporters.cli import main
from tests.cases import (
    LINEARS,
    SIZES,
    adapt,
    ask_here,
    build,
    distance,
    llama,
    load,
    logits,
    quiet,
    read_tensors,
    rewrite_json,
    save,
    tokens,
)

SIZE = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.08}
KINDS = ("nf4", "nf4-double", "fp4", "int8")
METHODS = ("lora", "dora")


def quantization(kind: str) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.removesuffix("-double"),
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=kind.endswith("-double"),
    )


def load_quantized(folder: Path, **options: Any) -> Any:
    """A model that bitsandbytes runs on the CPU, in float32."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@dataclass(frozen=True)
class World:
    """root: a dense base in float32, what bitsandbytes makes of it in KINDS, and adapters."""

    root: Path

    def unmerged(self, kind: str, method: str) -> Tensor:
        """PEFT's logits, on the base as bitsandbytes runs it; int8, which it would round activations for, dense."""
        model = load_quantized(self.root / kind)
        if kind == "int8":
            model = model.dequantize(torch.float32)
        with quiet():
            return logits(PeftModel.from_pretrained(model, self.root / method).eval(), tokens(model))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("quantized")
    model = llama(**SIZE)
    save(model, root / "dense")
    for method in METHODS:
        adapt(model, root / method, target_modules=list(LINEARS), lora_alpha=12, use_dora=method == "dora")
    for kind in KINDS:
        load_quantized(root / "dense", quantization_config=quantization(kind)).save_pretrained(root / kind)
    return World(root)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers is asked in this process; and bitsandbytes says at every call of an int8 layer what it casts."""
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def run(*words: str | Path) -> int:
    return main([str(word) for word in words])


def config_of(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return table


def record_of(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "dora_export.json").read_text())
    return table


def dequantized(folder: Path) -> dict[str, Tensor]:
    """Every weight of a stored model by bitsandbytes' own functions, under its dense name."""
    found = {}
    for name, module in load_quantized(folder).named_modules():
        if type(module).__name__ == "Linear4bit":
            found[f"{name}.weight"] = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            found[f"{name}.weight"] = bnb.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_into_codes_is_what_peft_computes_on_them(world: World, kind: str, method: str, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert run("merge", world.root / method, "--base", world.root / kind, "-o", out, "--device", "cpu") == 0
    config, record = config_of(out), record_of(out)
    assert "quantization_config" in config_of(world.root / kind)
    assert "quantization_config" not in config
    assert record["config_changes"]["quantization_config"] is None
    assert "bitsandbytes" in record["quantization"]
    assert any("stored quantized" in note for note in record["notes"])
    assert record["verification"]["forward"]["ran"]
    assert record["verification"]["passed"]
    merged, dense = load(out, llama(**SIZE)), load(world.root / "dense", llama(**SIZE))
    stored = read_tensors(out)
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert stored.keys() == read_tensors(world.root / "dense").keys()

    theirs = world.unmerged(kind, method)
    ours = logits(merged, tokens(merged))
    with quiet():
        on_dense = logits(PeftModel.from_pretrained(dense, world.root / method).eval(), tokens(dense))
    # Both compute in float32, by the same weights and in another order.
    allowed = 1e-5 * float(theirs.square().mean().sqrt())
    assert distance(ours, theirs) < allowed
    assert distance(on_dense, theirs) > 100 * allowed


@pytest.mark.parametrize("kind", KINDS)
def test_every_merged_element_is_exact_on_bitsandbytes_own_weights(world: World, kind: str, tmp_path: Path) -> None:
    """Against the formula in float64 on what its functions dequantize, rounded once to the output's dtype."""
    out = tmp_path / "merged"
    where = ("--base", world.root / kind, "-o", out, "--no-verify", "--dtype", "float32")
    assert run("merge", world.root / "dora", *where) == 0
    stored, weights = read_tensors(out), dequantized(world.root / kind)
    adapter = {name: value.double() for name, value in read_tensors(world.root / "dora").items()}
    assert len(weights) == 2 * len(LINEARS)
    for name, weight in weights.items():
        of = f"base_model.model.{name.removesuffix('.weight')}"
        direction = weight.double() + 3 * adapter[f"{of}.lora_B.weight"] @ adapter[f"{of}.lora_A.weight"]
        scale = adapter[f"{of}.lora_magnitude_vector"] / torch.linalg.vector_norm(direction, dim=1)
        assert torch.equal(stored[name], (direction * scale.unsqueeze(1)).float())


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_a_base_quantized_on_loading_is_reproduced(world: World, kind: str, tmp_path: Path) -> None:
    """The dense base and the flag give what the stored codes give: to the bit, but for the absmax of nf4-double."""
    outs = {name: tmp_path / name for name in ("stored", "loaded", "original")}
    adapter = world.root / "dora"
    flags = ("--base", world.root / "dense", "--base-quantization", kind, "--device", "cpu")
    assert run("merge", adapter, "--base", world.root / kind, "-o", outs["stored"], "--no-verify") == 0
    assert run("merge", adapter, *flags, "--merge-into", "dequantized", "-o", outs["loaded"]) == 0
    assert run("merge", adapter, *flags, "--merge-into", "original", "-o", outs["original"]) == 0
    stored, loaded, original = (read_tensors(outs[name]) for name in outs)
    assert stored.keys() == loaded.keys() == original.keys()
    quantized = {name for name in stored if name.rpartition(".")[0].endswith(LINEARS)}
    for name, value in stored.items():
        if kind != "nf4-double" or name not in quantized:
            assert torch.equal(loaded[name], value), name
        else:
            assert (loaded[name] - value).norm() < 1e-2 * value.norm()
        assert torch.equal(original[name], value) == (name not in quantized)
    record = record_of(outs["loaded"])
    assert record["verification"]["passed"]
    assert any("14 weights were quantized" in note for note in record["notes"])
    assert any("not the model that was trained" in note for note in record_of(outs["original"])["notes"])
    if kind != "nf4":
        return
    assert verified(outs["loaded"], adapter, *flags, "--merge-into", "dequantized") == 0
    assert verified(outs["original"], adapter, *flags, "--merge-into", "original") == 0
    assert verified(outs["original"], adapter, *flags, "--merge-into", "dequantized") == 1
    assert verified(outs["loaded"], adapter, *flags[:2], "--device", "cpu") == 1


def verified(merged: Path, adapter: Path, *flags: str | Path) -> int:
    return run("verify", merged, "--adapter", adapter, *flags)


def test_a_folder_that_kept_its_quantization_config_fails(world: World, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    base = ("--base", world.root / "nf4")
    assert run("merge", world.root / "lora", *base, "-o", out, "--no-verify") == 0
    assert verified(out, world.root / "lora", *base, "--device", "cpu") == 0
    config = config_of(out)
    config["quantization_config"] = config_of(world.root / "nf4")["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    assert verified(out, world.root / "lora", *base, "--device", "cpu") == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--base-quantization", "nf4"), "--merge-into dequantized or --merge-into original"),
        (("--merge-into", "dequantized"), "--base-quantization nf4"),
        (("--base-quantization", "gptq", "--merge-into", "dequantized"), "wanted one of nf4"),
        (("--base-quantization", "nf4:int3", "--merge-into", "dequantized"), "bfloat16"),
    ],
)
def test_a_choice_that_is_missing_or_wrong_is_named(
    world: World, flags: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert run("merge", world.root / "dora", "--base", world.root / "dense", *flags, "-o", out) == 1
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--merge-into", "original"), "--base"),
        (("--base-quantization", "nf4", "--merge-into", "dequantized"), "Leave --base-quantization away"),
    ],
)
def test_a_choice_that_contradicts_a_stored_quantization_is_named(
    world: World, flags: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert run("merge", world.root / "dora", "--base", world.root / "nf4", *flags, "-o", out) == 1
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_conv1d_layers_are_turned_back(kind: str, tmp_path: Path) -> None:
    """GPT-2: transformers turns its weights before they are quantized, and a dense folder has them as they were."""
    sizes = {"vocab_size": 40, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = build("AutoModelForCausalLM", "gpt2", **sizes)
    save(model, tmp_path / "dense")
    adapt(model, tmp_path / "adapter", target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True)
    quantized = load_quantized(tmp_path / "dense", quantization_config=quantization(kind))
    quantized.save_pretrained(tmp_path / "stored")
    adapter = tmp_path / "adapter"
    assert run("merge", adapter, "--base", tmp_path / "stored", "-o", tmp_path / "one", "--device", "cpu") == 0
    flags = ("--base-quantization", kind, "--merge-into", "dequantized", "--device", "cpu")
    assert run("merge", adapter, "--base", tmp_path / "dense", *flags, "-o", tmp_path / "two") == 0
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    shared = [name for name in two if name in one]
    assert any("c_attn.weight" in name for name in shared)
    assert all(torch.equal(one[name], two[name]) for name in shared)
    merged = load(tmp_path / "one", model)
    with quiet():
        theirs = PeftModel.from_pretrained(copy.deepcopy(quantized), adapter).eval()
    wanted = logits(theirs, tokens(model))
    allowed = 0.05 if kind == "int8" else 1e-5
    assert distance(logits(merged, tokens(model)), wanted) < allowed * float(wanted.square().mean().sqrt())


# fsdp_qlora's QDoRA: a file by hand, in its trainer's layout, on a Qwen2, whose queries, keys and values have biases.


@dataclass(frozen=True)
class Qdora:
    """base: a dense Qwen2 in bfloat16. adapter: its folder. tensors: what is in it."""

    base: Path
    adapter: Path
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module")
def qdora(tmp_path_factory: pytest.TempPathFactory) -> Qdora:
    root = tmp_path_factory.mktemp("qdora")
    model = build("AutoModelForCausalLM", "qwen2", **{**SIZE, "tie_word_embeddings": False})
    save(model, root / "base", torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj")):
            out, width = module.weight.shape
            tensors[f"{name}.dora_layer.lora_A.weight"] = torch.randn(4, width, generator=generator)
            tensors[f"{name}.dora_layer.lora_B.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
            spread = 1 + 0.1 * torch.randn(out, generator=generator)
            tensors[f"{name}.magnitude_layer.magnitude"] = spread * module.weight.detach().norm(dim=1)
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    (root / "adapter").mkdir()
    save_file(tensors, root / "adapter" / "model_state_dict.safetensors")
    return Qdora(root / "base", root / "adapter", tensors)


def test_a_qdora_of_fsdp_qlora_is_what_its_layer_computes(qdora: Qdora, tmp_path: Path) -> None:
    """Its own formula (scripts/dora.py), in float64, over what bitsandbytes makes of the weights: nf4, and double as
    Linear4bit has it by default; m / ||V|| multiplies the bias as well."""
    out = tmp_path / "merged"
    flags = ("--base", qdora.base, "--base-quantization", "nf4", "--merge-into", "dequantized", "--device", "cpu")
    assert run("merge", qdora.adapter, *flags, "-o", out) == 0
    assert record_of(out)["quantization"].startswith("bitsandbytes nf4, blocks of 64, double quantization")
    merged, base = read_tensors(out), read_tensors(qdora.base)
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    adapted = [name.removesuffix(".magnitude_layer.magnitude") for name in qdora.tensors if "magnitude" in name]
    for module in adapted:
        a, b, m = (
            qdora.tensors[f"{module}.{part}"].double()
            for part in ("dora_layer.lora_A.weight", "dora_layer.lora_B.weight", "magnitude_layer.magnitude")
        )
        codes, state = bnb.quantize_4bit(base[f"{module}.weight"], quant_type="nf4", compress_statistics=True)
        direction = bnb.dequantize_4bit(codes, state).double() + b @ a
        scale = m / torch.linalg.vector_norm(direction, dim=1)
        wanted = scale.unsqueeze(1) * direction
        # Where a code of the absmax is a neighbour's (see test_quantized_decode), a block differs by a hundredth.
        close = (merged[f"{module}.weight"].double() - wanted).abs() <= 2.0**-8 * wanted.abs()
        assert close.float().mean() > 0.98
        if f"{module}.bias" in base:
            bias = base[f"{module}.bias"].double()
            assert not torch.allclose(scale, torch.ones(()).double(), rtol=1e-2)
            assert torch.allclose(merged[f"{module}.bias"].double(), scale * bias, rtol=2.0**-8)
    for name in base:
        if name.endswith("o_proj.weight"):  # it has no adapter, and is quantized all the same
            codes, state = bnb.quantize_4bit(base[name], quant_type="nf4", compress_statistics=True)
            same = merged[name] == bnb.dequantize_4bit(codes, state)
            assert same.float().mean() > 0.98
            assert not torch.equal(merged[name], base[name])
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


def test_a_qdora_of_fsdp_qlora_needs_the_choice(
    qdora: Qdora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert run("merge", qdora.adapter, "--base", qdora.base, "-o", out) == 1
    said = capsys.readouterr().err
    assert "--base-quantization nf4 --merge-into dequantized, or --merge-into original" in said
    assert not out.exists()
    assert run("merge", qdora.adapter, "--base", qdora.base, "--merge-into", "original", "-o", out, "--no-verify") == 0
    single = ("--base-quantization", "nf4-single", "--merge-into", "dequantized")
    assert run("merge", qdora.adapter, "--base", qdora.base, *single, "-o", tmp_path / "single", "--no-verify") == 0
    assert "single quantization" in record_of(tmp_path / "single")["quantization"]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(read_tensors(out)[name], read_tensors(tmp_path / "single")[name])


# HQQ and float8, end to end: bases by hand, whose dense twins are merged by the same command.


def hqq_twin(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """4-bit groups of 64 of a weight, without HQQ's search for better ones, and what they stand for."""
    groups = weight.float().view(-1, 64)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    scale = ((high - low) / 15).bfloat16()
    zero = (-low / scale.float()).bfloat16()
    codes = (groups / scale.float() + zero.float()).round().clamp(0, 15).to(torch.uint8)
    half = len(codes) // 2
    parts = {
        "W_q": codes[:half] << 4 | codes[half:],
        "scale": scale,
        "zero": zero,
        "shape": torch.tensor(weight.shape),
        "axis": torch.tensor(1, dtype=torch.int32),
        "group_size": torch.tensor(64, dtype=torch.int32),
        "nbits": torch.tensor(4, dtype=torch.int32),
        "packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
        "compute_dtype": torch.tensor(list(b"torch.bfloat16"), dtype=torch.uint8),
    }
    return parts, ((codes.bfloat16() - zero) * scale).view(weight.shape)


def float8_twin(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """float8 with one scale for the matrix, which is smaller than a block, and what it stands for."""
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale.view(1, 1)}, (codes.float() * scale).bfloat16()


@pytest.mark.parametrize(("method", "twin"), [("hqq", hqq_twin), ("fp8", float8_twin)])
def test_a_merge_into_other_codes_is_that_into_what_they_stand_for(
    world: World, method: str, twin: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]], tmp_path: Path
) -> None:
    dense = load(world.root / "dense", llama(**SIZE)).bfloat16()
    tensors, stood_for = dict(dense.state_dict()), dict(dense.state_dict())
    for name in list(tensors):
        module = name.removesuffix(".weight")
        if module.endswith(LINEARS):
            parts, stood_for[name] = twin(tensors.pop(name))
            tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    for folder, held in (("codes", tensors), ("twin", stood_for)):
        dense.config.save_pretrained(tmp_path / folder)
        save_file({name: value.contiguous() for name, value in held.items()}, tmp_path / folder / "model.safetensors")
        rewrite_json(tmp_path / folder / "config.json", dtype="bfloat16", architectures=["LlamaForCausalLM"])
    rewrite_json(tmp_path / "codes" / "config.json", quantization_config={"quant_method": method})
    for folder in ("codes", "twin"):
        where = ("--base", tmp_path / folder, "-o", tmp_path / f"merged-{folder}", "--device", "cpu")
        assert run("merge", world.root / "dora", *where) == 0
    codes, twins = read_tensors(tmp_path / "merged-codes"), read_tensors(tmp_path / "merged-twin")
    assert codes.keys() == twins.keys()
    assert all(torch.equal(codes[name], twins[name]) for name in twins)
    assert record_of(tmp_path / "merged-codes")["verification"]["forward"]["ran"]
    assert "quantization_config" not in config_of(tmp_path / "merged-codes")


# Written in four bits again: read by transformers and bitsandbytes, whose own quantization of the dense merge it is.


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_a_merge_may_be_written_in_four_bits(
    world: World, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--base", world.root / "nf4", "--device", "cpu")
    assert run("merge", world.root / "dora", *where, "-o", tmp_path / "dense") == 0
    capsys.readouterr()
    assert run("merge", world.root / "dora", *where, "--to", kind, "-o", tmp_path / "codes") == 0
    said = capsys.readouterr().out
    made = record_of(tmp_path / "codes")["four_bit"]
    assert f"{made['relative_error']:.1%} of their norm" in said
    assert f"KL {made['logits']['kl']:.3g} nats" in said
    dense, codes = read_tensors(tmp_path / "dense"), read_tensors(tmp_path / "codes")
    error = norm = 0.0
    for name, weight in dense.items():
        if not name.removesuffix(".weight").endswith(LINEARS):
            assert torch.equal(codes[name], weight)
            continue
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=kind == "nf4-double")
        wanted = state.as_dict(packed=True)
        assert torch.equal(codes[name], packed)
        assert {key.removeprefix(f"{name}.") for key in codes if key.startswith(f"{name}.")} == wanted.keys()
        facts = json.loads(bytes(codes[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
        assert facts == json.loads(bytes(wanted["quant_state.bitsandbytes__nf4"].tolist()))
        for key in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            if key in wanted and (kind == "nf4" or key != "absmax"):
                assert torch.equal(codes[f"{name}.{key}"], wanted[key]), key
        error += float((bnb.dequantize_4bit(packed, state) - weight).double().square().sum())
        norm += float(weight.double().square().sum())
    assert made["relative_error"] == pytest.approx((error / norm) ** 0.5, rel=1e-2)
    assert made["differing"] == 0

    assert verified(tmp_path / "dense", world.root / "dora", *where) == 0
    capsys.readouterr()
    assert verified(tmp_path / "codes", world.root / "dora", *where) == 1
    assert "is quantized (bitsandbytes nf4" in capsys.readouterr().out

    model = load_quantized(tmp_path / "codes")
    dense_model = load(tmp_path / "dense", llama(**SIZE))
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    dense_model.load_state_dict(dequantized(tmp_path / "codes"), strict=False)
    theirs, ours = logits(model, tokens(model)), logits(dense_model, tokens(model))
    assert distance(ours, theirs) < 1e-5 * float(theirs.square().mean().sqrt())


def test_four_bits_need_a_dtype_that_bitsandbytes_takes(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "codes"
    where = ("--base", world.root / "dense", "-o", out, "--to", "nf4")
    assert run("merge", world.root / "dora", *where, "--dtype", "float64") == 1
    assert "--dtype bfloat16" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_uneven_number_of_values_fills_its_last_byte(tmp_path: Path) -> None:
    """As bitsandbytes does it, where a matrix has an odd number of elements."""
    sizes = {**SIZE, "hidden_size": 35, "intermediate_size": 45, "head_dim": 8}
    sizes |= {"num_attention_heads": 5, "num_key_value_heads": 5}
    model = llama(**sizes)
    save(model, tmp_path / "dense", torch.bfloat16)
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"])
    where = ("--base", tmp_path / "dense", "--device", "cpu")
    assert run("merge", tmp_path / "adapter", *where, "--to", "nf4", "-o", tmp_path / "codes") == 0
    name = "model.layers.0.mlp.up_proj.weight"
    weight, codes = read_tensors(tmp_path / "dense")[name], read_tensors(tmp_path / "codes")
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(codes[name], packed)
    assert torch.equal(codes[f"{name}.absmax"], state.absmax)


def test_an_onnx_graph_may_be_made_of_the_dense_merge(world: World) -> None:
    assert run("merge", world.root / "dora", "--base", world.root / "nf4", "--to", "onnx", "--dry-run") == 0


def test_slots_need_a_dense_base(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--base", world.root / "nf4", "--to", "onnx-adapters", "-o", tmp_path / "onnx")
    assert run("merge", world.root / "lora", *where) == 1
    assert "--to onnx" in capsys.readouterr().err
