"""The teacher's vectors of the documents that retrieval is measured on, kept for its students.

A student whose vectors lie in the teacher's space can search an index that the teacher built: its queries
cost little, and the documents are not embedded again. `evaluate teacher` leaves the vectors here, so that
a box without the teacher can measure it. One safetensors file a set; DVC keeps the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.vectors import unit
from storage import durable, regular
from storage.corpus import text_key
from storage.errors import DamagedError


def write_documents(
    folder: Path,
    sets: Mapping[str, tuple[Sequence[str], NDArray[np.float32]]],
    *,
    teacher: str,
    as_read: str,
) -> None:
    """Replace the folder by a file for each set: n document texts and their (n, dim) vectors.

    The teacher's fingerprint does not cover `as_read`, the truncation of the documents.
    """
    from safetensors.numpy import save_file

    with durable.replace_folder(folder) as scratch:
        for name, (texts, vectors) in sets.items():
            # Search compares directions: of length 1 they fit float16, whatever the teacher's are.
            kept: dict[str, NDArray[Any]] = {
                "vectors": unit(vectors).astype(np.float16),
                "text_keys": _keys(texts),
            }
            save_file(
                kept,
                scratch / f"{name}.safetensors",
                metadata={"teacher": teacher, "as_read": as_read},
            )


def read_documents(
    folder: Path, name: str, texts: Sequence[str], *, teacher: str, as_read: str
) -> NDArray[np.float32] | None:
    """Returns (n, dim) unit vectors of the n documents of one set; None if there is no file.

    They must be of these texts and of the teacher with this fingerprint, and truncated as `as_read` says.

    Raises:
        DamagedError: the vectors are of other documents, another teacher or another truncation, or the
            file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / f"{name}.safetensors"
    if not path.exists():
        return None
    cure = "run `teachonce evaluate teacher`, or `dvc repro evaluate_teacher`"
    try:
        regular.check(path)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            vectors, keys = file.get_tensor("vectors"), file.get_tensor("text_keys")
    except SafetensorError as error:
        raise DamagedError(path, f"no safetensors file of documents: {error}", cure) from error
    if metadata.get("teacher") != teacher:
        raise DamagedError(path, "vectors of another teacher than data/embeddings.json has", cure)
    if (read_as := metadata.get("as_read")) != as_read:
        problem = f"documents read with {read_as or 'another max_tokens'}, where evaluate has {as_read} now"
        raise DamagedError(path, problem, cure)
    if not np.array_equal(keys, _keys(texts)):
        raise DamagedError(path, f"vectors of other documents than the set {name} has now", cure)
    documents: NDArray[np.float32] = vectors.astype(np.float32)
    return documents


def _keys(texts: Sequence[str]) -> NDArray[np.uint8]:
    """(n, 16) text keys."""
    keys = np.frombuffer(b"".join(text_key(text) for text in texts), np.uint8)
    return keys.reshape(len(texts), -1)
