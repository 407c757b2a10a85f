"""Training from the caches: it learns, it needs no teacher, and a killed run ends the same."""

import csv
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.workspace import Workspace
from stages import distill, start
from stages.learning import loop, ranks
from stages.learning.batches import epoch_batches
from stages.learning.checkpoints import Checkpoints, State
from stages.learning.loop import TrainingSetup, train
from stages.learning.student import Student, encode_ids
from stages.learning.token_rows import token_ids, token_rows
from stages.models.encoder import Encoder
from stages.models.lineage import read_lineage
from stages.models.loading import load_model
from stages.params import RecipeParams, StartParams
from stages.vectors import row_cosines
from storage.caches import Caches
from storage.column import text_keys_of
from storage.embeddings import Embeddings
from storage.errors import DamagedError, TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.negatives import Negatives, put_negatives
from storage.split import Split
from tests.conftest import HashTeacher, embed_params, make_tiny_model, sentences
from tests.pipeline.test_upkeep import write_params
from tests.processes import ADAPTER, SPECULATIVE

CPU = torch.device("cpu")
torch.set_num_threads(1)  # tiny tensors: threads that wait for each other only cost


def recipe(**changes):
    return RecipeParams.model_validate(
        {
            "epochs": 2,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "warmup": 0.1,
            "weight_decay": 0.0,
            "clip": 1.0,
            "dropout": False,
            "max_tokens": 16,
            "precision": "fp32",
            "gradient_caching": False,
            "projection": "auto",
            "widths": [],
            "evaluate_every": 10,
            "patience": 50,
            "seed": 0,
            "objectives": [{"name": "kd", "weight": 1.0, "centred": False}],
        }
        | changes
    )


CKD = [
    {
        "name": "ckd",
        "weight": 1.0,
        "temperature": 0.1,
        "learnable_temperature": True,
        "queue": 64,
        "neighbours": 0,
    }
]


class World:
    """A corpus embedded by a tiny transformer, and half of that transformer as the start."""

    def __init__(self, place, teacher_folder, start_folder, params=None):
        self.place, self.start = place, start_folder
        self.texts = sentences(400)
        self.corpus = place.corpus(self.texts)
        dim = params.dim if params else None
        teacher = Encoder(teacher_folder, device=CPU, max_tokens=16, dim=dim)
        place.embed(self.corpus, teacher.encode_counted, params=params)
        self.embeddings = Embeddings(place.store, place.embeddings, self.corpus)
        self.split = Split(corpus=self.corpus.manifest.content, heldout=0.1, evaluation=())
        self.negatives = self.labelled = None
        self.tracked = []

    def train(self, params, name="student"):
        at = self.place.root
        return distill.run(
            params,
            name=name,
            start=self.start,
            caches=Caches(
                self.corpus,
                self.embeddings,
                self.negatives,
                self.split,
                self.place.store,
                labelled=self.labelled,
            ),
            device=CPU,
            work=at / "work",
            out=at / name,
            curve=at / f"{name}.csv",
            training=at / f"{name}.json",
            track=self.tracked.append,
        )

    def mine(self, parent, step):
        """Two neighbours of each row, `step` and twice as many rows behind it."""
        corpus, objects = self.corpus, []
        for shard in range(len(corpus.objects)):
            ids = np.arange(corpus.starts[shard], corpus.starts[shard + 1])
            neighbours = np.stack([(ids + step) % 400, (ids + 2 * step) % 400], axis=1)
            made = put_negatives(
                self.place.store,
                f"negatives/{fingerprint({'parent': parent})}/{shard:06}.arrow",
                neighbours=neighbours,
                scores=np.zeros(neighbours.shape, np.float32),
                text_keys=text_keys_of(corpus.batch(shard)),
                facts={},
            )
            objects.append(made)
        manifest = Manifest(kind="negatives", recipe={}, parent=parent, objects=tuple(objects))
        return Negatives(self.place.store, manifest, corpus, mined_from=parent)

    def weights(self, name="student"):
        return hashlib.sha256(
            (self.place.root / name / "model.safetensors").read_bytes()
        ).hexdigest()


