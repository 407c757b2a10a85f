"""`teachonce plan`: what embed, mine, distill, finetune and evaluate will take here, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.workspace import Workspace
from stages.outcome import Facts, Outcome, clock
from stages.params import TEACHER
from storage.errors import MissingError, TeachonceError

if TYPE_CHECKING:
    from stages.plan import Labelled, Load

COUNTED, EXTRAPOLATED = "counted", "extrapolated"


def run(here: Workspace, *, seconds: float, seed: int) -> Outcome:
    """Measure on a sample of this work tree's corpus; nothing is written.

    Where labelled rows or evaluation sets are not there yet, what reads them is not planned, and its facts
    say why (`not_planned`).

    Raises:
        MissingError: there is no corpus yet, or no teacher where one is needed.
    """
    from stages.plan import run as measure

    corpus = here.corpus()
    files, is_here = here.teacher()
    unplanned: dict[str, str] = {}
    labelled = evaluation = None
    try:
        evaluation = _evaluation(here)
        labelled = _labelled(here) if here.params.finetune.students else None
    except TeachonceError as error:
        stage = "evaluate and finetune" if evaluation is None else "finetune"
        unplanned[stage] = f"{error.where}: {error.problem}"
    outcome = measure(
        here.params,
        files=files,
        corpus=corpus,
        store=here.store,
        remote=here.remote(),
        load_teacher=(lambda: here.encoder(TEACHER)) if is_here else None,
        starts={
            name: _folder(here, student.start) for name, student in here.params.students.items()
        },
        labelled=labelled,
        evaluation=evaluation,
        seconds=seconds,
        seed=seed,
    )
    return replace(outcome, facts={**outcome.facts, "not_planned": unplanned})


def _evaluation(here: Workspace) -> Load:
    """All texts of the evaluation sets.

    Raises:
        TeachonceError: a file that is not there, or is not what it should be.
    """
    from stages.plan import Load
    from stages.reading import evaluation_sets

    params, root = here.params.evaluate, here.at.root
    texts: list[str] = []
    for name, pattern in params.sts.items():
        texts += evaluation_sets.read_sts(
            evaluation_sets.sts_files(pattern, root, f"evaluate.sts.{name}")
        ).texts
    for name, setting in params.retrieval.items():
        found = evaluation_sets.read_beir(evaluation_sets.beir_folder(setting, root, name), name)
        texts += [*found.queries, *found.documents]
    return Load.of(texts, params.max_tokens or here.params.embed.max_tokens)


def _labelled(here: Workspace) -> Labelled:
    """The labelled rows, without those of evaluation sets left out: they are few.

    Raises:
        TeachonceError: the same.
    """
    from stages.learning.judges import Labels
    from stages.plan import Labelled, Load

    params = here.params.finetune
    labels = Labels.read(params, here.at.root, ())
    learned = (text for row in labels.learned for text in row.texts)
    return Labelled(
        len(labels.learned),
        Load.of(learned, params.max_tokens),
        Load.of(labels.judge.texts, params.max_tokens),
    )


def _folder(here: Workspace, start: str) -> Path | None:
    try:
        return here.model_folder(start)
    except MissingError:
        return None


def lines(facts: Facts) -> Iterator[str]:
    """A line for each number: what, how much, how it is known."""
    for what, value, known in _rows(facts):
        yield f"{what:<28}{value:>18}  {known}".rstrip()


def _rows(facts: Facts) -> Iterator[tuple[str, str, str]]:
    counted, measured, said = (facts[kind] for kind in (COUNTED, "measured", EXTRAPOLATED))
    yield "texts", f"{counted['texts']:,}", f"{COUNTED}, in {counted['shards']:,} shards"
    yield (
        "to embed",
        f"{counted['texts_to_embed']:,}",
        f"{COUNTED}, in {counted['shards_to_embed']:,} shards",
    )
    if counted["texts_to_reuse"]:
        yield "to copy from older shards", f"{counted['texts_to_reuse']:,}", COUNTED
    if "teacher" in measured:
        at = measured["teacher"]
        sampled = f"measured, {at['texts']:,} texts"
        yield "tokens of a text", f"{at['tokens_per_text']:.1f}", sampled
        yield f"longer than {at['max_tokens']:,} tokens", f"{100 * at['truncated']:.1f} %", sampled
        clocked = f"measured, {at['encoded']:,} texts in {at['seconds']:.1f} s"
        yield "teacher, tokens/s", f"{at['tokens_per_second']:,.0f}", f"{clocked} on {at['device']}"
        yield "teacher, texts/s", f"{at['texts_per_second']:,.1f}", clocked
        yield "teacher, to load", f"{at['load_seconds']:.1f} s", "measured"
    yield "embed", clock(said["embed"]["seconds"]), f"{EXTRAPOLATED}, loading included"
    yield "  vectors", _size(said["embed"]["bytes"]), EXTRAPOLATED
    yield "mine", clock(said["mine"]["seconds"]), EXTRAPOLATED
    yield "  negatives", _size(said["mine"]["bytes"]), EXTRAPOLATED
    for name, pace in measured["students"].items():
        student = said["students"][name]
        yield (
            f"distill {name}, steps/hour",
            f"{pace['steps_per_hour']:,.0f}",
            f"measured, {pace['steps']:,} steps",
        )
        yield (
            f"distill {name}",
            clock(student["seconds"]),
            f"{EXTRAPOLATED}, {student['steps']:,} steps if it is not stopped early",
        )
    for name, found in said["finetune"].items():
        steps = f"{found['steps']:,} steps if it is not stopped early"
        yield f"finetune {name}", clock(found["seconds"]), f"{EXTRAPOLATED}, {steps}"
    if said["evaluate"]:
        models = said["evaluate"].values()
        seconds = sum(found["seconds"] for found in models)
        without = (
            "" if TEACHER in said["evaluate"] else " without the teacher, which was not measured"
        )
        yield "evaluate", clock(seconds), f"{EXTRAPOLATED}, {len(models)} models{without}"
    for stage, why in facts["not_planned"].items():
        yield stage, "?", why
    for name, start in facts["starts_missing"].items():
        yield f"distill {name}", "?", f"run `teachonce start {start}` first"


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
