"""What ONNX Runtime computes from the exported graphs: whole prompts, through the cache, in a batch, greedily."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from exporters.onnx.architectures import Kind, kind_of
from exporters.onnx.check.answers import Got, Inputs
from exporters.onnx.check.decoder_runner import DecoderRunner
from exporters.onnx.check.encoder_decoder_runner import EncoderDecoderRunner
from exporters.onnx.check.plain_runner import PlainRunner
from exporters.onnx.check.session import Opening, Refusal
from exporters.onnx.check.vision_language_runner import VisionLanguageRunner

_BATCH = 4


class Runner(Protocol):
    """The graphs of one folder, run as their user would. Each raises Refusal where ONNX Runtime does.

    whole: the answer for one sample in one run. stepwise: the same positions through the cache, None without one.
    batched: the answers for several samples in one batch. greedy: tokens that follow, empty without a cache.
    """

    provider: str

    def whole(self, inputs: Inputs) -> torch.Tensor: ...

    def stepwise(self, inputs: Inputs) -> torch.Tensor | None: ...

    def batched(self, samples: Sequence[Inputs]) -> list[torch.Tensor]: ...

    def greedy(self, inputs: Inputs, count: int) -> list[int]: ...


_RUNNERS: Mapping[Kind, Callable[[Path, str, Opening], Runner]] = {
    "decoder": DecoderRunner,
    "encoder-decoder": EncoderDecoderRunner,
    "vision-language": VisionLanguageRunner,
    "plain": PlainRunner,
}


def run_onnx(
    folder: Path,
    architecture: str,
    opening: Opening,
    samples: Sequence[Inputs],
    greedy_tokens: int,
    failures: list[str],
    make: Callable[[Opening], Runner] | None = None,
) -> Got:
    """Everything that ONNX Runtime is to compute; what it refuses goes to `failures`.

    make: the runner, where it is not the one of the architecture's kind.
    """
    try:
        runner = make(opening) if make else _RUNNERS[kind_of(architecture)](folder, architecture, opening)
        answers = [runner.whole(sample) for sample in samples]
        steps = [runner.stepwise(sample) for sample in samples]
        began = time.perf_counter()
        greedy = [runner.greedy(sample, greedy_tokens) for sample in samples]
        seconds = time.perf_counter() - began
        numbers = _rows(samples)
        batch = runner.batched([samples[number] for number in numbers])
        return Got(
            provider=runner.provider,
            answers=answers,
            decoded=[step for step in steps if step is not None],
            padded=list(zip(numbers, batch, strict=True)),
            greedy=[tokens for tokens in greedy if tokens],
            seconds=seconds,
        )
    except Refusal as refusal:
        failures.append(f"ONNX Runtime cannot run the model: {refusal}.")
        return Got(provider="none")


def whole_answers(
    folder: Path,
    architecture: str,
    opening: Opening,
    samples: Sequence[Inputs],
    failures: list[str],
    make: Callable[[Opening], Runner] | None = None,
) -> list[torch.Tensor]:
    """The answers on whole prompts alone, none where ONNX Runtime cannot give them. make: as for `run_onnx`."""
    try:
        runner = make(opening) if make else _RUNNERS[kind_of(architecture)](folder, architecture, opening)
        return [runner.whole(sample) for sample in samples]
    except Refusal as refusal:
        failures.append(f"ONNX Runtime cannot run the model: {refusal}.")
        return []


def _rows(samples: Sequence[Inputs]) -> list[int]:
    """Which samples a batch has: the shortest, the longest, and some between."""

    def length(number: int) -> int:
        return max(value.shape[1] for value in samples[number].values())

    by_length = sorted(range(len(samples)), key=length)
    return [by_length[round(row * (len(by_length) - 1) / (_BATCH - 1))] for row in range(_BATCH)]
