"""Stable Diffusion 1.5 and 3, PixArt and single transformers: adapters of diffusers, PEFT, LyCORIS and ai-toolkit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lycoris.kohya import create_network
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_serve.formats import read_adapter
from exporters.pipeline import ExportRequest, run_export
from tests.cases import ask_here, distance, noise, quiet, train, vary
from tests.pipelines import ATTENTION, CLIP, load, outputs, pixart, save_adapter, sd3, sd15
from tests.test_pipelines import check_is_unmerged, check_report, export

T5 = ["q", "v", "o", "wi", "wo"]
TARGETS: Mapping[str, tuple[Callable[[Path], Path], Mapping[str, list[str]]]] = {
    "sd15": (sd15, {"unet": [*ATTENTION, "proj_in", "proj_out", "conv1", "ff.net.0.proj"], "text_encoder": CLIP}),
    "sd3": (
        sd3,
        {
            "transformer": [*ATTENTION, "add_k_proj", "to_add_out", "norm1.linear", "ff_context.net.2"],
            "text_encoder": [*CLIP, "text_projection"],
            "text_encoder_2": CLIP,
        },
    ),
}


@pytest.fixture(autouse=True)
def _ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


@pytest.mark.parametrize("kind", TARGETS)
def test_what_diffusers_saves(kind: str, tmp_path: Path) -> None:
    make, targets = TARGETS[kind]
    base = make(tmp_path / "base")
    file, trained = save_adapter(base, tmp_path / "adapter", targets, use_dora=True)
    truth = outputs(trained)
    check_report(export(base, file, tmp_path / "out"), set(targets))
    check_is_unmerged(base, truth, tmp_path / "out", set(targets))
    loaded = load(base)
    loaded.load_lora_weights(file)
    denoiser = next(iter(targets))
    assert torch.equal(outputs(loaded)[denoiser], truth[denoiser])


PRESET = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = ["conv_in"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
text_encoder_target_name = []
"""


def test_sd15_as_lycoris_trains_it(tmp_path: Path) -> None:
    """With norms of the inputs, channels of convolutions, which LyCORIS had as its default."""
    base = sd15(tmp_path / "base")
    pipeline = load(base)
    preset = tmp_path / "preset.toml"
    preset.write_text(PRESET)
    options = {"algo": "lora", "dora_wd": True, "wd_on_output": False, "conv_dim": 4, "conv_alpha": 2}
    options["preset"] = str(preset)
    network = create_network(1.0, 4, 6, pipeline.vae, pipeline.text_encoder, pipeline.unet, **options)
    network.apply_to(pipeline.text_encoder, pipeline.unet, True, True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            step = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + step.clamp(-0.4, 0.4)) if "dora_scale" in name else parameter + step)
    file = tmp_path / "lycoris.safetensors"
    network.save_weights(str(file), None, {})
    assert any(name.startswith("lora_te_") for name in load_file(file))
    network.double()
    truth = outputs(pipeline)
    made = export(base, file, tmp_path / "out")
    check_report(made, {"unet", "text_encoder"})
    check_is_unmerged(base, truth, tmp_path / "out", {"unet", "text_encoder"})


def test_pixart_as_peft_trains_it(tmp_path: Path) -> None:
    """The denoiser by PEFT's own save_pretrained; the text encoder, a T5, in kohya's names."""
    base = pixart(tmp_path / "base")
    pipeline = load(base)
    with quiet():
        torch.manual_seed(11)
        config = LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "proj", "linear_1"], use_dora=True)
        adapted = train(get_peft_model(pipeline.transformer, config))
        adapted.save_pretrained(tmp_path / "adapter")
    truth = outputs(pipeline)
    check_report(export(base, tmp_path / "adapter", tmp_path / "out"), {"transformer"})
    check_is_unmerged(base, truth, tmp_path / "out", {"transformer"})

    encoder = load(base).text_encoder
    with quiet():
        trained = train(get_peft_model(encoder, LoraConfig(r=4, lora_alpha=6, target_modules=T5)))
    kohya = {}
    for name, value in trained.named_parameters():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.default\.weight", name):
            module = f"lora_te_{match[1].replace('.', '_')}"
            kohya[f"{module}.lora_{'down' if match[2] == 'A' else 'up'}.weight"] = value.detach().clone()
            kohya[f"{module}.alpha"] = torch.tensor(6.0)
    save_file(kohya, tmp_path / "t5.safetensors")
    truth = outputs(load(base)) | {"text_encoder": trained.double()(IDS).last_hidden_state.detach().flatten()}
    check_report(export(base, tmp_path / "t5.safetensors", tmp_path / "out2"), {"text_encoder"})
    check_is_unmerged(base, truth, tmp_path / "out2", {"text_encoder"})


IDS = torch.tensor([[1, 5, 9, 3, 7, 7, 12, 2], [4, 39, 11, 30, 6, 21, 5, 2]])

# sd-scripts' names of SD3 (library/sd3_models.py), and the layers that diffusers made of each.
SD3: Mapping[str, tuple[str, ...]] = {
    "joint_blocks_0_x_block_attn_qkv": tuple(f"transformer_blocks.0.attn.to_{one}" for one in "qkv"),
    "joint_blocks_0_x_block_attn2_qkv": tuple(f"transformer_blocks.0.attn2.to_{one}" for one in "qkv"),
    "joint_blocks_1_context_block_attn_qkv": tuple(f"transformer_blocks.1.attn.add_{one}_proj" for one in "qkv"),
    "joint_blocks_0_context_block_mlp_fc1": ("transformer_blocks.0.ff_context.net.0.proj",),
    "joint_blocks_0_context_block_adaLN_modulation_1": ("transformer_blocks.0.norm1_context.linear",),
    "joint_blocks_1_context_block_adaLN_modulation_1": ("transformer_blocks.1.norm1_context.linear",),
    "final_layer_adaLN_modulation_1": ("norm_out.linear",),
    "final_layer_linear": ("proj_out",),
}
HALVES_SWAPPED = ("joint_blocks_1_context_block_adaLN_modulation_1", "final_layer_adaLN_modulation_1")


