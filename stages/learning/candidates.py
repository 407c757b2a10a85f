"""Who stands in the denominator: the batch, its mined neighbours, and a queue drawn from the cache.

MoCo's and DisCo's queue holds what past batches left behind. The teacher here is frozen and all its
vectors are on disk, so the queue is drawn anew from the whole cache by (seed, step): full from the
first step, never stale, and the same for a resumed run. DisCo's own queue is there for `disco_ckd`:
which rows past steps had is a function of the step, too, so there is nothing to keep.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from stages.learning.objectives import Candidates
from stages.params import AmongOthers, DiscoCkdObjective, DiscoKdObjective, KdObjective, Objective
from storage.embeddings import Embeddings
from storage.negatives import NONE, Negatives


class CandidateSource:
    """Draws the candidates of each step.

    Args:
        embeddings: The teacher's vectors.
        negatives: Mined neighbours; None if no objective asks for them.
        train: (n,) ids of the rows that may stand in a queue.
        rows_of_step: Step -> the rows of its batch.
        text_keys: (rows of the corpus,) V16.
        seed: Of the recipe.
        device: Where the tensors go.
    """

    def __init__(
        self,
        embeddings: Embeddings,
        negatives: Negatives | None,
        *,
        train: NDArray[np.int64],
        rows_of_step: Callable[[int], NDArray[np.int64]],
        text_keys: NDArray[np.bytes_],
        seed: int,
        device: torch.device,
    ) -> None:
        self.embeddings, self.negatives, self.train = embeddings, negatives, train
        self.rows_of_step = rows_of_step
        # Half a text key tells texts apart well enough to mask: 1 in 1e19 pairs is masked in vain.
        self.half_keys = np.ascontiguousarray(text_keys).view("<u8").reshape(-1, 2)[:, 0]
        self.seed, self.device = seed, device

    def draw(self, objective: Objective, ids: NDArray[np.int64], *, step: int) -> Candidates | None:
        """The candidates of one step, those of the batch first; None for an objective without any.

        Args:
            objective: How many of which kind.
            ids: (B,) distinct rows of the batch.
            step: Of the run; with the seed it decides the queue.
        """
        if isinstance(objective, KdObjective | DiscoKdObjective):
            return None
        rows = self.rows(objective, ids, step=step)
        vectors = torch.from_numpy(self.embeddings.rows_of(rows)).to(self.device)
        if isinstance(objective, DiscoCkdObjective):
            # The official code leaves nothing out.
            same = np.arange(len(ids))[:, None] == np.arange(len(rows))[None, :]
        else:
            same = self.half_keys[ids][:, None] == self.half_keys[rows][None, :]
        return Candidates(
            vectors=vectors,
            own=torch.arange(len(ids), device=self.device),
            same_text=torch.from_numpy(same).to(self.device),
        )

    def rows(self, objective: Objective, ids: NDArray[np.int64], *, step: int) -> NDArray[np.int64]:
        """(C,) row ids: the batch first, in its order; then the others, distinct and ascending.

        Those of `disco_ckd` are the rows of the steps before this one, the newest first.
        """
        if isinstance(objective, DiscoCkdObjective):
            return np.concatenate([ids, self._past(objective.queue, step)])
        others = [np.empty(0, np.int64)]
        if isinstance(objective, AmongOthers):
            if objective.neighbours and self.negatives is not None:
                mined = self.negatives.rows_of(ids)[0][:, : objective.neighbours].ravel()
                others.append(mined[mined != NONE])
            if objective.queue:
                draw = np.random.default_rng([self.seed, step])
                others.append(self.train[draw.integers(len(self.train), size=objective.queue)])
        return np.concatenate([ids, _others(np.concatenate(others), ids)])

    def _past(self, count: int, step: int) -> NDArray[np.int64]:
        """Up to `count` rows of the steps before, the newest batch first."""
        found: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        left = count
        while left > 0 and step > 0:
            step -= 1
            found.append(self.rows_of_step(step)[:left])
            left -= len(found[-1])
        return np.concatenate(found)


def _others(rows: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The distinct rows that are none of `ids`, ascending; `np.setdiff1d`, several times as fast."""
    rows = np.sort(rows)
    keep = np.ones(len(rows), bool)
    keep[1:] = rows[1:] != rows[:-1]
    known = np.sort(ids)
    firsts, ends = np.searchsorted(rows, known, "left"), np.searchsorted(rows, known, "right")
    for first, end in zip(firsts, ends, strict=True):
        keep[first:end] = False
    return rows[keep]
