"""What is traced: a module of tensors in, tensors out, with the names and the axes that may vary."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Traceable:
    """A module whose forward takes and gives tensors in the order of `inputs` and `outputs`, and how to trace it.

    args: None for what the module does without, which has no input then. finish: changes the graph that was traced.
    """

    module: torch.nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    args: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    finish: Callable[[onnx_ir.Model], None] | None = None


WRAPPED = "model."  # the attribute that decoder_graph's and plain_graph's modules keep the model in


def forward_arguments(model: PreTrainedModel) -> set[str]:
    """The names that the model's forward takes."""
    return set(inspect.signature(model.forward).parameters)
