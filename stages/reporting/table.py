"""Metrics of each model -> one table: its columns, and how it stands in a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.params import TEACHER
from stages.reporting.measures import (
    SPEED,
    Measure,
    at_widths,
    decimals_of,
    devices,
    ends,
    likeness,
    listed,
    measured,
    millions,
    ndcg,
    of,
    short,
    sts,
    tied,
    times_as_fast,
    verdict,
    with_interval,
    yardstick,
)
from stages.reporting.results import Metrics
from storage.errors import harmless

if TYPE_CHECKING:
    from rich.table import Table

Report = Mapping[str, Mapping[str, Metrics]]
"""{"models": {name: metrics}}"""

MOST_SETS = 4  # with more, a terminal's table shows their average alone
TITLE_WIDTH = 9
GAP = 2  # blanks between two columns
NOTHING = "-"


@dataclass(frozen=True)
class Quality:
    """A measure of which more is better.

    Args:
        title: Lines of it.
        measure: The number.
        decimals: How many are shown.
        keep: In a table that is too wide, columns with the lowest number go first.
    """

    title: str
    measure: Measure
    decimals: int
    keep: int

    @property
    def name(self) -> str:
        """The title on one line."""
        return _one_line(self.title)


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        title: Lines of it.
        cells: What stands there, by model; not every model need have one.
        keep: In a table that is too wide, columns with the lowest number go first.
        bold: Models whose cell is the best among students.
    """

    title: str
    cells: Mapping[str, str]
    keep: int
    bold: frozenset[str] = frozenset()

    @property
    def width(self) -> int:
        """In characters, with the gap before it."""
        return GAP + max(map(len, [*self.title.split("\n"), *self.cells.values()]))

    @property
    def name(self) -> str:
        """The title on one line."""
        return _one_line(self.title)


def table(
    report: Report, *, students: Collection[str], width: int = 100, rank_by: str | None = None
) -> Table:
    """The report for a terminal: its `rows`, best students bold, `verdict` below.

    Args:
        report: As the stage gives it, or as reports/metrics.json holds it.
        students: Names of the trained models, in the order of their rows. The teacher comes first,
            then the others in the order of the report.
        width: The terminal's, in characters. Columns that do not fit are left out and named below.
        rank_by: The metric that ranks students; None for the first that was measured.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    models = report["models"]
    others = [name for name in models if name not in students]
    names = sorted(others, key=lambda name: name != TEACHER)
    names += [name for name in students if name in models]
    shown = rows({name: models[name] for name in names})
    labels = {row: row if row in models else f"  {part_of(row)}" for row in shown}
    every_column = columns(shown, students, most_sets=MOST_SETS)
    fitting = _fitting(every_column, width - max(map(len, ["model", *labels.values()])))

    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, GAP - 1))
    said = [verdict(models, students, rank_by), *notes(models, students, rank_by)]
    if missing := [column.name for column in every_column if column not in fitting]:
        said.append(f"No room for: {', '.join(missing)}.")
    drawn.caption = Text(harmless("\n".join(["", *filter(None, said)])))
    drawn.caption_justify, drawn.caption_style = "left", "none"
    drawn.add_column("model", vertical="bottom", no_wrap=True)
    for column in fitting:
        drawn.add_column(
            Text(harmless(column.title)), justify="right", vertical="bottom", no_wrap=True
        )
    for row, label in labels.items():
        cells = [
            Text(harmless(column.cells.get(row, NOTHING)), "bold" if row in column.bold else "")
            for column in fitting
        ]
        drawn.add_row(Text(harmless(label)), *cells)
    return drawn


def rows(models: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """A row for each model, and one below it for each width at which it was measured.

    Returns:
        `kd`, `kd · first 128` -> metrics under the keys of whole vectors, in the order of `models`.
    """
    by_row = {}
    for name, metrics in models.items():
        by_row[name] = metrics
        by_row |= {f"{name} · first {w}": cut for w, cut in at_widths(metrics).items()}
    return by_row


def part_of(row: str) -> str:
    """`kd · first 128` -> `first 128`, where the model's own row stands above."""
    return row.rpartition(" · ")[2]


def columns(
    models: Mapping[str, Metrics], students: Collection[str], *, most_sets: float = math.inf
) -> list[Column]:
    """Every column that some model has a number for, in the order of the table.

    Args:
        models: Name -> metrics; or `rows` of models.
        students: The names among which the best is bold.
        most_sets: With more evaluation sets of one kind than this, their average stands for them.
    """
    drawn = [_quality(quality, models, students) for quality in qualities(models, most_sets)]
    drawn += [
        _amount("texts\nper s", measured(models, of("sentences_per_second")), 5),
        Column("speed-\nup", _speedups(models), 7),
        _amount("million\nweights", measured(models, millions), 2),
        _amount("MB", measured(models, of("megabytes")), 6),
    ]
    return [column for column in drawn if column.cells]


CUT = ".truncated"
"""Suffix of the keys that say which share of the texts of a set was truncated."""

