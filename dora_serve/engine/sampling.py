"""How the next token is chosen from the logits of one row: a function of the logits, the text so far, and the seed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_serve.engine.sound import is_number, is_whole, require


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
        require("temperature", self.temperature, is_number(self.temperature) and self.temperature >= 0, "0 or more")
        require("top_p", self.top_p, is_number(self.top_p) and 0 < self.top_p <= 1, "more than 0 and at most 1")
        require("top_k", self.top_k, is_whole(self.top_k) and self.top_k >= 0, "a whole number, 0 or more")
        penalty = self.repetition_penalty
        require("repetition_penalty", penalty, is_number(penalty) and penalty > 0, "more than 0")
        sound = self.seed is None or (is_whole(self.seed) and 0 <= self.seed < 1 << 63)
        require("seed", self.seed, sound, "a whole number, 0 or more and below 2**63, or none")


def new_generator(sampling: Sampling) -> torch.Generator:
    """The source of a request's randomness: its own, on the CPU, so that no other request and no device changes it."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(operator.index(sampling.seed))
    return generator


@dataclass(frozen=True)
class Choice:
    """A token, and how far in units of the logits the next best was from being chosen in its place."""

    token: int
    margin: float


def draw(vocabulary: int, sampling: Sampling, generator: torch.Generator) -> Tensor | None:
    """The randomness of one token, (vocabulary,): the logarithm of exponential variates; None at temperature 0."""
    if sampling.temperature == 0:
        return None
    return torch.empty(vocabulary).exponential_(generator=generator).log_()


def choose(logits: Tensor, sampling: Sampling, so_far: Sequence[int], noise: Tensor | None) -> Choice:
    """The next token of a row: logits (vocabulary,) in float32, so_far the text's tokens until now, noise from `draw`.

    A token wins a race in which each runs at the rate of its probability, which is how torch.multinomial draws one; the
    noise belongs to the token, not to its rank, so that a small change of the logits rarely changes the winner.
    """
    scores = _penalized(logits, sampling.repetition_penalty, so_far)
    if noise is None:
        return _first(scores, 1.0)
    # From the largest down, so that the smallest temperature makes -inf of the others and not inf of all.
    scores = (scores - scores.max()) / max(sampling.temperature, 1e-30)
    race = scores - noise.to(scores)
    if not sampling.top_k and sampling.top_p == 1:
        return _first(race, sampling.temperature)
    kept, slack, gap = _kept(scores, sampling)
    among = _first(race[kept], sampling.temperature)
    choice = Choice(int(kept[among.token]), among.margin)
    # Whether the last ones are kept is a matter of rounding, too: would another token win without them, or with more?
    for other in slack:
        if len(other) and int(other[_first(race[other], 1.0).token]) != choice.token:
            return Choice(choice.token, min(choice.margin, gap))
    return choice


def _first(scores: Tensor, unit: float) -> Choice:
    best = scores.topk(min(2, len(scores)))
    return Choice(int(best.indices[0]), float(best.values[0] - best.values[-1]) * unit if len(scores) > 1 else math.inf)


def _penalized(logits: Tensor, penalty: float, so_far: Sequence[int]) -> Tensor:
    """As transformers' RepetitionPenaltyLogitsProcessor (arXiv 1909.05858, section 4.1)."""
    if penalty == 1:
        return logits
    seen = torch.tensor(sorted(set(so_far)), device=logits.device)
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))


_FEW = 1024
"""A nucleus is nearly always within so many of the likeliest, and sorting a whole vocabulary takes milliseconds."""

_SLACK = 1e-4
"""Of a probability: more than rounding moves a sum of them."""


def _kept(scores: Tensor, sampling: Sampling) -> tuple[Tensor, tuple[Tensor, Tensor], float]:
    """The ids that top_k and then top_p keep, likeliest first; those that they would keep if they were a little smaller
    or larger; and how far in units of the logits they are from doing that. As transformers' TopKLogitsWarper and
    TopPLogitsWarper: the fewest whose sum reaches top_p.
    """
    size = min(sampling.top_k + 1, len(scores)) if sampling.top_k else min(_FEW, len(scores))
    values, ids = scores.topk(size)
    allowed = min(sampling.top_k, len(scores)) if sampling.top_k else len(scores)
    if sampling.top_p == 1:
        gap = float(values[allowed - 1] - values[allowed]) * sampling.temperature if size > allowed else math.inf
        return ids[:allowed], (ids[: allowed - 1], ids[: allowed + 1]), gap
    total = values[:allowed].logsumexp(0) if sampling.top_k else scores.logsumexp(0)
    reached = (values - total).exp().cumsum(0)
    if not sampling.top_k and float(reached[-1]) < sampling.top_p + _SLACK and size < len(scores):
        values, ids = scores.sort(descending=True)
        reached = (values - total).exp().cumsum(0)
    counts = [
        min(int((reached < sampling.top_p + slack).sum()) + 1, limit)
        for slack, limit in ((0.0, allowed), (-_SLACK, max(1, allowed - 1)), (_SLACK, min(allowed + 1, len(ids))))
    ]
    kept, fewer, more = (ids[:count] for count in counts)
    return kept, (fewer, more), 0.0
