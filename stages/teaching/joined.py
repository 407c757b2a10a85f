"""The vectors of several teachers, side by side in one: concatenated unit vectors.

The cosine of two joined vectors is the mean of the teachers' cosines, which is what an ensemble of them
says (DistillCSE's mean over teachers). Learning and mining then know one teacher.
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
    """What stands for the joined teacher in the recipe: each one's fingerprint, in order."""
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
        store: Where to.
        teacher: The fingerprint of the joined one.
        storage: As `embed.storage` says.
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
    """(n, d1), (n, d2), ... -> (n, d1 + d2 + ...) of unit length, each part scaled to the same length."""
    parts = np.concatenate([unit(part) for part in vectors], axis=1)
    scaled: NDArray[np.float32] = parts * np.float32(len(vectors) ** -0.5)
    return scaled