@pytest.fixture(scope="module")
def start_folder(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("starts") / "half"
    params = StartParams.model_validate({"from": "teacher", "layers": [0, 3]})
    start.run(params, name="half", folder=tiny_model, trust_remote_code=False, out=out)
    return out


@pytest.fixture
def world(place, tiny_model, start_folder):
    return World(place, tiny_model, start_folder)


# ------------------------------------------------------------------------------------------ starting


def test_a_start_has_the_layers_it_was_given(tiny_model, start_folder):
    teacher = load_model(tiny_model, device=CPU)[0].auto_model
    half = load_model(start_folder, device=CPU)[0].auto_model
    assert half.config.num_hidden_layers == 2
    for ours, theirs in ((0, 0), (1, 3)):
        for name, value in half.encoder.layer[ours].state_dict().items():
            assert torch.equal(value, teacher.encoder.layer[theirs].state_dict()[name])


def test_a_start_has_the_tokenizer_of_its_model(tiny_model, start_folder):
    """The texts that prove its layers leave no truncation in it: token ids would have another name."""
    own, kept = (
        json.loads((folder / "tokenizer.json").read_bytes())
        for folder in (tiny_model, start_folder)
    )
    assert kept == own


def test_a_start_reads_texts_as_they_are_whatever_prompts_its_model_has(tiny_model, tmp_path):
    model = load_model(tiny_model, device=CPU)
    model.prompts, model.default_prompt_name = {"cluster": "amber: "}, "cluster"
    model.similarity_fn_name, model.truncate_dim = "dot", 8
    model.save(str(tmp_path / "e5"), create_model_card=False)
    params = StartParams.model_validate({"from": "e5", "layers": None})
    outcome = start.run(
        params, name="e5", folder=tmp_path / "e5", trust_remote_code=False, out=tmp_path / "s"
    )
    assert outcome.summary.endswith("; its own prompts (cluster) are left out")
    made, plain = load_model(tmp_path / "s", device=CPU), load_model(tiny_model, device=CPU)
    texts = ["amber basin", "cedar"]
    for encode in (made.encode, made.encode_query, made.encode_document):
        assert np.allclose(encode(texts), plain.encode(texts), atol=1e-6)
    assert made.similarity_fn_name == "cosine"


def test_equal_starts_are_equal_files(tiny_model, start_folder, tmp_path):
    params = StartParams.model_validate({"from": "teacher", "layers": [0, 3]})
    start.run(params, name="half", folder=tiny_model, trust_remote_code=False, out=tmp_path / "s")
    names = sorted(p.relative_to(start_folder) for p in start_folder.rglob("*") if p.is_file())
    assert names == sorted(
        p.relative_to(tmp_path / "s") for p in (tmp_path / "s").rglob("*") if p.is_file()
    )
    for name in names:
        assert (start_folder / name).read_bytes() == (tmp_path / "s" / name).read_bytes(), name


def test_a_layer_that_is_not_there_is_named(tiny_model, tmp_path):
    params = StartParams.model_validate({"from": "teacher", "layers": [0, 4]})
    with pytest.raises(TeachonceError) as error:
        start.run(params, name="x", folder=tiny_model, trust_remote_code=False, out=tmp_path / "x")
    assert str(error.value) == "starts.x.layers: layer 4 of 4\n  cure: use 0 to 3"
    assert not (tmp_path / "x").exists()


def test_layers_of_another_architecture_are_refused(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    model = make_tiny_model(tmp_path / "tiny", layers=1)
    static = StaticEmbedding(
        AutoTokenizer.from_pretrained(model).backend_tokenizer, embedding_dim=8
    )
    SentenceTransformer(modules=[static], device="cpu").save(
        str(tmp_path / "static"), create_model_card=False
    )
    params = StartParams.model_validate({"from": "teacher", "layers": [0]})
    with pytest.raises(TeachonceError, match="not from StaticEmbedding"):
        start.run(
            params,
            name="x",
            folder=tmp_path / "static",
            trust_remote_code=False,
            out=tmp_path / "x",
        )


# ------------------------------------------------------------------------------------------ learning


def test_more_tokens_than_a_start_has_positions_for_are_refused_before_any_are_made(world):
    with pytest.raises(TeachonceError) as error:
        world.train(recipe(max_tokens=65))
    assert str(error.value) == (
        f"recipes.*.max_tokens: 65, but the start in {world.start} reads 64 tokens at most\n"
        "  cure: set it to 64 or less"
    )
    assert not (world.place.root / "store/tokens").exists()
    world.train(recipe(max_tokens=64, epochs=1))


@pytest.mark.parametrize("objectives", [[{"name": "kd", "weight": 1.0, "centred": False}], CKD])
def test_a_student_learns_from_the_caches(world, objectives):
    before = Encoder(world.start, device=CPU, max_tokens=16).encode(world.texts)
    outcome = world.train(recipe(objectives=objectives, epochs=4))
    after = Encoder(world.place.root / "student", device=CPU, max_tokens=16).encode(world.texts)
    teacher = world.embeddings.rows_of(np.arange(400))

    def likeness(vectors):
        return float(np.mean(np.sum(vectors * teacher, axis=1)))

    assert likeness(after) > likeness(before) + 0.1
    assert np.allclose(np.linalg.norm(after, axis=1), 1, atol=1e-5)
    assert outcome.facts["agreement"] > 0.4


def test_the_curve_and_the_facts_are_files_for_dvc(world):
    world.train(recipe(objectives=CKD))
    rows = list(csv.DictReader((world.place.root / "student.csv").read_text().splitlines()))
    assert [str(row["agreement"]) for row in world.tracked] == [row["agreement"] for row in rows]
    facts = json.loads((world.place.root / "student.json").read_text())
    assert [int(row["step"]) for row in rows] == [0, 10, 20, 30, 40, facts["steps"]]
    assert set(rows[0]) == {"step", "loss_ckd", "agreement", "learning_rate", "temperature_ckd"}
    # Before the first step there is a score but no loss, and the start is no candidate.
    assert rows[0]["loss_ckd"] == "" and float(rows[1]["loss_ckd"]) > 0
    best = max(rows[1:], key=lambda row: float(row["agreement"]))
    assert facts["best_step"] == int(best["step"])
    assert facts["agreement"] == pytest.approx(float(best["agreement"]), abs=1e-6)
    assert not (world.place.root / "work").exists() or not list(
        (world.place.root / "work").iterdir()
    )


def test_a_student_of_the_first_values_kept_as_int8_ends_in_their_space(
    place, tiny_model, start_folder
):
    """Neither setting is known to distill: it sees 8 values a row, of length 1, in float32."""
    kept = embed_params(dim=8, storage="int8")
    world = World(place, tiny_model, start_folder, params=kept)
    outcome = world.train(recipe(epochs=4, learning_rate=5e-3))
    assert outcome.facts["agreement"] > 0.4
    vectors = Encoder(place.root / "student", device=CPU, max_tokens=16).encode(world.texts)
    assert vectors.shape == (400, 8)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    rows = world.embeddings.rows_of(np.arange(400))
    assert row_cosines(vectors, rows).mean() > 0.8
    assert read_lineage(place.root / "student")["teacher"]["dim"] == 8


@pytest.mark.parametrize("width", [32, 48])
def test_a_width_that_is_no_part_of_the_vector_is_refused(world, width):
    with pytest.raises(
        TeachonceError, match=rf"widths: {width}, but the teacher's vectors have 32 "
    ):
        world.train(recipe(widths=[16, width]))
    assert not (world.place.root / "student").exists()


def test_a_student_says_which_of_its_widths_serve_alone(world):
    root = world.place.root
    write_params(root)
    for name, widths in (("kd", []), ("ckd", [16, 8])):
        world.train(recipe(epochs=1, widths=widths))
        (root / "models").mkdir(exist_ok=True)
        (root / "student").rename(root / "models" / name)
    here = Workspace(root)
    assert here.widths("kd") == ()
    assert here.widths("ckd") == (16, 8)
    # The lineage of a folder that is the teacher is that of another project.
    write_params(root, embed__teacher=str(root / "models/ckd"))
    assert Workspace(root).widths("teacher") == ()
    # A model that was not trained here has no lineage.
    (root / "models/ckd/teachonce.json").unlink()
    assert here.widths("ckd") == ()


@pytest.mark.slow
def test_a_student_of_an_adapted_teacher_searches_the_index_of_the_teacher_itself(world):
    """Held-out texts, read by the student, find themselves among the teacher's vectors of all texts."""
    outcome = world.train(
        recipe(epochs=8, learning_rate=5e-3, objectives=[ADAPTER | {"most_drift": 0.05}])
    )
    assert 0 < outcome.facts["drift_adapter"] <= 0.05
    assert (
        read_lineage(world.place.root / "student")["drift_adapter"]
        == outcome.facts["drift_adapter"]
    )
    assert not [
        name
        for name in load_file(world.place.root / "student/model.safetensors")
        if "learned" in name or "adapter" in name
    ]
    heldout = world.split.heldout_rows(world.corpus)
    index = world.embeddings.rows_of(np.arange(400))
    found = {}
    for folder in (world.start, world.place.root / "student"):
        model = load_model(folder, device=CPU)
        vectors = model.encode([world.texts[row] for row in heldout], normalize_embeddings=True)
        ranks = (vectors @ index.T > (vectors * index[heldout]).sum(axis=1)[:, None]).sum(axis=1)
        found[folder.name] = float(np.median(ranks))
    assert found["student"] <= 20
    assert found["half"] > 100


def test_the_curve_says_which_share_of_the_proposals_was_kept(world):
    world.negatives = world.mine(world.embeddings.manifest.content, 30)
    outcome = world.train(recipe(objectives=[SPECULATIVE]))
    task = distill.prepare(
        recipe(objectives=[SPECULATIVE]),
        start=world.start,
        caches=Caches(
            world.corpus, world.embeddings, world.negatives, world.split, world.place.store
        ),
        device=CPU,
    )
    train_rows = world.split.train_rows(world.corpus)
    assert np.array_equal(task.proposals["speculative"].train_rows, train_rows)
    assert len(train_rows) < 400
    rows = [row["acceptance_speculative"] for row in world.tracked]
    assert rows[0] is None
    assert all(0 <= row <= 1 for row in rows[1:])
    best = [row["step"] for row in world.tracked].index(outcome.facts["best_step"])
    assert outcome.facts["acceptance_speculative"] == rows[best]


def test_what_is_saved_is_what_was_trained_projection_and_all(world, tmp_path):
    """A student narrower than the teacher: its projection is kept, and ends in the teacher's space."""
    narrow = make_tiny_model(tmp_path / "narrow", layers=1, width=16, seed=3)
    world.start = narrow
    world.train(recipe())
    folder = world.place.root / "student"
    vectors = Encoder(folder, device=CPU, max_tokens=16).encode(world.texts[:20])
    assert vectors.shape == (20, 32)
    parts = json.loads((folder / "modules.json").read_text())
    assert [part["type"].rsplit(".", 1)[1] for part in parts] == [
        "Transformer",
        "Pooling",
        "Dense",
        "Normalize",
    ]


def test_training_sees_the_texts_as_inference_does(world):
    """The stored token ids through the student equal the saved model on the texts themselves."""
    model = load_model(world.start, device=CPU)
    student = Student(model, teacher_dim=32, unit_length=True, project=False, dropout=False).eval()
    tokens = token_rows(
        model.tokenizer, world.start, corpus=world.corpus, store=world.place.store, max_tokens=16
    )
    task = distill.DistillTask(
        recipe(),
        student=student,
        tokens=tokens,
        pad_id=0,
        caches=Caches(world.corpus, world.embeddings, None, world.split, world.place.store),
        device=CPU,
    )
    rows = np.array([5, 399, 17])
    with torch.no_grad():
        ours = task.encode(rows).numpy()
    theirs = Encoder(world.start, device=CPU, max_tokens=16).encode([world.texts[r] for r in rows])
    assert np.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_that_reads_without_padding_learns_as_one_that_pads(world, precision):
    rows = [np.array([2, *range(5, 5 + n), 3], np.int32) for n in (9, 1, 8, 4, 14, 0, 7)]
    gradients, vectors = [], []
    for pads in (False, True):
        model = load_model(world.start, device=CPU)
        student = Student(model, teacher_dim=32, unit_length=True, project=True, dropout=False)
        assert student.packed is not None
        if pads:
            student.packed = None
        made = encode_ids(
            student, rows, pad_id=0, device=CPU, precision=precision, gradient_caching=False
        )
        made[:, :3].sum().backward()
        vectors.append(made.detach())
        gradients.append(
            torch.cat([w.grad.flatten() for w in student.parameters() if w.grad is not None])
        )
    near = {"fp32": 1e-5, "bf16": 3e-2}[precision]
    assert torch.allclose(*vectors, atol=near)
    assert torch.norm(gradients[0] - gradients[1]) < near * torch.norm(gradients[1])


def lesson_of(world, params):
    return distill.prepare(
        params,
        start=world.start,
        caches=Caches(world.corpus, world.embeddings, None, world.split, world.place.store),
        device=CPU,
    )


@torch.no_grad()
def test_other_tokens_are_deleted_at_each_step_and_of_each_text(world):
    params = recipe(max_tokens=64)
    task = lesson_of(world, params)
    task.student.eval()
    row = int(np.argmax([len(text.split()) for text in world.texts]))
    rows = np.array([row, row, 5])

    def vectors(step, deleted=0.5, task=task):
        return task.encode(rows, deleted=deleted, step=step).numpy()

    whole = vectors(0, deleted=0.0)
    assert np.allclose(whole[0], whole[1], atol=1e-6)
    assert np.allclose(vectors(1, deleted=0.0), whole)
    readings = [vectors(step) for step in range(8)]
    assert np.array_equal(vectors(3), readings[3])  # a resumed run has them again
    first = [reading[0] for reading in readings]
    others = [np.abs(a - b).max() > 1e-3 for i, a in enumerate(first) for b in first[:i]]
    assert sum(others) >= len(others) - 1  # 10 words: twice the same now and then
    assert sum(np.abs(a - b).max() > 1e-3 for a, b, _ in readings) >= 7  # of equal texts, too
    seeded = lesson_of(world, recipe(max_tokens=64, seed=1))
    seeded.student.eval()
    assert not np.allclose(vectors(3, task=seeded), readings[3], atol=1e-3)


def test_token_ids_are_cut_where_this_recipe_says_whoever_made_some_before(world):
    tokenizer = load_model(world.start, device=CPU).tokenizer
    rows = np.arange(400)

    def ids(max_tokens):
        tokens = token_rows(
            tokenizer,
            world.start,
            corpus=world.corpus,
            store=world.place.store,
            max_tokens=max_tokens,
        )
        return [row.tolist() for row in tokens.rows_of(rows)]

    for limit in (16, 6, 16, 7):
        whole = [tokenizer(text)["input_ids"] for text in world.texts]
        assert ids(limit) == [
            row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in whole
        ]


def test_a_rank_makes_its_share_of_the_token_ids_and_then_what_others_did_not(world, monkeypatch):
    tokenizer = load_model(world.start, device=CPU).tokenizer
    folder = world.place.root / "store/tokens"
    before, at_the_others = set(folder.rglob("*.arrow")), []
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "count", lambda: 3)
    monkeypatch.setattr(
        ranks, "_barrier", lambda: at_the_others.extend({*folder.rglob("*.arrow")} - before)
    )
    how = {"corpus": world.corpus, "store": world.place.store, "max_tokens": 11}
    tokens = token_rows(tokenizer, world.start, **how)
    digests = [world.corpus.shard_digest(shard) for shard in range(len(world.corpus.objects))]
    assert sorted(path.stem for path in at_the_others) == sorted(digests[1::3])
    assert [entry.key.rpartition("/")[2] for entry in tokens.objects] == [
        f"{digest}.arrow" for digest in digests
    ]
    ids = tokens.rows_of(np.arange(400))
    assert [row.tolist() for row in ids] == [
        tokenizer(text, truncation=True, max_length=11)["input_ids"] for text in world.texts
    ]


def test_token_ids_of_a_shard_are_read_in_parts(world, monkeypatch):
    tokenizer = load_model(world.start, device=CPU).tokenizer
    how = {"corpus": world.corpus, "store": world.place.store, "max_tokens": 9}
    whole = token_rows(tokenizer, world.start, **how)
    plain = [world.place.store.path(entry.key).read_bytes() for entry in whole.objects]
    for entry in whole.objects:
        world.place.store.path(entry.key).unlink()
    read = []

    def noted(tokenizer, texts, **cut):
        read.append(len(texts))
        return token_ids(tokenizer, texts, **cut)

    monkeypatch.setattr("stages.learning.token_rows.token_ids", noted)
    monkeypatch.setattr("stages.learning.token_rows.TEXTS_AT_ONCE", 7)
    parted = token_rows(tokenizer, world.start, **how)
    assert [world.place.store.path(entry.key).read_bytes() for entry in parted.objects] == plain
    assert max(read) == 7
    assert sum(read) == 401  # one sets the tokenizer up


def test_token_ids_are_made_once(world):
    world.train(recipe(epochs=1))
    made = sorted((world.place.root / "store/tokens").rglob("*.arrow"))
    times = [path.stat().st_mtime_ns for path in made]
    assert len(made) == len(world.corpus.objects)
    world.train(recipe(epochs=1, seed=1))
    assert [path.stat().st_mtime_ns for path in made] == times


def test_a_student_has_the_tokenizer_of_its_start(world):
    """Whether token ids were made in this run or found: else a killed run would end with other files."""
    for name in ("made", "found"):
        world.train(recipe(epochs=1), name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (world.place.root / name / file).read_bytes() == (
                world.start / file
            ).read_bytes()


def test_the_same_recipe_gives_the_same_weights_and_another_seed_does_not(world):
    world.train(recipe(), "a")
    world.train(recipe(), "b")
    world.train(recipe(seed=1), "c")
    assert world.weights("a") == world.weights("b") != world.weights("c")


def test_a_queue_that_is_larger_than_the_corpus_is_said(world, caplog):
    caplog.set_level("INFO", "teachonce")
    rows = len(world.split.train_rows(world.corpus))
    disco = {"name": "disco_ckd", "weight": 1.0, "queue": 65536}
    world.train(recipe(objectives=[{**CKD[0], "queue": rows}, {**CKD[0], "queue": 300}, disco]))
    assert [line for line in caplog.messages if "queue" in line] == [
        f"student: ckd: a queue of {rows}, and {rows} rows to train on: each step is compared with all "
        "of them, each once",
        f"student: disco_ckd: a queue of 65,536, and {rows} rows to train on: it holds a row once for "
        "each epoch that it reaches back to",
    ]


def test_a_run_without_progress_stops_early_and_keeps_its_best(world):
    outcome = world.train(recipe(learning_rate=1e-12, patience=2, epochs=40))
    assert outcome.facts["steps"] == 30
    assert outcome.facts["best_step"] == 10


def test_dropout_is_the_recipes_choice(world):
    model = load_model(world.start, device=CPU)
    ids, mask = torch.tensor([[2, 7, 8, 3]] * 2), torch.ones(2, 4, dtype=torch.long)
    for dropout in (False, True):
        student = Student(model, teacher_dim=32, unit_length=True, project=False, dropout=dropout)
        student.train()
        first, second = student(ids, mask), student(ids, mask)
        assert torch.equal(first, second) != dropout


def test_a_loss_that_is_no_number_stops_with_its_rows(world):
    with pytest.raises(TeachonceError) as error:
        world.train(recipe(learning_rate=1e38, clip=None, warmup=0.0))
    said = re.match(r"step (\d+): the loss is nan; rows ([\d, ]+)\n", str(error.value))
    batches = epoch_batches(world.split.train_rows(world.corpus), batch_size=16, seed=0, epoch=0)
    assert [*map(int, said[2].split(", "))] == batches[int(said[1])].tolist()


HUGE = [{"name": "kd", "weight": 1e37, "centred": False}]
"""A finite loss, and a gradient whose square is not; clipped, it would be 0."""


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_no_number_stops_before_a_weight_is_touched(
    world, monkeypatch, clip, caching
):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(TeachonceError) as error:
        world.train(recipe(objectives=HUGE, clip=clip, gradient_caching=caching))
    batches = epoch_batches(world.split.train_rows(world.corpus), batch_size=16, seed=0, epoch=0)
    assert re.fullmatch(
        rf"step 0: the loss is [\d.]+e\+3\d, its gradient inf; rows {', '.join(map(str, batches[0]))}\n"
        r"  cure: lower learning_rate, .*",
        str(error.value),
    )
    assert not list((world.place.root / "work").rglob("*.safetensors"))
    assert not (world.place.root / "student").exists()


class Slope(torch.nn.Module):
    """Learns four numbers; where the first two are equal the loss is 0 and its gradient is NaN."""

    def __init__(self):
        super().__init__()
        self.numbers = torch.nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))

    def loss(self, rows, step):
        difference = (self.numbers * 0 if step == 3 else self.numbers).square().sum()
        return difference.sqrt(), [float(difference.detach())]


