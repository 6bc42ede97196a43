"""Each slot's tensors against the layer that torch runs unmerged: an adapter file is judged without its graph.

A graph of codes rounds its inputs too, and that can hide a magnitude that the file has lost; its layers cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dora_serve.module_names import is_conv1d
from dora_serve.onnx_engine.adapters import AdapterFile
from dora_serve.onnx_engine.slots import Slot, SlotTable

_ROWS = 8
_FLOAT32_SPACINGS = 256
"""For a product of some thousand terms in float32, summed in another order. A lost magnitude is 1e-3 and more."""

_SLOT_SPACINGS = 4
"""For lora_A, lora_B and norm_scale, each rounded once to the dtype of the slots."""


def differing_slots(model: nn.Module, table: SlotTable, file: AdapterFile) -> tuple[int, tuple[str, ...]]:
    """How many slots were compared, and the modules where the file does another thing than `model`.

    model: in float32, with the weights that the graph serves and the adapter attached (`attach_adapter`). Compared are
    layers that have a forward of their own and the plain kinds of base; others only the whole graph's answers judge.
    """
    modules = dict(model.named_modules())
    eps = float(np.finfo(np.float32).eps)
    allowed = _FLOAT32_SPACINGS * eps + _SLOT_SPACINGS * torch.finfo(getattr(torch, table.dtype)).eps
    compared, differing = 0, []
    for slot in table.slots.values():
        module = modules.get(slot.module)
        if module is None or "forward" not in vars(module) or not _is_plain(module):
            continue
        compared += 1
        wanted, got = _answers(module, slot, file.tensors)
        if not float((got - wanted).norm()) <= allowed * float(wanted.norm()):
            differing.append(slot.module)
    return compared, tuple(differing)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Embedding) or is_conv1d(module)


def _answers(module: Any, slot: Slot, tensors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What the adapted module gives, and what the slot would, without the bias: (rows, out) each, in float64."""
    device, dtype = module.weight.device, module.weight.dtype
    generator = torch.Generator().manual_seed(0)
    bias = getattr(module, "bias", None)
    if slot.kind == "embedding":
        ids = torch.randint(slot.in_features, (_ROWS,), generator=generator).to(device)
        wanted, base = module(ids), functional.embedding(ids, module.weight)
    else:
        x = torch.randn(_ROWS, slot.in_features, generator=generator).to(device, dtype)
        wanted = module(x) if bias is None else module(x) - bias
        base = x @ module.weight if is_conv1d(module) else x @ module.weight.T
    got = base.double()
    if slot.lora_A in tensors:
        lora_a, lora_b, scale = (
            torch.from_numpy(np.asarray(tensors[name], dtype=np.float32)).double().to(device)
            for name in (slot.lora_A, slot.lora_B, slot.norm_scale)
        )
        low_rank = lora_a[ids] if slot.kind == "embedding" else x.double() @ lora_a
        got = scale * got + low_rank @ lora_b
    return wanted.double(), got
