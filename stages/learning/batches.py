"""Which rows a step sees: an epoch's order, cut into batches.

Rows are drawn without regard to their length: batches of texts of like length pad less, but then a step
learns from short texts only and the next from long ones. Padding is saved inside the step instead
(`student.encode_ids` reads a batch without any).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def epoch_batches(
    rows: NDArray[np.int64], *, batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """The batches of one epoch.

    Depends on its arguments only, so that epoch 3 can be replayed without playing epochs 0 to 2.

    Args:
        rows: (n,) distinct ids.
        batch_size: Rows in a batch; the rest of the epoch, if smaller, is left out of it.
        seed: Of the recipe.
        epoch: 0-based.

    Returns:
        n // batch_size arrays of `batch_size` ids; one of all ids if there are fewer.
    """
    order = rows[np.random.default_rng([seed, epoch]).permutation(len(rows))]
    size = min(batch_size, len(rows))
    return [order[first : first + size] for first in range(0, len(order) - size + 1, size)]


def some_rows(rows: NDArray[np.int64], count: int, *, seed: int, number: int) -> NDArray[np.int64]:
    """(min(count, n),) distinct rows, in the order in which they stand in `rows`.

    Depends on its arguments only. Of many rows a few are drawn without touching the others.

    Args:
        rows: (n,) distinct ids.
        count: How many; all of them if there are fewer.
        seed: Of the recipe.
        number: Of the draw.
    """
    if count >= len(rows):
        return rows
    draw = np.random.default_rng([seed, number])
    return rows[np.sort(draw.choice(len(rows), size=count, replace=False, shuffle=False))]


def without_some(
    tokens: NDArray[np.int32], share: float, draw: np.random.Generator
) -> NDArray[np.int32]:
    """A text's token ids without a share of them, the first and the last always kept; never none.

    Those two are the special tokens of most tokenizers. ConGen deletes a tenth of the words; tokens are
    what is in the store.

    Args:
        tokens: (n,) ids.
        share: How likely each is deleted, 0 to 1.
        draw: Decides which.
    """
    keep = draw.random(len(tokens)) >= share
    keep[[0, -1]] = True
    return tokens[keep]
