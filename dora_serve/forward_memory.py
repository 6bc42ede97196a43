"""How much memory a forward check takes, and whether there is so much, asked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch

from dora_serve.checkpoint import read_json
from dora_serve.comparison import dtype_name
from dora_serve.forward_dtypes import deployed_dtype, wide_dtype
from dora_serve.memory import available_memory
from dora_serve.plan import MergePlan, TensorPlan
from dora_serve.safetensors_file import TensorEntry

_MODEL = 1.1
"""Of a model in the dtype that it runs in: a parameter is converted while others are there already."""
_POSITIONS = 512
"""Of all prompts together, with what follows them: logits are held for each."""
_LOGITS = 4
"""Tensors of that size at a time: of two models, and what compares them."""
_REST = 600 << 20
"""torch and transformers, activations, an adapter's factors, what the allocator keeps."""


def needed_memory(elements: int, config: Mapping[str, object], dtype: torch.dtype, *, logits: int = _LOGITS) -> int:
    """Bytes, about, that a model of so many parameters takes in `dtype`; and `logits` times all prompts' logits."""
    return _REST + int(dtype.itemsize * (_MODEL * elements + logits * _POSITIONS * _classes(config)))


def planned_memory(plan: MergePlan) -> int:
    """Of the forward check of a merge that is yet to be made."""
    config, tensors = read_json(plan.base.folder), plan.tensors.values()
    changes = {path[-1]: value for path, value in plan.config_changes.items() if path[-1] in ("dtype", "torch_dtype")}
    deployed = deployed_dtype({**config, **changes}, ((tensor.dtype, tensor.nbytes) for tensor in tensors))
    elements = max(elements_of(plan.base.tensors.values()), elements_of(tensors))
    return needed_memory(elements, config, wide_dtype(deployed))


def why_not_run(
    models: Iterable[Iterable[TensorEntry]], config: Mapping[str, object], dtype: torch.dtype
) -> str | None:
    """A sentence where the largest of the models, one being loaded after the other, does not fit into this machine's
    memory in `dtype`; None where all do, or the system does not say."""
    available = available_memory()
    if available is None:
        return None
    elements = max(map(elements_of, models), default=0)
    needed = needed_memory(elements, config, dtype)
    if needed <= available:
        return None
    return (
        f"A model of {_count(elements)} parameters in {dtype_name(dtype)} needs about {needed / 1e9:.3g} GB "
        f"of memory, and {available / 1e9:.3g} GB are available here. `dora-export verify` runs the forward on a "
        "machine that has more, or a GPU that does."
    )


def elements_of(tensors: Iterable[TensorEntry] | Iterable[TensorPlan]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors)


def _count(elements: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if elements >= size:
            return f"{elements / size:.3g} {word}"
    return f"{elements:,}"


def _classes(config: Mapping[str, object]) -> int:
    text = config.get("text_config")
    for table in (config, text if isinstance(text, dict) else {}):
        size = table.get("vocab_size")
        if isinstance(size, int):
            return size
    return 0
