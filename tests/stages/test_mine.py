"""Mining: exact or of a measured recall, bounded in memory, and never a row's own text."""

import json
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages import mine
from stages.mining import faiss_search as searches
from stages.mining import filters, self_join
from stages.params import MineParams
from storage.corpus import ShardSlice
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.negatives import NONE, Negatives, parent_of
from storage.split import Split
from tests.conftest import HashTeacher, sentences


def params(**changes):
    return MineParams.model_validate(
        {
            "neighbours": 4,
            "range_min": 0,
            "range_max": 20,
            "max_score": 0.95,
            "min_score": None,
            "index": "flat",
            "min_recall": 0.9,
            "among": {"text": "text", "query": "document", "document": "document"},
            "memory_mb": 64,
            "pool": None,
            "most_hours": 12,
        }
        | changes
    )


CPU = torch.device("cpu")


class WithTwins(HashTeacher):
    """A teacher that finds each text with an exclamation mark equal, or nearly so, to the plain one."""

    def vector(self, text):
        vector = super().vector(text.rstrip(".!"))
        return vector if "!!" not in text else vector + 0.01 * super().vector("noise")


@pytest.fixture
def world(place):
    """300 texts, 15 exact twins and 15 near twins of the first ones, and some rows that take no part."""
    texts = sentences(300)
    texts += [text.replace(".", "!") for text in texts[:15]]
    texts += [text.replace(".", "!!") for text in texts[15:30]]
    corpus = place.corpus(texts)
    place.embed(corpus, WithTwins(dim=8))
    embeddings = Embeddings(place.store, place.embeddings, corpus)
    split = Split(corpus=corpus.manifest.content, heldout=0.1, evaluation=(40, 41))
    return place, corpus, embeddings, split


def run(world, settings, share=None):
    place, corpus, embeddings, split = world
    outcome = mine.run(
        settings,
        corpus=corpus,
        embeddings=embeddings,
        split=split,
        store=place.store,
        device=CPU,
        out=place.root / "negatives.json",
        facts=place.root / "mine-facts.json",
        share=share,
    )
    if share is not None:
        return outcome
    manifest = Manifest.load(place.root / "negatives.json", "negatives")
    negatives = Negatives(
        place.store, manifest, corpus, mined_from=parent_of(embeddings.manifest, split)
    )
    return outcome, *negatives.rows_of(np.arange(corpus.rows))


def slow_lists(world, settings):
    """Every pair of rows, one at a time."""
    _, corpus, embeddings, split = world
    vectors = embeddings.rows_of(np.arange(corpus.rows)).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    train = split.train_rows(corpus).tolist()
    lists = {row: [] for row in range(corpus.rows)}
    for row in train:
        ranked = sorted(
            (j for j in train if j != row), key=lambda j: -float(vectors[row] @ vectors[j])
        )
        ranked = ranked[: settings.range_max]
        kept = [
            j
            for j in ranked
            if vectors[row] @ vectors[j] <= settings.max_score
            and (settings.min_score is None or vectors[row] @ vectors[j] >= settings.min_score)
        ]
        lists[row] = kept[settings.range_min :][: settings.neighbours]
    return lists


def let_it_cost_nothing(monkeypatch):
    """A self-join, as `join_cost` sees it."""
    monkeypatch.setattr(self_join, "seconds_of_tiles", lambda *_: (0.0, 0.0))


@pytest.fixture(params=["faiss", "self-join"])
def way(request, monkeypatch):
    """The two ways to exact lists: the second is taken when it costs nothing."""
    if request.param == "self-join":
        monkeypatch.setattr(mine, "FEWEST_JOINED", 1)
        let_it_cost_nothing(monkeypatch)
        monkeypatch.setattr(mine.Miner, "flat", lambda *_: pytest.fail("FAISS was asked for"))
    return request.param


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"range_min": 3},
        {"min_score": 0.7},
        {"neighbours": 7, "max_score": 0.8},
        {"range_max": 127},
    ],
)
def test_lists_are_those_of_comparing_every_pair(world, way, changes):
    settings = params(**changes)
    outcome, neighbours, scores = run(world, settings)
    expected = slow_lists(world, settings)
    vectors = world[2].rows_of(np.arange(len(neighbours)))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row, ids in expected.items():
        # By cosine, not by id: of exact twins either may come first.
        assert np.allclose(
            scores[row][neighbours[row] != NONE], vectors[ids] @ vectors[row], atol=1e-5
        )
        found = neighbours[row][neighbours[row] != NONE]
        assert np.allclose(vectors[found] @ vectors[row], vectors[ids] @ vectors[row], atol=1e-5)
    assert outcome.facts["negatives"] == sum(map(len, expected.values()))
    assert np.all(np.diff(scores, axis=1)[neighbours[:, 1:] != NONE] <= 0)
    assert np.all(scores[neighbours == NONE] == 0)


