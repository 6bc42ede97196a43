"""ONNX Runtime's adapter file, read with every length held against the bytes that are there.

ONNX Runtime itself takes shapes as they are said: of a damaged file it would read beyond the end, which ends the
process. So a file is read here before it is given to it.

    file         offset of the root table, "TORT"
    root         format_version, adapter_version, model_version: int32; parameters: tables
    parameter    name: string; dims: int64s; data_type: int32, as ONNX numbers them; raw_data: bytes

Source: onnxruntime/lora/adapter_format/adapter_schema.fbs, and the flatbuffers' own description of their binary format.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

_IDENTIFIER = b"TORT"
_FORMAT_VERSION = 1
_DTYPES = {1: "float32", 10: "float16", 16: "bfloat16"}


class DamagedFile(ValueError):
    """What is wrong with the bytes, as the end of a sentence."""


def read_parameters(path: Path) -> Mapping[str, Array]:
    """The tensors of the file, by name. Raises DamagedFile for what ONNX Runtime could not read safely, OSError."""
    file = _File(np.fromfile(path, dtype=np.uint8))
    root = file.root()
    version = file.number(root, 0)
    if version != _FORMAT_VERSION:
        raise DamagedFile(f"it is of format version {version}, and version {_FORMAT_VERSION} is known here")
    tensors: dict[str, Array] = {}
    start, count = file.vector(root, 3, 4)
    for place in range(start, start + 4 * count, 4):
        table = place + file.unpack("<I", place)
        name = file.text(table, 0)
        if name in tensors:
            raise DamagedFile(f"it has two tensors called {name!r}")
        tensors[name] = file.tensor(table, name)
    return tensors


class _File:
    """The bytes of a flatbuffer. A table is the place where it begins, a field its number in the schema."""

    def __init__(self, data: Array) -> None:
        self._data = data

    def root(self) -> int:
        if not len(self._data):
            raise DamagedFile("it is empty")
        if self._data[4:8].tobytes() != _IDENTIFIER:
            raise DamagedFile("it does not begin as one does")
        return self.unpack("<I", 0)

    def unpack(self, form: str, place: int) -> int:
        self._require(place, struct.calcsize(form))
        return int(struct.unpack_from(form, self._data.data, place)[0])

    def number(self, table: int, field: int) -> int:
        """An int32, 0 where it is left out."""
        place = self._field(table, field)
        return 0 if place is None else self.unpack("<i", place)

    def vector(self, table: int, field: int, width: int) -> tuple[int, int]:
        """Where its elements of `width` bytes begin, and how many there are."""
        place = self._field(table, field)
        if place is None:
            raise DamagedFile("a part of a tensor, or all of them, are left out")
        place += self.unpack("<I", place)
        count = self.unpack("<I", place)
        self._require(place + 4, count * width)
        return place + 4, count

    def text(self, table: int, field: int) -> str:
        start, count = self.vector(table, field, 1)
        try:
            return self._data[start : start + count].tobytes().decode()
        except UnicodeDecodeError as error:
            raise DamagedFile("the name of a tensor is no text") from error

    def tensor(self, table: int, name: str) -> Array:
        """A view of the file's bytes."""
        start, count = self.vector(table, 1, 8)
        dims = [self.unpack("<q", place) for place in range(start, start + 8 * count, 8)]
        number = self.number(table, 2)
        if number not in _DTYPES:
            raise DamagedFile(f"{name!r} is of the type numbered {number}, wanted one of {', '.join(_DTYPES.values())}")
        dtype = _dtype(_DTYPES[number])
        start, count = self.vector(table, 3, 1)
        if min(dims, default=0) < 0 or prod(dims) * dtype.itemsize != count:
            raise DamagedFile(f"{name!r} is said to have the shape {dims} in {dtype}, and has {count} bytes")
        if count and start % dtype.itemsize:
            raise DamagedFile(f"{name!r} does not lie where a tensor may")
        return self._data[start : start + count].view(dtype).reshape(dims)

    def _field(self, table: int, field: int) -> int | None:
        """Where a field of a table is, None where it is left out."""
        layout = table - self.unpack("<i", table)
        size = self.unpack("<H", layout)
        if 4 + 2 * field + 2 > size:
            return None
        offset = self.unpack("<H", layout + 4 + 2 * field)
        return table + offset if offset else None

    def _require(self, place: int, count: int) -> None:
        if not 0 <= place <= len(self._data) - count:
            raise DamagedFile("it ends too early, or a place in it is wrong")


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes  # noqa: F401  (numpy knows the name from then on)
    return np.dtype(name)