def slope_work(model, score=lambda: 1.0):
    return TrainingSetup(
        batches=lambda epoch: [np.arange(4)] * 6,
        loss=model.loss,
        score=score,
        score_name="agreement",
        initial_may_win=True,
        parts=["slope"],
        notes=dict,
    )


def test_each_step_is_read_ahead_once_and_in_order_and_none_after_the_next_when_it_stops(tmp_path):
    model, read, taken = Slope(), [], []

    def loss(rows, step):
        taken.append((rows.tolist(), step))
        return model.numbers.sum(), [1.0]

    setup = dataclasses.replace(
        slope_work(model),
        loss=loss,
        batches=lambda epoch: [np.arange(3) + 10 * epoch + place for place in range(5)],
        read_ahead=lambda rows, step: read.append((rows.tolist(), step)) or True,
    )
    how = {"name": "slope", "checkpoints": Checkpoints(tmp_path / "run"), "track": lambda row: None}
    train(model, setup, recipe(epochs=3, evaluate_every=100), **how)
    assert len(read) == 15
    assert read == taken
    assert read[8] == ([13, 14, 15], 8)
    how["checkpoints"] = Checkpoints(tmp_path / "another")
    read.clear()
    taken.clear()
    train(model, setup, recipe(epochs=3, evaluate_every=2, patience=2), **how)
    assert [step for _, step in taken] == [0, 1, 2, 3]
    assert [step for _, step in read][:4] == [0, 1, 2, 3]
    assert len(read) <= 5  # the next step's may have begun


