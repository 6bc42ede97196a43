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
        outputs, norm_scale, offset, rows, last, width, stride, HAS_OFFSET: tl.constexpr, BLOCK: tl.constexpr
    ):
        token = tl.program_id(0)
        row = tl.load(rows + token)
        if row < last:
            column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            inside = column < width
            place = outputs + token.to(tl.int64) * stride + column
            value = tl.load(place, mask=inside).to(tl.float32)
            value = value * tl.load(norm_scale + row * width + column, mask=inside)
            if HAS_OFFSET:
                value = value + tl.load(offset + row * width + column, mask=inside)
            tl.store(place, value.to(outputs.dtype.element_ty), mask=inside)


def scale_rows(outputs: Tensor, norm_scale: Tensor, offset: Tensor | None, rows: Tensor) -> None:
    """outputs (tokens, width), contiguous along the width, in place."""
    tokens, width = outputs.shape
    block = 1024
    grid: Any = (tokens, -(-width // block))
    _scale_rows[grid](
        outputs,
        norm_scale,
        norm_scale if offset is None else offset,
        rows,
        norm_scale.shape[0] - 1,
        width,
        outputs.stride(0),
        HAS_OFFSET=offset is not None,
        BLOCK=block,
    )
