"""One safetensors file: its header, checked before it is believed, and reads by byte range.

The safetensors library maps whole files, and every page touched counts as resident memory; a streaming merge has to
read with a bounded footprint, so only the header format is shared with it (the format section of its README).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dora_serve.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit: a larger header is hostile or corrupt."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class Coding(Protocol):
    """How values are made of what is stored, where that is codes: one of `dora_serve.quantized.codings`."""

    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: dtype, shape, and [start, stop) in bytes from the start of its file.

    coding: None where the bytes are the values. Else dtype and shape are those of the values, and the bytes are codes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int
    coding: Coding | None = None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked header. `tensors` is in file order."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all tensors, which lie one after the other."""
        return sum(entry.nbytes for entry in self.tensors.values())


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header of a safetensors file.

    Raises CheckpointError for anything the format forbids: no header, a length beyond the file, bytes that are not
    JSON, offsets that overlap, leave holes, run past the end or disagree with the shape, an unknown dtype.
    """
    table, metadata, data_start, size = _read_header(path)
    entries = [_entry(path, name, facts, data_start) for name, facts in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = data_start
    for entry in entries:
        if entry.start != position:
            raise _corrupt(path, f"{entry.name!r} starts at byte {entry.start}", f"byte {position}")
        position = entry.stop
    if position != size:
        kind = "truncated" if position > size else "too long"
        raise _corrupt(path, f"the file is {kind}: {size} bytes", f"{position} bytes, as its header says")
    return SafetensorsFile(path, {entry.name: entry for entry in entries}, metadata)


def peek(path: Path) -> tuple[Collection[str], Mapping[str, str]]:
    """The names of the tensors and the metadata, of which the entries are not checked: a third of the work.

    Raises CheckpointError where there is no header.
    """
    table, metadata, _, _ = _read_header(path)
    return table.keys(), metadata


def _read_header(path: Path) -> tuple[dict[str, object], Mapping[str, str], int, int]:
    """The entries by name, the metadata, where the data begins, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) == 8 and length <= min(MAX_HEADER_BYTES, size - 8):
                header = file.read(length)
            else:
                header = b""
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error.strerror or error}.",
            remedy="Check that the file is there, whole, and that you may read it.",
            path=str(path),
        ) from error
    if len(prefix) < 8:
        raise _corrupt(path, f"it is {size} bytes long", "at least 8 bytes, the length of the header")
    if not header:
        limit = min(MAX_HEADER_BYTES, size - 8)
        raise _corrupt(path, f"its first 8 bytes claim a header of {length} bytes", f"at most {limit}")
    try:
        table = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({error})", "a JSON object") from error
    if not isinstance(table, dict):
        raise _corrupt(path, f"its header is a {type(table).__name__}", "a JSON object")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise _corrupt(path, "its metadata is not an object", "an object of strings")
    return table, {str(key): str(value) for key, value in metadata.items()}, 8 + length, size


def _entry(path: Path, name: str, facts: object, data_start: int) -> TensorEntry:
    try:
        assert isinstance(facts, dict)
        dtype_name, shape, (start, stop) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
        whole = all(type(value) is int and value >= 0 for value in (*shape, start, stop))
        assert whole
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, f"the header entry of {name!r} is malformed", "dtype, shape and two offsets") from error
    dtype = DTYPES.get(dtype_name)
    if dtype is None:
        raise _corrupt(path, f"{name!r} has the dtype {dtype_name!r}", f"one of {', '.join(DTYPES)}")
    if prod(shape) * dtype.itemsize != stop - start:
        raise _corrupt(
            path,
            f"{name!r} is {dtype_name} {list(shape)} and lies in {stop - start} bytes",
            f"{prod(shape) * dtype.itemsize} bytes",
        )
    return TensorEntry(name, dtype, shape, path, data_start + start, data_start + stop)


def _corrupt(path: Path, got: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} is not a sound safetensors file: {got}, wanted {wanted}.",
        remedy="The file is corrupt or was not copied whole: fetch or save it again.",
        path=str(path),
        got=got,
        wanted=wanted,
    )


