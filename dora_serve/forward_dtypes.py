"""The dtypes that a forward check runs a model in, known from its configuration and its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from dora_serve.quantized.view import compute_dtype

_NARROW = (torch.bfloat16, torch.float16)
_RUNNABLE = (torch.float64, torch.float32, *_NARROW)


def deployed_dtype(config: Mapping[str, object], tensors: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The dtype that from_pretrained takes by itself: the configuration's, else that of most of the weights.

    tensors: dtype and bytes of each.
    """
    said = compute_dtype(config)
    if said is not None:
        return said
    sizes = Counter(dict.fromkeys(_RUNNABLE, 0))
    for stored, nbytes in tensors:
        sizes[stored] += nbytes
    return max(_RUNNABLE, key=lambda dtype: sizes[dtype])


def is_narrow(deployed: torch.dtype) -> bool:
    """Whether computing in it rounds so coarsely that it is measured itself."""
    return deployed in _NARROW


def wide_dtype(deployed: torch.dtype) -> torch.dtype:
    """What the unmerged model is run in to be measured by."""
    return torch.float32 if is_narrow(deployed) else torch.float64
