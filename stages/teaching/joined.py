"""Concatenate the unit vectors of several teachers into the vectors of one joined teacher.

The cosine of two joined vectors is the mean of the teachers' cosines, as in an ensemble of them
(DistillCSE's mean over teachers). Learning and mining then see one teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stages.outcome import Progress
from stages.vectors import unit
from storage.column import text_keys_of
from storage.corpus import Corpus
from storage.embeddings import Embeddings, put_vectors
from storage.manifest import fingerprint
from storage.store import Store


def files_of(teachers: Sequence[Embeddings]) -> dict[str, str]:
    """Returns the joined teacher's entry in the recipe: the teachers' fingerprints, in order."""
    return {
        f"teacher {place}": fingerprint(teacher.manifest.recipe)
        for place, teacher in enumerate(teachers, start=1)
    }


def put(
    teachers: Sequence[Embeddings], *, corpus: Corpus, store: Store, teacher: str, storage: str
) -> None:
    """Publish a shard of joined vectors for each text shard.

    Args:
        teachers: Two or more caches of this corpus, of any widths.
        corpus: The texts.
        store: The destination.
        teacher: The fingerprint of the joined teacher.
        storage: The setting `embed.storage`.
    """
    progress = Progress("join", total=corpus.rows, unit="vectors")
    for shard in range(len(corpus.objects)):
        entry = put_vectors(
            store,
            f"vectors/{teacher}/{corpus.shard_digest(shard)}.arrow",
            vectors=joined([cache.shard(shard) for cache in teachers]),
            text_keys=text_keys_of(corpus.batch(shard)),
            storage=storage,
            facts={"uncounted": len(corpus.batch(shard))},
        )
        progress.advance(entry.rows)


def joined(vectors: Sequence[NDArray[np.floating]]) -> NDArray[np.float32]:
    """Returns (n, d1 + d2 + ...) unit vectors of (n, d1), (n, d2), ...; all parts have the same length."""
    parts = np.concatenate([unit(part) for part in vectors], axis=1)
    scaled: NDArray[np.float32] = parts * np.float32(len(vectors) ** -0.5)
    return scaled
