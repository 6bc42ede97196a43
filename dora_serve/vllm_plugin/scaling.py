"""`y = norm_scale * (W x + s B A x) + bias` for a batch whose tokens belong to adapters in different slots.

What vLLM has computed is `u = W x + s B A x + bias`, so that `y = norm_scale * u + (1 - norm_scale) * bias`. Each
adapted layer keeps both factors in two static buffers with a row for each slot, and for a plain LoRA, an empty slot
and the base they are 1 and 0: such a token comes out as it went in, bit for bit.

Safe for CUDA graphs and torch.compile by the construction of vLLM's own LoRA kernels: one custom operator, which
writes into its argument, reads buffers that never move, and looks on the host at `row` to see whether it is needed.
A graph that is captured holds what it did then, and vLLM captures with dummy adapters, which count as DoRA, or with
none at all, for batches that have none at all.
"""

# No `from __future__ import annotations`: torch reads the operator's schema off the annotations themselves.

from typing import Any, Optional

import torch
from torch import Tensor

NO_DORA, SEVERAL = -1, -2
"""In `Batch.only`, in place of the row that all tokens have."""


class Batch:
    """Of one punica wrapper, that is of the layers that see the same tokens: what its current batch needs.

    slots: those that hold a DoRA. rows (tokens at most,): the row of each token in `SlotScales`, where the base has
    the last one. only: the row that all tokens have, SEVERAL, or NO_DORA where no token belongs to a DoRA. row: `only`
    in a tensor (1,) on the host, for the operator. any_in_use: whether a token does.
    """

    def __init__(self, token_slots: Tensor) -> None:
        self.slots: set[int] = set()
        self.rows = torch.zeros_like(token_slots)
        self.any_in_use = False
        self.only = NO_DORA
        self.row = torch.full((1,), NO_DORA, device="cpu")

    def update(self, token_slots: Tensor, adapters: Any, adapter_in_slot: list[int | None]) -> None:
        """token_slots: as `rows`, and -1 for the base; adapters: the id of each token's adapter, 0 for none."""
        ids, of_doras = set(adapters), {adapter_in_slot[slot] for slot in self.slots} - {None}
        self.any_in_use = not ids.isdisjoint(of_doras)
        # For every batch: a CUDA graph reads the rows without a look at whether there is a DoRA.
        tokens = len(adapters)
        torch.remainder(token_slots[:tokens], len(adapter_in_slot) + 1, out=self.rows[:tokens])
        self.only = NO_DORA
        if self.any_in_use:
            self.only = SEVERAL if len(ids) > 1 else adapter_in_slot.index(*ids)
        self.row.fill_(self.only)


class SlotScales:
    """Of one layer with `width` outputs: norm_scale and offset, (slots + 1, width) in float32.

    The last row is that of the base. offset is None where no bias was added yet. slots: those that need a look at
    their row, so that a layer which no DoRA adapts is left alone.
    """

    def __init__(self, slots: int, width: int, device: torch.device, bias: Tensor | None) -> None:
        self.norm_scale = torch.ones(slots + 1, width, dtype=torch.float32, device=device)
        self.offset = None if bias is None else torch.zeros_like(self.norm_scale)
        self.slots: set[int] = set()
        self._bias = bias

    def reset(self) -> None:
        """No slot has norm scales."""
        self.slots.clear()
        self.norm_scale.fill_(1)
        if self.offset is not None:
            self.offset.zero_()

    def set(self, slot: int, norm_scale: Tensor | None) -> None:
        """norm_scale (width,), or None for a module without DoRA."""
        if norm_scale is None:
            self.slots.discard(slot)
            self.norm_scale[slot].fill_(1)
        else:
            self.slots.add(slot)
            self.norm_scale[slot].copy_(norm_scale, non_blocking=True)
        if self.offset is not None and self._bias is not None:
            torch.mul(1 - self.norm_scale[slot], self._bias, out=self.offset[slot])


def scale_output(layer: Any, output: Tensor) -> Tensor:
    """What a layer of vLLM's answers, in place: output (..., width)."""
    batch, scales = layer.punica_wrapper.dora, layer.slot_scales
    if torch.compiler.is_compiling():  # Python is not looked at again: the operator looks for itself
        flat = output.view(-1, output.shape[-1])
        torch.ops.dora_serve.scale_rows(flat, scales.norm_scale, scales.offset, batch.rows, batch.row)
    elif batch.any_in_use and scales.slots:
        flat = output if output.ndim == 2 else output.view(-1, output.shape[-1])
        scale_some_rows(flat, scales.norm_scale, scales.offset, batch.rows, batch.only)
    return output


