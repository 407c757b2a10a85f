"""The model card of an export: a function of what is known about it; no date, no host, no path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.models.lineage import left_the_teacher
from stages.params import TEACHER
from stages.reporting import measures, templating

Metrics = Mapping[str, Any]
"""One model's metrics: flat keys, as `evaluate` writes them."""

MEASURES: tuple[tuple[str, str, str, str], ...] = (
    (r"sts\.average", "STS, average", "Spearman x 100", ".2f"),
    (r"sts\.(?!average$)([^.]+)", "STS", "Spearman x 100", ".2f"),
    (r"retrieval\.(.+)\.ndcg@10", "Retrieval", "nDCG@10", ".3f"),
    (r"retrieval\.(.+)\.mrr@10", "Retrieval", "MRR@10", ".3f"),
    (r"retrieval\.(.+)\.recall@100", "Retrieval", "recall@100", ".3f"),
    (r"sts\.([^.]+)\.truncated", "STS", "share of texts truncated", ".3f"),
    (r"retrieval\.([^.]+)\.truncated", "Retrieval", "share of texts truncated", ".3f"),
    (r"fidelity\.spearman", "Fidelity to the teacher's order of pairs", "Spearman", ".3f"),
    (r"fidelity\.top10_overlap", "Ten nearest neighbours shared with the teacher", "", ".3f"),
    (r"sentences_per_second", "Texts per second", "", ",.0f"),
    (r"parameters", "Parameters", "", ",.0f"),
    (r"megabytes", "Megabytes of weights", "", ",.1f"),
)
"""Key of a metric (its group is an evaluation set) -> kind, unit and form, in the order of the table."""


@dataclass(frozen=True)
class Card:
    """What a card says of the model itself.

    Args:
        name: The model's name.
        dim: Width of its vectors.
        unit_length: Whether they have length 1.
        max_tokens: It reads no more of a text; None: no limit.
        dropped: Whether the projection was left out.
        old_ones_read: Whether sentence-transformers 3.4 with transformers 4 gives the same vectors.
        onnx: Whether there is an ONNX file.
        has_code: Whether it needs the code that lies in its folder.
    """

    name: str
    dim: int
    unit_length: bool
    max_tokens: int | None
    dropped: bool
    old_ones_read: bool
    onnx: bool
    has_code: bool = False


def model_card(
    card: Card,
    *,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Metrics],
    facts: Mapping[str, str],
) -> str:
    """The README.md of an export.

    Args:
        card: The model.
        lineage: What distill and finetune left in the model's folder.
        metrics: By model; the teacher's and this one's are shown.
        facts: Label -> text, shown in this order.
    """
    models = {name: metrics[name] for name in (TEACHER, card.name) if metrics.get(name)}
    own, teacher = models.get(card.name, {}), models.get(TEACHER, {})
    times = measures.times_as_fast(own, teacher)
    blocks = {
        "Recipe": lineage.get("recipe"),
        "Then finetuned on labelled pairs or triplets": lineage.get("finetuned"),
    }
    return templating.markdown(
        "card.md",
        card=card,
        left_the_teacher=left_the_teacher(lineage),
        models=list(models),
        rows=_rows(models),
        intervals=any(key.endswith(".low") for found in models.values() for key in found),
        devices={name: found["device"] for name, found in models.items() if "device" in found},
        times=None if times is None else measures.short(times),
        origin=_origin(lineage, facts),
        blocks={title: block for title, block in blocks.items() if block},
        trained_on=lineage.get("recipe", {}).get("max_tokens"),
        # A folder without its projection has another scale, which nobody measured.
        shift=None if card.dropped else measures.shift_of_cosines(own),
    )


def _rows(models: Mapping[str, Metrics]) -> list[dict[str, Any]]:
    """Kind, set, unit and cells of each metric that a card knows, in the order of `MEASURES`."""
    keys = sorted({key for metrics in models.values() for key in metrics})
    return [
        {
            "kind": kind,
            "set": next(iter(match.groups()), ""),
            "unit": unit,
            "cells": [_cell(metrics, key, form) for metrics in models.values()],
        }
        for pattern, kind, unit, form in MEASURES
        for key in keys
        if (match := re.fullmatch(pattern, key))
    ]


def _cell(metrics: Metrics, key: str, form: str) -> str:
    value, ends = metrics.get(key), measures.ends(metrics, measures.of(key))
    if not isinstance(value, int | float):
        return "-"
    return format(value, form) if ends is None else measures.told(value, ends, int(form[1]))


def _origin(lineage: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, object]:
    """Label -> what is known of it."""
    teacher, agreement = lineage.get("teacher", {}), lineage.get("agreement")
    known = {
        **facts,
        "Teacher's fingerprint": teacher.get("fingerprint"),
        "Width of the teacher's vectors": teacher.get("dim"),
        "Student": lineage.get("student"),
        "Start": lineage.get("start"),
        "Texts trained on": lineage.get("rows"),
        "Steps": lineage.get("steps"),
        "Agreement with the teacher on held-out texts": (
            None if agreement is None else f"{agreement:.3f}"
        ),
    }
    return {label: value for label, value in known.items() if value is not None}
