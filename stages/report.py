"""Metrics of each model -> one file, one table and one sentence.

Models come in three sorts, in this order: the teacher, starts (students before training), students.
One file, since the table and the sentence are two views of the same few numbers.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.outcome import Outcome, write_json
from stages.params import TEACHER
from storage.errors import DamagedError, MissingError

if TYPE_CHECKING:
    from rich.table import Table

VERSION = 1  # raise it when a code change alters the report of the same metrics

Metrics = Mapping[str, str | int | float]
"""One model's metrics: flat keys, as `evaluate` writes them."""

Report = Mapping[str, Mapping[str, Metrics]]
"""{"models": {name: metrics}}"""

Measure = Callable[[Metrics], float | None]
"""One number out of a model's metrics; None if it has none."""

MOST_SETS = 4  # with more, a table shows their average alone
TITLE_WIDTH = 9
GAP = 2  # blanks between two columns
NOTHING = "-"


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
        return re.sub(r"(?<=[-_])\n", "", self.title).replace("\n", " ")


def run(
    models: Sequence[str],
    *,
    students: Collection[str],
    metrics: Callable[[str], Path],
    out: Path,
) -> Outcome:
    """Gather the metrics of `models` in one file.

    Args:
        models: Teacher, starts, students.
        students: Those of `models` that were trained.
        metrics: Model -> the file that `evaluate` left.
        out: The JSON file to write.

    Returns:
        Its facts are the report, models in the order given, as `table` takes it.

    Raises:
        MissingError: a model was not evaluated.
        DamagedError: a file is not what `evaluate` writes.
    """
    found = {name: _load(metrics(name), name) for name in models}
    report = {"models": found}
    write_json(out, report)
    count = f"{len(models)} model{'s' if len(models) != 1 else ''}"
    sentence = verdict(found, students)
    return Outcome("report", out, f"{count}: {sentence}" if sentence else count, report)


