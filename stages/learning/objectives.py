"""Training objectives: pure functions from a batch of vectors to a scalar loss.

Most of them are one idea: for each row two distributions over a set of candidates, the teacher's
P_T = softmax(cos(T_i, T_j) / tau_T) and the student's P_S = softmax(cos(h_i, T_j) / tau_S), and a
divergence between them. `ckd` has a one-hot P_T, `relational` the whole one; `skew` and `decoupled`
take another divergence. `kd`, `comparative` and `gram` compare vectors, differences and similarities;
`kd` also differences, if centred.

Shape letters: B batch, C candidates, D width of the teacher's space, W <= D width of the student's
vectors here. The student's vectors are what the saved student will return: of length 1 if the
teacher's are, else of any length. A function that compares directions normalises them itself. Where
W < D (Matryoshka) the student is compared with the first W values of a vector (`narrow`), and P_T and
the teacher's similarities are those of whole vectors.

This file is long because the formulas are read side by side; each function stands for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.learning.adapter import Adapter
from stages.learning.frozen_keys import FrozenInfoNce
from stages.params import (
    LEAST_TEMPERATURE,
    AdapterObjective,
    CkdObjective,
    ComparativeObjective,
    DecoupledObjective,
    DiscoCkdObjective,
    DiscoKdObjective,
    GramObjective,
    KdObjective,
    MixesObjective,
    Objective,
    RelationalObjective,
    SkewObjective,
    SpeculativeObjective,
)

DISCO_TEMPERATURE = math.exp(-1)
"""Where the official code's learned temperature begins: its scale is exp(1)."""

CHUNK = 2048
"""Number of keys in a chunk; this many stay in the processor's cache."""

Needed = TypeVar("Needed")

LEFT_OUT = -1e4
"""Logit of a candidate that is masked out: its probability is exactly 0, and finite logs stay finite."""


@dataclass(frozen=True)
class Candidates:
    """The candidates in the denominator: each row's positive, in-batch and mined negatives, and a queue."""

    # (F, D) keys of any length: the teacher's as stored, of any cached rows, or a student's.
    vectors: Tensor
    positives: Tensor  # (B,) int64 index into `vectors` of each row's positive
    # (B, C) mask of candidates that are no negatives of a row: its positive, other vectors of its
    # own text (false negatives), and queue entries that are among the F already.
    not_negative: Tensor
    queue: Tensor | None = None  # (Q, D) further keys of unit length; C = F + Q. None for no queue

    @cached_property
    def keys(self) -> Tensor:
        """(C, D) float32 keys of unit length."""
        keys = F.normalize(self.vectors.float(), dim=1)
        return keys if self.queue is None else torch.cat([keys, self.queue.float()])

    def key_chunks(self, width: int, kind: torch.dtype) -> Iterator[Tensor]:
        """Yield (n <= CHUNK, W) keys in turn, cut to W values, of unit length; the queue is not copied."""
        for chunk in torch.split(self.vectors, CHUNK):
            yield F.normalize(chunk[:, :width].float(), dim=1).to(kind)
        for chunk in [] if self.queue is None else torch.split(self.queue, CHUNK):
            is_uncut = width == chunk.shape[1]
            yield (chunk if is_uncut else F.normalize(chunk[:, :width].float(), dim=1)).to(kind)

    @property
    def is_positive(self) -> Tensor:
        """(B, C) mask of each row's positive."""
        places = torch.arange(self.not_negative.shape[1], device=self.positives.device)
        return places == self.positives[:, None]

    @property
    def duplicates(self) -> Tensor:
        """(B, C) mask of false negatives and of duplicate candidates."""
        return self.not_negative & ~self.is_positive


@dataclass(frozen=True)
class MixedBatch:
    """The vectors of a step's mixes."""

    student: Tensor  # (M, D) float32 student vectors of any length
    teacher: Tensor  # (M, D) float32 teacher vectors as stored


def narrow(vectors: Tensor, width: int) -> Tensor:
    """Returns (n, W): the first W values of each vector, scaled to the length of the whole vector.

    Args:
        vectors: (n, D) vectors of any length.
        width: W, 1 to D.
    """
    if width == vectors.shape[1]:
        return vectors
    lengths: Tensor = vectors.norm(dim=1, keepdim=True)
    return F.normalize(vectors[:, :width], dim=1) * lengths


