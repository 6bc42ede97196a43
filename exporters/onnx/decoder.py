"""A causal language model as one graph with its cache as plain inputs and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporters.onnx.architectures import refuse_model
from exporters.onnx.traceable import Traceable, forward_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def decoder_graph(model: PreTrainedModel) -> Traceable:
    """A causal language model with its cache as a flat list of keys and values."""
    import torch
    from torch.export import Dim
    from transformers import DynamicCache

    lacking = {"input_ids", "attention_mask", "position_ids", "past_key_values"} - forward_arguments(model)
    if lacking:
        raise refuse_model(model, f"its forward takes no {', '.join(sorted(lacking))}.")
    if model._is_stateful:
        raise refuse_model(model, "it keeps a recurrent state, which the graph's cache of keys and values cannot hold.")

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past: list[tuple[torch.Tensor, torch.Tensor]],
        ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
            # Without the config the cache keeps every token, and the mask alone makes a sliding window. A cache that
            # drops tokens branches on its length, and a trace would keep one branch.
            cache = DynamicCache()
            for layer, (key, value) in enumerate(past):
                cache.update(key, value, layer)
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            layers: list[Any] = cache.layers
            return output.logits, [(layer.keys, layer.values) for layer in layers]

    # Distinct sizes above 1, so that no two axes can be taken for one another.
    batch, sequence, past = 2, 3, 5
    wrapper = Flat().eval()
    _, layers = wrapper(*sample_tokens(batch, past, past), [])
    if not layers or any(key is None for key, _ in layers):
        raise refuse_model(model, "its forward fills no cache of keys and values.")
    batch_dim, sequence_dim = Dim("batch_size"), Dim("sequence_length")
    # The total is a dimension of its own: torch.export takes no sum of two as one.
    past_dim, total_dim = Dim("past_sequence_length"), Dim("total_sequence_length")
    cache_dims = {0: batch_dim, 2: past_dim}
    parts = [f"{layer}.{part}" for layer in range(len(layers)) for part in ("key", "value")]
    return Traceable(
        module=wrapper,
        inputs=("input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)),
        outputs=("logits", *(f"present.{part}" for part in parts)),
        args=(*sample_tokens(batch, sequence, past + sequence), layers),
        dynamic_shapes=(
            {0: batch_dim, 1: sequence_dim},
            {0: batch_dim, 1: total_dim},
            {0: batch_dim, 1: sequence_dim},
            [(cache_dims, cache_dims)] * len(layers),
        ),
    )


def sample_tokens(batch: int, sequence: int, total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and position_ids for the last `sequence` of `total` tokens."""
    import torch

    ids = torch.ones(batch, sequence, dtype=torch.int64)
    positions = torch.arange(total - sequence, total).expand(batch, sequence).contiguous()
    return ids, torch.ones(batch, total, dtype=torch.int64), positions
