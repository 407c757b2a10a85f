"""Texts that older shards have: copied bit by bit, the same ones on every run, and never out of damage."""

import shutil

import numpy as np
import pyarrow as pa
import pytest

from stages.embed import FailedShardsError
from storage.column import KeyIndex, fixed_lists, matrix_of, text_key_array, text_keys_of
from storage.corpus import text_key
from storage.embeddings import Embeddings, ReusedRows, put_vectors
from storage.errors import MissingError, TeachonceError
from storage.remote import Remote
from tests.conftest import HashTeacher, Place, embed_params, put_foreign, sentences

OTHER_BITS = 1 + 2**-20
"""A teacher of this scale gives the same vectors but for their last bits."""


class DiesAfter(HashTeacher):
    def __init__(self, calls, **settings):
        super().__init__(**settings)
        self.calls = calls

    def __call__(self, texts, role="text"):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().__call__(texts, role)


def changed(texts, *, new=0, seed=1):
    """The texts without every third, in another order, with `new` ones among them."""
    kept = [text for place, text in enumerate(texts) if place % 3]
    fresh = [f"{text} And new." for text in sentences(new, seed=99)] if new else []
    both = [*kept, *fresh]
    return [both[place] for place in np.random.default_rng(seed).permutation(len(both))], fresh


def vectors_of(place, corpus):
    return Embeddings(place.store, place.embeddings, corpus).rows_of(np.arange(corpus.rows))


def expected(texts, teacher_of):
    return np.stack([teacher_of(text).vector(text) for text in texts])


def damage(place, key):
    path = place.store.path(key)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def copy_of(place, folder):
    shutil.copytree(place.root, folder)
    return Place(folder)


def test_only_unknown_texts_go_to_the_teacher(place):
    old = sentences(600)
    place.embed(place.corpus(old), HashTeacher())
    texts, fresh = changed(old, new=50)
    corpus = place.corpus(texts, rows_per_shard=100)
    teacher = HashTeacher(scale=OTHER_BITS)
    outcome = place.embed(corpus, teacher)
    assert teacher.texts_seen == 50
    assert outcome.facts["texts_embedded"] == 50
    assert outcome.facts["texts_reused"] == 400
    assert "embedded (50 texts), 400 texts taken from older shards, 0 found" in outcome.summary
    first = HashTeacher()
    new = set(fresh)
    assert np.array_equal(
        vectors_of(place, corpus), expected(texts, lambda text: teacher if text in new else first)
    )


@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_copies_are_bit_by_bit(place, storage):
    params = embed_params(storage=storage)
    old = sentences(300)
    before = place.corpus(old)
    place.embed(before, HashTeacher(), params=params)
    bits = dict(zip(old, vectors_of(place, before).view(np.uint8), strict=True))
    texts, _ = changed(old)
    corpus = place.corpus(texts)
    place.embed(corpus, None, params=params)
    assert np.array_equal(
        vectors_of(place, corpus).view(np.uint8), np.stack([bits[text] for text in texts])
    )


def test_if_all_texts_are_known_no_teacher_is_needed(place):
    old = sentences(300)
    place.embed(place.corpus(old), HashTeacher())
    texts, _ = changed(old)
    outcome = place.embed(place.corpus(texts), None)
    assert (outcome.facts["texts_embedded"], outcome.facts["texts_reused"]) == (0, len(texts))
    texts, _ = changed(old, new=1)
    with pytest.raises(MissingError, match=r"1 of \d+ shards are not in the store"):
        place.embed(place.corpus(texts), None)


def test_reuse_can_be_switched_off(place):
    old = sentences(300)
    place.embed(place.corpus(old), HashTeacher())
    texts, _ = changed(old)
    teacher = HashTeacher()
    outcome = place.embed(place.corpus(texts), teacher, params=embed_params(reuse=False))
    assert teacher.texts_seen == len(texts)
    assert outcome.facts["texts_reused"] == 0
    assert "older" not in outcome.summary


