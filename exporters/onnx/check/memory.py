"""Whether this machine has the memory for a comparison in float32, asked before it is begun."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dora_serve.checkpoint import open_checkpoint, read_json
from dora_serve.forward_memory import elements_of, needed_memory
from dora_serve.memory import available_memory

# Of the data file: ONNX Runtime reads it, and packs matrices anew while it does.
_RUNTIME = 1.3
# Tensors of the size of all prompts' logits: of both sides, in several runs, and what compares them in float64.
_LOGITS = 8
# Tables of a vocabulary in float64, and what the allocator keeps of the merge's own verification before it.
_BESIDE = 512 << 20


def compared_memory(elements: int, data_bytes: int, config: Mapping[str, object]) -> int:
    """Bytes that are enough: for torch's model in float32, or for the graphs in ONNX Runtime after it, whichever takes
    more, and the logits of both. SmolLM2-135M takes 2.46 GB, where this is 2.67."""
    torch_bytes = needed_memory(elements, config, torch.float32, logits=_LOGITS)
    beside = needed_memory(0, config, torch.float32, logits=_LOGITS)
    return _BESIDE + max(torch_bytes, beside + int(_RUNTIME * data_bytes))


def why_not_run(model_folder: Path, onnx_folder: Path) -> str | None:
    """A sentence where either side needs more memory than there is, None where both fit one after the other."""
    available = available_memory()
    if available is None:
        return None
    elements = elements_of(open_checkpoint(model_folder).tensors.values())
    data = sum(path.stat().st_size for path in onnx_folder.glob("*.data"))
    needed = compared_memory(elements, data, read_json(model_folder))
    if needed <= available:
        return None
    return (
        f"Comparing the graphs' results needs about {needed / 1e9:.3g} GB of memory and {available / 1e9:.3g} GB are "
        "available, so neither torch nor ONNX Runtime was run: the weights and the structure were compared."
    )
