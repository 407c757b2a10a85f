"""The columns of a corpus as Python's indexing reads them: a row id, a slice, a list of row ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from storage.errors import RowError, shown
from storage.roles import Role

if TYPE_CHECKING:
    from storage.column import Column
    from storage.corpus import Corpus
    from storage.embeddings import Embeddings
    from storage.negatives import Negatives

Ids = Sequence[int] | NDArray[np.integer]
"""Row ids: 0 or more and less than the rows of the corpus, in any order, also several times."""

One = TypeVar("One")
Many = TypeVar("Many")

ROWS_AT_ONCE = 1024
"""Rows that a loop over a column reads together; 1.5 MB of vectors of 384 values."""


class ByRow(ABC, Generic[One, Many]):
    """Values that are indexed by row id.

    An index is a row id, a slice, or a list or (n,) array of row ids in any order. A negative id is
    refused, since -1 stands for "none" in a list of neighbours; in a slice it counts from the end, as in
    a list.
    """

    name: str
    _column: Column

    def __init__(self, column: Column) -> None:
        self._column, self._rows = column, column.rows

    def __len__(self) -> int:
        """How many rows the corpus has."""
        return self._rows

    @overload
    def __getitem__(self, index: int | np.integer) -> One: ...
    @overload
    def __getitem__(self, index: slice | Ids) -> Many: ...
    def __getitem__(self, index: int | np.integer | slice | Ids) -> One | Many:
        """The value of one row, or those of several in the order of their ids.

        Raises:
            RowError: An id of no row, or an index of another kind.
            DamagedError: A file is not what its manifest says.
        """
        ids = row_ids(index, self._rows, self.name)
        values = self._take(np.atleast_1d(ids))
        return values if ids.ndim else self._value(values, 0)

    def __iter__(self) -> Iterator[One]:
        """Every value, in the order of the rows; a bounded number of them in memory."""
        for first in range(0, self._rows, ROWS_AT_ONCE):
            ids = np.arange(first, min(first + ROWS_AT_ONCE, self._rows))
            values = self._take(ids)
            for place in range(len(ids)):
                yield self._value(values, place)

    @abstractmethod
    def _take(self, ids: NDArray[np.int64]) -> Many:
        """The values of rows that exist."""

    def _value(self, values: Any, place: int) -> One:  # noqa: ANN401 - Many, which has no index
        """One of these values."""
        value: One = values[place]
        return value


class Texts(ByRow[str, list[str]]):
    """The texts of a corpus, by row id: `texts[5]` is a str, `texts[[5, 9]]` a list of two.

    Examples:
        >>> project.texts[[9, 5]]
        ['Silver tunnel.', 'Ember garden needle oyster.']
    """

    name = "texts"
    _column: Corpus

    def _take(self, ids: NDArray[np.int64]) -> list[str]:
        return self._column.take(ids)


class Roles(ByRow[Role, list[Role]]):
    """What the texts of a corpus are for, by row id: each "text", "query" or "document".

    Examples:
        >>> project.roles[[9, 5]]
        ['document', 'query']
    """

    name = "roles"
    _column: Corpus

    def _take(self, ids: NDArray[np.int64]) -> list[Role]:
        return self._column.roles_of(ids)


class Vectors(ByRow[NDArray[np.float32], NDArray[np.float32]]):
    """The teacher's vectors, by row id, in float32: `vectors[5]` is (dim,), `vectors[[5, 9]]` is (2, dim).

    They are as the teacher returns them: of length 1 only if it ends in a Normalize module.

    Examples:
        >>> project.vectors[5] @ project.vectors[9]
        0.412
        >>> everything = project.vectors[:]
    """

    name = "vectors"
    _column: Embeddings

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the corpus, and values of a vector."""
        return len(self), self._column.dim

    def _take(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._column.rows_of(ids).astype(np.float32, copy=False)


class Neighbours(NamedTuple):
    """Mined neighbours of one row, (k,), or of n rows, (n, k), nearest first.

    Args:
        ids: int64 row ids; -1 where a row has fewer than k neighbours.
        scores: float32 cosines of the teacher's vectors, -1 to 1; 0 where the id is -1.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]


class NeighbourLists(ByRow[Neighbours, Neighbours]):
    """The mined neighbours of every row, by row id, each with ids and scores.

    Examples:
        >>> project.neighbours[5].ids
        array([ 871,   12, 4404])
        >>> project.neighbours[[5, 9]].scores.shape
        (2, 3)
    """

    name = "neighbours"
    _column: Negatives

    def _take(self, ids: NDArray[np.int64]) -> Neighbours:
        return Neighbours(*self._column.rows_of(ids))

    def _value(self, values: Neighbours, place: int) -> Neighbours:
        return Neighbours(values.ids[place], values.scores[place])


def row_ids(index: int | np.integer | slice | Ids, rows: int, where: str) -> NDArray[np.int64]:
    """The row ids that an index means: () for a single one, else (n,).

    Args:
        index: A row id, a slice, or row ids.
        rows: How many there are.
        where: What is indexed, to name in an error.

    Raises:
        RowError: An id of no row, or no whole number at all.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(rows))
    ids = np.asarray(index)
    if ids.ndim == 1 and not len(ids):
        return np.empty(0, np.int64)
    if ids.dtype.kind not in "iu" or ids.ndim > 1:
        raise RowError(
            where,
            f"indexed by {shown(repr(index))}, which is no row id and no list of row ids",
            "give whole numbers, a slice, or a flat list; of a mask, np.flatnonzero(mask)",
        )
    if (wrong := (ids < 0) | (ids >= rows)).any():
        raise RowError(
            where,
            f"no row {ids[wrong][0]}: row ids are 0 to {rows - 1}",
            "take ids from project.rows(); an id of -1 in a list of neighbours stands for none",
        )
    return ids.astype(np.int64)
