"""Who stands in the denominator: the batch, its mined neighbours, and a queue drawn from the cache.

MoCo's and DisCo's queue holds what past batches left behind. The teacher here is frozen and all its
vectors are on disk, so the queue is drawn from the whole cache by (seed, step), without replacement: full
from the first step, never stale, and the same for a resumed run. A few steps share one: that costs nothing
in quality (theirs hardly differ from one step to the next), and what a large queue takes is to fetch and
normalise it.
DisCo's own queue is there for `disco_ckd`: which rows past steps had is a function of the step, too, so
there is nothing to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stages.learning.batches import some_rows
from stages.learning.objectives import CHUNK, Candidates, type_of_products
from stages.params import (
    AmongOthers,
    CkdObjective,
    DiscoCkdObjective,
    DiscoKdObjective,
    KdObjective,
    Objective,
)
from storage.embeddings import Embeddings
from storage.negatives import NONE, Negatives

STEPS_OF_A_QUEUE = 16
"""Steps that share a queue."""


@dataclass(frozen=True)
class Queue:
    """Rows of the cache that stand in the denominator of several steps.

    Args:
        rows: (Q,) distinct, ascending.
        keys: (Q, D) of length 1, on the device.
    """

    rows: NDArray[np.int64]
    keys: Tensor


class CandidateSource:
    """Draws the candidates of each step.

    Args:
        embeddings: The teacher's vectors.
        negatives: Mined neighbours; None if no objective asks for them.
        train: (n,) ids of the rows that may stand in a queue, ascending.
        rows_of_step: Step -> the rows of its batch.
        text_keys: (rows of the corpus,) V16.
        seed: Of the recipe.
        device: Where the tensors go.
        precision: In which `ckd` multiplies vectors: its queue is kept in that type.
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
        precision: str = "fp32",
    ) -> None:
        self.embeddings, self.negatives, self.train = embeddings, negatives, train
        self.rows_of_step = rows_of_step
        # Half a text key tells texts apart well enough to mask: 1 in 1e19 pairs is masked in vain.
        self.half_keys = np.ascontiguousarray(text_keys).view("<u8").reshape(-1, 2)[:, 0]
        self.seed, self.device, self.precision = seed, device, precision
        # Two, for a recipe whose objectives keep theirs in two types.
        self._queue = lru_cache(maxsize=2)(self._drawn)

    def draw(self, objective: Objective, ids: NDArray[np.int64], *, step: int) -> Candidates | None:
        """The candidates of one step, those of the batch first; None for an objective without any.

        Args:
            objective: How many of which kind.
            ids: (B,) distinct rows of the batch.
            step: Of the run; with the seed it decides the queue.
        """
        if isinstance(objective, KdObjective | DiscoKdObjective):
            return None
        rows, queue = self.rows(objective, ids, step=step), self.queue(objective, step=step)
        if isinstance(objective, DiscoCkdObjective):
            # The official code leaves nothing out.
            same = np.arange(len(ids))[:, None] == np.arange(len(rows))[None, :]
        else:
            others = rows if queue is None else np.concatenate([rows, queue.rows])
            same = self.half_keys[ids][:, None] == self.half_keys[others][None, :]
        if queue is not None:
            same[:, len(rows) :] |= _stand_in(queue.rows, rows)
        return Candidates(
            vectors=torch.from_numpy(self.embeddings.rows_of(rows)).to(self.device),
            own=torch.arange(len(ids), device=self.device),
            same_text=torch.from_numpy(same).to(self.device),
            queue=None if queue is None else queue.keys,
        )

    def rows(self, objective: Objective, ids: NDArray[np.int64], *, step: int) -> NDArray[np.int64]:
        """(F,) row ids of this step alone: the batch, in its order; then its mined neighbours, ascending.

        Those of `disco_ckd` are the rows of the steps before this one, the newest first.
        """
        if isinstance(objective, DiscoCkdObjective):
            return np.concatenate([ids, self._past(objective.queue, step)])
        if not (isinstance(objective, AmongOthers) and objective.neighbours):
            return ids
        if self.negatives is None:
            raise TypeError(f"{objective.name} needs mined neighbours")
        mined = np.unique(self.negatives.rows_of(ids)[0][:, : objective.neighbours])
        return np.concatenate([ids, np.setdiff1d(mined[mined != NONE], ids, assume_unique=True)])

    def queue(self, objective: Objective, *, step: int) -> Queue | None:
        """The queue of a step; None for an objective without one."""
        if not (isinstance(objective, AmongOthers) and objective.queue):
            return None
        precision = self.precision if isinstance(objective, CkdObjective) else "fp32"
        # All rows are the same queue at every step: it is fetched and normalised once.
        number = step // STEPS_OF_A_QUEUE if objective.queue < len(self.train) else 0
        return self._queue(objective.queue, number, type_of_products(precision))

    def _drawn(self, size: int, number: int, kind: torch.dtype) -> Queue:
        rows = some_rows(self.train, size, seed=self.seed, number=number)
        stored = torch.from_numpy(self.embeddings.rows_of(rows))
        keys = torch.empty(stored.shape, dtype=kind, device=self.device)
        for some, here in zip(torch.split(stored, CHUNK), torch.split(keys, CHUNK), strict=True):
            here.copy_(F.normalize(some.to(self.device).float(), dim=1))
        return Queue(rows, keys)

    def _past(self, count: int, step: int) -> NDArray[np.int64]:
        """Up to `count` rows of the steps before, the newest batch first."""
        found: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        left = count
        while left > 0 and step > 0:
            step -= 1
            found.append(self.rows_of_step(step)[:left])
            left -= len(found[-1])
        return np.concatenate(found)


def _stand_in(ascending: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(Q,) which of Q ascending rows are among others: `np.isin`, without sorting what is sorted."""
    places = np.searchsorted(ascending, rows).clip(max=len(ascending) - 1)
    found = np.zeros(len(ascending), bool)
    found[places[ascending[places] == rows]] = True
    return found