def scaled_requests(layer: Any, output: Tensor) -> Tensor:
    """The same of a layer whose rows are those of requests, and not of tokens: output (requests, at most width)."""
    batch, scales = layer.punica_wrapper.dora, layer.slot_scales
    if not (batch.any_in_use and scales.slots):
        return output
    rows, width = layer.punica_wrapper.sampler_indices, output.shape[1]
    scaled: Tensor = output * scales.norm_scale[rows, :width]
    if scales.offset is not None:
        scaled += scales.offset[rows, :width]
    return scaled.to(output.dtype)


# Both are Optional, not `| None`: torch's schemas know the one form alone.
def scale_rows(
    outputs: Tensor,
    norm_scale: Tensor,
    offset: Optional[Tensor],  # noqa: UP045
    rows: Tensor,
    row: Tensor,
) -> None:
    """outputs (tokens, width) in place; rows (at least tokens,) and row: of `Batch`. In float32, rounded once."""
    only = int(row)
    if only != NO_DORA:
        scale_some_rows(outputs, norm_scale, offset, rows, only)


def scale_some_rows(outputs: Tensor, norm_scale: Tensor, offset: Tensor | None, rows: Tensor, only: int) -> None:
    """As `scale_rows`, where some token belongs to a DoRA. On a CPU it is the calls that cost in a decoding step."""
    tokens, width = outputs.shape
    if not outputs.is_cpu:
        from dora_serve.vllm_plugin import scale_kernel

        if outputs.is_cuda and scale_kernel.AVAILABLE:
            scale_kernel.scale_rows(outputs, norm_scale, offset, rows)
        else:  # `only` is not looked at: a graph that is captured holds for other rows as well
            _scale(outputs, norm_scale, offset, rows[:tokens])
        return
    chosen: Tensor | None = rows
    if only != SEVERAL:
        norm_scale, chosen = norm_scale[only], None
        offset = None if offset is None else offset[only]
    # In blocks: torch takes the memory for the widened numbers from the system and gives it back, which is dear where
    # it is large.
    step = max(1, _BLOCK_ELEMENTS // width)
    if tokens <= step:
        _scale(outputs, norm_scale, offset, None if chosen is None else chosen[:tokens])
        return
    for start in range(0, tokens, step):
        block = outputs[start : start + step]
        _scale(block, norm_scale, offset, None if chosen is None else chosen[start : start + len(block)])


_BLOCK_ELEMENTS = 1 << 16


def _scale(outputs: Tensor, scales: Tensor, offsets: Tensor | None, rows: Tensor | None) -> None:
    """scales, offsets: (slots + 1, width), of which each token has one of `rows`; or (width,) for all tokens."""
    if rows is not None:
        scales = scales.index_select(0, rows)  # a third of what indexing with brackets costs
        offsets = None if offsets is None else offsets.index_select(0, rows)
    if offsets is not None:
        torch.addcmul(offsets, outputs, scales, out=outputs)
    elif outputs.dtype == torch.float32:
        outputs.mul_(scales)
    else:  # by hand what an operation on two dtypes does as well, in half as much time again on a CPU
        outputs.copy_(outputs.float().mul_(scales))


def _does_nothing(
    outputs: Tensor,
    norm_scale: Tensor,
    offset: Optional[Tensor],  # noqa: UP045
    rows: Tensor,
    row: Tensor,
) -> None:
    return None


LIBRARY = torch.library.Library("dora_serve", "FRAGMENT")
"""Its operators live as long as it does."""


def define_operator(dispatch_key: str) -> None:
    """Define `torch.ops.dora_serve.scale_rows` for a platform (as vLLM defines its own: torch's decorator is slow)."""
    schema = torch.library.infer_schema(scale_rows, mutates_args=["outputs"])
    LIBRARY.define("scale_rows" + schema)
    LIBRARY.impl("scale_rows", scale_rows, dispatch_key=dispatch_key)
    LIBRARY._register_fake("scale_rows", _does_nothing)
