"""Import existing vectors from .npy files as shards of the store, as if a teacher had encoded the texts.

Which model made them, with which prompt and pooling, is unknown. So the recipe holds the name that the user
gives them and their width, and `unknown` for every other setting. Several files may be imported under one
name, in any order: later imports and `embed` reuse what is in the store.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stages.outcome import Progress, log
from stages.reading.corpus_files import ENDINGS, Rejected
from stages.reading.corpus_files import read as read_texts
from stages.reading.files import is_regular
from stages.teaching.reuse import ReusableVectors
from storage import durable, regular
from storage.column import TEXT_KEY_BYTES, KeyIndex, text_keys_of
from storage.corpus import Corpus, text_digest, text_key
from storage.embeddings import as_read, poison, put_vectors, vectors_of
from storage.errors import MissingError, TeachonceError, shown
from storage.store import Store

ROWS_NAMED = 8
ROWS_AT_ONCE = 8192

ARCHIVE = b"PK"
"""First bytes of a zip file; a .npz is one."""

SAME_COSINE = 0.9998
"""Lowest cosine of two vectors of one text; measured 1 - cosine: bf16 in other batches 7e-5, int8 alike."""
SAME_LENGTH = 0.005
"""Largest relative difference in length of two vectors of one text; int8 gives up to 0.004."""


@dataclass(frozen=True)
class ImportedVectors:
    """A file of vectors with the keys of their texts."""

    path: Path  # the file of the vectors
    vectors: NDArray[np.floating]  # (n, dim) float16, float32 or float64, memory-mapped
    texts: Path  # the file of the texts
    index: KeyIndex  # index of the k <= n text keys; empty and rejected lines have none
    rows: NDArray[np.int64]  # (k,) row of `vectors` for each key of `index`

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.vectors.shape[1])


def read(vectors: Path, texts: Path, *, field: str) -> ImportedVectors:
    """Open both files and read the text keys. Memory: 32 bytes a text, 48 while reading.

    Args:
        vectors: A .npy file of shape (n, dim).
        texts: n texts in the same order, in any kind of file that `shard` reads.
        field: The field or column that holds the text, in files that have fields.

    Raises:
        MissingError: one of the files does not exist.
        TeachonceError: the array has the wrong shape or type, the counts differ, a file is damaged, or one
            text has two different vectors. Nothing is unpickled.
    """
    matrix = _open(vectors)
    if not is_regular(texts, str(texts)):
        raise MissingError(texts, "no such file", "name the file of the texts")
    if not texts.name.lower().endswith(ENDINGS):
        raise TeachonceError(
            texts,
            "nothing reads that ending",
            f"name a file that ends in one of {' '.join(ENDINGS)}",
        )
    keys, rows, count = bytearray(), array("q"), 0
    for item in read_texts(texts, field):
        # Stripped as `shard` does, so that the keys are the same.
        text = "" if isinstance(item, Rejected) else item.strip()
        if text:
            keys += text_key(text)
            rows.append(count)
        count += 1
    if count != len(matrix):
        raise TeachonceError(
            texts,
            f"{count:,} texts, but {len(matrix):,} vectors in {shown(vectors)}",
            "give both files the same rows in the same order, without a header line",
        )
    names, places = np.frombuffer(keys, f"V{TEXT_KEY_BYTES}"), np.frombuffer(rows, np.int64)
    index = KeyIndex(names)
    _check_no_contradiction(vectors, matrix, places, places[index.places(names)])
    return ImportedVectors(vectors, matrix, texts, index, places)


def put(
    imported: ImportedVectors, *, corpus: Corpus, store: Store, teacher: str, storage: str
) -> int:
    """Publish a shard of vectors for each text shard; rows are matched by text key.

    A text whose vector was imported before keeps that vector. If some texts of a shard have no vector yet,
    the others are published under the digest of their texts, so that the next import, or `embed`, reuses
    them.

    Args:
        imported: What `read` returned.
        corpus: The texts that need vectors.
        store: The destination.
        teacher: The fingerprint of the imported vectors.
        storage: The setting `embed.storage`.

    Returns:
        The number of texts of the corpus that the file holds.

    Raises:
        TeachonceError: a text has another vector than it had before (nothing is stored), or one that is
            NaN, Inf, zero or too large for `storage` (nothing of its shard is stored).
        MissingError: a text of the corpus has no vector yet; the imported ones are stored.
    """
    folder = f"vectors/{teacher}"
    _check_same_as_before(imported, store, folder, storage)
    keys = [f"{folder}/{corpus.shard_digest(shard)}.arrow" for shard in range(len(corpus.objects))]
    text_keys = {shard: corpus.text_keys_in([shard]) for shard in range(len(keys))}
    todo = {shard: of for shard, of in text_keys.items() if store.find(keys[shard]) is None}
    missing = (
        _publish_shards(imported, corpus, store, keys, todo, storage)
        if todo
        else np.empty(0, np.int64)
    )
    _check_all_there(imported, corpus, missing)
    return sum(int((imported.index.places(of) >= 0).sum()) for of in text_keys.values())


def _publish_shards(
    imported: ImportedVectors,
    corpus: Corpus,
    store: Store,
    keys: Sequence[str],
    todo: Mapping[int, NDArray[np.bytes_]],
    storage: str,
) -> NDArray[np.int64]:
    """Publish the vectors of the shards `todo`; returns the corpus rows that still have no vector."""
    folder = keys[0].rpartition("/")[0]
    older = sorted(set(store.keys(folder)) - set(keys))
    reusable = ReusableVectors(store, older, todo, storage=storage)
    progress = Progress("import", total=sum(map(len, todo.values())), unit="vectors")
    missing = []
    for shard, text_keys in todo.items():
        rows = reusable.missing_rows(shard)
        places = imported.index.places(text_keys[rows])
        have_vector = places >= 0
        vectors = _vectors(imported, imported.rows[places[have_vector]], storage)
        if have_vector.all():
            put_vectors(
                store,
                keys[shard],
                vectors=vectors,
                text_keys=text_keys,
                storage=storage,
                facts={"uncounted": len(text_keys)},
                reused=reusable.reused_rows(shard),
            )
        elif have_vector.any():
            texts = corpus.take(corpus.starts[shard] + rows[have_vector])
            put_vectors(
                store,
                f"{folder}/{text_digest(texts)}.arrow",
                vectors=vectors,
                text_keys=text_keys[rows[have_vector]],
                storage=storage,
                facts={"uncounted": len(texts)},
            )
        missing.append(corpus.starts[shard] + rows[~have_vector])
        progress.advance(len(text_keys))
    return np.concatenate(missing)


def _open(path: Path) -> NDArray[np.floating]:
    """Returns the array of a .npy file, memory-mapped.

    Raises:
        MissingError: the file does not exist.
        TeachonceError: it is not a .npy file with an (n, dim) array of floating-point numbers.
    """
    cure = "save them by numpy.save as one array of float16, float32 or float64, one row a text"
    if not is_regular(path, str(path)):
        raise MissingError(path, "no such file", "name the file of the vectors")
    with durable.named(path, "reading"), regular.opened(path) as file:
        if file.read(len(ARCHIVE)) == ARCHIVE:
            raise TeachonceError(path, "an archive (.npz), not one array", cure)
        file.seek(0)
        try:
            shape, by_columns, dtype = _header(file)
        except Exception as error:  # numpy's parser raises any error for a damaged header
            cause = shown(error) or type(error).__name__
            raise TeachonceError(path, f"no .npy file: {cause}", cure) from None
        start, size = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.hasobject:
        raise TeachonceError(path, "no .npy file of numbers: an array of Python objects", cure)
    if len(shape) != 2 or not all(type(length) is int and length > 0 for length in shape):
        raise TeachonceError(path, f"an array of shape {shown(shape)}, not (texts, dim)", cure)
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise TeachonceError(path, f"an array of {shown(dtype)}", cure)
    # Checked before any memory is mapped on the word of the header.
    if (wanted := math.prod(shape) * dtype.itemsize) != size - start:
        problem = (
            f"no .npy file that is whole: its header says {shape[0]:,} vectors of {shape[1]:,} numbers, "
            f"which are {wanted:,} bytes, and it has {size - start:,}"
        )
        raise TeachonceError(path, problem, f"copy or make the file again; {cure}")
    return np.memmap(path, dtype, "r", start, shape, "F" if by_columns else "C")


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Returns a .npy file's shape, whether it is in Fortran order, and its dtype."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(
        f"version {version[0]}.{version[1]}, which arrays of plain numbers do not need"
    )


def _check_all_there(imported: ImportedVectors, corpus: Corpus, missing: NDArray[np.int64]) -> None:
    if len(missing):
        (first,) = corpus.take(missing[:1])
        raise MissingError(
            imported.texts,
            f"{len(missing):,} of {corpus.rows:,} texts of the corpus are not in it, and were not "
            f"imported before under this name: rows {_first_rows(missing)} of the corpus, the first is "
            f"{shown(repr(first))}",
            "import these texts and their vectors, too (those of this file are kept), or take them out of "
            "`shard.sources` and run `teachonce shard`",
        )


def _check_same_as_before(
    imported: ImportedVectors, store: Store, folder: str, storage: str
) -> None:
    """Refuse a text that has another vector in the store."""
    for key in store.keys(folder):
        try:
            places = imported.index.places(text_keys_of(store.glance(key)))
            stored = np.flatnonzero(places >= 0)
            entry = store.find(key) if len(stored) else None
            if entry is None:
                continue
            before = vectors_of(store.open(entry))
        except TeachonceError as error:
            log.warning("import: a damaged shard is not compared with the new vectors: %s", error)
            continue
        rows = imported.rows[places[stored]]
        row = _first_mismatch(imported.vectors, rows, before, stored, storage)
        if row is not None:
            raise TeachonceError(
                imported.path,
                f"row {rows[row]}, counted from 0, is another vector than its text had when it was "
                "imported before under this name",
                "write another name into embed.teacher (imported:NAME) and import all texts under it, or "
                "take this text out of the file",
            )


def _check_no_contradiction(
    path: Path, vectors: NDArray[np.floating], rows: NDArray[np.int64], firsts: NDArray[np.int64]
) -> None:
    """Refuse a file that holds one text twice with different vectors."""
    repeats = np.flatnonzero(rows != firsts)
    row = _first_mismatch(vectors, rows[repeats], vectors, firsts[repeats])
    if row is not None:
        raise TeachonceError(
            path,
            f"rows {firsts[repeats][row]} and {rows[repeats][row]}, counted from 0, are two vectors of one "
            "text",
            "keep the right one of them",
        )


def _first_mismatch(
    ours: NDArray[np.floating],
    rows: NDArray[np.int64],
    theirs: NDArray[np.floating],
    their_rows: NDArray[np.int64],
    storage: str | None = None,
) -> int | None:
    """Returns the first place at which two rows cannot be vectors of one text; None if there is none.

    NaN, Inf and zero vectors match anything; `put_vectors` refuses them. `storage` is the rounding of
    `theirs`, to be applied to `ours`; None for none.
    """
    for first in range(0, len(rows), ROWS_AT_ONCE):
        block = slice(first, first + ROWS_AT_ONCE)
        with np.errstate(all="ignore"):
            a = ours[rows[block]].astype(np.float32)
            a = (a if storage is None else as_read(a, storage)).astype(np.float64)
            b = theirs[their_rows[block]].astype(np.float64)
            lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
            cosines = np.einsum("nd,nd->n", a, b) / (lengths[0] * lengths[1])
            ratios = lengths[0] / lengths[1]
        differs = (cosines < SAME_COSINE) | (np.abs(ratios - 1) > SAME_LENGTH)
        if differs.any():
            return first + int(np.argmax(differs))
    return None


def _vectors(
    imported: ImportedVectors, rows: NDArray[np.int64], storage: str
) -> NDArray[np.float32]:
    """Returns (n, dim) imported vectors as float32.

    Raises:
        TeachonceError: some cannot be stored as `storage`.
    """
    with np.errstate(over="ignore"):  # a value too large for float32 becomes Inf, which is refused
        vectors = imported.vectors[rows].astype(np.float32)
    if faulty_rows := poison(vectors, storage):
        fault, bad = faulty_rows[0], np.sort(rows[faulty_rows[1]])
        raise TeachonceError(
            imported.path,
            f"vectors that are {fault}: rows {_first_rows(bad)} of the file, counted from 0",
            "set embed.storage: float32"
            if fault.startswith("too")
            else "make these vectors again, or take their texts out of `shard.sources`",
        )
    return vectors


def _first_rows(rows: NDArray[np.int64]) -> str:
    return f"{', '.join(map(str, rows[:ROWS_NAMED]))}{' …' if len(rows) > ROWS_NAMED else ''}"
