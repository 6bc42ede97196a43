"""Whether this machine has the memory for a comparison in float32, asked before it is begun."""

from __future__ import annotations

from math import prod
from pathlib import Path

from dora_serve.checkpoint import open_checkpoint
from dora_serve.memory import available_memory

# Of torch's model in float32: the embedding goes through float64, and activations and logits come on top.
_TORCH = 1.2
# Of the data file: ONNX Runtime reads it, and packs matrices anew while it does.
_RUNTIME = 1.3


def needed_memory(elements: int, data_bytes: int) -> int:
    """Bytes, about: torch's model of so many parameters, or the graphs in ONNX Runtime after it, whichever is more."""
    return int(max(_TORCH * 4 * elements, _RUNTIME * data_bytes))


def why_not_run(model_folder: Path, onnx_folder: Path) -> str | None:
    """A sentence where either side needs more memory than there is, None where both fit one after the other."""
    available = available_memory()
    if available is None:
        return None
    elements = sum(prod(entry.shape) for entry in open_checkpoint(model_folder).tensors.values())
    needed = needed_memory(elements, sum(path.stat().st_size for path in onnx_folder.glob("*.data")))
    if needed <= available:
        return None
    return (
        f"Comparing the graphs' results needs about {needed / 1e9:.3g} GB of memory and {available / 1e9:.3g} GB are "
        "available, so neither torch nor ONNX Runtime was run: the weights and the structure were compared."
    )
