"""Metrics of each model -> rows and columns: the one table of the terminal, the page and the card."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from stages.params import BASE_FORMATS, TEACHER
from stages.reporting.forms import NO_FORMATS, published
from stages.reporting.measures import (
    Measure,
    at_widths,
    decimals_of,
    ends,
    likeness,
    measured,
    millions,
    ndcg,
    number,
    of,
    short,
    sts,
    tied,
    times_as_fast,
    with_interval,
)
from stages.reporting.results import Formats, Metrics

MOST_SETS = 4  # with more, the average alone stands where there is little room
TITLE_WIDTH = 9
GAP = 2  # blanks between two columns


@dataclass(frozen=True)
class Quality:
    """A measure of which more is better."""

    title: str  # lines of it
    measure: Measure  # the number
    decimals: int  # how many are shown
    keep: int  # in a table that is too wide, columns with the lowest number go first

    @property
    def name(self) -> str:
        """The title on one line."""
        return _one_line(self.title)


@dataclass(frozen=True)
class TableColumn:
    """A column of the table."""

    title: str  # lines of it
    cells: Mapping[str, str]  # what stands there, by model; not every model need have one
    keep: int  # in a table that is too wide, columns with the lowest number go first
    bold: frozenset[str] = frozenset()  # models whose cell is the best among students

    @property
    def width(self) -> int:
        """In characters, with the gap before it."""
        return GAP + max(map(len, [*self.title.split("\n"), *self.cells.values()]))

    @property
    def name(self) -> str:
        """The title on one line."""
        return _one_line(self.title)


def rows(
    models: Mapping[str, Metrics], formats: Mapping[str, Formats] = NO_FORMATS
) -> dict[str, Metrics]:
    """A row for each model, and one below it for each width and each published format of it.

    The format of the model itself has one only where the model became another by it.

    Returns:
        `kd`, `kd · first 128`, `kd · onnx-int8` -> metrics under the keys of whole vectors, in the order
        of `models`.
    """
    by_row = {}
    for name, metrics in models.items():
        by_row[name] = metrics
        by_row |= {f"{name} · first {w}": cut for w, cut in at_widths(metrics).items()}
        by_row |= {
            f"{name} · {key}": exported
            for key, exported in published(formats.get(name, {})).items()
            if key not in BASE_FORMATS or _differs(exported, metrics)
        }
    return by_row


def _differs(exported: Metrics, metrics: Metrics) -> bool:
    """Whether an export of the model itself has other metrics, or is smaller by more than a header."""
    exported_size, own_size = (number(side, "megabytes") or 0 for side in (exported, metrics))
    others = {key: value for key, value in metrics.items() if key != "megabytes"}
    return exported_size < 0.95 * own_size or not others.items() <= exported.items()


def part_of(row: str) -> str:
    """`kd · first 128` -> `first 128`, where the model's own row stands above."""
    return row.rpartition(" · ")[2]


def columns(
    models: Mapping[str, Metrics], students: Collection[str], *, most_sets: float = math.inf
) -> list[TableColumn]:
    """Every column that some model has a number for, in the order of the table.

    Args:
        models: Name -> metrics; or `rows` of models.
        students: The names among which the best is bold.
        most_sets: With more evaluation sets of one kind than this, their average stands for them.
    """
    drawn = [_quality(quality, models, students) for quality in qualities(models, most_sets)]
    drawn += [
        _amount("texts\nper s", measured(models, of("sentences_per_second")), 5),
        TableColumn("speed-\nup", _speedups(models), 7),
        _amount("million\nweights", measured(models, millions), 2),
        _amount("MB", measured(models, of("megabytes")), 6),
    ]
    return [column for column in drawn if column.cells]


INDEX = "teacher_index."
"""Prefix of the keys about the student's queries among the teacher's vectors of the documents."""


