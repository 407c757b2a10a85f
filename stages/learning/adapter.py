"""The online module of `adapter`: a small map that moves the teacher's vectors, no further than a cap."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """A low-rank residual on the teacher's vectors: T'_i = normalise(T_i + s_i p_i), T_i of length 1.

    p_i is B tanh(A T_i) less its part along T_i, so 1 - cos(T'_i, T_i) = 1 - 1 / sqrt(1 + s_i^2 |p_i|^2).
    s_i = min(1, m / |p_i|) with m = sqrt(1 / (1 - most_drift)^2 - 1): no vector drifts further than
    `most_drift`. B begins at zero, and T' at T.

    Args:
        dim: D, width of the teacher's vectors.
        rank: Rows of A.
        most_drift: The cap on 1 - cos(T'_i, T_i) of each vector; in (0, 1).
    """

    def __init__(self, dim: int, *, rank: int, most_drift: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, dim))
        self.up = nn.Parameter(torch.zeros(dim, rank))
        self.longest = math.sqrt(1 / (1 - most_drift) ** 2 - 1)

    def forward(self, vectors: Tensor) -> Tensor:
        """Returns (n, D) adapted vectors of length 1, of (n, D) vectors of any length."""
        own = F.normalize(vectors.float(), dim=1)
        residual = torch.tanh(own @ self.down.T) @ self.up.T
        across = residual - (residual * own).sum(dim=1, keepdim=True) * own
        # The norm of zero has no gradient, and B begins at zero: it learns where it is not clamped.
        length = across.square().sum(dim=1, keepdim=True).clamp(min=self.longest**2).sqrt()
        return F.normalize(own + across * (self.longest / length), dim=1)

    @torch.no_grad()
    def drift(self, vectors: Tensor) -> float:
        """The mean of 1 - cos(T'_i, T_i) over (n, D) vectors."""
        moved = 1 - F.cosine_similarity(self(vectors), vectors.float(), dim=1)
        return float(moved.mean().clamp(min=0))
