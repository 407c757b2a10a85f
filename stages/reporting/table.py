"""The report as a table in a terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.params import TEACHER, ChooseParams
from stages.reporting.choice import choice
from stages.reporting.columns import GAP, MOST_SETS, TableColumn, columns, part_of, rows
from stages.reporting.legend import notes
from storage.errors import harmless

if TYPE_CHECKING:
    from rich.table import Table

Report = Mapping[str, Mapping[str, Any]]
"""{"models": {name: metrics}, "formats": {name: {format: metrics}}}; the second may be left out."""

NOTHING = "-"


def table(
    report: Report,
    *,
    students: Collection[str],
    width: int = 100,
    rank_by: str | None = None,
    choose: ChooseParams | None = None,
) -> Table:
    """The report for a terminal: its `rows`, best students bold, the sentence of the `choice` below.

    Args:
        report: As the stage gives it, or as reports/metrics.json holds it.
        students: Names of the trained models, in the order of their rows. The teacher comes first,
            then the others in the order of the report.
        width: The terminal's, in characters. Columns that do not fit are left out and named below.
        rank_by: The metric that ranks students; None for the first that was measured.
        choose: The bound within which a student is named; None: the best one is.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    models, formats = report["models"], report.get("formats", {})
    others = [name for name in models if name not in students]
    names = sorted(others, key=lambda name: name != TEACHER)
    names += [name for name in students if name in models]
    shown = rows({name: models[name] for name in names}, formats)
    labels = {row: row if row in models else f"  {part_of(row)}" for row in shown}
    every_column = columns(shown, students, most_sets=MOST_SETS)
    fitting = _fitting(every_column, width - max(map(len, ["model", *labels.values()])))

    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, GAP - 1))
    chosen = choice(models, students, rank_by=rank_by, choose=choose, formats=formats)
    sentences = [chosen.sentence, *notes(models, students, rank_by, formats)]
    if missing := [column.name for column in every_column if column not in fitting]:
        sentences.append(f"No room for: {', '.join(missing)}.")
    drawn.caption = Text(harmless("\n".join(["", *filter(None, sentences)])))
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


def _fitting(every_column: Sequence[TableColumn], width: int) -> list[TableColumn]:
    """The columns that fit into `width` characters, in their order."""
    kept = list(every_column)
    while kept and sum(column.width for column in kept) > width:
        # Of columns that matter equally, the last goes first.
        kept.remove(min(reversed(kept), key=lambda column: column.keep))
    return kept
