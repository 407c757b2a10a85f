"""Labelled rows of a finetuning: those to learn from, and judges that compute the dev score."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.outcome import log
from stages.params import FinetuneParams
from stages.reading.evaluation_sets import StsSet, read_sts, sts_files
from stages.reading.triplets import Triplet, read_triplets, triplet_files
from stages.vectors import sts_correlation
from storage.corpus import text_key
from storage.errors import TeachonceError
from storage.roles import Role
from storage.store import digest

LEAST_ROWS = 2
ROWS_AT_ONCE = 256

MOST_TEXTS = 16_384
"""Largest number of distinct texts of a triplet judge. At every evaluation each is encoded and compared
with every judged row's anchor, so twice as many take up to four times as long."""


@dataclass(frozen=True)
class Labels:
    """The labelled rows of a run."""

    learned: list[Triplet]  # rows to learn from
    judge: TripletJudge | StsJudge  # computes the dev score from held-out rows or an STS set
    heldout: int  # number of rows held out; 0 with an STS set
    # Number of held-out rows that the judge uses: all, or as many as `MOST_TEXTS` allows.
    judged: int
    rejected: Mapping[str, int]  # rule -> number of rejected rows
    digest: str  # digest of all rows and of the judge's texts

    @classmethod
    def read(
        cls,
        params: FinetuneParams,
        root: Path,
        evaluation: Collection[bytes],
        *,
        apart: bool = False,
    ) -> Labels:
        """Read the files that the settings name.

        Args:
            params: The settings `finetune`.
            root: Folder that the globs in the settings are relative to.
            evaluation: Text keys of evaluation texts; rows with one are rejected.
            apart: Whether the student reads a text as a query otherwise than as a document.

        Raises:
            TeachonceError: a file is damaged, or too few rows are left.
        """
        files = triplet_files(params.triplets, root)
        rows, rejected = read_triplets(files, params.fields, evaluation)
        judge: TripletJudge | StsJudge
        if params.dev is None:
            learned, heldout = split_by_anchor(rows, params.heldout)
            sample = judging_rows(heldout)
            judge, scores = TripletJudge(sample, apart=apart), b""
        else:
            dev = read_sts(sts_files(params.dev, root, "finetune.dev"))
            learned, heldout, sample = rows, [], []
            judge, scores = StsJudge(dev), dev.scores.tobytes()
        if len(learned) < LEAST_ROWS or (params.dev is None and len(heldout) < LEAST_ROWS):
            raise TeachonceError(
                "finetune.triplets",
                f"{len(learned)} rows to learn from and {len(heldout)} held out are too few"
                f"{rejections_note(rejected)}",
                "name files with more rows, change finetune.heldout, or name a finetune.dev",
            )
        if len(sample) < len(heldout):
            log.info(
                "finetune: judged by %s of %s rows held out, which have at most %s texts",
                f"{len(sample):,}",
                f"{len(heldout):,}",
                f"{MOST_TEXTS:,}",
            )
        # Rows differ in their number of texts, so each ends with an empty one.
        texts = (text.encode() for row in rows for text in (*row.texts, ""))
        named = digest(scores, *(text.encode() for text in judge.texts), b"", *texts)
        return cls(learned, judge, len(heldout), len(sample), rejected, named)


