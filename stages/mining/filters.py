"""The rules by which a near row is no negative, and which of the others a list keeps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.params import MineParams
from storage.negatives import NONE

RULES = ("itself", "same_text", "above_max_score", "below_min_score", "before_range_min")


def reject(
    params: MineParams,
    found: NDArray[np.int64],
    cosines: NDArray[np.float32],
    *,
    own: NDArray[np.int64],
    text_keys: NDArray[np.bytes_],
) -> dict[str, NDArray[np.bool_]]:
    """Which of the found neighbours are no negatives, by the first rule that says so.

    The row itself is found by its id, not by being first: of two rows with equal vectors, FAISS gives
    one of them as the nearest of both.

    Args:
        params: Filters.
        found: (n, k) row ids, -1 for none.
        cosines: (n, k) descending.
        own: (n,) ids of the rows that were asked for.
        text_keys: (rows of the corpus,) V16.

    Returns:
        Rule -> (n, k), disjoint; in the order of RULES.
    """
    there = found != NONE
    same_text = text_keys[np.where(there, found, 0)] == text_keys[own][:, None]
    tests = {
        "itself": found == own[:, None],
        "same_text": same_text,
        "above_max_score": cosines > params.max_score,
        "below_min_score": cosines < (-2.0 if params.min_score is None else params.min_score),
    }
    rejected = {}
    left = there
    for rule, test in tests.items():
        rejected[rule] = left & test
        left = left & ~test
    # range_min counts what is left: the nearest few that no other rule took are skipped.
    rejected["before_range_min"] = left & (np.cumsum(left, axis=1) <= params.range_min)
    return rejected


def keep_first(
    found: NDArray[np.int64],
    cosines: NDArray[np.float32],
    allowed: NDArray[np.bool_],
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The first `count` allowed entries of each row, in order, padded with -1 and 0.

    Args:
        found: (n, k) ids.
        cosines: (n, k).
        allowed: (n, k).
        count: Wanted per row, >= 1.

    Returns:
        (n, count) ids and cosines.
    """
    # A stable sort on "not allowed" moves the allowed ones to the front and keeps their order.
    front = np.argsort(~allowed, axis=1, kind="stable")[:, :count]
    there = np.take_along_axis(allowed, front, axis=1)
    ids = np.full((len(found), count), NONE, np.int64)
    scores = np.zeros((len(found), count), np.float32)
    width = front.shape[1]
    ids[:, :width] = np.where(there, np.take_along_axis(found, front, axis=1), NONE)
    scores[:, :width] = np.where(there, np.take_along_axis(cosines, front, axis=1), 0)
    return ids, scores
