"""One text under several adapters: what each would have made of every token, and how far it is from the base.

The rows decode the same tokens (teacher forcing), so that their distributions can be compared place by place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dora_serve.engine.adapted_linear import Batch
from dora_serve.engine.requests import Request
from dora_serve.errors import EngineError

if TYPE_CHECKING:
    from dora_serve.engine.engine import Engine


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
    engine.room_for(Request(tokens, max_tokens=None), len(tokens) - 1)
    if len(tokens) < 2:
        raise EngineError("A text of one token has nothing to score.", remedy="Give a longer one, or a prompt.")
    releases = []
    try:
        rows = []
        for name in adapters:
            prepared, release = (None, None) if name is None else engine.pool.acquire(name)
            rows.append(prepared)
            releases.append(release)
        batch = torch.tensor([tokens] * len(rows), device=engine.device)
        logits = engine.forward(Batch(tuple(rows), by_row=engine.by_row), batch)
    finally:
        for release in releases:
            if release is not None:
                release()
    start = max(1, len(before))
    followed = torch.tensor(tokens[start:], device=engine.device)
    first: Tensor | None = None
    scores = []
    for name, row in zip(adapters, logits, strict=True):
        logprobs = row[start - 1 : -1].float().log_softmax(dim=-1)
        first = logprobs if first is None else first
        share = first.exp()
        kl = torch.where(share > 0, share * (first - logprobs), 0.0).sum(dim=-1).clamp_(min=0)
        own = logprobs.gather(1, followed[:, None])[:, 0]
        scores.append(Score(name, tuple(tokens[start:]), tuple(own.tolist()), tuple(kl.tolist())))
    return tuple(scores)
