"""Mixes from embed to distill: made by the loop that makes vectors, and learned from."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from stages import distill, embed
from stages.embed import FailedShardsError, ShardSlice
from stages.learning import loop
from stages.learning.mixed_rows import MixedRows
from stages.models.encoder import Encoder
from storage.caches import Caches
from storage.embeddings import BadVectorsError, Embeddings
from storage.errors import TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.mixes import Mixes
from storage.probe import PROBE_DIGEST
from storage.remote import Remote
from storage.split import Split
from storage.store import Store
from storage.tokens import Tokens
from tests.conftest import HashTeacher, MixingTeacher, embed_params, prompts, put_foreign, sentences
from tests.stages.test_distill import CPU, recipe

MIXED = embed_params(mixes=0.5)
OBJECTIVES = [
    {"name": "kd", "weight": 32.0, "centred": True},
    {"name": "mixes", "weight": 32.0, "centred": True, "rows": 8},
]


def made(place, teacher, params=MIXED, texts=None, **where):
    corpus = place.corpus(texts or sentences(300))
    return corpus, place.embed(
        corpus, teacher, params=params, mixes=place.root / "mixes.json", **where
    )


def mixes_of(place, corpus):
    return Mixes(place.store, Manifest.load(place.root / "mixes.json", "mixes"), corpus)


def files(root, folder="store"):
    return {path.relative_to(root): path.read_bytes() for path in (root / folder).rglob("*.arrow")}


def test_embed_makes_vectors_of_texts_and_of_mixes_in_one_run(place):
    texts, teacher = sentences(300), MixingTeacher()
    corpus, outcome = made(place, teacher, texts=texts)
    mixes = mixes_of(place, corpus)
    pairs = mixes.pairs()
    assert (teacher.texts_seen, teacher.mixes_seen) == (300, mixes.rows)
    assert abs(mixes.rows - 150) <= len(corpus.objects) / 2
    expected = [
        teacher.mix(texts[i], texts[j], ratio)
        for i, j, ratio in zip(pairs.first, pairs.second, pairs.ratio, strict=True)
    ]
    assert np.array_equal(mixes.rows_of(np.arange(mixes.rows)), np.stack(expected))
    assert f"{300 + mixes.rows:,} vectors, {mixes.rows} of them of mixes, in" in outcome.summary
    assert outcome.facts["texts"] == 300  # for DVC's metrics: those of the corpus
    again = place.embed(corpus, None, params=MIXED, mixes=place.root / "mixes.json")
    assert again.facts["shards_embedded"] == 0


def test_without_mixes_nothing_is_as_it_would_not_have_been(place, tmp_path):
    """Vectors and their manifest are equal, byte by byte, whatever the share of mixes."""
    with_mixes = type(place)(tmp_path / "with")
    made(place, HashTeacher(), params=embed_params())
    made(with_mixes, MixingTeacher())
    name = "embeddings.json"
    assert (place.root / name).read_bytes() == (with_mixes.root / name).read_bytes()
    plain = files(place.root)
    assert not [path for path in plain if "mixes" in path.parts]
    assert plain == {
        path: content
        for path, content in files(with_mixes.root).items()
        if "mixes" not in path.parts
    }
    none = Manifest.load(place.root / "mixes.json", "mixes")
    assert (none.objects, none.recipe) == ((), {})
    assert "mixes" not in embed.recipe(MIXED, {})


@pytest.mark.parametrize(
    ("files_of_teacher", "changes"),
    [
        ({"model.safetensors": "1" * 64}, {}),
        ({"model.safetensors": "0" * 64}, {"prompts": prompts("query: ")}),
        ({"model.safetensors": "0" * 64}, {"mixes": 0.25}),
    ],
)
def test_mixes_have_the_name_of_their_teacher_its_settings_and_the_share(files_of_teacher, changes):
    names = {
        fingerprint(embed.recipes(params, teacher)["mixes"])
        for params, teacher in [
            (MIXED, {"model.safetensors": "0" * 64}),
            (embed_params(**{"mixes": 0.5} | changes), files_of_teacher),
        ]
    }
    assert len(names) == 2


class DiesAmongMixes(MixingTeacher):
    """Its machine is switched off after some shards of mixes."""

    left = 2

    def encode_mixed(self, mixed):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().encode_mixed(mixed)


def test_a_run_that_died_among_mixes_goes_on_and_ends_with_the_same_bytes(place, tmp_path):
    first, rest, whole = DiesAmongMixes(), MixingTeacher(), type(place)(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        made(place, first)
    corpus, outcome = made(place, rest)
    assert rest.texts_seen == 0
    assert first.mixes_seen + rest.mixes_seen == mixes_of(place, corpus).rows
    assert first.mixes_seen > 0
    assert outcome.facts["shards_found"] == len(corpus.objects) + 2
    made(whole, MixingTeacher())
    assert files(whole.root) == files(place.root)
    for name in ("embeddings.json", "mixes.json", "embed-facts.json"):
        assert (whole.root / name).read_bytes() == (place.root / name).read_bytes()


def test_slices_make_the_mixes_of_their_shards(place):
    corpus = place.corpus(sentences(300))
    seen = []
    for number in (1, 2):
        teacher = MixingTeacher()
        place.embed(corpus, teacher, params=MIXED, share=ShardSlice(number, 2))
        seen.append(teacher.mixes_seen)
    place.embed(corpus, None, params=MIXED, mixes=place.root / "mixes.json")
    assert sum(seen) == mixes_of(place, corpus).rows
    assert min(seen) > 0


class BadAt(MixingTeacher):
    """Returns NaN for one mix."""

    def encode_mixed(self, mixed):
        output = super().encode_mixed(mixed)
        output.vectors[1] = np.nan
        return output


def test_mixes_that_are_no_numbers_are_refused_with_their_rows(place):
    with pytest.raises(FailedShardsError, match=r"1 of \d+ vectors are NaN or Inf: rows 1 of the"):
        made(place, BadAt())
    assert not list((place.root / "store").glob("mixes/**/*.arrow"))
    assert issubclass(BadVectorsError, TeachonceError)


def test_a_teacher_that_reads_texts_alone_is_refused_and_its_vectors_are_kept(place):
    with pytest.raises(
        FailedShardsError, match=r"the teacher reads texts alone(?s:.*)set embed.mixes to 0"
    ):
        made(place, HashTeacher())
    corpus, outcome = made(place, None, params=embed_params())
    assert outcome.facts["shards_found"] == len(corpus.objects)


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_mixes_are_stored_as_vectors_are(place, storage):
    teacher, texts = MixingTeacher(), sentences(80)
    corpus, _ = made(place, teacher, params=embed_params(mixes=0.5, storage=storage), texts=texts)
    mixes = mixes_of(place, corpus)
    pairs, found = mixes.pairs(), mixes.rows_of(np.array([3]))
    expected = teacher.mix(texts[pairs.first[3]], texts[pairs.second[3]], pairs.ratio[3])
    assert np.allclose(found[0], expected, atol=0.01)
    assert found.dtype == (np.float16 if storage == "float16" else np.float32)


def test_mixes_come_from_a_remote_unless_they_are_of_other_pairs(place, tmp_path):
    (tmp_path / "remote").mkdir()
    here, there = place, type(place)(tmp_path / "there")
    remote = Remote(str(tmp_path / "remote"))
    made(here, MixingTeacher(), remote=remote)
    corpus, outcome = made(there, None, remote=remote)
    assert outcome.facts["shards_fetched"] == 2 * len(corpus.objects)
    ours = files(here.root)
    assert files(there.root) == {p: ours[p] for p in ours if p.name != f"{PROBE_DIGEST}.arrow"}

    # Under the same key, with the same keys of rows, but columns of other pairs.
    entry = mixes_of(there, corpus).manifest.objects[0]
    batch = there.store.open(entry)
    wrong = batch.set_column(3, "ratio", pa.array(batch.column("ratio").to_numpy() / 2))
    path = tmp_path / "remote" / entry.key
    path.chmod(0o644)
    path.unlink()
    put_foreign(Store(tmp_path / "remote"), entry.key, wrong.replace_schema_metadata(None))
    third, teacher = type(place)(tmp_path / "third"), MixingTeacher()
    made(third, teacher, remote=remote)
    assert (teacher.texts_seen, teacher.mixes_seen) == (0, entry.rows)
    assert (third.root / "mixes.json").read_bytes() == (here.root / "mixes.json").read_bytes()


# ----------------------------------------------------------------------------------------- distill


class World:
    """A corpus of a tiny transformer, with mixes, and that transformer as the start."""

    def __init__(self, place, model):
        self.place, self.model = place, model
        teacher = Encoder(model, device=CPU, max_tokens=16)
        self.corpus, _ = made(place, teacher.as_teacher(), embed_params(mixes=1.0, max_tokens=16))
        self.embeddings = Embeddings(place.store, place.embeddings, self.corpus)
        self.split = Split(corpus=self.corpus.manifest.content, heldout=0.1, evaluation=())
        self.mixes = mixes_of(place, self.corpus)

    def caches(self, **changes):
        world = (self.corpus, self.embeddings, None, self.split, self.place.store)
        return Caches(*world, **{"mixes": self.mixes} | changes)

    def task(self, **changes):
        params = recipe(objectives=OBJECTIVES, **changes)
        return distill.prepare(params, start=self.model, caches=self.caches(), device=CPU)


@pytest.fixture
def world(place, tiny_model):
    return World(place, tiny_model)


def test_the_teacher_itself_has_no_error_on_mixes(world):
    """Same tokenizer, same embeddings, same ratios: the student's mix is the teacher's."""
    task = world.task()
    _, parts = task.setup().loss(task.rows[:16], 0)
    assert parts == [pytest.approx(0.0, abs=1e-10)] * 2
    assert task.objectives.names == ["kd", "mixes"]


def test_a_recipe_without_mixes_reads_none_though_they_are_there(world):
    """As in a plan, whose caches are those of all students."""
    few = world.caches(mixes=object())
    plain = recipe(objectives=OBJECTIVES[:1])
    assert distill.prepare(plain, start=world.model, caches=few, device=CPU).mixed is None


def test_a_step_moves_by_the_error_on_mixes(world):
    """Were the second text read in the first one's place, the loss would not be 0 above."""
    task = world.task()
    with torch.no_grad():
        next(task.student.parameters()).add_(
            0.05 * torch.randn(next(task.student.parameters()).shape)
        )
    _, parts = task.setup().loss(task.rows[:16], 0)
    assert parts[1] > 1e-7


