"""What the two sides are given and what they computed, in one form that can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = Mapping[str, Tensor]
"""Arguments of the model's forward, each with a batch of one: input_ids, pixel_values, decoder_input_ids, ..."""


@dataclass(frozen=True)
class Expected:
    """What torch computed. An answer is (rows, width): the logits of a prompt's tokens, or a head's outputs.

    greedy: the tokens, and the logits (tokens, vocabulary) they are the top of. tolerance: of float32, or of the half
    precision of the graph. kl_limit: likewise. rounding: the effect on the answers of rounding every weight.
    distributions: whether the rows are logits. seconds: for the greedy tokens.
    """

    answers: list[Tensor]
    greedy: list[tuple[list[int], Tensor]]
    tolerance: float
    kl_limit: float
    rounding: float | None
    distributions: bool
    seconds: float = 0.0


@dataclass(frozen=True)
class Got:
    """What ONNX Runtime computed; empty lists where it could not. padded: with the number of the prompt."""

    provider: str
    answers: list[Tensor] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)
    padded: list[tuple[int, Tensor]] = field(default_factory=list)
    greedy: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Exact:
    """How far a quantized graph with float activations is from torch on the numbers of its codes, and may be."""

    max_abs: float
    tolerance: float
    kl: float | None


@dataclass(frozen=True)
class Weights:
    """How many weights the graphs have, and how many of them are the checkpoint's."""

    total: int
    equal: int


def token_inputs(prompts: Sequence[Sequence[int]]) -> list[Inputs]:
    """Prompts as the inputs of a model of tokens."""
    return [{"input_ids": torch.tensor([list(prompt)])} for prompt in prompts]


def token_ids(inputs: Inputs) -> list[int]:
    """What a causal model's answer has a row for: the decoder's tokens where there are any."""
    return [int(token) for token in inputs.get("decoder_input_ids", inputs.get("input_ids", torch.empty(1, 0)))[0]]


def answer_of(architecture: str, outputs: Mapping[str, Tensor], row: int, tokens: slice) -> Tensor:
    """The outputs for one row of a batch as one matrix, of its real `tokens` only."""
    pooled = architecture.endswith(("ForSequenceClassification", "ForImageClassification"))
    parts = [value[row] if pooled or name == "pooler_output" else value[row][tokens] for name, value in outputs.items()]
    matrices = [part.float() if part.ndim == 2 else part.float().reshape(1, -1) for part in parts]
    if len({matrix.shape[1] for matrix in matrices}) > 1:
        return torch.cat([matrix.flatten() for matrix in matrices])[None]
    return torch.cat(matrices)
