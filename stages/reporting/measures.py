"""What metrics say when models are compared: which student is best, and what it is beside the teacher."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from stages.params import TEACHER
from stages.reporting.results import Metrics
from storage.errors import TeachonceError

Measure = Callable[[Metrics], float | None]
"""One number out of a model's metrics; None if it has none."""

Ends = tuple[float, float]
"""Lowest and highest value of a confidence interval."""


SPEED = "texts_per_reference"
"""Texts in the time of one pass of a fixed workload that took turns with the model (learning/speed.py)."""


@dataclass(frozen=True)
class Kept:
    """A measure of which both a student and the teacher have a number, over the same sets."""

    title: str
    ours: float  # the student's
    theirs: float  # the teacher's, above 0
    # The confidence interval of each number, where it is known.
    ends: tuple[Ends | None, Ends | None] = (None, None)
    is_tied: bool = False  # whether the two cannot be told apart

    @property
    def percent(self) -> float:
        """The student's share of the teacher's, 100 for as much."""
        return 100 * self.ours / self.theirs

    @property
    def percent_text(self) -> str:
        """The same in as many digits as are known, at most one behind the point."""
        return f"{self.percent:.{_decimals(self.ends, self.theirs)}f}"


def verdict(
    models: Mapping[str, Metrics], students: Collection[str], rank_by: str | None = None
) -> str:
    """One sentence: what the best student keeps of the teacher, how much faster and smaller it is.

    Empty if there is no teacher, no student, or nothing to compare them by.
    """
    name, ranking = best(models, students, rank_by), yardstick(models, students, rank_by)
    if name is None or ranking is None or TEACHER not in models:
        return ""
    rivals = [student for student in students if _has(models, student, ranking[1])]
    title = f"{name}, the best student," if len(rivals) > 1 else name
    if same := ties(models, students, rank_by):
        title = f"{name}, tied with {listed(same)} for the best student,"
    return f"{title} {listed(comparisons(models[name], models[TEACHER]))}."


def yardstick(
    models: Mapping[str, Metrics], students: Collection[str], rank_by: str | None = None
) -> tuple[str, Measure] | None:
    """The measure that ranks students, with its title; None if no student has a number for one.

    `rank_by`, or the first that one of them has a number for: STS average, or nDCG@10 where no STS was
    asked for, or likeness to the teacher.

    Raises:
        TeachonceError: no student has a number for `rank_by`.
    """
    if rank_by is not None:
        if not any(_has(models, name, of(rank_by)) for name in students):
            if not any(name in models for name in students):
                return None
            raise TeachonceError(
                "report.rank_by",
                f"no student has the metric {rank_by}",
                "run `teachonce evaluate` for the students, or set it to null",
            )
        return rank_by, of(rank_by)
    for title, measure in (("STS average", sts), ("nDCG@10", ndcg), ("fidelity", likeness)):
        if any(_has(models, name, measure) for name in students):
            return title, measure
    return None


def best(
    models: Mapping[str, Metrics], students: Collection[str], rank_by: str | None = None
) -> str | None:
    """The student that is first by the `yardstick`; the earlier one of two that are tied."""
    ranking = yardstick(models, students, rank_by)
    if ranking is None:
        return None
    scores = measured({name: models[name] for name in students if name in models}, ranking[1])
    return max(scores, key=lambda name: scores[name])


def ties(
    models: Mapping[str, Metrics], students: Collection[str], rank_by: str | None = None
) -> list[str]:
    """The students that cannot be told apart from the first one."""
    name, ranking = best(models, students, rank_by), yardstick(models, students, rank_by)
    if name is None or ranking is None:
        return []
    others = [student for student in students if student in models and student != name]
    return [other for other in others if tied(models[other], models[name], ranking[1])]


def kept(student: Metrics, teacher: Metrics) -> list[Kept]:
    """STS average and nDCG@10 of a student beside the teacher's, where they can be compared."""
    shares = []
    for kind, measure, title in (("sts.", sts, "STS average"), ("retrieval.", ndcg, "nDCG@10")):
        ours, theirs = measure(student), measure(teacher)
        # An average over other sets is another thing.
        alike = _sets(student, kind) == _sets(teacher, kind)
        # A share of a correlation below 0 would be the higher, the worse the student is.
        if alike and ours is not None and theirs is not None and theirs > 0:
            both = ends(student, measure), ends(teacher, measure)
            shares.append(Kept(title, ours, theirs, both, tied(student, teacher, measure)))
    return shares


def times_as_fast(metrics: Metrics, teacher: Metrics) -> float | None:
    """Speed as a multiple of the teacher's; None if they ran on different devices.

    Texts per second are those of a machine as busy as it was; a speed beside the fixed workload is not.
    """
    ours, theirs = (number(model, SPEED) for model in (metrics, teacher))
    same = metrics.get("device") == teacher.get("device")
    return ours / theirs if ours and theirs and same else None


def share_of_space(metrics: Metrics, teacher: Metrics) -> float | None:
    """Size of the weights in percent of the teacher's."""
    ours, theirs = number(metrics, "megabytes"), number(teacher, "megabytes")
    return 100 * ours / theirs if ours and theirs else None


def at_widths(metrics: Metrics) -> dict[int, Metrics]:
    """What the first values of a model's vectors are worth alone, as far as it was measured.

    Returns:
        How many values -> metrics, under the keys of whole vectors; the most values first.
    """
    by_width: dict[int, dict[str, str | int | float]] = {}
    for key, value in metrics.items():
        if match := re.fullmatch(r"widths\.(\d+)\.(.+)", key):
            by_width.setdefault(int(match[1]), {})[match[2]] = value
    return dict(sorted(by_width.items(), reverse=True))


