"""Split the corpus: rows held out, rows found in an evaluation set, and the rest, which trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.outcome import Outcome, write_json
from stages.params import SplitParams
from stages.reading.evaluation_sets import evaluation_keys
from storage.corpus import Corpus, text_key
from storage.errors import TeachonceError
from storage.readings import Readings
from storage.split import Split

VERSION = 1


def recipe(params: SplitParams) -> dict[str, Any]:
    """Settings that change which rows are for what."""
    return {"version": VERSION, "heldout": params.heldout}


def run(
    params: SplitParams,
    *,
    corpus: Corpus,
    evaluation: Iterable[str],
    out: Path,
    facts: Path,
    readings: Readings | None = None,
) -> Outcome:
    """Find the rows that stand in evaluation sets and write the split.

    Args:
        params: Settings.
        corpus: The texts.
        evaluation: Every text that a model will be judged on: STS sentences, queries.
        out: The split.
        facts: Counts for `dvc metrics`.
        readings: Readings of the texts; a text with one of them in an evaluation set is found there.

    Raises:
        TeachonceError: nothing is left to train on.
    """
    keys = {
        key for text in evaluation for role in corpus.roles for key in evaluation_keys(text, role)
    }
    evaluation_rows = rows_with_keys(corpus.text_keys, keys)
    if readings is not None:
        rows_of_readings = readings.rows_read()[list(_readings_with_keys(readings, keys))]
        evaluation_rows = np.union1d(evaluation_rows, rows_of_readings)
    split = Split(
        corpus=corpus.manifest.content,
        heldout=params.heldout,
        evaluation=tuple(int(row) for row in evaluation_rows),
    )
    train, heldout = len(split.train_rows(corpus)), len(split.heldout_rows(corpus))
    if not train:
        raise TeachonceError(
            "split.heldout",
            f"of {corpus.rows} texts {heldout} are held out, {len(evaluation_rows)} are found in "
            "evaluation sets "
            "and none is left for training",
            "give shard.sources more texts, or lower split.heldout",
        )
    counts = {"train": train, "heldout": heldout, "evaluation": len(evaluation_rows)}
    split.save(out)
    write_json(facts, counts)
    return Outcome(
        stage="split",
        made=out,
        summary=(
            f"{train:,} texts to train on, {heldout:,} held out, {len(evaluation_rows):,} found in "
            "evaluation sets"
        ),
        facts=counts,
    )


def _readings_with_keys(readings: Readings, wanted: set[bytes]) -> Iterator[int]:
    """Yield the ids of the readings that, as texts, have one of these keys."""
    for shard in range(len(readings.objects)):
        role, start = readings.role_of(shard), int(readings.starts[shard])
        for row, reading in enumerate(readings.texts(shard), start):
            if text_key(reading, role) in wanted:
                yield row


def rows_with_keys(text_keys: NDArray[np.bytes_], wanted: set[bytes]) -> NDArray[np.int64]:
    """Ids, ascending, of the rows whose 16-byte key is in `wanted`; (rows,) V16 keys in."""
    if not wanted or not len(text_keys):
        return np.empty(0, np.int64)
    # Compare half a key in numpy, then the few that agree as a whole.
    halves = np.ascontiguousarray(text_keys).view("<u8").reshape(-1, 2)[:, 0]
    wanted_halves = np.array([int.from_bytes(key[:8], "little") for key in wanted], np.uint64)
    likely = np.flatnonzero(np.isin(halves, wanted_halves))
    return np.array([row for row in likely if text_keys[row].tobytes() in wanted], np.int64)