INDEX = "teacher_index."
"""Prefix of the keys about the student's queries among the teacher's vectors of the documents."""


def qualities(models: Mapping[str, Metrics], most_sets: float = math.inf) -> list[Quality]:
    """Every measure of which more is better, as far as `models` name its sets, in the table's order."""
    named, searched = _names(models, "sts.", ""), _names(models, "retrieval.", ".ndcg@10")
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
            for name in _names(models, INDEX, ".ndcg@10")
        ]
    every_quality.append(Quality("fidelity", likeness, 3, 8))
    every_quality.append(Quality("top-10\noverlap", of("fidelity.top10_overlap"), 3, 3))
    return every_quality


GLOSSARY = {
    "STS": "rank correlation of the model's cosines with people's scores of sentence pairs, times 100",
    "nDCG@10": "how well the first ten results of a search are ranked, from 0 to 1",
    "teacher's index": "the student embeds the queries, the teacher has embedded the documents",
    "fidelity": "rank correlation of the model's cosines with the teacher's, over all pairs of texts",
    "top-10 overlap": "share of a text's ten nearest neighbours that the teacher finds as well",
}


def glossary(titled: Sequence[Column], shown: Collection[str]) -> dict[str, str]:
    """Term -> meaning, of the terms in the titles of the columns and in the names of the rows."""
    titles = " ".join(column.name for column in titled).lower()
    terms = {term: meaning for term, meaning in GLOSSARY.items() if term.lower() in titles}
    if any(" · first " in row for row in shown):
        terms["first N"] = "the model with nothing but the first N values of its vectors"
    return terms


def notes(
    models: Mapping[str, Metrics], students: Collection[str], rank_by: str | None = None
) -> list[str]:
    """Sentences without which the table cannot be read: which student is best, how things were measured."""
    said = [_rule(models, students, rank_by), _cut(models), _ignored(models), _speed(models)]
    return [note for note in said if note]


def _rule(models: Mapping[str, Metrics], students: Collection[str], rank_by: str | None) -> str:
    ranking = yardstick(models, students, rank_by)
    ranked = [name for name in students if ranking and name in models]
    said = f"Best: highest {ranking[0]}. " if ranking and len(ranked) > 1 else ""
    if any(key.endswith(".low") for metrics in models.values() for key in metrics):
        said += (
            "±: half of a 95 % confidence interval, by bootstrap over queries, pairs or texts. Models are "
            "tied if the number of one lies in the interval of the other."
        )
    return said.strip()


def _cut(models: Mapping[str, Metrics]) -> str:
    """Of which sets texts were longer than models read."""
    said = []
    for kind in ("sts.", "retrieval."):
        for name in _names(models, kind, CUT):
            shares = measured(models, of(f"{kind}{name}{CUT}")).values()
            lowest, highest = (f"{100 * share:.2g}" for share in (min(shares), max(shares)))
            if max(shares) > 0:
                share = highest if lowest == highest else f"{lowest} to {highest}"
                said.append(f"{share} % of {name}")
    return f"Texts longer than a model reads were truncated: {listed(said)}." if said else ""


def _ignored(models: Mapping[str, Metrics]) -> str:
    """In which searches a document with the query's own id was no result."""
    names = _names(models, "retrieval.", ".identical_ids_ignored")
    return f"A document with the query's own id is no result in {listed(names)}." if names else ""


def _speed(models: Mapping[str, Metrics]) -> str:
    places = devices(models)
    if not places:
        return ""
    within = " Models on different devices are not compared." if len(places) > 1 else ""
    compared = (
        " Speed-up: each model was timed in turns with a fixed workload."
        if measured(models, of(SPEED))
        else ""
    )
    return f"Speeds were measured on {listed(places)}.{compared}{within}"


def _quality(quality: Quality, models: Mapping[str, Metrics], students: Collection[str]) -> Column:
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
    return Column(quality.title, cells, quality.keep, frozenset(bold))


def _amount(title: str, values: Mapping[str, float], keep: int) -> Column:
    """A column of sizes: as many decimals for all as the smallest needs."""
    decimals = 1 if min(values.values(), default=0) < 100 else 0
    return Column(title, {name: f"{value:,.{decimals}f}" for name, value in values.items()}, keep)


def _speedups(models: Mapping[str, Metrics]) -> dict[str, str]:
    """Model -> times as fast as the teacher; none if there is nothing but the teacher to compare."""
    teacher = models.get(TEACHER, {})
    times = {name: times_as_fast(metrics, teacher) for name, metrics in models.items()}
    cells = {name: f"{short(value)}x" for name, value in times.items() if value is not None}
    return cells if len(cells) > 1 else {}


def _fitting(every_column: Sequence[Column], width: int) -> list[Column]:
    """The columns that fit into `width` characters, in their order."""
    kept = list(every_column)
    while kept and sum(column.width for column in kept) > width:
        # Of columns that matter equally, the last goes first.
        kept.remove(min(reversed(kept), key=lambda column: column.keep))
    return kept


def _names(models: Mapping[str, Metrics], prefix: str, suffix: str) -> list[str]:
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
