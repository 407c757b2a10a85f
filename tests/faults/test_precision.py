"""Exactly what is damaged is made again, and nothing that is no negative is ever mined."""

import random

import numpy as np
import pytest

from storage.column import text_keys_of
from storage.embeddings import Embeddings
from storage.negatives import NONE, Negatives, parent_of
from storage.upkeep.examination import quarantine
from tests.conftest import HashTeacher, Place, sentences
from tests.faults.samples import FILES, mine_params, mined, split_of


def test_exactly_what_is_damaged_is_made_again(tmp_path, count):
    """k of n shards damaged or lost: k are embedded, byte-equal; the others are not touched."""
    place = Place(tmp_path)
    corpus = place.corpus(sentences(400), rows_per_shard=16)
    place.embed(corpus, HashTeacher(4), files=FILES)
    manifest = (tmp_path / "embeddings.json").read_bytes()
    entries = place.embeddings.objects
    assert len(entries) >= 15
    contents = {entry.key: place.store.path(entry.key).read_bytes() for entry in entries}
    draw = random.Random(0)
    for number in range(len(entries) + 1):
        chosen = {entry.key for entry in draw.sample(entries, number)}
        for place_of, key in enumerate(sorted(chosen)):
            path = place.store.path(key)
            path.chmod(0o644)
            damaged = bytearray(contents[key])
            damaged[contents[key].index(b"ARROW1", 8) - 400] ^= 1
            path.write_bytes(damaged if place_of % 3 else damaged[:-9])
            if place_of % 3 == 2:
                path.unlink()
        before = {key: place.store.path(key).stat().st_mtime_ns for key in contents.keys() - chosen}
        for key in contents:
            quarantine(place.store, key)
        teacher = HashTeacher(4)
        outcome = place.embed(corpus, teacher, files=FILES)
        assert outcome.facts["shards_embedded"] == number
        assert teacher.texts_seen == sum(e.rows for e in entries if e.key in chosen)
        assert {key: place.store.path(key).read_bytes() for key in contents} == contents
        assert all(place.store.path(key).stat().st_mtime_ns == then for key, then in before.items())
        assert (tmp_path / "embeddings.json").read_bytes() == manifest
    damaged = len(entries) * (len(entries) + 1) // 2
    count("damaged shards among whole ones", damaged, "left, or a whole one made again")


class Twins(HashTeacher):
    """Texts that differ in a final mark only get nearly the same vector."""

    def vector(self, text):
        plain = super().vector(text.rstrip("!"))
        return plain if text == text.rstrip("!") else plain + 0.01 * super().vector(text)


@pytest.mark.parametrize(("seed", "max_score"), [(0, 0.95), (1, 1.0)])
def test_only_negatives_are_mined(tmp_path, seed, max_score, count):
    """Of 10,000 rows 5 % are near duplicates and 5 % duplicates of others; half a million pairs each.

    Where near duplicates are allowed, equal texts are found out by their keys alone.
    """
    draw = np.random.default_rng(seed)
    texts = sentences(9_000, seed=seed)
    planted = draw.choice(9_000, 1_000, replace=False)
    near, equal = planted[:500], planted[500:]
    texts += [f"{texts[row]}!" for row in near] + [texts[row] for row in equal]
    texts = [texts[row] for row in draw.permutation(len(texts))]
    place = Place(tmp_path)
    corpus = place.corpus(texts, rows_per_shard=2_000)
    place.embed(corpus, Twins(8), files=FILES)
    embeddings = Embeddings(place.store, place.embeddings, corpus)
    split = split_of(corpus).model_copy(update={"evaluation": tuple(range(0, 10_000, 50))})
    params = mine_params().model_copy(
        update={"neighbours": 60, "range_max": 70, "max_score": max_score}
    )
    manifest = mined(place, corpus, params, split)
    negatives = Negatives(
        place.store, manifest, corpus, mined_from=parent_of(embeddings.manifest, split)
    )
    found, scores = negatives.rows_of(np.arange(corpus.rows))
    rows, columns = np.nonzero(found != NONE)
    ids = found[rows, columns]
    train = np.zeros(corpus.rows, bool)
    train[split.train_rows(corpus)] = True
    assert train[ids].all()
    assert train[rows].all()
    assert (ids != rows).all()
    plain = np.array([hash(text.rstrip("!")) for text in texts])
    assert (plain[ids] != plain[rows]).all() == (max_score < 1)
    keys = np.concatenate([text_keys_of(corpus.batch(s)) for s in range(len(corpus.objects))])
    assert (keys[ids] != keys[rows]).all()
    assert (scores[rows, columns] <= params.max_score).all()
    vectors = embeddings.rows_of(np.arange(corpus.rows)).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (vectors[ids] * vectors[rows]).sum(axis=1)
    assert np.allclose(cosines, scores[rows, columns], atol=1e-5)
    assert len(ids) > 400_000
    never = "itself, a duplicate, a near duplicate, no row or a row that takes no part"
    count("mined pairs", len(ids), never)
