"""The mathematics, as pure functions of tensors.

DoRA (arXiv 2402.09353, equation 5) with a frozen base: `V = W + s B A`, `W' = m * V / ||V||`, the norm taken over each
output row and `s` inside it. Plain LoRA (arXiv 2106.09685) is `W' = V`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_weight(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """`s B A`: lora_a (r, in), lora_b (out, r) -> (out, in)."""
    return (lora_b * scaling) @ lora_a


def row_norms(direction: Tensor) -> Tensor:
    """`||V||` over each output row: (out, in) -> (out,)."""
    norms: Tensor = torch.linalg.vector_norm(direction, dim=1)
    return norms


def norm_scale(magnitude: Tensor, norms: Tensor) -> Tensor:
    """`m / ||V||`: both (out,). A row of zeros with a magnitude of zero stays zero; otherwise it gives inf."""
    return torch.where((norms == 0) & (magnitude == 0), torch.zeros_like(magnitude), magnitude / norms)


def merge_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None) -> Tensor:
    """`W'` of some output rows: weight (out, in), lora_a (r, in), lora_b (out, r), magnitude (out,) or None.

    Row i of the result depends on row i of `weight`, `lora_b` and `magnitude` alone, so any block of rows may be
    merged by itself. Computes in the dtype of its arguments, which are all the same.
    """
    direction = torch.addmm(weight, lora_b * scaling, lora_a)
    if magnitude is None:
        return direction
    return direction.mul_(norm_scale(magnitude, row_norms(direction)).unsqueeze(1))


_EXPLICIT_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_FLOAT32_MANTISSA_BITS = 23


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded to `dtype`, to nearest, ties to even, in one rounding.

    torch casts float64 to a 16-bit float through float32, and so rounds twice: a value just beside the middle of two
    16-bit numbers first becomes the middle, then goes to the even one (1 + 2**-8 + 2**-40 becomes 1.0 in bfloat16).
    Where the float32 value could be such a middle, it is moved one float32 step towards the exact value first.
    """
    if dtype not in _EXPLICIT_MANTISSA_BITS:
        return exact.to(dtype)
    single = exact.to(torch.float32)
    dropped = _FLOAT32_MANTISSA_BITS - _EXPLICIT_MANTISSA_BITS[dtype]
    # A middle has zeros below the first dropped bit; so have the 16-bit numbers themselves, which a step leaves alone.
    suspects = ((single.view(torch.int32) << (33 - dropped)) == 0).nonzero(as_tuple=True)
    if suspects[0].numel():
        near, true = single[suspects], exact[suspects]
        towards = torch.where(true > near, torch.inf, -torch.inf).to(torch.float32)
        single[suspects] = torch.where(near.to(torch.float64) == true, near, torch.nextafter(near, towards))
    return single.to(dtype)
