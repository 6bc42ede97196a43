"""What the two sides computed, in one form that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Expected:
    """What torch computed. An answer is (rows, width): the logits of a prompt's tokens, or a head's outputs."""

    answers: list[torch.Tensor]
    greedy: list[tuple[list[int], torch.Tensor]]  # the tokens, and the logits (tokens, vocabulary) they are the top of
    tolerance: float
    rounding: float | None  # the effect on the answers of rounding every weight
    distributions: bool  # whether the rows are logits


@dataclass(frozen=True)
class Got:
    """What ONNX Runtime computed; empty lists where it could not."""

    provider: str
    answers: list[torch.Tensor]
    decoded: list[torch.Tensor]
    padded: list[tuple[int, torch.Tensor]]  # with the number of the prompt
    greedy: list[list[int]]


@dataclass(frozen=True)
class Weights:
    total: int
    equal: int


def answer_of(architecture: str, outputs: Mapping[str, torch.Tensor], row: int, tokens: slice) -> torch.Tensor:
    """The outputs for one row of a batch as one matrix, of its real `tokens` only."""
    import torch

    pooled = architecture.endswith("ForSequenceClassification")
    parts = [value[row] if pooled or name == "pooler_output" else value[row][tokens] for name, value in outputs.items()]
    return torch.cat([part if part.ndim == 2 else part[None] for part in parts])
