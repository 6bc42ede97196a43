"""kohya's names for pipelines: several components in one file, original names, projections that Flux fuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_serve.errors import PlanError
from dora_serve.formats import read_adapter
from dora_serve.pipeline_folder import open_pipeline
from dora_serve.pipeline_plan import plan_pipeline
from exporters.pipeline import ExportRequest, run_export
from tests.cases import ask_here
from tests.pipelines import ATTENTION, CLIP, flux, load, outputs, save_adapter, sdxl
from tests.test_pipelines import check_is_unmerged, check_report

# sd-scripts' names (networks/lora.py over library/sdxl_original_unet.py) for the layers of the tiny UNet.
ORIGINAL: tuple[tuple[str, str], ...] = (
    (r"^down_blocks\.0\.resnets\.0\.conv1$", "input_blocks.1.0.in_layers.2"),
    (r"^down_blocks\.0\.downsamplers\.0\.conv$", "input_blocks.2.0.op"),
    (r"^down_blocks\.1\.resnets\.0\.conv1$", "input_blocks.3.0.in_layers.2"),
    (r"^down_blocks\.1\.resnets\.0\.conv_shortcut$", "input_blocks.3.0.skip_connection"),
    (r"^down_blocks\.1\.attentions\.0\.", "input_blocks.3.1."),
    (r"^mid_block\.resnets\.0\.conv1$", "middle_block.0.in_layers.2"),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.conv1$", "middle_block.2.in_layers.2"),
    (r"^up_blocks\.0\.resnets\.(\d)\.conv1$", r"output_blocks.\1.0.in_layers.2"),
    (r"^up_blocks\.0\.resnets\.(\d)\.conv_shortcut$", r"output_blocks.\1.0.skip_connection"),
    (r"^up_blocks\.0\.attentions\.(\d)\.", r"output_blocks.\1.1."),
    (r"^up_blocks\.0\.upsamplers\.0\.conv$", "output_blocks.1.2.conv"),
    (r"^up_blocks\.1\.resnets\.0\.conv1$", "output_blocks.2.0.in_layers.2"),
    (r"^up_blocks\.1\.resnets\.0\.conv_shortcut$", "output_blocks.2.0.skip_connection"),
    (r"^up_blocks\.1\.resnets\.1\.conv1$", "output_blocks.3.0.in_layers.2"),
    (r"^up_blocks\.1\.resnets\.1\.conv_shortcut$", "output_blocks.3.0.skip_connection"),
)
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@pytest.fixture(autouse=True)
def _ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.names.runtime_names", ask_here)


def in_kohya_names(tensors: Mapping[str, Tensor], alpha: float, *, original: bool) -> dict[str, Tensor]:
    """diffusers' file under kohya's names; original: those of the published UNet, else diffusers' own."""
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        component, _, rest = key.partition(".")
        module, _, role = rest.partition(".lora_")
        if component == "unet" and original:
            found = [re.sub(pattern, name, module) for pattern, name in ORIGINAL if re.search(pattern, module)]
            assert len(found) == 1, module
            module = found[0]
        elif component != "unet" and not module.startswith("text_"):
            module = f"text_model.{module}"  # as the class has it before transformers 5
        name = PREFIXES[component] + module.replace(".", "_")
        out[f"{name}.alpha"] = torch.tensor(alpha)
        if role == "magnitude_vector":
            out[f"{name}.dora_scale"] = value.flatten()
        else:
            out[f"{name}.lora_{'down' if role[0] == 'A' else 'up'}.weight"] = value.contiguous()
    return out


