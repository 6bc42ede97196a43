"""Bayesian-LoRA (arXiv 2406.13046; peft/tuners/blora/layer.py of its fork of PEFT; formats.md 8), recognised to be
refused.

Its layer is `o(a(Q_w(W) x) + s c(Q_B(B) b(Q_E(E) Q_A(A) x)))`: Q are learned quantizers of the weight and the factors,
which could be folded, and a, b, c and o are quantizers of the activations, which round what depends on x. No dense W'
has `W' x` equal to that for every x. They cannot be away: the layer's constructor switches them on, and no key of the
configuration (`quantize` is not read) switches them off. Nor does the file say what they round to: their ranges are no
parameters unless learn_scales is set, and are taken anew from the first batch that a loaded model sees.
"""

from __future__ import annotations

from pathlib import Path

from dora_serve.adapter import Adapter
from dora_serve.errors import UnmergeableError
from dora_serve.formats.files import find_weights, peek_config, tensor_names
from dora_serve.formats.options import ReadOptions
from dora_serve.formats.peft import WEIGHTS


def sniff(path: Path) -> bool:
    """Whether the configuration says so, or factors with learned quantizers lie there."""
    if peek_config(path).get("peft_type") == "BLORA":
        return True
    names = tensor_names(find_weights(path, *WEIGHTS, single=True))
    return any("_quantizer" in name for name in names) and any(".lora_" in name for name in names)


def read(path: Path, options: ReadOptions) -> Adapter:
    """Raises UnmergeableError."""
    raise UnmergeableError(
        "The adapter cannot be merged: Bayesian-LoRA rounds the activations of every layer that it adapts, before and "
        "after the update is added, to steps that its file does not hold. No dense weight does that.",
        remedy="Run it with the code that trained it.",
        path=str(path),
    )
