"""Nearest rows by FAISS: exact, block by block, or by an approximate index whose recall is measured.

A search is asked for some of its rows and answers with the k nearest of each: (m, k) row numbers, -1
where there are fewer, and (m, k) float32 cosines, descending. The row itself is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from storage.errors import TeachonceError
from storage.negatives import NONE

Lists = tuple[NDArray[np.int64], NDArray[np.float32]]

UnitRows = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""(m,) row numbers -> (m, dim) float32 vectors of unit length."""

BUILD_ROWS = 16384  # added to an index at a time
SAME = 1e-6  # cosines that differ by less are ties


class Search(Protocol):
    """Whoever can answer for some of the rows."""

    def nearest(self, rows: NDArray[np.int64]) -> Lists:
        """(m,) row numbers -> (m, k) row numbers and cosines."""


class FlatSearch:
    """Compares with every row, a block of them at a time.

    Args:
        unit_rows: Where vectors come from.
        rows: How many there are.
        k: Wanted per row, 1 <= k <= rows.
        block_rows: Rows in float32 at a time; if all fit they are kept.
        device: A GPU is used if FAISS was built for it.
    """

    def __init__(
        self, unit_rows: UnitRows, rows: int, k: int, *, block_rows: int, device: torch.device
    ) -> None:
        self.unit_rows, self.rows, self.k, self.block_rows = unit_rows, rows, k, block_rows
        self.faiss = load_faiss()
        self.resources = None
        if device.type == "cuda" and hasattr(self.faiss, "StandardGpuResources"):
            self.resources = self.faiss.StandardGpuResources()
        self._whole: NDArray[np.float32] | None = None

    def nearest(self, rows: NDArray[np.int64]) -> Lists:
        """As in `Search`."""
        queries = self.unit_rows(rows)
        heap = self.faiss.ResultHeap(len(rows), self.k, keep_max=True)
        for first, block in self._blocks():
            cosines, places = self._knn(queries, block, min(self.k, len(block)))
            heap.add_result(cosines, np.where(places >= 0, places + first, NONE))
        heap.finalize()
        return heap.I, heap.D

    def _knn(self, queries: NDArray[np.float32], block: NDArray[np.float32], k: int) -> Any:  # noqa: ANN401
        by_product = self.faiss.METRIC_INNER_PRODUCT
        if self.resources is None:
            return self.faiss.knn(queries, block, k, by_product)
        return self.faiss.knn_gpu(self.resources, queries, block, k, metric=by_product)

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        if self.rows <= self.block_rows:
            if self._whole is None:
                self._whole = self.unit_rows(np.arange(self.rows))
            yield 0, self._whole
            return
        for first in range(0, self.rows, self.block_rows):
            last = min(first + self.block_rows, self.rows)
            yield first, self.unit_rows(np.arange(first, last))


class ApproximateSearch:
    """Looks where neighbours are likely to be; faster than comparing with all rows if those are very many.

    Args:
        unit_rows: Where vectors come from.
        rows: How many there are.
        k: Wanted per row, 1 <= k <= rows.
        index: What `index_settings` says.
    """

    def __init__(self, unit_rows: UnitRows, rows: int, k: int, *, index: Mapping[str, Any]) -> None:
        self.unit_rows, self.k = unit_rows, k
        faiss = load_faiss()
        dim = unit_rows(np.zeros(1, np.int64)).shape[1]
        if index["name"] == "hnsw":
            self.index = faiss.IndexHNSWFlat(dim, index["M"], faiss.METRIC_INNER_PRODUCT)
            self.index.hnsw.efConstruction = index["efConstruction"]
            self.index.hnsw.efSearch = index["efSearch"]
        else:
            quantizer = faiss.IndexFlatIP(dim)
            self.index = faiss.IndexIVFFlat(
                quantizer, dim, index["nlist"], faiss.METRIC_INNER_PRODUCT
            )
            self.index.cp.seed = index["seed"]
            self.index.nprobe = index["nprobe"]
            draw = np.random.default_rng(index["seed"])
            sample = draw.choice(rows, min(rows, 64 * index["nlist"]), replace=False)
            self.index.train(unit_rows(np.sort(sample)))
        for first in range(0, rows, BUILD_ROWS):
            self.index.add(unit_rows(np.arange(first, min(first + BUILD_ROWS, rows))))

    def nearest(self, rows: NDArray[np.int64]) -> Lists:
        """As in `Search`."""
        cosines, places = self.index.search(self.unit_rows(rows), self.k)
        return places, np.where(places >= 0, cosines, -1).astype(np.float32)


def index_settings(name: str, *, rows: int, k: int) -> dict[str, Any]:
    """What decides the lists of an approximate index, by FAISS's names."""
    if name == "hnsw":
        return {"name": name, "M": 32, "efConstruction": 80, "efSearch": max(128, 4 * k)}
    # FAISS wants 39 rows for each list to learn from.
    lists = max(1, min(round(4 * rows**0.5), rows // 39))
    return {"name": name, "nlist": lists, "nprobe": min(lists, max(8, lists // 8)), "seed": 0}


def index_bytes(name: str, *, rows: int, dim: int) -> int:
    """Memory of an approximate index: vectors in float32, and links or ids."""
    return rows * (4 * dim + (4 * 2 * 32 if name == "hnsw" else 8))


def found_of(approximate: Lists, exact: Lists) -> NDArray[np.int64]:
    """(m,) how many of the k nearest rows an approximate list has; of ties any will do."""
    kth = exact[1][:, -1:] - SAME
    found: NDArray[np.int64] = ((approximate[0] != NONE) & (approximate[1] >= kth)).sum(axis=1)
    return found


def load_faiss() -> Any:  # noqa: ANN401 - FAISS has no types
    """The module.

    Raises:
        TeachonceError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise TeachonceError(
            "mine", "FAISS is not installed", "pip install 'teachonce[cpu]' (or [gpu], never both)"
        ) from None
    return faiss