def qualities(models: Mapping[str, Metrics], most_sets: float = math.inf) -> list[Quality]:
    """Every measure of which more is better, as far as `models` name its sets, in the table's order."""
    named, searched = (
        names_of_sets(models, "sts.", ""),
        names_of_sets(models, "retrieval.", ".ndcg@10"),
    )
    every_quality = []
    if len(named) != 1:
        every_quality.append(Quality("STS\naverage", sts, 2, 9))
    if len(named) <= most_sets:
        keep = 9 if len(named) == 1 else 1
        titles = {name: name if "sts" in name.lower() else f"STS {name}" for name in named}
        every_quality += [Quality(_title(titles[n]), of(f"sts.{n}"), 2, keep) for n in named]
    if len(searched) > most_sets:
        every_quality.append(Quality("nDCG@10\naverage", ndcg, 3, 4))
    else:
        every_quality += [
            Quality(f"nDCG@10\n{_title(name)}", of(f"retrieval.{name}.ndcg@10"), 3, 4)
            for name in searched
        ]
        every_quality += [
            Quality(
                f"nDCG@10\n{_title(name)},\nteacher's\nindex", of(f"{INDEX}{name}.ndcg@10"), 3, 2
            )
            for name in names_of_sets(models, INDEX, ".ndcg@10")
        ]
    every_quality.append(Quality("fidelity", likeness, 3, 8))
    every_quality.append(Quality("top-10\noverlap", of("fidelity.top10_overlap"), 3, 3))
    every_quality += [
        Quality("text to\nreading", of("readings.text_to_reading"), 3, 5),
        Quality("reading\nto text", of("readings.reading_to_text"), 3, 5),
        Quality("reading\nfidelity", of("readings.spearman"), 3, 4),
    ]
    return every_quality


def _quality(
    quality: Quality, models: Mapping[str, Metrics], students: Collection[str]
) -> TableColumn:
    values = measured(models, quality.measure)
    intervals = {name: ends(models[name], quality.measure) for name in values}
    # One column has one number of decimals: that of its narrowest interval.
    decimals = max(
        (decimals_of(interval, quality.decimals) for interval in intervals.values()), default=0
    )
    cells = {
        name: with_interval(value, intervals[name], decimals, joint="±")
        for name, value in values.items()
    }
    ranked = [name for name in students if name in values]
    # One student alone is no contest; students that read the same, or are tied, share the place.
    best = max(ranked, key=lambda name: values[name], default="")
    bold = {
        name
        for name in ranked
        if len(ranked) > 1
        and (
            f"{values[name]:.{decimals}f}" == f"{values[best]:.{decimals}f}"
            or tied(models[name], models[best], quality.measure)
        )
    }
    return TableColumn(quality.title, cells, quality.keep, frozenset(bold))


def _amount(title: str, values: Mapping[str, float], keep: int) -> TableColumn:
    """A column of sizes: as many decimals for all as the smallest needs."""
    decimals = 1 if min(values.values(), default=0) < 100 else 0
    return TableColumn(
        title, {name: f"{value:,.{decimals}f}" for name, value in values.items()}, keep
    )


def _speedups(models: Mapping[str, Metrics]) -> dict[str, str]:
    """Model -> times as fast as the teacher; empty if only the teacher was timed."""
    teacher = models.get(TEACHER, {})
    times = {name: times_as_fast(metrics, teacher) for name, metrics in models.items()}
    cells = {name: f"{short(value)}x" for name, value in times.items() if value is not None}
    return cells if len(cells) > 1 else {}


def names_of_sets(models: Mapping[str, Metrics], prefix: str, suffix: str) -> list[str]:
    """Names of the evaluation sets of one kind, sorted."""
    keys = {key for metrics in models.values() for key in metrics} - {"sts.average"}
    names = (
        key.removeprefix(prefix).removesuffix(suffix)
        for key in keys
        if key.startswith(prefix) and key.endswith(suffix)
    )
    # The name of a set has no dot: `sts.A.truncated` is about the set A.
    return sorted(name for name in names if "." not in name)


def _title(name: str) -> str:
    """The name of a set, broken after - and _ into lines no longer than a number's column should be."""
    lines = [""]
    for part in re.split(r"(?<=[-_])", name):
        if lines[-1] and len(lines[-1] + part) > TITLE_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _one_line(title: str) -> str:
    return re.sub(r"(?<=[-_])\n", "", title).replace("\n", " ")
