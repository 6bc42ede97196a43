"""Slots put into an exported graph, whatever made or quantized it: after each product `y = x W` of an adaptable layer

    y' = Mul(y, norm_scale) + MatMul(MatMul(x, lora_A), lora_B)

with the three tensors as inputs whose defaults (rank 0, and ones) leave the base as it is. A bias that the product adds
itself is added afterwards instead, since DoRA scales W x alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_serve.errors import UnavailableError
from dora_serve.onnx_engine.slots import ADAPTER_IDS, METADATA_KEY, Slot, SlotTable
from exporters.onnx.linears import Linear, find_linears
from exporters.onnx_adapters.fingerprint import SLOT_CONSTANTS, fingerprint
from exporters.onnx_adapters.options import SlotOptions

if TYPE_CHECKING:
    import onnx_ir


def insert_slots(model: onnx_ir.Model, wanted: Callable[[Linear], bool], options: SlotOptions) -> SlotTable:
    """Put slots on the layers that `wanted` chooses, in place; the table that was also written into the metadata.

    options.mixed: tensors with a slot dimension, from which each row of the batch takes what `adapter_ids` (batch,)
    says; slot 0 is the base by default. Embeddings get no slots then: their tables are as long as the vocabulary.
    options.rank: for runtimes that want static shapes.

    Raises UnavailableError where the graph has slots already, no layer that can have one, or no batch dimension.
    """
    if METADATA_KEY in model.metadata_props:
        raise UnavailableError("This graph has adapter slots already.", remedy="Use it as it is.")
    linears = find_linears(model)
    chosen = [one for one in linears.values() if wanted(one) and not (options.mixed and one.kind == "embedding")]
    if not chosen:
        raise UnavailableError(
            "No layer of this graph can have an adapter slot.",
            remedy="Merge the adapter instead: dora-export merge ADAPTER --to onnx.",
        )
    table = SlotTable(
        slots={one.module: Slot(one.module, one.kind, one.in_features, one.out_features) for one in chosen},
        fingerprint=fingerprint(model),
        dtype=_dtype(chosen).numpy().name,
        mixed=options.mixed,
        rank=options.rank,
        required=options.required,
        without=tuple(sorted(linears.keys() - {one.module for one in chosen})),
    )
    surgery = _Surgery(model, table)
    for linear in chosen:
        surgery.put(linear)
    surgery.declare(table.guard, [0], (0,), 0.0)
    model.metadata_props[METADATA_KEY] = table.to_json()
    return table


def _dtype(chosen: Sequence[Linear]) -> onnx_ir.DataType:
    """That of the layers' outputs, which all have the same."""
    found: set[onnx_ir.DataType] = set()
    for linear in chosen:
        node = linear.nodes[0]
        # Codes have scales, and these have the dtype of the output.
        like = node.inputs[2] if linear.storage == "packed" else linear.weight
        dtype = node.outputs[0].dtype or (like.dtype if like is not None else None)
        if dtype is not None:
            found.add(dtype)
    if len(found) != 1:
        names = ", ".join(sorted(str(dtype) for dtype in found))
        raise UnavailableError(
            f"The layers of this graph compute in {names or 'no known dtype'}, wanted one floating dtype for all.",
            remedy="Export the base in one dtype.",
        )
    return found.pop()


