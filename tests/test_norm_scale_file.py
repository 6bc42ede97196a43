"""norm_scale.safetensors: its values against PEFT's own norms, and what it is believed for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_serve.errors import AdapterError, UnmergeableError
from dora_serve.norm_scale_file import FILE_NAME, fingerprint, read_norm_scales, write_norm_scales
from dora_serve.stored_norm_scales import stored_norm_scales
from exporters.cli import main
from tests.cases import (
    LINEARS,
    SIZES,
    adapt,
    build,
    llama,
    logits,
    plan,
    rewrite_json,
    rewrite_tensors,
    save,
    tokens,
    unmerged,
)

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}


def peft_scales(model: Any) -> dict[str, torch.Tensor]:
    """m / ||W + s B A|| of every module, with the norm that PEFT takes."""
    found = {}
    for name, module in model.named_modules():
        if getattr(module, "use_dora", {}).get("default"):
            lora_b, lora_a = (getattr(module, one)["default"].weight.double() for one in ("lora_B", "lora_A"))
            dora = module.lora_magnitude_vector["default"]
            weight = module.get_base_layer().weight.double()
            norm = dora.get_weight_norm(weight, lora_b @ lora_a, module.scaling["default"])
            found[name.removeprefix("base_model.model.")] = (dora.weight.double() / norm).detach()
    return found


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        pytest.param(lambda: llama(), LINEARS, id="llama"),
        pytest.param(lambda: build("AutoModelForCausalLM", "gpt2", **GPT2), ("c_attn", "c_fc"), id="stored transposed"),
        pytest.param(lambda: build("AutoModelForCausalLM", "phi3", **SIZES), ("qkv_proj", "down_proj"), id="fused"),
    ],
)
def test_the_scales_are_pefts_magnitude_over_its_norm(base: Any, targets: tuple[str, ...], tmp_path: Path) -> None:
    model = base()
    fan_in_fan_out = model.config.model_type == "gpt2"
    adapted = adapt(
        model, tmp_path / "adapter", target_modules=list(targets), use_dora=True, r=3, fan_in_fan_out=fan_in_fan_out
    )
    wanted = peft_scales(adapted)
    assert len(wanted) == 2 * len(targets)
    made = stored_norm_scales(plan(save(model, tmp_path / "base"), tmp_path / "adapter"))
    assert made.keys() == wanted.keys()
    for name, scale in made.items():
        torch.testing.assert_close(scale, wanted[name], rtol=1e-12, atol=0)
        assert (scale - 1).abs().max() > 0.1  # or the file would say nothing


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and a DoRA with its norm scales beside it."""
    folder = tmp_path_factory.mktemp("written")
    model = llama()
    adapt(model, folder / "adapter", target_modules=list(LINEARS), use_dora=True)
    base = save(model, folder / "base")
    write_norm_scales(folder / "adapter", stored_norm_scales(plan(base, folder / "adapter")), fingerprint(base))
    return base, folder / "adapter"


def test_what_is_written_is_read_again(written: tuple[Path, Path]) -> None:
    base, adapter = written
    stored = read_norm_scales(adapter)
    assert stored is not None
    assert stored.base == fingerprint(base)
    by_the_library = load_file(adapter / FILE_NAME)
    for name, scale in stored_norm_scales(plan(base, adapter)).items():
        assert torch.equal(stored.scales[name], scale.float())
        assert torch.equal(by_the_library[f"{name}.norm_scale"], scale.float())


def test_beside_other_weights_or_another_config_it_says_nothing(written: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = written
    assert read_norm_scales(shutil.copytree(adapter, tmp_path / "same")) is not None
    trained_on = shutil.copytree(adapter, tmp_path / "trained_on")
    rewrite_tensors(trained_on / "adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).mul_(2))
    assert read_norm_scales(trained_on) is None
    rescaled = shutil.copytree(adapter, tmp_path / "rescaled")
    rewrite_json(rescaled / "adapter_config.json", lora_alpha=3)
    assert read_norm_scales(rescaled) is None
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    save_file({"x.norm_scale": torch.ones(3)}, foreign / FILE_NAME)
    assert read_norm_scales(foreign) is None
    (foreign / FILE_NAME).unlink()
    assert read_norm_scales(foreign) is None


def test_a_corrupt_file_is_an_error_and_no_silence(written: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = written
    cut = shutil.copytree(adapter, tmp_path / "cut")
    (cut / FILE_NAME).write_bytes((adapter / FILE_NAME).read_bytes()[:-5])
    with pytest.raises(AdapterError, match="truncated"):
        read_norm_scales(cut)
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    content = bytearray((adapter / FILE_NAME).read_bytes())
    content[-4:] = b"\x00\x00\x80\x7f"  # infinity
    (damaged / FILE_NAME).write_bytes(content)
    with pytest.raises(AdapterError, match="not finite"):
        read_norm_scales(damaged)


def test_the_fingerprint_is_of_the_weights_and_not_of_their_files(tmp_path: Path) -> None:
    model = llama()
    whole = fingerprint(save(model, tmp_path / "whole"))
    assert fingerprint(save(model, tmp_path / "sharded", max_shard_size="20KB")) == whole
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint(save(model, tmp_path / "half", torch.bfloat16)) != whole
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert fingerprint(save(model, tmp_path / "tuned")) != whole


def test_what_has_no_norm_scales_is_said(tmp_path: Path) -> None:
    model = llama()
    base = save(model, tmp_path / "base")
    adapt(model, tmp_path / "lora", target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="is a LoRA and has no norm scales"):
        stored_norm_scales(plan(base, tmp_path / "lora"))
    adapt(model, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"][0] = 0

    def no_update(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0] = 0

    rewrite_tensors(base / "model.safetensors", zero)
    rewrite_tensors(tmp_path / "dora" / "adapter_model.safetensors", no_update)
    with pytest.raises(UnmergeableError, match="is zero"):
        stored_norm_scales(plan(base, tmp_path / "dora"))


def test_convert_writes_the_scales_beside_pefts_own_files(tmp_path: Path) -> None:
    model = llama()
    adapted = adapt(
        model, tmp_path / "adapter", target_modules=list(LINEARS), use_dora=True, rank_pattern={"q_proj": 2}
    )
    base = save(model, tmp_path / "base")
    command = ["convert", str(tmp_path / "adapter"), "--to", "vllm", "--base", str(base), "-o", str(tmp_path / "out")]
    assert main(command) == 0
    stored = read_norm_scales(tmp_path / "out")
    assert stored is not None
    assert stored.base == fingerprint(base)
    wanted = peft_scales(adapted)
    assert stored.scales.keys() == wanted.keys()
    for name, scale in stored.scales.items():
        assert torch.equal(scale, wanted[name].float())
    inputs = tokens(model)
    assert torch.equal(logits(unmerged(base, tmp_path / "out", model, torch.float32), inputs), logits(adapted, inputs))


def test_convert_needs_a_base_and_gives_a_lora_no_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    adapt(model, tmp_path / "lora", target_modules=["q_proj"])
    base = save(model, tmp_path / "base")
    command = ["convert", str(tmp_path / "lora"), "--to", "vllm", "-o", str(tmp_path / "out")]
    assert main(command) == 1
    assert "--base" in capsys.readouterr().err
    assert main([*command, "--base", str(base)]) == 0
    assert "needs no norm scales" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "dora_export.json",
    ]
