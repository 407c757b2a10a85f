"""Mixes: the teacher's vectors of pairs of texts whose input embeddings were mixed (MixKD).

Both texts of a pair stand in one text shard, and which they are follows from its digest and the recipe. So
an object of mixes depends on its shard alone, and is named and kept as one of vectors is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.column import TEXT_KEY_BYTES, text_keys_from, text_keys_of
from storage.corpus import Corpus
from storage.embeddings import VectorColumn
from storage.manifest import Manifest
from storage.store import Store


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts: ratio x the first one's input embeddings + (1 - ratio) x the second one's."""

    first: NDArray[np.int64]  # (n,) int64 rows
    second: NDArray[np.int64]  # (n,) int64 rows
    ratio: NDArray[np.float32]  # (n,) float32, 0 to 1

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> Pairs:
        """Returns the pairs of an object of mixes; rows are those of its text shard."""
        first, second, ratio = (batch.column(name) for name in ("first", "second", "ratio"))
        return cls(
            first.to_numpy().astype(np.int64), second.to_numpy().astype(np.int64), ratio.to_numpy()
        )

    def columns(self) -> dict[str, pa.Array]:
        """Returns them as columns of an object of mixes."""
        return {
            "first": pa.array(self.first, pa.int32()),
            "second": pa.array(self.second, pa.int32()),
            "ratio": pa.array(self.ratio, pa.float32()),
        }

    def keys(self, text_keys: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
        """Returns (n,) V16 keys, each of both texts and the ratio: no text and no other mix has it."""
        parts = (text_keys[self.first], text_keys[self.second], self.ratio.astype("<f4"))
        rows = np.column_stack([part.view(np.uint8).reshape(len(part), -1) for part in parts])
        return text_keys_from(hashlib.blake2b(r, digest_size=TEXT_KEY_BYTES).digest() for r in rows)


@dataclass(frozen=True)
class MixedTexts:
    """Pairs of texts, each read as one: their input embeddings mixed, the first's times ratio."""

    first: Sequence[str]  # n texts
    second: Sequence[str]  # n texts
    ratio: NDArray[np.float32]  # (n,) float32, 0 to 1


def draw_pairs(text_digest: str, rows: int, *, share: float, alpha: float, seed: int) -> Pairs:
    """Returns the pairs of a text shard; they depend on the arguments alone.

    A row is the first of one pair at most, and never its own partner, unless the shard has no other.

    Args:
        text_digest: Of the shard, 40 hex digits.
        rows: Number of its texts, at least 1.
        share: Pairs for each text, 0 < share <= 1; a shard has one pair at least.
        alpha: Ratios are drawn from Beta(alpha, alpha).
        seed: With the digest the seed of the draw.
    """
    count = max(1, round(share * rows))
    draw = np.random.default_rng([seed, int(text_digest, 16)])
    first = np.sort(draw.permutation(rows)[:count])
    second = (first + draw.integers(1, max(rows, 2), count)) % rows
    return Pairs(first, second, draw.beta(alpha, alpha, count).astype(np.float32))


class Mixes(VectorColumn):
    """The teacher's vectors of mixes of a corpus's texts.

    Raises:
        DamagedError: as `VectorColumn`.
    """

    def __init__(self, store: Store, manifest: Manifest, corpus: Corpus) -> None:
        super().__init__(store, manifest, corpus, row_by_row=False)
        self.corpus = corpus

    def pairs(self) -> Pairs:
        """Returns the pairs of all mixes by row id of the corpus; 20 bytes of memory a mix.

        Raises:
            DamagedError: an object has other texts than its shard.
        """
        of_shards = [self._pairs_in(shard) for shard in range(len(self.objects))]
        return Pairs(
            np.concatenate([pairs.first for pairs in of_shards]),
            np.concatenate([pairs.second for pairs in of_shards]),
            np.concatenate([pairs.ratio for pairs in of_shards]),
        )

    def _pairs_in(self, shard: int) -> Pairs:
        batch, texts = self._open(shard), text_keys_of(self.corpus.batch(shard))
        pairs = Pairs.of(batch)
        rows = np.concatenate([pairs.first, pairs.second])
        if (
            not ((rows >= 0) & (rows < len(texts))).all()
            or (pairs.keys(texts) != text_keys_of(batch)).any()
        ):
            raise self.damaged(shard, f"mixes of other texts than those of shard {shard}")
        start = self.corpus.starts[shard]
        return Pairs(pairs.first + start, pairs.second + start, pairs.ratio)
