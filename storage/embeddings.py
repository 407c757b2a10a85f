"""The embedding cache: the teacher's vectors by row id.

Vectors are stored as the teacher's own pipeline returns them: as float16 or float32 unscaled, or as int8
with one scale a row (value = int8 x scale). Reading int8 returns float32.

This file is long because what is refused when vectors are written, received or read is one set of rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, repeat
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.column import (
    MAPS,
    TEXT_KEY,
    TEXT_KEY_BYTES,
    Column,
    expect,
    file_of,
    fixed_lists,
    matrix_of,
    read_ahead,
    text_key_array,
    text_keys_of,
)
from storage.corpus import Corpus, check_derived
from storage.errors import TeachonceError
from storage.manifest import Manifest, check_made_by, fingerprint
from storage.roles import ROLES, Role
from storage.store import Object, Store

DTYPES: dict[str, type[np.number]] = {"float16": np.float16, "float32": np.float32, "int8": np.int8}

Stored = tuple[NDArray[np.generic], NDArray[np.float32] | None, pa.Buffer]

LEAST_SCALE = float(np.finfo(np.float32).tiny)
"""Below it a float32 has fewer digits."""

EXTREMES = {
    "float16": (float(np.finfo(np.float16).smallest_subnormal), float(np.finfo(np.float16).max)),
    "float32": (0.0, np.inf),
    "int8": (127 * LEAST_SCALE, np.inf),
}
"""Storage -> smallest and largest allowed magnitude of a vector's largest value."""


@dataclass(frozen=True)
class ReusedRows:
    """Rows of a new shard whose vectors are copied from older shards."""

    rows: NDArray[np.int64]  # (m,) int64 row numbers in the new shard, ascending
    batch: pa.RecordBatch  # the m rows' columns as stored


def fingerprints(recipe: dict[str, Any], roles: Iterable[Role] | None = None) -> dict[Role, str]:
    """Returns role -> the fingerprint that vectors of texts of this role stand under.

    The recipe of a corpus with roles holds `prompts`, one for each of its roles, and `input_types`, if an
    API takes such. In a fingerprint stand the prompt and the input type of its role alone, so that
    another prompt for queries makes the vectors of queries stale and no others; and the role, which decides
    the route through a model with a router. Texts of the role `text` have the fingerprint that they have in
    a corpus without roles.

    Args:
        recipe: The recipe of an embeddings manifest.
        roles: The roles of the corpus; None for those that the recipe has a prompt for.
    """
    prompts = recipe.get("prompts")
    if not isinstance(prompts, dict):
        return dict.fromkeys(roles or ROLES, fingerprint(recipe))
    shared = {key: value for key, value in recipe.items() if key not in {"prompts", "input_types"}}
    input_types = recipe.get("input_types", {})
    return {
        role: fingerprint(
            {**shared, "prompt": prompts.get(role)}
            | ({"input_type": input_types[role]} if role in input_types else {})
            | ({} if role == "text" else {"role": role})
        )
        for role in roles or [role for role in ROLES if role in prompts]
    }


def prompts_of(recipe: Mapping[str, Any]) -> dict[Role, str]:
    """Returns role -> what the teacher read before texts of that role, by the recipe of its vectors."""
    prompts = recipe.get("prompts")
    if not isinstance(prompts, dict):
        return {"text": str(recipe.get("prompt", ""))}
    return {role: str(prompts[role]) for role in ROLES if role in prompts}


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
    reused: ReusedRows | None = None,
    more: Mapping[str, pa.Array] | None = None,
) -> Object:
    """Publish the vectors of one text shard, or of its mixes.

    Args:
        store: The destination.
        key: `vectors/<teacher fingerprint>/<text digest>.arrow`, or that of mixes.
        vectors: (n, dim) float32 vectors of the rows that are not `reused`, in row order.
        text_keys: (rows,) V16 text keys of all rows.
        storage: "float16", "float32" or "int8".
        facts: Counts for the header.
        reused: Rows that are copied as they are; None for none.
        more: Further columns, which stand before the vectors.

    Raises:
        BadVectorsError: NaN, Inf, zero, or too large or small for `storage`; names the rows. Nothing is
            stored.
        TeachonceError: `vectors` and those of `reused` are not of one kind.
    """
    if reused is not None and len(reused.rows) == len(text_keys):
        return store.put(key, reused.batch, facts)
    rows = np.arange(len(text_keys))
    if reused is not None:
        rows = np.delete(rows, reused.rows)
    check_vectors(vectors, rows=rows, key=key, storage=storage)
    columns = {"text_key": text_key_array(text_keys[rows]), **(more or {})}
    if storage == "int8":
        values, scales = rounded_to_int8(vectors)
        columns |= {"vector": fixed_lists(values), "scale": pa.array(scales)}
    else:
        columns["vector"] = fixed_lists(vectors.astype(DTYPES[storage]))
    batch = pa.record_batch(columns)
    return store.put(key, batch if reused is None else _merged(key, rows, batch, reused), facts)