def test_no_row_its_twin_or_a_row_that_takes_no_part_is_ever_a_negative(world):
    _, corpus, _, split = world
    outcome, neighbours, _ = run(world, params(neighbours=16))
    asked = np.repeat(np.arange(corpus.rows), 16)[neighbours.ravel() != NONE]
    found = neighbours.ravel()[neighbours.ravel() != NONE]
    plain = [text.rstrip(".!") for text in corpus.take(np.arange(corpus.rows))]
    assert not any(plain[a] == plain[b] for a, b in zip(asked, found, strict=True))
    train = set(split.train_rows(corpus).tolist())
    assert set(found.tolist()) <= train
    assert set(asked.tolist()) <= train
    assert outcome.facts["rejected"]["itself"] == len(train)
    assert outcome.facts["rejected"]["above_max_score"] > 40


def test_of_two_equal_rows_both_are_kept_from_each_other_by_their_text():
    """FAISS returns one of two equal vectors as the nearest of both: dropping rank 0 would be wrong."""
    keys = np.array([b"a" * 16, b"b" * 16, b"a" * 16], "V16")
    found = np.array([[0, 2, 1], [0, 2, 1]])
    cosines = np.array([[1.0, 1.0, 0.2], [1.0, 1.0, 0.2]], np.float32)
    rejected = filters.reject(
        params(max_score=1.0), found, cosines, own=np.array([0, 2]), text_keys=keys
    )
    assert rejected["itself"].tolist() == [[True, False, False], [False, True, False]]
    assert rejected["same_text"].tolist() == [[False, True, False], [True, False, False]]


def miner(world, settings):
    _, corpus, embeddings, split = world
    return mine.Miner(
        settings, corpus=corpus, embeddings=embeddings, train=split.train_rows(corpus)
    )


def test_blocks_under_a_memory_setting_give_the_same_lists(world, monkeypatch):
    whole, blocks = miner(world, params()), miner(world, params())
    blocks.block_rows = 37
    asked = np.arange(50)
    expected = whole.flat(CPU).nearest(asked)
    monkeypatch.setattr(searches, "FEW_TILE", (7, 23))
    ids, cosines = blocks.flat(CPU).nearest(asked)
    vectors = whole.unit_rows(np.arange(len(whole.train)))
    assert np.allclose(np.einsum("qd,qkd->qk", vectors[asked], vectors[ids]), cosines, atol=1e-5)
    assert (expected[1] == cosines).all()


def test_lists_longer_than_the_corpus(world, way, monkeypatch):
    monkeypatch.setattr(mine, "LONGEST_JOIN", 1000)
    settings = params(range_max=500, neighbours=400, max_score=1.0)
    outcome, neighbours, _ = run(world, settings)
    _, corpus, _, split = world
    train = split.train_rows(corpus)
    assert outcome.facts["rejected"]["itself"] == len(train)
    assert (neighbours[train] != NONE).sum(axis=1).max() == len(train) - 1
    assert outcome.facts["short_lists"] == len(train)


def test_small_shards_are_searched_together_and_large_ones_in_pieces(world):
    grouped = miner(world, params())
    shards = list(range(len(world[1].objects)))
    assert grouped.groups(shards) == [shards]
    alone = miner(world, params())
    rows = {0: 60, 1: 60, 2: 60, 3: 200, 4: 10, 5: 130}
    alone.query_rows = 150
    alone.train_rows_of = rows.get
    assert alone.groups(list(rows)) == [[0, 1], [2], [3], [4, 5]]
    del alone.train_rows_of
    alone.query_rows = 7
    assert alone.groups(shards) == [[shard] for shard in shards]
    for together, one in zip(
        grouped.mine(grouped.flat(CPU), shards),
        [alone.mine(alone.flat(CPU), [shard])[0] for shard in shards],
        strict=True,
    ):
        assert np.allclose(together.scores, one.scores, atol=1e-6)
        assert together.facts == one.facts


def test_a_self_join_makes_what_faiss_left_unfinished(world, monkeypatch, caplog):
    """The two are one recipe: a store may hold shards of both."""
    place = world[0]
    first, _, scores = run(world, params())
    manifest = Manifest.load(place.root / "negatives.json", "negatives")
    for entry in manifest.objects[1:]:
        place.store.path(entry.key).unlink()
    monkeypatch.setattr(mine, "FEWEST_JOINED", 1)
    let_it_cost_nothing(monkeypatch)
    caplog.set_level(logging.INFO, "teachonce")
    again, _, new_scores = run(world, params())
    assert "a self-join in" in caplog.text
    assert "killed, it begins again" in caplog.text
    assert again.summary.endswith(f"{len(manifest.objects) - 1} shards mined, 1 found in the store")
    assert again.facts["negatives"] == first.facts["negatives"]
    assert np.allclose(scores, new_scores, atol=1e-6)


