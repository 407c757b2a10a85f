"""Sections of the report page that are numbers: the table, what is kept, at what cost, how it was trained.

Each gives the HTML below its heading, or nothing where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stages.params import TEACHER
from stages.reporting import charts, measures
from stages.reporting.results import Metrics, Model
from stages.reporting.svg import cut, esc
from stages.reporting.table import (
    NOTHING,
    columns,
    cut_note,
    ignored_note,
    part_of,
    qualities,
    rows,
    rule_note,
    speed_note,
)

ANY_NUMBER = 1_000  # of sets: a page has room for all columns
SCORES = {
    "agreement": "Agreement with the teacher on held-out texts",
    "dev": "Score on the development set while finetuning",
}
LOSS_NOTE = '<p class="note">Loss by step, each on a scale of its own.</p>'
GLOSSARY = {
    "STS": "STS: rank correlation with people's scores of sentence pairs, times 100.",
    "nDCG": "nDCG@10: how well the first ten results of a search are chosen, 0 to 1.",
    "fidelity": "fidelity: rank correlation of all pairs' cosines with the teacher's.",
    "top-10": "top-10 overlap: share of a text's ten nearest that the teacher has too.",
}
WIDTHS_NOTE = (
    "first so many: what the first values of the vectors of the model above are worth alone."
)


@dataclass(frozen=True)
class Subject:
    """What the page is about.

    Args:
        models: By name, in the order of the page: teacher, starts, students.
        students: Those of them that were trained, in their order.
        tones: CSS classes of each model's colour.
        facts: How all this was made: label -> text.
        rank_by: The metric that ranks students; None for the first that was measured.
        made_of: Start or student -> what it was made of, in a few words.
    """

    models: Mapping[str, Model]
    students: Sequence[str]
    tones: Mapping[str, str]
    facts: Mapping[str, str]
    rank_by: str | None = None
    made_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Metrics]:
        """Name -> metrics."""
        return {name: model.metrics for name, model in self.models.items()}

    @property
    def best(self) -> str | None:
        """The student to serve, if quality is all."""
        return measures.best(self.metrics, self.students, self.rank_by)


def labelled(subject: Subject, name: str) -> str:
    """A model's name with its colour before it."""
    return charts.swatch(subject.tones[name]) + esc(name)


def table_of_models(subject: Subject) -> str:
    """All columns of all models; wider than a phone, it scrolls in its own box."""
    shown = rows(subject.metrics)
    found = columns(shown, subject.students, most_sets=ANY_NUMBER)
    titles = "".join(f'<th scope="col">{_lines(column.title)}</th>' for column in found)
    contest = len(subject.students) > 1
    equals = measures.equals(subject.metrics, subject.students, subject.rank_by)
    leaders, word = {subject.best, *equals}, "level" if equals else "best"
    body = []
    for row in shown:
        cells = []
        for column in found:
            cell = esc(column.cells.get(row, NOTHING))
            cells.append(f"<td>{f'<strong>{cell}</strong>' if row in column.bold else cell}</td>")
        if row in subject.models:
            tag = f'<span class="tag">{word}</span>' if contest and row in leaders else ""
            of = subject.made_of.get(row)
            head = (
                labelled(subject, row) + tag + (f'<span class="of">{esc(of)}</span>' if of else "")
            )
            kind = ""
        else:
            head, kind = esc(part_of(row)), ' class="part"'
        body.append(f'<tr{kind}><th scope="row">{head}</th>{"".join(cells)}</tr>')
    names = " ".join(column.name for column in found)
    notes = [said for word, said in GLOSSARY.items() if word in names]
    notes += [WIDTHS_NOTE] if len(shown) > len(subject.models) else []
    notes += filter(None, (note(subject.metrics) for note in (cut_note, ignored_note, speed_note)))
    notes += filter(None, [rule_note(subject.metrics, subject.students, subject.rank_by)])
    bold = ["Shaded: best among students."] if any(column.bold for column in found) else []
    return (
        '<div class="scroll after" tabindex="0" role="region" aria-label="Table of all models"><table>'
        f'<thead><tr><th scope="col">model</th>{titles}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="note after">{esc(" ".join([*bold, *notes]))}</p>'
    )


def _lines(title: str) -> str:
    return "<br>".join(esc(line) for line in title.split("\n"))


