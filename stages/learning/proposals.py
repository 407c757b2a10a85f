"""Candidates that the student proposes itself (Speculative KD, `speculative`).

SKD (arXiv 2410.11325, algorithm 1) lets the student write a text, keeps a token that is among the teacher's
K likeliest and lets the teacher write it anew otherwise. Here a row's tokens are its proposals: the rows of
a *pool* (training rows drawn by seed and step, read by the student) that the student finds nearest to it.

- j stays if t_ij >= t_i(K), the teacher's cosine of the row to the last of its K mined neighbours;
- else it is replaced by a draw from the teacher: softmax(t_ij / tau_T) over these K, without replacement.

When the pool is read anew follows DistiLLM's scheduler (arXiv 2402.03898, its code): phi begins at
`threshold` and rises by 0.1, to 1 at most, with each evaluation whose score is not above the one before.
Every `refresh_every` steps the pool is drawn and read anew with probability phi (1 - step / all steps);
otherwise the one that is there is used further (their replay buffer). Where there is none yet it is read.

What is lost on a cache: there is no sequence, so a proposal does not depend on the ones before it; the
teacher is not asked, its cached cosines decide; of the pool the student's vectors may be old, as in MoCo.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.params import SpeculativeObjective
from storage.embeddings import Embeddings
from storage.negatives import NONE, Negatives

RISE = 0.1
"""By how much phi rises; DistiLLM's."""

TOLERANCE = 1e-5
"""Of a cosine: mining added it up in another order, and the K-th neighbour itself is to be accepted."""


