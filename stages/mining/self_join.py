"""Each row's nearest rows among all rows: an exact self-join that multiplies half, and in low precision.

Nearly all of the time goes into the n * n * dim multiplications of all cosines. To save most of them:

1. a pair is multiplied once, for both of its rows: only tiles on and above the diagonal are made;
2. tiles are products of bfloat16, where the device multiplies those faster;
3. a row keeps the exact cosine of its k-th best so far, its `limit`. What a tile says is off by at most
   `margin`, so only pairs at or above `limit - margin` are computed again, in float32. They are few:
   a tile is read as maxima over groups of 32, and most groups are below their limits;
4. rows are ordered so that neighbours stand close together, and tiles on the diagonal come first: limits
   are then nearly final before the rest is multiplied.

The lists are those of comparing every pair in float32. Which of two rows with equal cosines takes the
last place of a list is not defined; whoever needs to know asks for some more places.

The margin. Let x, y be unit rows in float32 and x', y' what they are in bfloat16, each off by at most
`e` in length (measured, over all rows). Then

    |x.y - x'.y'| <= |x.(y - y')| + |(x - x').y'| <= e + e * (1 + e)

whatever the vectors are. Sums of `dim` products in float32, in any order, are off by at most about
dim * 2^-24 each; four times that covers the tile's sum, the exact one and both norms (`float32_sums`
keeps a GPU to it). At last the tile
rounds to bfloat16, up or down; limits are rounded down to bfloat16, so a score that is not below the
limit is not below it after rounding either.

This file is long because one argument holds it together: the lists are exact only if the margin, the
limits and the order of the tiles are all as described here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from stages.mining.cosines import exact, lengths, margin
from stages.mining.faiss_search import FlatSearch
from stages.outcome import seconds_of

TILE = 2048  # rows and columns of a tile: its scores stay in the cache of a CPU
TILE_ON_GPU = 8 * TILE  # fewer and larger kernels; not yet measured on a GPU
GROUP = 32  # scores of a tile that are read as one maximum
SPARE_PLACES = 16  # free places behind a list, which is cut back to its best k when they are full
GROUPS_AT_ONCE = 1 << 14  # bounds memory where very many pairs are close
ANY = -2.0  # a limit below every cosine, but above the -inf of padding

EXACT_ON_CUDA = {
    "allow_bf16_reduced_precision_reduction": False,
    "allow_fp16_reduced_precision_reduction": False,
    "allow_fp16_accumulation": False,
    "fp32_precision": "ieee",
}
"""Settings of `torch.backends.cuda.matmul`."""

RowsOf = Callable[[NDArray[np.int64]], NDArray[np.floating]]
"""(m,) row numbers -> (m, dim) vectors of any length but 0, float16 or float32."""


class SelfJoin:
    """The k nearest rows of each row, by cosine; the row itself is one of them.

    Memory: a copy of the vectors in their stored type, `8 * (k + 16)` bytes a row for the lists, and
    some tens of megabytes for a tile.

    Args:
        rows_of: Returns the vectors of given rows.
        rows: Number of rows, n >= 1.
        k: Neighbours per row, 1 <= k <= n.
        device: The device that multiplies tiles.
        product: bfloat16, or float32 where that is faster (see `join_cost`).
        tile: Rows of a tile, a multiple of 32.
    """

    is_exact: ClassVar[bool] = True

    def __init__(
        self,
        rows_of: RowsOf,
        rows: int,
        k: int,
        *,
        device: torch.device,
        product: torch.dtype,
        tile: int = TILE,
    ) -> None:
        self.rows, self.k, self.device, self.product = rows, k, device, product
        self.blocks = -(-rows // tile)
        # Equal blocks, each a multiple of GROUP; the last is padded with zeros, which no list takes.
        self.tile = -(-rows // (self.blocks * GROUP)) * GROUP
        self.order = similar_order(rows_of, rows, self.tile)
        self.place = np.empty(rows, np.int64)
        self.place[self.order] = np.arange(rows)
        self._load(rows_of)
        self.lists = TopLists(self.blocks * self.tile, k, device)
        self.lists.limit[rows:] = torch.inf

    @property
    def steps(self) -> int:
        """Number of tiles."""
        return self.blocks * (self.blocks + 1) // 2

    def run(self) -> Iterator[None]:
        """Multiply all tiles; yields after each."""
        for block in range(self.blocks):
            self._diagonal(block)
            yield
        for first in range(self.blocks):
            left = self._unit(first)
            low = left.to(self.product)
            for second in range(first + 1, self.blocks):
                self._pair(first, second, left, low)
                yield

    def nearest(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(m, k) row numbers and cosines, descending, of m rows; after `run`."""
        places, cosines = self.lists.best(torch.from_numpy(self.place[rows]).to(self.device))
        return self.order[places.cpu().numpy()], cosines.cpu().numpy()

    def _load(self, rows_of: RowsOf) -> None:
        """Copy the vectors in order, and find their lengths and the largest rounding error of `product`."""
        largest_error = 0.0
        for block in range(self.blocks):
            first = block * self.tile
            as_stored = rows_of(self.order[first : first + self.tile])
            stored = torch.from_numpy(as_stored).to(self.device)
            if block == 0:
                shape = (self.blocks * self.tile, stored.shape[1])
                self.vectors = torch.zeros(shape, dtype=stored.dtype, device=self.device)
                self.lengths = torch.ones(shape[0], 1, device=self.device)
            block_rows = slice(first, first + len(stored))
            self.vectors[block_rows] = stored
            self.lengths[block_rows] = torch.from_numpy(lengths(as_stored)).to(self.device)
            unit = self._unit(block)
            largest_error = max(
                largest_error, float((unit - unit.to(self.product).float()).norm(dim=1).max())
            )
        self.margin = largest_error * (2 + largest_error) + margin(shape[1])

    def _unit(self, block: int) -> torch.Tensor:
        """Returns (tile, dim) float32 rows of unit length; zeros past the last row."""
        block_rows = slice(block * self.tile, (block + 1) * self.tile)
        return self.vectors[block_rows].to(torch.float32, copy=True).div_(self.lengths[block_rows])

    def _rows_in(self, block: int) -> int:
        """Returns the number of rows of a block that are not padding."""
        return min(self.tile, self.rows - block * self.tile)

    def _diagonal(self, block: int) -> None:
        """Compare a block with itself, which gives its rows their first limits."""
        unit = self._unit(block)
        low = unit.to(self.product)
        scores = self._scores(low, low, block, block)
        # k groups have each a score at or above the k-th largest maximum, so k rows have.
        group = 8 if self.tile >= 16 * self.k else 1
        if self.tile // group >= self.k:
            maxima = scores.view(self.tile, group, -1).amax(1).float()
            kth = maxima.topk(self.k, dim=1, sorted=False).values.amin(1)
            kth -= kth.abs() * torch.finfo(self.product).eps + self.margin
            first = block * self.tile
            real = self._rows_in(block)
            self.lists.limit[first : first + real] = kth[:real].clamp(min=ANY)
        self._keep(scores, block, block, unit, unit)

    def _pair(self, first: int, second: int, left: torch.Tensor, low: torch.Tensor) -> None:
        """Compare two blocks, for the lists of both."""
        right = self._unit(second)
        scores = self._scores(low, right.to(self.product), first, second)
        self._keep(scores, first, second, left, right)
        self._keep(scores, second, first, right, left, turned=True)

    def _scores(
        self, left: torch.Tensor, right: torch.Tensor, first: int, second: int
    ) -> torch.Tensor:
        """(tile, tile) cosines, -inf where one of the two is padding."""
        with float32_sums():
            scores = left @ right.T
        scores[self._rows_in(first) :] = -torch.inf
        scores[:, self._rows_in(second) :] = -torch.inf
        return scores

    def _keep(
        self,
        scores: torch.Tensor,
        block: int,
        other: int,
        own: torch.Tensor,
        theirs: torch.Tensor,
        *,
        turned: bool = False,
    ) -> None:
        """Add a tile's candidates to the lists of `block`; `turned`: these are the tile's columns."""
        first = block * self.tile
        limits = self.lists.limit[first : first + self.tile] - self.margin
        for rows, columns in not_below(scores, limits, turned=turned):
            cosines = exact(own, theirs, rows, columns)
            self.lists.add(rows + first, columns + other * self.tile, cosines)


