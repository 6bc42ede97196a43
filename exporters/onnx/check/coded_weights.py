"""The numbers that a graph's codes stand for, given to torch's model in the place of the weights they were made of.

With them torch says what a quantized graph has to compute, as exactly as it does of one whose weights are whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_serve.module_names import is_conv1d
from exporters.onnx.check.weights import load_graph, read_initializer, release
from exporters.onnx.linears import Linear, find_linears
from exporters.onnx.quantizing import dequantize_rows
from exporters.onnx.weight_blocks import weight_blocks
from exporters.onnx.weight_form import WeightForm, form_of

if TYPE_CHECKING:
    import onnx_ir

# ONNX Runtime GenAI's builder may make queries, keys and values in one product.
_JOINED = re.compile(r"\.(self_)?attn\.qkv_proj$")


def serve_codes(paths: Sequence[Path], model: Any) -> tuple[str, ...]:
    """Change `model` into the one that the graphs' codes are; the names of those that have no place in it.

    model: of transformers, in float32. Peak memory: one weight, a few times over.
    """
    graphs = [graph for path in paths if (graph := load_graph(path, [])) is not None]
    with torch.no_grad():
        unplaced = [name for graph in graphs for serve in (_serve_own, _serve_others) for name in serve(graph, model)]
    return tuple(dict.fromkeys(unplaced))


def _serve_own(graph: onnx_ir.Model, model: Any) -> Iterator[str]:
    """Codes whose names say what they are of, as this exporter gives them."""
    parameters: Mapping[str, Tensor] = model.state_dict()
    initializers = graph.graph.initializers
    for name in initializers:
        form = form_of(name)
        if form.bits is None or form.part != "values":
            continue
        names = (name, WeightForm(form.parameter, form.transposed, form.bits, "scales").name)
        values, scales = (_read(initializers.get(one)) for one in names)
        parameter = parameters.get(form.parameter)
        if parameter is None or values is None or scales is None:
            yield name
            continue
        rows = parameter.mT if form.transposed else parameter
        rows.copy_(dequantize_rows(values, scales, form.bits, rows.shape[-1]))


def _serve_others(graph: onnx_ir.Model, model: Any) -> Iterator[str]:
    """Codes of other tools, whose product says which module it is."""
    modules: dict[str, Any] = dict(model.named_modules())
    for linear in find_linears(graph).values():
        name = str(linear.weight.name)
        if linear.storage != "packed" or form_of(name).bits is not None:
            continue
        targets = [modules.get(path) for path in _modules_of(linear, modules)]
        found = [target for target in targets if target is not None]
        if len(found) == 1 and not _is_looked_up(linear.weight):
            _untie(found[0], modules)
        matrices = [_rows_of(module) for module in found]
        sizes = (sum(map(len, matrices)), *{matrix.shape[1] for matrix in matrices})
        if len(found) < len(targets) or sizes != (linear.out_features, linear.in_features):
            yield name
            continue
        numbers = torch.cat([block.float() for _, block in weight_blocks(linear)])
        for matrix, part in zip(matrices, numbers.split([len(matrix) for matrix in matrices]), strict=True):
            matrix.copy_(part)


def _read(value: onnx_ir.Value | None) -> Tensor | None:
    if value is None or value.const_value is None:
        return None
    tensor = read_initializer(value.const_value)
    release(value.const_value)
    return tensor


def _modules_of(linear: Linear, modules: Mapping[str, Any]) -> Sequence[str]:
    """The modules whose rows a product has, one after the other."""
    joined = _JOINED.search(linear.module)
    if linear.module in modules or joined is None:
        return [linear.module]
    return [f"{linear.module[: joined.start()]}.self_attn.{part}_proj" for part in "qkv"]


def _is_looked_up(codes: onnx_ir.Value) -> bool:
    """Whether an embedding reads the same codes, as they lie or in another shape."""
    readers = [use.node for use in codes.uses()]
    shaped = [use.node for node in readers if node.op_type == "Reshape" for use in node.outputs[0].uses()]
    return any(node.op_type == "GatherBlockQuantized" for node in (*readers, *shaped))


def _untie(module: Any, modules: Mapping[str, Any]) -> None:
    """Give a head a weight of its own, where the graph has codes for it and not for the embedding."""
    if sum(getattr(one, "weight", None) is module.weight for one in modules.values()) > 1:
        module.weight = copy.deepcopy(module.weight)


def _rows_of(module: Any) -> Tensor:
    """The weight as (out, in), in place."""
    weight: Tensor = module.weight.data
    return weight.T if is_conv1d(module) else weight
