"""Who stands in the denominator: the batch, its mined neighbours, and a queue drawn from the cache.

MoCo's and DisCo's queue holds what past batches left behind. The teacher here is frozen and all its
vectors are on disk, so the queue is drawn anew from the whole cache by (seed, step): full from the
first step, never stale, and the same for a resumed run.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from stages.learning.objectives import Candidates
from stages.params import CkdObjective
from storage.embeddings import Embeddings
from storage.negatives import NONE, Negatives


class CandidateSource:
    """Draws the candidates of each step.

    Args:
        embeddings: The teacher's vectors.
        negatives: Mined neighbours; None if no objective asks for them.
        train: (n,) ids of the rows that may stand in a queue.
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
        text_keys: NDArray[np.bytes_],
        seed: int,
        device: torch.device,
    ) -> None:
        self.embeddings, self.negatives, self.train = embeddings, negatives, train
        # Half a text key tells texts apart well enough to mask: 1 in 1e19 pairs is masked in vain.
        self.half_keys = np.ascontiguousarray(text_keys).view("<u8").reshape(-1, 2)[:, 0]
        self.seed, self.device = seed, device

    def draw(self, objective: CkdObjective, ids: NDArray[np.int64], *, step: int) -> Candidates:
        """The candidates of one step.

        Args:
            objective: How many of which kind.
            ids: (B,) distinct rows of the batch.
            step: Of the run; with the seed it decides the queue.
        """
        rows = self.rows(objective, ids, step=step)
        vectors = torch.from_numpy(self.embeddings.rows_of(rows)).to(self.device).float()
        same = self.half_keys[ids][:, None] == self.half_keys[rows][None, :]
        return Candidates(
            vectors=torch.nn.functional.normalize(vectors, dim=1),
            own=torch.arange(len(ids), device=self.device),
            same_text=torch.from_numpy(same).to(self.device),
        )

    def rows(
        self, objective: CkdObjective, ids: NDArray[np.int64], *, step: int
    ) -> NDArray[np.int64]:
        """(C,) distinct row ids: the batch first, in its order, then the others, ascending."""
        others = [np.empty(0, np.int64)]
        if objective.neighbours and self.negatives is not None:
            mined = self.negatives.rows_of(ids)[0][:, : objective.neighbours].ravel()
            others.append(mined[mined != NONE])
        if objective.queue:
            draw = np.random.default_rng([self.seed, step])
            others.append(self.train[draw.integers(len(self.train), size=objective.queue)])
        return np.concatenate([ids, np.setdiff1d(np.concatenate(others), ids)])
