"""The weights into the data file, one parameter at a time and in pieces: no model is in memory, whatever its size."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.errors import OutputError, UnavailableError
from dora_serve.output import require_space
from exporters.onnx.quantizing import quantize_rows
from exporters.onnx.skeleton import DATA_FILE, Place, Skeleton
from exporters.onnx.stored import StoredWeights

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
}
_PIECE_ELEMENTS = 1 << 23


def write_data(
    skeleton: Skeleton, weights: StoredWeights, folder: Path, on_bytes: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Write `folder/model.onnx.data`. on_bytes: is told how many of how many bytes are written.

    Peak memory: one parameter in its stored dtype and some pieces. Raises UnavailableError where a value does not fit
    the graph's dtype, OutputError where the file cannot be written.
    """
    require_space(folder, skeleton.nbytes)
    by_parameter: dict[str, list[Place]] = defaultdict(list)
    for place in skeleton.places:
        by_parameter[place.form.parameter].append(place)
    written = 0
    try:
        with (folder / DATA_FILE).open("wb") as file:
            os.ftruncate(file.fileno(), skeleton.nbytes)
            for parameter, places in by_parameter.items():
                tensor = weights.read(parameter)
                for place in places:
                    offset = place.offset
                    for piece in _pieces(tensor, place):
                        _write(file.fileno(), piece, offset)
                        offset += piece.nbytes
                    assert offset == place.offset + place.nbytes, f"{place.name} is of another size"
                    written += place.nbytes
                    on_bytes(written, skeleton.nbytes)
    except OSError as error:
        raise OutputError(
            f"The ONNX weights cannot be written to {str(folder)!r}: {error.strerror or error}.",
            remedy="Free some space, or give a place on another disk with -o.",
            folder=str(folder),
        ) from error


def _pieces(tensor: Tensor, place: Place) -> Iterator[Tensor]:
    """The bytes of a place, in order, as contiguous tensors."""
    form, dtype = place.form, TORCH_DTYPES[place.dtype]
    turned = tensor.mT if form.transposed else tensor
    if turned.ndim > 2:  # a stack: one matrix after the other
        for one in turned:
            yield from _matrix_pieces(one, place, dtype)
    else:
        yield from _matrix_pieces(turned, place, dtype)


def _matrix_pieces(matrix: Tensor, place: Place, dtype: torch.dtype) -> Iterator[Tensor]:
    if matrix.ndim > 2:
        for one in matrix:
            yield from _matrix_pieces(one, place, dtype)
        return
    rows = matrix.reshape(1, -1) if matrix.ndim < 2 else matrix
    step = max(1, _PIECE_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        if place.form.bits is None:
            yield _cast(piece, dtype, place.name)
        else:
            values, scales = quantize_rows(piece.float(), place.form.bits)
            yield values if place.form.part == "values" else _cast(scales, dtype, place.name)


def _cast(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = piece.to(dtype).contiguous()
    if dtype == torch.float16 and bool((cast.isinf() & piece.isfinite()).any()):
        raise UnavailableError(
            f"{name} holds {float(piece.abs().max()):.3g}, and float16 ends at {torch.finfo(dtype).max:.0f}.",
            remedy="Say --onnx-dtype float32 (or bfloat16 with --provider cuda).",
            tensor=name,
        )
    return cast


def _write(descriptor: int, piece: Tensor, offset: int) -> None:
    view = memoryview(piece.view(-1).view(torch.uint8).numpy().data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
