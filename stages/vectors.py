"""Cosines, rank correlations, bootstrap intervals and nearest rows, in numpy. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

QUERIES_AT_ONCE = 256
NO_DOCUMENT = -1

RESAMPLES, LEAST_RESAMPLES = 1000, 200
"""Resamples of a bootstrap; with a thousand the ends of an interval vary by a twentieth of its width."""
MOST_DRAWS, DRAWS_AT_ONCE = 20_000_000, 2_000_000
"""Draws in all, about a second, and draws in memory at once, 16 MB."""

MOST_ROWS = 1000
"""Rows compared pairwise: half a million pairs take a second and fix the third digit."""


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
    """Spearman x 100 between the cosines of n pairs, (n, dim) vectors of any length, and (n,) scores."""
    return 100 * spearman(pair_cosines(first, second), scores)


def pair_cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) cosines of n pairs as STS ranks them, from (n, dim) vectors of any length."""
    alike = np.einsum("nd,nd->n", unit(first), unit(second))
    # Pairs of equal sentences (61 in STS12) share a rank, whatever the last bits of their cosines are;
    # without this they move the second decimal, and another machine moves it elsewhere.
    rounded: NDArray[np.float32] = np.round(alike, 6)
    return rounded


def interval(resampled: NDArray[np.floating], value: float) -> tuple[float, float]:
    """The ends of a 95 % confidence interval from (r,) values of resamples, around `value` in any case."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return min(float(low), value), max(float(high), value)


def bootstrap_mean(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """(r,) means of resamples of n values, drawn with replacement."""
    return _resampled(len(values), lambda drawn: drawn @ values.astype(np.float64) / len(values))


def bootstrap_spearman(
    left: NDArray[np.floating], right: NDArray[np.floating]
) -> NDArray[np.float64]:
    """(r,) rank correlations of resamples of n pairs.

    Ranks are those of the whole sample, since a thousand rankings would take long. Ranked anew, a resample
    of 200 pairs has a correlation that is 0.006 away on average (0.05 at worst); the ends of the interval
    move by less than 0.01.
    """
    a, b = _standard_ranks(left), _standard_ranks(right)
    sums = np.stack([a, b, a * a, b * b, a * b], axis=1)
    return _resampled(len(a), lambda drawn: _correlation(drawn @ sums / len(a)))


def bootstrap_agreement(
    ours: NDArray[np.floating], teacher: NDArray[np.floating]
) -> NDArray[np.float64]:
    """(r,) values of `rank_agreement` of resamples of n texts; pairs of a text with itself do not count."""
    upper = np.triu_indices(len(ours), k=1)
    sides = []
    for vectors in (ours, teacher):
        ranks = np.zeros((len(ours), len(ours)), np.float32)
        ranks[upper] = _standard_ranks(cosines(vectors)[upper])
        sides.append(ranks)
    a, b = sides

    def correlation(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = drawn.astype(np.float32)
        sums = [((weights @ part) * weights).sum(axis=1) for part in (a, b, a * a, b * b, a * b)]
        pairs = (drawn.sum(axis=1) ** 2 - (drawn**2).sum(axis=1)) / 2
        return _correlation(np.stack(sums, axis=1) / pairs[:, None])

    return _resampled(len(ours), correlation, resamples=LEAST_RESAMPLES)


def _resampled(
    count: int,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    resamples: int = RESAMPLES,
) -> NDArray[np.float64]:
    """(r,) values of a statistic of (some, count) numbers of times that each thing was drawn."""
    resamples = max(LEAST_RESAMPLES, min(resamples, MOST_DRAWS // count))
    at_once = max(1, DRAWS_AT_ONCE // count)
    # Of the count alone: all models are judged on the same resamples of a set.
    draw = np.random.default_rng([0, count])
    statistics = []
    for first in range(0, resamples, at_once):
        some = min(at_once, resamples - first)
        places = draw.integers(0, count, (some, count)) + count * np.arange(some)[:, None]
        drawn = np.bincount(places.ravel(), minlength=some * count).reshape(some, count)
        statistics.append(statistic(drawn.astype(np.float64)))
    return np.concatenate(statistics)


def _standard_ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n,) ranks with mean 0 and variance 1; zeros if all are the same."""
    from scipy.stats import rankdata

    ranks = rankdata(values)
    ranks = ranks - ranks.mean()
    return np.asarray(ranks / (ranks.std() or 1), np.float64)


def _correlation(means: NDArray[np.floating]) -> NDArray[np.float64]:
    """(r,) correlations from (r, 5) means of a, b, a^2, b^2 and a b; 0 where one side is constant."""
    a, b, aa, bb, ab = means.astype(np.float64).T
    spread = np.sqrt(np.maximum(aa - a * a, 0) * np.maximum(bb - b * b, 0))
    varies = spread > 1e-9
    return np.asarray(np.where(varies, (ab - a * b) / np.where(varies, spread, 1), 0), np.float64)


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
        depth: Number of documents per query, >= 1; at most d are returned.
        ignored: (q,) place of the document that is no result of a query; NO_DOCUMENT for no such document.

    Returns:
        (q, min(depth, d)); NO_DOCUMENT behind the last result where there is one less.
    """
    return nearest_by_product(unit(queries), unit(documents), depth, ignored)


def nearest_by_product(
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    depth: int,
    ignored: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """As `nearest`, but by the product of the vectors as they are, whatever their length."""
    depth = min(depth, len(documents))
    nearest_documents = np.empty((len(queries), depth), np.int64)
    for begin in range(0, len(queries), QUERIES_AT_ONCE):
        block = queries[begin : begin + QUERIES_AT_ONCE] @ documents.T
        for place, row in enumerate(block, begin):
            if ignored is not None and ignored[place] != NO_DOCUMENT:
                row[ignored[place]] = -np.inf
            # Everything that ties with the last one stays, so that the stable sort sees it.
            least = np.partition(row, -depth)[-depth]
            kept = np.flatnonzero(row >= least)
            nearest_documents[place] = kept[np.argsort(-row[kept], kind="stable")[:depth]]
    if ignored is not None:
        nearest_documents[nearest_documents == ignored[:, None]] = NO_DOCUMENT
    return nearest_documents


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
        row_values: NDArray[np.float64] = np.einsum("nd,nd->n", a, b) / lengths
    return row_values


def row_stretches(left: NDArray[np.floating], right: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n,) how much longer or shorter row i of `right` is than row i of `left`, as a share; at least 0."""
    a = np.linalg.norm(left.astype(np.float64), axis=1)
    b = np.linalg.norm(right.astype(np.float64), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        stretches: NDArray[np.float64] = np.abs(b / a - 1)
    return stretches


def top_overlaps(
    ours: NDArray[np.floating], teacher: NDArray[np.floating], count: int
) -> NDArray[np.float64]:
    """Of each text the share of its `count` nearest by the teacher that are also its nearest by us.

    Args:
        ours: (n, any width), n > count.
        teacher: (n, any width).
        count: Neighbours looked at, the text itself excluded.

    Returns:
        (n,), each 0 to 1.
    """
    shared = _is_near(cosines(ours), count) & _is_near(cosines(teacher), count)
    return np.asarray(shared.sum(axis=1) / count, np.float64)


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
