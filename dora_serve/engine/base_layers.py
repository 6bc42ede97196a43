"""What the engine asks of a base layer: its output without the bias, and its weights as a dense matrix.

A quantized layer answers with the weights that it actually serves, since a DoRA norm is taken over those.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dora_serve.module_names import is_conv1d


def is_supported(module: nn.Module) -> bool:
    """Whether adapters can be put on this kind of layer."""
    kinds = (_is_embedding, is_conv1d, _is_plain_linear, _is_bnb, _acts_as_linear)
    return any(is_kind(module) for is_kind in kinds)


def dense_matrix(module: Any) -> Tensor:
    """The weight as (out, in), in a floating dtype: a view, or the dequantized copy of a bitsandbytes layer."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return module.weight.detach().T  # type: ignore[no-any-return]
    if _is_bnb(module):
        return _dequantized(module)
    return module.weight.detach()  # type: ignore[no-any-return]


def compute_dtype(module: Any) -> torch.dtype:
    """The dtype in which the layer computes: that of its weights, unless these are codes."""
    if module.weight.is_floating_point():
        return module.weight.dtype  # type: ignore[no-any-return]
    return getattr(module, "compute_dtype", None) or torch.float32


def keep_unpacked(module: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for AVX512-BF16 in a forward on a CPU: `dequantize_4bit` does
    not know them then, and gives something else without a word."""
    if not hasattr(module, "support_avx512bf16_for_cpu"):
        return
    module.support_avx512bf16_for_cpu = False
    weight = module.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


def without_bias(module: Any) -> Callable[[Tensor], Tensor]:
    """The layer's own function, less its bias."""
    if isinstance(module, nn.Embedding):
        return lambda ids: module(ids)
    if is_conv1d(module):
        return lambda x: x @ module.weight
    if _is_plain_linear(module):
        return lambda x: functional.linear(x, module.weight)
    bare = copy.copy(module)  # the same weights, in a table of its own
    bare._parameters = {**module._parameters, "bias": None}
    return lambda x: bare(x)


def lookup(module: nn.Module, table: Tensor) -> Callable[[Tensor], Tensor]:
    """The embedding's own look-up in another table (num, r): a subclass may scale what it finds."""
    other = copy.copy(module)
    other._parameters = {"weight": nn.Parameter(table, requires_grad=False)}
    return lambda ids: type(module).forward(other, ids)


def _is_embedding(module: nn.Module) -> bool:
    """Whether it looks up the ids it is given, and nothing else: some that embed positions take masks as well."""
    return isinstance(module, nn.Embedding) and len(inspect.signature(module.forward).parameters) == 1


def _is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _acts_as_linear(module: nn.Module) -> bool:
    """Whether a Linear with a forward of its own, as Falcon has them, does what a Linear does: it is tried, since
    others round their inputs or hold codes for weights."""
    if not isinstance(module, nn.Linear) or _is_bnb(module) or module.weight.dtype not in _DENSE:
        return False
    wide = torch.promote_types(module.weight.dtype, torch.float32)  # in 16 bits every answer is rounded much
    other = copy.copy(module)
    other._parameters = {
        name: None if one is None else nn.Parameter(one.to(wide), requires_grad=False)
        for name, one in module._parameters.items()
    }
    x = torch.randn((1, 2, module.in_features), generator=torch.Generator().manual_seed(0)).to(other.weight)
    with torch.inference_mode():
        try:
            got, wanted = other(x), functional.linear(x, other.weight, other.bias)
        except Exception:  # whatever a layer raises that is none
            return False
    rounding = 64 * torch.finfo(wide).eps
    alike = isinstance(got, Tensor) and got.shape == wanted.shape  # a router of experts gives several tensors
    return alike and bool((got - wanted).norm() <= rounding * wanted.norm())


_DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _is_bnb(module: nn.Module) -> bool:
    """Whether this is a bitsandbytes layer, told without importing that."""
    kind = type(module)
    return kind.__module__.startswith("bitsandbytes.nn") and kind.__name__ in ("Linear4bit", "Linear8bitLt")


def _dequantized(module: Any) -> Tensor:
    from bitsandbytes import functional as bnb

    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    scales = module.state.SCB if weight.SCB is None else weight.SCB
    return bnb.int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return]
