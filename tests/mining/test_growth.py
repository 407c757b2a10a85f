"""Growth: lists merged from earlier ones are those of mining anew, bit by bit."""

import hashlib
import re

import numpy as np
import pytest
import torch

from stages import mine
from stages.mining import cosines, growth
from storage import negatives
from storage.embeddings import Embeddings
from storage.manifest import Manifest
from storage.negatives import NONE, Negatives, parent_of
from storage.split import Split
from tests.conftest import HashTeacher, sentences
from tests.stages.test_mine import params

CPU = torch.device("cpu")


class Rough(HashTeacher):
    """A teacher of clusters, in which many texts have equal vectors, or nearly so."""

    def vector(self, text):
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
        centre = super().vector(f"centre {number % 7}")
        within = super().vector(f"within {number % 101}")
        noise = super().vector(text) if number % 3 else 0
        vector = centre + 0.5 * within + 0.01 * noise
        return vector / np.linalg.norm(vector)


def grown(place, texts, settings, *, evaluation=(3, 8), heldout=0.1, dim=8):
    """Shard, embed, split and mine `texts`; returns the summary and the manifest of the lists."""
    corpus = place.corpus(texts)
    place.embed(corpus, Rough(dim))
    embeddings = Embeddings(place.store, place.embeddings, corpus)
    split = Split(corpus=corpus.manifest.content, heldout=heldout, evaluation=evaluation)
    out = place.root / "negatives.json"
    outcome = mine.run(
        settings,
        corpus=corpus,
        embeddings=embeddings,
        split=split,
        store=place.store,
        device=CPU,
        out=out,
        facts=place.root / "mine-facts.json",
    )
    manifest = Manifest.load(out, "negatives")
    Negatives(place.store, manifest, corpus, mined_from=parent_of(embeddings.manifest, split))
    return outcome, manifest


def anew(place, monkeypatch, texts, settings, **split):
    """As `grown`, with the lists of these texts deleted, and no thought of earlier ones."""
    manifest = Manifest.load(place.root / "negatives.json", "negatives")
    for entry in manifest.objects:
        place.store.path(entry.key).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(mine, "_earlier", lambda *_: None)
        return grown(place, texts, settings, **split)


def counts_in(outcome):
    """How many lists were kept, merged and searched."""
    found = re.search(r"([\d,]+) kept and ([\d,]+) merged, ([\d,]+) searched", outcome.summary)
    assert found, outcome.summary
    return [int(number.replace(",", "")) for number in found.groups()]


TEXTS = sentences(460)
OLD, NEW = TEXTS[:420], TEXTS[420:]
GROWN = {
    "end": (OLD + NEW, (3, 8)),
    "front": (NEW + OLD, (43, 48)),
    "between": (OLD[:100] + NEW[:7] + OLD[100:250] + NEW[7:] + OLD[250:], (3, 8)),
    "texts of before": (OLD + NEW[:20] + OLD[:20], (3, 8, 443, 448)),
    "one": ([*OLD, NEW[0]], (3, 8)),
    "found in evaluation": (OLD + NEW, (3, 8, 425)),
}


@pytest.mark.parametrize("how", list(GROWN))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_score": 1.0},
        {"range_min": 3},
        {"min_score": 0.7},
        {"min_score": 0.97, "max_score": 0.99},
        {"min_score": 0.6, "range_min": 2, "neighbours": 8},
        {"neighbours": 20},
        {"neighbours": 7, "max_score": 0.8},
        {"range_max": 127, "min_score": 0.0},
    ],
)
def test_lists_of_a_grown_corpus_are_those_of_mining_anew(place, monkeypatch, how, changes):
    settings, (texts, evaluation) = params(**changes), GROWN[how]
    grown(place, OLD, settings)
    outcome, merged = grown(place, texts, settings, evaluation=evaluation)
    assert sum(counts_in(outcome)) == outcome.facts["rows"]
    again, expected = anew(place, monkeypatch, texts, settings, evaluation=evaluation)
    assert merged.objects == expected.objects
    assert outcome.facts == again.facts


