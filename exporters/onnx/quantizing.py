"""Weights as int8 or int4 in blocks: the graph's operators for them, and the integers.

A matrix is quantized along the axis that a product sums over, 32 elements to a scale, symmetrically (the middle of the
unsigned range is zero), by ONNX Runtime's own routine. `MatMulNBits` multiplies with it, activations going as int8
(accuracy level 4, for which ONNX Runtime has its fast kernels), and `GatherBlockQuantized` looks its rows up, so an
embedding and a head that are one tensor stay one tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from exporters.onnx.weight_form import BLOCK_SIZE, WeightForm, form_of

if TYPE_CHECKING:
    import onnx_ir

_DOMAIN = "com.microsoft"
_INT8_ACTIVATIONS = 4
_ROUTER_OPERATORS = frozenset({"Softmax", "Sigmoid", "Cast", "Reshape", "Add"})
_ROUTER_NODES = 12


def quantize_rows(rows: Tensor, bits: int, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """uint8 (rows, blocks, bytes) and float32 scales (rows, blocks) of float32 (rows, columns), padded with zeros."""
    from onnxruntime.capi import _pybind_state

    count, columns = rows.shape
    blocks = -(-columns // block_size)
    padded = torch.nn.functional.pad(rows, (0, blocks * block_size - columns))
    turned = padded.T.contiguous().numpy()
    values = np.zeros((count, blocks, block_size * bits // 8), dtype=np.uint8)
    scales = np.zeros((count, blocks), dtype=np.float32)
    zeros = np.zeros((count, -(-blocks * bits // 8)), dtype=np.uint8)
    quantize = _pybind_state.quantize_matmul_8bits if bits == 8 else _pybind_state.quantize_matmul_4bits
    quantize(values, turned, scales, zeros, block_size, count, columns, True)
    return torch.from_numpy(values), torch.from_numpy(scales)


def dequantize_rows(values: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """float32 (..., columns) of uint8 (..., blocks, bytes) and scales (..., blocks)."""
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2)
    middle = 1 << (bits - 1)
    return ((values.float() - middle) * scales.float()[..., None]).flatten(-2)[..., :columns]


def quantize_graph(model: onnx_ir.Model, bits: int) -> tuple[str, ...]:
    """Replace the products with weights, lookups in what is multiplied with as well, and lookups of experts.

    Weights have no values yet, only names. What is left as it was and why, in sentences; nothing is half replaced: a
    weight that something else reads too stays whole, so that it is not stored twice.
    """
    weights = {name: value for name, value in model.graph.initializers.items() if value.const_value is None}
    notes = []
    for name, weight in weights.items():
        shape = weight.shape.numpy() if weight.shape is not None else ()
        readers = _Readers.of(weight)
        if not readers.quantizable or len(shape) < 2:
            continue
        if any(_chooses(node) for node in (*readers.by_rows, *readers.by_columns)):
            continue  # a router: nothing to gain, and a wrong choice of experts costs much
        if readers.other:
            notes.append(f"{name} is not quantized: {readers.other[0].op_type} reads it too.")
            continue
        columns = int(shape[-2] if readers.by_columns else shape[-1])
        if readers.lookups and columns % BLOCK_SIZE:
            notes.append(f"{name} is not quantized: its rows of {columns} are no multiple of {BLOCK_SIZE}.")
            continue
        if readers.lookups and readers.by_columns:
            notes.append(f"{name} is not quantized: its rows are looked up and its columns multiplied with.")
            continue
        _replace(model, weight, readers, bits)
    if notes or any(node.domain == _DOMAIN for node in model.graph):
        model.opset_imports[_DOMAIN] = 1
    return tuple(notes)


class _Readers:
    """The nodes that read a weight, by how. A product by rows sums over the weight's last axis, (N, K); one by columns
    over the one before, (K, N)."""

    def __init__(self) -> None:
        self.by_rows: list[onnx_ir.Node] = []
        self.by_columns: list[onnx_ir.Node] = []
        self.lookups: list[onnx_ir.Node] = []
        self.transposes: list[onnx_ir.Node] = []
        self.other: list[onnx_ir.Node] = []

    @property
    def quantizable(self) -> bool:
        """Whether there is a product, or lookups of whole matrices: an embedding that is only looked up stays."""
        return bool(self.by_rows or self.by_columns or any(_is_stack(node) for node in self.lookups))

    @staticmethod
    def of(weight: onnx_ir.Value) -> _Readers:
        found = _Readers()
        for use in weight.uses():
            node = use.node
            if use.idx == 0 and _is_lookup(node):
                found.lookups.append(node)
            elif node.op_type == "Transpose" and len(weight.shape or ()) == 2 and _feeds_products(node):
                found.transposes.append(node)
                found.by_rows += [reader.node for reader in node.outputs[0].uses()]
            elif _is_product(node, use.idx, weight):
                found.add_product(node)
            else:
                found.other.append(node)
        if found.by_rows and found.by_columns:
            found.other += found.by_columns
        return found

    def add_product(self, node: onnx_ir.Node) -> None:
        by_rows = node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1
        (self.by_rows if by_rows else self.by_columns).append(node)


def _chooses(product: onnx_ir.Node) -> bool:
    """Whether the product's result, scaled and shaped at most, is what a TopK picks from."""
    waiting, passed = [product], 0
    while waiting and passed < _ROUTER_NODES:
        node, passed = waiting.pop(), passed + 1
        for use in node.outputs[0].uses():
            if use.node.op_type == "TopK":
                return True
            if use.node.op_type in _ROUTER_OPERATORS:
                waiting.append(use.node)
    return False


