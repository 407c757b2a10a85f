"""A typed query -> the nearest texts of the corpus, by a student in its teacher's index.

Nothing is embedded but the query: a student that ends in the teacher's space searches the vectors that
the teacher left in the cache. So this is what serving would do, and a quick look at what a student knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.models.lineage import leaves_teacher_space, read_lineage
from stages.outcome import Outcome, log
from stages.vectors import unit
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.errors import TeachonceError


class QueryEncoder(Protocol):
    """A model that can encode a query."""

    def encode(self, texts: Sequence[str], *, role: Literal["query"]) -> NDArray[np.float32]:
        """Returns (n, dim) vectors of n texts, of any length."""


@dataclass(frozen=True)
class Hit:
    """A text of the corpus and its cosine with the query."""

    row: int
    cosine: float
    text: str


def run(
    query: str,
    *,
    model: Path,
    encoder: QueryEncoder,
    corpus: Corpus,
    embeddings: Embeddings,
    count: int,
) -> Outcome:
    """Find the `count` texts nearest to `query`.

    Args:
        query: The text to search for.
        model: The folder of the model that reads the query.
        encoder: That model.
        corpus: The texts. Those of the role `query` are no results, unless it has no others.
        embeddings: The teacher's vectors of `corpus`, searched exhaustively, one shard at a time.
        count: Number of results, >= 1; fewer if there are fewer.

    Raises:
        TeachonceError: the query is empty, or the model's vectors are not in the teacher's space.
    """
    if not query.strip():
        raise TeachonceError("query", "is empty", 'write `teachonce search "what you look for"`')
    if leaves_teacher_space(read_lineage(model)):
        log.warning(
            "search: nothing held the vectors of %s near the teacher's (a recipe of gram alone, "
            "or finetune.distill_weight: 0), so it may not find its way among them",
            model.name,
        )
    vector = encoder.encode([query], role="query")[0]
    if len(vector) != embeddings.dim:
        raise TeachonceError(
            model,
            f"its vectors have {len(vector)} numbers, the teacher's in the cache {embeddings.dim}",
            "set export.space: teacher and run `teachonce export`: that keeps the projection",
        )
    # Who asks does not look for what others asked, unless there is nothing else.
    every = range(len(corpus.objects))
    shards = [shard for shard in every if corpus.role_of(shard) != "query"] or every
    rows, cosines = nearest_rows(vector, embeddings, count, shards)
    hits = [
        Hit(int(row), round(float(cosine), 4), text)
        for row, cosine, text in zip(rows, cosines, corpus.take(rows), strict=True)
    ]
    return Outcome(
        stage="search",
        made=model,
        summary=f"{len(hits)} of {sum(corpus.objects[shard].rows for shard in shards):,} texts",
        facts={"query": query, "hits": [vars(hit) for hit in hits]},
    )


def nearest_rows(
    query: NDArray[np.floating], embeddings: Embeddings, count: int, shards: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns ids and cosines of the `count` rows nearest to a (dim,) query, best first, ties by row.

    Exact; only rows of `shards` are looked at, and one of these is held in float32 at a time.
    """
    query = unit(query[None])[0]
    rows = np.empty(0, np.int64)
    best_cosines = np.empty(0, np.float32)
    for shard in shards:
        cosines = unit(embeddings.shard(shard)) @ query
        rows = np.concatenate([rows, embeddings.starts[shard] + np.arange(len(cosines))])
        best_cosines = np.concatenate([best_cosines, cosines])
        best = np.argsort(-best_cosines, kind="stable")[:count]
        rows, best_cosines = rows[best], best_cosines[best]
    return rows, best_cosines