@pytest.mark.parametrize(
    "change", [("EXACT_ROWS", {"cpu": 100, "cuda": 100}), ("LONGEST_JOIN", 20)]
)
def test_no_self_join_where_it_could_not_be_begun_again_or_is_no_gain(world, change, monkeypatch):
    monkeypatch.setattr(mine, "FEWEST_JOINED", 1)
    let_it_cost_nothing(monkeypatch)
    searcher = miner(world, params())
    assert isinstance(searcher.search(None, asked=300, device=CPU), self_join.SelfJoin)
    monkeypatch.setattr(mine, *change)
    assert isinstance(searcher.search(None, asked=300, device=CPU), searches.FlatSearch)


def test_no_self_join_beyond_the_memory_or_for_a_few_rows(world, monkeypatch):
    monkeypatch.setattr(mine, "FEWEST_JOINED", 1)
    searcher = miner(world, params())
    assert isinstance(searcher.search(None, asked=2, device=CPU), searches.FlatSearch)
    let_it_cost_nothing(monkeypatch)
    assert isinstance(searcher.search(None, asked=2, device=CPU), self_join.SelfJoin)
    searcher.params = searcher.params.model_copy(update={"memory_mb": 1})
    assert isinstance(searcher.search(None, asked=2, device=CPU), searches.FlatSearch)


def test_a_few_rows_are_not_worth_measuring(world, monkeypatch):
    def measured(*_, **__):
        raise AssertionError("a second to save a fraction of one")

    monkeypatch.setattr(self_join, "join_cost", measured)
    searcher = miner(world, params())
    assert isinstance(searcher.search(None, asked=300, device=CPU), searches.FlatSearch)
    monkeypatch.setattr(mine, "FEWEST_JOINED", 1)
    with pytest.raises(AssertionError, match="a second"):
        searcher.search(None, asked=300, device=CPU)


def test_a_plan_expects_the_way_that_is_taken(monkeypatch):
    """FAISS below `FEWEST_JOINED` rows and beyond the memory, the faster way else."""
    sample = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float16)
    flat = self_join.FlatCost(seconds=2.0, rows=1000)
    join = self_join.JoinCost(torch.float32, tile=0.5, first_lists=0.0, block=1000)
    monkeypatch.setattr(self_join, "flat_cost", lambda *_: flat)
    monkeypatch.setattr(self_join, "join_cost", lambda *_: join)

    def expected(rows, **changes):
        costs = mine.ExactCosts(params(**changes), lambda places: sample[places], 300, CPU)
        return costs.seconds_for(rows)

    assert expected(4_000) == pytest.approx(2.0 * 16)
    assert expected(10_000) == pytest.approx(0.5 * 10**2 / 2)
    assert expected(100_000, memory_mb=64) == pytest.approx(2.0 * 100**2)
    assert expected(100_000, memory_mb=1024) == pytest.approx(0.5 * 100**2 / 2)
    flat = self_join.FlatCost(seconds=0.1, rows=1000)
    assert expected(10_000) == pytest.approx(0.1 * 10**2)


def test_exact_lists_keep_their_fingerprint():
    """Whatever finds them: lists that older versions mined stay where they are."""
    settings = params(neighbours=16, range_max=64, max_score=0.9)
    made = fingerprint({**mine.recipe(settings), "parent": "0" * 40})
    assert made == "6b1296ff72c3b637ab44045ab6aebc0db9aca029"
    auto = mine.resolve(params(index="auto"), rows=300, dim=8, device=CPU)
    assert mine.recipe(settings, auto) == mine.recipe(settings)


def test_an_approximate_index_is_in_the_recipe_with_what_changes_its_lists():
    settings = params(neighbours=16, range_max=64, max_score=0.9, index="hnsw")
    index = mine.resolve(settings, rows=30_000, dim=8, device=CPU)
    assert index == {"name": "hnsw", "M": 32, "efConstruction": 80, "efSearch": 260}
    made = fingerprint({**mine.recipe(settings, index), "parent": "0" * 40})
    assert made == "af312845282727dee5e80ff1a289266ec16b8990"
    ivf = mine.resolve(params(index="ivf"), rows=30_000, dim=8, device=CPU)
    assert ivf == {"name": "ivf", "nlist": 693, "nprobe": 86, "seed": 0}
    small = mine.resolve(
        settings.model_copy(update={"index": "hnsw-sq8"}), rows=30_000, dim=8, device=CPU
    )
    assert small == {
        "name": "hnsw-sq8",
        "M": 32,
        "efConstruction": 80,
        "efSearch": 130,
        "seed": 0,
    }
    made = fingerprint({**mine.recipe(settings, small), "parent": "0" * 40})
    assert made == "3809ef137a7c23530ee9c0447ba90823e57ae464"