def _is_lookup(node: onnx_ir.Node) -> bool:
    """Whether it takes rows, or whole matrices, along the first axis: how experts are taken is a GatherND of one
    index."""
    if node.op_type == "Gather":
        return _attribute(node, "axis", 0) == 0
    indices = node.inputs[1] if node.op_type == "GatherND" else None
    unsqueeze = indices.producer() if indices is not None else None
    if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or unsqueeze.inputs[1] is None:
        return False
    axes = unsqueeze.inputs[1].const_value
    return axes is not None and axes.numpy().tolist() == [-1] and _attribute(node, "batch_dims", 0) == 0


def _is_stack(lookup: onnx_ir.Node) -> bool:
    shape = lookup.inputs[0].shape if lookup.inputs[0] is not None else None
    return shape is not None and len(shape) > 2


def _feeds_products(transpose: onnx_ir.Node) -> bool:
    uses = transpose.outputs[0].uses()
    return bool(uses) and all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses)


def _is_product(node: onnx_ir.Node, index: int, weight: onnx_ir.Value) -> bool:
    if index != 1 or len(weight.shape or ()) != 2:
        return False
    if node.op_type == "MatMul":
        return True
    plain = _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0
    return node.op_type == "Gemm" and plain and _attribute(node, "transA", 0) == 0