@pytest.mark.parametrize("rows_at_once", [8192, 5])
def test_a_shard_of_new_rows_alone(place, monkeypatch, rows_at_once):
    monkeypatch.setattr(mine, "MERGED_ROWS", 1)  # a shard at a time
    monkeypatch.setattr(growth, "ROWS_AT_ONCE", rows_at_once)
    grown(place, OLD, params())
    outcome, merged = grown(place, OLD + NEW, params())
    assert counts_in(outcome)[2] < 200
    _, expected = anew(place, monkeypatch, OLD + NEW, params())
    assert merged.objects == expected.objects


@pytest.mark.parametrize("changes", [{}, {"min_score": 0.8}, {"range_min": 2}])
def test_where_few_rows_come_few_are_searched(place, monkeypatch, changes):
    """Of 3,000 rows in 32 dimensions with 6 new ones, nearly all lists are kept as they were."""
    settings, texts = params(**changes, max_score=0.999), sentences(3006)
    grown(place, texts[:3000], settings, dim=32)
    outcome, merged = grown(place, texts, settings, dim=32)
    kept, changed, searched = counts_in(outcome)
    assert kept + changed + searched == outcome.facts["rows"]
    assert searched < 0.1 * kept
    assert changed > 0 or settings.range_min
    _, expected = anew(place, monkeypatch, texts, settings, dim=32)
    assert merged.objects == expected.objects


@pytest.mark.parametrize("size", [60, 200])
@pytest.mark.parametrize("changes", [{}, {"min_score": 0.7}, {"range_min": 3}])
def test_a_pool_that_rows_join_and_leave(place, monkeypatch, size, changes):
    settings = params(**changes).model_copy(update={"pool": size})
    texts = OLD + NEW[:20]
    grown(place, OLD, settings)
    outcome, merged = grown(place, texts, settings)
    # With min_score, a window may reach below it once somebody left, so more rows are searched.
    assert counts_in(outcome)[0] > (0 if settings.min_score else 50)
    assert sum(counts_in(outcome)) == outcome.facts["rows"]
    _, expected = anew(place, monkeypatch, texts, settings)
    assert merged.objects == expected.objects


def test_a_pool_that_stays_is_not_searched_for_those_who_asked_before(place):
    settings = params().model_copy(update={"pool": 60})
    _, before = grown(place, OLD, settings)
    corpus = place.corpus(OLD)
    last = corpus.text_keys[mine.pools_of(settings, corpus, {"text": np.arange(420)})["text"]]
    least = np.frombuffer(last.tobytes(), "<u8")[1::2].min()
    keys = place.corpus(NEW).text_keys
    outside = np.frombuffer(keys.tobytes(), "<u8")[1::2] < least
    texts = OLD + [text for text, is_outside in zip(NEW, outside, strict=True) if is_outside]
    outcome, _ = grown(place, texts, settings)
    kept, changed, searched = counts_in(outcome)
    assert (changed, kept) == (0, outcome.facts["rows"] - searched)
    assert before.rows == 420


@pytest.mark.parametrize(
    ("texts", "split"),
    [
        (OLD[1:] + NEW, {"evaluation": (2, 7)}),  # a text is gone
        (OLD[200:] + OLD[:200] + NEW, {"evaluation": (223, 228)}),  # another order
        (OLD + NEW, {"heldout": 0.2}),
        (OLD + NEW, {"evaluation": (3, 9)}),
        (OLD + sentences(400, seed=1), {}),  # mostly new
    ],
)
def test_what_is_no_growth_is_mined_anew(place, monkeypatch, texts, split):
    grown(place, OLD, params())
    outcome, made = grown(place, texts, params(), **split)
    assert "earlier" not in outcome.summary
    _, expected = anew(place, monkeypatch, texts, params(), **split)
    assert made.objects == expected.objects


def test_lists_of_other_settings_or_of_an_index_are_no_earlier_lists(place):
    grown(place, OLD, params())
    for other in (params(neighbours=5), params(index="hnsw")):
        outcome, _ = grown(place, OLD + NEW, other)
        assert "earlier" not in outcome.summary
    outcome, _ = grown(place, sentences(500), params(index="hnsw"))
    assert "earlier" not in outcome.summary


