"""The caches of one corpus that a student learns from, opened together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.mixes import Mixes
from storage.negatives import Negatives
from storage.readings import Readings
from storage.split import Split
from storage.store import Store


@dataclass(frozen=True)
class Caches:
    """A corpus, the teacher's vectors, the split, and what else a recipe needs.

    Args:
        corpus: The texts.
        embeddings: The teacher's vectors of `corpus`.
        negatives: Mined neighbours; None if no objective reads them.
        split: The split of the rows.
        store: The store of all these, and of token ids.
        mixes: The teacher's vectors of mixes; None if no objective reads them.
        readings: Readings of texts; None if the student reads texts as they are.
        labelled: (n, 3) int64 row ids of labelled triplets: anchor, positive, negative; None if the recipe
            reads none.
    """

    corpus: Corpus
    embeddings: Embeddings
    negatives: Negatives | None
    split: Split
    store: Store
    mixes: Mixes | None = None
    readings: Readings | None = None
    labelled: NDArray[np.int64] | None = None