def kd(student: Tensor, teacher: Tensor, *, centred: bool = False) -> Tensor:
    """Knowledge distillation: mean squared error to the teacher's vector (DisCo, section 3.2).

    L = 1 / (B W) * sum_i |e_i|^2 with e_i = h_i - T_i, on vectors as they are: neither side is normalised
    here. Centred: e_i less their mean, so that an offset which all rows share is free. That is
    1 / (2 B^2 W) * sum_ij |(h_i - h_j) - (T_i - T_j)|^2: what is learned is how rows differ.

    Args:
        student: (B, W) float32 student vectors.
        teacher: (B, D) float32 teacher vectors as stored.
        centred: Whether to subtract the mean error.

    Returns:
        Scalar, at least 0; 0 for a student that equals the teacher.
    """
    error = student - narrow(teacher, student.shape[1])
    return (error - error.mean(dim=0) if centred else error).square().mean()


def mixes(mixed: MixedBatch, *, width: int, centred: bool) -> Tensor:
    """`kd` on mixes of two texts (MixKD, arXiv 2011.00593, its teacher-on-mix term).

    x' = l E(x_i) + (1 - l) E(x_j) with l ~ Beta, E the input embeddings, each model's own; L = mean of
    |h(x') - T(x')|^2 / W, `kd` in every other way. The teacher has read each mix itself, once, in `embed`:
    its vector of a mix is no mean of two vectors. What is lost on a cache: pairs and ratios are drawn once
    for all epochs and students; and where the student's tokenizer is another, token k of a text is another
    piece of it, so that the two models mix other pieces of the two texts. The paper's labels, of the texts
    and mixed, do not exist here.

    Args:
        mixed: (M, D) vectors of M mixes.
        width: W, of the student's vectors; 1 to D.
        centred: Whether to subtract the mean error of the M mixes.

    Returns:
        Scalar, at least 0; 0 for a student that equals the teacher.
    """
    return kd(narrow(mixed.student, width), mixed.teacher, centred=centred)


def ckd(
    student: Tensor, candidates: Candidates, scale: Tensor, *, precision: str = "fp32"
) -> Tensor:
    """Contrastive distillation: find your own teacher vector among many (DisCo, section 3.3).

    `info_nce` where every candidate is a teacher vector. The teacher is frozen, so the vector of any cached
    row can be a negative, not only those of the batch, and `FrozenInfoNce` computes the loss without a
    (B, C) matrix of logits.

    Args:
        student: (B, W) float32 student vectors, any length.
        candidates: (C, D) teacher vectors, including each row's own positive.
        scale: a = 1 / temperature, > 0; a scalar, may be learned.
        precision: Precision of the dot products: "fp32" or "bf16".

    Returns:
        Scalar, at least 0; log(C) if all cosines are equal and no candidate is masked out.
    """
    width, kind = student.shape[1], type_of_products(precision)
    positives = candidates.vectors[candidates.positives, :width].float()
    loss: Tensor = FrozenInfoNce.apply(  # type: ignore[no-untyped-call]  # torch has no types here
        F.normalize(student, dim=1),
        scale,
        F.normalize(positives, dim=1),
        candidates.not_negative | candidates.is_positive,
        candidates.key_chunks(width, kind),
    )
    return loss