def test_another_teachers_shards_give_nothing(place):
    old = sentences(200)
    place.embed(place.corpus(old), HashTeacher(), files={"model.safetensors": "1" * 64})
    teacher = HashTeacher()
    texts, _ = changed(old)
    place.embed(place.corpus(texts), teacher)
    assert teacher.texts_seen == len(texts)


def two_old_ones(place):
    """Two old corpora that overlap, with other last bits; text -> what the first by name says."""
    texts = sentences(600)
    shards = {}
    for some, scale in ((texts[:400], 1.0), (texts[200:], OTHER_BITS)):
        corpus = place.corpus(some)
        place.embed(corpus, HashTeacher(scale=scale), params=embed_params(reuse=False))
        vectors = vectors_of(place, corpus)
        for shard, entry in enumerate(place.embeddings.objects):
            first, last = corpus.starts[shard : shard + 2]
            shards[entry.key] = dict(
                zip(corpus.texts(shard), vectors[first:last].tolist(), strict=True)
            )
    said = {}
    for key in sorted(shards, reverse=True):
        said |= shards[key]
    return texts, said


def test_of_two_copies_the_first_by_name_is_taken(place):
    old, said = two_old_ones(place)
    texts, _ = changed(old)
    corpus = place.corpus(texts)
    place.embed(corpus, None)
    found = vectors_of(place, corpus)
    assert np.array_equal(found, np.array([said[text] for text in texts], np.float32))
    # Both gave something.
    ours = expected(texts, lambda text: HashTeacher())
    assert 0 < np.count_nonzero((found == ours).all(axis=1)) < len(texts) - 100


def test_a_run_that_died_goes_on_and_ends_with_the_same_bytes(place, tmp_path):
    old, _ = two_old_ones(place)
    texts, _ = changed(old, new=100)
    corpus = place.corpus(texts)
    other = copy_of(place, tmp_path / "whole")
    other.embed(other.corpus(texts), HashTeacher())
    for calls in (3, 1):
        with pytest.raises(KeyboardInterrupt):
            place.embed(corpus, DiesAfter(calls))
    outcome = place.embed(corpus, HashTeacher())
    assert 2 <= outcome.facts["shards_found"] < len(corpus.objects) - 1
    for name in ("embeddings.json", "embed-facts.json"):
        assert (place.root / name).read_bytes() == (other.root / name).read_bytes()
    for entry in place.embeddings.objects:
        assert place.store.path(entry.key).read_bytes() == other.store.path(entry.key).read_bytes()


def test_shards_of_the_run_itself_are_no_older_ones(place, tmp_path):
    """No corpus of `shard` has a text twice; if one had, a resumed run would not copy its own texts."""
    texts = [*sentences(300), *sentences(10)]
    corpus = place.corpus(texts)
    other = copy_of(place, tmp_path / "whole")
    other.embed(other.corpus(texts), HashTeacher())
    with pytest.raises(KeyboardInterrupt):
        place.embed(corpus, DiesAfter(calls=2))
    place.embed(corpus, HashTeacher())
    assert place.embeddings.objects == other.embeddings.objects


def test_what_is_written_meanwhile_changes_no_byte(place, tmp_path):
    """Another worker on the same store embeds all our texts, cut otherwise, while we are at it."""
    texts = sentences(300)
    other = copy_of(place, tmp_path / "alone")
    other.embed(other.corpus(texts), HashTeacher())
    corpus = place.corpus(texts)
    elsewhere = Place(tmp_path / "elsewhere")
    elsewhere.root.mkdir()
    (elsewhere.root / "store").symlink_to(place.root / "store")

    class WithNeighbour(HashTeacher):
        def __call__(self, some, role="text"):
            if not self.texts_seen:
                reordered = elsewhere.corpus(texts[::-1])
                elsewhere.embed(reordered, HashTeacher(scale=OTHER_BITS))
            return super().__call__(some, role)

    place.embed(corpus, WithNeighbour())
    assert place.embeddings.objects == other.embeddings.objects


