"""Readings in the store: cut by content, named by what is in them, held out with their texts."""

import numpy as np
import pytest

from storage.corpus import text_key
from storage.errors import DamagedError
from storage.manifest import Manifest
from storage.readings import Reading, Readings, cut_readings, key_of_readings, put_readings
from storage.split import Split
from storage.tokens import Tokens, put_tokens
from tests.conftest import sentences


def open_readings(place, corpus, pairs, *, rows_per_shard=16, role="text"):
    """Of (text, reading) pairs, as `shard` would leave them."""
    rows = [Reading(text_key(text, role), reading) for text, reading in pairs]
    objects = tuple(
        put_readings(place.store, shard, role) for shard in cut_readings(rows, rows_per_shard)
    )
    manifest = Manifest(kind="readings", recipe={}, parent=corpus.manifest.content, objects=objects)
    manifest.save(place.root / "readings.json", place.store)
    return Readings(place.store, manifest, corpus)


def test_each_reading_is_found_at_its_text_whatever_their_order(place):
    texts = sentences(100)
    corpus = place.corpus(texts)
    pairs = [(text, f"{n} {text}") for n in (2, 1) for text in reversed(texts[::3])]
    readings = open_readings(place, corpus, pairs)
    assert readings.rows == len(pairs)
    assert len(readings.objects) > 2
    ids = np.arange(len(pairs))
    assert readings.take(ids) == [reading for _, reading in pairs]
    assert corpus.take(readings.rows_read()) == [text for text, _ in pairs]


def test_a_reading_more_moves_the_shard_around_it_alone(place):
    pairs = [Reading(text_key(text), f"a {text}") for text in sentences(300)]
    before = [key_of_readings(shard) for shard in cut_readings(pairs, 16)]
    pairs.insert(150, Reading(text_key("another"), "a reading"))
    after = [key_of_readings(shard) for shard in cut_readings(pairs, 16)]
    assert len({*before} - {*after}) <= 2
    assert len(before) > 10


def test_a_key_is_of_texts_readings_and_role():
    one, other = Reading(text_key("a text"), "a reading"), Reading(text_key("b text"), "a reading")
    keys = [
        key_of_readings([one]),
        key_of_readings([other]),
        key_of_readings([one._replace(reading="another")]),
        key_of_readings([one], "query"),
        key_of_readings([one, other]),
    ]
    assert len(set(keys)) == 5
    assert one.key != other.key


def test_token_ids_of_readings_stand_beside_them(place):
    corpus = place.corpus(sentences(20))
    readings = open_readings(place, corpus, [(text, f"a {text}") for text in corpus.texts(0)])
    entry = put_tokens(
        place.store,
        f"tokens/{'0' * 40}/{readings.shard_digest(0)}.arrow",
        ids=[[[row] for row in range(readings.objects[0].rows)]],
        text_keys=readings.text_keys_in([0]),
    )
    first = Manifest(
        kind="readings",
        recipe={},
        parent=corpus.manifest.content,
        objects=readings.objects[:1],
    )
    tokens = Tokens(place.store, [entry], Readings(place.store, first, corpus))
    assert [row.tolist() for row in tokens.rows_of(np.array([3, 1]))] == [[3], [1]]


def test_readings_of_another_corpus_are_refused(place):
    texts = sentences(40)
    readings = open_readings(place, place.corpus(texts), [(texts[0], "a reading")])
    with pytest.raises(DamagedError, match="made for another corpus"):
        Readings(place.store, readings.manifest, place.corpus(texts[1:]))


def test_a_reading_of_no_text_is_damage(place):
    texts = sentences(40)
    readings = open_readings(
        place, place.corpus(texts), [(texts[0], "a reading"), ("no text of it", "another")]
    )
    with pytest.raises(DamagedError, match="reading 1 is of a text that the corpus does not have"):
        readings.rows_read()


def slowly_learned(corpus, split, pairs):
    """By the definition: what may be learned from, and what is held out."""
    train = set(corpus.take(split.train_rows(corpus)))
    heldout = set(corpus.take(split.heldout_rows(corpus)))
    unseen = {text for s in range(len(corpus.objects)) for text in corpus.texts(s)} - train
    unseen |= {reading for text, reading in pairs if text not in train}
    learned = [
        n for n, (text, reading) in enumerate(pairs) if text in train and reading not in unseen
    ]
    judged = [
        n for n, (text, reading) in enumerate(pairs) if text in heldout and reading not in train
    ]
    return learned, judged


def test_no_reading_of_a_held_out_text_is_learned_from(place):
    texts = sentences(200)
    corpus = place.corpus(texts)
    split = Split(corpus=corpus.manifest.content, heldout=0.3, evaluation=(0, 7))
    draw = np.random.default_rng(0)
    pairs = [(text, f"{n} {text}") for n in range(2) for text in texts]
    # Readings that are texts, of all kinds, and readings that several texts share.
    pairs += list(zip(texts, draw.permutation(texts).tolist(), strict=True))
    pairs += [(text, f"shared {n % 40}") for n, text in enumerate(texts)]
    readings = open_readings(place, corpus, pairs)
    learned, judged = slowly_learned(corpus, split, pairs)
    assert readings.learned(split).tolist() == learned
    assert readings.heldout(split).tolist() == judged
    assert 200 < len(learned) < len(pairs) - len(judged)
    assert len(judged) > 100


def test_a_reading_is_compared_with_texts_of_every_role(place):
    texts = sentences(60)
    corpus = place.corpus({"query": texts[:30], "document": texts[30:]})
    split = Split(corpus=corpus.manifest.content, heldout=0.3, evaluation=())
    heldout = corpus.take(split.heldout_rows(corpus))
    learned = corpus.take(split.train_rows(corpus))
    of = next(text for text in texts[30:] if text in learned)
    query = next(text for text in texts[:30] if text in heldout)
    readings = open_readings(place, corpus, [(of, query), (of, "keywords")], role="document")
    assert readings.learned(split).tolist() == [1]
    assert readings.role_of(0) == "document"