def ends(metrics: Metrics, measure: Measure) -> Ends | None:
    """The 95 % interval of a measure; None if it is not known.

    The interval of a mean over several sets is the mean of their ends, which is wider than need be.
    """
    low, high = (
        measure({key.removesuffix(end): v for key, v in metrics.items() if key.endswith(end)})
        for end in (".low", ".high")
    )
    return None if low is None or high is None else (low, high)


def tied(ours: Metrics, theirs: Metrics, measure: Measure) -> bool:
    """Whether one's number lies inside the interval of the other: so many queries tell no difference."""
    a, b = measure(ours), measure(theirs)
    if a is None or b is None:
        return False
    sides = ((ends(ours, measure), b), (ends(theirs, measure), a))
    return any(
        interval is not None and interval[0] <= value <= interval[1] for interval, value in sides
    )


def decimals_of_share(student: Metrics, teacher: Metrics, measure: Measure) -> int:
    """Digits behind the point known of a student's share of the teacher's, in percent; 1 at most."""
    return _decimals((ends(student, measure), ends(teacher, measure)), measure(teacher) or 1.0)


def _decimals(intervals: Sequence[Ends | None], whole: float) -> int:
    """Digits behind the point of a share of `whole` in percent that the widest interval leaves known."""
    widths = (high - low for low, high in filter(None, intervals))
    return decimals_of((0.0, 100 * max(widths, default=0.0) / whole), 1)


def decimals_of(interval: Ends | None, most: int) -> int:
    """Digits behind the point that an interval leaves known: 2 for one of +-0.02; `most` without one."""
    half = (interval[1] - interval[0]) / 2 if interval else 0.0
    return most if half <= 0 else min(most, max(0, math.ceil(-math.log10(half) - 1e-9)))


def with_interval(value: float, interval: Ends | None, decimals: int, joint: str = " ± ") -> str:
    """A number with half of its interval, where that is known, in as many digits as are known."""
    if interval is None:
        return f"{value:.{decimals}f}"
    decimals = min(decimals, decimals_of(interval, decimals)) if joint != "±" else decimals
    return f"{value:.{decimals}f}{joint}{(interval[1] - interval[0]) / 2:.{decimals}f}"


def measured(models: Mapping[str, Metrics], measure: Measure) -> dict[str, float]:
    """Model -> number, for those that have one."""
    values = {name: measure(metrics) for name, metrics in models.items()}
    return {name: value for name, value in values.items() if value is not None}


def of(key: str) -> Measure:
    """The measure that reads one key."""
    return lambda metrics: number(metrics, key)


def number(metrics: Metrics, key: str) -> float | None:
    """The number under a key; None if there is none."""
    value = metrics.get(key)
    return None if value is None or isinstance(value, str) else float(value)


def sts(metrics: Metrics) -> float | None:
    """The average of all STS sets, Spearman x 100."""
    return number(metrics, "sts.average")


LEAST_SHIFT = 0.02
"""A smaller difference of cosines moves no threshold that has two decimals."""


def shift_of_cosines(metrics: Metrics) -> str | None:
    """What became of the teacher's scale, as a clause; None where it is the same or was not measured."""
    shift = number(metrics, "fidelity.cosine_shift")
    if shift is None or abs(shift) < LEAST_SHIFT:
        return None
    return f"cosines are {abs(shift):.2f} {'higher' if shift > 0 else 'lower'} than the teacher's"


def likeness(metrics: Metrics) -> float | None:
    """Spearman of all pairs' cosines with the teacher's, -1 to 1."""
    return number(metrics, "fidelity.spearman")


def millions(metrics: Metrics) -> float | None:
    """Weights, in millions."""
    count = number(metrics, "parameters")
    return None if count is None else count / 1e6


def ndcg(metrics: Metrics) -> float | None:
    """The mean over all retrieval sets, 0 to 1."""
    scores = [
        float(value)
        for key, value in metrics.items()
        if key.startswith("retrieval.") and key.endswith(".ndcg@10")
    ]
    return statistics.fmean(scores) if scores else None


def devices(models: Mapping[str, Metrics]) -> list[str]:
    """Where speeds were measured, sorted."""
    return sorted({str(metrics["device"]) for metrics in models.values() if "device" in metrics})


def short(value: float) -> str:
    """Two digits, or all before the point: 0.49, 1.9, 77, 129."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:#.2g}"


def listed(parts: Sequence[str]) -> str:
    """Parts as one phrase: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def comparisons(student: Metrics, teacher: Metrics) -> list[str]:
    """What a student is beside the teacher, each to stand after its name; at least one."""
    whose = ("the teacher's", "its")
    phrases = [
        f"{part.percent_text} % of {owner} {part.title}"
        f"{' (tied: inside the confidence interval)' if part.is_tied else ''}"
        for part, owner in zip(kept(student, teacher), whose, strict=False)
    ]
    clauses = [f"keeps {listed(phrases)}"] if phrases else []
    agreement = likeness(student)
    if not clauses and agreement is not None:
        shown = with_interval(agreement, ends(student, likeness), 3)
        clauses.append(f"agrees with the teacher on the order of pairs (Spearman {shown})")
    times = times_as_fast(student, teacher)
    if times is not None:
        clauses.append(f"is {short(times)} times as fast")
    space = share_of_space(student, teacher)
    if space is not None:
        clauses.append(f"has {short(space)} % of its size")
    return clauses or ["cannot be compared with the teacher"]


def _has(models: Mapping[str, Metrics], name: str, measure: Measure) -> bool:
    return name in models and measure(models[name]) is not None


def _sets(metrics: Metrics, kind: str) -> set[str]:
    """The names of the sets of one kind of evaluation."""
    return {key.split(".")[1] for key in metrics if key.startswith(kind)}
