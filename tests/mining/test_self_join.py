"""The self-join: the lists of comparing every pair, whatever bfloat16 makes of the vectors."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.mining import self_join
from stages.mining.self_join import FlatCost, JoinCost, SelfJoin, TopLists, flat_cost, join_cost

CPU = torch.device("cpu")


def unit(vectors):
    rows = vectors.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def join(vectors, k, *, product=torch.bfloat16, tile=64):
    made = SelfJoin(
        lambda rows: vectors[rows], len(vectors), k, device=CPU, product=product, tile=tile
    )
    assert sum(1 for _ in made.run()) == made.steps
    return made


def check_lists(made, vectors, k):
    """Against every pair in float64; of ties, any may be in a list, but none twice."""
    rows, cosines = made.nearest(np.arange(len(vectors)))
    every = unit(vectors) @ unit(vectors).T
    expected = -np.sort(-every, axis=1)[:, :k]
    assert rows.shape == cosines.shape == (len(vectors), k)
    assert np.allclose(cosines, expected, atol=2e-6)
    assert np.allclose(np.take_along_axis(every, rows, axis=1), cosines, atol=2e-6)
    assert all(len(set(line)) == k for line in rows.tolist())
    assert np.all(np.diff(cosines, axis=1) <= 0)


def clustered(count, dim, *, seed=0, dtype=np.float16):
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(7, dim))
    rows = centres[draw.integers(0, 7, count)] + 0.7 * draw.normal(size=(count, dim))
    return (rows * draw.uniform(0.5, 3, size=(count, 1))).astype(dtype)


@pytest.mark.parametrize("product", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 31, 64, 65, 333, 512])
def test_lists_are_those_of_every_pair(count, product):
    vectors = clustered(count, 24)
    check_lists(join(vectors, min(9, count), product=product), vectors, min(9, count))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_lists_longer_than_a_block_and_as_long_as_the_corpus(dtype):
    vectors = clustered(150, 12, dtype=dtype)
    for k in (40, 70, 150):
        check_lists(join(vectors, k, tile=32), vectors, k)


def test_cosines_below_zero_are_ordered_too():
    """Five directions only: the k-th best of a row is negative, where the bits of floats run backwards."""
    draw = np.random.default_rng(3)
    vectors = draw.normal(size=(200, 5)).astype(np.float32)
    made = join(vectors, 120, tile=64)
    check_lists(made, vectors, 120)
    assert (made.nearest(np.arange(200))[1][:, -1] < 0).all()


def test_equal_rows_and_opposite_ones():
    vectors = clustered(120, 16)
    vectors[40:110] = vectors[3]  # more of them than a list is long
    vectors[110:] = -vectors[3]
    made = join(vectors, 8, tile=32)
    check_lists(made, vectors, 8)
    assert np.allclose(made.nearest(np.arange(40, 110))[1], 1, atol=1e-6)


def test_more_close_pairs_than_are_looked_at_together(monkeypatch):
    monkeypatch.setattr(self_join, "GROUPS_AT_ONCE", 3)
    vectors = clustered(200, 16)
    check_lists(join(vectors, 6), vectors, 6)


def all_errors_one_way(dim, shared):
    """Rows of which every number is rounded down by as much as bfloat16 can, and a query.

    The query is 1 in `shared` numbers. A row is `t` there, just below the middle between two numbers of
    bfloat16, and something of its own elsewhere.

    Returns:
        The query; 12 such rows; 40 rows with the same cosine to the query but 2e-5 less, whose errors
        cancel out; the cosine of the first.
    """
    draw = np.random.default_rng(shared)
    query = np.zeros(dim)
    query[:shared] = shared**-0.5

    def rows(count, cosine, noise):
        made = np.zeros((count, dim))
        spread = noise * draw.normal(size=(count, shared))
        made[:, :shared] = cosine * shared**-0.5 + spread - spread.mean(axis=1, keepdims=True)
        rest = draw.normal(size=(count, dim - shared))
        left = 1 - np.square(made).sum(axis=1, keepdims=True)
        made[:, shared:] = rest / np.linalg.norm(rest, axis=1, keepdims=True) * np.sqrt(left)
        return made.astype(np.float32)

    step = 2.0**-13  # of bfloat16 between 2^-6 and 2^-5
    t = 2.0**-6 + 37.499 * step
    cosine = t * shared**0.5
    return query.astype(np.float32), rows(12, cosine, 0), rows(40, cosine - 2e-5, 0.002), cosine


def rounded(vectors):
    return torch.from_numpy(vectors).bfloat16().double().numpy()


def test_near_ties_that_bfloat16_turns_round_are_in_the_lists():
    """Rows whose tile scores are below the exact k-th best, even after rounding that one down."""
    tried = 0
    for shared in range(150, 250):
        query, hard, easy, cosine = all_errors_one_way(384, shared)
        tile = float(torch.tensor(rounded(hard[:1])[0] @ rounded(query[None])[0]).bfloat16())
        grid = 2.0 ** (np.floor(np.log2(cosine)) - 7)
        if tile >= np.floor((cosine - 2e-5) / grid) * grid:
            continue
        tried += 1
        noise = np.random.default_rng(0).normal(size=(75, 384)).astype(np.float32)
        vectors = np.concatenate([query[None], easy, noise, hard])
        found, _ = join(vectors, 12, tile=32).nearest(np.array([0]))
        assert set(found[0]) <= {0, *range(116, 128)}, shared
    assert tried >= 8


def in_the_middle(count, dim):
    """Rows of length one of which each number but the last is just below the middle of two of bfloat16."""
    draw = np.random.default_rng(dim)
    steps = draw.integers(128, 160, size=(count, dim - 1)) + 0.49
    rows = steps * 2.0 ** np.floor(np.log2(0.95 / np.sqrt(160.0**2 * dim)))
    rows *= draw.choice([-1, 1], size=dim - 1)
    last = np.sqrt(1 - np.square(rows).sum(axis=1, keepdims=True))
    return np.concatenate([rows, last], axis=1).astype(np.float32)


@pytest.mark.parametrize("dim", [16, 384, 1024])
def test_no_tile_is_off_by_more_than_the_margin(dim):
    random = np.random.default_rng(dim).normal(size=(300, dim)).astype(np.float32)
    shares = {}
    for name, vectors in {"random": random, "middle": in_the_middle(300, dim)}.items():
        exact = unit(vectors)
        tile = rounded(exact.astype(np.float32))
        off = np.abs(tile @ tile.T - exact @ exact.T).max()
        shares[name] = off / join(vectors, 4).margin
    assert 0.1 < shares["random"] < 1
    assert 0.3 < shares["middle"] < 1  # a bound far above what can happen would prove little


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("low", [-0.9, 0.1])
def test_a_tile_is_compared_with_its_limits_by_their_bits(kind, low):
    draw = torch.Generator().manual_seed(0)
    scores = (torch.rand(64, 64, generator=draw) * 2 - 1).to(kind)
    limits = torch.rand(64, generator=draw) * (0.95 - low) + low
    down = limits.to(kind).float()  # to the nearest; one step down where that was up
    down = torch.where(
        down > limits, torch.nextafter(down.to(kind), torch.tensor(-9.0).to(kind)), down
    )
    for turned, tile in ((False, scores), (True, scores.T)):
        found = [
            torch.cat(part)
            for part in zip(*self_join.not_below(scores, limits, turned=turned), strict=True)
        ]
        expected = (tile.float() >= down[:, None].float()).nonzero()
        assert sorted(torch.stack(found, 1).tolist()) == expected.tolist()


class Products(TorchDispatchMode):
    """Notes how CUDA would add up each product of two matrices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.seen.append(cuda_settings())
        return func(*args, **(kwargs or {}))