@pytest.mark.parametrize(
    ("rows", "device", "memory_mb", "chosen", "why"),
    [
        (400_000, "cpu", 1024, None, "up to 400,000 are compared exactly on cpu"),
        (400_001, "cpu", 1024, "hnsw", "up to 400,000 are compared exactly on cpu"),
        (400_001, "cpu", 109, "hnsw", "up to 400,000 are compared exactly on cpu"),
        (400_001, "cpu", 108, "hnsw-sq8", "up to 400,000 are compared exactly on cpu"),
        (400_001, "cpu", 106, "hnsw-sq8", "up to 400,000 are compared exactly on cpu"),
        (400_001, "cpu", 105, None, "hnsw-sq8 needs 106 MB, mine.memory_mb is 105"),
        (400_001, "cuda", 1024, None, "up to 4,000,000 are compared exactly on cuda"),
        (4_000_001, "cuda", 4096, "hnsw", "up to 4,000,000 are compared exactly on cuda"),
    ],
)
def test_auto_picks_by_rows_device_and_memory_and_says_why(
    rows, device, memory_mb, chosen, why, caplog
):
    caplog.set_level(logging.INFO, "teachonce")
    settings = params(index="auto", memory_mb=memory_mb)
    index = mine.resolve(settings, rows=rows, dim=8, device=torch.device(device))
    assert (None if index is None else index["name"]) == chosen
    assert f"mine: index {chosen or 'flat'}: " in caplog.text
    assert why in caplog.text


