"""Inputs for the models of a diffusers pipeline, made up from their configuration and the signature of their forward.

Latents are small: a denoiser takes any size that its levels divide, and every layer runs at the smallest.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dora_serve.prompts import Sample, Samples

_SEED = 2402_09353
_TIMES = (901, 501, 101)
"""Steps of a thousand: nearly all noise, half, and little."""

_WORDS = 8
_SIDE = 4
_FRAMES = 2


def denoiser_samples(model: Any) -> Samples:
    """Three seeded inputs for a denoiser, two pictures or latents for a VAE, in the names that `nested` takes.

    Raises ValueError for a model whose inputs cannot be guessed.
    """
    accepted = set(inspect.signature(model.forward).parameters)
    numbers, what = range(len(_TIMES)), "latents, with their times and conditions"
    if {"x", "t", "cap_feats"} <= accepted:
        made = [_patches_of_a_list(model, number) for number in numbers]
    elif "timestep" not in accepted:
        numbers, what = range(2), "pictures"
        made = [_vae(model.config, accepted, number) for number in numbers]
    elif "sample" in accepted:
        made = [_unet(model.config, accepted, number) for number in numbers]
    elif "hidden_states" in accepted:
        made = [_transformer(model, accepted, number) for number in numbers]
    else:
        raise ValueError(f"{type(model).__name__} takes {', '.join(sorted(accepted))}, for which no input is known")
    return Samples(tuple(Sample(inputs) for inputs in made), f"{len(made)} seeded random {what}")


def nested(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a forward: `a.b` becomes the key b of the dictionary a, `a[]` a list of its rows, `a:` its
    numbers.
    """
    out: dict[str, Any] = {}
    for name, value in inputs.items():
        outer, _, inner = name.partition(".")
        if inner:
            out.setdefault(outer, {})[inner] = value
        elif name.endswith("[]"):
            out[name.removesuffix("[]")] = list(value)
        elif name.endswith(":"):
            out[name.removesuffix(":")] = value.tolist()
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


def _transformer(model: Any, accepted: set[str], number: int) -> dict[str, Tensor]:
    """Latents as a picture (1, channels, side, side), as a film (1, channels, frames, side, side), or as the patches of
    one, which come with their places; and text as hidden states."""
    config, kind = model.config, type(model).__name__
    packed, film = bool(accepted & _PLACES), _is_film(config, kind)
    side, frames = _SIDE * _patch(config), _FRAMES if film else 1
    if packed:
        latents = _noise((1, frames * _SIDE * _SIDE, config.in_channels), number)
    elif film:
        shape = (1, config.in_channels, frames * _frames_a_patch(config), side, side)
        latents = _noise(shape, number).movedim(1, 2 if kind in _FRAMES_FIRST else 1)
    else:
        latents = _noise((1, config.in_channels, side, side), number)
    inputs = {"hidden_states": latents.contiguous()}
    # Flux counts time from 0 to 1 and multiplies it itself.
    counts_to_one = bool(accepted & {"img_ids", "img_shapes"})
    inputs["timestep"] = torch.tensor([_TIMES[number] / (1000 if counts_to_one else 1)])
    width = next((value for name in _TEXT_WIDTHS if isinstance(value := _get(config, name), int)), None)
    if "encoder_hidden_states" in accepted and width is not None:
        inputs["encoder_hidden_states"] = _noise((1, _WORDS, width), number + 10)
        if _requires(model, "encoder_attention_mask"):
            inputs["encoder_attention_mask"] = torch.ones(1, _WORDS, dtype=torch.bool)
    if "encoder_hidden_states_image" in accepted and isinstance(seen := _get(config, "image_dim"), int):
        inputs["encoder_hidden_states_image"] = _noise((1, _WORDS, seen), number + 30)
    pooled = _get(config, "pooled_projection_dim")
    if "pooled_projections" in accepted and isinstance(pooled, int):
        inputs["pooled_projections"] = _noise((1, pooled), number + 20)
    if "guidance" in accepted and _get(config, "guidance_embeds"):
        inputs["guidance"] = torch.tensor([3.5])
    return inputs | _places(config, accepted, frames) | _sizes(model, accepted, latents)