def table(report: Report, *, students: Collection[str], width: int = 100) -> Table:
    """The report for a terminal: one row a model, best students bold, `verdict` below.

    Args:
        report: As `run` gives it, or as reports/metrics.json holds it.
        students: Names of the trained models, in the order of their rows. The teacher comes first,
            then the others in the order of the report.
        width: Of the terminal, in characters. Columns that do not fit are left out and named below.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    models = report["models"]
    others = [name for name in models if name not in students]
    names = sorted(others, key=lambda name: name != TEACHER)
    names += [name for name in students if name in models]
    columns = _columns(models, students)
    kept = _fitting(columns, width - max(map(len, ["model", *names])))

    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, GAP - 1))
    drawn.caption = Text("\n".join(["", *_notes(models, students, columns, kept)]))
    drawn.caption_justify, drawn.caption_style = "left", "none"
    drawn.add_column("model", vertical="bottom", no_wrap=True)
    for column in kept:
        drawn.add_column(column.title, justify="right", vertical="bottom", no_wrap=True)
    for name in names:
        cells = [
            Text(column.cells.get(name, NOTHING), "bold" if name in column.bold else "")
            for column in kept
        ]
        drawn.add_row(Text(name), *cells)
    return drawn


def verdict(models: Mapping[str, Metrics], students: Collection[str]) -> str:
    """One sentence: what the best student keeps of the teacher, how much faster and smaller it is.

    The best is the first by STS average, or by nDCG@10 where no STS was asked for, or by likeness to the
    teacher. Empty if there is no teacher, no student, or nothing to compare them by.
    """
    for measure in (_sts, _ndcg, _likeness):
        scores = {
            name: score
            for name in students
            if name in models and (score := measure(models[name])) is not None
        }
        if scores and TEACHER in models:
            best = max(scores, key=lambda name: scores[name])
            title = f"{best}, the best student," if len(scores) > 1 else best
            return f"{title} {_listed(_comparisons(models[best], models[TEACHER]))}."
    return ""


def _comparisons(student: Metrics, teacher: Metrics) -> list[str]:
    """What a student is beside the teacher, each to stand after its name; at least one."""
    kept: list[str] = []
    for kind, measure, title in (("sts.", _sts, "STS average"), ("retrieval.", _ndcg, "nDCG@10")):
        ours, theirs = measure(student), measure(teacher)
        # An average over other sets is another thing.
        alike = _sets(student, kind) == _sets(teacher, kind)
        if alike and ours is not None and theirs:
            whose = "its" if kept else "the teacher's"
            kept.append(f"{100 * ours / theirs:.1f} % of {whose} {title}")
    said = [f"keeps {_listed(kept)}"] if kept else []
    likeness = _likeness(student)
    if not said and likeness is not None:
        said.append(f"orders pairs as the teacher does (Spearman {likeness:.3f})")
    times = _times_as_fast(student, teacher)
    if times is not None:
        said.append(f"is {_short(times)} times as fast")
    ours, theirs = _number(student, "megabytes"), _number(teacher, "megabytes")
    if ours and theirs:
        said.append(f"takes {_short(100 * ours / theirs)} % of its space")
    return said or ["cannot be compared with the teacher"]


def _columns(models: Mapping[str, Metrics], students: Collection[str]) -> list[Column]:
    """Every column that some model has a number for, in the order of the table."""

    def of(key: str) -> Measure:
        return lambda metrics: _number(metrics, key)

    sts, searched = _names(models, "sts.", ""), _names(models, "retrieval.", ".ndcg@10")
    qualities: list[tuple[str, Measure, int, int]] = []
    if len(sts) != 1:
        qualities.append(("STS\naverage", _sts, 2, 9))
    if len(sts) <= MOST_SETS:
        keep = 9 if len(sts) == 1 else 1
        qualities += [(_title(name), of(f"sts.{name}"), 2, keep) for name in sts]
    if len(searched) > MOST_SETS:
        qualities.append(("nDCG@10\naverage", _ndcg, 3, 4))
    else:
        qualities += [
            (f"nDCG@10\n{_title(name)}", of(f"retrieval.{name}.ndcg@10"), 3, 4) for name in searched
        ]
    qualities.append(("fidelity", _likeness, 3, 8))
    qualities.append(("top-10\noverlap", of("fidelity.top10_overlap"), 3, 3))

    columns = [_quality(*quality, models, students) for quality in qualities]
    columns += [
        _amount("texts\nper s", _measured(models, of("sentences_per_second")), 5),
        Column("speed-\nup", _speedups(models), 7),
        _amount("million\nweights", _measured(models, _millions), 2),
        _amount("MB", _measured(models, of("megabytes")), 6),
    ]
    return [column for column in columns if column.cells]


def _quality(
    title: str,
    measure: Measure,
    decimals: int,
    keep: int,
    models: Mapping[str, Metrics],
    students: Collection[str],
) -> Column:
    """A column where more is better."""
    values = _measured(models, measure)
    cells = {name: f"{value:.{decimals}f}" for name, value in values.items()}
    ranked = [values[name] for name in students if name in values]
    # One student alone is no contest; students that read the same share the place.
    bold = (
        {name for name in students if cells.get(name) == f"{max(ranked):.{decimals}f}"}
        if len(ranked) > 1
        else set()
    )
    return Column(title, cells, keep, frozenset(bold))


def _amount(title: str, values: Mapping[str, float], keep: int) -> Column:
    """A column of sizes: as many decimals for all as the smallest needs."""
    decimals = 1 if min(values.values(), default=0) < 100 else 0
    return Column(title, {name: f"{value:,.{decimals}f}" for name, value in values.items()}, keep)


def _speedups(models: Mapping[str, Metrics]) -> dict[str, str]:
    """Model -> times as fast as the teacher; none if there is nothing but the teacher to compare."""
    teacher = models.get(TEACHER, {})
    times = {name: _times_as_fast(metrics, teacher) for name, metrics in models.items()}
    cells = {name: f"{_short(value)}x" for name, value in times.items() if value is not None}
    return cells if len(cells) > 1 else {}


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns that fit into `width` characters, in their order."""
    kept = list(columns)
    while kept and sum(column.width for column in kept) > width:
        # Of columns that matter equally, the last goes first.
        kept.remove(min(reversed(kept), key=lambda column: column.keep))
    return kept


