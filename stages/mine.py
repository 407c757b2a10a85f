"""Vectors -> hard negatives: for each training row, other rows that the teacher finds most similar.

Exact cosine search with FAISS, one query shard against blocks of the corpus at a time, so that memory
is bounded by a setting. A shard's lists are published when they are done and found again on resume.

Rows of held-out and evaluation texts are neither asked for nor found: their lists are empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.outcome import Outcome, Progress, log, write_json
from stages.params import MineParams
from storage.column import matrix_of, text_keys_of
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.negatives import NONE, put_negatives
from storage.split import Split
from storage.store import Object, Store, digest

VERSION = 1

SCORE_BINS = 2001  # of 0.001 cosine: bin 0 is -1, bin 2000 is 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

RULES = ("itself", "same_text", "above_max_score", "below_min_score", "before_range_min")


def recipe(params: MineParams) -> dict[str, Any]:
    """Settings that change the lists; `memory_mb` only sets the size of a block."""
    return {
        "version": VERSION,
        "neighbours": params.neighbours,
        "range_min": params.range_min,
        "range_max": params.range_max,
        "max_score": params.max_score,
        "min_score": params.min_score,
    }


def parent_of(embeddings: Embeddings, split: Split) -> str:
    """What a list depends on besides the recipe: every vector and what each row is for."""
    return digest(embeddings.manifest.content.encode(), split.content.encode())


def run(
    params: MineParams,
    *,
    corpus: Corpus,
    embeddings: Embeddings,
    split: Split,
    store: Store,
    out: Path,
    facts: Path,
) -> Outcome:
    """Mine the shards that the store lacks, then write the manifest of all of them.

    Raises:
        TeachonceError: FAISS is not installed, or there is nothing to search.
    """
    made_of, parent = recipe(params), parent_of(embeddings, split)
    name = fingerprint({**made_of, "parent": parent})
    keys = [f"negatives/{name}/{shard:06}.arrow" for shard in range(len(corpus.objects))]
    found = {key: store.find(key) for key in keys}
    train = split.train_rows(corpus)
    todo = [shard for shard, key in enumerate(keys) if found[key] is None]
    log.info("mine: %d of %d shards are in the store", len(keys) - len(todo), len(keys))
    if todo:
        search = Search(params, corpus=corpus, embeddings=embeddings, train=train)
        progress = Progress("mine", total=sum(corpus.objects[s].rows for s in todo), unit="rows")
        for shard in todo:
            found[keys[shard]] = _mine_shard(search, shard, keys[shard], store)
            progress.advance(corpus.objects[shard].rows)
    objects = [entry for entry in found.values() if entry is not None]
    manifest = Manifest(kind="negatives", recipe=made_of, parent=parent, objects=tuple(objects))
    counts = _counts(store, manifest, train_rows=len(train), neighbours=params.neighbours)
    write_json(facts, counts)
    manifest.save(out, store)
    return Outcome(
        stage="mine",
        made=out,
        summary=(
            f"{counts['negatives']:,} negatives for {len(train):,} rows ({counts['short_lists']:,} "
            f"lists are short); median cosine {counts['score_quantiles']['0.5']:.3f}; "
            f"{len(todo)} shards mined, {len(keys) - len(todo)} found in the store"
        ),
        facts=counts,
    )


class Search:
    """Exact neighbours among the training rows.

    Args:
        params: Filters and memory.
        corpus: For text keys.
        embeddings: Vectors of any length; they are compared by cosine.
        train: (n,) ids of the rows that take part, ascending.
    """

    def __init__(
        self,
        params: MineParams,
        *,
        corpus: Corpus,
        embeddings: Embeddings,
        train: NDArray[np.int64],
    ) -> None:
        self.params, self.corpus, self.embeddings, self.train = params, corpus, embeddings, train
        self.is_train = np.zeros(corpus.rows, bool)
        self.is_train[train] = True
        # Half the memory for a block of vectors; the rest is for queries, scores and FAISS itself.
        per_row = embeddings.dim * 4
        self.block_rows = max(1024, params.memory_mb * (1 << 20) // 2 // per_row)
        self._whole: NDArray[np.float32] | None = None

    def nearest(
        self, queries: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(n, k) row ids and cosines, descending, k = range_max + 1 (the row itself may be among them).

        -1 where the corpus has fewer rows.
        """
        faiss = _faiss()
        wanted = min(self.params.range_max + 1, len(self.train))
        heap = faiss.ResultHeap(len(queries), wanted, keep_max=True)
        for first, block in self._blocks():
            in_block = min(wanted, len(block))
            cosines, places = faiss.knn(queries, block, in_block, faiss.METRIC_INNER_PRODUCT)
            heap.add_result(cosines, np.where(places >= 0, places + first, NONE))
        heap.finalize()
        ids = np.where(heap.I >= 0, self.train[heap.I], NONE)
        return ids, heap.D

    def unit_rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, dim) float32 vectors of unit length."""
        vectors = self.embeddings.rows_of(ids).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        if len(self.train) <= self.block_rows:
            if self._whole is None:
                self._whole = self.unit_rows(self.train)
            yield 0, self._whole
            return
        for first in range(0, len(self.train), self.block_rows):
            yield first, self.unit_rows(self.train[first : first + self.block_rows])


def _mine_shard(search: Search, shard: int, key: str, store: Store) -> Object:
    corpus, params = search.corpus, search.params
    ids = np.arange(corpus.starts[shard], corpus.starts[shard + 1])
    asked = search.is_train[ids]
    neighbours = np.full((len(ids), params.neighbours), NONE, np.int64)
    scores = np.zeros((len(ids), params.neighbours), np.float32)
    facts = dict.fromkeys(RULES, 0)
    if asked.any():
        own = ids[asked]
        found, cosines = search.nearest(search.unit_rows(own))
        rejected = reject(params, found, cosines, own=own, text_keys=corpus.text_keys)
        facts = {rule: int(wrong.sum()) for rule, wrong in rejected.items()}
        wrong = np.logical_or.reduce([found == NONE, *rejected.values()])
        neighbours[asked], scores[asked] = keep_first(found, cosines, ~wrong, params.neighbours)
    facts["negatives"] = int((neighbours != NONE).sum())
    facts["short_lists"] = int((neighbours[asked] == NONE).any(axis=1).sum())
    return put_negatives(
        store,
        key,
        neighbours=neighbours,
        scores=scores,
        text_keys=text_keys_of(corpus.batch(shard)),
        facts=facts,
    )


def reject(
    params: MineParams,
    found: NDArray[np.int64],
    cosines: NDArray[np.float32],
    *,
    own: NDArray[np.int64],
    text_keys: NDArray[np.bytes_],
) -> dict[str, NDArray[np.bool_]]:
    """Which of the found neighbours are no negatives, by the first rule that says so.

    The row itself is found by its id, not by being first: of two rows with equal vectors, FAISS gives
    one of them as the nearest of both.

    Args:
        params: Filters.
        found: (n, k) row ids, -1 for none.
        cosines: (n, k) descending.
        own: (n,) ids of the rows that were asked for.
        text_keys: (rows of the corpus,) V16.

    Returns:
        Rule -> (n, k), disjoint; in the order of RULES.
    """
    there = found != NONE
    same_text = text_keys[np.where(there, found, 0)] == text_keys[own][:, None]
    tests = {
        "itself": found == own[:, None],
        "same_text": same_text,
        "above_max_score": cosines > params.max_score,
        "below_min_score": cosines < (-2.0 if params.min_score is None else params.min_score),
    }
    rejected = {}
    left = there
    for rule, test in tests.items():
        rejected[rule] = left & test
        left = left & ~test
    # range_min counts what is left: the nearest few that no other rule took are skipped.
    rejected["before_range_min"] = left & (np.cumsum(left, axis=1) <= params.range_min)
    return rejected


def keep_first(
    found: NDArray[np.int64],
    cosines: NDArray[np.float32],
    allowed: NDArray[np.bool_],
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The first `count` allowed entries of each row, in order, padded with -1 and 0.

    Args:
        found: (n, k) ids.
        cosines: (n, k).
        allowed: (n, k).
        count: Wanted per row, >= 1.

    Returns:
        (n, count) ids and cosines.
    """
    # A stable sort on "not allowed" moves the allowed ones to the front and keeps their order.
    front = np.argsort(~allowed, axis=1, kind="stable")[:, :count]
    there = np.take_along_axis(allowed, front, axis=1)
    ids = np.full((len(found), count), NONE, np.int64)
    scores = np.zeros((len(found), count), np.float32)
    width = front.shape[1]
    ids[:, :width] = np.where(there, np.take_along_axis(found, front, axis=1), NONE)
    scores[:, :width] = np.where(there, np.take_along_axis(cosines, front, axis=1), 0)
    return ids, scores