class LittleMemory:
    """Reads for a student on a device with memory for so many tokens, and says no as torch does.

    What is read to keep stays in memory until the step ends; with gradient caching nothing does.
    """

    def __init__(self, student, most):
        self.student, self.most, self.read, self.refused = student, most, student.read, 0
        self.kept = 0
        student.read = self

    def __call__(self, rows, **how):
        tokens = len(rows) * max(map(len, rows))
        self.kept = tokens + (self.kept if self.student.most_tokens is None else 0)
        if self.kept > self.most:
            self.refused, self.kept = self.refused + 1, 0
            raise torch.OutOfMemoryError(f"Tried to allocate {tokens} tokens")
        return self.read(rows, **how)


@pytest.mark.parametrize("most", [120, 60])
def test_a_step_without_memory_is_taken_again_in_pieces_that_halve_and_learns_the_same(
    world, most, caplog
):
    caplog.set_level("INFO")
    params, weights, losses = recipe(objectives=CKD, clip=None), [], []
    for memory in (None, most):
        task = lesson_of(world, params)
        device = LittleMemory(task.student, memory or 10_000)
        optimizer, setup = loop.make_optimizer(task, params), task.setup()
        for step in range(6):
            device.kept = 0
            losses += loop.take_step(
                task, optimizer, setup, setup.batches(0)[step], step, 6, params
            )
        weights.append(torch.cat([weight.flatten() for weight in task.parameters()]).detach())
    assert losses[6:] == pytest.approx(losses[:6], rel=1e-4)
    untrained = torch.cat([w.flatten() for w in lesson_of(world, params).parameters()])
    # Adam makes steps of equal size from gradients that are but rounding.
    assert torch.norm(weights[1] - weights[0]) < 0.01 * torch.norm(weights[0] - untrained)
    assert task.student.most_tokens <= most
    assert 1 <= device.refused <= 3  # it is remembered
    assert f"in pieces of {task.student.most_tokens} (gradient_caching)" in caplog.text


