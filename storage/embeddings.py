"""The embedding cache: the teacher's vectors by row id.

Vectors are stored as the teacher's own pipeline returns them, unscaled, as float16 or float32.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.column import TEXT_KEY, Column, fixed_lists, matrix_of, text_key_array, text_keys_of
from storage.corpus import Corpus, check_derived
from storage.errors import TeachonceError
from storage.manifest import Manifest
from storage.store import Object, Store

DTYPES: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}
FLOAT16_MAX = float(np.finfo(np.float16).max)


class BadVectorsError(TeachonceError):
    """The teacher returned vectors that must not be stored."""


def put_vectors(
    store: Store,
    key: str,
    *,
    vectors: NDArray[np.float32],
    text_keys: NDArray[np.bytes_],
    storage: str,
    facts: dict[str, int],
) -> Object:
    """Publish the vectors of one text shard.

    Args:
        store: Where to.
        key: `vectors/<teacher fingerprint>/<text digest>.arrow`.
        vectors: (rows, dim) float32.
        text_keys: (rows,) V16.
        storage: "float16" or "float32".
        facts: Counts for the header.

    Raises:
        BadVectorsError: NaN, Inf, zero, or too large for float16; names the rows. Nothing is stored.
    """
    check_vectors(vectors, key=key, storage=storage)
    batch = pa.record_batch(
        [text_key_array(text_keys), fixed_lists(vectors.astype(DTYPES[storage]))],
        names=["text_key", "vector"],
    )
    return store.put(key, batch, facts)


def check_vectors(vectors: NDArray[np.float32], *, key: str, storage: str) -> None:
    """Refuse poison: found here it costs a second, found in training it costs a night.

    Raises:
        BadVectorsError: names the first rows of the shard that are wrong, and how.
    """
    largest = np.abs(vectors).max(axis=1, initial=0.0)  # NaN stays NaN
    faults = {
        "NaN or Inf": ~np.isfinite(largest),
        "zero": largest == 0.0,
    }
    if storage == "float16":
        faults["too large for float16"] = np.isfinite(largest) & (largest > FLOAT16_MAX)
    for fault, wrong in faults.items():
        rows = np.flatnonzero(wrong)
        if len(rows):
            raise BadVectorsError(
                key,
                f"{len(rows)} of {len(vectors)} vectors are {fault}: rows "
                f"{', '.join(map(str, rows[:8]))}{' …' if len(rows) > 8 else ''} of the shard",
                "set embed.storage: float32"
                if fault.startswith("too large")
                else "look at these texts, or set embed.precision: fp32; nothing of the shard was stored",
            )


def check_received(batch: pa.RecordBatch, *, text_keys: NDArray[np.bytes_], storage: str) -> None:
    """Refuse vectors from elsewhere that no manifest vouches for and that we would not have stored.

    Args:
        batch: A whole object of vectors.
        text_keys: (rows,) V16 of the texts it must belong to.
        storage: "float16" or "float32".

    Raises:
        ValueError: other texts, another type, or vectors that are no numbers.
    """
    kind = pa.from_numpy_dtype(DTYPES[storage])
    types = {field.name: field.type for field in batch.schema}
    vector = types.get("vector", pa.null())
    if types.get("text_key") != TEXT_KEY or not (
        pa.types.is_fixed_size_list(vector) and vector.value_type == kind
    ):
        raise ValueError(f"columns other than text keys and vectors of {storage}")
    theirs = text_keys_of(batch)
    if len(theirs) != len(text_keys) or not bool((theirs == text_keys).all()):
        raise ValueError("vectors of other texts")
    if not bool(np.isfinite(matrix_of(batch, "vector")).all()):
        raise ValueError("NaN or Inf among its vectors")


class Embeddings(Column):
    """The teacher's vectors of a corpus.

    Raises:
        DamagedError: the manifest belongs to another corpus.
    """

    def __init__(self, store: Store, manifest: Manifest, corpus: Corpus) -> None:
        self.manifest = manifest
        check_derived(manifest, corpus)
        super().__init__(store, manifest.objects, corpus)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.shard(0).shape[1]) if self.objects else 0

    def shard(self, shard: int) -> NDArray[np.floating]:
        """(rows of the shard, dim) in the stored type; a view of the mapped file."""
        return matrix_of(self.batch(shard), "vector")  # type: ignore[return-value]  # by the schema

    def rows_of(self, ids: NDArray[np.integer]) -> NDArray[np.floating]:
        """(n, dim) vectors of `ids`, in their order, in the stored type."""
        taken: NDArray[np.floating] | None = None
        for shard, places, rows in self.by_shard(ids):
            vectors = self.shard(shard)
            if taken is None:
                taken = np.empty((len(ids), vectors.shape[1]), vectors.dtype)
            taken[places] = vectors[rows]
        return np.empty((0, self.dim), np.float16) if taken is None else taken
