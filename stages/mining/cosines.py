"""The cosine of two rows, the same bits wherever it is computed, and the order that follows from it.

Matrix products add up in an order that depends on their shape, so they are off by last bits. They only find
candidates: what a list holds is computed pair by pair (`exact`). Of rows with equal cosines the lower id
comes first, and a row is its own nearest. So exact lists are a function of vectors, rows and rules alone.
A self-join, FAISS in blocks of any size, and lists merged from earlier ones are equal, bit by bit, on one
kind of processor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from storage.negatives import NONE

UnitRows = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""(m,) row numbers -> (m, dim) float32 vectors of unit length."""

IdsAndCosines = tuple[NDArray[np.int64], NDArray[np.float32]]

TILE = (2048, 1024)  # rows and columns compared at a time: if all are hits, 60 MB


def lengths(stored: NDArray[np.floating]) -> NDArray[np.float32]:
    """Returns (m, 1) float32 lengths of (m, dim) vectors."""
    vectors = stored.astype(np.float32, copy=False)
    found: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


def margin(dim: int) -> float:
    """Returns what a product of unit rows in float32 may be off by: four times the bound of a sum."""
    return dim * 2.0**-22


def exact(
    own: torch.Tensor, theirs: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Returns (m,) float32 dot products of ascending rows `rows` of `own` and `columns` of `theirs`."""
    ends = torch.bincount(rows, minlength=len(own)).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pairs = torch.sparse_csr_tensor(
            torch.nn.functional.pad(ends, (1, 0)),
            columns,
            torch.zeros(len(rows), device=own.device),
            (len(own), len(theirs)),
            check_invariants=False,
        )
    # Only the named places of the product are made: a third of the time of taking the rows first.
    dots: torch.Tensor = torch.sparse.sampled_addmm(pairs, own, theirs.T, beta=0.0).values()
    return dots


def exact_of(
    own: NDArray[np.float32], theirs: NDArray[np.float32], places: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Returns (m, k) cosines of (m, dim) unit rows and the rows of `theirs` at (m, k) places."""
    rows = torch.arange(len(own)).repeat_interleave(places.shape[1])
    columns = torch.from_numpy(places.reshape(-1))
    dots = exact(torch.from_numpy(own), torch.from_numpy(theirs), rows, columns)
    found: NDArray[np.float32] = dots.numpy().reshape(places.shape)
    return found


def close_pairs(
    own: NDArray[np.float32],
    limits: NDArray[np.float32],
    unit_rows: UnitRows,
    others: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Find all pairs of some rows and others whose cosine is not below the limit of the row.

    Args:
        own: (m, dim) unit rows.
        limits: (m,) a limit each.
        unit_rows: Returns the vectors of the others, by row number.
        others: (n,) row numbers.

    Returns:
        (p,) numbers of rows, 0 to m - 1; (p,) row numbers of others; (p,) cosines; in no order.
    """
    found = list(_close_in_tiles(own, limits, unit_rows, others))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    rows, columns, cosines = (np.concatenate(part) for part in zip(*found, strict=True))
    return rows, columns, cosines


def _close_in_tiles(
    own: NDArray[np.float32],
    limits: NDArray[np.float32],
    unit_rows: UnitRows,
    others: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    low = torch.from_numpy(limits - margin(own.shape[1])).unsqueeze(1)
    tall, wide = TILE
    for start in range(0, len(others) if len(own) else 0, wide):
        block_ids = others[start : start + wide]
        block = torch.from_numpy(unit_rows(block_ids))
        for first in range(0, len(own), tall):
            part = torch.from_numpy(own[first : first + tall])
            hits = part @ block.T >= low[first : first + tall]
            rows, columns = hits.nonzero().unbind(1)
            if len(rows):
                cosines = exact(part, block, rows, columns).numpy()
                row_numbers = rows.numpy() + first
                is_close = cosines >= limits[row_numbers]
                yield row_numbers[is_close], block_ids[columns.numpy()[is_close]], cosines[is_close]


def nearest_first(own: NDArray[np.int64], found: IdsAndCosines) -> IdsAndCosines:
    """Order candidates: the row itself, then by falling cosine, then by rising id.

    Args:
        own: (m,) row numbers.
        found: (m, k) row numbers and cosines, nearly in order.
    """
    ids, cosines = found[0].copy(), found[1].copy()
    is_own = ids == own[:, None]
    wrong = (np.diff(np.where(is_own, 2, cosines), axis=1) >= 0).any(axis=1)
    few, of_few = ids[wrong], cosines[wrong]
    order = np.lexsort((few, np.where(is_own[wrong], -2, -of_few)))
    ids[wrong] = np.take_along_axis(few, order, axis=1)
    cosines[wrong] = np.take_along_axis(of_few, order, axis=1)
    return ids, cosines


def first_of_each(
    own: NDArray[np.int64],
    rows: NDArray[np.int64],
    ids: NDArray[np.int64],
    cosines: NDArray[np.float32],
    count: int,
) -> IdsAndCosines:
    """Returns (m, count) the first candidates of each row, in the order of `nearest_first`.

    Args:
        own: (m,) row numbers.
        rows: (p,) for each candidate the number of its row, 0 to m - 1.
        ids: (p,) row numbers of the candidates.
        cosines: (p,) their cosines.
        count: Candidates a row; where there are fewer, -1 and 0 follow.
    """
    order = np.lexsort((ids, np.where(ids == own[rows], -2, -cosines), rows))
    rows, ids, cosines = rows[order], ids[order], cosines[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    is_first = rank < count
    first_ids = np.full((len(own), count), NONE, np.int64)
    first_cosines = np.zeros((len(own), count), np.float32)
    first_ids[rows[is_first], rank[is_first]] = ids[is_first]
    first_cosines[rows[is_first], rank[is_first]] = cosines[is_first]
    return first_ids, first_cosines