def kept(subject: Subject) -> str:
    """Bars: each measure of each student, in percent of the teacher."""
    metrics = subject.metrics
    order = [*subject.students, *(n for n in metrics if n not in (TEACHER, *subject.students))]
    panels = []
    for quality in qualities(metrics):
        values = measures.measured(metrics, quality.measure)
        theirs = values.get(TEACHER)
        if theirs is None or theirs <= 0 or not set(values) & set(subject.students):
            continue
        rows = [
            charts.Bar(
                name,
                subject.tones[name],
                100 * values[name] / theirs,
                measures.decimals_of_share(metrics[name], metrics[TEACHER], quality.measure),
            )
            for name in order
            if name in values
        ]
        drawn = charts.bars(quality.name, rows)
        panels.append(f"<figure><h3>{esc(quality.name)}</h3>{drawn}</figure>")
    if not panels:
        return ""
    note = "In percent of the teacher, whose level is the line at the end of each bar's track."
    starts = ", ".join(n for n in order if n not in subject.students)
    grey = f" Grey: {starts}, before training." if starts else ""
    return f'<p class="note">{esc(note + grey)}</p><div class="panels">{"".join(panels)}</div>'


def trade_off(subject: Subject) -> str:
    """All models by quality and speed, and by quality and size."""
    found = measures.yardstick(subject.metrics, subject.students, subject.rank_by)
    if found is None:
        return ""
    title, measure = found
    quality = measures.measured(subject.metrics, measure)
    panels = []
    speeds, speed_title = _speeds(subject)
    for heading, costs, x_title in (
        ("Against speed: up and right is better", speeds, speed_title),
        ("Against size: up and left is better", _sizes(subject), "MB"),
    ):
        marks = [
            charts.Mark(
                name, subject.tones[name], costs[name], quality[name], _minutes(subject, name)
            )
            for name in subject.models
            if name in costs and name in quality
        ]
        if len(marks) > 1:
            drawn = charts.plane(marks, x_title=x_title, y_title=title)
            panels.append(f"<figure><h3>{esc(heading)}</h3>{drawn}</figure>")
    if not panels:
        return ""
    timed = measures.measured(subject.metrics, measures.of("sentences_per_second"))
    away = sorted(set(timed) - set(speeds))
    note = (
        "The axes show only the range that is in use; they do not begin at 0. "
        "Minutes are those of training."
    )
    absent = f" Measured on another device, so not compared: {', '.join(away)}." if away else ""
    return f'<p class="note">{esc(note + absent)}</p><div class="pair">{"".join(panels)}</div>'


def _minutes(subject: Subject, name: str) -> str:
    run = subject.models[name].training
    return f"{measures.short(run.minutes)} min" if run else ""


def _speeds(subject: Subject) -> tuple[dict[str, float], str]:
    """Speeds as multiples of the teacher's (of the first model's, if it has none), and what they are."""
    known = measures.measured(subject.metrics, measures.of(measures.SPEED))
    first = TEACHER if TEACHER in known else next(iter(known), TEACHER)
    times = (
        {n: measures.times_as_fast(m, subject.metrics[first]) for n, m in subject.metrics.items()}
        if known
        else {}
    )
    found = {name: value for name, value in times.items() if value is not None}
    return found, f"times as fast as {'the teacher' if first == TEACHER else first}"


def _sizes(subject: Subject) -> dict[str, float]:
    return measures.measured(subject.metrics, measures.of("megabytes"))


def training(subject: Subject) -> str:
    """Score and loss by step, and how long each run took."""
    trained = [subject.models[name] for name in subject.students]
    panels, losses = [], []
    for score, heading in SCORES.items():
        rows = [
            charts.Line(
                model.name,
                subject.tones[model.name],
                model.curve.scores,
                model.training.best_step if model.training else None,
            )
            for model in trained
            if model.curve and model.curve.score == score and model.curve.scores
        ]
        if rows:
            drawn = charts.lines(rows, title=score)
            panels.append(f"<figure><h3>{esc(heading)}</h3>{drawn}</figure>")
    for model in trained:
        for part, points in model.curve.losses.items() if model.curve else ():
            if points:
                row = charts.Line(model.name, subject.tones[model.name], points)
                losses.append(
                    f"<figure><h3>{esc(cut(model.name, 24))} <small>{esc(part)} loss</small></h3>"
                    f"{charts.small_line(row, title=f'{part} loss')}</figure>"
                )
    runs = _runs(subject)
    if not panels and not losses and not runs:
        return ""
    note = "A ring marks the step whose weights were kept."
    scores = (
        f'<p class="note">{note}</p><div class="pair">{"".join(panels)}</div>' if panels else ""
    )
    small = f'{LOSS_NOTE}<div class="tiny">{"".join(losses)}</div>' if losses else ""
    return scores + runs + small


def _runs(subject: Subject) -> str:
    """A table of how long each run took."""
    rows = [
        f'<tr><th scope="row">{labelled(subject, name)}</th><td>{run.minutes:,.1f}</td>'
        f"<td>{run.steps:,}</td><td>{run.best_step:,}</td></tr>"
        for name in subject.students
        if (run := subject.models[name].training)
    ]
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{word}</th>' for word in ("minutes", "steps", "best step"))
    return (
        '<div class="scroll runs" tabindex="0" role="region" aria-label="Training runs"><table>'
        f'<thead><tr><th scope="col">run</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
