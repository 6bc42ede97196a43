"""The layers of a graph that an adapter can change: which node is which module, and where its weight is."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import onnx_ir

Storage = Literal["out_in", "in_out", "packed"]
Kind = Literal["linear", "embedding"]

# What torch's exporter notes on each node: the path of modules that made it, the deepest last but one.
_SCOPES = "pkg.torch.onnx.name_scopes"
_WRAPPER = "model."  # the attribute in which the exporter's own module keeps the model

# What may follow a module's name in the name of its weight: how it is stored, and how a quantizer calls its codes.
_WEIGHT = re.compile(r"(\.MatMul)?\.weight(\.T)?((_DQ)?_Q\d+(G\d*)?)?$|\.qweight$")
# ONNX Runtime GenAI's builder calls the attention of every family so.
_GENAI = (re.compile(r"(\.layers\.\d+)\.attn\.(?=[qkvo]_proj$)"), r"\1.self_attn.")


@dataclass(frozen=True)
class Linear:
    """A module that multiplies with a weight, or looks it up.

    module: its run-time name in the model. nodes: one for each call of it. storage: how `weight` holds (out, in): as it
    stands, transposed, or packed as MatMulNBits has it. For an embedding `in` is the vocabulary, and the weight in_out.
    """

    module: str
    kind: Kind
    nodes: tuple[onnx_ir.Node, ...]
    weight: onnx_ir.Value
    storage: Storage
    out_features: int
    in_features: int

    @property
    def is_layer(self) -> bool:
        """Whether it is a linear layer of the model's repeated blocks: neither an embedding nor a head."""
        return self.kind == "linear" and any(part.isdigit() for part in self.module.split("."))


@dataclass(frozen=True)
class _Found:
    module: str
    kind: Kind
    node: onnx_ir.Node
    weight: onnx_ir.Value
    storage: Storage
    out_features: int
    in_features: int


def find_linears(model: onnx_ir.Model) -> Mapping[str, Linear]:
    """All of them, by module, in the order of the graph.

    Left out: a product whose weight is made at run time (experts), a weight that is no parameter of a named module, and
    a module whose calls use several weights.
    """
    calls: dict[str, list[_Found]] = defaultdict(list)
    for node in model.graph:
        found = _linear(node)
        if found is not None:
            calls[found.module].append(found)
    linears = {}
    for module, several in calls.items():
        first = several[0]
        if all((call.weight, call.kind, call.storage) == (first.weight, first.kind, first.storage) for call in several):
            linears[module] = Linear(
                module=module,
                kind=first.kind,
                nodes=tuple(call.node for call in several),
                weight=first.weight,
                storage=first.storage,
                out_features=first.out_features,
                in_features=first.in_features,
            )
    return linears


def is_parameter(value: onnx_ir.Value | None) -> bool:
    """Whether this is a tensor of the model itself: an initializer that nobody can feed."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def _linear(node: onnx_ir.Node) -> _Found | None:
    """The product or look-up that a node is, None for any other node."""
    for kind, weight, storage, out_in in _readings(node):
        module = _module_of(node, weight)
        if module is not None:
            return _Found(module, kind, node, weight, storage, *out_in)
    return None


def _readings(node: onnx_ir.Node) -> Iterator[tuple[Kind, onnx_ir.Value, Storage, tuple[int, int]]]:
    inputs = node.inputs
    if node.op_type == "MatMulNBits" and node.domain == "com.microsoft":
        packed = inputs[1]
        grouped = len(inputs) > 4 and inputs[4] is not None  # g_idx: columns in an order of their own
        if packed is not None and is_parameter(packed) and not grouped:
            sizes = (node.attributes["N"].as_int(), node.attributes["K"].as_int())
            yield "linear", packed, "packed", sizes
        return
    if node.domain not in ("", "ai.onnx"):
        return
    if node.op_type == "Gather" and is_parameter(inputs[0]) and _axis(node) == 0:
        table = inputs[0]
        shape = _matrix(table)
        if table is not None and shape is not None and table.dtype is not None and table.dtype.is_floating_point():
            yield "embedding", table, "in_out", (shape[1], shape[0])
        return
    flipped = False
    if node.op_type == "Gemm":
        plain = all(node.attributes[name].as_float() == 1.0 for name in ("alpha", "beta") if name in node.attributes)
        if not plain or _flag(node, "transA"):
            return
        flipped = _flag(node, "transB")
    elif node.op_type != "MatMul":
        return
    weight = inputs[1]
    maker = weight.producer() if weight is not None else None
    if maker is not None and maker.op_type == "Transpose":  # a tied head keeps the embedding's own weight
        perm = maker.attributes.get("perm")
        weight = maker.inputs[0]
        flipped = not flipped if perm is None or list(perm.as_ints()) == [1, 0] else flipped
    shape = _matrix(weight)
    if weight is None or shape is None or not is_parameter(weight):
        return
    if flipped:
        yield "linear", weight, "out_in", shape
    else:
        yield "linear", weight, "in_out", (shape[1], shape[0])


def _module_of(node: onnx_ir.Node, weight: onnx_ir.Value) -> str | None:
    """The module that made the node, as the exporter noted it; else the one that the weight's name names."""
    noted = node.metadata_props.get(_SCOPES)
    if noted is not None:
        try:
            scopes = [str(scope) for scope in ast.literal_eval(noted)]
        except (SyntaxError, ValueError):
            scopes = []
        if len(scopes) > 1 and scopes[-2].startswith(_WRAPPER):
            return scopes[-2].removeprefix(_WRAPPER)
    name = weight.name or ""
    ending = _WEIGHT.search(name)
    return _GENAI[0].sub(_GENAI[1], name[: ending.start()]) if ending else None


def _matrix(value: onnx_ir.Value | None) -> tuple[int, int] | None:
    if value is None or value.shape is None or len(value.shape) != 2:
        return None
    rows, columns = value.shape
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None


def _axis(node: onnx_ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


def _flag(node: onnx_ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())