def row_bytes(dim: int, storage: str) -> int:
    """Returns the bytes of a row in an object of vectors, without the object's header of about 1 kB."""
    scale = np.dtype(np.float32).itemsize if storage == "int8" else 0
    return TEXT_KEY_BYTES + dim * np.dtype(DTYPES[storage]).itemsize + scale


def rounded_to_int8(vectors: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round each row to int8 with its own scale, so that no row depends on the others of its shard.

    Args:
        vectors: (n, dim), finite.

    Returns:
        (n, dim) int8, -127 to 127, rounded half to even; (n,) float32, the largest magnitude / 127. That of
        a row of zeros, which the store refuses and a table of tokens may have, is 1.
    """
    scales = np.abs(vectors).max(axis=1, initial=0.0).astype(np.float32) / np.float32(127)
    scales[scales == 0] = 1
    return np.rint(vectors / scales[:, None]).astype(np.int8), scales


def as_read(vectors: NDArray[np.float32], storage: str) -> NDArray[np.floating]:
    """Returns (n, dim) vectors as a reader gets them after they were stored as `storage`."""
    if storage == "int8":
        return _floats(*rounded_to_int8(vectors))
    stored: NDArray[np.floating] = vectors.astype(DTYPES[storage])
    return stored


def _floats(
    values: NDArray[np.generic], scales: NDArray[np.float32] | None
) -> NDArray[np.floating]:
    """Returns (n, dim) stored values times their scales; without scales the values as they are."""
    if scales is None:
        return values  # type: ignore[return-value]  # by the schema
    vectors: NDArray[np.floating] = np.multiply(values, scales[:, None], dtype=np.float32)
    return vectors


def vectors_of(batch: pa.RecordBatch) -> NDArray[np.floating]:
    """(n, dim) vectors of an object: a view of the mapped file in its own type, or int8 as float32.

    Raises:
        ValueError: int8 without a scale, or with one that is not a positive number.
    """
    return _floats(matrix_of(batch, "vector"), scales_of(batch))


def _reordered(values: NDArray[Any], order: NDArray[np.int64]) -> NDArray[Any]:
    """(n, ...) values with the first at place order[0], and so on."""
    placed = np.empty_like(values)
    placed[order] = values
    return placed


def scales_of(batch: pa.RecordBatch) -> NDArray[np.float32] | None:
    """(n,) float32 scales of the rows of an object of vectors; None if they are not int8.

    Raises:
        ValueError: there are none, or one is not a positive number.
    """
    if not pa.types.is_int8(batch.schema.field("vector").type.value_type):
        return None
    if "scale" not in batch.schema.names or batch.schema.field("scale").type != pa.float32():
        raise ValueError("vectors of int8 without their scales")
    scales: NDArray[np.float32] = batch.column("scale").to_numpy(zero_copy_only=True)
    wrong = np.flatnonzero(~(np.isfinite(scales) & (scales > 0)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"the scale of row {row} is {scales[row]:g}, not a positive number")
    return scales


def _merged(
    key: str, rows: NDArray[np.int64], batch: pa.RecordBatch, reused: ReusedRows
) -> pa.RecordBatch:
    """Merge the rows `rows` of a shard, in `batch`, with its reused rows."""
    if batch.schema != reused.batch.schema:
        kinds = [each.schema.field("vector").type for each in (batch, reused.batch)]
        raise TeachonceError(
            key,
            f"the teacher returned vectors of {kinds[0]}, and older shards hold {kinds[1]}",
            "set embed.reuse: false, and ask who made the older ones (`teachonce ls`)",
        )
    order = np.argsort(np.concatenate([rows, reused.rows]))
    return pa.concat_batches([batch, reused.batch]).take(pa.array(order))


def check_vectors(
    vectors: NDArray[np.float32], *, rows: NDArray[np.int64], key: str, storage: str
) -> None:
    """Refuse vectors that must not be stored: here they cost a second, in training a night.

    Args:
        vectors: (n, dim) float32.
        rows: (n,) int64 row numbers in the shard.
        key: The key of the shard.
        storage: "float16", "float32" or "int8".

    Raises:
        BadVectorsError: names the first rows of the shard that are wrong, and how.
    """
    if faulty_rows := poison(vectors, storage):
        fault, bad = faulty_rows[0], rows[faulty_rows[1]]
        raise BadVectorsError(
            key,
            f"{len(bad)} of {len(vectors)} vectors are {fault}: rows "
            f"{', '.join(map(str, bad[:8]))}{' …' if len(bad) > 8 else ''} of the shard",
            "set embed.storage: float32"
            if fault.startswith("too ")
            else "look at these texts, or set embed.precision: fp32; nothing of the shard was stored",
        )


def poison(vectors: NDArray[np.float32], storage: str) -> tuple[str, NDArray[np.bool_]] | None:
    """Returns the first fault and a (n,) mask of the vectors that have it; None if all may be stored."""
    largest = np.abs(vectors).max(axis=1, initial=0.0)  # NaN stays NaN
    faults = {"NaN or Inf": ~np.isfinite(largest), "zero": largest == 0.0}
    least, most = EXTREMES[storage]
    faults[f"too large for {storage}"] = np.isfinite(largest) & (largest > most)
    faults[f"too small for {storage}"] = (largest > 0.0) & (largest < least)
    return next(((fault, wrong) for fault, wrong in faults.items() if wrong.any()), None)


def check_received(batch: pa.RecordBatch, *, text_keys: NDArray[np.bytes_], storage: str) -> None:
    """Refuse an object of vectors from elsewhere that `put_vectors` would not have stored.

    Args:
        batch: The batch of the object.
        text_keys: (rows,) V16 text keys that it must have.
        storage: "float16", "float32" or "int8".

    Raises:
        ValueError: other texts, another type, vectors that are no numbers, or int8 without a scale.
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
    scales_of(batch)
    if not bool(np.isfinite(matrix_of(batch, "vector")).all()):
        raise ValueError("NaN or Inf among its vectors")


class VectorColumn(Column):
    """Vectors by row id, of texts or of mixes of them.

    Args:
        store: The store of the objects.
        manifest: The manifest that names them.
        corpus: The texts they were derived from.
        row_by_row: Whether there is a vector for each text, in their order.

    Raises:
        DamagedError: the manifest belongs to another corpus, or names vectors of another teacher or other
            settings than its recipe says.
    """

    def __init__(
        self, store: Store, manifest: Manifest, corpus: Corpus, *, row_by_row: bool
    ) -> None:
        self.manifest = manifest
        teachers = fingerprints(manifest.recipe, corpus.roles)
        # Those of another corpus have no roles to ask for.
        roles = chain((entry.role for entry in corpus.objects), repeat(corpus.roles[0]))
        check_made_by(manifest, (teachers[role] for role in roles))
        check_derived(manifest, corpus)
        super().__init__(store, manifest.objects, corpus if row_by_row else None)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self._stored(0)[0].shape[1]) if self.objects else 0

    def shard(self, shard: int) -> NDArray[np.floating]:
        """(rows of the shard, dim): a view of the mapped file in its own type, or int8 as float32."""
        values, scales, file = self._stored(shard)
        expect(file, np.arange(len(values)))
        return _floats(values, scales)

    def rows_of(self, ids: NDArray[np.integer]) -> NDArray[np.floating]:
        """(n, dim) vectors of `ids`, in their order, in the stored type, or int8 as float32."""
        vectors: NDArray[np.generic] | None = None
        scales: NDArray[np.float32] | None = None
        order = np.empty(len(ids), np.int64)
        done = 0
        for shard, places, rows in self.by_shard(ids):
            values, of_shard, file = self._stored(shard)
            expect(file, rows)
            if vectors is None:
                vectors = np.empty((len(ids), values.shape[1]), values.dtype)
                scales = None if of_shard is None else np.empty(len(ids), np.float32)
            block = slice(done, done + len(rows))
            order[block], done = places, block.stop
            # mode="clip" avoids a copy; all rows are in range.
            values.take(rows, axis=0, out=vectors[block], mode="clip")
            if scales is not None and of_shard is not None:
                scales[block] = of_shard[rows]
        if vectors is None:
            return np.empty((0, self.dim), np.float16)
        # The vectors were read in corpus order; this puts them in the order of `ids`.
        if (np.diff(order) < 0).any():
            vectors, scales = (
                _reordered(vectors, order),
                None if scales is None else _reordered(scales, order),
            )
        return _floats(vectors, scales)

    def read_ahead(self, ids: NDArray[np.integer]) -> None:
        """Ask the system to read the vectors of `ids` from the disk, so that `rows_of` need not wait."""
        for shard, _, rows in self.by_shard(ids):
            values, scales, file = self._stored(shard)
            expect(file, rows)
            for stored in (values, scales):
                if stored is not None:
                    size = stored[:1].nbytes
                    read_ahead(stored.ctypes.data + rows * size, np.full(len(rows), size))

    @cached_property
    def _stored(self) -> Callable[[int], Stored]:
        return lru_cache(MAPS)(self._read)

    def _read(self, shard: int) -> Stored:
        """(rows of the shard, dim) as stored, a view of the file; (rows,) scales of int8; the file."""
        batch = self._open(shard)
        try:
            return matrix_of(batch, "vector"), scales_of(batch), file_of(batch)
        except ValueError as error:
            raise self.damaged(shard, str(error)) from error


class Embeddings(VectorColumn):
    """The teacher's vectors of a corpus, a row for each text."""

    def __init__(self, store: Store, manifest: Manifest, corpus: Corpus) -> None:
        super().__init__(store, manifest, corpus, row_by_row=True)
