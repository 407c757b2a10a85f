"""Columns: many objects read as one, row by row.

A text shard and everything derived from it have the same rows in the same order. A column is opened
lazily: an object is mapped, checked and compared with its texts when a row of it is first asked for.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.errors import DamagedError
from storage.store import Object, Store, remake_command

TEXT_KEY_BYTES = 16
TEXT_KEY = pa.binary(TEXT_KEY_BYTES)

MAPS = 4096
"""Number of mapped objects that a column caches, least recently used first out. A student reads four or
five columns, and Linux allows a process 65,530 maps."""

READ_WHOLE_BYTES = 1 << 20
"""Size of a file below which `expect` leaves it to the system what is read of it."""

SCATTERED = 4
"""Rows of which fewer than one in this many are read are scattered."""

LIBC = ctypes.CDLL(None)
"""The C library of this process: Python's own `madvise` is a method of its maps, which hold descriptors."""
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

PAGE_BYTES = mmap.PAGESIZE


class Column:
    """Row-aligned objects. Row r lies in the shard s with `starts[s] <= r < starts[s + 1]`.

    Args:
        store: The store of the objects.
        objects: The objects in row order.
        texts: The corpus that this column was derived from; None if this is the corpus.
    """

    def __init__(
        self, store: Store, objects: Sequence[Object], texts: Column | None = None
    ) -> None:
        self.store, self.objects, self.texts_column = store, tuple(objects), texts
        self.starts = np.concatenate(
            [[0], np.cumsum([entry.rows for entry in self.objects], dtype=np.int64)]
        ).astype(np.int64)
        self._compared: set[int] = set()
        if texts is not None and not np.array_equal(self.starts, texts.starts):
            raise DamagedError(
                self.objects[0].key if self.objects else store.root,
                f"{self.rows} rows in {len(self.objects)} shards beside {texts.rows} texts in "
                f"{len(texts.objects)} shards",
                "run `dvc repro`: the manifest is older than the corpus",
            )

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled: the names of the objects; another process maps and checks them anew."""
        return {
            name: value
            for name, value in vars(self).items()
            if not isinstance(getattr(type(self), name, None), cached_property)
        }

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.starts[-1])

    def batch(self, shard: int) -> pa.RecordBatch:
        """The mapped batch of one shard, checked against its texts."""
        return self._cached_batch(shard)

    @cached_property
    def _cached_batch(self) -> Callable[[int], pa.RecordBatch]:
        return lru_cache(MAPS)(self._open)

    def _open(self, shard: int) -> pa.RecordBatch:
        batch = self.store.open(self.objects[shard])
        # Once is enough: `open` checks the manifest's sha256 each time, and it covers the keys.
        if self.texts_column is not None and shard not in self._compared:
            self._compare(shard, batch, self.texts_column.batch(shard))
            self._compared.add(shard)
        return batch

    def shards_of(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """Returns (n,) the shard of each of n row ids, 0 <= id < rows."""
        shards: NDArray[np.int64] = np.searchsorted(self.starts, ids, "right") - 1
        return shards

    def by_shard(
        self, ids: NDArray[np.integer]
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Group row ids by shard.

        Yields:
            shard, places in `ids`, rows within the shard; both in the order of the rows.

        Raises:
            IndexError: an id outside 0 <= id < rows.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        if not len(wanted):
            return
        order = np.argsort(wanted)
        ascending = wanted[order]
        if ascending[0] < 0 or ascending[-1] >= self.rows:
            raise IndexError(
                f"row ids {ascending[0]} to {ascending[-1]} in a column of {self.rows} rows"
            )
        bounds = np.searchsorted(ascending, self.starts)
        counts = np.diff(bounds)
        rows = ascending - np.repeat(self.starts[:-1], counts)
        for shard in np.flatnonzero(counts).tolist():
            of_shard = slice(bounds[shard], bounds[shard + 1])
            yield shard, order[of_shard], rows[of_shard]

    @cached_property
    def text_keys(self) -> NDArray[np.bytes_]:
        """(rows,) keys of 16 bytes each, as numpy `V16`; 16 bytes of memory a row."""
        return self.text_keys_in(range(len(self.objects)))

    def text_keys_in(self, shards: Sequence[int]) -> NDArray[np.bytes_]:
        """(n,) V16 keys of the rows of some shards, in this order; a copy, so that none stays mapped."""
        # The counts of a manifest are not trusted with memory: each object is opened and counted first.
        keys = [text_keys_of(self._open(shard)).copy() for shard in shards]
        return np.concatenate(keys) if keys else np.empty(0, f"V{TEXT_KEY_BYTES}")

    def _compare(self, shard: int, batch: pa.RecordBatch, texts: pa.RecordBatch) -> None:
        ours, theirs = text_keys_of(batch), text_keys_of(texts)
        if len(ours) == len(theirs) and bool((ours == theirs).all()):
            return
        row = int(np.flatnonzero(ours != theirs)[0]) if len(ours) == len(theirs) else len(ours)
        raise self.damaged(shard, f"row {row} of shard {shard} belongs to another text")

    def damaged(self, shard: int, problem: str) -> DamagedError:
        """Returns the error of an object that does not belong to the texts of its shard."""
        key = self.objects[shard].key
        path = self.store.path(key)
        # Not `repair`: it examines objects one by one, and taken alone this one is intact.
        return DamagedError(path, problem, f"rm -f '{path}', then {remake_command(key)}")


def text_keys_from(keys: Iterable[bytes]) -> NDArray[np.bytes_]:
    """(n,) V16 text keys, from the 16 bytes of each."""
    return np.frombuffer(b"".join(keys), dtype=f"V{TEXT_KEY_BYTES}")


class KeyIndex:
    """An index of (n,) V16 text keys for bulk lookups; 24 bytes of memory a key."""

    def __init__(self, keys: NDArray[np.bytes_]) -> None:
        # As S16 they are compared byte by byte like V16, twice as fast.
        keys = keys.view(f"S{TEXT_KEY_BYTES}")
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def places(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Returns (m,) int64: the first place of each of m V16 keys among the n, -1 if it has none."""
        if not len(self._sorted):
            return np.full(len(keys), -1, np.int64)
        keys = keys.view(f"S{TEXT_KEY_BYTES}")
        # Sorted queries touch memory in order, which is four times as fast.
        sorting = np.argsort(keys)
        positions = np.empty(len(keys), np.int64)
        positions[sorting] = np.searchsorted(self._sorted, keys[sorting])
        positions = np.minimum(positions, len(self._sorted) - 1)
        return np.where(self._sorted[positions] == keys, self._order[positions], -1)


