"""Which student the report names on top: the best one, or the one that `report.choose` asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from stages.params import TEACHER, ChooseParams
from stages.reporting.forms import NO_FORMATS, forms
from stages.reporting.measures import (
    Measure,
    best,
    comparisons,
    listed,
    measured,
    of,
    tied,
    times_as_fast,
    verdict,
    yardstick,
)
from stages.reporting.results import Formats, Metrics


@dataclass(frozen=True)
class Choice:
    """The student that the report names."""

    # Its name, with that of its format where it is another than the model's own; None: no student.
    form: str | None
    # What it keeps of the teacher, how fast and how small it is; empty where nothing is known.
    sentence: str
    # Whether it is within the bound; else it is the nearest to it. None: no bound chose it.
    fits: bool | None = None


@dataclass(frozen=True)
class Bound:
    """What a bound is about."""

    amounts: Mapping[str, float]  # form -> the number that is bounded, for those that have one
    least: float  # the lowest that fits; of amounts for which less is better, both are below 0
    within: str  # the bound, to stand behind "the best" or "the smallest"
    none: str  # the sentence where nothing fits
    unknown: str  # the sentence where no student has such a number


def choice(
    models: Mapping[str, Metrics],
    students: Collection[str],
    *,
    rank_by: str | None = None,
    choose: ChooseParams | None = None,
    formats: Mapping[str, Formats] = NO_FORMATS,
) -> Choice:
    """The student to serve, and the sentence about it.

    Without a bound it is the best one as it was trained. With a bound on size or speed it is the best of
    all forms within it; with one on quality the smallest within it, and of the smallest the best.

    Raises:
        TeachonceError: no student has a number for `rank_by`.
    """
    name, sentence = best(models, students, rank_by), verdict(models, students, rank_by)
    ranking = yardstick(models, students, rank_by)
    if choose is None or ranking is None or not sentence:
        return Choice(name, sentence)
    title, measure = ranking
    trained = {student: models[student] for student in students if student in models}
    served = forms(trained, formats)
    scores = measured(served, measure)
    bound = _bound({key: served[key] for key in scores}, models[TEACHER], choose, title, measure)
    if not bound.amounts:
        return Choice(name, f"{bound.unknown} {sentence}")
    sizes = measured(served, of("megabytes"))
    within = [key for key, amount in bound.amounts.items() if amount >= bound.least]
    if not within:
        nearest = max(bound.amounts, key=lambda key: (bound.amounts[key], scores[key]))
        kept = listed(comparisons(served[nearest], models[TEACHER]))
        named = f"{nearest}{_size(sizes, nearest)}"
        return Choice(nearest, f"{bound.none} The nearest is {named}: it {kept}.", fits=False)
    if choose.at_least is None:
        chosen = max(within, key=lambda key: scores[key])
        same = [
            key for key in within if key != chosen and tied(served[key], served[chosen], measure)
        ]
        what = f"tied with {listed(same)} for the best" if same else "the best"
    else:
        chosen = min(within, key=lambda key: (sizes.get(key, float("inf")), -scores[key]))
        what = "the smallest"
    named = f"{chosen}{_size(sizes, chosen)}, {what} {bound.within},"
    kept = listed(comparisons(served[chosen], models[TEACHER]))
    return Choice(chosen, f"{named} {kept}.", fits=True)


def _size(sizes: Mapping[str, float], form: str) -> str:
    return f" ({sizes[form]:,.1f} MB)" if form in sizes else ""


def _bound(
    served: Mapping[str, Metrics],
    teacher: Metrics,
    choose: ChooseParams,
    title: str,
    measure: Measure,
) -> Bound:
    if choose.at_most_mb is not None:
        sizes = measured(served, of("megabytes"))
        return Bound(
            {form: -size for form, size in sizes.items()},
            -choose.at_most_mb,
            f"of at most {choose.at_most_mb:g} MB",
            f"No student has at most {choose.at_most_mb:g} MB.",
            "No student's size is known, so none is chosen by it.",
        )
    if choose.at_least_times_as_fast is not None:
        times = choose.at_least_times_as_fast
        return Bound(
            measured(served, lambda metrics: times_as_fast(metrics, teacher)),
            times,
            f"that is at least {times:g} times as fast as the teacher",
            f"No student is at least {times:g} times as fast as the teacher.",
            "No student's speed was compared with the teacher's, so none is chosen by it.",
        )
    theirs, share = measure(teacher), choose.at_least or 0
    return Bound(
        {form: ours / theirs for form, ours in measured(served, measure).items()}
        if theirs is not None and theirs > 0
        else {},
        share,
        f"with at least {100 * share:.4g} % of the teacher's {title}",
        f"No student keeps at least {100 * share:.4g} % of the teacher's {title}.",
        f"The teacher's {title} is not {'known' if theirs is None else 'above 0'}, so no student is chosen "
        "by what it keeps of it.",
    )
