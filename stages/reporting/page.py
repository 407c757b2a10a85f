"""What stages left about models -> one HTML page that says which student to serve.

Whole in itself: no script, no request, nothing of the machine or the day. Texts in it come from files of
strangers: each goes through `esc`, and a policy in the page's head forbids scripts and requests anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from stages.params import FINETUNED, TEACHER
from stages.reporting import examples, measures, sections
from stages.reporting.results import Metrics, Model
from stages.reporting.sections import Subject
from stages.reporting.style import HUES, SHEET
from stages.reporting.svg import esc

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

ON_TOP = ("project", "teacher", "corpus")
"""Facts that say at once what the page is about."""

SECTIONS: list[tuple[str, str, Callable[[Subject], str]]] = [
    ("models", "All models", sections.table_of_models),
    ("quality", "What each student keeps of the teacher", sections.kept),
    ("trade-off", "Quality against speed and size", sections.trade_off),
    ("training", "Training", sections.training),
    ("similarity", "How alike they see texts", examples.similarities),
    ("disagreements", "Where they disagree most", examples.disagreements),
    ("searches", "The same searches, side by side", examples.searches),
    ("origin", "How this was made", examples.origin),
]


def page(
    models: Sequence[Model],
    *,
    students: Collection[str],
    facts: Mapping[str, str],
    rank_by: str | None = None,
    made_of: Mapping[str, str] | None = None,
) -> str:
    """The report as HTML.

    Args:
        models: Teacher, starts, students.
        students: Names of those that were trained.
        facts: Lines about how all this was made: label -> text.
        rank_by: The metric that ranks students; None for the first that was measured.
        made_of: Start or student -> what it was made of, in a few words.
    """
    names = [model.name for model in models]
    trained = [name for name in names if name in students]
    subject = Subject(
        {m.name: m for m in models}, trained, tones(names, trained), facts, rank_by, made_of or {}
    )
    drawn = [(key, title, draw(subject)) for key, title, draw in SECTIONS]
    drawn = [part for part in drawn if part[2]]
    links = "".join(f'<a href="#{key}">{key.capitalize()}</a>' for key, _, _ in drawn)
    body = "\n".join(
        f'<section id="{key}"><h2>{esc(title)}</h2>{content}</section>'
        for key, title, content in drawn
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(facts.get('project', 'teachonce'))}: which student to serve</title>\n"
        '<link rel="icon" href="data:,">\n'  # or a browser asks the server for one
        f"<style>{SHEET}</style>\n</head>\n<body>\n"
        f"<header>{_head(subject)}<nav>{links}</nav></header>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def tones(names: Sequence[str], students: Sequence[str]) -> dict[str, str]:
    """Model -> CSS classes of its colour. A finetuned student has the hue of what it was made from."""
    families = list(dict.fromkeys(name.removesuffix(FINETUNED) for name in students))
    found = {}
    for name in names:
        if name not in students:
            found[name] = "teacher" if name == TEACHER else "start"
            continue
        hue = families.index(name.removesuffix(FINETUNED)) % HUES
        found[name] = f"hue{hue} second" if name.endswith(FINETUNED) else f"hue{hue}"
    return found


def _head(subject: Subject) -> str:
    said = measures.verdict(subject.metrics, subject.students, subject.rank_by)
    count = len(subject.models)
    words = said or f"{count} model{'s' if count != 1 else ''} side by side."
    unbroken = esc(words).replace(" %", "&nbsp;%")
    best, teacher = subject.best, subject.models.get(TEACHER)
    cards = _cards(subject.metrics[best], teacher.metrics) if best and teacher else []
    shown = f'<div class="cards">{"".join(cards)}</div>' if cards else ""
    about = " · ".join(
        f"{esc(label)} {esc(subject.facts[label])}" for label in ON_TOP if label in subject.facts
    )
    return (
        "<h1>Which student to serve</h1>"
        + (f'<p class="about">{about}</p>' if about else "")
        + f'<p class="verdict">{unbroken}</p>{shown}'
    )


def _cards(student: Metrics, teacher: Metrics) -> list[str]:
    """The numbers that decide, of one student."""
    found = [
        _card(part.percent_told, "%", f"of the teacher's {part.title}", _sides(part))
        for part in measures.kept(student, teacher)
    ]
    times = measures.times_as_fast(student, teacher)
    if times is not None:
        rates = [
            f"{measures.number(side, 'sentences_per_second'):,.0f}" for side in (student, teacher)
        ]
        said = f"{rates[0]} texts/s, teacher {rates[1]}"
        found.append(
            _card(measures.short(times), "\N{MULTIPLICATION SIGN}", "as fast as the teacher", said)
        )
    space = measures.share_of_space(student, teacher)
    if space is not None:
        sizes = [f"{measures.number(side, 'megabytes'):,.1f}" for side in (student, teacher)]
        said = f"{sizes[0]} MB, teacher {sizes[1]}"
        found.append(_card(measures.short(space), "%", "of the teacher's size", said))
    agreement = measures.likeness(student)
    if agreement is not None:
        said = "rank correlation over all pairs"
        shown = measures.told(agreement, measures.ends(student, measures.likeness), 3)
        found.append(_card(shown, "", "fidelity: agreement with the teacher", said))
    return found


def _sides(part: measures.Kept) -> str:
    decimals = 2 if part.theirs > 1 else 3
    sides = zip((part.ours, part.theirs), part.ends, strict=True)
    ours, theirs = (measures.told(value, ends, decimals) for value, ends in sides)
    return f"{ours}, teacher {theirs}"


def _card(value: str, unit: str, label: str, small: str) -> str:
    raised = f"<small>&nbsp;{unit}</small>" if unit else ""
    return (
        f'<div class="card"><b>{esc(value)}{raised}</b><span>{esc(label)}</span>'
        f"<i>{esc(small)}</i></div>"
    )