def _counts(
    store: Store, manifest: Manifest, *, train_rows: int, neighbours: int
) -> dict[str, Any]:
    """The report: counts by rule and quantiles of the scores kept, over all shards."""
    total: Counter[str] = Counter()
    bins = np.zeros(SCORE_BINS, np.int64)
    for entry in manifest.objects:
        total.update(store.facts(entry.key))
        batch = store.open(entry)
        kept = matrix_of(batch, "scores")[matrix_of(batch, "neighbours") != NONE]
        places = np.clip(np.round((kept.astype(np.float64) + 1) * 1000), 0, SCORE_BINS - 1)
        bins += np.bincount(places.astype(np.int64), minlength=SCORE_BINS)
    below = np.cumsum(bins)
    quantiles = {
        str(q): round(float(np.searchsorted(below, q * below[-1])) / 1000 - 1, 3)
        if below[-1]
        else 0.0
        for q in QUANTILES
    }
    return {
        "rows": train_rows,
        "neighbours": neighbours,
        "negatives": total["negatives"],
        "short_lists": total["short_lists"],
        "rejected": {rule: total[rule] for rule in RULES},
        "score_quantiles": quantiles,
    }


def _faiss() -> Any:  # noqa: ANN401 - FAISS has no types
    try:
        import faiss
    except ImportError:
        raise TeachonceError(
            "mine", "FAISS is not installed", "pip install 'teachonce[cpu]' (or [gpu], never both)"
        ) from None
    return faiss
