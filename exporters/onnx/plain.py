"""A model without a cache: an encoder, or one with a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from exporters.onnx.architectures import output_names, refuse_model
from exporters.onnx.traceable import Traceable, forward_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def plain_graph(model: PreTrainedModel) -> Traceable:
    """A model without a cache: tokens or pictures to the outputs that its head names.

        input_ids, attention_mask      int64 (batch, sequence); token_type_ids too where the model tells segments apart
        pixel_values                   dtype (batch, channels, height, width), of the model's own size, in their place

    Raises UnavailableError for a model of another input.
    """
    import torch
    from torch.export import Dim

    # A classifier on a decoder would otherwise return its cache beside the logits.
    fixed = {"return_dict": True, **({"use_cache": False} if "use_cache" in vars(model.config) else {})}
    # RotaryEmbedding does not broadcast: positions of the whole batch, where transformers would make one row of them.
    is_rotary = any(name.endswith("rotary_emb") for name, _ in model.named_modules())
    rotary = is_rotary and "position_ids" in forward_arguments(model)
    inputs = sample_inputs(model)
    names = tuple(inputs)

    class Named(torch.nn.Module):
        def __init__(self, outputs: Sequence[str]) -> None:
            super().__init__()
            self.model = model
            self.outputs = outputs

        def forward(
            self, first: torch.Tensor, second: torch.Tensor | None = None, third: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, ...]:
            given = dict(zip(names, (first, second, third), strict=False))
            if rotary:
                given["position_ids"] = torch.arange(first.shape[1]).expand(first.shape)
            output = self.model(**given, **fixed)
            return tuple(output[name] for name in self.outputs)

    probe = model(**inputs, **fixed)
    outputs = tuple(name for name in output_names(type(model).__name__) if probe.get(name) is not None)
    if not outputs:
        raise refuse_model(model, f"it gives no {output_names(type(model).__name__)[0]}.")
    dims = {0: Dim("batch_size"), **({1: Dim("sequence_length")} if "input_ids" in inputs else {})}
    return Traceable(
        module=Named(outputs).eval(),
        inputs=names,
        outputs=outputs,
        args=tuple(inputs.values()),
        dynamic_shapes=(dims,) * len(inputs),
    )


def sample_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs of a batch of two, by name in the graph's order."""
    import torch

    arguments = forward_arguments(model)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.zeros(2, *picture_shape(model), dtype=model.dtype)}
    if model.main_input_name != "input_ids" or not {"input_ids", "attention_mask"} <= arguments:
        raise refuse_model(
            model, f"its input is {model.main_input_name}, and only models of tokens and pictures are exported."
        )
    ids = torch.ones(2, 3, dtype=torch.int64)
    segments = "token_type_ids" in arguments and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **({"token_type_ids": torch.zeros_like(ids)} if segments else {}),
    }


def picture_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """(channels, height, width), as the configuration says, else 3 channels of 224 pixels."""
    config: Any = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    return channels, height, width
