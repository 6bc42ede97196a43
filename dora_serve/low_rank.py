"""The best approximation of a matrix by one of a given rank: its truncated singular value decomposition
(Eckart and Young, Psychometrika 1, 1936)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SIZE = 1024
"""Up to so many rows or columns, whichever are fewer, the decomposition is computed whole."""

_OVERSAMPLING, _ITERATIONS = 16, 6


@dataclass(frozen=True)
class LowRank:
    """lora_A (r, in), lora_B (out, r) in float32, whose product approximates a matrix.

    error: the Frobenius norm of what it leaves over, of these rounded factors. norm: that of the matrix.
    """

    lora_A: Tensor
    lora_B: Tensor
    error: float
    norm: float

    @property
    def relative_error(self) -> float:
        return self.error / self.norm if self.norm else 0.0


def low_rank(matrix: Tensor, rank: int) -> LowRank:
    """Approximate matrix (out, in), float64, by rank `rank`, or by its own where that is less.

    The leading left singular vectors are eigenvectors of the smaller Gram matrix: a singular value below 1e-8 of the
    largest is lost in it, and is far below what float32 factors hold. Beyond EXACT_SIZE they are found by a randomized
    subspace iteration (Halko, Martinsson and Tropp, SIAM Review 53, 2011), seeded. `error` is measured in any case.
    Memory: some copies of the matrix.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = low_rank(matrix.T.contiguous(), rank)
        return LowRank(turned.lora_B.T.contiguous(), turned.lora_A.T.contiguous(), turned.error, turned.norm)
    rank = min(rank, *matrix.shape)
    if matrix.shape[0] <= EXACT_SIZE:
        basis = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
    else:
        basis = _leading_space(matrix, min(rank + _OVERSAMPLING, *matrix.shape))
    small, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = values[:rank].sqrt()
    lora_b, lora_a = ((basis @ small)[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()
    rest = torch.addmm(matrix, lora_b.double(), lora_a.double(), alpha=-1)
    return LowRank(lora_a.contiguous(), lora_b.contiguous(), float(rest.norm()), float(matrix.norm()))


def _leading_space(matrix: Tensor, size: int) -> Tensor:
    """An orthonormal basis (out, size) of nearly all that the leading singular vectors span."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], size, generator=generator, dtype=matrix.dtype)
    basis: Tensor = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis
