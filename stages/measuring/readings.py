"""How well a model reads held-out texts under another reading, such as their translation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stages.measuring.metrics import Cuts, EvaluatedModel, encoded_in_steps, with_interval
from stages.outcome import Fact, log
from stages.vectors import (
    MOST_ROWS,
    bootstrap_agreement,
    bootstrap_mean,
    evenly,
    nearest,
    rank_agreement,
    row_cosines,
)
from storage.embeddings import Embeddings
from storage.readings import Readings
from storage.split import Split

LEAST_PAIRS = 12
"""Of texts and readings; as many as likeness to the teacher takes."""


def judged_readings(readings: Readings, split: Split) -> NDArray[np.int64]:
    """Returns ids of held-out readings, `MOST_ROWS` at most: one of a text, no two of them the same."""
    ids = readings.heldout(split)
    _, first = np.unique(readings.rows_read()[ids], return_index=True)
    ids_by_reading: dict[str, int] = {}
    for reading, number in zip(readings.take(ids[first]), ids[first].tolist(), strict=True):
        ids_by_reading.setdefault(reading, number)
    ids = np.array(list(ids_by_reading.values()), np.int64)
    return evenly(ids, min(MOST_ROWS, len(ids)))


def measure_readings(
    name: str,
    encoder: EvaluatedModel,
    readings: Readings,
    ids: NDArray[np.int64],
    embeddings: Embeddings,
    cuts: Cuts,
    *,
    in_teachers_space: bool,
) -> dict[str, Fact]:
    """Metrics of some readings and their texts, each pair read by the model in its role.

    `readings.text_to_reading` is the share of texts whose reading has the highest cosine among these
    readings, `readings.reading_to_text` the reverse: the translation matching accuracy of Reimers &
    Gurevych 2020 (arXiv 2004.09813). `readings.spearman` compares the cosines between readings with the
    teacher's between their texts, as fidelity does for texts. `readings.cosine` is the mean cosine of a
    reading's vector with the teacher's of its text, where both are of one space.

    Args:
        name: Name of the model.
        encoder: The model.
        readings: All readings.
        ids: (n,) ids of the readings to read, n >= 3, each of another text.
        embeddings: The teacher's vectors of the corpus.
        cuts: Prefix of metrics' keys -> width to which the model's vectors are cut.
        in_teachers_space: Whether the model's vectors can be compared with the teacher's.
    """
    log.info("evaluate: %s, readings of %s held-out texts", name, f"{len(ids):,}")
    rows = readings.rows_read()[ids]
    texts = _encoded(name, encoder, readings, ids, readings.corpus.take(rows))
    read = _encoded(name, encoder, readings, ids, readings.take(ids))
    teacher = embeddings.rows_of(rows)
    metrics: dict[str, Fact] = {"readings.pairs": len(ids)}
    for prefix, width in cuts.items():
        a, b = texts[:, :width], read[:, :width]
        for key, asked, searched in (("text_to_reading", a, b), ("reading_to_text", b, a)):
            hits = nearest(asked, searched, 1)[:, 0] == np.arange(len(ids))
            key = f"{prefix}readings.{key}"
            metrics |= with_interval(key, float(hits.mean()), bootstrap_mean(hits))
        metrics |= with_interval(
            f"{prefix}readings.spearman",
            rank_agreement(b, teacher),
            bootstrap_agreement(b, teacher),
        )
    if in_teachers_space:
        alike = row_cosines(read, teacher)
        metrics |= with_interval("readings.cosine", float(alike.mean()), bootstrap_mean(alike))
    return metrics


def _encoded(
    name: str,
    encoder: EvaluatedModel,
    readings: Readings,
    ids: NDArray[np.int64],
    texts: Sequence[str],
) -> NDArray[np.float32]:
    """(n, dim) vectors of the texts of some readings, or of what stands for them, each in its role."""
    parts, places = [], []
    for role in readings.roles:
        of_role = np.flatnonzero(np.isin(ids, readings.of_role(ids, role)))
        if len(of_role):
            chosen = [texts[place] for place in of_role.tolist()]
            parts.append(encoded_in_steps(name, encoder, chosen, role)[0])
            places.append(of_role)
    return np.concatenate(parts)[np.argsort(np.concatenate(places))]
