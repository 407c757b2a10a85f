"""Labelled triplets whose texts are rows of the corpus: the caches hold the teacher's vectors of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.learning.judges import split_by_anchor
from stages.params import FinetuneParams
from stages.reading.triplets import read_triplets, triplet_files
from storage.column import KeyIndex, text_keys_from
from storage.corpus import Corpus, text_key
from storage.errors import TeachonceError
from storage.roles import Role
from storage.split import Split

LEAST_TRIPLETS = 2

ROLES_OF_SIDES: tuple[tuple[Role, ...], ...] = (
    ("query", "text", "document"),
    ("document", "text", "query"),
    ("document", "text", "query"),
)
"""Of anchor, positive and negative: a text that is there in several roles is read in the first of them."""


def learned_triplets(params: FinetuneParams, root: Path) -> list[tuple[str, str, str]]:
    """Returns anchor, positive and negative of the rows that finetuning would learn from, not hold out.

    A row with several negatives is as many triplets; a pair is none.

    Args:
        params: The settings `finetune`.
        root: Folder that the globs in the settings are relative to.

    Raises:
        TeachonceError: a file is damaged, or its fields would be misread.
    """
    rows, _ = read_triplets(triplet_files(params.triplets, root), params.fields, ())
    if params.dev is None:
        rows, _ = split_by_anchor(rows, params.heldout)
    return [(row.anchor, row.positive, negative) for row in rows for negative in row.negatives]


def labelled_rows(
    triplets: Sequence[tuple[str, str, str]], corpus: Corpus, split: Split
) -> NDArray[np.int64]:
    """Returns (n, 3) row ids of the triplets whose texts are all rows to train on, in their order.

    Args:
        triplets: Anchor, positive and negative of each.
        corpus: The texts.
        split: Which of its rows are to train on.

    Raises:
        TeachonceError: fewer than two triplets are of such rows.
    """
    ids = _rows_of(triplets, corpus)
    learned: NDArray[np.int64] = ids[np.isin(ids, split.train_rows(corpus)).all(axis=1)]
    if len(learned) < LEAST_TRIPLETS:
        raise TeachonceError(
            "finetune.triplets",
            f"{len(learned):,} of {len(triplets):,} triplets have all three texts among the rows to train "
            f"on; a recipe with `pretrain.triplets: labelled` needs {LEAST_TRIPLETS}",
            "put these texts into a file of shard.sources, too, so that the teacher reads them, or set the "
            "recipe's pretrain.triplets to mined",
        )
    return learned


def _rows_of(triplets: Sequence[tuple[str, str, str]], corpus: Corpus) -> NDArray[np.int64]:
    """(n, 3) row ids; -1 for a text that is not there."""
    index = KeyIndex(corpus.text_keys)
    ids = np.full((len(triplets), 3), -1, np.int64)
    for side, roles in enumerate(ROLES_OF_SIDES):
        for role in reversed(roles):  # the last one that is found stays
            keys = text_keys_from(text_key(texts[side], role) for texts in triplets)
            places = index.places(keys)
            ids[:, side] = np.where(places >= 0, places, ids[:, side])
    return ids