@contextmanager
def float32_sums() -> Iterator[None]:
    """Products as the margin assumes them: sums in float32, of numbers that are taken as they are.

    On CUDA that is a choice of the process, and not its default: sums of bfloat16 may be rounded to
    bfloat16 on their way, and a program around this one may let float32 be cut to TF32.
    """
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in EXACT_ON_CUDA}
    for name, value in EXACT_ON_CUDA.items():
        setattr(matmul, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


class TopLists:
    """The best k candidates of each row so far, and the k-th best score, its limit.

    Args:
        rows: Number of lists.
        k: Length of a list.
        device: The device that holds the lists.
    """

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.k, self.width = k, k + SPARE_PLACES
        self.scores = torch.full((rows, self.width), -torch.inf, device=device)
        self.places = torch.zeros((rows, self.width), dtype=torch.int32, device=device)
        self.taken = torch.zeros(rows, dtype=torch.int64, device=device)
        self.limit = torch.full((rows,), ANY, device=device)

    def add(self, rows: torch.Tensor, places: torch.Tensor, scores: torch.Tensor) -> None:
        """Offer (m,) scores to the lists of (m,) ascending rows; those above the limit are taken."""
        while True:
            better = (scores > self.limit[rows]).nonzero().squeeze(1)
            rows, places, scores = rows[better], places[better], scores[better]
            rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
            slots = self.taken[rows] + rank
            overflowing = (slots >= self.width).nonzero().squeeze(1)
            if not len(overflowing):
                self._put(rows, slots, places, scores)
                return
            fits = (slots < self.width).nonzero().squeeze(1)
            self._put(rows[fits], slots[fits], places[fits], scores[fits])
            rows, places, scores = rows[overflowing], places[overflowing], scores[overflowing]
            self._cut(torch.unique_consecutive(rows))

    def best(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(m, k) places and scores of (m,) rows, descending."""
        scores, at = self.scores[rows].topk(self.k, dim=1)
        return self.places[rows].gather(1, at), scores

    def _put(
        self, rows: torch.Tensor, slots: torch.Tensor, places: torch.Tensor, scores: torch.Tensor
    ) -> None:
        at = rows * self.width + slots
        self.scores.view(-1)[at] = scores
        self.places.view(-1)[at] = places.int()
        self.taken.index_add_(0, rows, torch.ones_like(rows))

    def _cut(self, rows: torch.Tensor) -> None:
        places, scores = self.best(rows)
        self.scores[rows] = torch.nn.functional.pad(scores, (0, SPARE_PLACES), value=-torch.inf)
        self.places[rows, : self.k] = places
        self.taken[rows] = self.k
        self.limit[rows] = scores[:, -1]


def not_below(
    scores: torch.Tensor, limits: torch.Tensor, *, turned: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the places where a tile is not below the limits of its rows, both rounded down to its type.

    Floats are compared as integers of their bits, which have the same order and are faster; those of
    negative floats must be turned round, which is left out where only positive scores can be found.

    Args:
        scores: (tile, tile) bfloat16 or float32.
        limits: (tile,) float32.
        turned: The limits are those of the tile's columns, which are then what is called rows here.

    Yields:
        (m,) rows, ascending within all that is yielded, and (m,) columns.
    """
    down = limits.to(scores.dtype)
    below = torch.nextafter(down, torch.full_like(down, -torch.inf))
    kind = torch.int32 if scores.dtype == torch.float32 else torch.int16
    bounds = _ascending(torch.where(down.float() > limits, below, down).view(kind))
    bits = scores.view(kind)
    if int(bounds.min()) <= 0:
        bits = _ascending(bits)
    # (rows, GROUP, groups): the members of a group stand apart, so that maxima are taken of whole vectors.
    if turned:
        groups = bits.view(GROUP, -1, bits.shape[1]).permute(2, 0, 1)
        maxima = bits.view(GROUP, -1, bits.shape[1]).amax(0).T
    else:
        groups = bits.view(len(bits), GROUP, -1)
        maxima = groups.amax(1)
    hits = (maxima >= bounds[:, None]).nonzero()
    for rows, group in (part.unbind(1) for part in torch.split(hits, GROUPS_AT_ONCE)):
        which, member = (groups[rows, :, group] >= bounds[rows, None]).nonzero().unbind(1)
        yield rows[which], member * groups.shape[2] + group[which]


def _ascending(bits: torch.Tensor) -> torch.Tensor:
    """Bits of floats as integers of the same order: those of negative floats run backwards."""
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)


def similar_order(rows_of: RowsOf, rows: int, block: int) -> NDArray[np.int64]:
    """Order rows so that similar ones are close: halve repeatedly along the direction of largest variance.

    Args:
        rows_of: Returns the vectors of given rows.
        rows: Number of rows.
        block: Halves are cut again until they are no longer than this, at multiples of it.

    Returns:
        (rows,) int64, the same for the same vectors.
    """
    order = np.arange(rows)
    todo = [(0, rows)]
    while todo:
        first, last = todo.pop()
        if last - first <= block:
            continue
        members = order[first:last]
        axis = _widest(rows_of(members[:: -(-len(members) // 2048)]))
        along = np.concatenate(
            [
                rows_of(members[i : i + TILE]).astype(np.float32) @ axis
                for i in range(0, len(members), TILE)
            ]
        )
        order[first:last] = members[np.argsort(along, kind="stable")]
        middle = first + -(-(last - first) // block) // 2 * block
        todo += [(first, middle), (middle, last)]
    return order


def _widest(sample: NDArray[np.floating]) -> NDArray[np.float32]:
    """Returns (dim,) the direction of largest variance of (m, dim) rows, by power iteration."""
    centred = sample.astype(np.float32)
    centred -= centred.mean(axis=0)
    axis = centred[np.argmax(np.square(centred).sum(axis=1))]
    for _ in range(8):
        axis = (centred @ axis) @ centred
        axis = axis / np.maximum(np.linalg.norm(axis), 1e-30)
    widest: NDArray[np.float32] = axis.astype(np.float32)
    return widest


def tile_on(device: torch.device) -> int:
    """Returns the number of rows of a tile on `device`."""
    return TILE_ON_GPU if device.type == "cuda" else TILE


def join_bytes(rows: int, k: int, dim: int, itemsize: int, *, tile: int = TILE) -> int:
    """Returns the bytes of a self-join, tiles included; `itemsize` is that of a stored value."""
    lists = 8 * (k + SPARE_PLACES) + 32  # and limits, lengths, order
    return rows * (dim * itemsize + lists) + tile * (10 * tile + 32 * dim)


@dataclass(frozen=True)
class FlatCost:
    """Seconds of comparing some rows with as many by FAISS; on a GPU, of the product alone.

    Args:
        seconds: Measured seconds, > 0.
        rows: Number of rows that were compared with as many.
    """

    seconds: float
    rows: int

    def seconds_for(self, rows: int, *, asked: int) -> float:
        """Returns the seconds of `asked` lists among `rows` rows, in proportion to the pairs."""
        return self.seconds * (rows / self.rows) * (asked / self.rows)


@dataclass(frozen=True)
class JoinCost:
    """Seconds of the parts of a self-join, measured on two blocks.

    Args:
        product: The faster of the two types for multiplying tiles.
        tile: Seconds of a pair of blocks without candidates for any list.
        first_lists: Seconds of the first lists of a block. Measured on a sample of the vectors themselves:
            where they are all similar, bfloat16 separates few of them and lists cost most.
        block: Number of rows of each of the two blocks, half of the sample.
    """

    product: torch.dtype
    tile: float
    first_lists: float
    block: float

    def seconds_for(self, rows: int) -> float:
        """Seconds of a self-join of `rows` rows.

        Each pair of blocks costs a tile that is multiplied and read. Candidates cost extra: each block its
        first lists, and for rows in random order 1/2, 1/3, ... of that again with the second block, the
        third, ... The blocks of a join are twice as large as those measured.
        """
        halves = rows / self.block
        offered = 1 + math.log(max(1.0, halves / 2))
        return halves**2 / 2 * self.tile + halves * offered * self.first_lists


def join_cost(sample: NDArray[np.floating], k: int, device: torch.device) -> JoinCost:
    """Measure the parts of a self-join on a sample.

    Args:
        sample: (m, dim) some of the vectors, m >= k; best the rows of a tile.
        k: Length of a list.
        device: The device of the self-join.
    """
    seconds_by_type = {
        kind: _seconds_of_product(sample.shape[1], kind, device)
        for kind in (torch.bfloat16, torch.float32)
    }
    product = min(seconds_by_type, key=lambda kind: seconds_by_type[kind])
    two_blocks = sample[: tile_on(device)]
    tile, first_lists = seconds_of_tiles(two_blocks, k, product, device)
    return JoinCost(product, tile, first_lists, block=len(two_blocks) / 2)


def flat_cost(sample: NDArray[np.floating], k: int, device: torch.device) -> FlatCost:
    """Measure a comparison of (m, dim) vectors with each other, for lists of k."""
    if device.type != "cpu":
        return FlatCost(_seconds_of_product(sample.shape[1], torch.float32, device), TILE)
    block = sample[:TILE]
    return FlatCost(_seconds_of_faiss(block, k), len(block))


def _seconds_of_product(dim: int, kind: torch.dtype, device: torch.device) -> float:
    """Returns the seconds of multiplying a tile, without reading it."""
    tile = torch.full((TILE, dim), dim**-0.5, dtype=kind, device=device)

    def multiply() -> None:
        with float32_sums():
            float((tile @ tile.T)[0, 0])  # waits for the device

    return min(seconds_of(multiply) for _ in range(4))  # the first one warms up


def seconds_of_tiles(
    sample: NDArray[np.floating], k: int, product: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Measure a tile without candidates for any list, and the first lists of a block, both in seconds.

    Args:
        sample: (m, dim) vectors of two blocks, m >= k; half as many as in a join's blocks are enough.
        k: Length of a list.
        product: The type of the tile.
        device: The device of the self-join.
    """
    size = -(-len(sample) // (2 * GROUP)) * GROUP
    join = SelfJoin(
        lambda rows: sample[rows], len(sample), k, device=device, product=product, tile=size
    )
    first_lists = min(seconds_of(partial(join._diagonal, block)) for block in range(join.blocks))
    join.lists.limit[:] = 2.0  # above every cosine
    left = join._unit(0)
    low = left.to(product)
    last = join.blocks - 1
    return min(seconds_of(partial(join._pair, 0, last, left, low)) for _ in range(3)), first_lists


def _seconds_of_faiss(sample: NDArray[np.floating], k: int) -> float:
    """Returns the seconds of comparing a sample with itself by FAISS."""
    vectors = sample.astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = len(vectors)
    search = FlatSearch(
        lambda places: vectors[places],
        rows,
        min(k, rows),
        block_rows=rows,
        device=torch.device("cpu"),
    )
    search.nearest(np.arange(-(-rows // 32)))  # warms up
    return seconds_of(lambda: search.nearest(np.arange(rows)))
