"""compressed-tensors' float4: NVFP4 with a float8 scale for 16 columns and one for the tensor, MXFP4 with a power of
two for 32 (compressed_tensors 0.20: compressors/nvfp4 and compressors/mxfp4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch

from dora_serve.quantized.codings import Float4Groups
from dora_serve.quantized.unsound import unsound
from dora_serve.safetensors_file import TensorEntry

_unsound = partial(unsound, "layer of compressed-tensors")


@dataclass(frozen=True)
class _Kind:
    """group: columns that share a scale; dtype: of the scales; divided: whether these are over one for the tensor."""

    group: int
    dtype: torch.dtype
    divided: bool


_KINDS: Mapping[str, _Kind] = {
    "NVFP4": _Kind(16, torch.float8_e4m3fn, divided=True),
    "MXFP4": _Kind(32, torch.uint8, divided=False),
}


def float4_weight(
    tensors: Mapping[str, TensorEntry], module: str, codes: TensorEntry, schemes: list[Mapping[str, Any]]
) -> TensorEntry:
    """The weight of a layer whose codes are bytes. schemes: what config.json says of the weights, by group of layers.

    Values are in bfloat16, as the library's. Raises CheckpointError where a part is missing or does not fit.
    """
    scales, divisor = tensors.get(f"{module}.weight_scale"), tensors.get(f"{module}.weight_global_scale")
    if scales is None:
        raise _unsound(module, codes, "no weight_scale", "one beside its codes")
    name = next((name for name, kind in _KINDS.items() if kind.dtype == scales.dtype), None)
    if name is None:
        raise _unsound(module, codes, f"scales of {scales.dtype}", "float8_e4m3fn (NVFP4) or uint8 (MXFP4)")
    kind = _KINDS[name]
    if len(codes.shape) != 2 or 0 in codes.shape or codes.shape[1] * 2 % kind.group:
        raise _unsound(module, codes, f"codes {list(codes.shape)}", f"a matrix of whole groups of {kind.group}")
    rows, columns = codes.shape[0], codes.shape[1] * 2
    if scales.shape != (rows, columns // kind.group):
        raise _unsound(module, codes, f"scales {list(scales.shape)}", f"[{rows}, {columns // kind.group}] for {name}")
    if (divisor is not None) != kind.divided:
        wanted = "one, as NVFP4 has" if kind.divided else f"none, as {name} has"
        raise _unsound(module, codes, f"{'no' if divisor is None else 'a'} weight_global_scale", wanted)
    if divisor is not None and (divisor.dtype != torch.float32 or prod(divisor.shape) != 1):
        raise _unsound(module, codes, f"weight_global_scale {list(divisor.shape)} {divisor.dtype}", "one float32")
    said = [scheme for scheme in schemes if (scheme.get("num_bits"), scheme.get("type")) == (4, "float")]
    if not any(scheme.get("group_size") == kind.group for scheme in said):
        groups = ", ".join(str(scheme.get("group_size")) for scheme in said) or "no float4"
        raise _unsound(module, codes, f"{name} codes, and {groups} in config.json", f"groups of {kind.group}")
    if any(scheme.get("symmetric") is False for scheme in said) or f"{module}.weight_zero_point" in tensors:
        raise _unsound(module, codes, "float4 with zero points", "symmetric codes: the library leaves the others out")
    coding = Float4Groups(codes, scales, divisor, kind.group)
    return replace(codes, name=f"{module}.weight", dtype=torch.bfloat16, shape=(rows, columns), coding=coding)
