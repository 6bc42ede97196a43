"""What a user tells a reader that the files do not say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Magnitudes = Literal["norm", "norm-scale"]


@dataclass(frozen=True)
class ReadOptions:
    """What a user allows a reader to do, and tells it.

    allow_pickle: read a `.bin` or `.pt` with `torch.load(weights_only=True)`. ignore_config: keys of the adapter's
    configuration that are known to the user not to change the weights. format: the reader to use, None to look.
    lora_alpha: of a format whose files do not hold it, "rank" for a scale of 1. magnitudes: whether a magnitude is m,
    the norm of a weight, or m / ||V|| already, which TensorRT-LLM writes under the same name. norm_eps: what the
    trainer added to the norm, where the files do not say. allow_missing_magnitudes: take modules without a magnitude
    for plain LoRA where others of their kind have one, and the files do not say which were trained so.
    """

    allow_pickle: bool = False
    ignore_config: frozenset[str] = frozenset()
    format: str | None = None
    lora_alpha: float | Literal["rank"] | None = None
    magnitudes: Magnitudes | None = None
    norm_eps: float | None = None
    allow_missing_magnitudes: bool = False