def open_file(path: Path) -> int:
    """A descriptor to read from, for the caller to close. Raises CheckpointError where there is none to be had."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be opened: {error.strerror}.",
            remedy="Check that it is there and that you may read it.",
            path=str(path),
        ) from error


def read_bytes(path: Path, start: int, stop: int) -> bytearray:
    """Bytes [start, stop) of a file. Raises CheckpointError where they cannot be had."""
    buffer = bytearray(stop - start)
    descriptor = open_file(path)
    try:
        fill(descriptor, memoryview(buffer), start, path)
    finally:
        os.close(descriptor)
    return buffer


def fill(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from `offset` of an open file. Raises CheckpointError on a read error or an early end."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(
                f"{str(path)!r} cannot be read at byte {offset + done}: {error.strerror}.",
                remedy="The disk or the network share that holds it fails; copy the file elsewhere and try again.",
                path=str(path),
            ) from error
        if count == 0:
            raise CheckpointError(
                f"{str(path)!r} ended at byte {offset + done}, {len(view) - done} bytes early.",
                remedy="It was changed or truncated while it was read.",
                path=str(path),
            )
        done += count


def read_range(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened tensor, as they are stored."""
    if start >= stop:
        return torch.empty(0, dtype=entry.dtype)
    size = entry.dtype.itemsize
    return torch.frombuffer(
        read_bytes(entry.path, entry.start + start * size, entry.start + stop * size), dtype=entry.dtype
    )


def read_tensor(entry: TensorEntry) -> Tensor:
    """The whole tensor, in a buffer of its own; of codes, the caller must have made values (quantized.decode)."""
    assert entry.coding is None
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(read_bytes(entry.path, entry.start, entry.stop), dtype=entry.dtype).view(entry.shape)


class WholeFile:
    """A small file all of whose tensors are wanted: it is read in one go, when the first of them is.

    Peak memory: the file, for as long as this or a tensor of it is held.
    """

    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file
        self._start = min((entry.start for entry in file.tensors.values()), default=0)

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        buffer = np.empty(self._file.nbytes, dtype=np.uint8)  # a bytearray would be filled with zeros first
        descriptor = open_file(self._file.path)
        try:
            fill(descriptor, buffer.data, self._start, self._file.path)
        finally:
            os.close(descriptor)
        return buffer

    def read(self, entry: TensorEntry) -> Tensor:
        """As `read_tensor`."""
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        offset = entry.start - self._start
        if offset % entry.dtype.itemsize:
            own = self._bytes[offset : offset + entry.nbytes].copy()
            return torch.frombuffer(own, dtype=entry.dtype).view(entry.shape)
        count = prod(entry.shape)
        return torch.frombuffer(self._bytes, dtype=entry.dtype, count=count, offset=offset).view(entry.shape)

    def is_finite(self) -> bool:
        """Whether a glance shows that no value is NaN or infinite: all are of one dtype, and their sum is finite."""
        dtypes = {entry.dtype for entry in self._file.tensors.values() if entry.nbytes}
        if len(dtypes) != 1 or not (dtype := dtypes.pop()).is_floating_point or dtype.itemsize == 1:
            return False
        wide = torch.promote_types(dtype, torch.float32)
        return math.isfinite(torch.frombuffer(self._bytes, dtype=dtype).sum(dtype=wide).item())


PAGE_BYTES = 4096

METADATA_ROOM = 4096
"""Spaces left at the end of a header that is written, so that `replace_metadata` can say more later."""


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str], data_start: int = 0
) -> bytes:
    """The 8-byte length and the JSON header of a file that holds `tensors` one after the other in this order.

    The header is padded with spaces, which the format allows, so that the data starts on a multiple of 8, and as far
    into a page as `data_start` is: what is copied from a file whose data starts there keeps its place in a page, so
    that the kernel can copy whole pages, or share them where the file system does.
    """
    entries: dict[str, object] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        stop = position + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    header = _dump(entries, metadata) + b" " * METADATA_ROOM
    header += b" " * ((data_start // 8 * 8 - 8 - len(header)) % PAGE_BYTES)
    return len(header).to_bytes(8, "little") + header


def replace_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Write other metadata into a file that `encode_header` began, at most METADATA_ROOM bytes longer."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
        table.pop("__metadata__", None)
        header = _dump(table, metadata)
        assert len(header) <= length, "the new metadata does not fit where the old one was"
        file.seek(8)
        file.write(header.ljust(length, b" "))


def _dump(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    table = {"__metadata__": dict(metadata), **entries} if metadata else dict(entries)
    return json.dumps(table, separators=(",", ":")).encode()
