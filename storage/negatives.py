"""Mined negatives: for each row, the ids of similar rows and their cosines by the teacher."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.column import (
    TEXT_KEY_BYTES,
    Column,
    expect,
    file_of,
    fixed_lists,
    matrix_of,
    text_key_array,
)
from storage.corpus import Corpus
from storage.errors import DamagedError
from storage.manifest import Manifest, check_made_by, fingerprint
from storage.split import Split
from storage.store import Object, Store, digest

NONE = -1
"""Fills the list of a row that has too few neighbours; its score is 0."""

COUNTED_RULES = 5
"""Rules that reject candidates; exact lists stand with what each of them rejected."""


def parent_of(vectors: Manifest, split: Split) -> str:
    """Returns the digest of what lists depend on besides their recipe: all vectors and the split."""
    return digest(vectors.content.encode(), split.content.encode())


def row_bytes(neighbours: int) -> int:
    """Returns the bytes of a row of exact lists, without the object's header of about 1 kB."""
    place = np.dtype(np.int64).itemsize + np.dtype(np.float32).itemsize
    return TEXT_KEY_BYTES + neighbours * place + COUNTED_RULES * np.dtype(np.uint16).itemsize


def put_negatives(
    store: Store,
    key: str,
    *,
    neighbours: NDArray[np.int64],
    scores: NDArray[np.float32],
    text_keys: NDArray[np.bytes_],
    facts: dict[str, int],
    rejected: NDArray[np.uint16] | None = None,
) -> Object:
    """Publish the negatives of one shard.

    Args:
        store: The store.
        key: The key of the object.
        neighbours: (rows, k) row ids.
        scores: (rows, k) cosines, descending.
        text_keys: (rows,) V16 text keys.
        facts: Counts for the header.
        rejected: (rows, rules) how many candidates each rule rejected; None of approximate lists.
    """
    columns = {
        "text_key": text_key_array(text_keys),
        "neighbours": fixed_lists(neighbours),
        "scores": fixed_lists(scores),
    }
    if rejected is not None:
        columns["rejected"] = fixed_lists(rejected)
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    return store.put(key, batch, facts)


class Negatives(Column):
    """Mined negatives of a corpus.

    Raises:
        DamagedError: the manifest was mined from other vectors, or by other settings than its recipe says.
    """

    def __init__(
        self, store: Store, manifest: Manifest, corpus: Corpus, *, mined_from: str
    ) -> None:
        if manifest.parent != mined_from:
            raise DamagedError(
                "negatives manifest",
                "mined from other vectors or another split",
                "run `teachonce mine`, or `dvc repro`",
            )
        self.manifest = manifest
        check_made_by(manifest, repeat(fingerprint({**manifest.recipe, "parent": manifest.parent})))
        super().__init__(store, manifest.objects, corpus)

    def rows_of(self, ids: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(n, k) neighbour ids, -1 where there are fewer, and (n, k) cosines, for rows `ids`."""
        neighbours: NDArray[np.int64] | None = None
        scores: NDArray[np.float32] | None = None
        for shard, places, rows in self.by_shard(ids):
            batch = self.batch(shard)
            neighbour_ids, cosines = matrix_of(batch, "neighbours"), matrix_of(batch, "scores")
            expect(file_of(batch), rows)
            self._check_ids(shard, neighbour_ids[rows])
            if neighbours is None or scores is None:
                neighbours = np.full((len(ids), neighbour_ids.shape[1]), NONE, np.int64)
                scores = np.zeros(neighbours.shape, np.float32)
            neighbours[places], scores[places] = neighbour_ids[rows], cosines[rows]
        if neighbours is None or scores is None:
            width = self.manifest.recipe.get("neighbours", 0)
            return np.empty((0, width), np.int64), np.empty((0, width), np.float32)
        return neighbours, scores

    @property
    def have_counts(self) -> bool:
        """Whether each list stands with what each rule rejected. Those of older versions do not."""
        shards = range(len(self.objects))
        return all("rejected" in self.batch(shard).schema.names for shard in shards)

    def rejected_of(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """(n, rules) how many candidates of rows `ids` each rule rejected; only if they `have_counts`."""
        rejected = np.zeros((len(ids), COUNTED_RULES), np.int64)
        for shard, places, rows in self.by_shard(ids):
            rejected[places] = matrix_of(self.batch(shard), "rejected")[rows]
        return rejected

    def _check_ids(self, shard: int, ids: NDArray[Any]) -> None:
        """Raise DamagedError if an id is no row of the corpus; numpy would read -2 as the last but one."""
        if not ((ids >= NONE) & (ids < self.rows)).all():
            raise self.damaged(shard, f"names rows that a corpus of {self.rows} has not")