def _attribute(node: onnx_ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _replace(model: onnx_ir.Model, weight: onnx_ir.Value, readers: _Readers, bits: int) -> None:
    import onnx_ir

    assert weight.shape is not None
    assert weight.name is not None
    shape = [int(size) for size in weight.shape.numpy()]
    plain = form_of(weight.name)
    turned = bool(readers.by_columns)  # of what is quantized, the last axis is the one that is summed over
    if turned:
        shape = [*shape[:-2], shape[-1], shape[-2]]
    columns, blocks = shape[-1], -(-shape[-1] // BLOCK_SIZE)
    form = WeightForm(plain.parameter, plain.transposed != turned, bits, "values")
    values = onnx_ir.Value(
        name=form.name,
        shape=onnx_ir.Shape([*shape[:-1], blocks, BLOCK_SIZE * bits // 8]),
        type=onnx_ir.TensorType(onnx_ir.DataType.UINT8),
    )
    scales = onnx_ir.Value(
        name=WeightForm(form.parameter, form.transposed, bits, "scales").name,
        shape=onnx_ir.Shape([*shape[:-1], blocks]),
        type=weight.type,
    )
    for value in (values, scales):
        model.graph.initializers.add(value)
    for node in (*readers.by_rows, *readers.by_columns):
        _multiply(model, node, values, scales, bits, (shape[0], columns))
    if readers.lookups:
        flat = _flat_rows(model, readers.lookups, values, [*shape[:-1], columns * bits // 8])
        for node in readers.lookups:
            _look_up(model, node, flat, scales, bits)
    model.graph.remove(readers.transposes, safe=True)
    del model.graph.initializers[weight.name]


def _multiply(
    model: onnx_ir.Model,
    node: onnx_ir.Node,
    values: onnx_ir.Value,
    scales: onnx_ir.Value,
    bits: int,
    shape: tuple[int, int],
) -> None:
    """MatMulNBits in the place of a MatMul or Gemm; the bias of a Gemm is added after it."""
    import onnx_ir

    outputs, columns = shape
    product = onnx_ir.node(
        "MatMulNBits",
        [node.inputs[0], values, scales],
        {
            "K": columns,
            "N": outputs,
            "bits": bits,
            "block_size": BLOCK_SIZE,
            "accuracy_level": _INT8_ACTIVATIONS,
        },
        domain=_DOMAIN,
    )
    nodes = [product]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        nodes.append(onnx_ir.node("Add", [product.outputs[0], bias]))
        product.outputs[0].type = node.outputs[0].type
        product.outputs[0].shape = node.outputs[0].shape
    _swap(model, node, nodes)


def _flat_rows(
    model: onnx_ir.Model, lookups: list[onnx_ir.Node], values: onnx_ir.Value, shape: list[int]
) -> onnx_ir.Value:
    """The same bytes as rows without blocks, as GatherBlockQuantized takes them."""
    import onnx_ir

    target = onnx_ir.Value(name=f"{values.name}.rows", const_value=onnx_ir.tensor(shape, dtype=onnx_ir.DataType.INT64))
    model.graph.initializers.add(target)
    reshape = onnx_ir.node("Reshape", [values, target])
    reshape.outputs[0].type, reshape.outputs[0].shape = values.type, onnx_ir.Shape(shape)
    reshape.outputs[0].name = f"{values.name}.flat"
    first = next(node for node in model.graph if node in lookups)
    model.graph.insert_before(first, [reshape])
    return reshape.outputs[0]


def _look_up(model: onnx_ir.Model, node: onnx_ir.Node, rows: onnx_ir.Value, scales: onnx_ir.Value, bits: int) -> None:
    import onnx_ir

    assert rows.shape is not None
    indices = node.inputs[1]
    if node.op_type == "GatherND":  # of indices that were given a last axis of one
        unsqueeze = indices.producer() if indices is not None else None
        assert unsqueeze is not None
        indices = unsqueeze.inputs[0]
    attributes = {"gather_axis": 0, "quantize_axis": len(rows.shape) - 1, "block_size": BLOCK_SIZE, "bits": bits}
    lookup = onnx_ir.node("GatherBlockQuantized", [rows, indices, scales], attributes, domain=_DOMAIN)
    _swap(model, node, [lookup])


def _swap(model: onnx_ir.Model, old: onnx_ir.Node, new: list[onnx_ir.Node]) -> None:
    """`new`, the last of which gives the result, in the place of `old`."""
    import onnx_ir

    result = new[-1].outputs[0]
    result.type, result.shape = old.outputs[0].type, old.outputs[0].shape
    new[0].metadata_props.update(old.metadata_props)
    model.graph.insert_before(old, new)
    onnx_ir.convenience.replace_all_uses_with(old.outputs[0], result, replace_graph_outputs=True)
    name = old.outputs[0].name
    model.graph.remove(old, safe=True)
    result.name = name
