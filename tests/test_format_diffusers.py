"""LoRA and DoRA files of diffusers, made by its own writer and run by its own UNet."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_serve.errors import AdapterError
from dora_serve.formats import ReadOptions, read_adapter
from tests.cases import merge_to, noise, quiet, train

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]


def unet() -> Any:
    torch.manual_seed(2)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def run(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(noise(2, 4, 8, 8), torch.tensor([3, 500]), noise(2, 5, 12)).sample
    return output


def write(start: Any, folder: Path, *, dora: bool, metadata: bool) -> Any:
    """A UNet with an adapter that moved; saved as train_dreambooth_lora.py saves it. Returns it."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=dora, rank_pattern={"to_k": 2})
    model = copy.deepcopy(start)
    with quiet():
        model.add_adapter(config)
        train(model)
    layers = get_peft_model_state_dict(model)
    said = {"unet_lora_adapter_metadata": {**config.to_dict(), "runtime_config": None}} if metadata else {}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, **said)
    return model.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_merged_is_what_diffusers_runs(tmp_path: Path, dora: bool) -> None:
    start = unet()
    start.save_pretrained(tmp_path / "unet")
    trained = write(start, tmp_path / "adapter", dora=dora, metadata=True)
    assert read_adapter(tmp_path / "adapter").format == "diffusers"
    merge_to(tmp_path / "unet", tmp_path / "adapter", tmp_path / "merged")
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged").eval()
    # Noise of about 1, after some hundreds of roundings of float32.
    assert torch.allclose(run(merged), run(trained), rtol=0, atol=1e-5)
    assert not torch.allclose(run(merged), run(start), rtol=0, atol=1e-2)


def test_alpha_that_the_metadata_do_not_say_is_asked(tmp_path: Path) -> None:
    start = unet()
    write(start, tmp_path / "adapter", dora=True, metadata=False)
    with pytest.raises(AdapterError, match="--lora-alpha"):
        read_adapter(tmp_path / "adapter")
    as_trained = read_adapter(tmp_path / "adapter", ReadOptions(lora_alpha=6.0)).modules
    assert {module.scaling for module in as_trained} == {1.5, 3.0}
    as_loaded = read_adapter(tmp_path / "adapter", ReadOptions(lora_alpha="rank")).modules
    assert {module.scaling for module in as_loaded} == {1.0}


def test_names_of_old(tmp_path: Path) -> None:
    """Attention processors held the factors; and `lora.down`, `lora.up` for what is lora_A, lora_B."""
    tensors = {
        "unet.mid_block.attentions.0.processor.to_out_lora.down.weight": torch.ones(2, 4),
        "unet.mid_block.attentions.0.processor.to_out_lora.up.weight": torch.ones(4, 2),
        "unet.conv_in.lora.down.weight": torch.ones(2, 3, 3, 3),
        "unet.conv_in.lora.up.weight": torch.ones(4, 2, 1, 1),
        "text_encoder.layers.0.self_attn.to_q_lora.down.weight": torch.ones(2, 4),
        "text_encoder.layers.0.self_attn.to_q_lora.up.weight": torch.ones(4, 2),
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    modules = read_adapter(tmp_path, ReadOptions(lora_alpha="rank")).modules
    names = {"unet.mid_block.attentions.0.to_out.0", "unet.conv_in", "text_encoder.layers.0.self_attn.q_proj"}
    assert {module.module for module in modules} == names
    assert {module.kind for module in modules if "conv" in module.module} == {"conv"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_adapter_metadata": "{"}, "no JSON"),
        ({"lora_adapter_metadata": "[]"}, "no JSON object"),
        ({"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": 6})}, "says rank 3"),
        ({"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 6})}, "use_dora = False"),
        ({"lora_adapter_metadata": json.dumps({"unet.use_qalora": True})}, "QALoRA"),
        ({"lora_adapter_metadata": json.dumps({"unet.use_tomorrows": True})}, "--ignore-config"),
    ],
)
def test_faults_are_named(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    write(unet(), tmp_path / "adapter", dora=True, metadata=False)
    file = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file, metadata)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "adapter")
