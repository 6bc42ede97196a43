"""The matrices of a graph that another program made, row by row, against the checkpoint's tensors.

ONNX Runtime GenAI's builder has names and forms of its own: it turns matrices, and joins and splits them along their
outputs. A row of numbers stays what it was, and so does a row of integers that ONNX Runtime's quantizer makes of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from dora_serve.checkpoint import open_checkpoint
from dora_serve.safetensors_file import read_tensor
from exporters.onnx.check.answers import Weights
from exporters.onnx.check.weights import dtype_of, initializers_of, load_graph, read_initializer, release
from exporters.onnx.quantizing import quantize_rows
from exporters.onnx.weight_form import form_of

if TYPE_CHECKING:
    import onnx_ir

_MADE = ("cos_cache", "sin_cache")
"""Matrices that the builder computes, and no weights."""
_PIECE_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class _Coding:
    """How a matrix is quantized: in blocks along its inputs, the middle of the range being zero."""

    bits: int
    block_size: int
    scales: torch.dtype


@dataclass(frozen=True)
class _Product:
    """A MatMulNBits of the graph. coding: None with zero points, or an order of columns, of its own."""

    codes: onnx_ir.Value
    scales: onnx_ir.Value
    coding: _Coding | None


_Form: TypeAlias = "torch.dtype | _Coding"


def is_quantized_by_another(graphs: Sequence[Path]) -> bool:
    """Whether the integers of a graph have other names than this exporter gives them."""
    models = [model for path in graphs if (model := load_graph(path, [])) is not None]
    return any(form_of(str(product.codes.name)).bits is None for model in models for product in _products(model))


def compare_rows(graphs: Sequence[Path], model_folder: Path, failures: list[str]) -> Weights:
    """How many matrices there are, and how many of them consist of rows of the checkpoint: rounded to their dtype, or
    quantized by ONNX Runtime.

    A failure for one that does in part, and for a quantized one that does not at all. A float matrix that does not at
    all is something that the builder has computed from weights, or other weights: that is for the answers to tell.
    Matrices with zero points are of another quantizer, and are not looked at.

    Peak memory: one tensor, a few times over, and 16 bytes for each row of the checkpoint in each form.
    """
    found: dict[str, tuple[_Form, tuple[onnx_ir.TensorProtocol, ...]]] = {}
    for path in graphs:
        model = load_graph(path, failures)
        if model is None:
            continue
        products = list(_products(model))
        for product in products:
            codes, scales = product.codes.const_value, product.scales.const_value
            if product.coding is not None and codes is not None and scales is not None:
                found[str(product.codes.name)] = (product.coding, (codes, scales))
        parts = {product.scales.name for product in products}
        for name, tensor in initializers_of(model).items():
            matrix = tensor.dtype.is_floating_point() and len(tensor.shape) > 1
            if matrix and name not in parts and not name.endswith(_MADE):
                found[name] = (dtype_of(tensor), (tensor,))
    known = _known_rows(model_folder, {form for form, _ in found.values()})
    equal, broken = 0, []
    for name, (form, tensors) in found.items():
        stored = [read_initializer(tensor) for tensor in tensors]
        for tensor in tensors:
            release(tensor)
        whole = [one for one in stored if one is not None]
        share = _share_of(whole, form, known[form]) if len(whole) == len(stored) else -1.0
        equal += share == 1
        if share < 1 and (share != 0 or isinstance(form, _Coding)):
            broken.append(name)
    if broken:
        failures.append(
            f"{len(broken)} of {len(found)} weights in the graph do not equal the checkpoint's, such as "
            f"{', '.join(broken[:3])}."
        )
    return Weights(len(found), equal)


def _products(model: onnx_ir.Model) -> Iterator[_Product]:
    for node in model.graph:
        if node.op_type != "MatMulNBits" or node.inputs[1] is None or node.inputs[2] is None:
            continue
        codes, scales = node.inputs[1], node.inputs[2]
        bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
        own = any(place is not None for place in node.inputs[3:5])
        tensor = scales.const_value
        coding = (
            None if own or tensor is None else _Coding(bits, node.attributes["block_size"].as_int(), dtype_of(tensor))
        )
        yield _Product(codes, scales, coding)


def _known_rows(model_folder: Path, forms: set[_Form]) -> Mapping[_Form, set[bytes]]:
    known: dict[_Form, set[bytes]] = {form: set() for form in forms}
    for entry in open_checkpoint(model_folder).tensors.values():
        if len(entry.shape) < 2 or not entry.dtype.is_floating_point:
            continue
        rows = read_tensor(entry).reshape(-1, entry.shape[-1])
        step = max(1, _PIECE_ELEMENTS // entry.shape[-1])
        for start in range(0, len(rows), step):
            piece = rows[start : start + step]
            for form, digests in known.items():
                digests.update(_rows(*_in_form(piece, form)))
    return known


def _in_form(rows: Tensor, form: _Form) -> tuple[Tensor, ...]:
    if isinstance(form, torch.dtype):
        return (rows.to(form),)
    # Another dtype of the scales is that of the matrix before it was quantized.
    values, scales = quantize_rows(rows.to(form.scales).float(), form.bits, form.block_size)
    return values, scales.to(form.scales)


def _share_of(stored: Sequence[Tensor], form: _Form, known: set[bytes]) -> float:
    """The share of rows that are known; of a float matrix the larger one, as it lies and turned."""
    orders: list[tuple[Tensor, ...]] = [(stored[0],), (stored[0].mT.contiguous(),)]
    if isinstance(form, _Coding):
        codes, scales = stored
        orders = [(codes, scales.reshape(len(codes), -1))]
    shares = []
    for order in orders:
        rows = list(_rows(*order))
        shares.append(sum(row in known for row in rows) / max(1, len(rows)))
        if shares[-1] == 1:
            break
    return max(shares)


def _rows(*parts: Tensor) -> Iterator[bytes]:
    """A digest of each row, of all parts together. A float part may have several leading axes."""
    flat = [part.reshape(-1, part.shape[-1]) if len(parts) == 1 else part.reshape(len(part), -1) for part in parts]
    raw = [part.contiguous().view(torch.uint8).numpy() for part in flat]
    for row in zip(*raw, strict=True):
        digest = hashlib.blake2b(digest_size=16)
        for part in row:
            digest.update(part.data)
        yield digest.digest()
