"""Inputs for the models of a diffusers pipeline, made up from their configuration and the signature of their forward.

Latents are small: a denoiser takes any size that its levels divide, and every layer runs at the smallest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dora_serve.prompts import Sample, Samples

_SEED = 2402_09353
_TIMES = (901, 501, 101)
"""Steps of a thousand: nearly all noise, half, and little."""

_WORDS = 8
_SIDE = 4


def denoiser_samples(model: Any) -> Samples:
    """Three seeded inputs for a denoiser, two pictures or latents for a VAE. A dot in a name stands for a dictionary.

    Raises ValueError for a model whose inputs cannot be guessed.
    """
    accepted = set(inspect.signature(model.forward).parameters)
    if "timestep" not in accepted:
        make: Callable[[Any, set[str], int], dict[str, Tensor]] = _vae
        numbers, what = range(2), "pictures"
    elif "sample" in accepted:
        make, numbers, what = _unet, range(len(_TIMES)), "latents, with their times and conditions"
    elif "hidden_states" in accepted:
        make, numbers, what = _transformer, range(len(_TIMES)), "latents, with their times and conditions"
    else:
        raise ValueError(f"{type(model).__name__} takes {', '.join(sorted(accepted))}, for which no input is known")
    samples = tuple(Sample(make(model.config, accepted, number)) for number in numbers)
    return Samples(samples, f"{len(samples)} seeded random {what}")


def nested(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a forward: `a.b` becomes the key b of the dictionary a."""
    out: dict[str, Any] = {}
    for name, value in inputs.items():
        outer, _, inner = name.partition(".")
        if inner:
            out.setdefault(outer, {})[inner] = value
        else:
            out[name] = value
    return out


def _unet(config: Any, accepted: set[str], number: int) -> dict[str, Tensor]:
    side = _SIDE * 2 ** (len(config.block_out_channels) - 1)
    inputs = {
        "sample": _noise((1, config.in_channels, side, side), number),
        "timestep": torch.tensor([_TIMES[number]]),
    }
    width = _get(config, "cross_attention_dim")
    if isinstance(width, list | tuple):
        width = width[0]
    if "encoder_hidden_states" in accepted and isinstance(width, int):
        inputs["encoder_hidden_states"] = _noise((1, _WORDS, _get(config, "encoder_hid_dim") or width), number + 10)
    if _get(config, "addition_embed_type") == "text_time":
        # Six sizes in pixels (original, crop, target), each embedded, stand beside the pooled text.
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs.text_embeds"] = _noise((1, pooled), number + 20)
        inputs["added_cond_kwargs.time_ids"] = torch.tensor([[1024.0, 768.0, 0.0, 32.0, 1024.0, 1024.0]])
    elif _get(config, "addition_embed_type") is not None:
        raise ValueError(f"conditions of the kind {config.addition_embed_type} are not known")
    if _get(config, "num_class_embeds"):
        inputs["class_labels"] = torch.tensor([number % config.num_class_embeds])
    return inputs


def _transformer(config: Any, accepted: set[str], number: int) -> dict[str, Tensor]:
    packed = "img_ids" in accepted
    channels = config.in_channels
    if packed:
        latents = _noise((1, _SIDE * _SIDE, channels), number)
    else:
        side = _SIDE * int(_get(config, "patch_size") or 1)
        latents = _noise((1, channels, side, side), number)
    inputs = {"hidden_states": latents}
    # Flux counts time from 0 to 1 and multiplies it itself.
    inputs["timestep"] = torch.tensor([_TIMES[number] / 1000]) if packed else torch.tensor([_TIMES[number]])
    names = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
    width = next((value for name in names if isinstance(value := _get(config, name), int)), None)
    if "encoder_hidden_states" in accepted and width is not None:
        inputs["encoder_hidden_states"] = _noise((1, _WORDS, width), number + 10)
    if "pooled_projections" in accepted:
        inputs["pooled_projections"] = _noise((1, config.pooled_projection_dim), number + 20)
    if packed:
        rows = torch.arange(_SIDE * _SIDE)
        axes = len(_get(config, "axes_dims_rope") or (0, 0, 0))
        inputs["img_ids"], inputs["txt_ids"] = torch.zeros(len(rows), axes), torch.zeros(_WORDS, axes)
        inputs["img_ids"][:, 1], inputs["img_ids"][:, 2] = rows // _SIDE, rows % _SIDE
    if "guidance" in accepted and _get(config, "guidance_embeds"):
        inputs["guidance"] = torch.tensor([3.5])
    return inputs


def _vae(config: Any, accepted: set[str], number: int) -> dict[str, Tensor]:
    side = _SIDE * 2 ** (len(config.block_out_channels) - 1)
    name = "sample" if "sample" in accepted else "x"
    if name not in accepted:
        raise ValueError(f"it takes {', '.join(sorted(accepted))}, for which no input is known")
    return {name: _noise((1, config.in_channels, side, side), number)}


def _get(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _noise(shape: tuple[int, ...], number: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED + number))