def test_a_damaged_shard_is_told_and_gives_nothing(place, caplog):
    old = sentences(300)
    before = place.corpus(old)
    place.embed(before, HashTeacher())
    damaged = place.embeddings.objects[1]
    damage(place, damaged.key)
    corpus = place.corpus(old[::-1])
    teacher = HashTeacher(scale=OTHER_BITS)
    with caplog.at_level("WARNING"):
        place.embed(corpus, teacher)
    assert teacher.texts_seen == damaged.rows
    assert damaged.key in caplog.text
    assert "sha256 differs" in caplog.text
    lost = set(before.texts(1))
    first = HashTeacher()
    assert np.array_equal(
        vectors_of(place, corpus),
        expected(old[::-1], lambda text: teacher if text in lost else first),
    )


def test_of_two_copies_a_whole_one_is_taken_if_the_first_is_damaged(place):
    old, _ = two_old_ones(place)
    shared = set(old[200:400])
    everywhere = [
        key for key in place.store.keys(place.embeddings.objects[0].key.rpartition("/")[0])
    ]
    holds = [
        key
        for key in everywhere
        if {text_key(text) for text in shared}
        & {bytes(key) for key in text_keys_of(place.store.glance(key)).tolist()}
    ]
    damage(place, holds[0])
    corpus = place.corpus([text for text in old[::-1] if text in shared])
    place.embed(corpus, None)
    assert vectors_of(place, corpus).shape == (200, 16)


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("vector", lambda vectors: vectors.astype(np.float16)),
        ("vector", lambda vectors: vectors * np.nan),
        ("another", lambda vectors: vectors),
    ],
)
def test_a_whole_object_that_is_none_of_ours_gives_nothing(place, caplog, column, change):
    old = sentences(100)
    place.embed(place.corpus(old, rows_per_shard=400), HashTeacher())
    (entry,) = place.embeddings.objects
    batch = place.store.open(entry)
    names = ["text_key", column]
    foreign = [batch.column("text_key"), fixed_lists(change(matrix_of(batch, "vector")))]
    place.store.path(entry.key).unlink()
    put_foreign(place.store, entry.key, pa.record_batch(foreign, names=names))
    teacher = HashTeacher()
    with caplog.at_level("WARNING"):
        place.embed(place.corpus(old[::-1], rows_per_shard=400), teacher)
    assert teacher.texts_seen == 100
    assert f"cannot be trusted: {place.store.path(entry.key)}" in caplog.text


@pytest.mark.parametrize(("name", "width"), [("who", 16), ("text_key", 15)])
def test_an_object_without_our_text_keys_gives_nothing(place, caplog, name, width):
    old = sentences(100)
    place.embed(place.corpus(old, rows_per_shard=400), HashTeacher())
    (entry,) = place.embeddings.objects
    batch = place.store.open(entry)
    keys = [key[:width] for key in batch.column("text_key").to_pylist()]
    path = place.store.path(entry.key)
    path.unlink()
    put_foreign(
        place.store,
        entry.key,
        pa.record_batch({name: pa.array(keys, pa.binary(width)), "vector": batch["vector"]}),
    )
    teacher = HashTeacher()
    with caplog.at_level("WARNING"):
        place.embed(place.corpus(old[::-1], rows_per_shard=400), teacher)
    assert teacher.texts_seen == 100
    assert (
        f"cannot be trusted: {path}: damaged: other columns than those of vectors: "
        f"{name}: fixed_size_binary[{width}], vector: "
    ) in caplog.text


