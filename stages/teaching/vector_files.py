"""Vectors that somebody has already -> shards of the store, as if a teacher had made them.

What they are and of which texts is known; which model made them, with which prompt and pooling, is not.
So they are named by the name that a person gives them and by their width, and the recipe says `unknown` of
all else. Several files may be imported under one name, in any order: what is in the store counts.
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
from stages.teaching.reuse import Known
from storage import durable, regular
from storage.column import TEXT_KEY_BYTES, KeyIndex, text_keys_of
from storage.corpus import Corpus, text_digest, text_key
from storage.embeddings import as_read, poison, put_vectors, vectors_of
from storage.errors import MissingError, TeachonceError, shown
from storage.store import Store

ROWS_NAMED = 8
ROWS_AT_ONCE = 8192

ARCHIVE = b"PK"
"""How a zip file begins, which a .npz is."""

SAME_COSINE = 0.9998
"""Vectors of one text may differ by rounding: bf16 in other batches 1 - cosine 7e-5, int8 as much again."""
SAME_LENGTH = 0.005
"""And by this share in length; int8 takes up to 0.004."""


@dataclass(frozen=True)
class Imported:
    """Vectors and whose they are.

    Args:
        path: The file of the vectors.
        vectors: (n, dim) float16, float32 or float64; mapped.
        texts: The file of their texts.
        index: Keys of the texts, k <= n of them: lines that give no text have none.
        rows: (k,) row of `vectors` for each key of `index`.
    """

    path: Path
    vectors: NDArray[np.floating]
    texts: Path
    index: KeyIndex
    rows: NDArray[np.int64]

    @property
    def dim(self) -> int:
        """Values of a vector."""
        return int(self.vectors.shape[1])


def read(vectors: Path, texts: Path, *, field: str) -> Imported:
    """Open both files and read the texts; 32 bytes a text are kept, 48 while they are read.

    Args:
        vectors: A .npy file of shape (n, dim).
        texts: n texts in the same order, in any kind of file that `shard` reads.
        field: The field or column that holds the text, in files that have fields.

    Raises:
        MissingError: one of them is not there.
        TeachonceError: no such array, other counts, a damaged file, or two vectors of one text; nothing
            is unpickled.
    """
    found = _open(vectors)
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
        # As `shard` does, or the keys would be those of other texts.
        text = "" if isinstance(item, Rejected) else item.strip()
        if text:
            keys += text_key(text)
            rows.append(count)
        count += 1
    if count != len(found):
        raise TeachonceError(
            texts,
            f"{count:,} texts, but {len(found):,} vectors in {shown(vectors)}",
            "give both files the same rows in the same order, without a header line",
        )
    names, places = np.frombuffer(keys, f"V{TEXT_KEY_BYTES}"), np.frombuffer(rows, np.int64)
    index = KeyIndex(names)
    _check_no_contradiction(vectors, found, places, places[index.places(names)])
    return Imported(vectors, found, texts, index, places)


def put(given: Imported, *, corpus: Corpus, store: Store, teacher: str, storage: str) -> int:
    """Publish a shard of vectors for each text shard; rows are found by text key.

    What was imported before counts: a text that is in the store keeps the vector it has there. Of a shard
    that is not whole yet, the rows that are given are published under the digest of their texts, so that
    the next import, or `embed`, finds them.

    Args:
        given: What `read` returned.
        corpus: The texts that need vectors.
        store: Where to.
        teacher: The fingerprint.
        storage: As `embed.storage` says.

    Returns:
        How many texts of the corpus are among those given.

    Raises:
        TeachonceError: a text has another vector than it had before (nothing is stored), or one that is
            NaN, Inf, zero or too large for `storage` (nothing of its shard is stored).
        MissingError: a text of the corpus has no vector yet; what was given is stored.
    """
    folder = f"vectors/{teacher}"
    _check_same_as_before(given, store, folder, storage)
    keys = [f"{folder}/{corpus.shard_digest(shard)}.arrow" for shard in range(len(corpus.objects))]
    text_keys = {shard: corpus.text_keys_in([shard]) for shard in range(len(keys))}
    todo = {shard: of for shard, of in text_keys.items() if store.find(keys[shard]) is None}
    missing = _fill(given, corpus, store, keys, todo, storage) if todo else np.empty(0, np.int64)
    _check_all_there(given, corpus, missing)
    return sum(int((given.index.places(of) >= 0).sum()) for of in text_keys.values())


def _fill(
    given: Imported,
    corpus: Corpus,
    store: Store,
    keys: Sequence[str],
    todo: Mapping[int, NDArray[np.bytes_]],
    storage: str,
) -> NDArray[np.int64]:
    """Publish what can be of the shards `todo`; the rows of the corpus that still have no vector."""
    folder = keys[0].rpartition("/")[0]
    older = sorted(set(store.keys(folder)) - set(keys))
    known = Known(store, older, todo, storage=storage)
    progress = Progress("import", total=sum(map(len, todo.values())), unit="vectors")
    missing = []
    for shard, text_keys in todo.items():
        rows = known.unknown_rows(shard)
        places = given.index.places(text_keys[rows])
        there = places >= 0
        vectors = _vectors(given, given.rows[places[there]], storage)
        if there.all():
            put_vectors(
                store,
                keys[shard],
                vectors=vectors,
                text_keys=text_keys,
                storage=storage,
                facts={"uncounted": len(text_keys)},
                known=known.rows_of(shard),
            )
        elif there.any():
            texts = corpus.take(corpus.starts[shard] + rows[there])
            put_vectors(
                store,
                f"{folder}/{text_digest(texts)}.arrow",
                vectors=vectors,
                text_keys=text_keys[rows[there]],
                storage=storage,
                facts={"uncounted": len(texts)},
            )
        missing.append(corpus.starts[shard] + rows[~there])
        progress.advance(len(text_keys))
    return np.concatenate(missing)


def _open(path: Path) -> NDArray[np.floating]:
    """The array of a .npy file, mapped.

    Raises:
        MissingError: no such file.
        TeachonceError: no array of n vectors of floating-point numbers.
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
        except Exception as error:  # numpy's parser raises whatever comes of a damaged header
            cause = shown(error) or type(error).__name__
            raise TeachonceError(path, f"no .npy file: {cause}", cure) from None
        start, size = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.hasobject:
        raise TeachonceError(path, "no .npy file of numbers: an array of Python objects", cure)
    if len(shape) != 2 or not all(type(length) is int and length > 0 for length in shape):
        raise TeachonceError(path, f"an array of shape {shown(shape)}, not (texts, dim)", cure)
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise TeachonceError(path, f"an array of {shown(dtype)}", cure)
    # Before anything is made of what the header says.
    if (wanted := math.prod(shape) * dtype.itemsize) != size - start:
        problem = (
            f"no .npy file that is whole: its header says {shape[0]:,} vectors of {shape[1]:,} numbers, "
            f"which are {wanted:,} bytes, and it has {size - start:,}"
        )
        raise TeachonceError(path, problem, f"copy or make the file again; {cure}")
    return np.memmap(path, dtype, "r", start, shape, "F" if by_columns else "C")


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns are stored one after the other, and type, as a .npy file says them."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(
        f"version {version[0]}.{version[1]}, which arrays of plain numbers do not need"
    )


