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
    """A corpus, the teacher's vectors, the split, and what else a recipe needs."""

    corpus: Corpus
    embeddings: Embeddings  # the teacher's vectors of `corpus`
    negatives: Negatives | None  # mined neighbours; None if no objective reads them
    split: Split  # the split of the rows
    store: Store  # the store of all these, and of token ids
    mixes: Mixes | None = None  # the teacher's vectors of mixes; None if no objective reads them
    # Readings of texts; None if the student reads texts as they are.
    readings: Readings | None = None
    # (n, 3) int64 row ids of labelled triplets: anchor, positive, negative; None if the recipe
    # reads none.
    labelled: NDArray[np.int64] | None = None