_TEXT_WIDTHS: tuple[str, ...] = ("joint_attention_dim", "caption_channels", "text_embed_dim", "text_dim")
_TEXT_WIDTHS += ("cap_feat_dim", "cross_attention_dim")
"""Names in configurations for the width of the text's hidden states; where there are several, the first is."""

_PLACES = frozenset(("img_ids", "img_shapes", "num_frames"))
"""Arguments that say where in the picture the patches are that the latents come as."""

_FRAMES_FIRST = ("CogVideoXTransformer3DModel",)
"""Classes that take (1, frames, channels, side, side)."""


def _places(config: Any, accepted: set[str], frames: int) -> dict[str, Tensor]:
    """Of each patch, as Flux, Qwen-Image and LTX-Video are told them."""
    inputs = {}
    if "img_ids" in accepted:
        rows = torch.arange(_SIDE * _SIDE)
        axes = len(_get(config, "axes_dims_rope") or (0, 0, 0))
        inputs["img_ids"], inputs["txt_ids"] = torch.zeros(len(rows), axes), torch.zeros(_WORDS, axes)
        inputs["img_ids"][:, 1], inputs["img_ids"][:, 2] = rows // _SIDE, rows % _SIDE
    elif "img_shapes" in accepted:
        inputs["img_shapes:"] = torch.tensor([[[frames, _SIDE, _SIDE]]])
    elif "num_frames" in accepted:
        sizes = zip(("num_frames", "height", "width"), (frames, _SIDE, _SIDE), strict=True)
        inputs |= {f"{name}:": torch.tensor(size) for name, size in sizes}
    return inputs


def _sizes(model: Any, accepted: set[str], latents: Tensor) -> dict[str, Tensor]:
    """Sizes in pixels, which PixArt and CogView 4 are told, and the rotations that CogVideoX leaves to its caller."""
    config = model.config
    if getattr(model, "use_additional_conditions", None) and "added_cond_kwargs" in accepted:
        sizes = {"resolution": torch.tensor([[1024.0, 768.0]]), "aspect_ratio": torch.tensor([[4 / 3]])}
        return {f"added_cond_kwargs.{name}": value for name, value in sizes.items()}
    if "crop_coords" in accepted:
        sizes = {"original_size": torch.tensor([[1024.0, 768.0]]), "target_size": torch.tensor([[1024.0, 1024.0]])}
        return sizes | {"crop_coords": torch.tensor([[0.0, 32.0]])}
    if "image_rotary_emb" in accepted and _get(config, "use_rotary_positional_embeddings"):
        patches = latents.shape[1] // _frames_a_patch(config) * _SIDE * _SIDE
        angles = torch.outer(torch.arange(patches) / patches, torch.arange(1, config.attention_head_dim + 1))
        return {"image_rotary_emb[]": torch.stack([angles.cos(), angles.sin()])}
    return {}


def _patches_of_a_list(model: Any, number: int) -> dict[str, Tensor]:
    """Z-Image takes a list of films (channels, frames, side, side), and one of texts."""
    config = model.config
    side, frames = _SIDE * max(config.all_patch_size), max(config.all_f_patch_size)
    return {
        "x[]": _noise((1, config.in_channels, frames, side, side), number),
        "t": torch.tensor([1 - _TIMES[number] / 1000]),
        "cap_feats[]": _noise((1, _WORDS, config.cap_feat_dim), number + 10),
    }


def _is_film(config: Any, kind: str) -> bool:
    patch = _get(config, "patch_size")
    return "Transformer3D" in kind or (isinstance(patch, list | tuple) and len(patch) == 3)


def _patch(config: Any) -> int:
    patch = _get(config, "patch_size") or 1
    return int(patch[-1] if isinstance(patch, list | tuple) else patch)


def _frames_a_patch(config: Any) -> int:
    patch = _get(config, "patch_size")
    first = patch[0] if isinstance(patch, list | tuple) and len(patch) == 3 else _get(config, "patch_size_t")
    return int(first or 1)


def _requires(model: Any, name: str) -> bool:
    parameter = inspect.signature(model.forward).parameters.get(name)
    return parameter is not None and parameter.default is inspect.Parameter.empty


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
