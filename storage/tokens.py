"""A student's token ids of a corpus: computed once, read by every run with the same tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.column import Column, expect, file_of, read_ahead, text_key_array
from storage.corpus import Corpus
from storage.roles import Role
from storage.store import Object, Store

TOKEN_IDS = pa.large_list(pa.int32())


def put_tokens(
    store: Store, key: str, *, ids: Iterable[Sequence[Sequence[int]]], text_keys: NDArray[np.bytes_]
) -> Object:
    """Publish the token ids of one text shard as `tokens/<fingerprint>/<text digest>`.

    Args:
        store: The destination.
        key: The key of the object.
        ids: The ids of each text in row order, some texts at a time: lists of numbers take nine times the
            memory of the numbers.
        text_keys: (rows,) V16 text keys.
    """
    pieces = [pa.array([], TOKEN_IDS), *(pa.array(some, TOKEN_IDS) for some in ids)]
    batch = pa.record_batch(
        [text_key_array(text_keys), pa.concat_arrays(pieces)], names=["text_key", "token_ids"]
    )
    return store.put(key, batch)


class Tokens(Column):
    """Token ids by row id.

    Args:
        store: The store.
        objects: One object for each shard of `corpus`.
        corpus: The texts.
        prompt_tokens: Role -> how many of a text's first tokens are its prompt; none of a role not named.
    """

    def __init__(
        self,
        store: Store,
        objects: Sequence[Object],
        corpus: Corpus,
        prompt_tokens: Mapping[Role, int] | None = None,
    ) -> None:
        super().__init__(store, objects, corpus)
        counts = [(prompt_tokens or {}).get(entry.role, 0) for entry in corpus.objects]
        self._prompt_tokens = np.array(counts, np.int64)

    def prompt_tokens(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """(n,) int64: how many of the first tokens of each row are its prompt."""
        counts: NDArray[np.int64] = self._prompt_tokens[self.shards_of(ids)]
        return counts

    def rows_of(self, ids: NDArray[np.integer]) -> list[NDArray[np.int32]]:
        """Returns the token ids of rows, in the order of `ids`, as views of the mapped files."""
        taken: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(ids)
        for shard, places, rows in self.by_shard(ids):
            offsets = self._offsets(shard)
            batch = self.batch(shard)
            values = batch.column("token_ids").values.to_numpy(zero_copy_only=True)
            expect(file_of(batch), rows)
            for place, row in zip(places, rows, strict=True):
                taken[place] = values[offsets[row] : offsets[row + 1]]
        return taken

    def read_ahead(self, ids: NDArray[np.integer]) -> None:
        """Ask the system to read the token ids of `ids` from the disk, so that nobody waits for them."""
        views = self.rows_of(ids)  # which reads where they lie, and not the ids themselves
        read_ahead(
            np.array([view.ctypes.data for view in views], np.int64),
            np.array([view.nbytes for view in views], np.int64),
        )

    def _offsets(self, shard: int) -> NDArray[np.int64]:
        offsets: NDArray[np.int64] = self.batch(shard).column("token_ids").offsets.to_numpy()
        return offsets
