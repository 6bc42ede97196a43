"""A vision-language model as three graphs: the image encoder, the embedding of tokens, and the decoder.

    vision_encoder.onnx
        pixel_values                   dtype (1, channels, height, width), one picture of the model's own size
        image_features                 dtype (image tokens, width)
    embed_tokens.onnx
        input_ids                      int64 (batch, sequence)
        inputs_embeds                  dtype (batch, sequence, width)
    decoder_model_merged.onnx
        inputs_embeds                  dtype (batch, sequence, width), and the rest as a causal language model takes it

Whoever runs them puts image_features in the places of the image tokens, in order. These are the names that
transformers.js uses. A model whose pictures need more than pixels (grids of tiles, masks), or whose attention among
image tokens is not causal, has no such decoder and is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporters.onnx.architectures import refuse_model
from exporters.onnx.decoder import decoder_graph
from exporters.onnx.encoder_decoder import DECODER_FILE
from exporters.onnx.plain import picture_shape
from exporters.onnx.traceable import Traceable, forward_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VISION_FILE = "vision_encoder.onnx"
EMBEDDING_FILE = "embed_tokens.onnx"


def vision_language_graphs(model: PreTrainedModel) -> Mapping[str, Traceable]:
    """All three. Raises UnavailableError for what they cannot hold."""
    encode = getattr(model, "get_image_features", None)
    arguments = forward_arguments(model)
    if encode is None or "pixel_values" not in arguments:
        raise refuse_model(model, "transformers has no image encoder of its own in it (get_image_features).")
    if "token_type_ids" in arguments or "mm_token_type_ids" in arguments:
        raise refuse_model(model, "its image tokens see each other both ways, or have positions in three axes.")
    parameters = inspect.signature(encode).parameters.values()
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    shaped = sorted(name for name in arguments if name.startswith(("image_grid", "image_sizes", "pixel_attention")))
    if needed != ["pixel_values"] or (shaped and not _sizes_are_unused(model)):
        raise refuse_model(model, f"its pictures come with {', '.join(shaped or needed)}, which shape the computation.")
    return {
        VISION_FILE: _vision(model),
        EMBEDDING_FILE: _embedding(model),
        DECODER_FILE: decoder_graph(model, "inputs_embeds"),
    }


def _sizes_are_unused(model: PreTrainedModel) -> bool:
    """LLaVA takes image_sizes for the sake of Pixtral, another image encoder."""
    vision: Any = getattr(model.config, "vision_config", None)
    return getattr(model.config, "model_type", "") == "llava" and getattr(vision, "model_type", "") != "pixtral"


def image_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """(image tokens of all pictures, width)."""
    import torch

    found = model.get_image_features(pixel_values=pixel_values)
    found = getattr(found, "pooler_output", found)
    parts = list(found) if isinstance(found, (list, tuple)) else [found]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _vision(model: PreTrainedModel) -> Traceable:
    import torch

    class Vision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return image_features(self.model, pixel_values)

    # One picture a run: transformers cuts the features into a list of the pictures', whose length a trace fixes.
    pixels = torch.zeros(1, *picture_shape(model), dtype=model.dtype)
    return Traceable(Vision().eval(), ("pixel_values",), ("image_features",), (pixels,), ({},))


def _embedding(model: PreTrainedModel) -> Traceable:
    import torch
    from torch.export import Dim

    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            embedded: torch.Tensor = self.model.get_input_embeddings()(input_ids)
            return embedded

    ids = torch.ones(2, 3, dtype=torch.int64)
    dims = {0: Dim("batch_size"), 1: Dim("sequence_length")}
    return Traceable(Embedding().eval(), ("input_ids",), ("inputs_embeds",), (ids,), (dims,))
