"""An encoder-decoder as two graphs: the encoder, and one decoder that serves the first step and the later ones.

    encoder_model.onnx
        input_ids, attention_mask           int64 (batch, encoder_sequence), or the model's own input (input_features)
        last_hidden_state                   dtype (batch, encoder_sequence, width)
    decoder_model_merged.onnx
        input_ids                           int64 (batch, sequence)
        encoder_attention_mask              int64 (batch, encoder_sequence), where the model takes one
        encoder_hidden_states               dtype (batch, encoder_sequence, width)
        past_key_values.N.decoder.key/.value, past_key_values.N.encoder.key/.value
                                            dtype (batch, heads, past or encoder_sequence, head_dim)
        logits                              dtype (batch, sequence, vocabulary)
        present.N.decoder.key/.value, present.N.encoder.key/.value

These are Optimum's names. The cross attention's keys and values are computed from encoder_hidden_states where the past
of the encoder is empty (length 0), and passed on as they are where it is not: then encoder_hidden_states are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporters.onnx.architectures import refuse_model
from exporters.onnx.traceable import Traceable, forward_arguments

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from transformers import PreTrainedModel

ENCODER_FILE = "encoder_model.onnx"
DECODER_FILE = "decoder_model_merged.onnx"
_PARTS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


def encoder_decoder_graphs(model: PreTrainedModel) -> Mapping[str, Traceable]:
    """Both graphs of a model that generates from what it encodes."""
    lacking = {"decoder_input_ids", "encoder_outputs", "past_key_values"} - forward_arguments(model)
    if lacking:
        raise refuse_model(model, f"its forward takes no {', '.join(sorted(lacking))}.")
    return {ENCODER_FILE: _encoder(model), DECODER_FILE: _decoder(model)}


def encoder_inputs(model: PreTrainedModel, batch: int, sequence: int) -> dict[str, torch.Tensor]:
    """Inputs of the encoder: tokens of that length, or whole spectrograms, whose length the model fixes."""
    import torch

    config: Any = model.config
    if model.main_input_name == "input_ids":
        ids = torch.ones(batch, sequence, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.main_input_name == "input_features" and isinstance(getattr(config, "max_source_positions", None), int):
        shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.zeros(shape, dtype=model.dtype)}
    raise refuse_model(model, f"its input is {model.main_input_name}, whose shape is not known.")


def _encoder(model: PreTrainedModel) -> Traceable:
    import torch
    from torch.export import Dim

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, main: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            given = {} if attention_mask is None else {"attention_mask": attention_mask}
            encoder: Any = self.model.get_encoder()
            state: torch.Tensor = encoder(main, **given, return_dict=True).last_hidden_state
            return state

    inputs = encoder_inputs(model, 2, 7)
    dims = {0: Dim("batch_size"), **({1: Dim("encoder_sequence_length")} if "input_ids" in inputs else {})}
    return Traceable(
        module=Encoder().eval(),
        inputs=tuple(inputs),
        outputs=("last_hidden_state",),
        args=tuple(inputs.values()),
        dynamic_shapes=(dims,) * len(inputs),
    )


def _decoder(model: PreTrainedModel) -> Traceable:
    import torch
    from torch.export import Dim
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    masked = model.main_input_name == "input_ids"

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            encoder_attention_mask: torch.Tensor | None,
            encoder_hidden_states: torch.Tensor,
            past: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
        ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
            own, cross = DynamicCache(), DynamicCache()
            for layer, (key, value, encoder_key, encoder_value) in enumerate(past):
                own.update(key, value, layer)
                cross.update(encoder_key, encoder_value, layer)
            both = EncoderDecoderCache(own, cross)
            # Keys and values of what is given of the encoder's states are appended to those that are there already.
            both.is_updated = dict.fromkeys(range(len(past)), False)
            given = {} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}
            output: Any = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
                decoder_input_ids=input_ids,
                past_key_values=both,
                use_cache=True,
                return_dict=True,
                **given,
            )
            pairs: Any = zip(own.layers, cross.layers, strict=True)
            return output.logits, [(one.keys, one.values, other.keys, other.values) for one, other in pairs]

    batch, sequence, past, cached, fresh = 2, 3, 5, 4, 7
    states = model.get_encoder()(**encoder_inputs(model, batch, fresh), return_dict=True).last_hidden_state
    fresh = states.shape[1]
    ids = torch.ones(batch, sequence, dtype=torch.int64)
    mask = torch.ones(batch, cached + fresh, dtype=torch.int64) if masked else None
    wrapper = Decoder().eval()
    first = ids[:, :1].expand(batch, past).contiguous()
    _, layers = wrapper(first, mask[:, cached:] if mask is not None else None, states, [])
    if not layers or any(part is None for parts in layers for part in parts):
        raise refuse_model(model, "its decoder fills no cache of keys and values.")
    layers = [(key, value, cross[:, :, :cached], other[:, :, :cached]) for key, value, cross, other in layers]
    batch_dim, encoder_dim = Dim("batch_size"), Dim("encoder_sequence_length")
    own_dims = {0: batch_dim, 2: Dim("past_decoder_sequence_length")}
    cross_dims = {0: batch_dim, 2: Dim("past_encoder_sequence_length")}
    state_dims = {0: batch_dim, 1: encoder_dim}
    numbers = range(len(layers))
    return Traceable(
        module=wrapper,
        inputs=(
            "input_ids",
            *(("encoder_attention_mask",) if masked else ()),
            "encoder_hidden_states",
            *(f"past_key_values.{layer}.{part}" for layer in numbers for part in _PARTS),
        ),
        outputs=("logits", *(f"present.{layer}.{part}" for layer in numbers for part in _PARTS)),
        args=(ids, mask, states, layers),
        dynamic_shapes=(
            {0: batch_dim, 1: Dim("sequence_length")},
            {0: batch_dim, 1: Dim("encoder_total_length")} if masked else None,
            state_dims,
            [(own_dims, own_dims, cross_dims, cross_dims)] * len(layers),
        ),
        finish=_read_states_once,
    )


def _read_states_once(graph: onnx_ir.Model) -> None:
    """Take nothing of encoder_hidden_states where the past of the encoder is there already."""
    import numpy as np
    import onnx_ir

    inputs = {value.name: value for value in graph.graph.inputs}
    states, past = inputs["encoder_hidden_states"], inputs["past_key_values.0.encoder.key"]
    readers = [(use.node, use.idx) for use in states.uses()]

    def constant(name: str, value: list[int]) -> onnx_ir.Value:
        tensor = onnx_ir.tensor(np.array(value, dtype=np.int64), name=name)
        made = onnx_ir.Value(name=name, const_value=tensor, type=onnx_ir.TensorType(tensor.dtype))
        graph.graph.initializers.add(made)
        return made

    none, one, all_of_it = constant("states.none", [0]), constant("states.axis", [1]), constant("states.all", [1 << 62])
    length = onnx_ir.node("Shape", [past], {"start": 2, "end": 3})
    is_empty = onnx_ir.node("Equal", [length.outputs[0], none])
    end = onnx_ir.node("Where", [is_empty.outputs[0], all_of_it, none])
    taken = onnx_ir.node("Slice", [states, none, end.outputs[0], one])
    taken.outputs[0].type = states.type
    graph.graph.insert_before(graph.graph[0], [length, is_empty, end, taken])
    for node, index in readers:
        node.replace_input_with(index, taken.outputs[0])
