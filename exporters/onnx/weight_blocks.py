"""The weights that a graph serves, a block of output rows at a time.

Nothing is held: external data is a mapped file. A quantized weight is read as the numbers that its codes stand for,
since those are what the graph multiplies with and what a DoRA norm is taken over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dora_serve.errors import CheckpointError
from exporters.onnx.linears import Linear

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

_BLOCK_ELEMENTS = 1 << 22


def weight_blocks(linear: Linear) -> Iterator[tuple[int, Tensor]]:
    """(start, rows) for all output rows: rows (some, in) in float64, exact.

    Raises CheckpointError where the weight's data is not there or too short.
    """
    step = max(1, _BLOCK_ELEMENTS // max(1, linear.in_features))
    if linear.storage == "packed":
        packed = _Packed(linear)
        for start in range(0, linear.out_features, step):
            yield start, torch.from_numpy(packed.rows(start, min(start + step, linear.out_features)))
        return
    stored = array_of(linear.weight)
    for start in range(0, linear.out_features, step):
        stop = min(start + step, linear.out_features)
        block = stored[start:stop] if linear.storage == "out_in" else stored[:, start:stop].T
        yield start, torch.from_numpy(np.ascontiguousarray(block, dtype=np.float64))


def array_of(value: onnx_ir.Value) -> Array:
    """The values of an initializer. Raises CheckpointError where they cannot be read."""
    assert value.const_value is not None
    try:
        return value.const_value.numpy()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The weight {value.name!r} of the graph cannot be read: {error}.",
            remedy="The external data beside the graph is missing or too short: export the base again.",
            tensor=value.name,
        ) from error


class _Packed:
    """A weight as MatMulNBits has it: (out, blocks, bytes) of codes, a scale for each block, and perhaps zero points.

    Source: onnxruntime's ContribOperators.md, com.microsoft.MatMulNBits.
    """

    def __init__(self, linear: Linear) -> None:
        node = linear.nodes[0]
        self._out, self._in = linear.out_features, linear.in_features
        self._bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
        self._size = node.attributes["block_size"].as_int()
        self._blocks = -(-self._in // self._size)
        scales, zeros = node.inputs[2], node.inputs[3] if len(node.inputs) > 3 else None
        assert scales is not None
        self._codes = array_of(linear.weight).reshape(self._out, self._blocks, -1)
        self._scales = array_of(scales).reshape(self._out, self._blocks)
        self._zeros = None if zeros is None else array_of(zeros)

    def rows(self, start: int, stop: int) -> Array:
        count = stop - start
        codes = self._unpack(self._codes[start:stop].reshape(count * self._blocks, -1), self._size)
        values = codes.reshape(count, self._blocks, self._size) - self._zero_points(start, stop)[:, :, None]
        values *= self._scales[start:stop, :, None].astype(np.float64)
        return np.ascontiguousarray(values.reshape(count, -1)[:, : self._in])

    def _zero_points(self, start: int, stop: int) -> Array:
        if self._zeros is None:
            return np.full((stop - start, self._blocks), float(1 << (self._bits - 1)))
        rows = self._zeros.reshape(self._out, -1)[start:stop]
        if rows.dtype != np.uint8 or (self._bits == 8 and rows.shape[1] == self._blocks):
            return rows.astype(np.float64)
        return self._unpack(rows, self._blocks)

    def _unpack(self, packed: Array, count: int) -> Array:
        """(rows, bytes) to the first `count` codes of each row in float64, the lowest bits of a byte first."""
        if self._bits == 8:
            return packed[:, :count].astype(np.float64)
        shifts = np.arange(0, 8, self._bits, dtype=np.uint8)
        codes = (packed[:, :, None] >> shifts) & ((1 << self._bits) - 1)
        return codes.reshape(len(packed), -1)[:, :count].astype(np.float64)