class Proposals(nn.Module):
    """The pool and the scheduler of a run of so many steps; the pool is drawn from the (n,) training rows.

    All of its state are buffers, so a checkpoint has it.
    """

    rows: Tensor
    vectors: Tensor
    phi: Tensor
    score: Tensor
    kept: Tensor
    proposed: Tensor
    acceptance: Tensor

    def __init__(
        self,
        params: SpeculativeObjective,
        *,
        embeddings: Embeddings,
        negatives: Negatives | None,
        train: NDArray[np.int64],
        steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        if negatives is None:
            raise TypeError(f"{params.name} needs mined neighbours")
        self.params, self.embeddings, self.negatives = params, embeddings, negatives
        self.train_rows, self.steps, self.seed = train, steps, seed
        size = min(params.pool, len(train))
        self.register_buffer("rows", torch.full((size,), NONE))
        self.register_buffer("vectors", torch.zeros(size, embeddings.dim))
        self.register_buffer("phi", torch.tensor(params.threshold))
        self.register_buffer("score", torch.tensor(-torch.inf))
        self.register_buffer("kept", torch.tensor(0))
        self.register_buffer("proposed", torch.tensor(0))
        self.register_buffer("acceptance", torch.tensor(torch.nan))

    @torch.no_grad()
    def refresh(self, step: int, encode: Callable[[NDArray[np.int64]], Tensor]) -> None:
        """Draw and read the pool anew, if it is time; called before each step.

        Args:
            step: The step about to be taken.
            encode: (P,) row ids -> (P, D) vectors of the student as it is.
        """
        draw = self._draw(step)
        if int(self.rows[0]) != NONE:
            chance = float(self.phi) * (1 - step / self.steps)
            if step % self.params.refresh_every or draw.random() >= chance:
                return
        rows = np.sort(draw.choice(self.train_rows, len(self.rows), replace=False, shuffle=False))
        self.rows.copy_(torch.from_numpy(rows))
        self.vectors.copy_(F.normalize(encode(rows), dim=1))

    @torch.no_grad()
    def propose(self, ids: NDArray[np.int64], vectors: Tensor, *, step: int) -> NDArray[np.int64]:
        """The rows that a batch's rows propose, or that the teacher put in their place.

        Args:
            ids: (B,) int64 row ids of the batch.
            vectors: (B, D) the student's vectors of them.
            step: The step; with the seed it determines the teacher's draws.

        Returns:
            (n,) int64 distinct row ids, ascending; up to `proposals` for each row.
        """
        mined, scores = self.negatives.rows_of(ids)
        mined, scores = mined[:, : self.params.neighbours], scores[:, : self.params.neighbours]
        proposed = self._nearest(ids, vectors)
        is_kept = self._teacher_cosines(ids, proposed) >= _last_scores(mined, scores)[:, None]
        is_kept &= proposed != NONE
        self.kept += int(is_kept.sum())
        self.proposed += int((proposed != NONE).sum())
        missing = (~is_kept).sum(axis=1)
        replacements = self._replacements(mined, scores, proposed, is_kept, missing, step)
        return np.unique(np.concatenate([proposed[is_kept], replacements]))

    def evaluated(self, score: float) -> None:
        """Called with the score of each evaluation, the same on all ranks; higher is better."""
        if self.score.new_tensor(score) <= self.score:
            self.phi.copy_((self.phi + RISE).clamp(max=1))
        self.score.fill_(score)
        if self.proposed:
            self.acceptance.copy_(self.kept / self.proposed)
        self.kept.zero_()
        self.proposed.zero_()

    def notes(self) -> dict[str, float | None]:
        """Scalars for a curve: the share of proposals kept between the last two evaluations, and phi."""
        acceptance = float(self.acceptance)
        return {
            "acceptance": None if math.isnan(acceptance) else acceptance,
            "phi": float(self.phi),
        }

    def _draw(self, *address: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *address])

    def _nearest(self, ids: NDArray[np.int64], vectors: Tensor) -> NDArray[np.int64]:
        """(B, m) pool rows nearest to each row by the student; NONE for the row itself."""
        similar = F.normalize(vectors, dim=1) @ self.vectors.T
        own = torch.from_numpy(ids).to(self.rows.device)[:, None] == self.rows[None, :]
        similar.masked_fill_(own, -torch.inf)
        cosines, places = similar.topk(min(self.params.proposals, len(self.rows)), dim=1)
        return self.rows[places].masked_fill_(cosines == -torch.inf, NONE).cpu().numpy()

    def _teacher_cosines(
        self, ids: NDArray[np.int64], others: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """(B, m) the teacher's cosines of each row to its m others; of NONE any."""
        rows, places = np.unique(
            np.where(others == NONE, ids[:, None], others), return_inverse=True
        )
        own, theirs = (
            F.normalize(torch.from_numpy(self.embeddings.rows_of(some)).float(), dim=1)
            for some in (ids, rows)
        )
        near = theirs[torch.from_numpy(places.reshape(others.shape))]
        cosines: NDArray[np.float32] = torch.einsum("bd,bmd->bm", own, near).numpy()
        return cosines

    def _replacements(
        self,
        mined: NDArray[np.int64],
        scores: NDArray[np.float32],
        proposed: NDArray[np.int64],
        is_kept: NDArray[np.bool_],
        missing: NDArray[np.int64],
        step: int,
    ) -> NDArray[np.int64]:
        """(n,) draws from softmax(t_ij / tau_T) over the mined (B, K), `missing` distinct ones a row.

        The largest of logits with Gumbel noise are draws from their softmax without replacement.
        """
        kept = np.where(is_kept, proposed, NONE)
        taken = (mined[:, :, None] == kept[:, None, :]).any(axis=2) | (mined == NONE)
        noise = self._draw(step, 1).gumbel(size=mined.shape)
        logits = np.where(taken, -np.inf, scores / self.params.teacher_temperature + noise)
        order = np.argsort(-logits, axis=1, kind="stable")
        drawn = np.take_along_axis(np.where(taken, NONE, mined), order, axis=1)
        wanted = np.arange(mined.shape[1])[None, :] < missing[:, None]
        rows: NDArray[np.int64] = drawn[wanted & (drawn != NONE)]
        return rows


def _last_scores(mined: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B,) the score of the last mined neighbour; Inf for a row without any, which accepts nothing."""
    least: NDArray[np.float32] = np.where(mined == NONE, np.inf, scores).min(axis=1)
    return least - np.float32(TOLERANCE)
