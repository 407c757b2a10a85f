"""Sections of the report page that show models side by side: which drawings and texts stand in them.

Each is empty where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from stages.params import FINETUNED, TEACHER, ChooseParams
from stages.reporting import charts, measures
from stages.reporting.choice import Choice, choice
from stages.reporting.columns import MOST_SETS, qualities
from stages.reporting.forms import forms, front, model_of
from stages.reporting.plane import Mark, plane
from stages.reporting.results import Disagreement, Formats, Metrics, Model, Result
from stages.reporting.svg import cut

HUES = 6  # classes hue0 ... hue5 of style.css
MOST_DISAGREEMENTS = 8  # of a student
MOST_SEARCHES = 6
MOST_RESULTS = 5
SCORES = {
    "agreement": "Agreement with the teacher on held-out texts",
    "dev": "Score on the development set while finetuning",
}

Figure = tuple[str, Markup]
"""A heading and the drawing below it."""


@dataclass(frozen=True)
class Subject:
    """What the page is about."""

    models: Mapping[str, Model]  # by name, in the order of the page: teacher, starts, students
    students: Sequence[str]  # those of them that were trained, in their order
    # The metric that ranks students; None for the first that was measured.
    rank_by: str | None = None
    # The bound within which a student is named; None: the best one is.
    choose: ChooseParams | None = None

    @cached_property
    def metrics(self) -> dict[str, Metrics]:
        """Name -> metrics."""
        return {name: model.metrics for name, model in self.models.items()}

    @cached_property
    def formats(self) -> dict[str, Formats]:
        """Name -> what `export` left, of models that were exported."""
        return {name: model.formats for name, model in self.models.items() if model.formats}

    @cached_property
    def forms(self) -> dict[str, Metrics]:
        """The teacher, and each student in each form in which it can be served."""
        served = {name: self.metrics[name] for name in self.models if name not in self.starts}
        return forms(served, self.formats)

    @cached_property
    def best(self) -> str | None:
        """The student to serve, if quality is all."""
        return measures.best(self.metrics, self.students, self.rank_by)

    @cached_property
    def choice(self) -> Choice:
        """The student to serve, within the bound."""
        return choice(
            self.metrics,
            self.students,
            rank_by=self.rank_by,
            choose=self.choose,
            formats=self.formats,
        )

    @cached_property
    def starts(self) -> list[str]:
        """The models that are neither the teacher nor trained."""
        return [name for name in self.models if name not in (TEACHER, *self.students)]

    @cached_property
    def tones(self) -> dict[str, str]:
        """Model -> CSS classes of its colour. A finetuned student has the hue of what it was made from."""
        families = list(dict.fromkeys(name.removesuffix(FINETUNED) for name in self.students))
        tones = {name: "teacher" if name == TEACHER else "start" for name in self.models}
        for name in self.students:
            hue = f"hue{families.index(name.removesuffix(FINETUNED)) % HUES}"
            tones[name] = f"{hue} second" if name.endswith(FINETUNED) else hue
        return tones

    def tone(self, form: str) -> str:
        """CSS classes of the colour of a model in any form."""
        return self.tones[model_of(form)]


def quality(subject: Subject) -> list[Figure]:
    """Bars: each measure of each student, in percent of the teacher."""
    metrics, tones = subject.metrics, subject.tones
    figures = []
    for measure in qualities(metrics, MOST_SETS):
        values = measures.measured(metrics, measure.measure)
        theirs = values.get(TEACHER)
        if theirs is None or theirs <= 0 or not set(values) & set(subject.students):
            continue
        bars = [
            charts.Bar(
                name,
                tones[name],
                100 * values[name] / theirs,
                measures.decimals_of_share(metrics[name], metrics[TEACHER], measure.measure),
            )
            for name in [*subject.students, *subject.starts]
            if name in values
        ]
        figures.append((measure.name, charts.bars(measure.name, bars)))
    return figures


def trade_off(subject: Subject) -> list[Figure]:
    """The teacher and each student in each form, by quality and speed, and by quality and size."""
    ranking = measures.yardstick(subject.metrics, subject.students, subject.rank_by)
    if ranking is None:
        return []
    title, measure = ranking
    served = subject.forms
    values = measures.measured(served, measure)
    theirs = values.get(TEACHER, 0)
    if theirs > 0:
        title = f"% of the teacher's {title}"
        values = {name: 100 * value / theirs for name, value in values.items()}
    speeds, speed_title = speeds_of(served)
    sizes = measures.measured(served, measures.of("megabytes"))
    chosen, choose = subject.choice, subject.choose
    least = 100 * choose.at_least if choose and choose.at_least and theirs > 0 else None
    figures = []
    for heading, costs, x_title, better, bound in (
        (
            "Against speed: up and right is better",
            speeds,
            speed_title,
            1,
            choose.at_least_times_as_fast if choose else None,
        ),
        (
            "Against size: up and left is better",
            sizes,
            "MB",
            -1,
            choose.at_most_mb if choose else None,
        ),
    ):
        places = {
            name: (better * costs[name], value) for name, value in values.items() if name in costs
        }
        on_front = front(places)
        marks = [
            Mark(
                name,
                subject.tone(name),
                costs[name],
                values[name],
                on_front=name in on_front,
                is_chosen=chosen.fits is not None and name == chosen.form,
            )
            for name in places
        ]
        if len(marks) > 1:
            drawn = plane(marks, x_title=x_title, y_title=title, x_bound=bound, y_bound=least)
            figures.append((heading, drawn))
    return figures


def speeds_of(metrics: Mapping[str, Metrics]) -> tuple[dict[str, float], str]:
    """Speeds as multiples of the teacher's (of the first model's, if it has none), and what they are.

    Models of another device are left out.
    """
    timed = measures.measured(metrics, measures.of(measures.SPEED))
    first = TEACHER if TEACHER in timed else next(iter(timed), TEACHER)
    times = {name: measures.times_as_fast(metrics[name], metrics[first]) for name in timed}
    compared = {name: value for name, value in times.items() if value is not None}
    return compared, f"times as fast as {'the teacher' if first == TEACHER else first}"


def curves(subject: Subject) -> list[Figure]:
    """Score by step, one drawing a kind of score."""
    figures = []
    for score, heading in SCORES.items():
        lines = [
            charts.Line(
                name,
                subject.tones[name],
                model.curve.scores,
                model.training.best_step if model.training else None,
            )
            for name in subject.students
            if (model := subject.models[name]).curve
            and model.curve.score == score
            and model.curve.scores
        ]
        if lines:
            figures.append((heading, charts.lines(lines, title=score)))
    return figures


def by_step(subject: Subject) -> list[tuple[str, str, Markup]]:
    """Student, a part of its loss or another note of its run, and that by step."""
    drawn = []
    for name in subject.students:
        curve = subject.models[name].curve
        if curve is None:
            continue
        parts = {f"{part} loss": points for part, points in curve.losses.items()}
        for title, points in (parts | dict(curve.notes)).items():
            if points:
                line = charts.Line(name, subject.tones[name], points)
                drawn.append((cut(name, 24), title, charts.small_line(line, title=title)))
    return drawn


def similarities(subject: Subject) -> list[tuple[str, list[Markup], str | None]]:
    """Student, its cosines beside the teacher's (all, then pair by pair), what became of their scale."""
    seen = {name: subject.models[name].details for name in subject.students}
    cosines = [c for details in seen.values() for pair in details.scatter for c in pair]
    span = (min(cosines, default=0), max(cosines, default=1))
    drawn = []
    for name, details in seen.items():
        tone, drawings = subject.tones[name], []
        if details.similarities:
            drawings.append(charts.histogram(details.similarities, name, tone))
        if details.scatter:
            drawings.append(charts.scatter(details.scatter, name, tone, span=span))
        if drawings:
            shift = measures.shift_of_cosines(subject.models[name].metrics)
            drawn.append((name, drawings, shift))
    return drawn


def disagreements(subject: Subject) -> dict[str, list[tuple[Disagreement, Markup]]]:
    """Student -> the pairs of texts that it sees least as the teacher does, each with a drawing."""
    return {
        name: [(pair, _gauge(name, pair, subject.tones[name])) for pair in pairs]
        for name in subject.students
        if (pairs := subject.models[name].details.disagreements[:MOST_DISAGREEMENTS])
    }


def _gauge(name: str, pair: Disagreement, tone: str) -> Markup:
    return charts.gauge({TEACHER: ("teacher", pair.teacher), name: (tone, pair.model)})


def searches(subject: Subject) -> list[tuple[str, str, dict[str, Sequence[Result]]]]:
    """Evaluation set, query, and what the teacher and each student find for it."""
    by_query: dict[tuple[str, str], dict[str, Sequence[Result]]] = {}
    for name in subject.models:
        if name not in subject.starts:
            for search in subject.models[name].details.searches:
                answers = by_query.setdefault((search.set, search.query), {})
                answers[name] = search.results[:MOST_RESULTS]
    return [(*asked, answers) for asked, answers in by_query.items()][:MOST_SEARCHES]