def cuda_settings():
    matmul = torch.backends.cuda.matmul
    return {name: getattr(matmul, name) for name in self_join.EXACT_ON_CUDA}


@pytest.mark.parametrize("product", [torch.bfloat16, torch.float32])
def test_every_product_is_summed_in_float32_and_the_process_is_left_as_it_was(product):
    """What a GPU is told; a program around this one had told it otherwise."""
    matmul, before = torch.backends.cuda.matmul, cuda_settings()
    loose = {name: "tf32" if name == "fp32_precision" else True for name in before}
    try:
        for name, value in loose.items():
            setattr(matmul, name, value)
        with Products() as products:
            made = join(clustered(200, 24), 9, product=product)
            self_join.seconds_of_tiles(clustered(200, 24), 9, product, CPU)
            self_join._seconds_of_product(24, product, CPU)
        assert len(products.seen) > made.steps
        assert all(seen == self_join.EXACT_ON_CUDA for seen in products.seen)
        assert cuda_settings() == loose
        with pytest.raises(KeyError), self_join.float32_sums():
            raise KeyError
        assert cuda_settings() == loose
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def test_rows_alike_stand_together():
    vectors = clustered(700, 24)
    order = self_join.similar_order(lambda rows: vectors[rows], 700, 64)
    assert sorted(order) == list(range(700))
    near = unit(vectors)[order]
    blocks = [near[i : i + 64] for i in range(0, 640, 64)]
    inside = np.mean([(block @ block.T).mean() for block in blocks])
    assert inside > 2 * (near @ near.T).mean()


