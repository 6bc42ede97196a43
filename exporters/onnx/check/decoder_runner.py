"""A causal language model's graph, fed with tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from exporters.onnx.check.answers import Inputs, token_ids
from exporters.onnx.check.session import Opening, Refusal, Session
from exporters.onnx.saving import MODEL_FILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

_PADDING = 3  # columns beyond the longest prompt, so that every row is padded
_SINGLE_STEPS = 8  # tokens at the end of each prompt that are fed one at a time


class DecoderRunner:
    """`model.onnx` of a folder."""

    def __init__(self, folder: Path, architecture: str, opening: Opening) -> None:
        self._session = Session(folder / MODEL_FILE, opening)
        self.provider = self._session.provider
        if "logits" not in self._session.outputs:
            raise Refusal("it has no output logits")

    def whole(self, inputs: Inputs) -> torch.Tensor:
        ids, mask = left_padded([token_ids(inputs)])
        return torch.from_numpy(self._run(ids, mask, self._session.empty_cache(1))[0][0]).float()

    def stepwise(self, inputs: Inputs) -> torch.Tensor:
        ids, mask = left_padded([token_ids(inputs)])
        parts, cache, start = [], self._session.empty_cache(1), 0
        for end in steps(ids.shape[1]):
            logits, cache = self._run(ids[:, start:end], mask[:, :end], cache)
            parts.append(torch.from_numpy(logits[0]).float())
            start = end
        return torch.cat(parts)

    def batched(self, samples: Sequence[Inputs]) -> list[torch.Tensor]:
        rows = [token_ids(sample) for sample in samples]
        ids, mask = left_padded(rows, _PADDING)
        first, cache = self._run(ids[:, :-1], mask[:, :-1], self._session.empty_cache(len(rows)))
        last, _ = self._run(ids[:, -1:], mask, cache)
        logits = torch.from_numpy(np.concatenate([first, last], axis=1)).float()
        return [logits[number, ids.shape[1] - len(row) :] for number, row in enumerate(rows)]

    def greedy(self, inputs: Inputs, count: int) -> list[int]:
        ids, mask = left_padded([token_ids(inputs)])
        cache, tokens = self._session.empty_cache(1), []
        for _ in range(count):
            logits, cache = self._run(ids, mask, cache)
            tokens.append(int(logits[0, -1].argmax()))
            ids, mask = np.array([tokens[-1:]], dtype=np.int64), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        return tokens

    def _run(self, ids: Array, mask: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """The logits of the last ids.shape[1] of mask.shape[1] tokens, and the cache with these tokens in it."""
        outputs, grown = self._session.run({"input_ids": ids, **positions(mask, ids.shape[1]), **cache})
        return outputs["logits"], grown


def left_padded(rows: Sequence[Sequence[int]], padding: int = 0) -> tuple[Array, Array]:
    """Token ids and attention mask (rows, width); padding is token 0, which the mask makes irrelevant."""
    width = max(map(len, rows)) + padding
    ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :], mask[number, width - len(row) :] = row, 1
    return ids, mask


def positions(mask: Array, last: int) -> dict[str, Array]:
    """The mask, and the positions of its `last` columns: how many tokens came before."""
    return {"attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -last:]}


def steps(length: int) -> list[int]:
    """Where runs over a prompt end: the first token, a chunk, the last few one at a time."""
    last = max(1, length - _SINGLE_STEPS)
    return sorted({1, *range(last, length + 1)})
