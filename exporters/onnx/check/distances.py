"""How far two tensors, or many pairs of them, are from each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def max_abs_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; infinite where shapes differ or anything is not finite."""
    if one.shape != other.shape:
        return inf
    distance = float((one.double() - other.double()).abs().max())
    return distance if distance < inf else inf  # NaN compares false


def mean_abs_difference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    total = sum(float((one.double() - other.double()).abs().sum()) for one, other in pairs)
    return total / sum(one.numel() for one, _ in pairs)


def kl_divergence(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    total = 0.0
    for found, wanted in pairs:
        p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return max(total, 0.0) / sum(len(one) for one, _ in pairs)  # rounding can make it negative


def top1_agreement(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    same = sum(int((found.argmax(-1) == wanted.argmax(-1)).sum()) for found, wanted in pairs)
    return same / sum(len(one) for one, _ in pairs)
