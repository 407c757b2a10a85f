"""Vectors that somebody has already -> shards of the store, as if a teacher had made them.

What they are and of which texts is known; which model made them, with which prompt and pooling, is not.
So they are named by their own hashes, and the recipe says `unknown` of all else.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.models import sha256_of
from stages.outcome import Progress
from stages.readers import ENDINGS, Rejected
from stages.readers import read as read_texts
from storage.column import TEXT_KEY_BYTES, KeyIndex, text_keys_of
from storage.corpus import Corpus, text_key
from storage.embeddings import poison, put_vectors
from storage.errors import MissingError, TeachonceError, shown
from storage.store import Store

ROWS_NAMED = 8


@dataclass(frozen=True)
class Imported:
    """Vectors and whose they are.

    Args:
        path: The file of the vectors.
        vectors: (n, dim) float16, float32 or float64; mapped.
        texts: The file of their texts.
        index: Keys of the texts, k <= n of them: lines that give no text have none.
        rows: (k,) row of `vectors` for each key of `index`.
        files: What stands for the teacher in the recipe: the sha256 of the file of vectors, and one over
            the texts, so that the same texts in another format are the same.
    """

    path: Path
    vectors: NDArray[np.floating]
    texts: Path
    index: KeyIndex
    rows: NDArray[np.int64]
    files: dict[str, str]


def read(vectors: Path, texts: Path, *, field: str) -> Imported:
    """Open both files and read the texts; 32 bytes a text are kept, 48 while they are read.

    Args:
        vectors: A .npy file of shape (n, dim).
        texts: n texts in the same order, in any kind of file that `shard` reads.
        field: The field or column that holds the text, in files that have fields.

    Raises:
        MissingError: one of them is not there.
        TeachonceError: no such array, other counts, or a damaged file; nothing is unpickled.
    """
    found = _open(vectors)
    if not texts.is_file():
        raise MissingError(texts, "no such file", "name the file of the texts")
    if not texts.name.lower().endswith(ENDINGS):
        raise TeachonceError(
            texts,
            "nothing reads that ending",
            f"name a file that ends in one of {' '.join(ENDINGS)}",
        )
    keys, rows, total, count = bytearray(), array("q"), hashlib.sha256(), 0
    for item in read_texts(texts, field):
        # As `shard` does, or the keys would be those of other texts.
        text = "" if isinstance(item, Rejected) else item.strip()
        content = text.encode()
        total.update(len(content).to_bytes(8, "little") + content)
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
    return Imported(
        vectors,
        found,
        texts,
        KeyIndex(np.frombuffer(keys, f"V{TEXT_KEY_BYTES}")),
        np.frombuffer(rows, np.int64),
        {"vectors": sha256_of(vectors), "texts": total.hexdigest()},
    )


def put(given: Imported, *, corpus: Corpus, store: Store, teacher: str, storage: str) -> None:
    """Publish a shard of vectors for each text shard; rows are found by text key.

    A text that stands twice among those given has the first of its vectors.

    Args:
        given: What `read` returned.
        corpus: The texts that need vectors.
        store: Where to.
        teacher: The fingerprint.
        storage: As `embed.storage` says.

    Raises:
        TeachonceError: a text of the corpus has no vector (nothing is stored), or one that is NaN, Inf,
            zero or too large for `storage` (nothing of its shard is stored).
    """
    batches = [corpus.batch(shard) for shard in range(len(corpus.objects))]
    places = [given.index.places(text_keys_of(batch)) for batch in batches]
    _check_all_there(given, corpus, np.concatenate(places))
    progress = Progress("import", total=corpus.rows, unit="vectors")
    for shard, batch in enumerate(batches):
        rows = given.rows[places[shard]]
        with np.errstate(
            over="ignore"
        ):  # what is too large for float32 is Inf, and refused as such
            vectors = given.vectors[rows].astype(np.float32)
        _check_no_poison(given, vectors, rows, storage)
        put_vectors(
            store,
            f"vectors/{teacher}/{corpus.shard_digest(shard)}.arrow",
            vectors=vectors,
            text_keys=text_keys_of(batch),
            storage=storage,
            facts={"uncounted": len(rows)},
        )
        progress.advance(len(rows))


def _open(path: Path) -> NDArray[np.floating]:
    """The array of a .npy file, mapped.

    Raises:
        MissingError: no such file.
        TeachonceError: no array of n vectors of floating-point numbers.
    """
    cure = "save them by numpy.save as one array of float16, float32 or float64, one row a text"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise MissingError(path, "no such file", "name the file of the vectors") from None
    except (OSError, ValueError, EOFError) as error:
        raise TeachonceError(path, f"no .npy file: {shown(error)}", cure) from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise TeachonceError(path, "an archive (.npz), not one array", cure)
    if found.ndim != 2 or 0 in found.shape:
        raise TeachonceError(path, f"an array of shape {found.shape}, not (texts, dim)", cure)
    if found.dtype.kind != "f" or found.dtype.itemsize not in (2, 4, 8):
        raise TeachonceError(path, f"an array of {shown(found.dtype)}", cure)
    return found


def _check_all_there(given: Imported, corpus: Corpus, places: NDArray[np.int64]) -> None:
    missing = np.flatnonzero(places < 0)
    if len(missing):
        (first,) = corpus.take(missing[:1])
        raise TeachonceError(
            given.texts,
            f"{len(missing):,} of {corpus.rows:,} texts of the corpus are not in it: rows "
            f"{_some(missing)} of the corpus, the first is {shown(repr(first))}",
            "add these texts and their vectors, or take them out of `shard.sources` and run "
            "`teachonce shard`",
        )


def _check_no_poison(
    given: Imported, vectors: NDArray[np.float32], rows: NDArray[np.int64], storage: str
) -> None:
    if found := poison(vectors, storage):
        fault, bad = found[0], np.sort(rows[found[1]])
        raise TeachonceError(
            given.path,
            f"vectors that are {fault}: rows {_some(bad)} of the file, counted from 0",
            "set embed.storage: float32"
            if fault.startswith("too")
            else "make these vectors again, or take their texts out of `shard.sources`",
        )


def _some(rows: NDArray[np.int64]) -> str:
    return f"{', '.join(map(str, rows[:ROWS_NAMED]))}{' …' if len(rows) > ROWS_NAMED else ''}"
