"""Directions in which vectors vary most, the same on all machines."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_components(moments: Tensor, count: int) -> Tensor:
    """Returns (dim, count) float32 orthonormal directions of the largest variance, largest first.

    Args:
        moments: (dim, dim) float64 second moments of centred vectors, or a multiple of them.
        count: Number of directions, at most dim.
    """
    _, directions = torch.linalg.eigh(moments)
    largest = directions.flip(1)[:, :count]
    # A direction has no sign of its own: the largest value is positive, so that all machines agree.
    signs = largest.gather(0, largest.abs().argmax(0, keepdim=True)).sign()
    components: Tensor = (largest * signs).float()
    return components