def text_keys_of(batch: pa.RecordBatch) -> NDArray[np.bytes_]:
    """The text keys of a batch as a (rows,) numpy `V16` view."""
    column = batch.column("text_key")
    return np.frombuffer(
        column.buffers()[1],
        dtype=f"V{TEXT_KEY_BYTES}",
        count=len(column),
        offset=column.offset * TEXT_KEY_BYTES,
    )


def text_key_array(keys: NDArray[np.bytes_]) -> pa.Array:
    """The Arrow column of (rows,) `V16` text keys."""
    buffer = pa.py_buffer(np.ascontiguousarray(keys))
    return pa.Array.from_buffers(TEXT_KEY, len(keys), [None, buffer])


def fixed_lists(values: NDArray[np.generic]) -> pa.Array:
    """The Arrow column (fixed-size lists) of a (rows, width) array."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1]
    )


def file_of(batch: pa.RecordBatch) -> pa.Buffer:
    """The whole mapped file that a batch with a row or more is a part of."""
    buffer = batch.column("text_key").buffers()[1]
    while buffer.parent is not None:
        buffer = buffer.parent
    return buffer


def expect(file: pa.Buffer, rows: NDArray[np.int64]) -> None:
    """Tell the system which rows of a mapped file come next, in case they are not in memory.

    With each page it reads those around it, megabytes of them: good for rows in a sequence, and hundreds of
    times too much for a batch whose rows are scattered over the file.

    Args:
        file: All of the file, so that its map is not split: a process may have 65,530.
        rows: (m,) m >= 1 rows, ascending.
    """
    if file.size < READ_WHOLE_BYTES:
        return
    are_scattered = len(rows) == 1 or rows[-1] - rows[0] >= SCATTERED * len(rows)
    # Only advice: where it is refused, nothing is lost but time.
    advice = mmap.MADV_RANDOM if are_scattered else mmap.MADV_NORMAL
    LIBC.madvise(file.address, file.size, advice)


def read_ahead(addresses: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
    """Ask the system to read pieces of mapped files now, so that nobody waits when they are read.

    Without this, pieces are read one after the other, each when it is first touched. Asked for at once,
    they take a fifth of that time (benchmarks/cold_rows.py). A piece that is in memory costs 3
    microseconds, and other threads run meanwhile.

    Args:
        addresses: (m,) int64 where the pieces begin in memory; whoever calls holds what is mapped there.
        sizes: (m,) int64 their bytes.
    """
    first = addresses & -PAGE_BYTES  # the advice begins at a page
    for start, size in zip(first.tolist(), (addresses + sizes - first).tolist(), strict=True):
        LIBC.madvise(start, size, mmap.MADV_WILLNEED)


def matrix_of(batch: pa.RecordBatch, name: str) -> NDArray[np.generic]:
    """A column of fixed-size lists as a (rows, width) view of the mapped file; nothing is copied."""
    column = batch.column(name)
    width = column.type.list_size
    # Not `flatten`, which asks a compute function and takes twice as long.
    values = column.values.slice(column.offset * width, len(column) * width)
    matrix: NDArray[np.generic] = values.to_numpy(zero_copy_only=True)
    return matrix.reshape(len(column), width)