@pytest.mark.parametrize(("use_dora", "original"), [(False, True), (True, False)])
def test_sdxl(use_dora: bool, original: bool, tmp_path: Path) -> None:
    base = sdxl(tmp_path / "base")
    convolutions = ["conv1", "conv_shortcut", "proj_in", "ff.net.2", "downsamplers.0.conv", "upsamplers.0.conv"]
    targets = {"unet": [*ATTENTION, *convolutions], "text_encoder": CLIP, "text_encoder_2": CLIP}
    file, trained = save_adapter(base, tmp_path / "trained", targets, use_dora=use_dora)
    truth = outputs(trained)
    kohya = tmp_path / "kohya.safetensors"
    save_file(in_kohya_names(load_file(file), 6.0, original=original), kohya)
    made = run_export(ExportRequest(str(kohya), str(base), tmp_path / "out"))
    check_report(made, set(targets))
    check_is_unmerged(base, truth, tmp_path / "out", set(targets))
    if not use_dora:
        # diffusers reads the same file: its own conversion of these names agrees.
        loaded = load(base)
        loaded.load_lora_weights(kohya)
        assert torch.allclose(outputs(loaded)["unet"], truth["unet"], rtol=0, atol=1e-6)


FUSED = {
    "double_blocks_0_img_attn_qkv": ("transformer_blocks.0.attn", ("to_q", "to_k", "to_v")),
    "double_blocks_0_txt_attn_qkv": ("transformer_blocks.0.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    "double_blocks_0_img_attn_proj": ("transformer_blocks.0.attn", ("to_out.0",)),
    "double_blocks_0_img_mlp_0": ("transformer_blocks.0.ff.net.0", ("proj",)),
    "double_blocks_0_txt_mlp_2": ("transformer_blocks.0.ff_context.net", ("2",)),
    "double_blocks_0_img_mod_lin": ("transformer_blocks.0.norm1", ("linear",)),
    "single_blocks_0_linear1": ("single_transformer_blocks.0", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    "single_blocks_0_linear2": ("single_transformer_blocks.0", ("proj_out",)),
    "single_blocks_0_modulation_lin": ("single_transformer_blocks.0.norm", ("linear",)),
}


def fused_file(base: Path, file: Path, axis: int | None) -> dict[str, Tensor]:
    """LoRA of rank 2 or DoRA, on Flux's own layers. Returns the merged weights, in float64."""
    stored = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    tensors, wanted = {}, {}
    for name, (path, leaves) in FUSED.items():
        weights = {f"{path}.{leaf}.weight": stored[f"{path}.{leaf}.weight"].double() for leaf in leaves}
        whole = torch.cat(list(weights.values()))
        up = torch.randn(whole.shape[0], 2, generator=generator)
        down = torch.randn(2, whole.shape[1], generator=generator)
        tensors |= {f"lora_unet_{name}.lora_up.weight": up, f"lora_unet_{name}.lora_down.weight": down}
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
        v = whole + 0.5 * (up.double() @ down.double())
        if axis is not None:
            norm = whole.norm(dim=axis, keepdim=True).float() * 1.1
            tensors[f"lora_unet_{name}.dora_scale"] = norm
            v = v * norm.double() / (v.norm(dim=axis, keepdim=True) + torch.finfo(torch.float32).eps)
        wanted |= dict(zip(weights, v.split([len(one) for one in weights.values()]), strict=True))
    save_file(tensors, file)
    return wanted


@pytest.mark.parametrize("axis", [None, 1])
def test_flux_with_its_fused_projections(axis: int | None, tmp_path: Path) -> None:
    base = flux(tmp_path / "base")
    wanted = fused_file(base, tmp_path / "kohya.safetensors", axis)
    made = run_export(ExportRequest(str(tmp_path / "kohya.safetensors"), str(base), tmp_path / "out"))
    check_report(made, {"transformer"})
    merged = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in merged.items():
        if name in wanted:
            # Rounded once from float64, whose own error may tip a tie.
            torch.testing.assert_close(tensor, wanted[name].float(), rtol=2e-7, atol=0)
        else:
            assert torch.equal(tensor, before[name])


def test_a_magnitude_of_inputs_cannot_be_split(tmp_path: Path) -> None:
    """Its norm runs over the rows of query, key and value together, and diffusers has no layer with all of them."""
    base = flux(tmp_path / "base")
    fused_file(base, tmp_path / "kohya.safetensors", 0)
    with pytest.raises(PlanError, match=r"transformer: double_blocks_0_img_attn_qkv: got a magnitude for each input"):
        plan_pipeline(open_pipeline(base), read_adapter(tmp_path / "kohya.safetensors"))
