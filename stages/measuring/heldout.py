"""A model beside its teacher on rows held out: which rows, and the vectors that the model gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.measuring.metrics import EvaluatedModel, encoded_in_steps
from stages.outcome import Facts
from stages.params import LEAST_HELDOUT
from stages.vectors import evenly, rank_agreement
from storage.caches import Caches
from storage.corpus import Corpus
from storage.errors import TeachonceError
from storage.roles import Role

ROWS_OF_STARTS = 500
"""Rows that a start is judged on: it takes seconds, and fixes the second digit of the agreement."""

NOT_MEASURED = "agreement_not_measured"
"""The fact with the reason."""


@dataclass(frozen=True)
class HeldOut:
    """Some rows of a corpus, each to be read in its role."""

    corpus: Corpus
    rows: NDArray[np.int64]  # (n,) int64 row ids, role by role in the corpus' order of roles

    @classmethod
    def of(cls, corpus: Corpus, heldout: NDArray[np.int64], most: int) -> HeldOut:
        """At most this many of the (h,) rows held out, h >= 1, evenly spread over them."""
        rows = evenly(heldout, min(most, len(heldout)))
        return cls(corpus, np.concatenate([corpus.of_role(rows, role) for role in corpus.roles]))

    @property
    def by_role(self) -> dict[Role, NDArray[np.int64]]:
        """The rows of each role that has some, in the order of `rows`."""
        of_roles = {role: self.corpus.of_role(self.rows, role) for role in self.corpus.roles}
        return {role: rows for role, rows in of_roles.items() if len(rows)}

    def vectors(self, name: str, encoder: EvaluatedModel) -> NDArray[np.float32]:
        """(n, dim) vectors of the model `name`, each text in its role, which decides the prompt."""
        return np.concatenate(
            [
                encoded_in_steps(name, encoder, self.corpus.take(rows), role)[0]
                for role, rows in self.by_role.items()
            ]
        )


@dataclass(frozen=True)
class StartRows:
    """The n rows that starts are judged on, and the teacher's (n, D) vectors of them."""

    heldout: HeldOut
    teacher: NDArray[np.floating]

    @classmethod
    def of(cls, caches: Caches) -> StartRows:
        """Those of the caches.

        Raises:
            TeachonceError: too few rows are held out, or the store lacks their vectors.
        """
        rows = caches.split.heldout_rows(caches.corpus)
        if len(rows) < LEAST_HELDOUT:
            raise TeachonceError(
                "split.heldout",
                f"{len(rows)} rows are held out, and it takes {LEAST_HELDOUT}",
                "raise it, or add texts",
            )
        heldout = HeldOut.of(caches.corpus, rows, ROWS_OF_STARTS)
        return cls(heldout, caches.embeddings.rows_of(heldout.rows))


def agreement_of_start(
    name: str, load: Callable[[], EvaluatedModel], caches: Callable[[], Caches]
) -> tuple[str, Facts]:
    """How far a start agrees with its teacher before it was trained: the rank correlation of cosines.

    Args:
        name: Name of the start.
        load: Loads it, to read texts as its students do.
        caches: Opens corpus, vectors and split.

    Returns:
        It in words and as facts; where it cannot be measured, the reason.
    """
    try:
        rows = StartRows.of(caches())
    except TeachonceError as error:
        reason = f"{Path(error.where).name}: {error.problem}"
        return (
            f"its agreement with the teacher is not measured ({reason}; {error.cure})",
            {"agreement": None, NOT_MEASURED: reason},
        )
    agreement = round(rank_agreement(rows.heldout.vectors(name, load()), rows.teacher), 6)
    count = len(rows.heldout.rows)
    return (
        f"its agreement with the teacher is {agreement:.4f} on {count} rows held out",
        {"agreement": agreement, "agreement_rows": count},
    )
