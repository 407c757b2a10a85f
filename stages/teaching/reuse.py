"""Copy vectors of texts that were embedded before from older shards of the same teacher.

A corpus that was filtered, reordered or merged is cut into other shards, but most of its texts have vectors
already. They are matched by text key, and their vectors are copied bit by bit. Such a shard may differ in
last bits from one that the teacher encoded in one go: it is *another copy*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.outcome import log
from storage.column import MAPS, KeyIndex, text_keys_of
from storage.corpus import Corpus
from storage.embeddings import ReusedRows, check_received
from storage.errors import DamagedError, MissingError, TeachonceError
from storage.store import Store


class ReusableVectors:
    """For each row of the missing shards, the older shard and row that hold its vector, if any.

    Older shards are searched in the given order, and the first one with a text provides its vector. So a
    run that continues after a kill copies the same rows as an uninterrupted one: within a corpus a text is
    unique, so shards that the killed run finished have none of the texts that are still missing.

    Memory: 8 bytes for each missing row, and up to 40 more during the search. The search reads text keys
    only, one shard at a time. A shard that provides a row is read whole and compared with its sha256 first;
    if that fails, a warning is logged and the shard provides nothing. A plan counts only: then no shard is
    read whole, and one that turns out to be damaged later has been counted.

    Args:
        store: The store with the older shards.
        older: Sorted keys of vectors of one teacher, without the keys of the missing shards.
        todo: Missing shard -> its (rows,) V16 text keys.
        storage: The setting `embed.storage`.
        checked: Whether shards that provide rows are read whole and checked.
    """

    def __init__(
        self,
        store: Store,
        older: Sequence[str],
        todo: Mapping[int, NDArray[np.bytes_]],
        *,
        storage: str,
        checked: bool = True,
    ) -> None:
        starts = np.cumsum([0, *(len(keys) for keys in todo.values())]).tolist()
        self._parts = dict(zip(todo, map(slice, starts, starts[1:]), strict=True))
        total = starts[-1]
        self._source = np.full(total, -1, np.int32)
        self._row = np.empty(total, np.int32)
        self._batch = lru_cache(MAPS)(lambda number: _open_checked(store, older[number], storage))
        used, left = 0, total
        index = KeyIndex(np.concatenate(list(todo.values()))) if older and todo else None
        for number, key in enumerate(older):
            if not left or index is None:
                break
            try:
                batch = store.glance(key)
                if not len(self._new_matches(index, batch)[0]):
                    continue
                batch = self._batch(number) if checked else batch
            except TeachonceError as error:
                log.warning(
                    "embed: nothing is taken from a shard that cannot be trusted: %s", error
                )
                continue
            rows, places = self._new_matches(index, batch)
            self._source[places], self._row[places] = number, rows
            used += 1
            left -= len(np.unique(places))
        if used:
            log.info(
                "embed: %s of %s texts to do are in %s older shards",
                f"{total - left:,}",
                f"{total:,}",
                f"{used:,}",
            )

    def covers(self, shard: int) -> bool:
        """Whether every row of a shard can be copied."""
        return not len(self.missing_rows(shard))

    def missing_rows(self, shard: int) -> NDArray[np.int64]:
        """Returns the row numbers of a shard that no older shard has, ascending."""
        return np.flatnonzero(self._source[self._parts[shard]] < 0)

    def reused_rows(self, shard: int) -> ReusedRows | None:
        """Returns the copied rows of a shard; None if there are none."""
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
        return ReusedRows(rows.astype(np.int64), batch)

    def _new_matches(
        self, index: KeyIndex, batch: pa.RecordBatch
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns an older shard's rows that are the first to match a missing row; their places."""
        places = index.places(text_keys_of(batch))
        rows = np.flatnonzero(places >= 0)
        rows = rows[self._source[places[rows]] < 0]
        return rows, places[rows]


def _open_checked(store: Store, key: str, storage: str) -> pa.RecordBatch:
    """Returns the batch of an older shard after its sha256 and its columns were checked.

    Raises:
        TeachonceError: the shard is damaged, gone, or not made by teachonce.
    """
    cached = store.find(key)
    if cached is None:
        raise MissingError(store.path(key), "vanished from the store", "none is needed")
    batch = store.open(cached).replace_schema_metadata(None)
    try:
        check_received(batch, text_keys=text_keys_of(batch), storage=storage)
    except ValueError as error:
        path = store.path(key)
        raise DamagedError(path, str(error), f"ask who made it, or rm -f '{path}'") from error
    return batch


def unknown_rows(
    corpus: Corpus, shards: Sequence[int], store: Store, older: Sequence[str], *, storage: str
) -> NDArray[np.int64]:
    """Returns (n,) ids of the rows of `shards` that no older shard has, ascending; reads text keys alone.

    Args:
        corpus: The texts.
        shards: Numbers of shards, ascending.
        store: The store with the older shards.
        older: Sorted keys of vectors of one teacher, without the keys of `shards`.
        storage: The setting `embed.storage`.
    """
    todo = {shard: corpus.text_keys_in([shard]) for shard in shards}
    reusable = ReusableVectors(store, older, todo, storage=storage, checked=False)
    rows = [corpus.starts[shard] + reusable.missing_rows(shard) for shard in shards]
    return np.concatenate([np.empty(0, np.int64), *rows])