@pytest.mark.parametrize(("lengths", "halves"), [((0, 0), False), ((5,), False), ((1, 1), True)])
def test_pieces_halve_until_they_are_one_text_or_empty(world, lengths, halves):
    """A static model reads texts without a token; pieces of none must not be tried for ever."""
    student = lesson_of(world, recipe(objectives=CKD)).student
    student.largest_piece = (len(lengths) * max(lengths), len(lengths))
    assert student.halve_pieces() is halves
    assert student.most_tokens == (1 if halves else None)


def test_a_step_without_memory_for_one_text_is_an_error_with_a_cure_and_changes_no_weight(world):
    params = recipe(objectives=CKD)
    task = lesson_of(world, params)
    before = [weight.clone() for weight in task.parameters()]
    LittleMemory(task.student, 3)
    setup = task.setup()
    with pytest.raises(
        TeachonceError,
        match=r"step 4: Tried to allocate \d+ tokens\n.*lower batch_size, max_tokens",
    ):
        optimizer = loop.make_optimizer(task, params)
        loop.take_step(task, optimizer, setup, setup.batches(0)[0], 4, 6, params)
    assert all(map(torch.equal, before, task.parameters()))


class ReadsNoted:
    """A column that notes which rows were read ahead, and which were read."""

    def __init__(self, column):
        self.column, self.ahead, self.read = column, [], []

    def __getattr__(self, name):
        return getattr(self.column, name)

    def read_ahead(self, ids):
        self.ahead += ids.tolist()
        self.column.read_ahead(ids)

    def rows_of(self, ids):
        self.read += ids.tolist()
        return self.column.rows_of(ids)


