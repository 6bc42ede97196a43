"""Inputs with a picture in them, for language models that see: without one, nothing of the vision tower would run.

A processor would need the packages that read and resize pictures; here the pixels are seeded noise in the shape that
the vision tower takes, and the model itself says for how many placeholder tokens they stand.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_SEED = 2402_09353
_PLACEHOLDER = ("image_token_id", "image_token_index")
_GRID = 2
"""Merged patches along each side of a picture for models that take pictures of any size (Qwen-VL's family)."""


def picture_inputs(model: Any, words: list[int], number: int) -> dict[str, Tensor] | None:
    """One picture, numbered for its seed, and `words` after it, as keyword arguments of `model.forward`.

    None for a model that takes no pictures among its tokens, or whose pictures cannot be made up from its
    configuration alone.
    """
    placeholder = next((value for name in _PLACEHOLDER if isinstance(value := _get(model.config, name), int)), None)
    features = getattr(model, "get_image_features", None)
    accepted = set(inspect.signature(model.forward).parameters)
    if placeholder is None or "pixel_values" not in accepted:
        return None
    if "cross_attention_mask" in accepted:
        return _attended(model, placeholder, words, number)
    if features is None:
        return None
    for pixels in _candidates(model.config, number, accepted):
        try:
            moved = {
                name: value.to(device=model.device, dtype=model.dtype if value.is_floating_point() else None)
                for name, value in pixels.items()
            }
            tokens = _token_count(features(**moved), _get(model.config.get_text_config(), "hidden_size"))
            inputs = _with_words(model, pixels, placeholder, tokens, words, accepted)
            model(**{name: moved.get(name, value.to(model.device)) for name, value in inputs.items()})
        except Exception:  # whatever a model raises for pixels of a shape that is not its own
            continue
        return inputs
    return None


def _attended(model: Any, placeholder: int, words: list[int], number: int) -> dict[str, Tensor] | None:
    """Of Mllama, whose words attend to the tiles of a picture, for which one token stands: here all to one tile."""
    vision = _get(model.config, "vision_config")
    tiles, size, channels = (_get(vision, name) for name in ("max_num_tiles", "image_size", "num_channels"))
    if not all(isinstance(value, int) for value in (tiles, size, channels)):
        return None
    ids = torch.tensor([[words[0], placeholder, *words[1:]]])
    first = torch.zeros(1, 1, tiles, dtype=torch.long)
    first[..., 0] = 1
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _noise((1, 1, tiles, channels, size, size), number),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": first,
        "cross_attention_mask": first.unsqueeze(1).expand(1, ids.shape[1], 1, tiles).contiguous(),
    }
    try:
        model(
            **{
                name: value.to(device=model.device, dtype=model.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
            }
        )
    except Exception:  # as above
        return None
    return inputs


def _get(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _candidates(config: Any, number: int, accepted: set[str]) -> Iterator[dict[str, Tensor]]:
    """The shapes that vision towers take, in turn: patches with their grid, one picture, a list of tiles."""
    vision = _get(config, "vision_config")
    if vision is None:
        return
    channels = next((value for name in ("num_channels", "in_channels", "in_chans") if (value := _get(vision, name))), 3)
    patch = _get(vision, "patch_size")
    if "image_grid_thw" in accepted and isinstance(patch, int):
        side = _GRID * int(_get(vision, "spatial_merge_size") or 1)
        width = channels * int(_get(vision, "temporal_patch_size") or 1) * patch * patch
        grid = torch.tensor([[1, side, side]])
        yield {"pixel_values": _noise((side * side, width), number), "image_grid_thw": grid}
    size = _get(vision, "image_size")
    if size is None:
        return
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    picture = _noise((1, channels, height, width), number)
    yield {"pixel_values": picture}
    if "image_sizes" in accepted:
        yield {"pixel_values": picture, "image_sizes": torch.tensor([[height, width]])}
    yield {"pixel_values": picture[None]}


def _token_count(features: Any, width: int) -> int:
    """How many tokens of `width` numbers the features of the pictures are."""
    found = getattr(features, "pooler_output", features)
    return int(sum(one.numel() for one in (found if isinstance(found, list | tuple) else [found])) // width)


def _with_words(
    model: Any, pixels: Mapping[str, Tensor], placeholder: int, tokens: int, words: list[int], accepted: set[str]
) -> dict[str, Tensor]:
    start, end = (_get(model.config, f"vision_{side}_token_id") for side in ("start", "end"))
    before = [one for one in (words[0], start) if isinstance(one, int)]
    after = [one for one in (end, *words[1:]) if isinstance(one, int)]
    ids = torch.tensor([[*before, *[placeholder] * tokens, *after]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in accepted:
            inputs[name] = (ids == placeholder).int()
    return inputs


def _noise(shape: tuple[int, ...], number: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED + number))
