"""Readings: other forms of the corpus's texts, such as translations, which a student reads in their place.

A reading is a row of its own, with the key of its text; a text may have several. Readings are cut into
shards by content, as texts are, and a student's token ids of them are kept under the same digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.column import TEXT_KEY_BYTES, KeyIndex, text_key_array, text_keys_from
from storage.corpus import NO_TEXT, Corpus, cut_by, text_key
from storage.errors import DamagedError
from storage.manifest import Manifest
from storage.roles import Role
from storage.split import Split
from storage.store import Object, Store, digest


class Reading(NamedTuple):
    """Another form of a text."""

    text_key: bytes  # the 16 bytes of the text in its role
    reading: str  # what is read in its place

    @property
    def key(self) -> bytes:
        """The 16 bytes that identify it."""
        both = self.text_key + self.reading.encode()
        return hashlib.blake2b(both, digest_size=TEXT_KEY_BYTES).digest()


def cut_readings(readings: Iterable[Reading], rows_per_shard: int) -> Iterator[list[Reading]]:
    """Yield shards of readings; holds one shard in memory."""
    return cut_by(readings, rows_per_shard, lambda row: row.key)


def key_of_readings(shard: Sequence[Reading], role: Role = "text") -> str:
    """Returns the key of a shard of readings, from all text keys and readings in order."""
    # The byte is in no UTF-8: no text shard has this digest, so neither have its token ids.
    rows = (part for row in shard for part in (row.text_key, row.reading.encode()))
    return f"readings/{digest(NO_TEXT + b'readings ' + role.encode(), *rows)}.arrow"


def put_readings(store: Store, shard: Sequence[Reading], role: Role = "text") -> Object:
    """Publish one shard of readings of texts of one role."""
    keys = text_keys_from(row.text_key for row in shard)
    batch = pa.record_batch(
        [text_key_array(keys), pa.array([row.reading for row in shard], pa.large_string())],
        names=["text_key", "reading"],
    )
    return store.put(key_of_readings(shard, role), batch, role=role)


class Readings(Corpus):
    """All readings, by their own row ids; what reads the texts of a corpus reads them, too.

    Args:
        store: The store of the objects.
        manifest: The manifest of readings.
        corpus: The corpus with their texts.

    Raises:
        DamagedError: the manifest is that of another corpus.
    """

    texts_in: ClassVar[str] = "reading"

    def __init__(self, store: Store, manifest: Manifest, corpus: Corpus) -> None:
        if manifest.parent != corpus.manifest.content:
            raise DamagedError(
                "readings manifest", "made for another corpus", "run `teachonce shard`"
            )
        super().__init__(store, manifest)
        self.corpus = corpus

    def rows_read(self) -> NDArray[np.int64]:
        """Returns (rows,) the row id of each reading's text in the corpus.

        Raises:
            DamagedError: a reading's text is not in the corpus.
        """
        rows = KeyIndex(self.corpus.text_keys).places(self.text_keys)
        if len(lost := np.flatnonzero(rows < 0)):
            raise DamagedError(
                "readings manifest",
                f"reading {lost[0]} is of a text that the corpus does not have",
                "run `teachonce shard`",
            )
        return rows

    def learned(self, split: Split) -> NDArray[np.int64]:
        """Returns the ids of the readings that students may learn from, ascending.

        They are of training rows, and none of them is a text, or a reading of one, that no student may see.
        """
        is_train = self._is_train(split)
        is_of_train = is_train[self.rows_read()]
        kept_away = [self.corpus.text_keys[~is_train]]
        kept_away += [keys[~is_of_train] for keys in self._own_keys]
        return np.flatnonzero(is_of_train & ~self._is_among(np.concatenate(kept_away)))

    def heldout(self, split: Split) -> NDArray[np.int64]:
        """Returns the ids of the readings of held-out rows that are no training texts, ascending."""
        is_heldout = np.zeros(self.corpus.rows, bool)
        is_heldout[split.heldout_rows(self.corpus)] = True
        seen = self.corpus.text_keys[self._is_train(split)]
        return np.flatnonzero(is_heldout[self.rows_read()] & ~self._is_among(seen))

    def _is_train(self, split: Split) -> NDArray[np.bool_]:
        is_train = np.zeros(self.corpus.rows, bool)
        is_train[split.train_rows(self.corpus)] = True
        return is_train

    def _is_among(self, keys: NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """(rows,) Whether a reading is, as a text in any role, one of these keys."""
        index = KeyIndex(keys)
        is_among: NDArray[np.bool_] = np.any(
            [index.places(own) >= 0 for own in self._own_keys], axis=0
        )
        return is_among

    @cached_property
    def _own_keys(self) -> list[NDArray[np.bytes_]]:
        """For each role of the corpus (rows,) V16 keys that the readings have as texts of it."""
        return [
            text_keys_from(
                text_key(reading, role)
                for shard in range(len(self.objects))
                for reading in self.texts(shard)
            )
            for role in self.corpus.roles
        ]