def test_a_student_reads_ahead_what_its_step_reads(world):
    params = recipe(objectives=CKD)
    task = lesson_of(world, params)
    setup = task.setup()
    vectors, tokens = ReadsNoted(task.caches.embeddings), ReadsNoted(task.tokens)
    task.source.embeddings, task.tokens = vectors, tokens
    task.caches = dataclasses.replace(task.caches, embeddings=vectors)
    for step in (0, 1, 16):
        rows = setup.batches(0)[step % 2]
        setup.read_ahead(rows, step)
        assert setup.read_ahead(rows, step) is False  # all was read a moment ago
        setup.loss(rows, step)
        assert set(vectors.ahead) == set(vectors.read)
        assert set(tokens.ahead) == set(tokens.read) == set(rows.tolist())
        assert (len(set(vectors.ahead)) >= 64) == (step != 1)  # the queue
        for column in (vectors, tokens):
            column.ahead.clear()
            column.read.clear()


def test_what_is_in_memory_is_looked_for_in_the_first_step_and_every_sixteenth(tmp_path):
    model, read = Slope(), []
    model.loss = lambda rows, step: (model.numbers.sum(), [1.0])

    def read_ahead(rows, step):
        read.append(step)
        return step in (16, 17)

    setup = dataclasses.replace(
        slope_work(model), batches=lambda epoch: [np.arange(4)] * 40, read_ahead=read_ahead
    )
    how = {"name": "slope", "checkpoints": Checkpoints(tmp_path / "run"), "track": lambda row: None}
    train(model, setup, recipe(epochs=1, evaluate_every=100), **how)
    assert read == [0, 16, 17, 18, 32]


def test_what_cannot_be_read_ahead_ends_the_training_before_its_step(tmp_path):
    model, taken = Slope(), []

    def loss(rows, step):
        taken.append(step)
        return model.numbers.sum(), [1.0]

    def read_ahead(rows, step):
        if step == 4:
            raise DamagedError("shard 7", "other bytes", "make it again")
        return True

    setup = dataclasses.replace(slope_work(model), loss=loss, read_ahead=read_ahead)
    how = {"name": "slope", "checkpoints": Checkpoints(tmp_path / "run"), "track": lambda row: None}
    with pytest.raises(DamagedError, match="shard 7"):
        train(model, setup, recipe(), **how)
    assert taken == [0, 1, 2, 3]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_whose_gradient_is_nan_leaves_the_last_checkpoint_and_its_weights(
    tmp_path, monkeypatch, clip
):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    params = recipe(clip=clip, evaluate_every=2)
    for _ in range(2):  # started again, it says the same
        model = Slope()
        with pytest.raises(
            TeachonceError, match=r"^step 3: the loss is 0, its gradient nan; rows 0, 1, "
        ):
            train(
                model,
                slope_work(model),
                params,
                name="slope",
                checkpoints=Checkpoints(tmp_path / "run"),
                track=lambda row: None,
            )
        state, tensors = Checkpoints(tmp_path / "run").load()
        assert state.step == 3
        assert torch.equal(tensors["model/numbers"], model.numbers)
        assert torch.isfinite(model.numbers).all()


