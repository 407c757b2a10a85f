"""What `embed` makes of a text shard: an object of vectors of its texts, and one of its mixes.

`embed` runs over parts and does not ask which of the two a part is: both are found, fetched, encoded,
checked, published and uploaded by the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.column import text_keys_of
from storage.corpus import Corpus
from storage.manifest import fingerprint
from storage.mixes import MixedTexts, draw_pairs
from storage.roles import Role

MIXES_VERSION = 1  # raise it when a code change draws or mixes other pairs: all mixes are made anew

ALPHA = 0.4
"""Ratios are drawn from Beta(0.4, 0.4): two in five mixes have nine tenths or more of one text. At twice of
it the texts of a pair come closer to equal shares."""

SEED = 0


class ShardPart(Protocol):
    """An object to be made: the teacher's vectors of `rows` inputs.

    `key` is its name in the store, `texts` the key of its text shard, `role` what its inputs are for the
    teacher.
    """

    role: Role
    key: str
    rows: int
    texts: str

    def text_keys(self) -> NDArray[np.bytes_]:
        """Returns the (rows,) V16 text keys of its rows."""

    def inputs(self, rows: NDArray[np.int64]) -> Sequence[str] | MixedTexts:
        """Returns what the teacher reads for some rows."""

    def columns(self) -> dict[str, pa.Array]:
        """Returns the columns that stand beside the vectors."""


class TextsPart:
    """The vectors of the texts of a shard, under a teacher's fingerprint."""

    def __init__(self, teacher: str, corpus: Corpus, shard: int) -> None:
        self.key = f"vectors/{teacher}/{corpus.shard_digest(shard)}.arrow"
        self.texts, self.rows = corpus.objects[shard].key, corpus.objects[shard].rows
        self.role = corpus.role_of(shard)
        self._corpus, self._shard = corpus, shard

    def text_keys(self) -> NDArray[np.bytes_]:  # noqa: D102 - as above
        return text_keys_of(self._corpus.batch(self._shard))

    def inputs(self, rows: NDArray[np.int64]) -> Sequence[str]:  # noqa: D102
        texts = self._corpus.texts(self._shard)
        return [texts[row] for row in rows]

    def columns(self) -> dict[str, pa.Array]:  # noqa: D102
        return {}


class MixesPart:
    """The vectors of a shard's mixes; `mixes_recipe` returns their recipe."""

    def __init__(self, recipe: dict[str, Any], corpus: Corpus, shard: int) -> None:
        digest, texts = corpus.shard_digest(shard), corpus.objects[shard]
        self.key = f"mixes/{fingerprint(recipe)}/{digest}.arrow"
        drawn = {name: recipe["mixes"][name] for name in ("share", "alpha", "seed")}
        self._pairs = draw_pairs(digest, texts.rows, **drawn)
        self.texts, self.rows = texts.key, len(self._pairs.first)
        self.role: Role = "text"
        self._corpus, self._shard = corpus, shard

    def text_keys(self) -> NDArray[np.bytes_]:  # noqa: D102 - as above
        return self._pairs.keys(text_keys_of(self._corpus.batch(self._shard)))

    def inputs(self, rows: NDArray[np.int64]) -> MixedTexts:  # noqa: D102
        texts, pairs = self._corpus.texts(self._shard), self._pairs
        return MixedTexts(
            first=[texts[row] for row in pairs.first[rows]],
            second=[texts[row] for row in pairs.second[rows]],
            ratio=pairs.ratio[rows],
        )

    def columns(self) -> dict[str, pa.Array]:  # noqa: D102
        return self._pairs.columns()


def mixes_recipe(teacher_recipe: dict[str, Any], share: float) -> dict[str, Any]:
    """Returns the settings that change the vectors of mixes: the teacher's, and how pairs are drawn."""
    mixes = {"version": MIXES_VERSION, "share": share, "alpha": ALPHA, "seed": SEED}
    return {**teacher_recipe, "mixes": mixes}