def _notes(
    models: Mapping[str, Metrics],
    students: Collection[str],
    columns: Sequence[Column],
    kept: Sequence[Column],
) -> list[str]:
    """The lines below the table."""
    notes = [verdict(models, students)]
    devices = sorted({str(metrics["device"]) for metrics in models.values() if "device" in metrics})
    if len(devices) == 1:
        notes.append(f"Speeds on {devices[0]}.")
    elif devices:
        notes.append(f"Speeds on {_listed(devices)}; speed-up is within one device only.")
    missing = [column.name for column in columns if column not in kept]
    if missing:
        notes.append(f"No room for: {', '.join(missing)}.")
    return [note for note in notes if note]


def _load(path: Path, name: str) -> Metrics:
    cure = f"run `teachonce evaluate {name}`"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingError(path, "not there", cure) from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, "no JSON", cure) from error
    if not isinstance(found, dict) or not all(
        isinstance(value, str | int | float) for value in found.values()
    ):
        raise DamagedError(path, "not the flat metrics of a model", cure)
    return found


def _names(models: Mapping[str, Metrics], prefix: str, suffix: str) -> list[str]:
    """Names of the evaluation sets of one kind, sorted."""
    keys = {key for metrics in models.values() for key in metrics} - {"sts.average"}
    return sorted(
        key.removeprefix(prefix).removesuffix(suffix)
        for key in keys
        if key.startswith(prefix) and key.endswith(suffix)
    )


def _title(name: str) -> str:
    """The name of a set, broken after - and _ into lines no longer than a number's column should be."""
    lines = [""]
    for part in re.split(r"(?<=[-_])", name):
        if lines[-1] and len(lines[-1] + part) > TITLE_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _measured(models: Mapping[str, Metrics], measure: Measure) -> dict[str, float]:
    """Model -> number, for those that have one."""
    found = {name: measure(metrics) for name, metrics in models.items()}
    return {name: value for name, value in found.items() if value is not None}


def _number(metrics: Metrics, key: str) -> float | None:
    value = metrics.get(key)
    return None if value is None or isinstance(value, str) else float(value)


def _sts(metrics: Metrics) -> float | None:
    return _number(metrics, "sts.average")


def _likeness(metrics: Metrics) -> float | None:
    return _number(metrics, "fidelity.spearman")


def _millions(metrics: Metrics) -> float | None:
    count = _number(metrics, "parameters")
    return None if count is None else count / 1e6


def _ndcg(metrics: Metrics) -> float | None:
    """The mean over all retrieval sets."""
    found = [float(value) for key, value in metrics.items() if key.endswith(".ndcg@10")]
    return statistics.fmean(found) if found else None


def _sets(metrics: Metrics, kind: str) -> set[str]:
    """The keys of one kind of evaluation."""
    return {key for key in metrics if key.startswith(kind)}


def _short(value: float) -> str:
    """Two digits, or all before the point: 0.49, 1.9, 77, 129."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:#.2g}"


def _times_as_fast(metrics: Metrics, teacher: Metrics) -> float | None:
    """Speed as a multiple of the teacher's; None if they ran on different devices."""
    ours, theirs = (_number(model, "sentences_per_second") for model in (metrics, teacher))
    same = metrics.get("device") == teacher.get("device")
    return ours / theirs if ours and theirs and same else None


def _listed(parts: Sequence[str]) -> str:
    """Parts as one phrase: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
