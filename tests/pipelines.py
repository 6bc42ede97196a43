"""Tiny seeded pipelines by diffusers, and adapters on them by PEFT and diffusers: none of our code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from tests.cases import noise, quiet, train, vary

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

TEXT: dict[str, Any] = {"vocab_size": 40, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 24, "projection_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP = ["q_proj", "v_proj", "out_proj", "fc1"]


def clip(kind: str, width: int, **changes: Any) -> Any:
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**TEXT, hidden_size=width, **changes))


def vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
    )


def sdxl(folder: Path) -> Path:
    """Two levels, two text encoders of different widths, linear projections: SDXL's kinds of layers, all of them."""
    torch.manual_seed(7)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,
        cross_attention_dim=24,
        norm_num_groups=2,
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vary(vae(4)),
        text_encoder=vary(clip("CLIPTextModel", 16)),
        text_encoder_2=vary(clip("CLIPTextModelWithProjection", 8)),
        tokenizer=None,
        tokenizer_2=None,
        unet=vary(unet),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(folder)
    return folder


def flux(folder: Path) -> Path:
    torch.manual_seed(7)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vary(vae(1)),
        text_encoder=vary(clip("CLIPTextModel", 16)),
        text_encoder_2=vary(t5(24)),
        tokenizer=None,
        tokenizer_2=None,
        transformer=vary(transformer),
    )
    pipeline.save_pretrained(folder)
    return folder


def sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5's kinds of layers: convolutions that project, one text encoder, no sizes."""
    torch.manual_seed(7)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=2,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vary(vae(4)),
        text_encoder=vary(clip("CLIPTextModel", 16)),
        tokenizer=None,
        unet=vary(unet),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def sd3(folder: Path) -> Path:
    """Two blocks, of which the first has a second attention and the last ends the text; three text encoders."""
    torch.manual_seed(7)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=vary(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vary(vae(4)),
        text_encoder=vary(clip("CLIPTextModelWithProjection", 16)),
        tokenizer=None,
        text_encoder_2=vary(clip("CLIPTextModelWithProjection", 8)),
        tokenizer_2=None,
        text_encoder_3=vary(t5(24)),
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder)
    return folder


def pixart(folder: Path) -> Path:
    torch.manual_seed(7)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=128,  # as of the model of 1024 pixels, which is told the sizes of pictures
        caption_channels=24,
    )
    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=vary(t5(24)),
        vae=vary(vae(4)),
        transformer=vary(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipeline.save_pretrained(folder)
    return folder


def t5(width: int) -> Any:
    config = transformers.T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def load(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    absent = [name for name, value in index.items() if value == [None, None]]
    return diffusers.DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))


def save_adapter(base: Path, folder: Path, targets: Mapping[str, list[str]], **config: Any) -> tuple[Path, Any]:
    """A trained LoRA on some components, in one file, as diffusers' training scripts save it.

    Returns the file and the pipeline that was trained, unmerged.
    """
    pipeline = load(base)
    layers, parts = {}, {}
    torch.manual_seed(11)
    with quiet():
        for name, modules in targets.items():
            part = getattr(pipeline, name)
            part.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=modules, **config))
            train(part)
            layers[f"{name}_lora_layers"], parts[name] = get_peft_model_state_dict(part), part
        pipeline.save_lora_weights(folder, **layers, **_collate_lora_metadata(parts))
    return folder / "pytorch_lora_weights.safetensors", pipeline


def outputs(pipeline: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The denoiser's output and the text encoders' hidden states, flat, by component."""
    ids = torch.tensor([[1, 5, 9, 3, 7, 7, 12, 2], [4, 39, 11, 30, 6, 21, 5, 2]])
    found = {}
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(pipeline, name, None) is None:
                continue
            output = getattr(pipeline, name).to(dtype).eval()(ids)
            found[name] = torch.cat([output.last_hidden_state.flatten(), _projected(output)])
        denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
        model = getattr(pipeline, denoiser).to(dtype).eval()
        given = {name: one.to(dtype) for name, one in _denoised(type(model).__name__, model.config).items()}
        sizes = {name: given.pop(name) for name in list(given) if name in CONDITIONS}
        found[denoiser] = model(**given, **({"added_cond_kwargs": sizes} if sizes else {})).sample.flatten()
    return {name: value.double() for name, value in found.items()}


CONDITIONS = ("text_embeds", "time_ids", "resolution", "aspect_ratio")


def _denoised(kind: str, config: Any) -> dict[str, Tensor]:
    """What a denoiser is given: latents, a time, the text's states, and what its class takes besides."""
    picture, time = noise(1, 4, 8, 8), torch.tensor([301.0])
    if kind == "UNet2DConditionModel":
        states = {"sample": picture, "timestep": time, "encoder_hidden_states": noise(1, 6, config.cross_attention_dim)}
        sizes = {"text_embeds": noise(1, 8), "time_ids": torch.full((1, 6), 64.0)}
        return states | (sizes if config.addition_embed_type else {})
    states = {"hidden_states": picture, "timestep": time, "encoder_hidden_states": noise(1, 6, 24)}
    if kind == "PixArtTransformer2DModel":
        return states | {"resolution": torch.tensor([[64.0, 48.0]]), "aspect_ratio": torch.tensor([[0.75]])}
    states |= {"pooled_projections": noise(1, 16)}
    if kind == "SD3Transformer2DModel":
        return states
    places = {"img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(6, 3)}
    return states | places | {"hidden_states": noise(1, 9, 4), "timestep": torch.tensor([0.3])}


def _projected(output: Any) -> Tensor:
    return output.text_embeds.flatten() if "text_embeds" in output else output.last_hidden_state.new_empty(0)
