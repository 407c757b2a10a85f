"""The rows of each step: an epoch's order, cut into batches.

Batches ignore text lengths. Batches of similar length would need less padding, but would make one step
learn from short texts only and the next from long ones. `student.encode_ids` avoids padding within a batch
instead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Batches:
    """The batches of one epoch, each cut from its order when it is asked for.

    Args:
        order: (n,) ids, of any type of integer.
        size: Rows in a batch; a smaller rest is dropped.
    """

    def __init__(self, order: NDArray[np.integer], size: int) -> None:
        self.order, self.size = order, size

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.order) // self.size if self.size else 0

    def __getitem__(self, place: int) -> NDArray[np.int64]:
        """The (size,) int64 ids of a batch.

        Raises:
            IndexError: there is no such batch.
        """
        first = range(len(self))[place] * self.size
        return self.order[first : first + self.size].astype(np.int64)


def epoch_batches(rows: NDArray[np.int64], *, batch_size: int, seed: int, epoch: int) -> Batches:
    """The batches of one epoch; 4 bytes of memory a row, 8 where ids are above 2 ** 31.

    Depends on its arguments only, so that epoch 3 can be replayed without playing epochs 0 to 2.

    Args:
        rows: (n,) distinct ids.
        batch_size: Rows in a batch; a smaller rest of the epoch is dropped.
        seed: The seed of the recipe.
        epoch: 0-based number of the epoch.

    Returns:
        n // batch_size arrays of `batch_size` ids; one of all ids if there are fewer.
    """
    # The order is that of a permutation of places: what is shuffled decides nothing.
    narrow = rows.astype(np.int32) if rows.max(initial=0) <= np.iinfo(np.int32).max else rows
    order = np.random.default_rng([seed, epoch]).permutation(narrow)
    return Batches(order, min(batch_size, len(rows)))


def some_rows(rows: NDArray[np.int64], count: int, *, seed: int, number: int) -> NDArray[np.int64]:
    """Draw (min(count, n),) distinct rows without replacement, in the order of `rows`.

    Depends on its arguments only. Its time depends on `count`, not on n.

    Args:
        rows: (n,) int64 distinct row ids.
        count: Number of rows to draw; all if there are fewer.
        seed: The seed of the recipe.
        number: The number of the draw.
    """
    if count >= len(rows):
        return rows
    draw = np.random.default_rng([seed, number])
    return rows[np.sort(draw.choice(len(rows), size=count, replace=False, shuffle=False))]


def without_some(
    tokens: NDArray[np.int32], share: float, draw: np.random.Generator, prompt_tokens: int = 0
) -> NDArray[np.int32]:
    """Delete random tokens of a text, except the first, the prompt and the last.

    The first and the last are the special tokens of most tokenizers. ConGen deletes a tenth of the words;
    the store holds tokens, not words.

    Args:
        tokens: (n,) int32 token ids.
        share: Probability of deletion of each token, 0 to 1.
        draw: The random generator.
        prompt_tokens: How many of the first tokens are the prompt.
    """
    keep = draw.random(len(tokens)) >= share
    keep[[0, -1]] = True
    keep[:prompt_tokens] = True
    return tokens[keep]
