"""A module as an ONNX graph, by `torch.onnx.export(dynamo=True)`, its weights under their own names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_serve.errors import UnavailableError
from exporters.onnx.architectures import INSTEAD
from exporters.onnx.optimizing import optimize
from exporters.onnx.traceable import WRAPPED, Traceable

if TYPE_CHECKING:
    import onnx_ir


# A weight that is stored transposed, as a matrix product wants it, has its parameter's name with this at the end.
TRANSPOSED = ".T"


def trace(graph: Traceable, opset: int, architecture: str) -> onnx_ir.Model:
    import torch

    try:
        program = torch.onnx.export(
            graph.module,
            graph.args,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic_shapes,
            opset_version=opset,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UnavailableError(
            f"{architecture} cannot be exported to ONNX: torch {torch.__version__} cannot trace it: "
            f"{_first_line(error)}.",
            remedy=INSTEAD,
            architecture=architecture,
        ) from error
    assert program is not None
    name_weights(program.model)  # first, because folding a transpose forgets whose it was
    optimize(program.model)
    return program.model


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {(str(cause).strip() or 'no reason given').splitlines()[0]}"


def name_weights(model: onnx_ir.Model) -> None:
    """Give initializers the names of the model's parameters, and a transposed one its parameter's name with `.T`."""
    import onnx_ir

    initializers = model.graph.initializers
    for name in list(initializers):
        if name.startswith(WRAPPED):
            initializers[name].name = name.removeprefix(WRAPPED)
    for node in model.graph:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.shape is None or not weight.is_initializer():
            continue
        axes, perm = list(range(len(weight.shape))), list(node.attributes["perm"].as_ints())
        if perm == axes:  # as indexing a stack of experts gives; folding it would copy them
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        elif perm == [*axes[:-2], axes[-1], axes[-2]]:
            node.outputs[0].name = f"{weight.name}{TRANSPOSED}"
