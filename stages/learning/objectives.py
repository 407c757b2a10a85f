"""Training objectives: pure functions from a batch of vectors to a scalar loss.

Shape letters: B batch, C candidates, D width of the teacher's space. The student's vectors are what the
saved student will return: of length 1 if the teacher's are, else of any length. A function that compares
directions normalises them itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.params import CkdObjective, KdObjective

# A learned temperature may not fall below this: logits of 100 x cosine, as in CLIP.
LEAST_TEMPERATURE = 0.01


@dataclass(frozen=True)
class Candidates:
    """Who stands in the denominator.

    Args:
        vectors: (C, D) float32 of unit length: the teacher's, of any rows of the cache, or a student's.
        own: (B,) where in `vectors` the row's own key is.
        same_text: (B, C) True where a candidate is a vector of the row's own text, its own included.
    """

    vectors: Tensor
    own: Tensor
    same_text: Tensor


def kd(student: Tensor, teacher: Tensor) -> Tensor:
    """Knowledge distillation: mean squared error to the teacher's vector (DisCo, section 3.2).

    L = 1 / (B D) * sum_i |h_i - T_i|^2, on raw vectors: neither side is normalised here.

    Args:
        student: (B, D).
        teacher: (B, D), as stored.

    Returns:
        Scalar, at least 0; 0 for a student that equals the teacher.
    """
    return F.mse_loss(student, teacher)


def ckd(student: Tensor, candidates: Candidates, scale: Tensor) -> Tensor:
    """Contrastive distillation: find your own teacher vector among many (DisCo, section 3.3).

    `info_nce` where every candidate is a vector of the teacher. The teacher is frozen, so its vector of
    any cached row is as good a candidate as one of this batch.

    Args:
        student: (B, D).
        candidates: Of C vectors of the teacher, each row's own among them.
        scale: a = 1 / temperature, > 0; a scalar, may be learned.

    Returns:
        Scalar, at least 0; log(C) for a student that knows nothing, if no candidate is left out.
    """
    return info_nce(student, candidates, scale)


def info_nce(anchors: Tensor, candidates: Candidates, scale: Tensor) -> Tensor:
    """Find your own key among many (InfoNCE; DisCo, section 3.3 and, with labels, its second stage).

    L = -1/B sum_i log( exp(a cos(h_i, k_i)) / sum_j exp(a cos(h_i, k_j)) ), j over the candidates.

    Other copies of a row's own text are left out of its denominator: each would put a floor of log 2
    and more under the loss of a perfect student.

    Args:
        anchors: (B, D), any length.
        candidates: Of C vectors.
        scale: a = 1 / temperature, > 0; a scalar, may be learned.

    Returns:
        Scalar, at least 0; log(C) for vectors that know nothing, if no candidate is left out.
    """
    logits = scale * (F.normalize(anchors, dim=1) @ candidates.vectors.T)
    others = candidates.same_text.clone()
    others[torch.arange(len(others), device=others.device), candidates.own] = False
    return F.cross_entropy(logits.masked_fill(others, float("-inf")), candidates.own)


class Temperature(nn.Module):
    """A temperature that may be learned, as the logarithm of its inverse; never below 0.01.

    Args:
        start: Where it begins, > 0.
        learnable: Whether training moves it.
    """

    def __init__(self, start: float, *, learnable: bool) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(-torch.log(torch.tensor(start)), requires_grad=learnable)

    def scale(self) -> Tensor:
        """1 / temperature, a scalar."""
        return self.log_scale.exp().clamp(max=1 / LEAST_TEMPERATURE)

    def value(self) -> float:
        """The temperature itself, for a curve."""
        return float(1 / self.scale().detach())


class Objectives(nn.Module):
    """The weighted sum of a recipe's objectives, with what some of them learn themselves.

    Args:
        params: One or more objectives, in the order of the recipe.
    """

    def __init__(self, params: Sequence[KdObjective | CkdObjective]) -> None:
        super().__init__()
        self.params = tuple(params)
        self.learned = nn.ModuleDict(
            {
                str(place): Temperature(
                    objective.temperature, learnable=objective.learnable_temperature
                )
                for place, objective in enumerate(self.params)
                if isinstance(objective, CkdObjective)
            }
        )

    @property
    def names(self) -> list[str]:
        """A name for each objective, for curves: `ckd`, or `ckd-2` if it is the second of its kind."""
        kinds = [objective.name for objective in self.params]
        return [
            kind if kinds[:place].count(kind) == 0 else f"{kind}-{kinds[:place].count(kind) + 1}"
            for place, kind in enumerate(kinds)
        ]

    def temperatures(self) -> dict[str, float]:
        """Name -> temperature, for the objectives that have one."""
        return {
            name: self._temperature(place).value()
            for place, name in enumerate(self.names)
            if str(place) in self.learned
        }

    def forward(
        self, student: Tensor, teacher: Tensor, candidates: Sequence[Candidates | None]
    ) -> tuple[Tensor, list[float]]:
        """The loss of a batch.

        Args:
            student: (B, D) float32.
            teacher: (B, D) float32, as stored.
            candidates: One entry for each objective; None for those that take none.

        Returns:
            The weighted sum, and each objective's loss before weighting.
        """
        losses = []
        for place, (objective, among) in enumerate(zip(self.params, candidates, strict=True)):
            if isinstance(objective, KdObjective):
                losses.append(kd(student, teacher))
            elif among is not None:
                losses.append(ckd(student, among, self._temperature(place).scale()))
        total = sum(
            (objective.weight * loss for objective, loss in zip(self.params, losses, strict=True)),
            start=student.new_zeros(()),
        )
        return total, [float(loss.detach()) for loss in losses]

    def _temperature(self, place: int) -> Temperature:
        found: Temperature = self.learned[str(place)]  # type: ignore[assignment]  # put there above
        return found
