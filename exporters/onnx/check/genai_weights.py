"""The matrices of a graph of ONNX Runtime GenAI's builder, row by row, against the checkpoint's tensors.

The builder has names and forms of its own: it turns matrices, and joins and splits them along their outputs. A row of
numbers stays what it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dora_serve.checkpoint import open_checkpoint
from dora_serve.safetensors_file import read_tensor
from exporters.onnx.check.answers import Weights
from exporters.onnx.check.weights import dtype_of, initializers_of, read_initializer, release

_MADE = ("cos_cache", "sin_cache")
"""Matrices that the builder computes, and no weights."""


def compare_rows(graphs: Sequence[Path], model_folder: Path, failures: list[str]) -> Weights:
    """How many float matrices there are, and how many of them consist of rows of the checkpoint, rounded to their
    dtype. A failure for one that does in part. One that does not at all is something that the builder has computed from
    weights, or other weights: that is for the answers to tell. Quantized matrices are not looked at.

    Peak memory: one tensor, a few times over, and 16 bytes for each row of the checkpoint.
    """
    matrices = {
        name: tensor
        for path in graphs
        for name, tensor in initializers_of(path, failures).items()
        if tensor.dtype.is_floating_point() and len(tensor.shape) > 1 and not name.endswith(_MADE)
    }
    known = _known_rows(model_folder, {dtype_of(tensor) for tensor in matrices.values()})
    equal, broken = 0, []
    for name, tensor in matrices.items():
        stored = read_initializer(tensor)
        found = 0.0 if stored is None else _share_of(stored, known)
        release(tensor)
        equal += found == 1
        if stored is None or 0 < found < 1:
            broken.append(name)
    if broken:
        failures.append(
            f"{len(broken)} of {len(matrices)} weights in the graph do not equal the checkpoint's, such as "
            f"{', '.join(broken[:3])}."
        )
    return Weights(len(matrices), equal)


def _known_rows(model_folder: Path, dtypes: set[torch.dtype]) -> set[bytes]:
    known: set[bytes] = set()
    for entry in open_checkpoint(model_folder).tensors.values():
        if len(entry.shape) > 1 and entry.dtype.is_floating_point:
            stored = read_tensor(entry)
            for dtype in dtypes:
                known.update(_rows(stored.to(dtype)))
    return known


def _share_of(stored: Tensor, known: set[bytes]) -> float:
    """The larger share of rows, as the matrix lies and turned."""
    shares = []
    for matrix in (stored, stored.mT.contiguous()):
        rows = list(_rows(matrix))
        shares.append(sum(row in known for row in rows) / max(1, len(rows)))
        if shares[-1] == 1:
            break
    return max(shares)


def _rows(matrix: Tensor) -> Iterator[bytes]:
    flat = matrix.reshape(-1, matrix.shape[-1]).contiguous().view(torch.uint8).numpy()
    for row in flat:
        yield hashlib.blake2b(row.data, digest_size=16).digest()
