"""`scaling.scale_rows` as one Triton kernel: nothing is allocated, and a token of the base costs one load."""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = True

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _scale_rows(  # type: ignore[no-untyped-def]
        rows, norm_scale, offset, slots, last, width, stride, HAS_OFFSET: tl.constexpr, BLOCK: tl.constexpr
    ):
        token = tl.program_id(0)
        slot = tl.load(slots + token)
        # The rows that pad a batch to the size of a captured graph have whatever slot was there before.
        if (slot >= 0) & (slot < last):
            column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            inside = column < width
            place = rows + token.to(tl.int64) * stride + column
            value = tl.load(place, mask=inside).to(tl.float32)
            value = value * tl.load(norm_scale + slot * width + column, mask=inside)
            if HAS_OFFSET:
                value = value + tl.load(offset + slot * width + column, mask=inside)
            tl.store(place, value.to(rows.dtype.element_ty), mask=inside)


def scale_rows(rows: Tensor, norm_scale: Tensor, offset: Tensor | None, slots: Tensor) -> None:
    """rows (tokens, width), contiguous along the width, in place."""
    tokens, width = rows.shape
    block = 1024
    grid: Any = (tokens, -(-width // block))
    _scale_rows[grid](
        rows,
        norm_scale,
        norm_scale if offset is None else offset,
        slots,
        norm_scale.shape[0] - 1,
        width,
        rows.stride(0),
        HAS_OFFSET=offset is not None,
        BLOCK=block,
    )