def _check_all_there(given: Imported, corpus: Corpus, missing: NDArray[np.int64]) -> None:
    if len(missing):
        (first,) = corpus.take(missing[:1])
        raise MissingError(
            given.texts,
            f"{len(missing):,} of {corpus.rows:,} texts of the corpus are not in it, and were not "
            f"imported before under this name: rows {_some(missing)} of the corpus, the first is "
            f"{shown(repr(first))}",
            "import these texts and their vectors, too (those of this file are kept), or take them out of "
            "`shard.sources` and run `teachonce shard`",
        )


def _check_same_as_before(given: Imported, store: Store, folder: str, storage: str) -> None:
    """Refuse a text whose vector is another than the one it has in the store."""
    for key in store.keys(folder):
        try:
            places = given.index.places(text_keys_of(store.glance(key)))
            stored = np.flatnonzero(places >= 0)
            found = store.find(key) if len(stored) else None
            if found is None:
                continue
            before = vectors_of(store.open(found))
        except TeachonceError as error:
            log.warning(
                "import: a shard that cannot be trusted is compared with nothing: %s", error
            )
            continue
        rows = given.rows[places[stored]]
        row = _first_other(given.vectors, rows, before, stored, storage)
        if row is not None:
            raise TeachonceError(
                given.path,
                f"row {rows[row]}, counted from 0, is another vector than its text had when it was "
                "imported before under this name",
                "write another name into embed.teacher (imported:NAME) and import all texts under it, or "
                "take this text out of the file",
            )


def _check_no_contradiction(
    path: Path, vectors: NDArray[np.floating], rows: NDArray[np.int64], firsts: NDArray[np.int64]
) -> None:
    """Refuse a text that stands twice in a file, with two vectors."""
    again = np.flatnonzero(rows != firsts)
    row = _first_other(vectors, rows[again], vectors, firsts[again])
    if row is not None:
        raise TeachonceError(
            path,
            f"rows {firsts[again][row]} and {rows[again][row]}, counted from 0, are two vectors of one "
            "text",
            "keep the right one of them",
        )


def _first_other(
    ours: NDArray[np.floating],
    rows: NDArray[np.int64],
    theirs: NDArray[np.floating],
    their_rows: NDArray[np.int64],
    storage: str | None = None,
) -> int | None:
    """The first place at which two rows are no vectors of one text; None if all are.

    What is no number or zero is left to those who store it. `storage`: as which theirs were stored.
    """
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        with np.errstate(all="ignore"):
            a = ours[rows[some]].astype(np.float32)
            a = (a if storage is None else as_read(a, storage)).astype(np.float64)
            b = theirs[their_rows[some]].astype(np.float64)
            lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
            cosines = np.einsum("nd,nd->n", a, b) / (lengths[0] * lengths[1])
            ratios = lengths[0] / lengths[1]
        other = (cosines < SAME_COSINE) | (np.abs(ratios - 1) > SAME_LENGTH)
        if other.any():
            return first + int(np.argmax(other))
    return None


def _vectors(given: Imported, rows: NDArray[np.int64], storage: str) -> NDArray[np.float32]:
    """(n, dim) given vectors, as `storage` can hold them."""
    with np.errstate(over="ignore"):  # what is too large for float32 is Inf, and refused as such
        vectors = given.vectors[rows].astype(np.float32)
    if found := poison(vectors, storage):
        fault, bad = found[0], np.sort(rows[found[1]])
        raise TeachonceError(
            given.path,
            f"vectors that are {fault}: rows {_some(bad)} of the file, counted from 0",
            "set embed.storage: float32"
            if fault.startswith("too")
            else "make these vectors again, or take their texts out of `shard.sources`",
        )
    return vectors


def _some(rows: NDArray[np.int64]) -> str:
    return f"{', '.join(map(str, rows[:ROWS_NAMED]))}{' …' if len(rows) > ROWS_NAMED else ''}"
