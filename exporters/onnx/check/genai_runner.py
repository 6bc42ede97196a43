"""The graph of an ONNX Runtime GenAI folder: its logits in plain ONNX Runtime, its tokens by that runtime itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from exporters.onnx.check.answers import Inputs, token_ids
from exporters.onnx.check.decoder_runner import DecoderRunner
from exporters.onnx.check.session import Opening
from exporters.onnx.genai import generate

_PADDING = 3


class GenaiRunner(DecoderRunner):
    """A batch is padded on the right: the graph counts positions by the ones of the attention mask."""

    def __init__(
        self,
        folder: Path,
        architecture: str,
        opening: Opening,
        samples: Sequence[Inputs],
        python: str | None,
        adapter: Path | None = None,
    ) -> None:
        """python: of the runtime's environment. adapter: the file that is fed."""
        super().__init__(folder, architecture, opening)
        self._folder, self._python, self._adapter = folder, python, adapter
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self._session.head_size = int(config["model"]["decoder"]["head_size"])
        # The runtime runs a folder where it was made for, and nowhere else.
        elsewhere = bool(config["model"]["decoder"]["session_options"].get("provider_options"))
        self._runs_here = opening.device.startswith("cuda") or not elsewhere
        self._prompts = [token_ids(sample) for sample in samples]
        self._continued: list[list[int]] | None = None

    def batched(self, samples: Sequence[Inputs]) -> list[torch.Tensor]:
        rows = [token_ids(sample) for sample in samples]
        width = max(map(len, rows)) + _PADDING
        ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = row, 1
        logits, _ = self._run(ids, mask, self._session.empty_cache(len(rows)))
        return [torch.from_numpy(logits[number, : len(row)]).float() for number, row in enumerate(rows)]

    def greedy(self, inputs: Inputs, count: int) -> list[int]:
        if not self._runs_here or not count:
            return super().greedy(inputs, count)
        if self._continued is None:  # one process for all of them
            self._continued = generate(self._folder, self._prompts, count, self._python, self._adapter)
        return self._continued[self._prompts.index(token_ids(inputs))]
