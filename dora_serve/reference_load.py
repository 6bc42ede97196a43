"""A base whose values are decoded by the verifier itself (reference_decode.py), as a model of transformers.

transformers could load some of these by their own libraries, on some devices, and only with their kernels' arithmetic;
the unmerged forward is that of the dequantized weights in a dtype that the verifier chooses.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from dora_serve.checkpoint import ShardedCheckpoint
from dora_serve.reference_decode import decoded_range
from dora_serve.safetensors_file import TensorEntry, read_tensor

_STEP = 1 << 22


def from_tensors(model_class: Any, base: ShardedCheckpoint, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' report on its loading. Peak memory: the model in `dtype`, about twice over."""
    config = model_class.config_class.from_pretrained(base.folder)
    for table in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        vars(table).pop("quantization_config", None)
    tensors = {name: _values(entry, dtype) for name, entry in base.tensors.items()}
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    return model, report


def _values(entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    """All of a tensor; what was codes in `dtype`, since it is float32 for a moment only because its scales are."""
    if entry.coding is None:
        return read_tensor(entry)
    values = torch.empty(prod(entry.shape), dtype=dtype)
    for start in range(0, len(values), _STEP):
        stop = min(start + _STEP, len(values))
        values[start:stop] = decoded_range(entry, start, stop)
    return values.view(entry.shape)
