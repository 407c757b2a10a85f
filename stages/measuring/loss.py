"""What other forms of a student, such as int8, lose of it, and how alike their vectors are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.measuring.metrics import CUT, EvaluatedModel
from stages.models.likeness import MIXED_PROBES, PROBES
from stages.outcome import Fact
from stages.vectors import rank_agreement, unit

if TYPE_CHECKING:
    from stages.models.forms import OpenForm

LEAST_ROWS = 12
"""With fewer texts a rank correlation of their cosines says little."""


@dataclass(frozen=True)
class Comparison:
    """How forms are measured; both are asked only where there is another form than the base.

    Args:
        evaluate: Name, form -> the metrics that `evaluate` writes of a model.
        heldout: Returns some held-out texts of the corpus.
    """

    evaluate: Callable[[str, OpenForm], Mapping[str, Fact]]
    heldout: Callable[[], Sequence[str]]


def agreement(
    student: EvaluatedModel, form: EvaluatedModel, heldout: Sequence[str]
) -> dict[str, Fact]:
    """How alike the vectors of a form and its student are.

    Returns:
        `student.lowest_cosine` and `student.mean_cosine` over probe texts and held-out ones, and
        `student.spearman`, the rank correlation of the cosines of held-out texts, if they are enough.
    """
    # A text without a word has no direction in a static model.
    texts = [*MIXED_PROBES, *(text for text in PROBES if text.strip()), *heldout]
    own = student.encode_counted(texts, role="text").vectors
    copied = form.encode_counted(texts, role="text").vectors
    cosines = (unit(own) * unit(copied)).sum(axis=1)
    found: dict[str, Fact] = {
        "student.lowest_cosine": round(float(cosines.min()), 6),
        "student.mean_cosine": round(float(cosines.mean()), 6),
    }
    if len(heldout) >= LEAST_ROWS:
        rows = np.arange(len(texts) - len(heldout), len(texts))
        found["student.spearman"] = round(rank_agreement(copied[rows], own[rows]), 6)
    return found


def loss(student: Mapping[str, Fact], form: Mapping[str, Fact]) -> tuple[str, float]:
    """The quality of which a form loses most, and the share that it loses; below 0 if it gains.

    Qualities are the average of STS sets and the mean nDCG@10 of retrieval sets; without sets the agreement
    with the teacher, and without that, too, the mean cosine with the student, which is 1 for the student.

    Args:
        student: Metrics of the student.
        form: Metrics of the form.
    """
    own, others = qualities(student), qualities(form)
    shares = {
        name: 1 - others[name] / value
        for name, value in own.items()
        if value > 0 and name in others
    }
    if not shares:
        return "cosine with the student", 1 - float(form["student.mean_cosine"] or 0)
    worst = max(shares, key=lambda name: shares[name])
    return worst, shares[worst]


def qualities(metrics: Mapping[str, Fact]) -> dict[str, float]:
    """Name -> value of what a student is chosen for; the agreement with the teacher only without sets."""
    values = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
    ranked = [
        value
        for key, value in values.items()
        if key.startswith("retrieval.") and key.endswith(f".ndcg@{CUT}")
    ]
    found = {}
    if "sts.average" in values:
        found["STS"] = values["sts.average"]
    if ranked:
        found[f"nDCG@{CUT}"] = statistics.fmean(ranked)
    if not found and "fidelity.spearman" in values:
        found["agreement with the teacher"] = values["fidelity.spearman"]
    return found
