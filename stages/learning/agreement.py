"""How alike two orders are: a model's and the teacher's, or a model's and people's. No torch here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

QUERIES_AT_ONCE = 256
NO_DOCUMENT = -1

MOST_ROWS = 1000
"""Half a million pairs of rows: the third digit stands still, and it takes a second."""


def evenly(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`count` of the rows at equal steps, in order; some of them repeated if there are fewer."""
    return rows[np.arange(count) * len(rows) // count]


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n, d) float32 vectors of length 1; a zero vector stays zero, so its cosine with all is 0."""
    vectors = vectors.astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    scaled: NDArray[np.float32] = vectors / lengths
    return scaled


def spearman(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    """Correlation of the ranks of two (n,) arrays, equal values sharing their mean rank; -1 to 1.

    0 if one of them is constant: the correlation is undefined then, and a model that gives every pair
    the same cosine knows nothing.
    """
    # Here: it takes a second to import, and `embed` needs the rest of this module.
    from scipy.stats import spearmanr

    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(spearmanr(left, right).statistic)


def sts_correlation(
    first: NDArray[np.float32], second: NDArray[np.float32], scores: NDArray[np.float64]
) -> float:
    """Spearman x 100 between the cosines of n pairs and their n scores.

    Args:
        first: (n, dim), any length.
        second: (n, dim), any length.
        scores: (n,).
    """
    alike = np.einsum("nd,nd->n", unit(first), unit(second))
    # Pairs of equal sentences (61 in STS12) share a rank, whatever the last bits of their cosines are;
    # without this they move the second decimal, and another machine moves it elsewhere.
    return 100 * spearman(np.round(alike, 6), scores)


def nearest(
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    depth: int,
    ignored: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Places of the documents with the highest cosines, best first; ties in document order.

    Exact, with one block of cosines (256 queries x all documents) in memory.

    Args:
        queries: (q, dim), any length.
        documents: (d, dim), any length, d >= 1.
        depth: How many; at most d are given.
        ignored: (q,) place of the document that is no result of a query; NO_DOCUMENT for no such document.

    Returns:
        (q, min(depth, d)); NO_DOCUMENT behind the last result where there is one less.
    """
    depth = min(depth, len(documents))
    queries, documents = unit(queries), unit(documents)
    found = np.empty((len(queries), depth), np.int64)
    for begin in range(0, len(queries), QUERIES_AT_ONCE):
        block = queries[begin : begin + QUERIES_AT_ONCE] @ documents.T
        for place, row in enumerate(block, begin):
            if ignored is not None and ignored[place] != NO_DOCUMENT:
                row[ignored[place]] = -np.inf
            # Everything that ties with the last one stays, so that the stable sort sees it.
            least = np.partition(row, -depth)[-depth]
            kept = np.flatnonzero(row >= least)
            found[place] = kept[np.argsort(-row[kept], kind="stable")[:depth]]
    if ignored is not None:
        found[found == ignored[:, None]] = NO_DOCUMENT
    return found


def rank_agreement(ours: NDArray[np.floating], teacher: NDArray[np.floating]) -> float:
    """Spearman's correlation of two models' cosines over all pairs i < j of the same texts.

    Args:
        ours: (n, any width), n >= 3.
        teacher: (n, any width).

    Returns:
        -1 to 1; 1 if the model orders all pairs as the teacher does.
    """
    pairs = np.triu_indices(len(ours), k=1)
    return spearman(cosines(ours)[pairs], cosines(teacher)[pairs])


def cosine_shift(ours: NDArray[np.floating], teacher: NDArray[np.floating]) -> float:
    """How much higher a model's cosines are than the teacher's: the mean over all pairs i < j.

    Args:
        ours: (n, any width), n >= 2.
        teacher: (n, any width).

    Returns:
        -2 to 2; below 0 if they are lower.
    """
    pairs = np.triu_indices(len(ours), k=1)
    return float(np.mean(cosines(ours)[pairs] - cosines(teacher)[pairs], dtype=np.float64))


def row_cosines(left: NDArray[np.floating], right: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n,) cosines of row i of `left` (n, d) with row i of `right` (n, d), of any length but 0.

    In float64: 1 - cosine is meant to be looked at. NaN for rows with NaN in them.
    """
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = np.einsum("nd,nd->n", a, b) / lengths
    return found


def row_stretches(left: NDArray[np.floating], right: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n,) how much longer or shorter row i of `right` is than row i of `left`, as a share; at least 0."""
    a = np.linalg.norm(left.astype(np.float64), axis=1)
    b = np.linalg.norm(right.astype(np.float64), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = np.abs(b / a - 1)
    return found


def top_overlap(ours: NDArray[np.floating], teacher: NDArray[np.floating], count: int) -> float:
    """Mean share of a text's `count` nearest by the teacher that are also its nearest by us.

    Args:
        ours: (n, any width), n > count.
        teacher: (n, any width).
        count: Neighbours looked at, the text itself excluded.

    Returns:
        0 to 1.
    """
    shared = _is_near(cosines(ours), count) & _is_near(cosines(teacher), count)
    return float(shared.sum(axis=1).mean() / count)


def cosines(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n, n) cosines of (n, d) vectors of any length."""
    similar: NDArray[np.float32] = unit(vectors) @ unit(vectors).T
    return similar


def _is_near(similar: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """(n, n) True where j is among the `count` nearest of i, itself excluded; ties in row order."""
    distance = -similar
    np.fill_diagonal(distance, np.inf)
    order = np.argsort(distance, axis=1, kind="stable")[:, :count]
    near = np.zeros(similar.shape, np.bool_)
    np.put_along_axis(near, order, True, axis=1)
    return near