def test_lists_without_counts_are_read_and_not_merged(place, monkeypatch):
    """Those that older versions made."""
    with monkeypatch.context() as patch:
        put = negatives.put_negatives
        patch.setattr(mine, "put_negatives", lambda *a, rejected, **k: put(*a, rejected=None, **k))
        _, old = grown(place, OLD, params())
    names = place.store.open(old.objects[0]).schema.names
    assert names == ["text_key", "neighbours", "scores"]
    outcome, _ = grown(place, OLD + NEW, params())
    assert "earlier" not in outcome.summary


def test_earlier_lists_that_are_damaged_or_gone_are_done_without(place, monkeypatch, caplog):
    caplog.set_level("INFO", "teachonce")
    _, old = grown(place, OLD, params())
    place.store.path(old.objects[2].key).unlink()
    outcome, made = grown(place, OLD + NEW, params())
    assert "earlier lists cannot be read" in caplog.text
    assert "earlier" not in outcome.summary
    _, expected = anew(place, monkeypatch, OLD + NEW, params())
    assert made.objects == expected.objects


def test_other_vectors_of_an_earlier_text_are_noticed(place, caplog):
    """Such as of another copy: the parent of the lists says which they were made of."""
    caplog.set_level("INFO", "teachonce")
    grown(place, OLD, params())
    now = place.corpus(OLD + NEW)
    earlier_vectors = place.embeddings
    before = Embeddings(place.store, earlier_vectors, place.corpus(OLD))
    place.embed(now, Rough(8))
    after = Embeddings(place.store, place.embeddings, now)
    ids = np.arange(420)
    assert growth._are_equal(before, after, ids)
    # As far as objects differ: each row of the old last shard must have its vector in the new one.
    assert not growth._are_equal(before, after, np.where(ids == 419, 425, ids))
    assert growth._are_equal(before, after, np.where(ids == 419, NONE, ids))


@pytest.mark.parametrize("dim", [8, 24])
def test_every_way_gives_the_same_bits(place, monkeypatch, dim):
    """FAISS in one block and in many, groups of any size, and a self-join in two types."""
    settings = params(range_max=9, neighbours=8)
    _, made = grown(place, OLD, settings, dim=dim)
    init = mine.Miner.__init__

    def in_small_blocks(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.block_rows, self.query_rows = 37, 50

    with monkeypatch.context() as patch:
        patch.setattr(mine.Miner, "__init__", in_small_blocks)
        _, blocks = anew(place, monkeypatch, OLD, settings, dim=dim)
    monkeypatch.setattr(mine, "FEWEST_JOINED", 1)
    from stages.mining import self_join

    monkeypatch.setattr(self_join, "seconds_of_tiles", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(mine.Miner, "flat", lambda *_: pytest.fail("FAISS was asked for"))
    _, joined = anew(place, monkeypatch, OLD, settings, dim=dim)
    assert made.objects == blocks.objects == joined.objects


def test_pairs_are_those_not_below_their_limits(monkeypatch):
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(70, 12)).astype(np.float32)
    rows /= cosines.lengths(rows)
    limits = draw.uniform(-1, 1, 30).astype(np.float32)
    others = np.arange(5, 70)
    monkeypatch.setattr(cosines, "TILE", (8, 7))
    at, found, cosine = cosines.close_pairs(rows[:30], limits, lambda ids: rows[ids], others)
    every = rows[:30] @ rows[others].T
    expected = {(i, j + 5) for i, j in zip(*np.nonzero(every >= limits[:, None]), strict=True)}
    assert {*zip(at.tolist(), found.tolist(), strict=True)} == expected
    assert cosine == pytest.approx(every[at, found - 5], abs=1e-6)


def test_a_cosine_has_the_same_bits_in_every_company():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(300, 384)).astype(np.float32)
    rows /= cosines.lengths(rows)
    whole = cosines.exact_of(rows, rows, np.tile(np.arange(300), (300, 1)))
    assert (whole == whole.T).all()
    for first, last in ((0, 1), (3, 20), (100, 300)):
        places = np.tile(np.arange(7, 91), (last - first, 1))
        assert (
            cosines.exact_of(rows[first:last], rows[:91], places) == whole[first:last, 7:91]
        ).all()
    assert (cosines.lengths(rows[5:6]) == cosines.lengths(rows)[5:6]).all()
