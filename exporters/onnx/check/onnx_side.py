"""What ONNX Runtime computes from the exported graph: whole prompts, through the cache, padded, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dora_serve.onnx_engine.adapters import Feeding
from exporters.onnx.architectures import is_causal, output_names
from exporters.onnx.check.answers import Got, answer_of
from exporters.onnx.check.session import NOTHING, Refusal, Session

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]


_PADDED_ROWS = 3


_PADDING = 3  # columns beyond the longest prompt, so that every row is padded


_SINGLE_STEPS = 8  # tokens at the end of each prompt that are fed one at a time


def run_onnx(
    path: Path,
    device: str,
    architecture: str,
    prompts: Sequence[Sequence[int]],
    greedy_tokens: int,
    failures: list[str],
    *,
    feeding: Feeding = NOTHING,
    padded_rows: int = _PADDED_ROWS,
) -> Got:
    """feeding: what the graph is given besides tokens, such as an adapter. What goes wrong is added to `failures`."""
    causal = is_causal(architecture)
    try:
        session = Session(path, device, feeding)
        if missing := [name for name in _required_outputs(architecture) if name not in session.outputs]:
            raise Refusal(f"it has no output {', '.join(missing)}")
        return Got(
            provider=session.provider,
            answers=[_whole(session, architecture, prompt) for prompt in prompts],
            decoded=[_stepwise(session, prompt) for prompt in prompts] if causal else [],
            padded=_padded(session, architecture, prompts, padded_rows),
            greedy=[_onnx_greedy(session, prompt, greedy_tokens) for prompt in prompts] if causal else [],
        )
    except Refusal as refusal:
        failures.append(f"ONNX Runtime cannot run the model: {refusal}.")
        return Got(provider="none", answers=[], decoded=[], padded=[], greedy=[])


def whole_answers(
    path: Path, device: str, architecture: str, prompts: Sequence[Sequence[int]], failures: list[str], feeding: Feeding
) -> list[torch.Tensor]:
    """The answers on whole prompts alone, none where ONNX Runtime cannot give them."""
    try:
        session = Session(path, device, feeding)
        return [_whole(session, architecture, prompt) for prompt in prompts]
    except Refusal as refusal:
        failures.append(f"ONNX Runtime cannot run the model: {refusal}.")
        return []


def _required_outputs(architecture: str) -> tuple[str, ...]:
    return tuple(name for name in output_names(architecture) if name != "pooler_output")


def _batch(prompts: Sequence[Sequence[int]], width: int, left: bool) -> tuple[Array, Array]:
    """Token ids and attention mask (len(prompts), width); padding is token 0, which the mask makes irrelevant."""
    ids, mask = np.zeros((2, len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        real = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, real], mask[row, real] = prompt, 1
    return ids, mask


def _whole(session: Session, architecture: str, prompt: Sequence[int]) -> torch.Tensor:
    ids, mask = _batch([prompt], len(prompt), left=True)
    outputs, _ = session.run(ids, mask, session.empty_cache(1))
    return answer_of(architecture, outputs, 0, slice(None))


def _stepwise(session: Session, prompt: Sequence[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary) through the cache: the first token, a chunk, the last few one at a time."""
    import torch

    ids, mask = _batch([prompt], len(prompt), left=True)
    ends = sorted(
        {1, max(1, len(prompt) - _SINGLE_STEPS), *range(max(1, len(prompt) - _SINGLE_STEPS), len(prompt) + 1)}
    )
    parts, cache, start = [], session.empty_cache(1), 0
    for end in ends:
        outputs, cache = session.run(ids[:, start:end], mask[:, :end], cache)
        parts.append(outputs["logits"][0])
        start = end
    return torch.cat(parts)


def _padded(
    session: Session, architecture: str, prompts: Sequence[Sequence[int]], count: int
) -> list[tuple[int, torch.Tensor]]:
    """Answers for a batch of prompts of different lengths, by the prompt's number."""
    import torch

    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    numbers = [by_length[round(row * (len(by_length) - 1) / (count - 1))] for row in range(count)]
    rows = [prompts[number] for number in numbers]
    width = max(map(len, rows)) + _PADDING
    causal = is_causal(architecture)
    ids, mask = _batch(rows, width, left=causal)
    cache = session.empty_cache(len(rows))
    if not causal:
        outputs, _ = session.run(ids, mask, cache)
        return [
            (number, answer_of(architecture, outputs, row, slice(0, len(rows[row]))))
            for row, number in enumerate(numbers)
        ]
    first, cache = session.run(ids[:, :-1], mask[:, :-1], cache)
    last, _ = session.run(ids[:, -1:], mask, cache)
    logits = torch.cat([first["logits"], last["logits"]], dim=1)
    return [(number, logits[row, width - len(rows[row]) :]) for row, number in enumerate(numbers)]


def _onnx_greedy(session: Session, prompt: Sequence[int], count: int) -> list[int]:
    ids, mask = _batch([prompt], len(prompt), left=True)
    cache, tokens = session.empty_cache(1), []
    for _ in range(count):
        outputs, cache = session.run(ids, mask, cache)
        tokens.append(int(outputs["logits"][0, -1].argmax()))
        ids, mask = np.array([tokens[-1:]], dtype=np.int64), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    return tokens
