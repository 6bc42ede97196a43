"""Bayesian-LoRA (arXiv 2406.13046; formats.md 8), which is recognised to be refused.

Its layer is `Q_w(W) + s Q_B(B) diag(Q_E(E)) Q_A(A)` with learned quantizers of the weight, the factors and the
activations. The last of these are no part of any dense weight.
"""

from __future__ import annotations

from pathlib import Path

from dora_serve.adapter import Adapter
from dora_serve.errors import UnmergeableError
from dora_serve.formats.files import find_weights, tensor_names
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.peft import WEIGHTS


def sniff(path: Path) -> bool:
    """Whether factors with learned quantizers lie there."""
    names = tensor_names(find_weights(path, *WEIGHTS, single=True))
    return any("_quantizer" in name for name in names) and any(".lora_E" in name for name in names)


def read(path: Path, options: ReadOptions) -> Adapter:
    """Raises UnmergeableError."""
    raise UnmergeableError(
        "The adapter cannot be merged: Bayesian-LoRA quantizes the activations with learned gates, which no dense "
        "weight equals.",
        remedy="Run it with the code that trained it.",
        path=str(path),
    )
