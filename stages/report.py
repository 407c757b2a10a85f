"""What was measured of each model -> one file of numbers, and one page to decide by.

Models come in three sorts, in this order: the teacher, starts (students before training), students.
The table of the terminal is in table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.outcome import Outcome, write_json
from stages.params import ChooseParams
from stages.reporting.choice import Choice
from stages.reporting.forms import model_of
from stages.reporting.page import page as drawn
from stages.reporting.results import (
    Model,
    read_curve,
    read_details,
    read_exports,
    read_metrics,
    read_training,
)
from stages.reporting.sections import Subject
from storage import durable

VERSION = 8  # raise it when a code change alters the report of the same metrics


def run(
    models: Sequence[str],
    *,
    students: Collection[str],
    metrics: Callable[[str], Path],
    details: Callable[[str], Path],
    curve: Callable[[str], Path],
    training: Callable[[str], Path],
    exports: Callable[[str], Path],
    facts: Mapping[str, str],
    rank_by: str | None,
    choose: ChooseParams | None,
    made_of: Mapping[str, str],
    out: Path,
    page: Path,
) -> Outcome:
    """Write the results of `models` into one file of numbers and one page.

    Args:
        models: Teacher, starts, students.
        students: The trained models among `models`.
        metrics: Model -> the metrics that `evaluate` left.
        details: Model -> the details that `evaluate` left.
        curve: Model -> the CSV that its training left, if it was trained here.
        training: Model -> the JSON that its training left, if it was trained here.
        exports: Model -> the JSON that its export left, if it was exported here.
        facts: Lines about how all this was made: label -> text.
        rank_by: The metric that ranks students; None for the first that was measured.
        choose: The bound within which a student is named; None: the best one is.
        made_of: Start or student -> what it was made of, in a few words, to stand below its name.
        out: The JSON file to write.
        page: The HTML file to write.

    Returns:
        Its facts are the report, models in the order given, as `table` takes it.

    Raises:
        MissingError: a model was not evaluated.
        DamagedError: a file is not what its stage writes.
    """
    # All is read before anything is written: a report is of one moment or there is none.
    measured = {name: read_metrics(metrics(name), name) for name in models}
    evaluated = {
        name: Model(
            name,
            measured[name],
            read_details(details(name), name),
            read_curve(curve(name), name),
            read_training(training(name), name),
            read_exports(exports(name), name, measured[name]),
        )
        for name in models
    }
    trained = [name for name in students if name in evaluated]
    subject = Subject(evaluated, trained, rank_by, choose)
    chosen = subject.choice
    report = {"models": subject.metrics, "formats": subject.formats, "chosen": _as_facts(chosen)}
    write_json(out, report)
    durable.replace(page, drawn(subject, facts=facts, made_of=made_of).encode())
    count = f"{len(models)} model{'s' if len(models) != 1 else ''}"
    summary = f"{count}: {chosen.sentence}" if chosen.sentence else count
    return Outcome("report", page, summary, report)


def _as_facts(chosen: Choice) -> dict[str, Any] | None:
    """Which student was chosen, for programs; None if there is no student."""
    if chosen.form is None:
        return None
    model = model_of(chosen.form)
    of_format = chosen.form.removeprefix(model).strip() or None
    return {"model": model, "format": of_format, "fits": chosen.fits}
