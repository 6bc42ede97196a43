"""How far one model's logits are from another's, and how far they may be.

Sums run in float64 over blocks of positions, wherever the compared logits are, so that neither float64 models nor large
vocabularies need memory for a second copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_serve.prompts import Sample

_MASKED = -3e4
_CHUNK_ELEMENTS = 1 << 22
_KL_RESOLUTION = 1e-15
"""What float64 can tell of a KL divergence near zero."""


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations. equal of compared are the same; position (from 0) and margin of the first difference.

    margin: by how much the unmerged model, in the wider dtype, prefers its own token to the other one, in logits.
    """

    compared: int
    equal: int
    first_difference: int | None
    margin: float | None


@dataclass(frozen=True)
class Comparison:
    """One model's logits against those of the unmerged model in the wider dtype, over all prompts and positions.

    largest, mean, rms: of |difference|, in logits. kl: mean KL(unmerged || this) of a position, in nats. top1: share
    of positions with the same most likely class. perplexity: this model's, on the prompts, for causal models.
    """

    largest: float
    mean: float
    rms: float
    kl: float
    top1: float
    perplexity: float | None
    greedy: Greedy | None

    @property
    def is_finite(self) -> bool:
        """Whether every logit was."""
        return math.isfinite(self.rms) and math.isfinite(self.kl)


def compare(runs: Iterable[tuple[Sample, Tensor, Tensor]], *, causal: bool) -> Comparison:
    """Compare sample by sample: (sample, unmerged logits, logits), both (positions, classes), on any device.

    causal: whether the logits at a position predict the next token, so that a perplexity means something.
    Memory: a few blocks of logits in float64. Raises ValueError where the shapes differ.
    """
    sums = _Sums()
    for sample, unmerged, logits in runs:
        sums.add(sample, unmerged, logits, causal=causal)
    return sums.comparison()


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass
class _Sums:
    """Running sums of a Comparison, in float64."""

    largest: float = 0.0
    absolute: float = 0.0
    square: float = 0.0
    elements: int = 0
    kl: float = 0.0
    agreeing: int = 0
    positions: int = 0
    loss: float = 0.0
    predicted: int = 0
    compared: int = 0
    equal: int = 0
    first_difference: int | None = None
    margin: float | None = None

    def add(self, sample: Sample, unmerged: Tensor, logits: Tensor, *, causal: bool) -> None:
        """unmerged, logits: (positions, classes)."""
        if unmerged.shape != logits.shape:
            raise ValueError(f"its output is {list(logits.shape)}, wanted {list(unmerged.shape)}")
        step = max(1, _CHUNK_ELEMENTS // unmerged.shape[1])
        likeliest: list[Tensor] = []
        targets = sample.token_ids[1 : sample.prompt_length] if causal else sample.token_ids[:0]
        for start in range(0, len(unmerged), step):
            # What a model masks is as low as its dtype goes, which is another number in another dtype.
            ours = unmerged[start : start + step].to(logits.device).double().clamp(min=_MASKED)
            other = logits[start : start + step].double().clamp(min=_MASKED)
            difference = (other - ours).abs()
            self.largest = _larger(self.largest, float(difference.max()))
            self.absolute += float(difference.sum())
            self.square += float(difference.square().sum())
            log_ours, log_other = ours.log_softmax(-1), other.log_softmax(-1)
            self.kl += float((log_ours.exp() * (log_ours - log_other)).sum())
            likeliest.append(torch.stack([ours.argmax(-1), other.argmax(-1)]).cpu())
            known = targets[start : start + step].to(logits.device)
            self.loss -= float(log_other[: len(known)].gather(1, known[:, None]).sum())
            self.predicted += len(known)
        self.elements += unmerged.numel()
        self.positions += len(unmerged)
        ours_top, other_top = torch.cat(likeliest, dim=1)
        self.agreeing += int((ours_top == other_top).sum())
        if sample.grows is not None and len(sample.token_ids) > sample.prompt_length:
            self._add_greedy(sample, unmerged, ours_top, other_top)

    def _add_greedy(self, sample: Sample, unmerged: Tensor, ours_top: Tensor, other_top: Tensor) -> None:
        """Up to the first difference both would have seen the same tokens, so one forward shows it."""
        start = sample.prompt_length - 1
        differing = (ours_top[start:-1] != other_top[start:-1]).nonzero().flatten()
        self.compared += 1
        if not len(differing):
            self.equal += 1
            return
        first = int(differing[0])
        if self.first_difference is None or first < self.first_difference:
            row = unmerged[start + first].double()
            self.first_difference = first
            self.margin = float(row[ours_top[start + first]] - row[other_top[start + first]])

    def comparison(self) -> Comparison:
        loss = self.loss / self.predicted if self.predicted else None
        return Comparison(
            largest=self.largest,
            mean=self.absolute / max(1, self.elements),
            rms=math.sqrt(self.square / max(1, self.elements)),
            kl=max(0.0, self.kl / max(1, self.positions)),
            top1=self.agreeing / max(1, self.positions),
            perplexity=None if loss is None else math.exp(min(loss, 700.0)),
            greedy=Greedy(self.compared, self.equal, self.first_difference, self.margin) if self.compared else None,
        )


def _larger(first: float, second: float) -> float:
    """max that keeps a NaN."""
    return second if math.isnan(second) or second > first else first


def scale_of(logits: Iterable[Tensor]) -> float:
    """Root mean square of the logits that are not masked."""
    square, count = 0.0, 0
    for one in logits:
        seen = one[one > _MASKED].double()
        square, count = square + float(seen.square().sum()), count + seen.numel()
    return math.sqrt(square / max(1, count))


@dataclass(frozen=True)
class Tolerance:
    """How far a merged model may be from the unmerged one: root mean square of the logits' difference, mean KL.

    reason: what was measured to find it, for a sentence.
    """

    rms: float
    kl: float
    reason: str

    @staticmethod
    def of(noise: Comparison, factor: float, scale: float, eps: float, reason: str) -> Tolerance:
        """`factor` times a measured noise, which is no less than the rounding of logits of that `scale` once.

        KL goes with the square of a difference of logits, and is at most half its mean square where that is small.
        """
        floor = eps / 4 * scale
        rms, kl = max(noise.rms, floor), max(noise.kl, floor**2 / 2, _KL_RESOLUTION)
        return Tolerance(factor * rms, factor**2 * kl, f"{factor:g} times what {reason}")

    def judge(self, merged: Comparison, dtype: torch.dtype) -> list[str]:
        """What is wrong with the merged model, run in `dtype`, in sentences."""
        where = f"In {dtype_name(dtype)} the merged model's"
        if not merged.is_finite:
            return [f"{where} logits are not finite, and the unmerged model's are."]
        failures = []
        if merged.rms > self.rms:
            failures.append(
                f"{where} logits are {merged.rms:.3g} (root mean square) away from the unmerged model's; "
                f"{self.rms:.3g} is allowed, {self.reason}."
            )
        if merged.kl > self.kl:
            failures.append(
                f"{where} predictions are {merged.kl:.3g} nats (mean KL divergence) away from the unmerged model's; "
                f"{self.kl:.3g} is allowed."
            )
        return failures
