"""What a file leaves unsaid, or says twice, is refused or told: nothing of it changes a model in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx_lm.tuner.utils as tuner
import pytest
import torch
from mlx_lm.utils import load_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_serve.adapter import Adapter
from dora_serve.errors import AdapterError
from dora_serve.formats import FORMATS, ReadOptions, read_adapter
from dora_serve.formats.mixed import lacking, layer_kind
from exporters.cli import main
from tests.cases import adapt, llama, rewrite_json, save
from tests.test_format_diffusers import unet
from tests.test_format_diffusers import write as write_diffusers
from tests.test_format_kohya import METHODS, Convolutions
from tests.test_format_kohya import train as train_lycoris
from tests.test_format_mlx import train as train_mlx
from tests.test_format_nvlabs import write as write_nvlabs
from tests.test_format_trainers import write_dynamic

ALLOW = "--allow-missing-magnitudes"


def without(file: Path, *endings: str) -> Path:
    """The file without the tensors whose names end so, metadata kept."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata)
    return file


# --- what the configuration leaves out ---


@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({"num_layers": 1}, {0}),
        ({"num_layers": 2}, set()),
        ({"num_layers": -1}, set()),
        ({"keys": ["self_attn.q_proj"]}, None),
    ],
)
def test_mlx_weights_outside_their_configuration_are_told(
    tmp_path: Path, config: dict[str, object], left: set[int] | None
) -> None:
    base = save(llama(), tmp_path / "base")
    train_mlx(base, tmp_path / "adapter", "dora", num_layers=2)
    assert not read_adapter(tmp_path / "adapter").notes
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    parameters = {**said["lora_parameters"], **({"keys": config["keys"]} if "keys" in config else {})}
    rewrite_json(tmp_path / "adapter" / "adapter_config.json", lora_parameters=parameters)
    if "num_layers" in config:
        rewrite_json(tmp_path / "adapter" / "adapter_config.json", num_layers=config["num_layers"])
    notes = read_adapter(tmp_path / "adapter").notes
    model, _ = load_model(base)
    if left == set():
        assert not notes
        tuner.load_adapters(model, str(tmp_path / "adapter"))
    else:
        (note,) = notes
        assert f"{5 if left else 8} modules" in note
        assert "mlx-lm would not adapt them" in note
        with pytest.raises(ValueError, match="not an adapter parameter"):
            tuner.load_adapters(model, str(tmp_path / "adapter"))


