"""The rules that reject a neighbour as a negative, and the selection among the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from stages.params import MineParams
from storage.negatives import NONE

RULES = ("itself", "same_text", "above_max_score", "below_min_score", "before_range_min")


@dataclass(frozen=True)
class Lists:
    """Lists of n rows.

    Args:
        neighbours: (n, neighbours) row ids, -1 for none.
        scores: (n, neighbours) cosines, descending, 0 for none.
        rejected: (n, rules) how many candidates each rule rejected.
    """

    neighbours: NDArray[np.int64]
    scores: NDArray[np.float32]
    rejected: NDArray[np.int64]

    @classmethod
    def empty(cls, rows: int, neighbours: int) -> Self:
        """Returns lists without neighbours."""
        return cls(
            np.full((rows, neighbours), NONE, np.int64),
            np.zeros((rows, neighbours), np.float32),
            np.zeros((rows, len(RULES)), np.int64),
        )

    def put(self, places: NDArray[np.int64], lists: Self) -> None:
        """Replace the lists at (m,) places."""
        self.neighbours[places] = lists.neighbours
        self.scores[places] = lists.scores
        self.rejected[places] = lists.rejected


def reject(
    params: MineParams,
    neighbours: NDArray[np.int64],
    cosines: NDArray[np.float32],
    *,
    own: NDArray[np.int64],
    text_keys: NDArray[np.bytes_],
) -> dict[str, NDArray[np.bool_]]:
    """Find the neighbours that are no negatives, each counted under the first rule that rejects it.

    The row itself is recognised by its id, not by being first: of two rows with equal vectors, FAISS may
    return the same one as the nearest of both.

    Args:
        params: The settings `mine`.
        neighbours: (n, k) int64 row ids, -1 for none.
        cosines: (n, k) float32 cosines, descending.
        own: (n,) int64 ids of the rows whose neighbours these are.
        text_keys: (rows of the corpus,) V16 text keys.

    Returns:
        Rule -> (n, k) mask; the masks are disjoint and in the order of RULES.
    """
    has_neighbour = neighbours != NONE
    same_text = text_keys[np.where(has_neighbour, neighbours, 0)] == text_keys[own][:, None]
    tests = {
        "itself": neighbours == own[:, None],
        "same_text": same_text,
        "above_max_score": cosines > params.max_score,
        "below_min_score": cosines < (-2.0 if params.min_score is None else params.min_score),
    }
    rejected = {}
    remaining = has_neighbour
    for rule, test in tests.items():
        rejected[rule] = remaining & test
        remaining = remaining & ~test
    # range_min counts only neighbours that no other rule rejected: the nearest few of these are skipped.
    rejected["before_range_min"] = remaining & (np.cumsum(remaining, axis=1) <= params.range_min)
    return rejected


def keep_first(
    neighbours: NDArray[np.int64],
    cosines: NDArray[np.float32],
    allowed: NDArray[np.bool_],
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns the first `count` allowed entries of each row, in order, padded with -1 and 0.

    Args:
        neighbours: (n, k) int64 row ids.
        cosines: (n, k) float32 cosines.
        allowed: (n, k) mask of the entries to choose from.
        count: Entries per row, >= 1.

    Returns:
        (n, count) int64 ids and (n, count) float32 cosines.
    """
    # A stable sort on "not allowed" moves the allowed ones to the front and keeps their order.
    front = np.argsort(~allowed, axis=1, kind="stable")[:, :count]
    is_kept = np.take_along_axis(allowed, front, axis=1)
    ids = np.full((len(neighbours), count), NONE, np.int64)
    scores = np.zeros((len(neighbours), count), np.float32)
    width = front.shape[1]
    ids[:, :width] = np.where(is_kept, np.take_along_axis(neighbours, front, axis=1), NONE)
    scores[:, :width] = np.where(is_kept, np.take_along_axis(cosines, front, axis=1), 0)
    return ids, scores
