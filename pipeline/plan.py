"""`teachonce plan`: what embed, mine and distill will take on this machine, as a table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.workspace import Workspace
from stages.outcome import Facts, Outcome, clock
from stages.params import TEACHER
from storage.errors import MissingError

COUNTED, EXTRAPOLATED = "counted", "extrapolated"


def run(here: Workspace, *, seconds: float, seed: int) -> Outcome:
    """Measure on a sample of this work tree's corpus; nothing is written.

    Raises:
        MissingError: there is no corpus yet, or no teacher where one is needed.
    """
    from stages.plan import run as measure

    started = time.perf_counter()
    Workspace(here.at.root)
    settings_seconds = time.perf_counter() - started
    corpus = here.corpus()
    files, is_here = here.teacher()
    return measure(
        here.params,
        files=files,
        corpus=corpus,
        store=here.store,
        remote=here.remote(),
        load_teacher=(lambda: here.encoder(TEACHER)) if is_here else None,
        starts={
            name: _folder(here, student.start) for name, student in here.params.students.items()
        },
        seconds=seconds,
        seed=seed,
        settings_seconds=settings_seconds,
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
    for name, start in facts["starts_missing"].items():
        yield f"distill {name}", "?", f"run `teachonce start {start}` first"


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
