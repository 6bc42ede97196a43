"""Which graphs a model gets, by the kind that its architecture is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from exporters.onnx.architectures import Kind, kind_of
from exporters.onnx.decoder import decoder_graph
from exporters.onnx.encoder_decoder import encoder_decoder_graphs
from exporters.onnx.plain import plain_graph
from exporters.onnx.saving import MODEL_FILE
from exporters.onnx.traceable import Traceable
from exporters.onnx.vision_language import vision_language_graphs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GRAPHS: Mapping[Kind, Callable[[PreTrainedModel], Mapping[str, Traceable]]] = {
    "decoder": lambda model: {MODEL_FILE: decoder_graph(model)},
    "encoder-decoder": encoder_decoder_graphs,
    "vision-language": vision_language_graphs,
    "plain": lambda model: {MODEL_FILE: plain_graph(model)},
}


def traceables(model: PreTrainedModel) -> Mapping[str, Traceable]:
    """What is to be traced of a model, by the name of its file. The model may be without memory."""
    return _GRAPHS[kind_of(type(model).__name__)](model)
