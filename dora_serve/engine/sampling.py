"""How the next token is chosen from the logits of one row: a function of the logits, the text so far, and the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_serve.errors import EngineError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_p 1 and top_k 0 cut nothing off; repetition_penalty 1 does nothing.

    seed: None draws one, so that two runs differ. The meaning of each is that of transformers' generate, in its order.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def require_sound(self) -> None:
        """Raise EngineError for a value that means nothing."""
        finite = all(math.isfinite(value) for value in (self.temperature, self.top_p, self.repetition_penalty))
        for name, value, sound, wanted in (
            ("temperature", self.temperature, finite and self.temperature >= 0, "0 or more"),
            ("top_p", self.top_p, finite and 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty, finite and self.repetition_penalty > 0, "more than 0"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 1 << 63, "0 or more, below 2**63"),
        ):
            if not sound:
                raise EngineError(f"{name} is {value}, wanted {wanted}.", remedy="Correct the request.", name=name)


def new_generator(sampling: Sampling) -> torch.Generator:
    """The source of a request's randomness: its own, on the CPU, so that no other request and no device changes it."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(logits: Tensor, sampling: Sampling, so_far: Sequence[int], generator: torch.Generator) -> int:
    """The next token of a row: logits (vocabulary,) in float32, so_far the prompt and what followed it."""
    scores = _warped(logits, sampling, so_far)
    if sampling.temperature == 0:
        return int(scores.argmax())
    probabilities = torch.softmax(scores, dim=-1).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _warped(logits: Tensor, sampling: Sampling, so_far: Sequence[int]) -> Tensor:
    if (sampling.temperature, sampling.repetition_penalty) == (0, 1):
        return logits
    from transformers.generation import logits_process

    steps: list[logits_process.LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        steps.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 0:
        steps.append(logits_process.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            steps.append(logits_process.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(logits_process.TopPLogitsWarper(sampling.top_p))
    scores, tokens = logits[None], torch.tensor([list(so_far)], device=logits.device)
    for step in steps:
        scores = step(tokens, scores)
    return scores[0]
