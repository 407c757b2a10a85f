"""Data for the report page beside the metrics: scatter plots of cosines, and example searches.

Pure functions from vectors to small JSON values. Everything is chosen evenly or by size, never drawn, so
that the same model gives the same page. Cosines are dot products of unit vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.reading.evaluation_sets import RetrievalSet
from stages.vectors import NO_DOCUMENT, cosines, evenly, nearest, unit

EDGES = np.round(np.arange(-0.30, 1.0001, 0.05), 2)
"""Of the histogram; a cosine beyond them counts in the first or the last bin."""

POINTS = 400
DISAGREEMENTS = 4  # of each kind
MOST_LOOKED_AT = 5000  # pairs with the largest gaps
LEAST_GAP = 0.05  # in cosine; less is no disagreement
SEARCHES = 5
RESULTS = 3
SHOWN_CHARACTERS = 240


def likeness_details(
    ours: NDArray[np.floating], teacher: NDArray[np.floating], texts: Sequence[str]
) -> dict[str, Any]:
    """Compare a model's cosines over all pairs of some texts with the teacher's.

    Args:
        ours: (n, any width) vectors of the model, n >= 3.
        teacher: (n, any width) vectors of the teacher.
        texts: The n texts.

    Returns:
        similarities: counts of both between EDGES. scatter: some 400 (teacher, model) points, half of
        them spread over the pairs, half over the teacher's range. disagreements: pairs of texts that
        one of the two puts much nearer than the other, each text in one pair at most.
    """
    pairs = np.triu_indices(len(texts), k=1)
    theirs, mine = cosines(teacher)[pairs], cosines(ours)[pairs]
    order = np.argsort(theirs, kind="stable")
    return {
        "similarities": {
            "edges": EDGES.tolist(),
            "teacher": _counts(theirs),
            "model": _counts(mine),
        },
        "scatter": [
            [_rounded(theirs[pair]), _rounded(mine[pair])] for pair in _spread(theirs, order)
        ],
        "disagreements": [
            {
                "first": shortened(texts[pairs[0][pair]]),
                "second": shortened(texts[pairs[1][pair]]),
                "teacher": _rounded(theirs[pair]),
                "model": _rounded(mine[pair]),
            }
            for pair in _disagreements(theirs, mine, order, pairs)
        ],
    }


def search_details(
    name: str,
    asked: RetrievalSet,
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    ignored: NDArray[np.int64] | None = None,
) -> list[dict[str, Any]]:
    """Returns a few searches in a retrieval set: query, and the first documents with their cosines.

    Of (q, dim) queries among (d, dim) documents; `ignored` as in `nearest`.
    """
    chosen = _sample_places(len(asked.queries))
    results = nearest(
        queries[chosen], documents, RESULTS, None if ignored is None else ignored[chosen]
    )
    return [
        {
            "set": name,
            "query": shortened(asked.queries[place]),
            "results": _results(
                queries[place],
                documents,
                asked.documents,
                [asked.document_ids[d] in asked.relevant[asked.query_ids[place]] for d in places],
                places,
            ),
        }
        for place, places in zip(chosen, (row[row != NO_DOCUMENT] for row in results), strict=True)
    ]


def neighbour_details(vectors: NDArray[np.floating], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a few searches among n >= 2 unlabelled texts with (n, dim) vectors, some as queries."""
    vectors = unit(vectors)
    searches = []
    for place in _sample_places(len(texts)):
        # One more than shown, since the text itself is among the first.
        nearest_places = nearest(vectors[place : place + 1], vectors, RESULTS + 1)[0]
        nearest_places = nearest_places[nearest_places != place][:RESULTS]
        searches.append(
            {
                "set": "held-out texts",
                "query": shortened(texts[place]),
                "results": _results(
                    vectors[place], vectors, texts, [None] * len(nearest_places), nearest_places
                ),
            }
        )
    return searches


def shortened(text: str) -> str:
    """A text of at most 240 characters."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def _results(
    query: NDArray[np.floating],
    documents: NDArray[np.floating],
    texts: Sequence[str],
    relevant: Collection[bool | None],
    places: NDArray[np.int64],
) -> list[dict[str, Any]]:
    scores = unit(documents[places]) @ unit(query[None])[0]
    return [
        {"text": shortened(texts[place]), "score": _rounded(score), "relevant": is_relevant}
        for place, score, is_relevant in zip(places, scores, relevant, strict=True)
    ]


def _sample_places(count: int) -> NDArray[np.int64]:
    """Places of a handful of things, evenly spaced."""
    return evenly(np.arange(count), min(SEARCHES, count))


def _counts(values: NDArray[np.floating]) -> list[int]:
    counts: list[int] = np.histogram(np.clip(values, EDGES[0], EDGES[-1]), EDGES)[0].tolist()
    return counts


def _spread(values: NDArray[np.floating], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of some values, ascending by value: every n-th, and the first in each equal step."""
    ranked = values[order]
    steps = np.linspace(ranked[0], ranked[-1], POINTS // 2)
    by_value = np.searchsorted(ranked, steps).clip(max=len(order) - 1)
    places = np.union1d(evenly(np.arange(len(order)), POINTS // 2), by_value)
    return np.take(order, places)


def _disagreements(
    theirs: NDArray[np.floating],
    mine: NDArray[np.floating],
    order: NDArray[np.int64],
    pairs: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> list[int]:
    """Places of the pairs that one of the two puts much nearer; the teacher's first.

    A model may use another part of the scale, so its cosine is read as the one that has its rank among
    the teacher's.
    """
    read_as = np.empty_like(theirs)
    read_as[np.argsort(mine, kind="stable")] = theirs[order]
    gap = theirs - read_as
    used: set[int] = set()
    kinds: tuple[list[int], list[int]] = ([], [])
    for pair in np.argsort(-np.abs(gap), kind="stable")[:MOST_LOOKED_AT]:
        texts = {int(pairs[0][pair]), int(pairs[1][pair])}
        kind = kinds[int(gap[pair] < 0)]
        if abs(gap[pair]) > LEAST_GAP and not texts & used and len(kind) < DISAGREEMENTS:
            kind.append(int(pair))
            used |= texts
    return [*kinds[0], *kinds[1]]


def _rounded(value: np.floating) -> float:
    return round(float(value), 4)