def test_mlx_says_full_and_holds_lora(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    train_mlx(base, tmp_path / "adapter", "lora")
    rewrite_json(tmp_path / "adapter" / "adapter_config.json", fine_tune_type="full")
    with pytest.raises(AdapterError, match="fine_tune_type = 'full'") as error:
        read_adapter(tmp_path / "adapter")
    assert len(str(error.value)) < 400


def test_nvlabs_weights_outside_their_targets_are_told(tmp_path: Path) -> None:
    write_nvlabs(save(llama(), tmp_path / "base"), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    assert not any("leave them out" in note for note in read_adapter(tmp_path / "adapter").notes)
    rewrite_json(config, Wdecompose_target_modules=None)
    (note,) = [note for note in read_adapter(tmp_path / "adapter").notes if "leave them out" in note]
    assert note.startswith("2 modules")
    rewrite_json(config, target_modules=r".*\.0\.(self_attn|mlp)\..*", Wdecompose_target_modules=["k_proj"])
    (note,) = [note for note in read_adapter(tmp_path / "adapter").notes if "leave them out" in note]
    assert "model.layers.1.self_attn.q_proj" in note


def test_peft_weights_that_it_excludes_are_told(tmp_path: Path) -> None:
    adapt(llama(), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    assert not read_adapter(tmp_path / "adapter").notes
    for excluded in (["v_proj"], r".*\.v_proj"):
        rewrite_json(tmp_path / "adapter" / "adapter_config.json", exclude_modules=excluded)
        (note,) = read_adapter(tmp_path / "adapter").notes
        assert note.startswith("2 modules")
        assert "v_proj" in note


# --- a format that contradicts what lies there ---


def peft_folder(root: Path) -> str:
    adapt(llama(), root / "adapter", target_modules=["q_proj"])
    return "peft"


def mlx_folder(root: Path) -> str:
    train_mlx(save(llama(), root / "base"), root / "adapter", "lora")
    return "mlx"


def nvlabs_folder(root: Path) -> str:
    write_nvlabs(save(llama(), root / "base"), root / "adapter")
    return "nvlabs"


def diffusers_folder(root: Path) -> str:
    write_diffusers(unet(), root / "adapter", dora=False, metadata=True)
    return "diffusers"


@pytest.mark.parametrize("make", [peft_folder, mlx_folder, nvlabs_folder, diffusers_folder])
def test_a_format_that_contradicts_the_configuration_is_refused(tmp_path: Path, make: Callable[[Path], str]) -> None:
    own = make(tmp_path)
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    assert read_adapter(tmp_path / "adapter", ReadOptions(format=own)).format == own
    for path in (tmp_path / "adapter", file):
        for other in ("kohya", "ai-toolkit", "megatron", "fsdp-qlora"):
            with pytest.raises(AdapterError, match=f"--format {other} was said") as error:
                read_adapter(path, ReadOptions(format=other, lora_alpha="rank"))
            assert error.value.remedy is not None
            assert f"--format {own}" in error.value.remedy


def test_kohyas_format_has_the_name_that_convert_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapt(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    out = tmp_path / "there"
    assert main(["convert", str(tmp_path / "adapter"), "--to", "kohya", "-o", str(out)]) == 0
    for name in ("kohya", "lycoris"):
        capsys.readouterr()
        assert main(["inspect", str(out), "--format", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["format"] == "kohya"
    assert "kohya" in FORMATS
    with pytest.raises(SystemExit):
        main(["inspect", str(out), "--format", "nonsense"])
    assert "kohya" in capsys.readouterr().err


def test_ai_toolkit_has_no_magnitudes_of_the_inputs(tmp_path: Path) -> None:
    file = tmp_path / "adapter" / "x.safetensors"
    train_lycoris(llama(), file, targets=["LlamaAttention"], dora_wd=True, wd_on_output=False)
    with pytest.raises(AdapterError, match=r"ai-toolkit's are \[out\]"):
        read_adapter(file, ReadOptions(format="ai-toolkit"))


# --- a magnitude or a scale that was lost ---


def test_the_kind_of_a_layer() -> None:
    assert layer_kind("unet.up_blocks_0_attentions_1_proj_in") == layer_kind("unet.mid_block_attentions_0_proj_in")
    assert layer_kind("unet.a_0_attn1_to_out_0") == layer_kind("unet.b_3_attn2_to_out_0") == "attn#_to_out_#"
    assert layer_kind("model.layers.3.mlp.fc1") == layer_kind("model.layers.11.mlp.fc2")


def test_what_is_lost_and_what_never_was() -> None:
    kinds = {f"layers.{layer}.{leaf}": leaf for layer in range(3) for leaf in ("q", "k", "head_of_its_own")}
    part = dict.fromkeys(kinds, "")
    assert lacking({module: leaf != "k" for module, leaf in kinds.items()}, part) == (
        [],
        [module for module, leaf in kinds.items() if leaf == "k"],
    )
    assert lacking({module: module != "layers.1.q" for module in kinds}, part) == (["layers.1.q"], [])
    assert lacking(dict.fromkeys(kinds, False), part) == ([], [])
    alone = {"layers.0.q": True, "layers.0.k": False}
    assert lacking(alone, dict.fromkeys(alone, "")) == (["layers.0.k"], [])


def lycoris_file(root: Path) -> Path:
    file = root / "adapter" / "x.safetensors"
    train_lycoris(llama(), file, targets=["LlamaDecoderLayer"], **METHODS[1])
    return file


def test_a_lost_dora_scale_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lycoris_file(tmp_path)
    whole = read_adapter(file)
    assert whole.method == "DoRA"
    assert not any("plain LoRA" in note for note in whole.notes)
    without(file, "layers_1_self_attn_k_proj.dora_scale")
    with pytest.raises(AdapterError, match="layers_1_self_attn_k_proj") as error:
        read_adapter(file)
    assert error.value.facts["option"] == ALLOW
    assert main(["inspect", str(file), ALLOW, "--json"]) == 0
    assert any("plain LoRA: " in note for note in json.loads(capsys.readouterr().out)["notes"])


def test_a_kind_of_layers_that_never_had_magnitudes_is_told(tmp_path: Path) -> None:
    file = without(lycoris_file(tmp_path), "k_proj.dora_scale")
    adapter = read_adapter(file)
    assert sum(module.magnitude is None for module in adapter.modules) == 2
    assert any(note.startswith("2 modules beside those of DoRA are plain LoRA") for note in adapter.notes)


def test_convolutions_without_magnitudes_beside_linear_layers_with_them_pass(tmp_path: Path) -> None:
    file, more = lycoris_file(tmp_path), tmp_path / "more" / "x.safetensors"
    train_lycoris(Convolutions(), more, targets=["Convolutions"])
    save_file({**load_file(file), **load_file(more)}, file)
    adapter: Adapter = read_adapter(file)
    assert {module.kind for module in adapter.modules if module.magnitude is None} == {"conv"}
    without(file, "layers_0_mlp_up_proj.dora_scale")
    with pytest.raises(AdapterError, match="1 of 17 modules"):
        read_adapter(file)


def test_a_lost_alpha_is_named(tmp_path: Path) -> None:
    file = lycoris_file(tmp_path)
    without(file, "layers_0_mlp_up_proj.alpha", "layers_1_self_attn_q_proj.alpha")
    with pytest.raises(AdapterError, match="2 of 14 modules") as error:
        read_adapter(file)
    assert error.value.facts["option"] == "--lora-alpha"
    said = {module.module: module.scaling for module in read_adapter(file, ReadOptions(lora_alpha=6)).modules}
    assert set(said.values()) == {1.5}
    without(file, ".alpha")
    assert any("have no alpha" in note for note in read_adapter(file).notes)


def test_a_lost_magnitude_in_a_file_of_diffusers_without_metadata(tmp_path: Path) -> None:
    write_diffusers(unet(), tmp_path / "adapter", dora=True, metadata=False)
    read = ReadOptions(lora_alpha="rank")
    assert read_adapter(tmp_path / "adapter", read).method == "DoRA"
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    first = next(name for name in load_file(file) if name.endswith("lora_magnitude_vector"))
    without(file, first)
    with pytest.raises(AdapterError, match="1 of ") as error:
        read_adapter(tmp_path / "adapter", read)
    assert error.value.facts["option"] == ALLOW


def test_a_lost_scaler_of_dynamic_low_rank(tmp_path: Path) -> None:
    write_dynamic(save(llama(), tmp_path / "base"), tmp_path / "adapter")
    (file,) = (tmp_path / "adapter").rglob("*.safetensors")
    first = next(name for name in load_file(file) if name.endswith("lora_scaler"))
    without(file, first)
    with pytest.raises(AdapterError, match="has no lora_scaler, and others have"):
        read_adapter(tmp_path / "adapter", ReadOptions(lora_alpha=8, allow_pickle=True))


def test_the_flag_is_refused_where_nothing_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="was said, and no module lacks"):
        read_adapter(lycoris_file(tmp_path), ReadOptions(allow_missing_magnitudes=True))


# --- torchtune's files without what tells them ---


TUNE = {
    "layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 16),
    "layers.0.attn.q_proj.lora_b.weight": torch.ones(16, 2),
}


@pytest.mark.parametrize("name", ["adapter_0.pt", "adapter_7.pt", "adapter.safetensors"])
@pytest.mark.parametrize("alone", [False, True])
def test_torchtunes_own_file_asks_for_what_is_missing(tmp_path: Path, name: str, alone: bool) -> None:
    file = tmp_path / name
    if file.suffix == ".pt":
        torch.save(TUNE, file)
        with pytest.raises(AdapterError, match="--allow-pickle"):
            read_adapter(file if alone else tmp_path)
    else:
        save_file(TUNE, file)
    path, read = file if alone else tmp_path, ReadOptions(allow_pickle=True)
    with pytest.raises(AdapterError, match="torchtune keeps it in") as error:
        read_adapter(path, read)
    assert error.value.facts["option"] == "--lora-alpha"
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (module,) = read_adapter(path, read).modules
    assert module.scaling == 4


def test_a_pickle_of_another_name_says_which_flags_read_it(tmp_path: Path) -> None:
    torch.save(TUNE, tmp_path / "mine.pt")
    with pytest.raises(AdapterError, match="--format torchtune"):
        read_adapter(tmp_path / "mine.pt")
    read = ReadOptions(format="torchtune", allow_pickle=True, lora_alpha=4)
    assert read_adapter(tmp_path / "mine.pt", read).modules[0].scaling == 2


def test_several_epochs_in_a_folder_are_not_chosen_from(tmp_path: Path) -> None:
    for epoch in range(2):
        torch.save(TUNE, tmp_path / f"adapter_{epoch}.pt")
    with pytest.raises(AdapterError, match="2 epochs"):
        read_adapter(tmp_path, ReadOptions(allow_pickle=True, lora_alpha=4))


def test_a_file_beside_its_configuration_names_the_folder(tmp_path: Path) -> None:
    adapt(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="Give the folder"):
        read_adapter(tmp_path / "adapter" / "adapter_model.safetensors")


def test_an_alpha_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle is unpickled as often as the adapter is read."""
    torch.save(TUNE, tmp_path / "adapter_0.pt")
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (loads.append(1), load(*args, **kwargs))[1])
    read_adapter(tmp_path, ReadOptions(allow_pickle=True, lora_alpha=4))
    assert len(loads) == 1
