"""A model without a cache: an encoder, or one with a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from exporters.onnx.architectures import output_names, refuse_model
from exporters.onnx.traceable import Traceable, forward_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def plain_graph(model: PreTrainedModel) -> Traceable:
    """A model without a cache: token inputs to the outputs that its head names."""
    import torch
    from torch.export import Dim

    arguments = forward_arguments(model)
    if model.main_input_name != "input_ids" or not {"input_ids", "attention_mask"} <= arguments:
        raise refuse_model(model, f"its input is {model.main_input_name}, and only models of tokens are exported.")
    # A classifier on a decoder would otherwise return its cache beside the logits.
    fixed = {"return_dict": True, **({"use_cache": False} if "use_cache" in vars(model.config) else {})}
    # RotaryEmbedding does not broadcast: positions of the whole batch, where transformers would make one row of them.
    rotary = "position_ids" in arguments and any(name.endswith("rotary_emb") for name, _ in model.named_modules())
    segments = "token_type_ids" in arguments and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    inputs = ("input_ids", "attention_mask", *(("token_type_ids",) if segments else ()))

    class Named(torch.nn.Module):
        def __init__(self, outputs: Sequence[str]) -> None:
            super().__init__()
            self.model = model
            self.outputs = outputs

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, ...]:
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            if token_type_ids is not None:
                given["token_type_ids"] = token_type_ids
            if rotary:
                given["position_ids"] = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
            output = self.model(**given, **fixed)
            return tuple(output[name] for name in self.outputs)

    batch, sequence = 2, 3
    args = tuple(
        torch.zeros(batch, sequence, dtype=torch.int64)
        if name == "token_type_ids"
        else torch.ones(batch, sequence, dtype=torch.int64)
        for name in inputs
    )
    probe = model(**dict(zip(inputs, args, strict=True)), **fixed)
    outputs = tuple(name for name in output_names(type(model).__name__) if probe.get(name) is not None)
    dims = {0: Dim("batch_size"), 1: Dim("sequence_length")}
    return Traceable(
        module=Named(outputs).eval(), inputs=inputs, outputs=outputs, args=args, dynamic_shapes=(dims,) * len(inputs)
    )