class TripletJudge:
    """Dev score from held-out triplets: mean reciprocal rank of a row's positive among all texts.

    Args:
        rows: Two or more held-out triplets.
        apart: Whether anchors are read as queries and the others as documents: a text that is both is then
            among `texts` twice.
    """

    def __init__(self, rows: Sequence[Triplet], *, apart: bool = False) -> None:
        keys = dict.fromkeys(text for row in rows for text in row.texts[1:])
        anchors = dict.fromkeys(row.anchor for row in rows)
        alone = [text for text in anchors if apart or text not in keys]
        self.texts = [*keys, *alone]  # in the order of `texts_by_role`
        self.texts_by_role: dict[Role, list[str]] = {"document": list(keys), "query": alone}
        self.keys = len(keys)
        place = {text: number for number, text in enumerate(keys)}
        place_as_anchor = place | {text: number for number, text in enumerate(alone, len(keys))}
        self.anchors = np.array([place_as_anchor[row.anchor] for row in rows])
        self.positives = np.array([place[row.positive] for row in rows])
        right = positives_by_anchor(self.anchors, self.positives)
        self.not_rivals = [
            np.append(right[anchor], [place[row.anchor]] if row.anchor in place else []).astype(
                np.int64
            )
            for anchor, row in zip(self.anchors, rows, strict=True)
        ]

    def __call__(self, vectors: NDArray[np.float32]) -> float:
        """Returns the dev score from (texts, dim) vectors: 0 to 1, 1 if every anchor's positive is nearest.

        Each positive is ranked among the positives and negatives of all rows, each text once, without the
        anchor itself and its other positives. NaN if a vector has NaN or Inf in it.
        """
        if not np.isfinite(vectors).all():
            return math.nan
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        ranks = np.empty(len(self.anchors))
        for first in range(0, len(ranks), ROWS_AT_ONCE):
            block = slice(first, first + ROWS_AT_ONCE)
            cosines = unit[self.anchors[block]] @ unit[: self.keys].T
            for place, row in enumerate(cosines, first):
                as_near = row >= row[self.positives[place]]
                ranks[place] = 1 + as_near.sum() - as_near[self.not_rivals[place]].sum()
        return float((1 / ranks).mean())


class StsJudge:
    """Dev score from an STS set, sentence pairs with a score: Spearman's correlation x 100."""

    def __init__(self, pairs: StsSet) -> None:
        self.pairs = pairs
        self.texts = pairs.texts
        self.texts_by_role: dict[Role, list[str]] = {"text": self.texts}

    def __call__(self, vectors: NDArray[np.float32]) -> float:
        """Returns the dev score from (texts, dim) vectors: -100 to 100."""
        first, second = np.split(vectors, 2)
        return sts_correlation(first, second, self.pairs.scores)


def positives_by_anchor(
    anchors: NDArray[np.int64], positives: NDArray[np.int64]
) -> dict[int, NDArray[np.int64]]:
    """Returns anchor -> ascending ids of all its positives, from (n,) text ids of n rows."""
    positives_of: dict[int, set[int]] = {}
    for anchor, positive in zip(anchors.tolist(), positives.tolist(), strict=True):
        positives_of.setdefault(anchor, set()).add(positive)
    return {anchor: np.array(sorted(right), np.int64) for anchor, right in positives_of.items()}


def judging_rows(heldout: Sequence[Triplet], most_texts: int = MOST_TEXTS) -> Sequence[Triplet]:
    """Returns the held-out rows for the judge: all, if they have at most `most_texts` distinct texts.

    Otherwise the first rows in the order of a hash of their texts that together have no more, at least
    `LEAST_ROWS`. The order depends on each row alone, so most of the choice stays as files grow.
    """
    if len({text for row in heldout for text in row.texts}) <= most_texts:
        return heldout
    order = sorted(heldout, key=lambda row: digest(*(text.encode() for text in row.texts)))
    seen: set[str] = set()
    for count, row in enumerate(order):
        seen.update(row.texts)
        if count >= LEAST_ROWS and len(seen) > most_texts:
            return order[:count]
    return order


def split_by_anchor(
    triplets: Sequence[Triplet], heldout: float
) -> tuple[list[Triplet], list[Triplet]]:
    """Split rows into learned and held-out ones by the anchor's text key, so that rows keep their part."""
    limit = int(heldout * 2.0**64)
    chosen = [int.from_bytes(text_key(row.anchor)[8:], "little") < limit for row in triplets]
    return (
        [row for row, out in zip(triplets, chosen, strict=True) if not out],
        [row for row, out in zip(triplets, chosen, strict=True) if out],
    )


def rejections_note(rejected: Mapping[str, int]) -> str:
    """Returns the number of rows rejected by each rule, in parentheses; empty if there are none."""
    named = [f"{count:,} {rule}" for rule, count in rejected.items() if count]
    return f" (rejected: {', '.join(named)})" if named else ""
