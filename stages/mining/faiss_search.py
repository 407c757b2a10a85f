"""Nearest rows by FAISS: exact, block by block, or by an approximate index whose recall is measured.

`hnsw-sq8` holds a byte for each value of a vector (FAISS's 8-bit scalar quantiser). By these bytes it finds
`efSearch` candidates, twice as many as a list holds or more. They are compared by the vectors of the cache,
so the cosines of its lists are exact.

A search returns the k nearest rows of each of m rows: (m, k) int64 row numbers, -1 where there are fewer,
and (m, k) float32 cosines, descending. The row itself is among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from stages.mining.cosines import IdsAndCosines, UnitRows, exact, exact_of, first_of_each
from stages.outcome import log
from storage import work
from storage.errors import TeachonceError
from storage.negatives import NONE
from storage.store import canonical_json, digest

FEW_QUERIES = 1536  # compared by torch: FAISS takes as long for fewer
FEW_TILE = (256, 8192)  # of them and of rows: 8 MB. The nearest of 2,048 take twice as long a row
BUILD_ROWS = 16384  # added to an index at a time
SAME = 1e-6  # cosines that differ by less are ties
FACTORY = {"ivf": "IVF{nlist},Flat", "hnsw": "HNSW{M},Flat", "hnsw-sq8": "HNSW{M}_SQ8"}
COMPARED_BYTES = 1 << 25  # vectors of candidates that are compared again at a time
EFFORTS = ("efSearch", "nprobe")  # how much an hnsw and an ivf index look at, by FAISS's names
FIRST_PROBED = 8  # lists of an ivf index, before a sample says how many are enough
MOST_EFFORT = 16  # times what an index looks at first; beyond, exact search is nearly as fast


class NearestRows(Protocol):
    """A search for the nearest rows of given rows.

    What `is_exact` leaves out is no nearer than the last that it returns, but for last bits of a product.
    """

    is_exact: ClassVar[bool]

    def nearest(self, rows: NDArray[np.int64]) -> IdsAndCosines:
        """(m,) row numbers -> (m, k) row numbers and cosines."""


class FlatSearch:
    """Exact search: compares with every row, one block at a time.

    Args:
        unit_rows: Returns the vectors of given rows.
        rows: Number of rows.
        k: Neighbours per row, 1 <= k <= rows.
        block_rows: Rows of a float32 block; if all rows fit, the block is kept.
        device: The device; a GPU is used only if FAISS was built for it.
    """

    is_exact: ClassVar[bool] = True

    def __init__(
        self, unit_rows: UnitRows, rows: int, k: int, *, block_rows: int, device: torch.device
    ) -> None:
        self.unit_rows, self.rows, self.k, self.block_rows = unit_rows, rows, k, block_rows
        self.faiss = load_faiss()
        self.resources = None
        if device.type == "cuda" and hasattr(self.faiss, "StandardGpuResources"):
            self.resources = self.faiss.StandardGpuResources()
        self._whole: NDArray[np.float32] | None = None

    def nearest(self, rows: NDArray[np.int64]) -> IdsAndCosines:
        """As in `NearestRows`."""
        queries = self.unit_rows(rows)
        heap = self.faiss.ResultHeap(len(rows), self.k, keep_max=True)
        for first, block in self._blocks():
            for start, part in self._parts(block, len(rows)):
                _, places = self._knn(queries, part, min(self.k, len(part)))
                heap.add_result(exact_of(queries, part, places), places + first + start)
        heap.finalize()
        return heap.I, heap.D

    def _parts(
        self, block: NDArray[np.float32], queries: int
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield a block whole, or where a part is compared with few rows, in parts."""
        size = len(block) if queries > FEW_QUERIES or self.resources else FEW_TILE[1]
        for start in range(0, len(block), size):
            yield start, block[start : start + size]

    def _knn(self, queries: NDArray[np.float32], block: NDArray[np.float32], k: int) -> Any:  # noqa: ANN401
        by_product = self.faiss.METRIC_INNER_PRODUCT
        if self.resources is None and len(queries) <= FEW_QUERIES:
            others = torch.from_numpy(block).T
            parts = torch.split(torch.from_numpy(queries), FEW_TILE[0])
            best = [(part @ others).topk(k, dim=1) for part in parts]
            scores, places = (torch.cat(found).numpy() for found in zip(*best, strict=True))
            return scores, places
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
    """Search by an approximate FAISS index, faster than exact search over very many rows.

    The index is a file, built once and mapped by all processes that search it: those of `--shards`, and one
    that goes on where another was killed.

    Args:
        unit_rows: Returns the vectors of given rows.
        rows: Number of rows.
        k: Neighbours per row, 1 <= k <= rows.
        index: What `index_settings` returned.
        file: Where the index lies, or is to lie; its name says what it is made of (`file_of`).
    """

    is_exact: ClassVar[bool] = False

    def __init__(
        self, unit_rows: UnitRows, rows: int, k: int, *, index: Mapping[str, Any], file: Path
    ) -> None:
        self.unit_rows, self.rows, self.k = unit_rows, rows, k
        self.holds_bytes = index["name"] == "hnsw-sq8"
        faiss = load_faiss()
        if not work.find(file):
            built = built_index(unit_rows, rows, index)
            work.publish(
                file, lambda take: faiss.write_index(built, faiss.PyCallbackIOWriter(take))
            )
            del built
        log.info("mine: the index is %s", file)
        self.index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        effort = index[self._setting]
        self.most = MOST_EFFORT * effort
        if "nlist" in index:
            self.most = min(self.most, 2 * index["nlist"])  # FAISS takes more than all lists as all
            effort = min(effort, FIRST_PROBED)
        setattr(self._owner, self._setting, effort)

    @property
    def effort(self) -> str:
        """How much the index looks at for each row, by FAISS's name."""
        return f"{self._setting} {self._looked_at}"

    def look_at_more(self) -> bool:
        """Look at twice as many candidates from now on; returns False if that would be too many."""
        more = 2 * self._looked_at
        if more > self.most:
            return False
        setattr(self._owner, self._setting, more)
        return True

    @property
    def _setting(self) -> str:
        return EFFORTS[not hasattr(self.index, "hnsw")]

    @property
    def _owner(self) -> Any:  # noqa: ANN401 - FAISS has no types
        return getattr(self.index, "hnsw", self.index)

    @property
    def _looked_at(self) -> int:
        looked_at: int = getattr(self._owner, self._setting)
        return looked_at

    def nearest(self, rows: NDArray[np.int64]) -> IdsAndCosines:
        """As in `NearestRows`."""
        queries = self.unit_rows(rows)
        if not self.holds_bytes:
            cosines, places = self.index.search(queries, self.k)
            return places, np.where(places >= 0, cosines, -1).astype(np.float32)
        candidates = min(self.rows, max(self.k, self._looked_at))
        _, places = self.index.search(queries, candidates)
        at_once = max(1, COMPARED_BYTES // (candidates * queries[0].nbytes))
        parts = [slice(first, first + at_once) for first in range(0, len(rows), at_once)]
        lists = [self._compared(rows[part], queries[part], places[part]) for part in parts]
        return np.concatenate([ids for ids, _ in lists]), np.concatenate([own for _, own in lists])

    def _compared(
        self, rows: NDArray[np.int64], queries: NDArray[np.float32], places: NDArray[np.int64]
    ) -> IdsAndCosines:
        """Returns the k nearest of the (m, candidates) places that the index found, by exact cosines."""
        at, column = np.nonzero(places >= 0)
        found = places[at, column]
        known, which = np.unique(found, return_inverse=True)
        vectors = torch.from_numpy(self.unit_rows(known))
        pairs = torch.from_numpy(at), torch.from_numpy(which)
        cosines = exact(torch.from_numpy(queries), vectors, *pairs).numpy()
        return first_of_each(rows, at, found, cosines, self.k)


def built_index(unit_rows: UnitRows, rows: int, index: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Returns an index of all rows, in memory."""
    faiss = load_faiss()
    dim = unit_rows(np.zeros(1, np.int64)).shape[1]
    by_product = faiss.METRIC_INNER_PRODUCT
    built = faiss.index_factory(dim, FACTORY[index["name"]].format_map(index), by_product)
    if "nlist" in index:
        built.cp.seed = index["seed"]
    else:
        built.hnsw.efConstruction = index["efConstruction"]
    if not built.is_trained:
        draw = np.random.default_rng(index["seed"])
        most = 64 * index["nlist"] if "nlist" in index else BUILD_ROWS
        sample = draw.choice(rows, min(rows, most), replace=False)
        built.train(unit_rows(np.sort(sample)))
    if "M" in index:
        _reserve(built, rows)
    for first in range(0, rows, BUILD_ROWS):
        built.add(unit_rows(np.arange(first, min(first + BUILD_ROWS, rows))))
    return built


def _reserve(built: Any, rows: int) -> None:  # noqa: ANN401
    """Make room for all rows of an hnsw index: vectors of C++ double their room when they grow."""
    store = load_faiss().downcast_index(built.storage)
    links = round(rows * built.hnsw.cum_nneighbor_per_level.at(1) * (1 + 1 / 32))
    for values, count in ((store.codes, rows * store.code_size), (built.hnsw.neighbors, links)):
        values.resize(count)
        values.clear()  # keeps the room


def file_of(root: Path, index: Mapping[str, Any], vectors: str, among: NDArray[np.int64]) -> Path:
    """Returns where the index of some rows lies in a store: under the digest of what it is made of.

    Args:
        root: The folder of the store.
        index: What `index_settings` returned; how much it looks at is no part of the file.
        vectors: `content` of the manifest of the vectors.
        among: (m,) ids of the rows in it.
    """
    made_of = {key: value for key, value in index.items() if key not in EFFORTS}
    made_of |= {"faiss": load_faiss().__version__, "vectors": vectors}
    name = digest(canonical_json(made_of), np.ascontiguousarray(among).tobytes())
    return root / work.WORK / f"{name}.faiss"


def index_settings(name: str, *, rows: int, k: int) -> dict[str, Any]:
    """Returns the settings of an approximate index, by FAISS's names; k is the length of a list."""
    if name == "hnsw":
        return {"name": name, "M": 32, "efConstruction": 80, "efSearch": max(128, 4 * k)}
    if name == "hnsw-sq8":
        effort = max(128, 2 * k)
        return {"name": name, "M": 32, "efConstruction": 80, "efSearch": effort, "seed": 0}
    # FAISS needs 39 training rows for each list. `nprobe` is but a part of the name of the lists, as it was
    # at first: a search begins with FIRST_PROBED.
    lists = max(1, min(round(4 * rows**0.5), rows // 39))
    return {"name": name, "nlist": lists, "nprobe": min(lists, max(8, lists // 8)), "seed": 0}


def index_bytes(name: str, *, rows: int, dim: int) -> int:
    """Returns the bytes of an approximate index: vectors in float32 or bytes, and ids or links."""
    row = {"ivf": 4 * dim + 8, "hnsw": 4 * dim + 256, "hnsw-sq8": dim + 272}
    return rows * row[name]


def hits_in(approximate: IdsAndCosines, exact: IdsAndCosines) -> NDArray[np.int64]:
    """Returns (m,) int64: how many of the k nearest rows are in each approximate list; ties count."""
    kth = exact[1][:, -1:] - SAME
    hits: NDArray[np.int64] = ((approximate[0] != NONE) & (approximate[1] >= kth)).sum(axis=1)
    return hits


def load_faiss() -> Any:  # noqa: ANN401 - FAISS has no types
    """Returns the module `faiss`.

    Raises:
        TeachonceError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise TeachonceError(
            "mine", "FAISS is not installed", "pip install 'teachonce[cpu]' (or [gpu], never both)"
        ) from None
    return faiss
