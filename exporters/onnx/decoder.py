"""A causal language model as one graph with its cache as plain inputs and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from exporters.onnx.architectures import refuse_model
from exporters.onnx.traceable import Traceable, forward_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def decoder_graph(model: PreTrainedModel, main: Literal["input_ids", "inputs_embeds"] = "input_ids") -> Traceable:
    """A causal language model with its cache as a flat list of keys and values.

    main: whether it takes tokens or what an embedding made of them, dtype (batch, sequence, width). position_ids are
    no input where the model takes its positions from the attention mask.
    """
    import torch
    from torch.export import Dim
    from transformers import DynamicCache

    arguments = forward_arguments(model)
    lacking = {main, "attention_mask", "past_key_values"} - arguments
    positioned = "position_ids" in arguments
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
            first: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor | None,
            past: list[tuple[torch.Tensor, torch.Tensor]],
        ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
            # Without the config the cache keeps every token, and the mask alone makes a sliding window. A cache that
            # drops tokens branches on its length, and a trace would keep one branch.
            cache = DynamicCache()
            for layer, (key, value) in enumerate(past):
                cache.update(key, value, layer)
            given = {main: first, **({"position_ids": position_ids} if positioned else {})}
            output = self.model(attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given)
            layers: list[Any] = cache.layers
            return output.logits, [(layer.keys, layer.values) for layer in layers]

    # Distinct sizes above 1, so that no two axes can be taken for one another.
    batch, sequence, past = 2, 3, 5
    wrapper = Flat().eval()

    def tokens(sequence: int, total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        ids, mask, positions = sample_tokens(batch, sequence, total)
        first = ids if main == "input_ids" else model.get_input_embeddings()(ids)
        return first, mask, positions if positioned else None

    _, layers = wrapper(*tokens(past, past), [])
    if not layers or any(key is None for key, _ in layers):
        raise refuse_model(model, "its forward fills no cache of keys and values.")
    batch_dim, sequence_dim = Dim("batch_size"), Dim("sequence_length")
    # The total is a dimension of its own: torch.export takes no sum of two as one.
    past_dim, total_dim = Dim("past_sequence_length"), Dim("total_sequence_length")
    cache_dims = {0: batch_dim, 2: past_dim}
    parts = [f"{layer}.{part}" for layer in range(len(layers)) for part in ("key", "value")]
    return Traceable(
        module=wrapper,
        inputs=(
            main,
            "attention_mask",
            *(("position_ids",) if positioned else ()),
            *(f"past_key_values.{part}" for part in parts),
        ),
        outputs=("logits", *(f"present.{part}" for part in parts)),
        args=(*tokens(sequence, past + sequence), layers),
        dynamic_shapes=(
            {0: batch_dim, 1: sequence_dim},
            {0: batch_dim, 1: total_dim},
            {0: batch_dim, 1: sequence_dim} if positioned else None,
            [(cache_dims, cache_dims)] * len(layers),
        ),
    )


def sample_tokens(batch: int, sequence: int, total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and position_ids for the last `sequence` of `total` tokens."""
    import torch

    ids = torch.ones(batch, sequence, dtype=torch.int64)
    positions = torch.arange(total - sequence, total).expand(batch, sequence).contiguous()
    return ids, torch.ones(batch, total, dtype=torch.int64), positions
