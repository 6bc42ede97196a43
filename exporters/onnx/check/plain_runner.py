"""A graph without a cache, fed with tokens or pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from exporters.onnx.architectures import output_names
from exporters.onnx.check.answers import Inputs, answer_of, token_ids
from exporters.onnx.check.session import Opening, Refusal, Session
from exporters.onnx.saving import MODEL_FILE

_PADDING = 3


class PlainRunner:
    """`model.onnx` of a folder."""

    def __init__(self, folder: Path, architecture: str, opening: Opening) -> None:
        self._session = Session(folder / MODEL_FILE, opening)
        self._architecture = architecture
        self.provider = self._session.provider
        required = [name for name in output_names(architecture) if name != "pooler_output"]
        if missing := [name for name in required if name not in self._session.outputs]:
            raise Refusal(f"it has no output {', '.join(missing)}")

    def whole(self, inputs: Inputs) -> torch.Tensor:
        return self._answers([inputs], 0)[0]

    def stepwise(self, inputs: Inputs) -> None:
        return None

    def batched(self, samples: Sequence[Inputs]) -> list[torch.Tensor]:
        return self._answers(samples, _PADDING)

    def greedy(self, inputs: Inputs, count: int) -> list[int]:
        return []

    def _answers(self, samples: Sequence[Inputs], padding: int) -> list[torch.Tensor]:
        rows = [token_ids(sample) for sample in samples]
        width = max(map(len, rows)) + padding
        ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = row, 1
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        if "pixel_values" in samples[0]:
            known["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples]).float().numpy()
        outputs, _ = self._session.run(known)
        tensors = {name: torch.from_numpy(value) for name, value in outputs.items()}
        lengths = [len(row) or None for row in rows]
        return [
            answer_of(self._architecture, tensors, number, slice(0, length)) for number, length in enumerate(lengths)
        ]
