"""A module as an ONNX graph, by `torch.onnx.export(dynamo=True)`, its weights under their own names and without values.

A weight of the graph is an initializer that has a name, a shape and a dtype; whoever writes the graph gives it its
place in a file. So nothing can be computed from weights while the graph is simplified, and the graph of one checkpoint
is the graph of every other of the same configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dora_serve.errors import DoraServeError, UnavailableError, in_a_line
from exporters.onnx.architectures import INSTEAD
from exporters.onnx.empty_model import is_fake
from exporters.onnx.optimizing import optimize
from exporters.onnx.traceable import WRAPPED, Traceable
from exporters.onnx.weight_form import TRANSPOSED

if TYPE_CHECKING:
    import onnx_ir


@contextmanager
def as_untraceable(architecture: str) -> Iterator[None]:
    """Whatever a model's own code, torch or the passes over its graph raise in the block, as an UnavailableError."""
    import torch

    try:
        yield
    except (DoraServeError, MemoryError):
        raise
    except Exception as error:
        raise UnavailableError(
            f"{architecture} cannot be exported to ONNX: torch {torch.__version__} cannot trace it: "
            f"{in_a_line(error.__cause__ or error)}.",
            remedy=INSTEAD,
            architecture=architecture,
            untraceable=True,
        ) from error


def trace(graph: Traceable, opset: int) -> onnx_ir.Model:
    """The graph of `graph.module`. Raises whatever torch raises where it cannot trace it."""
    import torch

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
    assert program is not None
    _empty_weights(program.model, graph.module)
    _turn_weights(program.model)
    if graph.finish is not None:
        graph.finish(program.model)
    optimize(program.model)
    return program.model


def weight_names(model: onnx_ir.Model) -> list[str]:
    """The initializers whose values come from the checkpoint, in the graph's order."""
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def _empty_weights(model: onnx_ir.Model, module: object) -> None:
    """Give each weight its parameter's name, one name to a tied one, and take its empty tensor away."""
    import onnx_ir
    import torch

    assert isinstance(module, torch.nn.Module)
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in named:
        if is_fake(tensor.data):
            first.setdefault(id(tensor), name)
    same_as = {name: first[id(tensor)] for name, tensor in named if id(tensor) in first}
    initializers = model.graph.initializers
    kept: dict[str, onnx_ir.Value] = {}
    for name in list(initializers):
        value = initializers[name]
        if name not in same_as:
            value.name = name.removeprefix(WRAPPED)
            continue
        own = same_as[name].removeprefix(WRAPPED)
        if own in kept:
            onnx_ir.convenience.replace_all_uses_with(value, kept[own])
            del initializers[name]
        else:
            value.name, value.const_value, kept[own] = own, None, value


def _turn_weights(model: onnx_ir.Model) -> None:
    """Store transposed what is only read transposed, under its parameter's name with `.T`."""
    import onnx_ir

    initializers = model.graph.initializers
    for name in list(initializers):
        weight = initializers[name]
        if weight.const_value is not None or weight.shape is None or len(weight.shape) < 2:
            continue
        readers = [use.node for use in weight.uses()]
        permutations = [_permutation(node) for node in readers]
        axes = list(range(len(weight.shape)))
        for node, permutation in zip(readers, permutations, strict=True):
            if permutation == axes:  # as indexing a stack of experts gives
                onnx_ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        swapped = [*axes[:-2], axes[-1], axes[-2]]
        if not readers or any(permutation != swapped for permutation in permutations):
            continue
        turned = onnx_ir.Value(
            name=f"{name}{TRANSPOSED}",
            shape=onnx_ir.Shape([weight.shape[axis] for axis in swapped]),
            type=weight.type,
        )
        for node in readers:
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], turned)
        model.graph.remove(readers, safe=True)
        del initializers[name]
        initializers.add(turned)


def _permutation(node: onnx_ir.Node) -> Sequence[int] | None:
    return list(node.attributes["perm"].as_ints()) if node.op_type == "Transpose" else None
