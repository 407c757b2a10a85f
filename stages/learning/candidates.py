"""Candidates of a step: the batch, its mined neighbours, and a queue drawn from the cache.

The queue of MoCo and DisCo holds vectors of past batches. Here the teacher is frozen and all its vectors
are on disk, so the queue is drawn from the whole cache by (seed, step), without replacement: it is full
from the first step, never stale, and the same in a resumed run. Several steps share one queue, since
fetching and normalising it is what costs time; quality does not suffer, since a MoCo queue hardly changes
between steps. `disco_ckd` has DisCo's own queue: the rows of past steps follow from the step, so nothing
is stored.
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
    """Cached rows that are candidates of several steps."""

    rows: NDArray[np.int64]  # (Q,) int64 distinct row ids, ascending
    keys: Tensor  # (Q, D) teacher vectors of unit length, on the device


class CandidateSource:
    """Draws the candidates of each step.

    Args:
        embeddings: The teacher's vectors.
        negatives: Mined neighbours; None if no objective needs them.
        train: (n,) int64 ids of the training rows, ascending; queues are drawn from these.
        rows_of_step: Step -> row ids of its batch.
        seed: The seed of the recipe.
        device: The device of the tensors.
        precision: Precision of `ckd`'s dot products; its queue is kept in that type.
    """

    def __init__(
        self,
        embeddings: Embeddings,
        negatives: Negatives | None,
        *,
        train: NDArray[np.int64],
        rows_of_step: Callable[[int], NDArray[np.int64]],
        seed: int,
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        self.embeddings, self.negatives, self.train = embeddings, negatives, train
        self.rows_of_step = rows_of_step
        self.seed, self.device, self.precision = seed, device, precision
        # Two queues, for a recipe whose objectives need two types.
        self._queue = lru_cache(maxsize=2)(self._draw_queue)

    def draw(
        self,
        objective: Objective,
        ids: NDArray[np.int64],
        *,
        step: int,
        proposed: NDArray[np.int64] | None = None,
    ) -> Candidates | None:
        """The candidates of one step, those of the batch first; None for an objective without any.

        Args:
            objective: The objective, which says how many candidates of each kind.
            ids: (B,) int64 distinct row ids of the batch.
            step: The step of the run; with the seed it determines the queue.
            proposed: (n,) int64 row ids in the place of mined neighbours, ascending and distinct.
        """
        if isinstance(objective, KdObjective | DiscoKdObjective):
            return None
        rows = (
            self.rows(objective, ids, step=step)
            if proposed is None
            else np.concatenate([ids, np.setdiff1d(proposed, ids, assume_unique=True)])
        )
        queue = self.queue(objective, step=step)
        if isinstance(objective, DiscoCkdObjective):
            # The official code masks no false negatives.
            not_negative = np.arange(len(ids))[:, None] == np.arange(len(rows))[None, :]
        else:
            candidate_rows = rows if queue is None else np.concatenate([rows, queue.rows])
            # No text stands in a corpus twice, so a row's own text is the row itself.
            not_negative = ids[:, None] == candidate_rows[None, :]
        if queue is not None:
            not_negative[:, len(rows) :] |= _is_among(queue.rows, rows)
        return Candidates(
            vectors=torch.from_numpy(self.embeddings.rows_of(rows)).to(self.device),
            positives=torch.arange(len(ids), device=self.device),
            not_negative=torch.from_numpy(not_negative).to(self.device),
            queue=None if queue is None else queue.keys,
        )

    def rows(self, objective: Objective, ids: NDArray[np.int64], *, step: int) -> NDArray[np.int64]:
        """Returns (F,) row ids without the queue: the batch in order, then its mined neighbours, ascending.

        For `disco_ckd`: the batch, then the rows of past steps, the newest first.
        """
        if isinstance(objective, DiscoCkdObjective):
            return np.concatenate([ids, self._past_rows(objective.queue, step)])
        if not (isinstance(objective, AmongOthers) and objective.neighbours):
            return ids
        if self.negatives is None:
            raise TypeError(f"{objective.name} needs mined neighbours")
        mined = np.unique(self.negatives.rows_of(ids)[0][:, : objective.neighbours])
        return np.concatenate([ids, np.setdiff1d(mined[mined != NONE], ids, assume_unique=True)])

    def vectors_read(
        self, objective: Objective, ids: NDArray[np.int64], *, step: int
    ) -> NDArray[np.int64]:
        """Returns (n,) ids of the rows whose vectors a step reads from the disk; some may stand twice.

        They are those of `rows`, and of the queue where the step draws one.
        """
        rows = self.rows(objective, ids, step=step)
        drawn = self._draw_of(objective, step)
        if drawn is None or (step > 0 and drawn == self._draw_of(objective, step - 1)):
            return rows
        return np.concatenate([rows, self._queue_rows(*drawn)])

    def queue(self, objective: Objective, *, step: int) -> Queue | None:
        """The queue of a step; None for an objective without one."""
        drawn = self._draw_of(objective, step)
        if drawn is None:
            return None
        precision = self.precision if isinstance(objective, CkdObjective) else "fp32"
        return self._queue(*drawn, type_of_products(precision))

    def _draw_of(self, objective: Objective, step: int) -> tuple[int, int] | None:
        """The size of a step's queue and the number of the draw; None for an objective without one."""
        if not (isinstance(objective, AmongOthers) and objective.queue):
            return None
        # A queue of all rows is the same at every step, so it is fetched once.
        number = step // STEPS_OF_A_QUEUE if objective.queue < len(self.train) else 0
        return objective.queue, number

    def _draw_queue(self, size: int, number: int, kind: torch.dtype) -> Queue:
        rows = self._queue_rows(size, number)
        stored = torch.from_numpy(self.embeddings.rows_of(rows))
        keys = torch.empty(stored.shape, dtype=kind, device=self.device)
        for chunk, target in zip(torch.split(stored, CHUNK), torch.split(keys, CHUNK), strict=True):
            target.copy_(F.normalize(chunk.to(self.device).float(), dim=1))
        return Queue(rows, keys)

    def _queue_rows(self, size: int, number: int) -> NDArray[np.int64]:
        return some_rows(self.train, size, seed=self.seed, number=number)

    def _past_rows(self, count: int, step: int) -> NDArray[np.int64]:
        """Returns up to `count` row ids of past steps, the newest batch first."""
        batches: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        rows_wanted = count
        while rows_wanted > 0 and step > 0:
            step -= 1
            batches.append(self.rows_of_step(step)[:rows_wanted])
            rows_wanted -= len(batches[-1])
        return np.concatenate(batches)


def _is_among(ascending: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns a (Q,) mask of the Q ascending rows that are among `rows`; faster than `np.isin`."""
    places = np.searchsorted(ascending, rows).clip(max=len(ascending) - 1)
    is_member = np.zeros(len(ascending), bool)
    is_member[places[ascending[places] == rows]] = True
    return is_member