def test_tokens_and_cuts_are_those_of_the_texts_that_were_read(place):
    old = sentences(300)
    place.embed(place.corpus(old), HashTeacher())
    texts, fresh = changed(old, new=40)
    outcome = place.embed(place.corpus(texts), HashTeacher())
    assert outcome.facts["texts"] == 240
    assert outcome.facts["uncounted"] == 200
    assert outcome.facts["tokens"] == sum(len(text.split()) for text in fresh)
    assert "0.0 % of the 40 texts that were counted were cut at 32 tokens" in outcome.summary
    outcome = place.embed(place.corpus([t for t in texts if t not in fresh]), None)
    assert "how many texts were cut is not known" in outcome.summary


def test_a_shard_without_known_texts_has_the_bytes_it_always_had(place, tmp_path):
    place.embed(place.corpus(sentences(100)), HashTeacher())
    new = [f"{text} And new." for text in sentences(100)]
    place.embed(place.corpus(new), HashTeacher())
    other = Place(tmp_path / "other")
    other.embed(other.corpus(new), HashTeacher(), params=embed_params(reuse=False))
    assert place.embeddings.objects == other.embeddings.objects
    # Facts are in the sha256.
    assert set(place.store.facts(place.embeddings.objects[0].key)) == {"tokens", "truncated"}


def test_the_remotes_own_shard_goes_before_older_ones(place, tmp_path):
    (tmp_path / "remote").mkdir()
    remote = Remote(str(tmp_path / "remote"))
    old = sentences(200)
    texts, _ = changed(old)
    colleague = Place(tmp_path / "colleague")
    colleague.embed(colleague.corpus(texts), HashTeacher(scale=OTHER_BITS), remote=remote)
    place.embed(place.corpus(old), HashTeacher())
    outcome = place.embed(place.corpus(texts), None, remote=remote)
    assert outcome.facts["texts_reused"] == 0
    assert outcome.facts["shards_fetched"] == len(place.embeddings.objects)
    assert place.embeddings.objects == colleague.embeddings.objects


def test_poison_is_named_by_its_row_in_the_shard(place):
    old = sentences(100)
    place.embed(place.corpus(old, rows_per_shard=400), HashTeacher())
    texts = [*old[:7], "This one is new to us.", *old[7:]]

    def poisoned(some, role):
        made = HashTeacher()(some)
        made.vectors[[text.startswith("This one") for text in some]] = np.nan
        return made

    with pytest.raises(FailedShardsError, match="1 of 1 vectors are NaN or Inf: rows 7 of the sh"):
        place.embed(place.corpus(texts, rows_per_shard=400), poisoned)


def test_vectors_of_another_width_are_not_mixed_with_old_ones(place):
    keys = np.frombuffer(b"".join(map(text_key, sentences(3))), "V16")
    old = pa.record_batch(
        [text_key_array(keys[1:2]), fixed_lists(np.ones((1, 16), np.float32))],
        names=["text_key", "vector"],
    )
    with pytest.raises(TeachonceError, match=r"\[8\], and older shards hold .*\[16\]"):
        put_vectors(
            place.store,
            f"vectors/{'a' * 40}/{'b' * 40}.arrow",
            vectors=np.ones((2, 8), np.float32),
            text_keys=keys,
            storage="float32",
            facts={},
            reused=ReusedRows(np.array([1]), old),
        )


def test_key_index_finds_the_first_of_equal_keys():
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * 500), "V16")
    zeros = np.frombuffer(bytes(32), "V16")[:1]
    given = np.concatenate([keys[:300], keys[10:20], zeros])
    asked = np.concatenate([keys[::-1], zeros])
    first = {}
    for place, key in enumerate(given.tolist()):
        first.setdefault(bytes(key), place)
    assert KeyIndex(given).places(asked).tolist() == [
        first.get(bytes(key), -1) for key in asked.tolist()
    ]
    assert KeyIndex(given[:0]).places(asked).tolist() == [-1] * 501
    assert KeyIndex(given).places(asked[:0]).tolist() == []