@pytest.mark.parametrize("what", ["model", "best", "optimizer"])
def test_a_poisoned_checkpoint_is_named_with_the_way_out(tmp_path, monkeypatch, what):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    params, folder = recipe(evaluate_every=2), tmp_path / "run"

    def start_again():
        model = Slope()
        train(
            model,
            slope_work(model),
            params,
            name="slope",
            checkpoints=Checkpoints(folder),
            track=lambda row: None,
        )

    with pytest.raises(TeachonceError, match="its gradient nan"):
        start_again()
    state, tensors = Checkpoints(folder).load()
    key = {"model": "model/numbers", "best": "best/numbers", "optimizer": "optimizer/0/exp_avg_sq"}
    tensors[key[what]][0, 2] = {"optimizer": np.inf}.get(what, np.nan)
    (newest,) = folder.glob("step-000000003-*")
    newest.unlink()
    Checkpoints(folder).save(state, tensors)
    with pytest.raises(TeachonceError) as error:
        start_again()
    assert str(error.value) == (
        f"{folder}: the checkpoint of step 3 has NaN or Inf in it, first in numbers\n"
        "  cure: delete its step-000000003-*.safetensors to go on from the checkpoint before it, or the "
        "folder to begin anew; then start the command again"
    )
    for path in folder.glob("step-000000003-*"):
        path.unlink()
    with pytest.raises(TeachonceError, match=r"^step 3: "):  # it went on from step 2
        start_again()


