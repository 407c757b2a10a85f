"""The outcome of a stage, and its progress in the log."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage import durable
from storage.store import canonical_json

log = logging.getLogger("teachonce")

Fact = str | int | float | bool | None
Facts = Mapping[str, Any]
"""Facts by name; a value may be a mapping of facts itself."""


@dataclass(frozen=True)
class Outcome:
    """The result of a stage."""

    stage: str  # name of the stage
    made: Path | str  # the file or folder it left, or the URL it was sent to
    summary: str  # one sentence for a person: what was done, in numbers
    facts: Facts = field(default_factory=dict)  # the same and more for a program (`--json`)


NOTICEABLE_SHARE = 0.01
A_HANDFUL = 5


def is_noticeable(count: int, of: int) -> bool:
    """Whether a loss deserves a warning: more than a handful, and more than 1 %."""
    return count > A_HANDFUL and count > NOTICEABLE_SHARE * of


def write_json(path: Path, value: object) -> None:
    """Write a small result file in one step, in the one form that equal values share."""
    durable.replace(path, canonical_json(value))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys, one or more, as a table with a header line; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    durable.replace(path, text.getvalue().encode())


def seconds_of(call: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Progress:
    """Logs progress now and then: units done, rate, and time left.

    A line every five seconds at first, then less often, so that a night's log stays short.

    Args:
        stage: Printed first on each line.
        total: Units of work in all.
        unit: Name of the units, such as "texts".
        done: Units done before this run; they count as progress, but not for the rate.
    """

    def __init__(self, stage: str, *, total: int, unit: str, done: int = 0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done, self.before = done, done
        self.started = self.last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self.started, 1e-9)

    @property
    def rate(self) -> float:
        """Units per second of this run."""
        return (self.done - self.before) / self.seconds

    def skip(self, units: int) -> None:
        """Count `units` as done, but not by this run."""
        self.done += units
        self.before += units

    def advance(self, units: int, note: str = "") -> None:
        """Count `units` as done; `note` is added to the line, if one is due."""
        self.done += units
        now = time.monotonic()
        if now - self.last < min(max(5.0, 0.1 * self.seconds), 60.0):
            return
        self.last = now
        eta = (self.total - self.done) / self.rate if self.rate else float("inf")
        log.info(
            "%s: %s of %s %s (%.0f %%), %s %s/s%s, %s left",
            self.stage,
            f"{self.done:,}",
            f"{self.total:,}",
            self.unit,
            100 * self.done / max(self.total, 1),
            f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2f}",
            self.unit,
            f", {note}" if note else "",
            clock(eta),
        )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    if seconds == float("inf"):
        return "?"
    rounded = round(seconds)
    hours, minutes = divmod(rounded // 60, 60)
    return f"{hours}:{minutes:02}:{rounded % 60:02}" if hours else f"{minutes}:{rounded % 60:02}"