def type_of_products(precision: str) -> torch.dtype:
    """Returns the type in which `ckd` multiplies vectors; its sums are float32."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def info_nce(anchors: Tensor, candidates: Candidates, scale: Tensor) -> Tensor:
    """Find your own key among many (InfoNCE; DisCo, section 3.3 and, with labels, its second stage).

    L = -1/B sum_i log( exp(a cos(h_i, k_i)) / sum_j exp(a cos(h_i, k_j)) ), j over the candidates.

    False negatives, which are other vectors of a row's own text, are masked out of its denominator: each
    would raise the loss of a perfect student to log 2 or more.

    Args:
        anchors: (B, W) vectors of any length.
        candidates: (C, D) keys, including each row's positive.
        scale: a = 1 / temperature, > 0; a scalar, may be learned.

    Returns:
        Scalar, at least 0; log(C) if all cosines are equal and no candidate is masked out.
    """
    return F.cross_entropy(_logits(anchors, candidates, scale), candidates.positives)


def relational(
    student: Tensor, candidates: Candidates, *, temperature: float, teacher_temperature: float
) -> Tensor:
    """The student's similarities to the candidates follow the teacher's (RRD; SEED and ConGen).

    L = 1/B sum_i KL(P_T(.|i) || P_S(.|i)). The papers minimise the cross-entropy (RRD, eq. 4), which is
    larger by the entropy of P_T, a constant. RRD trains a projection of the teacher's vectors as well;
    those of a cache stay as they are. With tau_T -> 0 this is `ckd`.

    Args:
        student: (B, W) student vectors; of augmented texts, if the recipe deletes tokens (ConGen).
        candidates: (C, D) teacher vectors, including each row's own positive.
        temperature: tau_S.
        teacher_temperature: tau_T.

    Returns:
        Scalar, at least 0; 0 for a student that equals the teacher, at equal temperatures.
    """
    log_p = _teacher_log_shares(candidates, teacher_temperature)
    log_q = _log_shares(student, candidates, temperature)
    return _kl(log_p, log_q).mean()


def skew(
    student: Tensor,
    candidates: Candidates,
    *,
    temperature: float,
    teacher_temperature: float,
    alpha: float,
    reverse: bool,
) -> Tensor:
    """Skewed KL divergence (DistiLLM, eq. 4 and 5), over candidates instead of a vocabulary.

    Forward: KL(P_T || a P_T + (1 - a) P_S). Reverse: KL(P_S || (1 - a) P_T + a P_S). The loss is at most
    log(1/a), where KL has no bound. For the paper's student-generated texts `speculative` has rows that the
    student proposes (`proposals.py`); its loss is this one.

    Args:
        student: (B, W) student vectors.
        candidates: (C, D) teacher vectors, including each row's own positive.
        temperature: tau_S.
        teacher_temperature: tau_T.
        alpha: a, in (0, 1); 0.1 in the paper.
        reverse: Whether to take the expectation under the student's distribution.

    Returns:
        Scalar, 0 to log(1/a); 0 for a student that equals the teacher, at equal temperatures.
    """
    log_p = _teacher_log_shares(candidates, teacher_temperature)
    log_q = _log_shares(student, candidates, temperature)
    if reverse:
        log_p, log_q = log_q, log_p
    mixed = torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))
    return _kl(log_p, mixed).mean()


def adapter(
    student: Tensor,
    candidates: Candidates,
    adapted: Tensor,
    *,
    temperature: float,
    teacher_temperature: float,
    anchor: float,
    beta: float,
) -> Tensor:
    """The teacher comes to meet the student, a little (Online KD, arXiv 2409.12512).

    L = KL(sg P_T' || P_S) + anchor * mean(1 - cos(T'_i, T_i)) + beta * KL(P_T' || sg P_S): the first term
    teaches the student alone, the others the adapter alone. P_T' = softmax(cos(T'_i, T_j) / tau_T): a row's
    vector is adapted and those of the candidates are not, so the student learns to search the teacher's own
    index. The paper's module sits inside the teacher and also learns the task; a cache has the teacher's
    outputs only, and no labels: the anchor takes the place of the task.

    Args:
        student: (B, W) student vectors.
        candidates: (C, D) teacher vectors, including each row's own positive.
        adapted: (B, D) T', of length 1, with a gradient to the adapter.
        temperature: tau_S.
        teacher_temperature: tau_T.
        anchor: Weight of the second term, at least 0.
        beta: Weight of the third, at least 0.

    Returns:
        Scalar, at least 0; 0 for a student that equals a teacher that is not moved, at equal temperatures.
    """
    log_p = _log_shares(adapted, candidates, teacher_temperature)
    log_q = _log_shares(student, candidates, temperature)
    own = candidates.vectors[candidates.positives].float()
    drift = 1 - F.cosine_similarity(adapted, own, dim=1)
    towards = _kl(log_p, log_q.detach())
    return (_kl(log_p.detach(), log_q) + anchor * drift + beta * towards).mean()


def decoupled(
    student: Tensor,
    candidates: Candidates,
    *,
    temperature: float,
    teacher_temperature: float,
    alpha: float,
) -> Tensor:
    """Positive and negatives apart, easy and hard rows apart (ATKD, eq. 7 to 9).

    KL(P_T || P_S) = TKD + UNC * DKD: TKD is the divergence of the pair (positive, all negatives), DKD that
    within the negatives, UNC_i = 1 - P_T(positive | i). A row is easy if its UNC is not above the batch's
    median. L = a * mean_easy(DKD) + (1 - a) * mean_hard(TKD + DKD). The paper's classes are a vocabulary;
    here they are the candidates of the step, and the target class is the row's positive.

    Args:
        student: (B, W) student vectors.
        candidates: (C, D) teacher vectors, including each row's own positive and at least two others.
        temperature: tau_S.
        teacher_temperature: tau_T.
        alpha: a, 0 to 1; 0.2 in the paper's code.

    Returns:
        Scalar, at least 0; 0 for a student that equals the teacher, at equal temperatures.
    """
    own, rest = candidates.is_positive, ~candidates.not_negative
    pairs, within = [], []
    for log_shares in (
        _teacher_log_shares(candidates, teacher_temperature),
        _log_shares(student, candidates, temperature),
    ):
        others = log_shares.masked_fill(~rest, LEFT_OUT)
        all_others = others.logsumexp(dim=1)
        pairs.append(torch.stack([log_shares[own], all_others], dim=1))
        within.append(others.log_softmax(dim=1))
    uncertain = pairs[0][:, 1]
    easy = uncertain <= uncertain.median()
    target, others = _kl(*pairs), _kl(*within)
    hard_rows = (~easy).sum().clamp(min=1)
    return alpha * others[easy].mean() + (1 - alpha) * (target + others)[~easy].sum() / hard_rows


def comparative(student: Tensor, candidates: Candidates) -> Tensor:
    """Differences between rows point where the teacher's do (Comparative KD, section 3).

    L = mean over pairs i, j of other texts of 1 - cos(h_i - h_j, T_i - T_j), on vectors of length 1. The
    paper compares differences of class scores by a softmax. Squared differences would be a centred `kd`.

    Args:
        student: (B, W) student vectors.
        candidates: (B, D) teacher vectors of the same rows, in the same order.

    Returns:
        Scalar, 0 to 2; 0 for a student that equals the teacher.
    """
    ours = F.normalize(student, dim=1)
    theirs = narrow(candidates.keys, student.shape[1])
    # |a_i - a_j|^2 and <a_i - a_j, b_i - b_j> out of products of whole vectors: no (B, B, W) tensor.
    across = ours @ theirs.T
    own = across.diagonal()
    along = own[:, None] + own[None, :] - across - across.T
    squared = _squared_distances(ours) * _squared_distances(theirs)
    pairs = ~candidates.not_negative
    return 1 - (along[pairs] * squared[pairs].clamp(min=1e-12).rsqrt()).mean()


def gram(student: Tensor, candidates: Candidates, *, temperature: float | None) -> Tensor:
    """Match the teacher's similarities within a batch (Luxical; Stella and Jasper, L_sim).

    Without a temperature (Stella): the mean of (cos(h_i, h_j) - cos(T_i, T_j))^2 over pairs i, j of other
    texts. With a temperature t (Luxical): t^2 / B sum_i KL(softmax_j cos(T_i, T_j) / t ||
    softmax_j cos(h_i, h_j) / t), j over rows of other texts.

    Args:
        student: (B, W) student vectors.
        candidates: (B, D) teacher vectors of the same rows, in the same order.
        temperature: t, > 0; None for squared differences.

    Returns:
        Scalar, at least 0; 0 for a student whose similarities are the teacher's.
    """
    ours = F.normalize(student, dim=1)
    similar, teacher_similar = ours @ ours.T, candidates.keys @ candidates.keys.T
    pairs = ~candidates.not_negative
    if temperature is None:
        return F.mse_loss(similar[pairs], teacher_similar[pairs])
    log_p, log_q = (
        (cosines / temperature).masked_fill(~pairs, LEFT_OUT).log_softmax(dim=1)
        for cosines in (teacher_similar, similar)
    )
    return temperature**2 * _kl(log_p, log_q).mean()


def _logits(anchors: Tensor, candidates: Candidates, scale: Tensor | float) -> Tensor:
    """Returns (B, C) logits a cos(h_i, k_j), with false negatives masked out."""
    keys = narrow(candidates.keys, anchors.shape[1])
    logits = scale * (F.normalize(anchors, dim=1) @ keys.T)
    return logits.masked_fill(candidates.duplicates, LEFT_OUT)


def _log_shares(student: Tensor, candidates: Candidates, temperature: float) -> Tensor:
    """(B, C) log P_S."""
    return _logits(student, candidates, 1 / temperature).log_softmax(dim=1)


@torch.no_grad()
def _teacher_log_shares(candidates: Candidates, temperature: float) -> Tensor:
    """(B, C) log P_T."""
    return _log_shares(candidates.keys[candidates.positives], candidates, temperature)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(B,) KL(p || q) of each row of (B, C) logarithms."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _squared_distances(vectors: Tensor) -> Tensor:
    """(B, B) |a_i - a_j|^2 of vectors of length 1."""
    return 2 - 2 * vectors @ vectors.T


class Temperature(nn.Module):
    """A temperature that may be learned, as the logarithm of its inverse; then never below 0.01.

    Args:
        start: Initial value, > 0; at least 0.01 if it is learned.
        learnable: Whether training moves it.
    """

    def __init__(self, start: float, *, learnable: bool) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(-torch.log(torch.tensor(start)), requires_grad=learnable)

    def scale(self) -> Tensor:
        """1 / temperature, a scalar."""
        return self.log_scale.exp()

    @torch.no_grad()
    def keep_in_bounds(self) -> None:
        """Called after each step of the optimizer, as in CLIP.

        A bound in `scale` instead would have no gradient beyond it: a temperature that fell below it
        would never come back.
        """
        if self.log_scale.requires_grad:
            self.log_scale.clamp_(max=math.log(1 / LEAST_TEMPERATURE))

    def value(self) -> float:
        """The temperature itself, for a curve."""
        return float(1 / self.scale().detach())


class Objectives(nn.Module):
    """The weighted sum of a recipe's objectives, with what some of them learn themselves.

    Args:
        params: One or more objectives, in the order of the recipe.
        widths: Widths to which the student's vector may be cut (Matryoshka), besides the whole width.
        precision: Precision of `ckd`'s dot products; all other objectives use float32.
        dim: D, the width of the teacher's vectors, for an adapter of these.
    """

    def __init__(
        self,
        params: Sequence[Objective],
        widths: Sequence[int] = (),
        precision: str = "fp32",
        *,
        dim: int = 0,
    ) -> None:
        super().__init__()
        self.params, self.widths, self.precision = tuple(params), tuple(widths), precision
        self.learned = nn.ModuleDict()
        for place, objective in enumerate(self.params):
            if isinstance(objective, CkdObjective):
                self.learned[str(place)] = Temperature(
                    objective.temperature, learnable=objective.learnable_temperature
                )
            elif isinstance(objective, DiscoCkdObjective):
                self.learned[str(place)] = Temperature(DISCO_TEMPERATURE, learnable=True)
            elif isinstance(objective, AdapterObjective):
                self.learned[str(place)] = Adapter(
                    dim, rank=objective.rank, most_drift=objective.most_drift
                )

    @property
    def names(self) -> list[str]:
        """A name for each objective, for curves: `ckd`, or `ckd-2` if it is the second of its kind."""
        kinds = [objective.name for objective in self.params]
        return [
            kind if kinds[:place].count(kind) == 0 else f"{kind}-{kinds[:place].count(kind) + 1}"
            for place, kind in enumerate(kinds)
        ]

    def notes(self, vectors: Tensor) -> dict[str, float]:
        """What the objectives have learned themselves: `temperature_NAME` and `drift_NAME`, for a curve.

        Args:
            vectors: (n, D) teacher vectors, of which the mean drift is taken.
        """
        notes = {}
        for place, learned in self.learned.items():
            name = self.names[int(place)]
            if isinstance(learned, Temperature):
                notes[f"temperature_{name}"] = learned.value()
            elif isinstance(learned, Adapter):
                notes[f"drift_{name}"] = learned.drift(vectors)
        return notes

    def forward(
        self,
        student: Mapping[float, Tensor],
        teacher: Tensor,
        candidates: Sequence[Candidates | MixedBatch | None],
    ) -> tuple[Tensor, list[float]]:
        """The loss of a batch: the mean over the widths.

        Args:
            student: Share of deleted tokens -> (B, D) float32 student vectors of the shortened texts.
            teacher: (B, D) float32 teacher vectors as stored.
            candidates: The candidates or mixes of each objective; None for an objective without any.

        Returns:
            The weighted sum over objectives, and each objective's loss at the whole width, unweighted.
        """
        full_width = teacher.shape[1]
        total, parts = teacher.new_zeros(()), []
        for width in (full_width, *self.widths):
            for place, (objective, candidates_of) in enumerate(
                zip(self.params, candidates, strict=True)
            ):
                vectors = narrow(student[objective.deleted], width)
                loss = self._loss(place, objective, vectors, teacher, candidates_of)
                total = total + objective.weight * loss / (1 + len(self.widths))
                if width == full_width:
                    parts.append(float(loss.detach()))
        return total, parts

    def _loss(
        self,
        place: int,
        objective: Objective,
        student: Tensor,
        teacher: Tensor,
        candidates: Candidates | MixedBatch | None,
    ) -> Tensor:
        if isinstance(objective, MixesObjective):
            width, centred = student.shape[1], objective.centred
            return mixes(_required(candidates, MixedBatch), width=width, centred=centred)
        match objective:
            case CkdObjective() | DiscoCkdObjective():
                scale = self._temperature(place).scale()
                return ckd(
                    student, _required(candidates, Candidates), scale, precision=self.precision
                )
            case (
                RelationalObjective()
                | SkewObjective()
                | SpeculativeObjective()
                | DecoupledObjective()
            ):
                return _between_distributions(objective, student, _required(candidates, Candidates))
            case AdapterObjective():
                return adapter(
                    student,
                    _required(candidates, Candidates),
                    self.learned[str(place)](teacher),
                    temperature=objective.temperature,
                    teacher_temperature=objective.teacher_temperature,
                    anchor=objective.anchor,
                    beta=objective.beta,
                )
            case ComparativeObjective():
                return comparative(student, _required(candidates, Candidates))
            case GramObjective():
                return gram(
                    student, _required(candidates, Candidates), temperature=objective.temperature
                )
            case KdObjective() | DiscoKdObjective():
                centred = isinstance(objective, KdObjective) and objective.centred
                return kd(student, teacher, centred=centred)

    def _temperature(self, place: int) -> Temperature:
        temperature: Temperature = self.learned[str(place)]  # type: ignore[assignment]  # put there above
        return temperature


def _between_distributions(
    objective: RelationalObjective | SkewObjective | SpeculativeObjective | DecoupledObjective,
    student: Tensor,
    candidates: Candidates,
) -> Tensor:
    temperatures = {
        "temperature": objective.temperature,
        "teacher_temperature": objective.teacher_temperature,
    }
    match objective:
        case RelationalObjective():
            return relational(student, candidates, **temperatures)
        case SkewObjective():
            alpha, reverse = objective.alpha, objective.reverse
            return skew(student, candidates, **temperatures, alpha=alpha, reverse=reverse)
        case SpeculativeObjective():
            return skew(student, candidates, **temperatures, alpha=objective.alpha, reverse=False)
        case DecoupledObjective():
            return decoupled(student, candidates, **temperatures, alpha=objective.alpha)


def _required(candidates: Candidates | MixedBatch | None, kind: type[Needed]) -> Needed:
    if not isinstance(candidates, kind):
        raise TypeError(f"this objective needs {kind.__name__}")
    return candidates
