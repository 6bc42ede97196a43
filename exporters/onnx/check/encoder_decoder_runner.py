"""An encoder-decoder's two graphs, fed with what is encoded and with the decoder's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from exporters.onnx.check.answers import Inputs, token_ids
from exporters.onnx.check.decoder_runner import steps
from exporters.onnx.check.session import Opening, Session
from exporters.onnx.encoder_decoder import DECODER_FILE, ENCODER_FILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

_PADDING = 3


class EncoderDecoderRunner:
    """Both graphs of a folder."""

    def __init__(self, folder: Path, architecture: str, opening: Opening) -> None:
        self._encoder, self._decoder = (
            Session(folder / ENCODER_FILE, opening),
            Session(folder / DECODER_FILE, opening),
        )
        self.provider = self._decoder.provider

    def whole(self, inputs: Inputs) -> torch.Tensor:
        encoded = self._encode([inputs], 0)
        ids = np.array([token_ids(inputs)])
        return torch.from_numpy(self._decode(ids, encoded, self._decoder.empty_cache(1))[0][0]).float()

    def stepwise(self, inputs: Inputs) -> torch.Tensor:
        encoded, ids = self._encode([inputs], 0), np.array([token_ids(inputs)])
        parts, cache, start = [], self._decoder.empty_cache(1), 0
        for end in steps(ids.shape[1]):
            logits, cache = self._decode(ids[:, start:end], encoded, cache)
            parts.append(torch.from_numpy(logits[0]).float())
            start = end
        return torch.cat(parts)

    def batched(self, samples: Sequence[Inputs]) -> list[torch.Tensor]:
        """What is encoded is padded on the right; the decoder's rows begin together, and are compared to their ends."""
        encoded, rows = self._encode(samples, _PADDING), [token_ids(sample) for sample in samples]
        ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
        cache = self._decoder.empty_cache(len(rows))
        first, cache = self._decode(ids[:, :1], encoded, cache)
        parts = [first]
        if ids.shape[1] > 1:
            rest, _ = self._decode(ids[:, 1:], encoded, cache)
            parts.append(rest)
        logits = torch.from_numpy(np.concatenate(parts, axis=1)).float()
        return [logits[number, : len(row)] for number, row in enumerate(rows)]

    def greedy(self, inputs: Inputs, count: int) -> list[int]:
        encoded, ids = self._encode([inputs], 0), np.array([token_ids(inputs)])
        cache, tokens = self._decoder.empty_cache(1), []
        for _ in range(count):
            logits, cache = self._decode(ids, encoded, cache)
            tokens.append(int(logits[0, -1].argmax()))
            ids = np.array([tokens[-1:]], dtype=np.int64)
        return tokens

    def _encode(self, samples: Sequence[Inputs], padding: int) -> dict[str, Array]:
        if "input_ids" in samples[0]:
            rows = [sample["input_ids"][0].numpy() for sample in samples]
            ids, mask = np.zeros((2, len(rows), max(map(len, rows)) + padding), dtype=np.int64)
            for number, row in enumerate(rows):
                ids[number, : len(row)], mask[number, : len(row)] = row, 1
            known = {"input_ids": ids, "attention_mask": mask}
        else:
            known = {"input_features": torch.cat([sample["input_features"] for sample in samples]).float().numpy()}
        outputs, _ = self._encoder.run(known)
        masks = {"encoder_attention_mask": known["attention_mask"]} if "attention_mask" in known else {}
        return {"encoder_hidden_states": outputs["last_hidden_state"], **masks}

    def _decode(self, ids: Array, encoded: dict[str, Array], cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        outputs, grown = self._decoder.run({"input_ids": ids, **encoded, **cache})
        return outputs["logits"], grown
