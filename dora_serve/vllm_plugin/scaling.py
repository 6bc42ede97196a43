"""`y = norm_scale * (W x + s B A x) + bias` for a batch whose tokens belong to adapters in different slots.

What vLLM has computed is `u = W x + s B A x + bias`, so that `y = norm_scale * u + (1 - norm_scale) * bias`. Each
adapted layer keeps both factors in two static buffers with a row for each slot, and for a plain LoRA, an empty slot
and the base they are 1 and 0: such a token comes out as it went in, bit for bit.

Safe for CUDA graphs and torch.compile by the construction of vLLM's own LoRA kernels: one custom operator, which
writes into its argument, reads buffers that never move, and looks on the host at `in_use` to see whether it is needed.
A graph that is captured holds what it did then, and vLLM captures with dummy adapters, which count as DoRA, or with
none at all, for batches that have none at all.
"""

# No `from __future__ import annotations`: torch reads the operator's schema off the annotations themselves.

from typing import Any, Optional

import torch
from torch import Tensor


class Batch:
    """Of one punica wrapper, that is of the layers that see the same tokens: what its current batch needs.

    slots: those that hold a DoRA. in_use: whether a token of the batch belongs to one; a tensor (1,) on the host for
    the operator, `any_in_use` for Python that is not compiled.
    """

    def __init__(self) -> None:
        self.slots: set[int] = set()
        self.any_in_use = False
        self.in_use = torch.zeros(1, dtype=torch.bool, device="cpu")

    def update(self, adapters: Any, adapter_in_slot: list[int | None]) -> None:
        """adapters: the id of each token's adapter, 0 for none."""
        ids = {adapter_in_slot[slot] for slot in self.slots} - {None}
        self.any_in_use = not ids.isdisjoint(adapters)
        self.in_use.fill_(self.any_in_use)


class SlotScales:
    """Of one layer with `width` outputs: norm_scale and offset, (slots + 1, width) in float32.

    The last row is that of the base, whose tokens have the slot -1. offset is None where no bias was added yet.
    """

    def __init__(self, slots: int, width: int, device: torch.device, bias: Tensor | None) -> None:
        self.norm_scale = torch.ones(slots + 1, width, dtype=torch.float32, device=device)
        self.offset = None if bias is None else torch.zeros_like(self.norm_scale)
        self._bias = bias

    def reset(self) -> None:
        """No slot has norm scales."""
        self.norm_scale.fill_(1)
        if self.offset is not None:
            self.offset.zero_()

    def set(self, slot: int, norm_scale: Tensor | None) -> None:
        """norm_scale (width,), or None for a module without DoRA."""
        if norm_scale is None:
            self.norm_scale[slot].fill_(1)
        else:
            self.norm_scale[slot].copy_(norm_scale, non_blocking=True)
        if self.offset is not None and self._bias is not None:
            torch.mul(1 - self.norm_scale[slot], self._bias, out=self.offset[slot])


# Both are Optional, not `| None`: torch's schemas know the one form alone.
def scale_rows(
    rows: Tensor,
    norm_scale: Tensor,
    offset: Optional[Tensor],  # noqa: UP045
    slots: Tensor,
    in_use: Tensor,
) -> None:
    """rows (tokens, width) in place; slots (at least tokens,): of each token. In float32, rounded once."""
    if not in_use.item():
        return
    if rows.is_cuda:
        from dora_serve.vllm_plugin import scale_kernel

        if scale_kernel.AVAILABLE:
            scale_kernel.scale_rows(rows, norm_scale, offset, slots)
            return
    chosen = slots[: rows.shape[0]]
    if offset is None:
        torch.mul(rows, norm_scale[chosen], out=rows)
    else:
        torch.addcmul(offset[chosen], rows, norm_scale[chosen], out=rows)


def _does_nothing(
    rows: Tensor,
    norm_scale: Tensor,
    offset: Optional[Tensor],  # noqa: UP045
    slots: Tensor,
    in_use: Tensor,
) -> None:
    return None


LIBRARY = torch.library.Library("dora_serve", "FRAGMENT")
"""Its operators live as long as it does."""


def define_operator(dispatch_key: str) -> None:
    """Define `torch.ops.dora_serve.scale_rows` for a platform (as vLLM defines its own: torch's decorator is slow)."""
    schema = torch.library.infer_schema(scale_rows, mutates_args=["rows"])
    LIBRARY.define("scale_rows" + schema)
    LIBRARY.impl("scale_rows", scale_rows, dispatch_key=dispatch_key)
    LIBRARY._register_fake("scale_rows", _does_nothing)
