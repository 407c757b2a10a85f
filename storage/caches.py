"""The caches of one corpus, opened together: all that a student learns from."""

from __future__ import annotations

from dataclasses import dataclass

from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.negatives import Negatives
from storage.split import Split
from storage.store import Store


@dataclass(frozen=True)
class Caches:
    """Texts, the teacher's vectors of them, mined neighbours if somebody asks for them, and the split.

    Args:
        corpus: Texts.
        embeddings: The teacher's vectors of `corpus`.
        negatives: Mined from both; None where no objective reads them.
        split: The split of the rows.
        store: The store of all these, and of token ids.
    """

    corpus: Corpus
    embeddings: Embeddings
    negatives: Negatives | None
    split: Split
    store: Store
