"""AutoRound's own layers in torch for GPTQ's two formats, which pack codes and compute with them on a CPU.

Its package imports datasets and more as it is imported, of which these layers need nothing: it is installed without
its dependencies, and the two modules are loaded by themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn


def _load() -> tuple[Any, Any]:
    spec = importlib.util.find_spec("auto_round")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package, utils = ModuleType("auto_round"), ModuleType("auto_round.utils")
    package.__path__ = list(spec.submodule_search_locations)
    utils.__path__ = [f"{place}/utils" for place in package.__path__]
    utils.get_packing_device = lambda _: torch.device("cpu")  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {"auto_round": package, "auto_round.utils": utils}):
        names = ("qlinear_torch_zp", "qlinear_torch")
        one, other = (importlib.import_module(f"auto_round_extension.torch.{name}") for name in names)
    return one.QuantLinear, other.QuantLinear


V1, V2 = _load()
"""Zero points stored less one, and as they are."""


def quantized(
    weight: Tensor, bits: int, group_size: int, *, symmetric: bool, less_one: bool, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Any]:
    """A weight (out, in) as the layer packs it, rounded to nearest, and the layer.

    Returns its buffers by name, with a `g_idx`; the scales are cast to `dtype` after the packing.
    """
    outputs, inputs = weight.shape
    groups = weight.float().unflatten(1, (-1, inputs if group_size == -1 else group_size))
    largest = 2**bits - 1
    if symmetric:
        scales = groups.abs().amax(-1) * 2 / largest
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        scales = (high - low) / largest
        zeros = torch.round(-low / scales).clamp(1 if less_one else 0, largest)
    layer = (V1 if less_one else V2)(bits, group_size, inputs, outputs, bias=False, g_idx=True)
    layer.device = torch.device("cpu")  # which packing zeros of 2, 4 or 8 bits asks for
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = weight.float()
    layer.pack(linear, scales, zeros)
    layer.scales = layer.scales.to(dtype)
    return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}, layer


def values(layer: Any) -> Tensor:
    """(out, in): what the layer multiplies with, by its answers to unit vectors; the sums have one term each.

    Asked for as many outputs at a time as there are inputs: with a `g_idx` the layer takes no more for columns.
    """
    inputs, bits = layer.infeatures, layer.bits
    words, zeros, scales = layer.qweight, layer.qzeros, layer.scales
    answers = []
    for start in range(0, words.shape[1], inputs):
        stop = min(start + inputs, words.shape[1])
        layer.qweight, layer.scales = words[:, start:stop], scales[:, start:stop]
        layer.qzeros = zeros[:, start // 32 * bits : stop // 32 * bits]
        layer.outfeatures = stop - start
        with torch.no_grad():
            answers.append(layer(torch.eye(inputs)))
    return torch.cat(answers, dim=1).T.to(scales.dtype).contiguous()
