"""ai-toolkit's DoRA (toolkit/models/DoRA.py; formats.md 6.4): kohya's names or PEFT's, the magnitude as `magnitude`
(out,), and the formula of the paper."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from dora_serve.adapter import PAPER_NORM, Adapter, LazyTensor, Norm
from dora_serve.formats.kohya_names import peek, read_kohya
from dora_serve.formats.options import ReadOptions


def sniff(path: Path) -> bool:
    """Whether a LoRA with kohya's or PEFT's names has magnitudes under this one."""
    leaves, _ = peek(path)
    return "magnitude" in leaves


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a file or a folder with one."""

    def to_norm(module: str, stored: LazyTensor) -> tuple[LazyTensor, Norm]:
        if not stored.shape or prod(stored.shape) != stored.shape[0]:
            raise ValueError(f"{module}: a magnitude {list(stored.shape)}, and ai-toolkit's are [out]")
        return stored.map((prod(stored.shape),), torch.flatten), PAPER_NORM

    return read_kohya(path, options, "ai-toolkit", lambda _: to_norm)
