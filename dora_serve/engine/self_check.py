"""Whether this model's numbers are the same in the engine's batches as by itself: tried, since no list is complete.

A model may keep a state that is not keys and values by token, count its positions from elsewhere, look ahead, or cut
its own masks. Two rows of unlike length are filled and decode one token together, and the shorter one is compared with
a forward of its own, which is left to count its positions itself; there, another last token may change no earlier one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dora_serve.engine.cache import RowCache
from dora_serve.errors import UnavailableError, in_a_line

_LENGTHS = (5, 3)


def require_batchable(model: Any, config: Any) -> None:
    """Raise UnavailableError, by name, for what is known not to fit and a short trial would not show."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    if "local" in (getattr(config, "attention_layers", None) or ()):
        other.append("local attention with masks of its own")
    if getattr(config, "is_encoder_decoder", False):
        other.append("an encoder")
    if getattr(config, "attention_chunk_size", None):
        other.append("chunked attention")
    if other:
        raise _unavailable(model, f"it has {', '.join(other)}")


def require_same_alone(
    model: Any, forward: Callable[[Tensor, RowCache | None], Tensor], vocabulary: int, device: torch.device
) -> None:
    """Raise UnavailableError where the model cannot be run in rows, or gives other logits than alone.

    forward: tokens (rows, tokens) and a cache, to logits (rows, tokens or none, vocabulary).
    """
    ids = torch.linspace(1, vocabulary - 1, sum(_LENGTHS) + len(_LENGTHS), device=device).long()
    texts = [ids[: _LENGTHS[0] + 1], ids[_LENGTHS[0] + 1 :]]
    try:
        cache = RowCache(len(texts))
        for row, text in enumerate(texts):
            cache.begin_fill(row)
            forward(text[None, :-1], cache)
            cache.end(len(text) - 1)
        cache.begin_step(len(texts), device)
        batched = forward(torch.stack([text[-1:] for text in texts]), cache)[1].float()
        other = texts[1].clone()
        other[-1] = texts[0][-1]
        whole = forward(torch.stack([texts[1], other]), None).float()
        alone = whole[0, -1]
    except Exception as error:  # whatever a model raises that was not written for this
        raise _unavailable(model, f"it cannot be run in rows ({in_a_line(error)})") from error
    if not bool(torch.isfinite(alone).all()):
        raise _unavailable(model, "its logits are not finite")
    allowed = close_enough(model)
    spread = _rms(alone - alone.mean())
    if _rms(batched - alone) > allowed * spread:
        raise _unavailable(model, "its logits in a batch are others than alone")
    if _rms(whole[0, :-1] - whole[1, :-1]) > allowed * spread:
        raise _unavailable(model, "a token changes what comes before it")


def close_enough(model: Any) -> float:
    """How far logits may be from others by rounding alone, over their spread: that moves those of float32 by 1e-6 and
    those of 16 bits by a hundredth. Another position or mask moves them by far more, but by less where the weights are
    as small as those of an untrained model."""
    quantized = getattr(model.config, "quantization_config", None) is not None
    return 1e-4 if model.dtype in (torch.float32, torch.float64) and not quantized else 0.15


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def _unavailable(model: Any, why: str) -> UnavailableError:
    return UnavailableError(
        f"{type(model).__name__} cannot be served by rows: {why}.",
        remedy="Merge the adapter with dora-export and serve the result elsewhere.",
    )
