"""Sections of the report page that are texts and pairs of them: what a student sees as the teacher does.

Each gives the HTML below its heading, or nothing where `evaluate` left nothing to look at. Texts are of
strangers: each goes through `esc`, in an element that no right-to-left text can leave.
"""

from __future__ import annotations

from stages.params import TEACHER
from stages.reporting import charts
from stages.reporting.measures import shift_of_cosines
from stages.reporting.results import Result, Search
from stages.reporting.sections import Subject, labelled
from stages.reporting.svg import esc

MOST_DISAGREEMENTS = 8  # of a student
MOST_SEARCHES = 6
MOST_RESULTS = 5
OPEN_SEARCHES = 2
LONGEST = 280  # characters of a text
LONGEST_RESULT = 160


def similarities(subject: Subject) -> str:
    """Cosines of held-out pairs, the student's and the teacher's: how they are spread, and pair by pair."""
    panels = []
    seen = [subject.models[name].details for name in subject.students]
    cosines = [cosine for found in seen for pair in found.scatter for cosine in pair]
    span = (min(cosines, default=0), max(cosines, default=1))
    for name in subject.students:
        details, tone = subject.models[name].details, subject.tones[name]
        drawn = charts.histogram(details.similarities, name, tone) if details.similarities else ""
        if details.scatter:
            drawn += charts.scatter(details.scatter, name, tone, span=span)
        if drawn:
            shift = shift_of_cosines(subject.models[name].metrics)
            said = f"On average its {shift}: make thresholds anew." if shift else ""
            drawn += f'<p class="note">{esc(said)}</p>' if said else ""
            panels.append(f"<figure><h3>{labelled(subject, name)}</h3>{drawn}</figure>")
    if not panels:
        return ""
    texts = max(found.texts for found in seen)
    note = (
        f"Cosines of pairs among {texts:,} held-out texts. Above, how they are spread: the teacher's "
        "as a grey area, the student's as a line. Below, pair by pair: on the dashed line both agree."
    )
    return f'<p class="note">{esc(note)}</p><div class="panels">{"".join(panels)}</div>'


def disagreements(subject: Subject) -> str:
    """The pairs of texts that a student sees least as the teacher does."""
    blocks = []
    shown = [n for n in subject.students if subject.models[n].details.disagreements]
    opened = subject.best if subject.best in shown else next(iter(shown), None)
    for name in shown:
        found = subject.models[name].details.disagreements[:MOST_DISAGREEMENTS]
        items = []
        for pair in found:
            sides = {TEACHER: ("teacher", pair.teacher), name: (subject.tones[name], pair.model)}
            texts = "".join(
                f'<p dir="auto">{esc(text, LONGEST)}</p>' for text in (pair.first, pair.second)
            )
            items.append(
                f'<div class="odd">{texts}<div>{charts.gauge(sides)}teacher <b>{pair.teacher:.2f}</b>, '
                f"{esc(name)} <b>{pair.model:.2f}</b></div></div>"
            )
        blocks.append(
            f"<details{' open' if name == opened else ''}><summary>{labelled(subject, name)} "
            f"<small>{len(found)} pair{'s' if len(found) != 1 else ''}</small></summary>"
            f"{''.join(items)}</details>"
        )
    if not blocks:
        return ""
    note = "Pairs of held-out texts that one of the two puts much nearer to each other than the other does."
    return f'<p class="note">{note}</p>{"".join(blocks)}'


def searches(subject: Subject) -> str:
    """What the teacher and each student find for the same queries."""
    asked = [name for name in subject.models if name in (TEACHER, *subject.students)]
    found: dict[tuple[str, str], dict[str, Search]] = {}
    for name in asked:
        for search in subject.models[name].details.searches:
            found.setdefault((search.set, search.query), {})[name] = search
    blocks = [
        f'<details class="query"{" open" if place < OPEN_SEARCHES else ""}>'
        f"<summary><bdi>{esc(query, LONGEST)}</bdi> <small>{esc(key)}</small></summary>"
        f'<div class="answers">{"".join(_answer(subject, *answer) for answer in answers.items())}'
        "</div></details>"
        for place, ((key, query), answers) in enumerate(list(found.items())[:MOST_SEARCHES])
    ]
    if not blocks:
        return ""
    known = any(
        result.relevant
        for answers in found.values()
        for search in answers.values()
        for result in search.results
    )
    note = (
        '<p class="note">✓ and shaded: a right answer, by the evaluation set.</p>' if known else ""
    )
    return note + "".join(blocks)


def _answer(subject: Subject, name: str, search: Search) -> str:
    items = "".join(_result(result) for result in search.results[:MOST_RESULTS])
    return f"<div><h4>{labelled(subject, name)}</h4><ol>{items}</ol></div>"


def _result(result: Result) -> str:
    kind, mark = (' class="hit"', "<b>✓</b> ") if result.relevant else ("", "")
    heard = '<b class="hidden">right answer</b>' if result.relevant else ""
    return (
        f'<li{kind}><bdi dir="auto">{esc(result.text, LONGEST_RESULT)}</bdi>'
        f"<span>{mark}{result.score:.2f}{heard}</span></li>"
    )


def origin(subject: Subject) -> str:
    """What the models, texts and vectors are."""
    lines = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in subject.facts.items())
    return f'<dl class="made">{lines}</dl>' if lines else ""