def test_weights_that_overflow_are_neither_judged_nor_kept(tmp_path, monkeypatch):
    """A rate so high that one step of a right gradient leaves the numbers that float32 has."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    for every in (1, 100):
        model, judged = Slope(), []
        params = recipe(learning_rate=3e38, weight_decay=4.0, warmup=0.0, evaluate_every=every)
        with pytest.raises(
            TeachonceError, match=r"^step 1: numbers has NaN or Inf in it after it\n  cure: lower "
        ):
            train(
                model,
                slope_work(model, lambda judged=judged: judged.append(1) or 1.0),
                params,
                name="slope",
                checkpoints=Checkpoints(tmp_path / "run"),
                track=lambda row: None,
            )
        assert judged == [1]  # before the first step
        assert Checkpoints(tmp_path / "run").load() is None


def test_a_score_that_is_no_number_is_no_best(tmp_path):
    model = Slope()
    with pytest.raises(TeachonceError, match=r"^step 0: agreement is nan: vectors have NaN or Inf"):
        train(
            model,
            slope_work(model, lambda: float("nan")),
            recipe(),
            name="slope",
            checkpoints=Checkpoints(tmp_path / "run"),
            track=lambda row: None,
        )


def test_what_dropout_draws_depends_on_the_seed_and_the_step_alone():
    def drawn(step, seed):
        model, found = Slope(), []
        work = dataclasses.replace(
            slope_work(model),
            loss=lambda rows, at: (found.append(torch.rand(4)), model.loss(rows, 0))[1],
        )
        params = recipe(seed=seed)
        loop.take_step(
            model, loop.make_optimizer(model, params), work, np.arange(4), step, 9, params
        )
        return found[0].tolist()

    assert drawn(5, 0) == drawn(5, 0)
    assert len({tuple(drawn(step, seed)) for step in (4, 5, 6) for seed in (0, 1)}) == 6


def test_patience_counts_from_the_last_best(tmp_path):
    """Two misses, a new best, three misses: the third in a row ends the run, the five in all do not."""
    model, scores = Slope(), iter([0.5, 0.4, 0.4, 0.6, 0.6, 0.1, 0.2, 0.9])
    work = dataclasses.replace(
        slope_work(model, lambda: next(scores)),
        batches=lambda epoch: [np.arange(4)] * 12,
        loss=lambda rows, step: model.loss(rows, 0),
    )
    state = train(
        model,
        work,
        recipe(evaluate_every=1, patience=3),
        name="slope",
        checkpoints=Checkpoints(tmp_path / "run"),
        track=lambda row: None,
    )
    assert (state.step, state.best_step, state.best_score) == (6, 3, 0.6)


def test_a_start_with_poisoned_weights_is_neither_made_nor_learned_from(world, tmp_path):
    folder = tmp_path / "poisoned"
    shutil.copytree(world.start, folder)
    weights = load_file(folder / "model.safetensors")
    name = "embeddings.LayerNorm.weight"
    weights[name][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    params = StartParams.model_validate({"from": "teacher", "layers": None})
    with pytest.raises(
        TeachonceError, match=rf"^starts.x.from: its weight .*{name} has NaN or Inf"
    ):
        start.run(params, name="x", folder=folder, trust_remote_code=False, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    world.start = folder
    with pytest.raises(TeachonceError, match=rf"^step 0: student.*{name} has NaN or Inf in it\n"):
        world.train(recipe())


def test_too_few_held_out_rows_are_refused(world):
    world.split = world.split.model_copy(update={"heldout": 1e-6})
    with pytest.raises(TeachonceError, match="0 held out are too few"):
        world.train(recipe())


# ------------------------------------------------------------------------------------------ resuming


class PowerCut(Exception):
    pass


@contextmanager
def power_cut(*, after):
    """The power fails after so many steps of training, each of which is checkpointed."""
    plain_step, taken = loop.take_step, 0

    def dying_step(*args):
        nonlocal taken
        if taken == after:
            raise PowerCut
        taken += 1
        return plain_step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(loop, "take_step", dying_step)
        yield


@pytest.mark.parametrize(
    ("objectives", "dies_after"),
    [
        *((CKD, step) for step in (1, 10, 26, 43)),
        ([SPECULATIVE], 17),
        ([ADAPTER], 26),
    ],
    ids=lambda value: value if isinstance(value, int) else value[0]["name"],
)
def test_a_killed_run_ends_with_the_same_weights(world, objectives, dies_after):
    world.negatives = world.mine(world.embeddings.manifest.content, 30)
    params = recipe(objectives=objectives, dropout=True)
    world.train(params, "whole")
    whole_curve, world.tracked = world.tracked, []
    with power_cut(after=dies_after):
        world.train(params, "killed")
    assert not (world.place.root / "killed").exists()
    world.tracked = []
    outcome = world.train(params, "killed")
    assert world.tracked == whole_curve  # a dashboard is shown what was before, too
    assert world.weights("killed") == world.weights("whole")
    whole = json.loads((world.place.root / "whole.json").read_text())
    assert whole.pop("minutes") >= 0
    assert {k: outcome.facts[k] for k in whole} == whole
    assert (world.place.root / "killed.csv").read_bytes() == (
        world.place.root / "whole.csv"
    ).read_bytes()


def test_a_killed_run_is_gone_on_with_by_nobody_who_learns_from_something_else(
    world, tiny_model, monkeypatch
):
    """Whatever a run reads stands in its name; the same again goes on."""
    params = recipe(objectives=[{**CKD[0], "neighbours": 2}], evaluate_every=100)
    lists = [world.mine("a", 1), world.mine("b", 7)]

    def runs(params=params, **world_is):
        with monkeypatch.context() as patch:
            for name, value in {"negatives": lists[0], **world_is}.items():
                patch.setattr(world, name, value)
            with power_cut(after=1):
                world.train(params)
        return sorted(path.name for path in (world.place.root / "work").iterdir())

    elsewhere = world.split.model_copy(update={"evaluation": (3, 4)})
    teacher = HashTeacher(32)
    world.place.embed(world.corpus, teacher, files={"model.safetensors": "1" * 64})
    others = Embeddings(world.place.store, world.place.embeddings, world.corpus)
    found = [
        runs(),
        runs(negatives=lists[1]),
        runs(split=elsewhere),
        runs(embeddings=others),
        runs(start=tiny_model),
        runs(params.model_copy(update={"seed": 1})),
    ]
    assert [len(folders) for folders in found] == [1, 2, 3, 4, 5, 6]
    assert runs() == found[-1]


def test_the_minutes_are_those_of_all_starts_of_a_run(world):
    with power_cut(after=12):
        world.train(recipe())
    (run,) = (world.place.root / "work").iterdir()
    state, tensors = Checkpoints(run).load()
    assert 0 < state.seconds < 600
    for path in run.iterdir():
        path.unlink()
    state.seconds = 6000.0
    Checkpoints(run).save(state, tensors)
    world.train(recipe())
    assert 100 <= json.loads((world.place.root / "student.json").read_text())["minutes"] < 110


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (1, 2, 3):
        checkpoints.save(State(step=step), {"model/w": torch.full((3,), float(step))})
    newest, older = sorted((tmp_path / "run").iterdir(), reverse=True)
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    state, tensors = checkpoints.load()
    assert state.step == 2
    assert tensors["model/w"].tolist() == [2.0] * 3
    assert f"{newest}: damaged" in caplog.text
    older.unlink()
    assert checkpoints.load() is None


def test_a_checkpoint_that_is_deleted_while_it_is_looked_for_is_no_error(tmp_path):
    """By another process that trains the same student; a link to nothing is listed and not there, too."""
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.load() is None
    checkpoints.save(State(step=3), {"model/w": torch.ones(1)})
    (tmp_path / "run" / f"step-000000004-{'0' * 64}.safetensors").symlink_to("gone")
    assert checkpoints.load()[0].step == 3


# ---------------------------------------------------------------------------------------- no teacher


@pytest.mark.slow
def test_a_student_is_trained_where_no_teacher_can_be_loaded(world, tiny_model, tmp_path):
    """A process in which every open of a file of the teacher fails."""
    code = f"""
        import sys
        from pathlib import Path

        def refuse(event, args):
            if event == "open" and str(args[0]).startswith({str(tiny_model)!r}):
                raise PermissionError("the teacher must not be read")
            if event == "socket.connect":
                raise PermissionError("no network")

        sys.addaudithook(refuse)
        import torch
        from stages import distill
        from stages.params import RecipeParams
        from storage.caches import Caches
        from storage.corpus import Corpus
        from storage.embeddings import Embeddings
        from storage.manifest import Manifest
        from storage.split import Split
        from storage.store import Store

        root = Path({str(world.place.root)!r})
        store = Store(root / "store")
        corpus = Corpus(store, Manifest.load(root / "corpus.json", "corpus"))
        embeddings = Embeddings(store, Manifest.load(root / "embeddings.json", "embeddings"), corpus)
        split = Split(corpus=corpus.manifest.content, heldout=0.1, evaluation=())
        outcome = distill.run(
            RecipeParams.model_validate({recipe().model_dump(mode="json")!r}),
            name="s",
            start=Path({str(world.start)!r}),
            caches=Caches(corpus, embeddings, None, split, store),
            device=torch.device("cpu"),
            work=root / "work",
            out=root / "s",
            curve=root / "s.csv",
            training=root / "s.json",
            track=lambda row: None,
        )
        print(outcome.facts["steps"])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "44"
