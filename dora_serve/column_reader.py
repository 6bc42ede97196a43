"""Columns of a stored matrix, which lie apart on disk: read a stripe at a time, the last of which is kept.

Peak memory: STRIPE_BYTES, or what is asked for where that is more.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from dora_serve.safetensors_file import TensorEntry, fill, open_file

STRIPE_BYTES = 1 << 22


class ColumnReader:
    """Rows and columns of a tensor seen as a matrix of `width` columns, in its stored dtype."""

    def __init__(self, entry: TensorEntry, width: int) -> None:
        self._entry = entry
        self._width = width
        self._kept: tuple[tuple[int, int], int, int, Tensor] | None = None

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """(rows, columns) of these ranges, neither of them empty. Raises CheckpointError where they cannot be read."""
        start, stop = columns
        kept = self._kept
        if kept is None or kept[0] != rows or start < kept[1] or stop > kept[2]:
            fitting = STRIPE_BYTES // ((rows[1] - rows[0]) * self._entry.dtype.itemsize)
            end = min(self._width, max(stop, start + fitting))
            kept = self._kept = (rows, start, end, self._stripe(rows, start, end))
        return kept[3][:, start - kept[1] : stop - kept[1]]

    def _stripe(self, rows: tuple[int, int], start: int, stop: int) -> Tensor:
        entry, size = self._entry, self._entry.dtype.itemsize
        length, step = (stop - start) * size, self._width * size
        buffer = bytearray((rows[1] - rows[0]) * length)
        offset = entry.start + rows[0] * step + start * size
        if length == step:
            length = len(buffer)
        view = memoryview(buffer)
        descriptor = open_file(entry.path)
        try:
            for done in range(0, len(buffer), length):
                fill(descriptor, view[done : done + length], offset, entry.path)
                offset += step
        finally:
            os.close(descriptor)
        return torch.frombuffer(buffer, dtype=entry.dtype).view(-1, stop - start)
