"""Pretraining with the teacher's predictions as classes, before any recipe (Pea-KD).

Pea-KD (arXiv 2009.14822) first trains a student to predict a class made of the teacher's answer: whether it
is right, and whether the teacher is confident. That these are the four classes is not confirmed: the text
of the paper was not at hand. An embedding teacher answers by a margin: of a text i and two others j and k,
m = cos(T_i, T_j) - cos(T_i, T_k). Its sign, and whether |m| is above its median, make four classes.

Of a labelled triplet, where j is the positive and k the negative, the sign says whether the teacher is
right. Without labels j and k are two mined neighbours of i. What is lost is just that: which one is nearer
stands in the place of right and wrong.

The classes are predicted from the products of the student's vectors by a head, which is thrown away. It
begins as the one that reads the classes off the student's own margin on the teacher's scale. It hardly
moves in so few steps, so the student is drawn to that scale; with a flatter head it would win by ever wider
margins. A start whose margins are wider than its teacher's begins above log 4, the loss of guessing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.vectors import unit
from storage.errors import TeachonceError
from storage.negatives import NONE, Negatives

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from storage.embeddings import Embeddings

SLOPES = (-3.0, -1.0, 1.0, 3.0)
"""Of the four classes' scores over m, in medians of |m|. The lines cross at -median, 0 and median."""


def margin_classes(margins: NDArray[np.floating], median: float) -> NDArray[np.int64]:
    """Returns (n,) classes 0 to 3, from surely below 0 to surely above it.

    Args:
        margins: (n,) margins of the teacher.
        median: Of |m|, > 0: a margin beyond it is a sure one.
    """
    return np.searchsorted([-median, 0.0, median], margins).astype(np.int64)


class Triples(Protocol):
    """Draws rows i, j and k with the teacher's margins."""

    def draw(
        self, rows: NDArray[np.int64], step: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Returns (3, n) row ids i, j, k and (n,) margins of the teacher, n <= m, of (m,) row ids."""

    def median(self, rows: NDArray[np.int64]) -> float:
        """Returns the median of |m|, > 0, over (m,) int64 row ids that stand for all.

        Raises:
            TeachonceError: it is 0, or most of these rows have no margin.
        """


class MinedTriples:
    """A row and two of its mined neighbours, chosen by seed and step, with the cosines that `mine` left."""

    def __init__(self, negatives: Negatives, *, seed: int) -> None:
        self.negatives, self.seed = negatives, seed

    def median(self, rows: NDArray[np.int64]) -> float:  # noqa: D102 - as above
        margins = np.abs(self.draw(rows, 0)[1])
        median = float(np.median(margins)) if 2 * len(margins) >= len(rows) else 0.0
        if median == 0:
            raise TeachonceError(
                "recipes.*.pretrain",
                "the mined neighbours of most rows are fewer than two, or equally near",
                "set mine.neighbours to 2 or more, raise mine.max_score, or take pretrain away",
            )
        return median

    def draw(  # noqa: D102 - as above; of the rows with two neighbours
        self, rows: NDArray[np.int64], step: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        ids, scores = self.negatives.rows_of(rows)
        order = np.random.default_rng([self.seed, step]).random(ids.shape)
        # Two of each row's neighbours, without replacement; places without one come last.
        two = np.argsort(np.where(ids == NONE, 2.0, order), axis=1)[:, :2]
        drawn, cosines = np.take_along_axis(ids, two, 1), np.take_along_axis(scores, two, 1)
        kept = (drawn != NONE).all(axis=1) & (two.shape[1] == 2)
        triples = np.concatenate([rows[None], drawn.T])[:, kept]
        return triples, (cosines[kept, 0] - cosines[kept, -1]).astype(np.float32)


class LabelledTriples:
    """Labelled triplets, (n, 3) row ids, chosen by seed and step, with cosines of the teacher's vectors."""

    def __init__(self, ids: NDArray[np.int64], embeddings: Embeddings, *, seed: int) -> None:
        self.ids, self.embeddings, self.seed = ids, embeddings, seed

    def median(self, rows: NDArray[np.int64]) -> float:  # noqa: D102 - as above
        median = float(np.median(np.abs(self.draw(rows, 0)[1])))
        if median == 0:
            raise TeachonceError(
                "recipes.*.pretrain",
                "to the teacher the positive and the negative of most labelled triplets are equally near",
                "look at the rows of finetune.triplets, or take pretrain away",
            )
        return median

    def draw(  # noqa: D102 - as above; as many triplets as there are rows
        self, rows: NDArray[np.int64], step: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        order = np.random.default_rng([self.seed, step]).permutation(len(self.ids))
        triples = self.ids[order[: len(rows)]].T
        anchors, positives, negatives = np.split(unit(self.embeddings.rows_of(triples.ravel())), 3)
        return triples, np.einsum("nd,nd->n", anchors, positives - negatives)


class Pretraining(nn.Module):
    """The first steps of a run: rows i, j and k, and the teacher's class of the three.

    Args:
        triples: Draws the rows of a step.
        rows: (n,) int64 row ids that give the median of |m|: some of the training rows.
        steps: Number of steps.
        dim: D, the width of the student's vectors.

    Raises:
        TeachonceError: to the teacher, j and k are equally near in most triples.
    """

    def __init__(self, triples: Triples, rows: NDArray[np.int64], *, steps: int, dim: int) -> None:
        super().__init__()
        self.triples, self.steps = triples, steps
        self.median = triples.median(rows)
        slopes = torch.tensor(SLOPES) / self.median
        self.head = nn.Linear(2 * dim, len(SLOPES))
        with torch.no_grad():
            self.head.weight.copy_(
                torch.cat([slopes, -slopes]).view(2, -1).T.repeat_interleave(dim, 1)
            )
            self.head.bias.copy_(torch.tensor([-2.0, 0.0, 0.0, -2.0]))

    def forward(self, vectors: Tensor, margins: NDArray[np.float32]) -> Tensor:
        """The cross-entropy of the classes.

        Args:
            vectors: (3, n, D) float32 student vectors of i, j and k.
            margins: (n,) the teacher's.
        """
        anchors, first, second = F.normalize(vectors, dim=2)
        classes = torch.from_numpy(margin_classes(margins, self.median)).to(vectors.device)
        features = torch.cat([anchors * first, anchors * second], dim=1)
        return F.cross_entropy(self.head(features), classes)
