"""The door for Python: what is read through it is what lies in the store, in this process and in others."""

import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import teachonce
from pipeline.project import Project
from pipeline.workspace import Workspace
from storage.errors import DamagedError, MissingError, RowError, TeachonceError
from tests.conftest import HashTeacher, prompts, sentences
from tests.pipeline.test_upkeep import Tree, cut_in_half, write_params

TEXTS = sentences(240)


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_model):
    """A project whose teacher is a small transformer with a prompt, cut at 8 tokens and 16 values."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_model, root / "tiny")
    write_params(
        root, embed__teacher="./tiny", embed__prompts=prompts("Amber basin: "), mine__max_score=0.99
    )
    settings = (root / "params.yaml").read_text()
    for old, new in (("max_tokens: 64", "max_tokens: 12"), ("dim: null", "dim: 16")):
        settings = settings.replace(f"  {old}\n", f"  {new}\n", 1)
    (root / "params.yaml").write_text(settings)
    (root / "texts.txt").write_text("\n".join(TEXTS))
    tree = Tree(root, Workspace(root).load_teacher())
    assert (tree.params.embed.max_tokens, tree.params.embed.dim) == (12, 16)
    tree.shard()
    tree.embed()
    tree.mine()
    return root


@pytest.fixture(scope="module")
def tree(root):
    return Tree(root)


@pytest.fixture
def project(root):
    return teachonce.open(root)


@pytest.fixture(scope="module")
def stored(tree):
    """(240, 16) vectors of all rows, and (240, 8) neighbours and scores, as the store has them."""
    corpus, rows = tree.corpus(), np.arange(240)
    embeddings = tree.embeddings(corpus)
    negatives = tree.negatives(embeddings, tree.split(corpus), corpus)
    return embeddings.rows_of(rows), *negatives.rows_of(rows)


def test_the_door_opens_without_what_is_heavy():
    code = "import sys, teachonce; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert {"teachonce", "pipeline", "numpy"} <= loaded
    assert not loaded & {
        *("torch", "transformers", "sentence_transformers", "datasets"),
        *("pyarrow", "pydantic", "yaml", "fsspec", "faiss", "scipy"),
    }


def test_what_the_door_names_is_there_and_documented():
    for name in teachonce.__all__:
        documented = getattr(teachonce, name)
        assert documented.__doc__, name
        if (
            documented.__module__ in {"pipeline.project", "pipeline.by_row"}
            and name != "Neighbours"
        ):
            assert "Examples:\n" in documented.__doc__, name
            for part, member in vars(documented).items():
                if not part.startswith("_") and (callable(member) or hasattr(member, "func")):
                    described = getattr(member, "func", member).__doc__
                    assert "Examples:\n" in described, f"{name}.{part}"


def test_a_project_is_a_folder_or_its_settings(root, monkeypatch):
    assert repr(teachonce.open(root)) == f"teachonce.open('{root}')"
    monkeypatch.chdir(root)
    project = teachonce.open("params.yaml")
    monkeypatch.chdir(root.parent)
    assert (project.root, project.texts[0]) == (root, TEXTS[0])
    assert project.params.embed.prompts.text == "Amber basin: "
    for path in (root / "nowhere", root / "tiny", root / "texts.txt"):
        with pytest.raises(
            MissingError, match=r"no project: there is no params.yaml\n  cure: open"
        ):
            teachonce.open(path)


@pytest.mark.parametrize(
    "index",
    [
        *([5, 9], (9, 5, 9), slice(3, 9), slice(-4, None), slice(None, None, -50), range(7, 3, -2)),
        *(np.array([200, 0]), np.array([3], np.uint8), [], np.empty(0, np.int64)),
    ],
    ids=str,
)
def test_rows_are_read_by_their_ids(project, stored, index):
    ids = np.arange(240)[index if isinstance(index, slice) else np.array(index, int)]
    vectors, neighbours, scores = stored
    assert project.texts[index] == [TEXTS[row] for row in ids]
    read = project.vectors[index]
    assert (read.dtype, read.shape) == (np.float32, (len(ids), 16))
    np.testing.assert_array_equal(read, vectors[ids])
    lists = project.neighbours[index]
    if len(ids):
        np.testing.assert_array_equal(lists.ids, neighbours[ids])
        np.testing.assert_array_equal(lists.scores, scores[ids])


@pytest.mark.parametrize("row", [5, np.int64(5), np.uint8(5), np.array(5)])
def test_one_row_is_one_value(project, stored, row):
    vectors, neighbours, scores = stored
    assert project.texts[row] == TEXTS[5]
    np.testing.assert_array_equal(project.vectors[row], vectors[5])
    ids, cosines = project.neighbours[row]
    np.testing.assert_array_equal(ids, neighbours[5])
    np.testing.assert_array_equal(cosines, scores[5])


def test_all_rows_in_their_order(project, stored):
    assert list(project.texts) == TEXTS and TEXTS[7] in project.texts
    np.testing.assert_array_equal(np.stack(list(project.vectors)), stored[0])
    np.testing.assert_array_equal(np.stack([each.ids for each in project.neighbours]), stored[1])
    assert [len(each) for each in (project.texts, project.vectors, project.neighbours)] == [240] * 3
    assert project.vectors.shape == (240, 16)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (-1, "no row -1: row ids are 0 to 239"),
        (240, "no row 240: row ids are 0 to 239"),
        ([0, 240, 500], "no row 240: row ids are 0 to 239"),
        (np.array([3, -1]), "no row -1: row ids are 0 to 239"),
        (np.uint64(2**64 - 1), f"no row {2**64 - 1}: row ids are 0 to 239"),
        (2**80, f"indexed by {2**80}, which is no row id and no list of row ids"),
        ("5", "indexed by '5', which is no row id and no list of row ids"),
        (5.0, "indexed by 5.0, which is no row id and no list of row ids"),
        (True, "indexed by True, which is no row id and no list of row ids"),
        ([True, False], "indexed by [True, False], which is no row id and no list of row ids"),
        ([[5, 9]], "indexed by [[5, 9]], which is no row id and no list of row ids"),
        (None, "indexed by None, which is no row id and no list of row ids"),
    ],
    ids=str,
)
def test_what_is_no_row_is_refused(project, index, said):
    for column in (project.texts, project.vectors, project.neighbours):
        with pytest.raises(RowError) as refused:
            column[index]
        assert (refused.value.where, refused.value.problem) == (column.name, said)
        assert isinstance(refused.value, IndexError) and refused.value.cure
    if not isinstance(index, str):
        for read in (project.dataset, project.to_datasets):
            with pytest.raises(RowError):
                read(index)


def test_every_row_is_for_one_thing(project, tree):
    parts = {part: project.rows(part) for part in ("train", "heldout", "evaluation")}
    assert len(parts["heldout"]) > 0
    np.testing.assert_array_equal(np.sort(np.concatenate([*parts.values()])), project.rows("all"))
    np.testing.assert_array_equal(project.rows(), tree.split().train_rows(tree.corpus()))
    assert not np.isin(parts["heldout"], project.neighbours[:].ids).any()
    assert (project.neighbours[parts["heldout"]].ids == -1).all()
    for read in (project.rows, project.dataset, project.to_datasets):
        with pytest.raises(TeachonceError, match="say train, heldout, evaluation or all"):
            read("test")


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_vectors_are_float32_however_they_are_stored(tmp_path, storage):
    write_params(tmp_path, embed__storage=storage)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:60]))
    tree = Tree(tmp_path, HashTeacher())
    tree.shard()
    tree.embed()
    project, teacher = teachonce.open(tmp_path), HashTeacher()
    wanted = np.stack([teacher.vector(text) for text in TEXTS[:60]])
    stored = tree.embeddings().rows_of(np.arange(60)).astype(np.float32)
    item = project.dataset([7], neighbours=False)[0]
    for read in (
        project.vectors[:],
        np.stack(list(project.vectors)),
        np.stack([project.vectors[row] for row in range(60)]),
        np.array(project.to_datasets("all")["label"], np.float32),
    ):
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, stored)
        np.testing.assert_allclose(read, wanted, atol=0.004)
    assert (item["vector"].dtype, set(item)) == (np.float32, {"id", "text", "vector"})
    np.testing.assert_array_equal(item["vector"], stored[7])


def test_a_training_loop_reads_texts_vectors_and_neighbours(project, stored):
    vectors, neighbours, scores = stored
    dataset = project.dataset()
    assert isinstance(dataset, torch.utils.data.Dataset)
    assert [item["id"] for item in dataset] == project.rows("train").tolist()
    item = dataset[3]
    row = item["id"]
    assert item["text"] == TEXTS[row]
    np.testing.assert_array_equal(item["vector"], vectors[row])
    np.testing.assert_array_equal(item["neighbours"], neighbours[row])
    np.testing.assert_array_equal(item["scores"], scores[row])
    assert [item["id"] for item in project.dataset([9, 5, 9])] == [9, 5, 9]
    assert len(project.dataset("heldout")) == len(project.rows("heldout"))
    assert len(project.dataset([])) == 0


def epoch(dataset, workers, method):
    """What a loader gives of a dataset, in its order."""
    context = {"multiprocessing_context": method} if workers else {}
    loader = DataLoader(dataset, batch_size=50, num_workers=workers, **context)
    batches = list(loader)
    joined = {
        name: torch.cat([batch[name] for batch in batches])
        for name in ("id", "vector", "neighbours", "scores")
    }
    return joined, [text for batch in batches for text in batch["text"]]


# Fork's warning is about threads of this process, of which the worker uses none.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("workers", "method"),
    [(0, None), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("is_open", [False, True])
def test_workers_of_a_loader_read_the_same(project, stored, workers, method, is_open):
    vectors, neighbours, scores = stored
    dataset = project.dataset("all")
    if is_open:  # objects that this process has mapped are mapped anew by a spawned one
        assert len(dataset[0]["text"]) and len(project.vectors[:]) == 240
    joined, texts = epoch(dataset, workers, method)
    assert joined["id"].tolist() == list(range(240))
    assert texts == TEXTS
    assert joined["vector"].dtype == torch.float32
    np.testing.assert_array_equal(joined["vector"], vectors)
    np.testing.assert_array_equal(joined["neighbours"], neighbours)
    np.testing.assert_array_equal(joined["scores"], scores)


def read_in_another_process(dataset, row, pipe):
    try:
        pipe.send(dataset[row]["vector"])
    except TeachonceError as error:
        pipe.send(error)


@pytest.mark.slow
def test_a_spawned_worker_checks_the_files_itself(tree, tmp_path):
    tree = Tree(shutil.copytree(tree.at.root, tmp_path / "tree"))
    dataset = teachonce.open(tree.at.root).dataset("all")
    assert len(dataset[0]["vector"]) == 16
    cut_in_half(tree.path("embeddings"))
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=read_in_another_process, args=(dataset, 0, theirs))
    worker.start()
    assert ours.poll(120)
    assert isinstance(ours.recv(), DamagedError)
    worker.join()


def test_what_is_pickled_names_files_and_holds_none(project, stored):
    dataset = project.dataset("all")
    assert len(project.vectors[:]) == len(project.texts[:]) == 240
    pickled = pickle.dumps(dataset)
    assert stored[0].tobytes()[:64] not in pickled
    assert TEXTS[0].encode() not in pickled
    again = pickle.loads(pickled)
    assert again.corpus.store._checked == {}  # what is read there is checked there
    np.testing.assert_array_equal(again[17]["vector"], stored[0][17])
    assert project.teacher is project.teacher
    pickled = pickle.dumps(project)
    assert b"torch" not in pickled
    opened = pickle.loads(pickled)
    assert opened.texts[5] == TEXTS[5]
    np.testing.assert_array_equal(opened.neighbours[5].ids, stored[1][5])


def ids_of(dataset):
    return list(dataset.with_format(None)["id"])


def test_a_dataset_for_sentence_transformers(project, stored):
    dataset = project.to_datasets()
    train = project.rows("train")
    assert dataset.column_names == ["id", "text", "label"]
    assert ids_of(dataset) == train.tolist()
    # A trainer would tokenise the ids as a text: the rows that it gets are without them.
    assert set(dataset[0]) == {"text", "label"}
    assert set(dataset.with_format(None)[0]) == {"id", "text", "label"}
    assert list(dataset["text"]) == [TEXTS[row] for row in train]
    np.testing.assert_array_equal(np.array(dataset["label"], np.float32), stored[0][train])
    assert dataset.features["label"].feature.dtype == "float32"
    assert dataset.features["label"].length == 16
    few = project.to_datasets([9, 5, 9])
    assert ids_of(few) == [9, 5, 9] and list(few["text"]) == [TEXTS[9], TEXTS[5], TEXTS[9]]
    assert len({data._fingerprint for data in (dataset, few, project.to_datasets([9, 5]))}) == 3
    assert project.to_datasets()._fingerprint == dataset._fingerprint
    assert len(project.to_datasets([])) == 0


def test_negatives_are_columns_where_somebody_asks_for_them(project, stored, caplog):
    _, neighbours, _ = stored
    train = project.rows("train")
    lengths = (neighbours != -1).sum(axis=1)
    dataset = project.to_datasets([*train, *project.rows("heldout")], negatives=3)
    kept = train[lengths[train] >= 3]
    assert len(kept) > 0
    assert dataset.column_names == ["id", "text", "negative_1", "negative_2", "negative_3", "label"]
    assert list(dataset[0]) == ["text", "negative_1", "negative_2", "negative_3", "label"]
    assert ids_of(dataset) == kept.tolist()
    for place in range(3):
        wanted = [TEXTS[row] for row in neighbours[kept, place]]
        assert list(dataset[f"negative_{place + 1}"]) == wanted
    assert f"{240 - len(kept)} of 240 rows have fewer than 3 mined neighbours" in caplog.text
    with pytest.raises(
        TeachonceError, match="negatives=9: 8 were mined of each row\n  cure: ask for 8"
    ):
        project.to_datasets(negatives=9)
    with pytest.raises(TeachonceError, match="less than none"):
        project.to_datasets(negatives=-1)


def test_the_teacher_encodes_as_embed_does(project, stored):
    read = project.teacher.encode(project.texts[:])
    assert (read.dtype, read.shape) == (np.float32, (240, 16))
    np.testing.assert_allclose(read, stored[0], atol=1e-6)
    one = project.teacher.encode(TEXTS[5])
    np.testing.assert_allclose(one, stored[0][5], atol=1e-6)
    assert project.teacher.encode([]).shape[0] == 0
    assert project.teacher is project.teacher


def test_a_student_is_a_sentence_transformer(root, project, tiny_model):
    from sentence_transformers import SentenceTransformer

    shutil.copytree(tiny_model, root / "models/kd", dirs_exist_ok=True)
    student = project.student("kd")
    assert isinstance(student, SentenceTransformer) and not student.training
    wanted = SentenceTransformer(str(tiny_model), device="cpu").encode(TEXTS[:9])
    np.testing.assert_allclose(student.encode(TEXTS[:9]), wanted, atol=1e-6)
    for name, cure in (
        ("skew", "teachonce distill skew"),
        ("kd-finetuned", "teachonce finetune kd"),
        ("half", "teachonce start half"),
    ):
        with pytest.raises(MissingError, match=f"no such model\n  cure: run `{cure}`"):
            project.student(name)
    with pytest.raises(TeachonceError, match="use lower case letters"):
        project.student("../kd")
    with pytest.raises(TeachonceError, match=r"use `project.teacher`"):
        project.student("teacher")


def test_what_no_stage_has_made_yet_names_the_stage(tmp_path):
    write_params(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:60]))
    tree = Tree(tmp_path, HashTeacher())
    project = teachonce.open(tmp_path)
    with pytest.raises(
        MissingError, match=r"corpus.json: not there\n  cure: run `teachonce shard`"
    ):
        _ = project.texts
    tree.shard()
    assert len(project.texts) == 60
    with pytest.raises(
        MissingError, match=r"embeddings.json: not there\n  cure: run `teachonce embed`"
    ):
        _ = project.vectors
    tree.embed()
    assert len(project.vectors) == 60
    assert len(project.to_datasets()) == len(project.dataset(neighbours=False)) < 60
    for read in (
        lambda: project.neighbours,
        project.dataset,
        lambda: project.to_datasets(negatives=1),
    ):
        with pytest.raises(
            MissingError, match=r"negatives.json: not there\n  cure: run `teachonce mine`"
        ):
            read()
    with pytest.raises(MissingError, match="a-teacher"):
        _ = project.teacher
    (tmp_path / "data/split.json").unlink()
    project = teachonce.open(tmp_path)
    with pytest.raises(MissingError, match=r"split.json: not there\n  cure: run `teachonce split`"):
        project.rows()
    assert len(project.rows("all")) == 60


def test_a_damaged_file_is_noticed_when_it_is_read(tree, tmp_path):
    tree = Tree(shutil.copytree(tree.at.root, tmp_path / "tree"))
    cut_in_half(tree.path("embeddings"))
    project = Project(tree.at.root)
    with pytest.raises(DamagedError, match=r"repair"):
        project.vectors[0]
    assert project.texts[0] == TEXTS[0]


@pytest.mark.slow  # the trainer needs accelerate, which is among what only slow tests have
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_trainer_of_sentence_transformers_learns_from_it(project, tmp_path, tiny_model):
    """Its first loss is the mean squared distance to the cached vectors, and 20 steps halve that."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MSELoss

    def narrow():
        student = SentenceTransformer(str(tiny_model), device="cpu", truncate_dim=None)
        from sentence_transformers.sentence_transformer.modules import Dense

        torch.manual_seed(1)
        student.append(Dense(32, 16, activation_function=torch.nn.Identity()))
        return student.eval()

    dataset, rows = project.to_datasets(), project.rows("train")[:32]
    student = narrow()
    before = student.encode(project.texts[rows])
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    trainer = SentenceTransformerTrainer(
        model=student, args=arguments, train_dataset=dataset, loss=MSELoss(student)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    after = student.eval().encode(project.texts[rows])
    wanted = project.vectors[rows]
    assert losses[0] == pytest.approx(((before - wanted) ** 2).mean(), rel=0.5)
    assert ((after - wanted) ** 2).mean() < 0.5 * ((before - wanted) ** 2).mean()


NOTEBOOK = """
import teachonce
project = teachonce.open("PROJECT")
print(len(project.texts), project.vectors.shape, project.texts[5])
from torch.utils.data import DataLoader
batch = next(iter(DataLoader(project.dataset("all"), batch_size=8, num_workers=1)))
print(batch["id"].tolist(), tuple(batch["vector"].shape))
float(abs(project.teacher.encode(project.texts[:9]) - project.vectors[:9]).max()) < 1e-6
"""


@pytest.mark.slow
def test_the_door_opens_in_a_notebook(root, tmp_path):
    code = NOTEBOOK.replace("PROJECT", str(root)).strip().splitlines(keepends=True)
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    content = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {},
        "cells": [cell | {"id": f"cell-{n}", "source": [line]} for n, line in enumerate(code)],
    }
    (tmp_path / "door.ipynb").write_text(json.dumps(content))
    command = ["--to", "notebook", "--execute", "--output", "done.ipynb", "door.ipynb"]
    run = subprocess.run(
        [sys.executable, "-m", "nbconvert", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    cells = json.loads((tmp_path / "done.ipynb").read_text())["cells"]
    outputs = [out for each in cells for out in each["outputs"]]
    printed = ["".join(out["text"]) for out in outputs if out.get("name") == "stdout"]
    assert printed == [
        f"240 (240, 16) {TEXTS[5]}\n",
        f"{list(range(8))} (8, 16)\n",
    ]
    [result] = [out["data"]["text/plain"] for out in outputs if "data" in out]
    assert "".join(result) == "True"