class _Surgery:
    """The changes to one graph."""

    def __init__(self, model: onnx_ir.Model, table: SlotTable) -> None:
        import onnx_ir

        self._ir: Any = onnx_ir
        self._graph, self._table = model.graph, table
        self._dtype = (
            onnx_ir.DataType.from_numpy(np.dtype(table.dtype))
            if table.dtype != "bfloat16"
            else (onnx_ir.DataType.BFLOAT16)
        )
        self._batch = _batch_dimension(model) if table.mixed else None
        self._ids = self._input(ADAPTER_IDS, [self._batch], onnx_ir.DataType.INT64) if table.mixed else None
        self._constants: dict[str, onnx_ir.Value] = {}

    def declare(self, name: str, shape: Sequence[int | str], default: tuple[int, ...], fill: float) -> onnx_ir.Value:
        """An input with a default value, unless the graph's have none."""
        value = self._input(name, shape, self._dtype)
        if self._table.required:
            return value
        values = np.full(default, fill, dtype=self._dtype.numpy())
        value.const_value = self._ir.tensor(values, dtype=self._dtype, name=name)
        self._graph.register_initializer(value)
        return value

    def put(self, linear: Linear) -> None:
        """Slots on all calls of a layer, which share their tensors."""
        slot, rank = self._table.slots[linear.module], self._table.rank
        size = 0 if rank is None else rank
        free: int | str = f"{slot.module}.rank" if rank is None else rank
        lead: list[int | str] = ["slots"] if self._table.mixed else []
        one = (1,) if self._table.mixed else ()
        lora_a = self.declare(slot.lora_A, [*lead, slot.in_features, free], (*one, slot.in_features, size), 0.0)
        lora_b = self.declare(slot.lora_B, [*lead, free, slot.out_features], (*one, size, slot.out_features), 0.0)
        scale = self.declare(slot.norm_scale, [*lead, slot.out_features], (*one, slot.out_features), 1.0)
        for node in linear.nodes:
            self._adapt(node, linear, lora_a, lora_b, scale)

    def _adapt(
        self,
        node: onnx_ir.Node,
        linear: Linear,
        lora_a: onnx_ir.Value,
        lora_b: onnx_ir.Value,
        scale: onnx_ir.Value,
    ) -> None:
        product = node.outputs[0]
        uses, added = list(product.uses()), _Added(self._ir, node)
        bias = _take_bias(node)
        if linear.kind == "embedding":
            low = added("Gather", [lora_a, node.inputs[1]])
        else:
            if self._ids is not None:
                self._adapt_rows(added, node, (lora_a, lora_b, scale), bias, uses)
                return
            low = added("MatMul", [node.inputs[0], lora_a])
        total = added("Add", [added("Mul", [product, scale]), added("MatMul", [low, lora_b])])
        self._finish(added, product, total, bias, uses)

    def _adapt_rows(
        self,
        added: _Added,
        node: onnx_ir.Node,
        tensors: tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Value],
        bias: onnx_ir.Value | None,
        uses: Sequence[Any],
    ) -> None:
        """Each row of the batch with the factors of its own slot."""
        x, product = node.inputs[0], node.outputs[0]
        assert x is not None
        lora_a, lora_b, scale = (added("Gather", [tensor, self._ids]) for tensor in tensors)
        scale = added("Unsqueeze", [scale, self._constant("axis", [1])])
        has_rows = x.shape is not None and len(x.shape) == 3 and str(x.shape[0]) == self._batch
        if has_rows:
            delta = added("MatMul", [added("MatMul", [x, lora_a]), lora_b])
            total = added("Add", [added("Mul", [product, scale]), delta])
        else:
            # Tokens of all rows, one row after the other: give them their rows back for as long as it takes.
            rows = added("Shape", [self._ids])
            by_row = [
                added("Concat", [rows, self._constant("rest", [-1]), size], {"axis": 0})
                for size in (
                    self._constant(f"size.{width}", [width]) for width in (self._in(tensors), self._out(tensors))
                )
            ]
            delta = added("MatMul", [added("MatMul", [added("Reshape", [x, by_row[0]]), lora_a]), lora_b])
            whole = added("Add", [added("Mul", [added("Reshape", [product, by_row[1]]), scale]), delta])
            total = added("Reshape", [whole, added("Shape", [product])])
        self._finish(added, product, total, bias, uses)

    @staticmethod
    def _in(tensors: tuple[onnx_ir.Value, ...]) -> int:
        return int(tensors[0].shape[1])  # type: ignore[index, arg-type]

    @staticmethod
    def _out(tensors: tuple[onnx_ir.Value, ...]) -> int:
        return int(tensors[1].shape[2])  # type: ignore[index, arg-type]

    def _finish(
        self,
        added: _Added,
        product: onnx_ir.Value,
        total: onnx_ir.Value,
        bias: onnx_ir.Value | None,
        uses: Sequence[Any],
    ) -> None:
        """Let what used the product use the total, under the product's name where that is an output of the graph."""
        if bias is not None:
            total = added("Add", [total, bias])
        total.type, total.shape = product.type, product.shape
        self._graph.insert_after(added.node, added.nodes)
        for user, index in uses:
            user.replace_input_with(index, total)
        if product.is_graph_output():
            place = [output is product for output in self._graph.outputs].index(True)
            total.name, product.name = product.name, f"{product.name}.base"
            self._graph.outputs[place] = total

    def _input(self, name: str, shape: Sequence[Any], dtype: onnx_ir.DataType) -> onnx_ir.Value:
        ir = self._ir
        value: onnx_ir.Value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(value)
        return value

    def _constant(self, name: str, values: list[int]) -> onnx_ir.Value:
        name = f"{SLOT_CONSTANTS}{name}"
        if name not in self._constants:
            ir = self._ir
            value = ir.Value(name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(ir.DataType.INT64))
            value.const_value = ir.tensor(np.array(values, dtype=np.int64), name=name)
            self._graph.register_initializer(value)
            self._constants[name] = value
        return self._constants[name]


class _Added:
    """The nodes that follow one node, named after it."""

    def __init__(self, ir: Any, node: onnx_ir.Node) -> None:
        self._ir, self.node = ir, node
        self.nodes: list[onnx_ir.Node] = []

    def __call__(
        self, op_type: str, inputs: Sequence[onnx_ir.Value | None], attributes: Mapping[str, Any] | None = None
    ) -> onnx_ir.Value:
        name = f"{self.node.name}.slot{len(self.nodes)}"
        made: onnx_ir.Node = self._ir.node(op_type, inputs, attributes=attributes or {}, name=name)
        made.outputs[0].name = f"{self.node.outputs[0].name}.slot{len(self.nodes)}"
        self.nodes.append(made)
        return made.outputs[0]


def _take_bias(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The bias that a node adds by itself, taken from it."""
    place = {"Gemm": 2, "MatMulNBits": 5}.get(node.op_type)
    if place is None or len(node.inputs) <= place or node.inputs[place] is None:
        return None
    bias = node.inputs[place]
    node.replace_input_with(place, None)
    return bias


def _batch_dimension(model: onnx_ir.Model) -> str:
    first = model.graph.inputs[0]
    size = first.shape[0] if first.shape is not None and len(first.shape) else None
    if size is None or isinstance(size, int):
        raise UnavailableError(
            f"The graph's input {first.name!r} has no batch dimension, so that rows cannot choose an adapter.",
            remedy="Export without --mixed-batches.",
        )
    return str(size)