def test_no_held_out_text_is_in_a_mix_and_all_others_are_drawn(world):
    task = world.task()
    mixed, train = task.mixed, set(task.rows.tolist())
    assert len(train) < world.corpus.rows
    drawn = np.concatenate([mixed.rows_of_step(step, 8) for step in range(len(mixed.rows) // 8)])
    assert len(drawn) == len(set(drawn.tolist())) == len(mixed.rows) // 8 * 8
    for side in (mixed.pairs.first, mixed.pairs.second):
        assert set(side[drawn].tolist()) <= train
    both = [
        i in train and j in train
        for i, j in zip(mixed.pairs.first, mixed.pairs.second, strict=True)
    ]
    assert mixed.rows.tolist() == np.flatnonzero(both).tolist()
    assert 0 < len(mixed.rows) < len(both)


def test_mixes_of_a_step_follow_from_seed_and_step(world):
    tokens: Tokens = world.task().tokens
    first, again, other = (
        MixedRows(world.mixes, tokens, train=np.arange(world.corpus.rows), seed=seed)
        for seed in (0, 0, 1)
    )
    first.draw(70, 8)
    for step in (0, 3, 70):
        assert np.array_equal(first.rows_of_step(step, 8), again.rows_of_step(step, 8))
        assert not np.array_equal(first.rows_of_step(step, 8), other.rows_of_step(step, 8))
    ids, prompt_tokens, vectors = first.draw(3, 8)
    assert prompt_tokens.tolist() == [0] * 8
    row = first.rows_of_step(3, 8)[5]
    pairs = first.pairs
    for found, wanted in ((ids[5].first, pairs.first), (ids[5].second, pairs.second)):
        assert np.array_equal(found, tokens.rows_of(wanted[[row]])[0])
    assert ids[5].ratio == pytest.approx(float(pairs.ratio[row]))
    assert np.array_equal(vectors[5], world.mixes.rows_of(np.array([row]))[0])


def test_too_few_mixes_are_refused(world):
    with pytest.raises(
        TeachonceError, match=r"0 mixes of training rows are too few \(2 at least\)"
    ):
        MixedRows(world.mixes, world.task().tokens, train=np.arange(1), seed=0)


def test_a_training_on_mixes_that_died_twice_ends_with_the_same_weights(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    plain_step, dies_at = loop.take_step, []

    def step(*args):
        if args[4] in dies_at:
            dies_at.remove(args[4])
            raise KeyboardInterrupt
        return plain_step(*args)

    monkeypatch.setattr(loop, "take_step", step)

    def train(name):
        distill.run(
            recipe(objectives=OBJECTIVES, batch_size=48, dropout=True),
            name="student",
            start=world.model,
            caches=world.caches(),
            device=CPU,
            work=tmp_path / "work",
            out=tmp_path / name,
            curve=tmp_path / f"{name}.csv",
            training=tmp_path / f"{name}.json",
            track=lambda _: None,
        )
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = train("whole")
    dies_at += [1, 3]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train("killed")
    assert train("killed") == whole
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
