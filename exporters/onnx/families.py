"""Which graphs a model gets, by the kind that its architecture is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from exporters.onnx.architectures import is_causal
from exporters.onnx.decoder import decoder_graph
from exporters.onnx.plain import plain_graph
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx.traceable import Traceable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def traceables(model: PreTrainedModel) -> Mapping[str, Traceable]:
    """What is to be traced of a model, by the name of its file. The model may be without memory."""
    if is_causal(type(model).__name__):
        return {MODEL_FILE: decoder_graph(model)}
    return {MODEL_FILE: plain_graph(model)}
