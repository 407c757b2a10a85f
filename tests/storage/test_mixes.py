"""Mixes of two texts: which are drawn, who they are, and that only those of the corpus are read."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from storage.column import text_keys_of
from storage.embeddings import put_vectors
from storage.errors import DamagedError
from storage.manifest import Manifest, fingerprint
from storage.mixes import Mixes, Pairs, draw_pairs
from tests.conftest import sentences

DIGEST = "0123456789" * 4
DRAW = {"share": 0.5, "alpha": 0.4, "seed": 0}


def test_pairs_follow_from_digest_and_settings_alone():
    """A golden draw: another one would be another column under the same name."""
    pairs = draw_pairs(DIGEST, 10, **DRAW)
    assert pairs.first.tolist() == [0, 3, 5, 7, 9]
    assert pairs.second.tolist() == [5, 9, 2, 3, 3]
    assert pairs.ratio == pytest.approx(
        [0.833765, 0.101295, 0.004237, 0.014885, 0.902543], abs=1e-6
    )
    for other in (draw_pairs("1" * 40, 10, **DRAW), draw_pairs(DIGEST, 10, **DRAW | {"seed": 1})):
        assert other.ratio.tolist() != pairs.ratio.tolist()


@pytest.mark.parametrize(
    ("rows", "share", "count"), [(400, 0.25, 100), (400, 1.0, 400), (3, 0.1, 1)]
)
def test_a_row_is_first_once_at_most_and_never_its_own_partner(rows, share, count):
    pairs = draw_pairs(DIGEST, rows, share=share, alpha=0.4, seed=0)
    assert len(set(pairs.first.tolist())) == len(pairs.first) == count
    assert (pairs.first != pairs.second).all()
    assert 0 <= pairs.second.min() <= pairs.second.max() < rows
    assert ((pairs.ratio >= 0) & (pairs.ratio <= 1)).all()
    assert pairs.ratio.dtype == np.float32


def test_a_shard_of_one_text_has_a_mix_of_it_with_itself():
    pairs = draw_pairs(DIGEST, 1, **DRAW)
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([0], [0])


def test_ratios_are_of_the_beta_distribution():
    ratios = draw_pairs(DIGEST, 20_000, share=1.0, alpha=0.4, seed=0).ratio
    assert ratios.mean() == pytest.approx(0.5, abs=0.01)
    assert ratios.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.02)


def mixed(place, *, pairs_of=None, storage="float32"):
    """Mixes of a corpus whose vectors are 2 x their number, with pairs by shard."""
    corpus = place.corpus(sentences(150))
    recipe = {"mixes": DRAW}
    objects, made = [], []
    for shard in range(len(corpus.objects)):
        digest, rows = corpus.shard_digest(shard), corpus.objects[shard].rows
        pairs = draw_pairs(digest, rows, **DRAW)
        keys = pairs.keys(text_keys_of(corpus.batch(shard)))
        numbers = sum(len(p.first) for p in made) + np.arange(len(pairs.first))
        objects.append(
            put_vectors(
                place.store,
                f"mixes/{fingerprint(recipe)}/{digest}.arrow",
                vectors=np.repeat(2.0 * numbers[:, None] + 1, 4, axis=1).astype(np.float32),
                text_keys=keys,
                storage=storage,
                facts={},
                more=(pairs_of(pairs) if pairs_of else pairs).columns(),
            )
        )
        made.append(pairs)
    manifest = Manifest(kind="mixes", recipe=recipe, parent=None, objects=tuple(objects))
    return corpus, manifest, made


def test_mixes_are_read_by_row_ids_of_the_corpus(place):
    corpus, manifest, made = mixed(place)
    assert len(corpus.objects) > 1
    mixes = Mixes(place.store, manifest, corpus)
    pairs = mixes.pairs()
    assert mixes.rows == len(pairs.first) == sum(len(one.first) for one in made)
    for shard, one in enumerate(made):
        place_of = slice(*mixes.starts[shard : shard + 2])
        assert np.array_equal(pairs.first[place_of], one.first + corpus.starts[shard])
        assert np.array_equal(pairs.second[place_of], one.second + corpus.starts[shard])
        assert np.array_equal(pairs.ratio[place_of], one.ratio)
    ids = np.array([5, 0, mixes.rows - 1])
    assert mixes.rows_of(ids)[:, 0].tolist() == (2.0 * ids + 1).tolist()


def test_the_key_of_a_mix_is_of_both_texts_and_the_ratio(place):
    corpus, manifest, made = mixed(place)
    batch = place.store.open(manifest.objects[0])
    assert [str(field.type) for field in batch.schema][1:4] == ["int32", "int32", "float"]
    texts, pairs = text_keys_of(corpus.batch(0)), made[0]
    expected = [
        hashlib.blake2b(
            bytes(texts[i]) + bytes(texts[j]) + np.float32(share).tobytes(), digest_size=16
        ).digest()
        for i, j, share in zip(pairs.first, pairs.second, pairs.ratio, strict=True)
    ]
    assert [bytes(key) for key in text_keys_of(batch)] == expected
    assert not set(expected) & {bytes(key) for key in texts}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: Pairs(p.first, p.second + 1000, p.ratio),
        lambda p: Pairs(p.first - 1000, p.second, p.ratio),
        lambda p: Pairs(p.second, p.first, p.ratio),
        lambda p: Pairs(p.first, p.second, p.ratio / 2),
    ],
)
def test_mixes_of_other_texts_are_refused(place, wrong):
    corpus, manifest, _ = mixed(place, pairs_of=wrong)
    with pytest.raises(DamagedError, match=r"mixes of other texts than those of shard 0\n.*rm -f"):
        Mixes(place.store, manifest, corpus).pairs()


def test_mixes_of_another_corpus_or_recipe_are_refused(place):
    corpus, manifest, _ = mixed(place)
    with pytest.raises(DamagedError, match="made from another corpus"):
        Mixes(place.store, manifest, place.corpus(sentences(90, seed=5)))
    other = manifest.model_copy(update={"recipe": {"mixes": DRAW | {"seed": 1}}})
    with pytest.raises(DamagedError, match="its recipe has the fingerprint"):
        Mixes(place.store, other, corpus)


def test_an_object_of_mixes_has_its_columns_or_is_refused(place):
    _, manifest, _ = mixed(place, storage="int8")
    batch = place.store.open(manifest.objects[0])
    assert batch.schema.names == ["text_key", "first", "second", "ratio", "vector", "scale"]
    without = pa.record_batch(
        {name: batch.column(name) for name in ("text_key", "vector", "scale")}
    )
    with pytest.raises(ValueError, match="other columns than those of mixes"):
        place.store.put(f"mixes/{'e' * 40}/{DIGEST}.arrow", without)


def test_a_manifest_that_names_nothing_leaves_no_ref(place):
    corpus = place.corpus(sentences(90))
    refs = {path.name for path in (place.store.root / "refs").iterdir()}
    none = Manifest(kind="mixes", recipe={}, parent=corpus.manifest.content, objects=())
    none.save(place.root / "mixes.json", place.store)
    none.renew(place.root / "mixes.json", place.store)
    assert Manifest.load(place.root / "mixes.json", "mixes") == none
    assert {path.name for path in (place.store.root / "refs").iterdir()} == refs
