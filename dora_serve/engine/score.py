"""One text under several adapters: what each would have made of every token, and how far it is from the base.

The rows decode the same tokens (teacher forcing), so that their distributions can be compared place by place.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dora_serve.engine.adapted_linear import Batch
from dora_serve.engine.requests import Request
from dora_serve.errors import EngineError

if TYPE_CHECKING:
    from dora_serve.engine.engine import Engine


_MOST_LOGITS = 1 << 26
"""Numbers that are held at once, 256 MB in float32: a longer text goes through the model in pieces."""


@dataclass(frozen=True)
class Score:
    """A row. Of every token but the first: its log-probability, and the KL divergence (nats) of the first row's
    distribution from this one's, KL(first || this), there; zeros for the first row.
    """

    adapter: str | None
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    kl: tuple[float, ...]


def score(
    engine: Engine, text: str | Sequence[int], adapters: Sequence[str | None], *, prompt: str | Sequence[int] = ""
) -> tuple[Score, ...]:
    """Score `text`, after `prompt` where there is one, under each of the adapters (None: the base), in one batch.

    The first is what the others are compared with. The places of the prompt are left out, and of a text without one
    the first token. Raises EngineError where there is nothing to score, or no such adapter.
    """
    if isinstance(adapters, str) or not adapters:
        raise EngineError("No list of adapters is given to score with.", remedy="Name some, [None] for the base.")
    before = engine.tokenize(Request(prompt)) if prompt else []
    after = engine.tokenize(Request(text), special=not before)  # a text that goes on has no beginning of its own
    tokens = before + after
    if engine.context is not None and len(tokens) > engine.context:
        raise EngineError(
            f"The text has {len(tokens)} tokens with its prompt, and the context has room for {engine.context}.",
            remedy="Shorten it, or score it in parts.",
            tokens=len(tokens),
            context=engine.context,
        )
    if len(tokens) < 2:
        raise EngineError("A text of one token has nothing to score.", remedy="Give a longer one, or a prompt.")
    start = max(1, len(before))
    found: list[_Row] = [_Row(name) for name in adapters]
    with ExitStack() as leases:
        rows = [None if name is None else leases.enter_context(engine.pool.lease(name)) for name in adapters]
        batch = Batch(tuple(rows), by_row=engine.by_row)
        inputs = torch.tensor([tokens] * len(rows), device=engine.device)
        place = 0
        for logits in engine.forward_in_pieces(batch, inputs, max(1, _MOST_LOGITS // (len(rows) * engine.vocabulary))):
            first, last = max(start - 1, place), min(place + logits.shape[1], len(tokens) - 1)
            if first < last:
                followed = torch.tensor(tokens[first + 1 : last + 1], device=engine.device)
                _add(found, logits[:, first - place : last - place], followed)
            place += logits.shape[1]
    return tuple(Score(row.adapter, tuple(tokens[start:]), tuple(row.logprobs), tuple(row.kl)) for row in found)


@dataclass
class _Row:
    """A score as far as it is known."""

    adapter: str | None
    logprobs: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


def _add(found: Sequence[_Row], logits: Tensor, followed: Tensor) -> None:
    """logits (rows, places, vocabulary), and the tokens (places,) that came after them."""
    first: Tensor | None = None
    for row, scores in zip(found, logits, strict=True):
        logprobs = scores.float().log_softmax(dim=-1)
        first = logprobs if first is None else first
        share = first.exp()
        kl = torch.where(share > 0, share * (first - logprobs), 0.0).sum(dim=-1).clamp_(min=0)
        row.kl += kl.tolist()
        row.logprobs += logprobs.gather(1, followed[:, None])[:, 0].tolist()