def test_auto_does_not_begin_what_takes_days(world, monkeypatch):
    """All rows among all take 36 hours, of which 12 may be spent."""
    searcher = miner(world, params(index="auto"))
    rows = len(searcher.train)
    flat = self_join.FlatCost(seconds=36 * 3600, rows=rows)
    monkeypatch.setattr(self_join, "flat_cost", lambda *_: flat)
    assert isinstance(searcher.search(None, asked=rows, device=CPU), searches.FlatSearch)
    monkeypatch.setattr(mine, "EXACT_ROWS", {"cpu": rows - 1, "cuda": rows - 1})
    with pytest.raises(TeachonceError) as refused:
        searcher.search(None, asked=rows, device=CPU)
    assert str(refused.value).startswith(
        f"mine.most_hours: is 12, but exact search of {rows} rows among {rows} would take about 36 hours"
    )
    assert "set mine.pool: 1000 (about " in refused.value.cure
    assert "or mine.memory_mb: 0 for hnsw-sq8, or" in refused.value.cure
    # What is left of it takes a third of the time; and who says so may begin it.
    searcher.search(None, asked=rows // 3, device=CPU)
    searcher.params = searcher.params.model_copy(update={"index": "flat"})
    searcher.search(None, asked=rows, device=CPU)


@pytest.mark.parametrize(("hours", "pool"), [(13, 100_000), (1300, 92_000), (10**9, 1000)])
def test_the_pool_that_is_named_fits_into_the_hours(monkeypatch, hours, pool):
    rows = 10_000_000
    searcher = mine.Miner.__new__(mine.Miner)
    searcher.params, searcher.among = params(index="auto"), np.arange(rows)
    searcher.embeddings = SimpleNamespace(dim=384)
    cost = self_join.FlatCost(seconds=3600.0 * hours, rows=rows)
    monkeypatch.setattr(mine, "ExactCosts", lambda *_: SimpleNamespace(flat=cost))
    searcher.rows_of = None
    room = rows * (384 + 272) >> 20
    with pytest.raises(
        TeachonceError, match=f"set mine.pool: {pool} .* mine.memory_mb: {room} for"
    ):
        searcher._check_hours(rows, CPU)


def test_a_pool_has_rows_of_all_and_lists_are_those_of_comparing_with_it(world):
    _, corpus, embeddings, split = world
    settings = params(max_score=0.9).model_copy(update={"pool": 60})
    train = split.train_rows(corpus)
    [pool] = {tuple(rows) for rows in mine.pools_of(settings, corpus, {"text": train}).values()}
    assert len(pool) == 60
    assert set(pool) < set(train.tolist())
    assert list(pool) == sorted(pool)
    # All over the corpus: of the first and the last third about a third each.
    thirds = np.histogram(pool, bins=3, range=(0, corpus.rows))[0]
    assert min(thirds) > 10
    outcome, neighbours, scores = run(world, settings)
    vectors = embeddings.rows_of(np.arange(corpus.rows)).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in train.tolist():
        cosines = sorted((float(vectors[row] @ vectors[j]) for j in pool if j != row), reverse=True)
        kept = [cosine for cosine in cosines[:20] if cosine <= 0.9][:4]
        assert set(neighbours[row].tolist()) <= {*pool, NONE}
        assert scores[row][neighbours[row] != NONE] == pytest.approx(kept, abs=1e-5)
    assert outcome.facts["rejected"]["itself"] == 60


def test_a_pool_stays_as_it_is_when_the_corpus_grows_or_more_is_held_out(place):
    few, many = place.corpus(sentences(300)), place.corpus(sentences(330))
    texts = []
    for corpus, heldout in ((few, 0.1), (few, 0.3), (many, 0.1)):
        split = Split(corpus=corpus.manifest.content, heldout=heldout, evaluation=())
        rows = {"text": split.train_rows(corpus)}
        settings = params().model_copy(update={"pool": 100})
        texts.append({*corpus.take(mine.pools_of(settings, corpus, rows)["text"])})
    assert texts[0] == texts[1]
    assert 80 < len(texts[0] & texts[2]) < 100


def test_a_pool_as_large_as_the_corpus_gives_the_lists_of_all(world):
    _, plain, _ = run(world, params())
    _, pooled, _ = run(world, params(pool=1000))
    assert (plain == pooled).all()
    assert "pool" not in mine.recipe(params())
    assert mine.recipe(params(pool=1000))["pool"] == 1000


def test_a_pool_and_an_approximate_index_are_refused():
    with pytest.raises(ValueError, match="a pool is searched exactly: set index to auto or flat"):
        params(pool=1000, index="hnsw")


def test_a_plan_of_a_pool_grows_with_the_rows(monkeypatch):
    flat = self_join.FlatCost(seconds=2.0, rows=1000)
    monkeypatch.setattr(self_join, "flat_cost", lambda *_: flat)
    costs = mine.ExactCosts(params(pool=5000), lambda _: np.ones((1, 8)), 300, CPU)
    assert costs.seconds_for(1_000_000) == pytest.approx(2.0 * 5 * 1000)
    assert costs.seconds_for(4000) == pytest.approx(2.0 * 16)


def test_auto_stays_what_it_was_for_lists_that_exist():
    """`repair` on another device must not take the lists for ones of other settings."""
    settings, other = params(index="auto"), mine.recipe(params(), {"name": "hnsw"})
    assert mine.with_resolved_index(settings, other).index == "hnsw"
    assert mine.with_resolved_index(settings, mine.recipe(params())).index == "flat"
    assert mine.with_resolved_index(params(index="ivf"), other).index == "ivf"


@pytest.mark.parametrize(
    ("name", "needed", "cure"),
    [
        ("hnsw", 170, "hnsw-sq8 (62 MB), or flat"),
        ("ivf", 147, "hnsw-sq8 (62 MB), or flat"),
        ("hnsw-sq8", 125, "flat"),
    ],
)
def test_an_index_too_large_for_the_memory_is_refused(name, needed, cure):
    rows = 200_000 if name == "hnsw-sq8" else 100_000
    with pytest.raises(TeachonceError) as refused:
        mine.resolve(params(index=name, memory_mb=64), rows=rows, dim=384, device=CPU)
    assert refused.value.problem == f"is 64, but {name} needs {needed} MB for {rows:,} rows"
    assert refused.value.cure == f"set it to {needed} or more, or set mine.index: {cure}"


def clustered(rows, dim):
    """(rows, dim) unit vectors close to 20 centres: the nearest of each differ by little."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((20, dim))[draw.integers(0, 20, rows)]
    vectors = (vectors + 0.1 * draw.standard_normal((rows, dim))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def searched(folder, index, vectors, k, asked):
    """An index of some vectors, and what it finds."""
    (folder / "work").mkdir(exist_ok=True)
    file = searches.file_of(folder, index, "vectors", np.arange(len(vectors)))
    search = searches.ApproximateSearch(
        vectors.__getitem__, len(vectors), k, index=index, file=file
    )
    return search, search.nearest(asked)


@pytest.mark.parametrize("compared_bytes", [1 << 25, 1])
def test_candidates_of_a_small_index_are_compared_by_the_vectors(
    tmp_path, monkeypatch, compared_bytes
):
    """By bytes alone some of the nearest look farther; they are among more candidates."""
    monkeypatch.setattr(searches, "COMPARED_BYTES", compared_bytes)
    vectors, asked, k = clustered(2000, 16), np.arange(300), 10
    exact = searches.FlatSearch(vectors.__getitem__, 2000, k, block_rows=2000, device=CPU)
    ids, cosines = exact.nearest(asked)
    index = searches.index_settings("hnsw-sq8", rows=2000, k=k) | {"efSearch": k}
    search, found = searched(tmp_path, index, vectors, k, asked)
    recall = [searches.hits_in(found, (ids, cosines)).mean() / k]
    while search.look_at_more():
        found = search.nearest(asked)
        recall.append(searches.hits_in(found, (ids, cosines)).mean() / k)
    assert recall[0] < 0.8
    assert recall[-1] > 0.995
    for row, (ours, theirs) in enumerate(zip(found[0], ids, strict=True)):
        assert ours[0] == row
        known = dict(zip(theirs.tolist(), cosines[row].tolist(), strict=True))
        for place, cosine in zip(ours.tolist(), found[1][row].tolist(), strict=True):
            assert known.get(place, cosine) == cosine


def test_a_small_index_that_finds_too_few_fills_up_with_none(tmp_path):
    """Of a graph in pieces it sees one."""
    index = {"name": "hnsw-sq8", "M": 2, "efConstruction": 2, "efSearch": 800, "seed": 0}
    vectors = clustered(400, 8)
    _, (ids, cosines) = searched(tmp_path, index, vectors, 400, np.arange(9))
    assert (ids[:, 0] == np.arange(9)).any()
    assert (ids == NONE).any(axis=1).all()
    expected = np.where(ids == NONE, 0, (vectors[:9, None] * vectors[ids]).sum(axis=2))
    assert np.allclose(cosines, expected, atol=1e-6)


def test_lists_of_a_small_index_have_exact_cosines(world):
    """The same bits as those of exact search, also where a list holds all rows."""
    for range_max in (20, 500):
        _, exact, of_exact = run(world, params(range_max=range_max))
        _, found, scores = run(world, params(range_max=range_max, index="hnsw-sq8"))
        both = (found == exact) & (found != NONE)
        assert both.sum() > 0.95 * (exact != NONE).sum()
        assert (scores[both] == of_exact[both]).all()


@pytest.mark.parametrize("name", ["ivf", "hnsw", "hnsw-sq8"])
def test_approximate_lists_say_their_recall(world, name):
    outcome, neighbours, _ = run(world, params(index=name))
    exact = slow_lists(world, params())
    found = sum(len(set(neighbours[row].tolist()) & set(ids)) for row, ids in exact.items() if ids)
    assert outcome.facts["recall"] >= 0.9
    assert f"{name} with recall {outcome.facts['recall']:.3f}" in outcome.summary
    assert found / sum(map(len, exact.values())) > 0.85
    again, _, _ = run(world, params(index=name))
    assert again.facts == outcome.facts


@pytest.mark.parametrize(
    ("index", "setting"),
    [
        ({"name": "hnsw", "M": 2, "efConstruction": 4, "efSearch": 1}, "efSearch"),
        (
            {"name": "hnsw-sq8", "M": 2, "efConstruction": 4, "efSearch": 1, "seed": 0},
            "efSearch",
        ),
        ({"name": "ivf", "nlist": 7, "nprobe": 1, "seed": 0}, "nprobe"),
    ],
)
def test_an_index_looks_at_more_until_it_finds_enough(world, monkeypatch, caplog, index, setting):
    caplog.set_level(logging.INFO, "teachonce")
    monkeypatch.setattr(searches, "index_settings", lambda *_, **__: index)
    first, _, _ = run(world, params(index=index["name"], min_recall=0.01))
    assert f", with {setting} 1" in caplog.text
    for path in (world[0].root / "store").rglob("negatives/*/*.arrow"):
        path.unlink()
    enough = first.facts["recall"] + 0.05
    again, _, _ = run(world, params(index=index["name"], min_recall=enough))
    assert again.facts["recall"] >= enough
    assert int(re.findall(rf", with {setting} (\d+)", caplog.text)[-1]) > 1


def test_an_index_that_finds_too_little_is_refused_before_anything_is_mined(world, monkeypatch):
    poor = {"name": "ivf", "nlist": 7, "nprobe": 1, "seed": 0}
    monkeypatch.setattr(searches, "index_settings", lambda *_, **__: poor)
    monkeypatch.setattr(searches, "MOST_EFFORT", 1)
    with pytest.raises(
        TeachonceError,
        match=r"(?s)ivf found 0\.\d+ .*0.9 are wanted.*index: flat, which takes about \d+:\d\d here",
    ):
        run(world, params(index="ivf"))
    place = world[0]
    assert not list((place.root / "store").rglob("negatives/*/*.arrow"))
    outcome, _, _ = run(world, params(index="ivf", min_recall=0.01))
    assert 0.05 < outcome.facts["recall"] < 0.9
    # The lists are there now; a higher wish is checked against what was measured then.
    with pytest.raises(TeachonceError, match=r"ivf found 0\.\d+"):
        run(world, params(index="ivf"))


MEASURE = """
import json, sys, threading, time
from pathlib import Path
import numpy as np
import torch
from stages import mine
from stages.mining import self_join
from stages.mining.faiss_search import load_faiss
from stages.params import MineParams

torch.set_num_threads(1)
vectors = np.load(sys.argv[1], mmap_mode="r")

class Cache:
    dim = vectors.shape[1]
    def rows_of(self, ids): return vectors[ids]

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def peak_of(work):
    before, peak, done = anonymous(), [0.0], threading.Event()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous() - before)
            time.sleep(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak[0]

params = MineParams.model_validate(json.loads(sys.argv[2]))
miner = mine.Miner(params, corpus=None, embeddings=Cache(), train=np.arange(len(vectors)))
small = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
def join(rows_of, rows, k):
    for _ in self_join.SelfJoin(rows_of, rows, k, device=torch.device("cpu"), product=torch.bfloat16).run():
        pass
faiss = load_faiss()
faiss.omp_set_num_threads(1)
join(lambda rows: small[rows], 64, 4)  # what the libraries allocate once
faiss.knn(small, small, 4, faiss.METRIC_INNER_PRODUCT)
asked = np.arange(miner.query_rows)
flat = peak_of(lambda: miner.flat(torch.device("cpu")).nearest(asked))
joined = peak_of(lambda: join(miner.rows_of, len(vectors), miner.k))
print(json.dumps({"flat": flat, "joined": joined, "asked": len(asked)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_setting(tmp_path):
    """Of 12,000 vectors that take 94 MB in float32: the rows of one search, and a whole self-join."""
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(12_000, 2048)).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    settings = params(range_max=32).model_dump_json()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "vectors.npy"), settings],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = json.loads(done.stdout)
    assert peak["asked"] > 500, peak
    assert peak["flat"] < 64
    assert (
        vectors.nbytes / 2**20 < peak["joined"] < self_join.join_bytes(12_000, 33, 2048, 2) / 2**20
    )


@pytest.mark.parametrize(
    ("changes", "cures"),
    [
        ({"max_score": 0.2}, "raise mine.max_score (0.2), or raise mine.range_max (20), or "),
        ({"min_score": 0.999, "max_score": 1.0}, "lower mine.min_score (0.999), or "),
        ({"range_max": 500, "neighbours": 400, "max_score": 1.0}, ""),
        (
            {"range_max": 20, "neighbours": 10, "range_min": 10},
            "raise mine.max_score (0.95), or lower mine.range_min (10), or raise mine.range_max (20), or ",
        ),
    ],
)
def test_short_lists_are_told_with_what_would_fill_them(world, caplog, changes, cures):
    settings = params(**changes)
    outcome, *_ = run(world, settings)
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    facts = outcome.facts
    assert message.startswith(
        f"mine: {facts['short_lists']:,} of {facts['rows']:,} lists have fewer than "
        f"{settings.neighbours} negatives"
    )
    assert message.endswith(f": {cures}lower mine.neighbours ({settings.neighbours})")
    left_out = {rule: count for rule, count in facts["rejected"].items() if rule != "itself"}
    for rule, count in left_out.items():
        assert (f"{count:,} {rule}" in message) == (count > 0)


def test_a_few_short_lists_are_told_in_the_summary_alone(world, caplog):
    outcome, *_ = run(world, params())
    assert outcome.facts["short_lists"] == 0
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_short_lists_are_padded_and_counted(world):
    outcome, neighbours, scores = run(world, params(min_score=0.999, max_score=1.0))
    assert outcome.facts["short_lists"] > 200
    assert outcome.facts["rejected"]["below_min_score"] > 1000
    empty = neighbours[:, 0] == NONE
    assert (neighbours[empty] == NONE).all()
    assert (scores[empty] == 0).all()


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_where_no_row_takes_part_all_lists_are_empty(world, index):
    place, corpus, embeddings, split = world
    nobody = split.model_copy(update={"evaluation": tuple(range(corpus.rows))})
    outcome, neighbours, _ = run((place, corpus, embeddings, nobody), params(index=index))
    assert outcome.facts["negatives"] == outcome.facts["rows"] == 0
    assert (neighbours == NONE).all()


def test_mined_shards_are_found_again(world):
    place = world[0]
    first, _, _ = run(world, params())
    before = (place.root / "negatives.json").read_bytes()
    again, _, _ = run(world, params(memory_mb=128))
    assert (place.root / "negatives.json").read_bytes() == before
    assert again.summary.endswith(f"0 shards mined, {len(world[1].objects)} found in the store")
    assert again.facts == first.facts


@pytest.mark.parametrize("pool", [None, 100])
def test_shares_make_what_one_run_makes(world, pool):
    place, corpus, _, _ = world
    settings = params().model_copy(update={"pool": pool})
    shards = len(corpus.objects)
    second = run(world, settings, ShardSlice(2, 2))
    assert second.stage == "mine --shards 2/2"
    assert second.facts["shards_mined"] == shards // 2
    assert "`teachonce mine` writes it when all 2 shares are done" in second.summary
    assert not (place.root / "negatives.json").exists()
    first = run(world, settings, ShardSlice(1, 2))
    assert first.facts["shards_mined"] == shards - shards // 2
    again = run(world, settings, ShardSlice(1, 2))
    assert again.facts["shards_mined"] == 0
    outcome, neighbours, scores = run(world, settings)
    assert outcome.summary.endswith(f"0 shards mined, {shards} found in the store")
    for path in (place.root / "store").rglob("negatives/*/*.arrow"):
        path.unlink()
    whole, expected, expected_scores = run(world, settings)
    assert whole.facts == outcome.facts
    assert (neighbours == expected).all()
    assert scores == pytest.approx(expected_scores, abs=1e-6)


def test_the_report_has_quantiles_of_the_scores_kept(world):
    outcome, neighbours, scores = run(world, params())
    kept = scores[neighbours != NONE]
    for quantile, value in outcome.facts["score_quantiles"].items():
        assert value == pytest.approx(float(np.quantile(kept, float(quantile))), abs=0.003)


def test_first_allowed_entries_are_kept_in_order():
    found = np.array([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    cosines = np.array([[0.9, 0.8, 0.7, 0.6]] * 3, np.float32)
    allowed = np.array([[1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    ids, scores = filters.keep_first(found, cosines, allowed, 2)
    assert ids.tolist() == [[5, 7], [8, NONE], [NONE, NONE]]
    assert np.allclose(scores, [[0.9, 0.7], [0.6, 0], [0, 0]])
    wide, _ = filters.keep_first(found, cosines, allowed, 6)
    assert wide[0].tolist() == [5, 7, 8, NONE, NONE, NONE]


def index_files(world):
    return sorted((world[0].root / "store/work").glob("*.faiss"))


@pytest.mark.parametrize("name", ["ivf", "hnsw", "hnsw-sq8"])
def test_an_index_is_built_once_for_all_shares_and_removed_at_the_end(world, monkeypatch, name):
    settings, built = params(index=name), []
    build = searches.built_index
    monkeypatch.setattr(searches, "built_index", lambda *args: built.append(1) or build(*args))
    run(world, settings, ShardSlice(1, 2))
    [file] = index_files(world)
    run(world, settings, ShardSlice(2, 2))
    assert index_files(world) == [file]
    assert len(built) == 1
    outcome, *_ = run(world, settings)
    assert outcome.facts["recall"] >= 0.9
    assert not index_files(world)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda c: c[:99] + b"x" + c[100:]]
)
def test_a_damaged_index_is_built_again(world, monkeypatch, damage):
    settings = params(index="hnsw")
    run(world, settings, ShardSlice(1, 2))
    [file] = index_files(world)
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(damage(whole))
    run(world, settings, ShardSlice(2, 2))
    assert index_files(world) == [file]
    assert len(file.read_bytes()) == len(whole)
    assert "faiss" in str(file)


def test_an_index_is_named_by_what_it_is_made_of(tmp_path):
    rows, index = np.arange(9), {"name": "ivf", "nlist": 7, "nprobe": 1, "seed": 0}
    name = searches.file_of(tmp_path, index, "v", rows)
    assert name == searches.file_of(tmp_path, index | {"nprobe": 5}, "v", np.arange(9))
    others = [(index | {"nlist": 8}, "v", rows), (index, "w", rows), (index, "v", rows[1:])]
    assert name not in {searches.file_of(tmp_path, *other) for other in others}


def test_an_ivf_index_looks_at_few_lists_first(world, caplog, monkeypatch):
    """And at an eighth only where that is what finds enough."""
    caplog.set_level(logging.INFO, "teachonce")
    index = {"name": "ivf", "nlist": 7, "nprobe": 4, "seed": 0}
    monkeypatch.setattr(searches, "index_settings", lambda *_, **__: index)
    monkeypatch.setattr(searches, "FIRST_PROBED", 1)
    for least, probed in ((0.01, 1), (1.0, 8)):
        run(world, params(index="ivf", min_recall=least), ShardSlice(1, 2))
        assert f", with nprobe {probed}" in caplog.text
        for path in (world[0].root / "store").rglob("negatives/*/*.arrow"):
            path.unlink()
