"""A vision-language model's three graphs, put together as their user would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from exporters.onnx.check.answers import Inputs, token_ids
from exporters.onnx.check.decoder_runner import left_padded, positions, steps
from exporters.onnx.check.session import Opening, Refusal, Session
from exporters.onnx.encoder_decoder import DECODER_FILE
from exporters.onnx.vision_language import EMBEDDING_FILE, VISION_FILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

_PADDING = 3
_IMAGE_TOKEN_KEYS = ("image_token_id", "image_token_index")


class VisionLanguageRunner:
    """All three graphs of a folder, and its config.json, which names the image token."""

    def __init__(self, folder: Path, architecture: str, opening: Opening) -> None:
        self._vision = Session(folder / VISION_FILE, opening)
        self._embedding = Session(folder / EMBEDDING_FILE, opening)
        self._decoder = Session(folder / DECODER_FILE, opening)
        self.provider = self._decoder.provider
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = [config[key] for key in _IMAGE_TOKEN_KEYS if isinstance(config.get(key), int)]
        if not found:
            raise Refusal("its config.json does not say which token stands for an image")
        self._image_token = int(found[0])

    def whole(self, inputs: Inputs) -> torch.Tensor:
        embeds, mask = self._embed([inputs], 0)
        return torch.from_numpy(self._decode(embeds, mask, self._decoder.empty_cache(1))[0][0]).float()

    def stepwise(self, inputs: Inputs) -> torch.Tensor:
        embeds, mask = self._embed([inputs], 0)
        parts, cache, start = [], self._decoder.empty_cache(1), 0
        for end in steps(embeds.shape[1]):
            logits, cache = self._decode(embeds[:, start:end], mask[:, :end], cache)
            parts.append(torch.from_numpy(logits[0]).float())
            start = end
        return torch.cat(parts)

    def batched(self, samples: Sequence[Inputs]) -> list[torch.Tensor]:
        rows = [token_ids(sample) for sample in samples]
        embeds, mask = self._embed(samples, _PADDING)
        logits, _ = self._decode(embeds, mask, self._decoder.empty_cache(len(rows)))
        return [torch.from_numpy(logits[number, -len(row) :]).float() for number, row in enumerate(rows)]

    def greedy(self, inputs: Inputs, count: int) -> list[int]:
        embeds, mask = self._embed([inputs], 0)
        cache, tokens = self._decoder.empty_cache(1), []
        for _ in range(count):
            logits, cache = self._decode(embeds, mask, cache)
            tokens.append(int(logits[0, -1].argmax()))
            embeds = self._embedding.run({"input_ids": np.array([tokens[-1:]])})[0]["inputs_embeds"]
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        return tokens

    def _embed(self, samples: Sequence[Inputs], padding: int) -> tuple[Array, Array]:
        """Embeddings of tokens, with the features of the samples' pictures in the places of image tokens."""
        ids, mask = left_padded([token_ids(sample) for sample in samples], padding)
        embeds: Array = self._embedding.run({"input_ids": ids})[0]["inputs_embeds"].copy()
        pictures = [one[None] for sample in samples for one in sample.get("pixel_values", ())]
        if pictures:
            runs = [self._vision.run({"pixel_values": picture.float().numpy()})[0] for picture in pictures]
            features = np.concatenate([outputs["image_features"] for outputs in runs])
            places = (ids == self._image_token) & (mask == 1)
            if int(places.sum()) != len(features):
                raise Refusal(f"it makes {len(features)} image tokens where {int(places.sum())} are wanted")
            embeds[places] = features
        return embeds, mask

    def _decode(self, embeds: Array, mask: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        outputs, grown = self._decoder.run({"inputs_embeds": embeds, **positions(mask, embeds.shape[1]), **cache})
        return outputs["logits"], grown