def test_a_self_join_costs_what_its_parts_cost():
    """Pairs of blocks one by one, and of block b's lists 1 + 1/2 + ... + 1/blocks of the first ones."""
    cost = JoinCost(torch.float32, tile=0.5, first_lists=3.0, block=100)
    blocks = 60  # of a join, each two of those that were measured
    pairs = sum(4 * 0.5 for first in range(blocks) for _ in range(first, blocks))
    lists = sum(2 * 3.0 / seen for _ in range(blocks) for seen in range(1, blocks + 1))
    assert cost.seconds_for(200 * blocks) == pytest.approx(pairs + lists, rel=0.1)
    free = JoinCost(torch.float32, tile=0.5, first_lists=0.0, block=100)
    assert free.seconds_for(200 * blocks) == pytest.approx(2 * blocks**2 * 0.5)
    assert JoinCost(torch.float32, 0.0, 3.0, block=100).seconds_for(200) == 6.0


def test_flat_search_costs_grow_with_the_pairs():
    cost = FlatCost(seconds=2.0, rows=1000)
    assert cost.seconds_for(1000, asked=1000) == 2.0
    assert cost.seconds_for(50_000, asked=500) == pytest.approx(2.0 * 50 * 0.5)


@pytest.mark.parametrize("dim", [16, 384])
def test_the_parts_are_measured_on_two_blocks_of_the_sample(dim):
    sample = clustered(700, dim)
    join_parts, flat = join_cost(sample, 9, CPU), flat_cost(sample, 9, CPU)
    assert join_parts.product in (torch.bfloat16, torch.float32)
    assert (join_parts.block, flat.rows) == (350, 700)
    assert min(join_parts.tile, join_parts.first_lists, flat.seconds) > 0


class CountingLists(TopLists):
    """Lists that count the pairs whose exact cosine they were offered."""

    offered = 0

    def add(self, rows, places, scores):
        self.offered += len(rows)
        super().add(rows, places, scores)


def test_most_pairs_are_looked_at_again_where_all_vectors_are_alike():
    """Why lists cost most there, and why their cost is measured on the vectors themselves."""
    vectors = np.random.default_rng(1).standard_normal((1024, 64), dtype=np.float32)
    pairs = {}
    for offset in (0.0, 8.0):
        moved = vectors + np.float32(offset)
        made = SelfJoin(moved.__getitem__, 1024, 9, device=CPU, product=torch.bfloat16, tile=256)
        made.lists = CountingLists(1024, 9, CPU)
        for _ in made.run():
            pass
        pairs[offset] = made.lists.offered
    assert pairs[8.0] > 5 * pairs[0.0] > 0
