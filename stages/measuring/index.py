"""What an index of a model's vectors costs and what it still finds: fewer values, int8, signs alone.

Nothing is encoded for it: the vectors are those of a retrieval set, or of rows held out. Nearest means
the highest cosine, of signs the lowest Hamming distance.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from stages.outcome import Fact
from stages.reading.evaluation_sets import RetrievalSet
from stages.vectors import NO_DOCUMENT, evenly, nearest, nearest_by_product
from storage.embeddings import as_read

FOUND = 10  # nearest documents that an index should find
LEAST_DOCUMENTS = FOUND + 2  # with fewer, any index finds nearly all
MOST_QUERIES, MOST_DOCUMENTS = 1_000, 100_000
"""That are searched: shares of ten nearest are known to a percent then, in seconds."""

TYPES = ("float32", "int8", "binary")
"""How a vector is kept: 4 bytes a value; 1 byte a value and a scale; the sign of each value, 1 bit."""


def bytes_of(dim: int, kind: str) -> int:
    """Bytes of a vector of `dim` values in an index of one of TYPES, without what else the index needs.

    int8 has a float32 scale beside its values, as in the store.
    """
    return {"float32": 4 * dim, "int8": dim + 4, "binary": -(-dim // 8)}[kind]


def set_to_index(sets: Mapping[str, RetrievalSet]) -> str | None:
    """The retrieval set with the most documents; None if none has enough."""
    counts = {key: len(asked.documents) for key, asked in sets.items()}
    largest = max(counts, key=lambda key: counts[key], default=None)
    return largest if largest is not None and counts[largest] >= LEAST_DOCUMENTS else None


def index_of_set(
    key: str,
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    widths: Mapping[str, int | None],
) -> dict[str, Fact]:
    """Metrics of an index of a retrieval set's documents that is asked with its queries.

    Args:
        key: The set's name.
        queries: (q, dim), q >= 1.
        documents: (d, dim), d >= LEAST_DOCUMENTS.
        widths: As the cuts of `evaluate`: their values are numbers of first values, None for all.
    """
    queries = queries[evenly(np.arange(len(queries)), min(MOST_QUERIES, len(queries)))]
    documents = documents[evenly(np.arange(len(documents)), min(MOST_DOCUMENTS, len(documents)))]
    among = f"{len(documents):,} documents of {key}, asked with {len(queries):,} queries"
    return {"index.among": among, **_metrics(queries, documents, widths, None)}


def index_of_rows(
    vectors: NDArray[np.float32], widths: Mapping[str, int | None]
) -> dict[str, Fact]:
    """Metrics of an index of (n, dim) held-out texts, n >= LEAST_DOCUMENTS, each asked for its others."""
    among = f"{len(vectors):,} held-out texts, each asked for the others"
    return {"index.among": among, **_metrics(vectors, vectors, widths, np.arange(len(vectors)))}


def _metrics(
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    widths: Mapping[str, int | None],
    ignored: NDArray[np.int64] | None,
) -> dict[str, Fact]:
    wanted = nearest(queries, documents, FOUND, ignored)
    metrics: dict[str, Fact] = {}
    for width in widths.values():
        cut = queries[:, :width], documents[:, :width]
        for kind in TYPES:
            prefix = f"index.{kind}" if width is None else f"index.{width}.{kind}"
            metrics[f"{prefix}.bytes"] = bytes_of(cut[1].shape[1], kind)
            results = search(*cut, kind, FOUND, ignored)
            metrics[f"{prefix}.recall@{FOUND}"] = round(recall(results, wanted), 6)
    return metrics


def search(
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    kind: str,
    depth: int,
    ignored: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """Places of the nearest documents in an index of one of TYPES, as `nearest` gives them.

    int8: each document is rounded to its own scale; queries stay as they are. binary: of both sides a value
    above 0 is a 1, any other a 0, and documents that differ in as many bits stand in their order.
    """
    if kind == "binary":
        # The product of signs is dim - 2 x Hamming distance, an integer that float32 holds exactly.
        return nearest_by_product(_signs(queries), _signs(documents), depth, ignored)
    if kind == "int8":
        documents = as_read(documents, "int8").astype(np.float32)
    return nearest(queries, documents, depth, ignored)


def recall(results: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """The share of the wanted documents that were found, mean over queries; 0 to 1.

    Args:
        results: (q, k) places, distinct in a row; NO_DOCUMENT for none.
        wanted: (q, k) likewise, in each row at least one.
    """
    is_there = wanted != NO_DOCUMENT
    hits = (wanted[:, :, None] == results[:, None, :]).any(axis=2) & is_there
    return float(np.mean(hits.sum(axis=1) / is_there.sum(axis=1)))


def _signs(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(vectors > 0, np.float32(1), np.float32(-1))
