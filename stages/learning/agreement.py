"""How much of the teacher's geometry a model keeps, measured without labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

MOST_ROWS = 1000
"""Half a million pairs of rows: enough for three digits, a second of work."""


def spread(rows: NDArray[np.int64], most: int = MOST_ROWS) -> NDArray[np.int64]:
    """At most `most` of some rows, taken evenly over them."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]


def cosines(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n, d) vectors -> (n, n) cosines."""
    unit = vectors.astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    similar: NDArray[np.float32] = unit @ unit.T
    return similar


def rank_agreement(ours: NDArray[np.floating], teacher: NDArray[np.floating]) -> float:
    """Spearman's correlation of two models' cosines over all pairs i < j of the same texts.

    Args:
        ours: (n, any width), n >= 3.
        teacher: (n, any width).

    Returns:
        -1 to 1; 1 if the model ranks all pairs as the teacher does.
    """
    pairs = np.triu_indices(len(ours), k=1)
    return float(spearmanr(cosines(ours)[pairs], cosines(teacher)[pairs]).statistic)


def top_overlap(
    ours: NDArray[np.floating], teacher: NDArray[np.floating], count: int = 10
) -> float:
    """Mean share of a text's `count` nearest others by the teacher that are also its nearest by us.

    Args:
        ours: (n, any width), n > count.
        teacher: (n, any width).
        count: Neighbours looked at.

    Returns:
        0 to 1.
    """
    first, second = _nearest(ours, count), _nearest(teacher, count)
    shared = [len(np.intersect1d(a, b)) for a, b in zip(first, second, strict=True)]
    return float(np.mean(shared) / count)


def _nearest(vectors: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    similar = cosines(vectors)
    np.fill_diagonal(similar, -np.inf)
    # Stable, so that equal cosines go by row and not by chance.
    return np.argsort(-similar, axis=1, kind="stable")[:, :count]
