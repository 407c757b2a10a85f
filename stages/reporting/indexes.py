"""What an index of each model's vectors costs and finds, as a table of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.reporting.measures import number
from stages.reporting.results import Metrics

TYPES = ("float32", "int8", "binary")
"""How a vector is kept, as `evaluate` names it."""


@dataclass(frozen=True)
class IndexRow:
    """A model's vectors, whole or cut, in an index of each type."""

    model: str
    width: int | None  # how many first values are kept; None for all
    cells: Sequence[str]  # bytes of a vector and recall@10, type by type


def index_rows(models: Mapping[str, Metrics]) -> list[IndexRow]:
    """A row for each model that was measured, and one below it for each width, the most values first."""
    rows = []
    for name, metrics in models.items():
        widths = {int(part) for key in metrics for part in key.split(".")[1:2] if _is_width(key)}
        for width in (None, *sorted(widths, reverse=True)):
            prefix = "index." if width is None else f"index.{width}."
            cells = [cell for kind in TYPES for cell in _cells(metrics, f"{prefix}{kind}")]
            if any(cells):
                rows.append(IndexRow(name, width, cells))
    return rows


def among(models: Mapping[str, Metrics]) -> str:
    """What was searched; empty if the models were asked for different things."""
    searched = {str(of_one["index.among"]) for of_one in models.values() if "index.among" in of_one}
    return searched.pop() if len(searched) == 1 else ""


def _is_width(key: str) -> bool:
    return key.startswith("index.") and key.split(".")[1].isdecimal()


def _cells(metrics: Metrics, prefix: str) -> tuple[str, str]:
    size, recall = number(metrics, f"{prefix}.bytes"), number(metrics, f"{prefix}.recall@10")
    return ("" if size is None else f"{size:,.0f}", "" if recall is None else f"{recall:.2f}")
