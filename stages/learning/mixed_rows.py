"""The mixes of each step: which, the student's token ids of both texts, and the teacher's vectors."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stages.learning.batches import epoch_batches
from stages.models.mixing import MixedIds
from storage.errors import TeachonceError
from storage.mixes import Mixes
from storage.tokens import Tokens


class MixedRows:
    """Draws the mixes of each step: all of them in an order given by the seed, then all in another order.

    Args:
        mixes: The teacher's vectors of mixes.
        tokens: The student's token ids of the corpus.
        train: (n,) int64 ids of the training rows; of a mix that is drawn both texts are among them.
        seed: The seed of the recipe.

    Raises:
        TeachonceError: fewer than two mixes are of training rows.
    """

    def __init__(
        self, mixes: Mixes, tokens: Tokens, train: NDArray[np.int64], *, seed: int
    ) -> None:
        self.mixes, self.tokens, self.pairs = mixes, tokens, mixes.pairs()
        is_train = np.isin(self.pairs.first, train) & np.isin(self.pairs.second, train)
        self.rows = np.flatnonzero(is_train)
        if len(self.rows) < 2:
            raise TeachonceError(
                "embed.mixes",
                f"{len(self.rows)} mixes of training rows are too few (2 at least)",
                "raise it, or give shard.sources more texts",
            )
        self._batches = lru_cache(maxsize=1)(
            lambda count, epoch: epoch_batches(self.rows, batch_size=count, seed=seed, epoch=epoch)
        )

    def rows_of_step(self, step: int, count: int) -> NDArray[np.int64]:
        """Returns (min(count, n),) int64 numbers of a step's mixes; they depend on seed and step."""
        epoch, place = divmod(step, max(len(self.rows) // count, 1))
        rows: NDArray[np.int64] = self._batches(count, epoch)[place]
        return rows

    def draw(
        self, step: int, count: int
    ) -> tuple[list[MixedIds], NDArray[np.int64], NDArray[np.floating]]:
        """Draw the n mixes of a step.

        Returns:
            The student's token ids, (n,) how many of the first are the prompt, and the teacher's (n, D)
            vectors.
        """
        rows = self.rows_of_step(step, count)
        first, second = (
            self.tokens.rows_of(ids[rows]) for ids in (self.pairs.first, self.pairs.second)
        )
        ratios = self.pairs.ratio[rows].tolist()
        mixed = [MixedIds(a, b, ratio) for a, b, ratio in zip(first, second, ratios, strict=True)]
        return mixed, self.tokens.prompt_tokens(self.pairs.first[rows]), self.mixes.rows_of(rows)
