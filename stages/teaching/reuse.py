"""Texts that were embedded before: their vectors are copied from older shards of the same teacher.

A corpus that was filtered, reordered or merged is cut into other shards, but most of its texts are known.
They are found by text key, and their vectors copied bit by bit. A shard made in this way may differ in
last bits from one that the teacher made in one go: it is *another copy*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.outcome import log
from storage.column import MAPS, KeyIndex, text_keys_of
from storage.embeddings import KnownRows, check_received
from storage.errors import DamagedError, MissingError, TeachonceError
from storage.store import Store


class Known:
    """Which rows of the shards to be made stand in older shards, and where.

    The older shards are looked through in their order, and the first that has a text gives its vector. So
    a run that goes on after a kill copies what the whole run would have: within a corpus a text is
    unique, so shards that the killed run finished have none of the texts that are still to do.

    Held in memory, for each row to be made: 8 bytes, and up to 40 more while older shards are looked
    through. Of these only text keys are read, one shard at a time; those that give a row are read whole
    and compared with their sha256 first. One that fails is told and gives nothing.

    Args:
        store: Where the older shards are.
        older: Keys of vectors of one teacher, sorted; none of a shard to be made.
        todo: Shard -> its (rows,) V16 text keys.
        storage: How vectors are stored, as `embed.storage` says.
    """

    def __init__(
        self,
        store: Store,
        older: Sequence[str],
        todo: Mapping[int, NDArray[np.bytes_]],
        *,
        storage: str,
    ) -> None:
        ends = np.cumsum([len(keys) for keys in todo.values()]).tolist()
        starts = [0, *ends[:-1]]
        self._parts = {s: slice(a, b) for s, a, b in zip(todo, starts, ends, strict=True)}
        self._source = np.full(ends[-1], -1, np.int32)
        self._row = np.empty(ends[-1], np.int32)
        self._batch = lru_cache(MAPS)(lambda number: _whole(store, older[number], storage))
        used = 0
        left = ends[-1]
        index = KeyIndex(np.concatenate(list(todo.values()))) if older else None
        for number, key in enumerate(older):
            if not left or index is None:
                break
            try:
                if not len(self._unseen(index, store.glance(key))[0]):
                    continue
                batch = self._batch(number)
            except TeachonceError as error:
                log.warning(
                    "embed: nothing is taken from a shard that cannot be trusted: %s", error
                )
                continue
            rows, places = self._unseen(index, batch)
            self._source[places], self._row[places] = number, rows
            used += 1
            left -= len(np.unique(places))
        if used:
            log.info(
                "embed: %s of %s texts to do are in %s older shards",
                f"{ends[-1] - left:,}",
                f"{ends[-1]:,}",
                f"{used:,}",
            )

    def has_all(self, shard: int) -> bool:
        """Whether every row of a shard is known."""
        return not len(self.unknown_rows(shard))

    def unknown_rows(self, shard: int) -> NDArray[np.int64]:
        """The rows of a shard that no older shard has, in order."""
        return np.flatnonzero(self._source[self._parts[shard]] < 0)

    def rows_of(self, shard: int) -> KnownRows | None:
        """The known rows of a shard; None if there are none."""
        source = self._source[self._parts[shard]]
        rows = np.flatnonzero(source >= 0)
        if not len(rows):
            return None
        source, taken = source[rows], self._row[self._parts[shard]][rows]
        order = np.argsort(source, kind="stable")
        numbers, firsts = np.unique(source[order], return_index=True)
        pieces = [
            self._batch(int(number)).take(pa.array(taken[places]))
            for number, places in zip(numbers, np.split(order, firsts[1:]), strict=True)
        ]
        batch = pa.concat_batches(pieces).take(pa.array(np.argsort(order)))
        return KnownRows(rows.astype(np.int64), batch)

    def _unseen(
        self, index: KeyIndex, batch: pa.RecordBatch
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of an older shard that are to do and were not found before, and their places in `index`."""
        places = index.places(text_keys_of(batch))
        rows = np.flatnonzero(places >= 0)
        rows = rows[self._source[places[rows]] < 0]
        return rows, places[rows]


def _whole(store: Store, key: str, storage: str) -> pa.RecordBatch:
    """An older shard, compared with its sha256, that has what a shard of ours would have.

    Raises:
        TeachonceError: it is damaged, gone, or foreign.
    """
    found = store.find(key)
    if found is None:
        raise MissingError(store.path(key), "vanished from the store", "none is needed")
    batch = store.open(found).replace_schema_metadata(None)
    try:
        check_received(batch, text_keys=text_keys_of(batch), storage=storage)
    except ValueError as error:
        path = store.path(key)
        raise DamagedError(path, str(error), f"ask who made it, or rm -f '{path}'") from error
    return batch