@pytest.mark.parametrize("axis", [None, 1, 0])
def test_sd3_in_its_original_names(axis: int | None, tmp_path: Path) -> None:
    """Every element by the formula on the original layers; a magnitude of inputs only where nothing is split."""
    base = sd3(tmp_path / "base")
    before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    tensors, wanted = {}, {}
    for name, leaves in SD3.items():
        if axis == 0 and len(leaves) > 1:
            continue
        weights = {f"{leaf}.weight": before[f"{leaf}.weight"].double() for leaf in leaves}
        whole = torch.cat(list(weights.values()))
        if name in HALVES_SWAPPED:
            whole = whole.roll(len(whole) // 2, 0)
        up, down = (torch.randn(shape, generator=generator) for shape in ((len(whole), 2), (2, whole.shape[1])))
        tensors |= {f"lora_unet_{name}.lora_up.weight": up, f"lora_unet_{name}.lora_down.weight": down}
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
        v = whole + 0.5 * (up.double() @ down.double())
        if axis is not None:
            magnitude = (whole.norm(dim=axis, keepdim=True) * (1 + 0.1 * torch.rand(1, generator=generator))).float()
            tensors[f"lora_unet_{name}.dora_scale"] = magnitude
            v = v * magnitude.double() / (v.norm(dim=axis, keepdim=True) + torch.finfo(torch.float32).eps)
        if name in HALVES_SWAPPED:
            v = v.roll(len(v) // 2, 0)
        wanted |= dict(zip(weights, v.split([len(one) for one in weights.values()]), strict=True))
    save_file(tensors, tmp_path / "kohya.safetensors")
    check_report(export(base, tmp_path / "kohya.safetensors", tmp_path / "out"), {"transformer"})
    merged = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in merged.items():
        if name in wanted:
            torch.testing.assert_close(tensor, wanted[name].float(), rtol=2e-7, atol=0)  # a tie may tip
        else:
            assert torch.equal(tensor, before[name]), name


# Transformers by themselves, as ai-toolkit saves their adapters: ComfyUI's name in front, alpha = rank, no alpha.

WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
WAN |= {"freq_dim": 8, "ffn_dim": 24, "num_layers": 1, "rope_max_seq_len": 32}
QWEN = {"in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
QWEN |= {"joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)}
WAN_NAMES = (("attn1.to_out.0", "self_attn.o"), ("attn2.to_q", "cross_attn.q"), ("ffn.net.2", "ffn.2"))


def qwen_inputs() -> dict[str, Any]:
    states = {"hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 6, 16)}
    return states | {"timestep": torch.tensor([0.3]), "img_shapes": [[(1, 4, 4)]]}


def wan_inputs() -> dict[str, Any]:
    states = {"hidden_states": noise(1, 4, 2, 8, 8), "encoder_hidden_states": noise(1, 6, 16)}
    return states | {"timestep": torch.tensor([301.0])}


SINGLE: Mapping[str, tuple[str, Mapping[str, Any], list[str], Callable[[], dict[str, Any]]]] = {
    "Qwen-Image": ("QwenImageTransformer2DModel", QWEN, ["to_q", "add_k_proj", "img_mod.1"], qwen_inputs),
    "Wan": ("WanTransformer3DModel", WAN, ["attn1.to_out.0", "attn2.to_q", "ffn.net.2"], wan_inputs),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_transformer_by_itself(name: str, tmp_path: Path) -> None:
    kind, sizes, targets, inputs = SINGLE[name]
    torch.manual_seed(7)
    model = vary(getattr(diffusers, kind)(**sizes))
    model.save_pretrained(tmp_path / "transformer")
    with quiet():
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_dora=True))
        train(model)
    saved = {}
    for key, value in model.named_parameters():
        match = re.fullmatch(r"(.+)\.lora_(A|B|magnitude_vector)\.default\.weight", key)
        if match is None:
            continue
        module = match[1]
        for ours, theirs in WAN_NAMES if name == "Wan" else ():
            module = module.replace(ours, theirs)
        leaf = "magnitude" if len(match[2]) > 1 else f"lora_{match[2]}.weight"
        saved[f"diffusion_model.{module}.{leaf}"] = value.detach().clone()
    file = tmp_path / "adapter.safetensors"
    save_file(saved, file, {"software": '{"name": "ai-toolkit"}'})
    adapter = read_adapter(file)
    assert adapter.format == "ai-toolkit"
    assert {module.scaling for module in adapter.modules} == {1.0}
    made: Any = run_export(ExportRequest(str(file), str(tmp_path / "transformer"), tmp_path / "out")).verification
    assert made.tensors.exact
    assert made.forward.ran, made.forward.reason
    assert made.forward.passed
    assert not made.forward.changes_nothing
    merged = getattr(diffusers, kind).from_pretrained(tmp_path / "out").double()
    given = {key: one.double() if isinstance(one, Tensor) else one for key, one in inputs().items()}
    with torch.no_grad():
        theirs, ours = (one.double()(**given).sample for one in (model, merged))
        model.disable_adapters()
        start = model(**given).sample
    assert distance(ours, theirs) < 1e-6 < 1e-2 < distance(start, theirs)
