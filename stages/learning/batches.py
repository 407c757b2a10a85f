"""Which rows a step sees: an epoch's order, cut into batches of texts of similar length.

Padding to the longest text of a random batch more than doubles the work. Here a random run of rows is
sorted by length before it is cut, and the batches are shuffled again, so that lengths within a batch
are alike and the order of batches says nothing of length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BATCHES_PER_BUCKET = 32
"""Batches that are sorted by length together: more saves little padding, fewer costs much."""


def epoch_batches(
    rows: NDArray[np.int64],
    lengths: NDArray[np.int32],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[NDArray[np.int64]]:
    """The batches of one epoch.

    Depends on its arguments only, so that epoch 3 can be replayed without playing epochs 0 to 2.

    Args:
        rows: (n,) distinct ids.
        lengths: (n,) tokens of each of them.
        batch_size: Rows in a batch; the rest of the epoch, if smaller, is left out of it.
        seed: Of the recipe.
        epoch: 0-based.

    Returns:
        n // batch_size arrays of `batch_size` ids; at least one batch if there are 2 rows.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(rows))
    size = min(batch_size, len(rows))
    batches = []
    bucket = size * BATCHES_PER_BUCKET
    for first in range(0, len(order), bucket):
        run = order[first : first + bucket]
        # The short rest is dropped before sorting: after it, the longest texts would be dropped always.
        run = run[: len(run) // size * size]
        run = run[np.argsort(lengths[run], kind="stable")]
        batches += [rows[run[start : start + size]] for start in range(0, len(run), size)]
    return [batches[place] for place in draw.permutation(len(batches))]
