"""Mining: exact, bounded in memory, and never a row's own text."""

import numpy as np
import pytest

from stages import mine
from stages.params import MineParams
from storage.embeddings import Embeddings
from storage.manifest import Manifest
from storage.negatives import NONE, Negatives
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
            "memory_mb": 64,
        }
        | changes
    )


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


def run(world, settings):
    place, corpus, embeddings, split = world
    outcome = mine.run(
        settings,
        corpus=corpus,
        embeddings=embeddings,
        split=split,
        store=place.store,
        out=place.root / "negatives.json",
        facts=place.root / "mine-facts.json",
    )
    manifest = Manifest.load(place.root / "negatives.json", "negatives")
    negatives = Negatives(
        place.store, manifest, corpus, mined_from=mine.parent_of(embeddings, split)
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


@pytest.mark.parametrize(
    "changes", [{}, {"range_min": 3}, {"min_score": 0.7}, {"neighbours": 7, "max_score": 0.8}]
)
def test_lists_are_those_of_comparing_every_pair(world, changes):
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
    rejected = mine.reject(
        params(max_score=1.0), found, cosines, own=np.array([0, 2]), text_keys=keys
    )
    assert rejected["itself"].tolist() == [[True, False, False], [False, True, False]]
    assert rejected["same_text"].tolist() == [[False, True, False], [True, False, False]]


def test_blocks_under_a_memory_setting_give_the_same_lists(world):
    _, corpus, embeddings, split = world
    settings = params()
    whole = mine.Search(
        settings, corpus=corpus, embeddings=embeddings, train=split.train_rows(corpus)
    )
    blocks = mine.Search(
        settings, corpus=corpus, embeddings=embeddings, train=split.train_rows(corpus)
    )
    blocks.block_rows = 37
    queries = whole.unit_rows(np.arange(50))
    vectors = whole.unit_rows(np.arange(corpus.rows))
    ids, cosines = blocks.nearest(queries)
    assert np.allclose(np.einsum("qd,qkd->qk", queries, vectors[ids]), cosines, atol=1e-5)
    assert np.allclose(whole.nearest(queries)[1], blocks.nearest(queries)[1], atol=1e-6)


def test_short_lists_are_padded_and_counted(world):
    outcome, neighbours, scores = run(world, params(min_score=0.999, max_score=1.0))
    assert outcome.facts["short_lists"] > 200
    assert outcome.facts["rejected"]["below_min_score"] > 1000
    empty = neighbours[:, 0] == NONE
    assert (neighbours[empty] == NONE).all()
    assert (scores[empty] == 0).all()


def test_mined_shards_are_found_again(world):
    place = world[0]
    first, _, _ = run(world, params())
    before = (place.root / "negatives.json").read_bytes()
    again, _, _ = run(world, params(memory_mb=128))
    assert (place.root / "negatives.json").read_bytes() == before
    assert again.summary.endswith(f"0 shards mined, {len(world[1].objects)} found in the store")
    assert again.facts == first.facts


def test_the_report_has_quantiles_of_the_scores_kept(world):
    outcome, neighbours, scores = run(world, params())
    kept = scores[neighbours != NONE]
    for quantile, value in outcome.facts["score_quantiles"].items():
        assert value == pytest.approx(float(np.quantile(kept, float(quantile))), abs=0.003)


def test_first_allowed_entries_are_kept_in_order():
    found = np.array([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    cosines = np.array([[0.9, 0.8, 0.7, 0.6]] * 3, np.float32)
    allowed = np.array([[1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    ids, scores = mine.keep_first(found, cosines, allowed, 2)
    assert ids.tolist() == [[5, 7], [8, NONE], [NONE, NONE]]
    assert np.allclose(scores, [[0.9, 0.7], [0.6, 0], [0, 0]])
    wide, _ = mine.keep_first(found, cosines, allowed, 6)
    assert wide[0].tolist() == [5, 7, 8, NONE, NONE, NONE]
