"""What stages left about models -> one HTML page that says which student to serve.

The page stands alone: it has no script, makes no request, and tells nothing of the machine or the day.
templates/page.html is its markup and its words; this module gives it the numbers and drawings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from stages.params import BASE_FORMATS, TEACHER
from stages.reporting import columns, legend, measures, sections, templating
from stages.reporting.choice import Choice
from stages.reporting.forms import model_of
from stages.reporting.indexes import TYPES, among, index_rows
from stages.reporting.results import Metrics

ON_TOP = ("project", "teacher", "corpus")
"""Facts that say at once what the page is about."""


Card = tuple[str, str, str, str]
"""A number that decides: value, unit, what it is, and the two sides that it compares."""


def page(subject: sections.Subject, *, facts: Mapping[str, str], made_of: Mapping[str, str]) -> str:
    """The report as HTML.

    Args:
        subject: The models, and which of them were trained.
        facts: Lines about how all this was made: label -> text.
        made_of: Start or student -> what it was made of, in a few words.
    """
    models, trained, rank_by = subject.models, subject.students, subject.rank_by
    metrics, rows = subject.metrics, columns.rows(subject.metrics, subject.formats)
    shown = columns.columns(rows, trained)
    ties = measures.ties(metrics, trained, rank_by)
    timed = measures.measured(subject.forms, measures.of("sentences_per_second"))
    disagreements = sections.disagreements(subject)
    indexed = {name: metrics[name] for name in metrics if name not in subject.starts}
    chosen = subject.choice
    opened = None if chosen.form is None else model_of(chosen.form)
    return templating.html(
        "page.html",
        project=facts.get("project", "teachonce"),
        about=" · ".join(f"{label} {facts[label]}" for label in ON_TOP if label in facts),
        verdict=chosen.sentence
        or f"{len(models)} model{'s' if len(models) != 1 else ''} side by side.",
        cards=_cards(subject.forms, chosen.form),
        chosen=_tag(chosen, rows),
        models=models,
        tones=subject.tones,
        made_of=made_of,
        rows=rows,
        part_of=columns.part_of,
        columns=shown,
        glossary=legend.glossary(shown, rows),
        leaders={subject.best, *ties} if len(trained) > 1 else set(),
        notes=legend.notes(metrics, trained, rank_by, subject.formats),
        quality=sections.quality(subject),
        starts=subject.starts,
        index=index_rows(indexed),
        index_types=TYPES,
        among=among(indexed),
        trade_off=sections.trade_off(subject),
        elsewhere=sorted(set(timed) - set(sections.speeds_of(subject.forms)[0])),
        curves=sections.curves(subject),
        runs={name: run for name in trained if (run := models[name].training)},
        by_step=sections.by_step(subject),
        held_out=max((models[name].details.texts for name in trained), default=0),
        similarities=sections.similarities(subject),
        disagreements=disagreements,
        opened=opened if opened in disagreements else next(iter(disagreements), None),
        searches=sections.searches(subject),
        judged=any(
            result.relevant
            for model in models.values()
            for search in model.details.searches
            for result in search.results
        ),
        facts=facts,
    )


def _tag(chosen: Choice, rows: Collection[str]) -> dict[str, str]:
    """Row of the student that a bound chose -> what stands beside its name; none if no bound did."""
    if chosen.form is None or chosen.fits is None:
        return {}
    own = chosen.form.replace(" ", " · ")
    exported = [row for base in BASE_FORMATS if (row := f"{own} · {base}") in rows]
    return {next(iter(exported), own): "chosen" if chosen.fits else "nearest"}


def _cards(forms: Mapping[str, Metrics], chosen: str | None) -> list[Card]:
    """The numbers of the student on top; none without a teacher to compare it with."""
    if chosen is None or TEACHER not in forms:
        return []
    student, teacher = forms[chosen], forms[TEACHER]
    cards = [
        (part.percent_text, "%", f"of the teacher's {part.title}", _sides(part))
        for part in measures.kept(student, teacher)
    ]
    times = measures.times_as_fast(student, teacher)
    if times is not None:
        ours, theirs = _both(student, teacher, "sentences_per_second", 0)
        sides = f"{ours} texts/s, teacher {theirs}"
        cards.append(
            (measures.short(times), "\N{MULTIPLICATION SIGN}", "as fast as the teacher", sides)
        )
    share = measures.share_of_space(student, teacher)
    if share is not None:
        ours, theirs = _both(student, teacher, "megabytes", 1)
        sides = f"{ours} MB, teacher {theirs}"
        cards.append((measures.short(share), "%", "of the teacher's size", sides))
    agreement = measures.likeness(student)
    if agreement is not None:
        shown = measures.with_interval(agreement, measures.ends(student, measures.likeness), 3)
        value, _, half = shown.partition(" ± ")
        sides = "rank correlation of all pairs' cosines"
        cards.append((value, f"± {half}" if half else "", "fidelity to the teacher", sides))
    return cards


def _both(student: Metrics, teacher: Metrics, key: str, decimals: int) -> list[str]:
    return [f"{measures.number(side, key):,.{decimals}f}" for side in (student, teacher)]


def _sides(part: measures.Kept) -> str:
    decimals = 2 if part.theirs > 1 else 3
    sides = zip((part.ours, part.theirs), part.ends, strict=True)
    ours, theirs = (measures.with_interval(value, ends, decimals) for value, ends in sides)
    return f"{ours}, teacher {theirs}"
