"""Which rows of a batch are read as one of their readings, and as which.

The student reads another form of a text, such as its translation, against the teacher's cached vector of
the text. Reimers & Gurevych 2020 (arXiv 2004.09813) train so by the mean squared error, on each text and on
its translation at every step. Here only what the student reads differs: a row counts once, as its text or
as one of its readings, and any objective learns from it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage.errors import TeachonceError
from storage.readings import Readings
from storage.tokens import Tokens

ADDRESS = 18
"""Third part of the seed of a draw; rank 18 of a training shares it with its dropout, and with no order."""


class ReadingRows:
    """Draws rows that are read as one of their readings.

    Args:
        readings: All readings.
        tokens: The student's token ids of `readings`.
        ids: (n,) int64 ids of the readings that may be drawn.
        share: Share of the rows with such readings that is drawn, 0 < share <= 1.
        seed: The seed of the recipe.

    Raises:
        TeachonceError: there is no such reading.
    """

    def __init__(
        self, readings: Readings, tokens: Tokens, ids: NDArray[np.int64], *, share: float, seed: int
    ) -> None:
        rows = readings.rows_read()[ids]
        order = np.argsort(rows, kind="stable")
        self.ids, self.rows = ids[order], rows[order]
        self.tokens, self.share, self.seed = tokens, share, seed

    def draw(
        self, rows: NDArray[np.int64], step: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns (m,) places in `rows`, ascending, and (m,) ids of the readings that are read there.

        m is the share of the rows that have readings, rounded up or down at random, so that the mean is
        right. It depends on seed, step and rows alone: not on ranks, nor on where a run was interrupted.

        Args:
            rows: (B,) int64 row ids.
            step: The step.
        """
        first = np.searchsorted(self.rows, rows, "left")
        counts = np.searchsorted(self.rows, rows, "right") - first
        having = np.flatnonzero(counts)
        draw = np.random.default_rng([self.seed, step, ADDRESS])
        count = int(self.share * len(having) + draw.random())
        places = np.sort(draw.permutation(having)[:count])
        return places, self.ids[first[places] + draw.integers(0, counts[places])]

    def put_into(
        self, ids: list[NDArray[np.int32]], rows: NDArray[np.int64], step: int
    ) -> list[NDArray[np.int32]]:
        """Returns the token ids of rows, with those of the readings that are drawn in their place."""
        places, chosen = self.draw(rows, step)
        ids = list(ids)
        for place, of_reading in zip(places, self.tokens.rows_of(chosen), strict=True):
            ids[place] = of_reading
        return ids


def some_readings(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns ids of readings to learn from.

    Raises:
        TeachonceError: there are none.
    """
    if not len(ids):
        raise TeachonceError(
            "distill.readings",
            "no reading is of a text to train on: all are of texts that are held out or found in "
            "evaluation sets, or are such texts themselves",
            "name files with more of them",
        )
    return ids
