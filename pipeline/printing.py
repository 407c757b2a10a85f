"""What commands print and log: results for a person or as JSON, and the one door to the terminal.

What is printed goes through `say`, what is logged through `LogLine`: neither lets a control character
of a name or a text reach the terminal.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from storage import durable
from storage.errors import TeachonceError, harmless

if TYPE_CHECKING:
    from stages.outcome import Outcome

NEXT = {
    "check": "`dvc repro` for everything, or `teachonce shard`",
    "docs": "`teachonce shard`",
    "shard": "`teachonce split`",
    "split": "`teachonce embed`, where the teacher is",
    "embed": "`teachonce mine`; `teachonce start NAME`",
    "start": "`teachonce distill NAME`",
    "mine": "`teachonce distill NAME`",
    "distill": "`teachonce evaluate NAME`; `teachonce finetune NAME`",
    "finetune": "`teachonce evaluate NAME-finetuned`",
    "evaluate": "`teachonce report` when all models are measured",
    "export": '`teachonce search "what you look for"`',
    "push": "`git add -A && git commit && git push`: bytes before names",
    "pull": "`dvc repro --pull --allow-missing`",
    "import": "`git add data && git commit`; `dvc repro`, or `teachonce split` and `teachonce mine`",
    "join": "`git add data && git commit`; `dvc repro`, or `teachonce split` and `teachonce mine`",
    "init": "go there, `git init && dvc init`, edit params.yaml, `teachonce check`, `dvc repro`",
}
"""What a person who runs the stages by hand types after each."""


def show(outcome: Outcome, as_json: bool, failure: TeachonceError | None = None) -> None:
    """Print what a stage did, where it is and what comes next, or all of it as JSON for a program.

    Raises:
        TeachonceError: `failure`, which ended it after it had done that.
    """
    place = place_of(outcome.made)
    if as_json:
        printed = {
            **asdict(outcome),
            "made": str(place),
            **(as_json_object(failure) if failure else {}),
        }
        say(json.dumps(printed, default=str))
    else:
        say(f"{outcome.stage}: {_one_line(outcome.summary)}\n  -> {_one_line(place)}")
        # Under DVC it is DVC who knows what comes next.
        if outcome.stage in NEXT and "DVC_STAGE" not in os.environ:
            say(f"  next: {NEXT[outcome.stage]}")
    _end_if(failure, as_json)


def show_lines(
    outcome: Outcome, lines: Iterable[str], as_json: bool, failure: TeachonceError | None = None
) -> None:
    """Print a listing and the sentence that sums it up, or all of it as JSON for a program.

    Raises:
        TeachonceError: `failure`, which it has found.
    """
    if as_json:
        show(outcome, as_json, failure)
        return
    for line in lines:
        say(_one_line(line))
    say(f"{outcome.stage}: {_one_line(outcome.summary)}")
    _end_if(failure, as_json)


def _end_if(failure: TeachonceError | None, as_json: bool) -> None:
    if failure is None:
        return
    if as_json:  # what went wrong is in the one object that is printed
        say(f"error: {failure}", err=True)
        raise typer.Exit(failure.exit_code)
    raise failure


def say(text: str, *, err: bool = False) -> None:
    """Print text on stdout or stderr: the one door, through which no control character gets."""
    try:
        typer.echo(harmless(text), err=err)
    except OSError as error:
        if error.errno not in durable.CURES:
            raise  # a pipe that nobody reads any more ends the command quietly
        # What is left in the buffer would fail once more, with a traceback, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())
        with durable.named(Path("stderr" if err else "stdout"), "writing"):
            raise


class LogLine(logging.Formatter):
    """A line of the log, through the same door."""

    def format(self, record: logging.LogRecord) -> str:
        """The line without control characters."""
        return harmless(super().format(record))


def _one_line(text: object) -> str:
    return str(text).replace("\n", "\\n")


def as_json_object(error: TeachonceError) -> dict[str, str]:
    """An error for a program."""
    return {"error": error.problem, "place": error.where, "cure": error.cure}


def place_of(made: Path | str) -> Path | str:
    """A path, relative to the current folder if it is below it; a URL unchanged."""
    if isinstance(made, str):
        return made
    return made.relative_to(Path.cwd()) if made.is_relative_to(Path.cwd()) else made
