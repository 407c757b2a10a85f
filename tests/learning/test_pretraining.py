"""Pretraining with the teacher's predictions as classes: by the definition, and within a run."""

import csv
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stages import distill
from stages.learning.labelled_rows import labelled_rows, learned_triplets
from stages.learning.pretraining import (
    LabelledTriples,
    MinedTriples,
    Pretraining,
    margin_classes,
)
from storage.errors import TeachonceError
from storage.manifest import fingerprint
from storage.negatives import NONE
from storage.split import Split
from tests.conftest import sentences
from tests.stages.test_distill import (  # noqa: F401 - fixtures among them
    power_cut,
    recipe,
    start_folder,
    world,
)
from tests.stages.test_finetune import settings

WARM = {"pretrain": {"share": 0.25, "triplets": "mined"}, "dropout": True}
LABELLED = {"pretrain": {"share": 0.25, "triplets": "labelled"}}


class Lists:
    """Mined neighbours: row i has i + 1, i + 2 and so on, with these cosines."""

    def __init__(self, *cosines, short=()):
        self.cosines, self.short = np.array(cosines, np.float32), set(short)

    def rows_of(self, rows):
        ids = rows[:, None] + 1 + np.arange(len(self.cosines))
        scores = np.tile(self.cosines, (len(rows), 1))
        for place in np.flatnonzero([row in self.short for row in rows]):
            ids[place, 1:], scores[place, 1:] = -1, 0
        return ids, scores


def pretraining(lists, rows=60, dim=4):
    return Pretraining(MinedTriples(lists, seed=0), np.arange(rows), steps=5, dim=dim)


def test_classes_are_the_sign_and_the_sureness_of_a_margin():
    margins = np.array([-0.9, -0.31, -0.29, -0.01, 0.01, 0.29, 0.31])
    assert margin_classes(margins, 0.3).tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_two_neighbours_are_drawn_by_seed_and_step_with_the_teachers_margin():
    made = MinedTriples(Lists(0.9, 0.7, 0.4, short={3, 8}), seed=0)
    rows = np.arange(100, 400)
    (anchors, first, second), margins = made.draw(rows, step=7)
    assert anchors.tolist() == rows.tolist()
    cosines = np.array([0.9, 0.7, 0.4], np.float32)
    assert (first != second).all()
    assert np.array_equal(margins, cosines[first - rows - 1] - cosines[second - rows - 1])
    for pair in ((1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)):
        share = np.mean([(a, b) == pair for a, b in zip(first - rows, second - rows, strict=True)])
        assert 0.1 < share < 0.25, pair
    assert np.array_equal(made.draw(rows, step=7)[0], [anchors, first, second])
    assert not np.array_equal(made.draw(rows, step=8)[0], [anchors, first, second])
    # A row with one neighbour is left out.
    assert made.draw(np.arange(10), step=0)[0][0].tolist() == [0, 1, 2, 4, 5, 6, 7, 9]


def test_the_loss_is_the_cross_entropy_of_lines_that_cross_at_the_median():
    """By the definition, one triple at a time; the head begins as the classes of the student's margin."""
    made = pretraining(Lists(0.9, 0.7, 0.4), dim=5)
    assert made.median == pytest.approx(0.3)
    torch.manual_seed(1)
    vectors, margins = 3 * torch.randn(3, 8, 5), np.linspace(-0.8, 0.8, 8, dtype=np.float32)
    losses = []
    for place, margin in enumerate(margins):
        i, j, k = F.normalize(vectors[:, place], dim=1)
        m = float(i @ j - i @ k) / made.median
        lines = [-3 * m - 2, -m, m, 3 * m - 2]
        assert int(np.argmax(lines)) == margin_classes(np.array([m]), 1.0)[0]
        wanted = 2 * (margin > 0) + (abs(margin) > 0.3) * (1 if margin > 0 else -1) + (margin <= 0)
        losses.append(np.log(np.exp(lines).sum()) - lines[wanted])
    assert float(made(vectors, margins).detach()) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("lists", [Lists(0.5), Lists(0.5, 0.5), Lists(0.9, 0.1, short=range(40))])
def test_lists_without_two_neighbours_are_refused(lists):
    with pytest.raises(TeachonceError) as error:
        pretraining(lists)
    assert str(error.value) == (
        "recipes.*.pretrain: the mined neighbours of most rows are fewer than two, or equally near\n"
        "  cure: set mine.neighbours to 2 or more, raise mine.max_score, or take pretrain away"
    )


# ---------------------------------------------------------------------------------- labelled triplets


class Cached:
    """Vectors of rows, of no length in particular."""

    def __init__(self, rows, dim=6):
        self.vectors = np.random.default_rng(3).standard_normal((rows, dim)).astype(np.float16) * 7

    def rows_of(self, ids):
        return self.vectors[ids]


def test_labelled_triplets_have_the_margins_of_the_teachers_vectors():
    """By the definition, one triplet at a time."""
    ids = np.random.default_rng(0).integers(0, 50, (40, 3))
    made = LabelledTriples(ids, Cached(50), seed=4)
    triples, margins = made.draw(np.arange(1000, 1016), step=9)
    assert triples.shape == (3, 16)
    lines = [tuple(line) for line in ids.tolist()]
    drawn = [tuple(line) for line in triples.T.tolist()]
    assert set(drawn) <= set(lines) and len(set(drawn)) == len(drawn)
    of = Cached(50).vectors.astype(np.float64)
    for (i, j, k), margin in zip(drawn, margins, strict=True):
        near = of[i] @ of[j] / np.linalg.norm(of[i]) / np.linalg.norm(of[j])
        far = of[i] @ of[k] / np.linalg.norm(of[i]) / np.linalg.norm(of[k])
        assert margin == pytest.approx(near - far, abs=1e-5)
    again, later = made.draw(np.arange(16), step=9)[0], made.draw(np.arange(16), step=10)[0]
    assert np.array_equal(again, triples) and not np.array_equal(later, triples)
    # Where there are fewer than the step has rows, all of them, each once.
    assert sorted(map(tuple, made.draw(np.arange(99), step=0)[0].T.tolist())) == sorted(lines)
    every = np.abs(made.draw(np.arange(40), 0)[1])
    assert made.median(np.arange(40)) == pytest.approx(np.median(every))


def test_triplets_that_are_equally_near_are_refused():
    ids = np.tile([1, 2, 2], (8, 1))
    with pytest.raises(TeachonceError, match="equally near\n  cure: look at the rows of finetune"):
        LabelledTriples(ids, Cached(4), seed=0).median(np.arange(4))


def lines_of(rows):
    return "".join(
        json.dumps(dict(zip(("anchor", "positive", "negative"), row, strict=True))) + "\n"
        for row in rows
    )


def test_only_triplets_of_rows_to_train_on_are_learned(world, tmp_path):  # noqa: F811
    corpus, texts = world.corpus, world.corpus.take(np.arange(400))
    train = set(world.split.train_rows(corpus).tolist())
    out = next(iter(set(range(400)) - train))
    inside = sorted(train)
    ids = [[inside[n], inside[n + 1], inside[n + 2]] for n in range(0, 120, 3)]
    rows = [[texts[i], texts[j], [texts[k], texts[j + 0 * k][:-1] + "!"]] for i, j, k in ids]
    # A text that the corpus has not, one that is held out, and a pair.
    rows += [[texts[inside[0]], "Nobody embedded this one.", [texts[inside[1]]]]]
    rows += [[texts[inside[2]], texts[inside[3]], [texts[out]]], [texts[5], texts[6], []]]
    (tmp_path / "rows.jsonl").write_text(lines_of(rows))
    learned = learned_triplets(settings(dev=None, heldout=0.3), tmp_path)
    found = labelled_rows(learned, corpus, world.split)
    kept = {row[0] for row in learned}
    wanted = [line for line in ids if texts[line[0]] in kept]
    assert 15 < len(wanted) < 38  # a part is finetuning's to hold out
    assert found.tolist() == wanted
    assert len(learned_triplets(settings(dev="sts.tsv"), tmp_path)) == 2 * len(ids) + 2
    with pytest.raises(TeachonceError) as error:
        labelled_rows(learned[-1:], corpus, world.split)
    assert str(error.value) == (
        "finetune.triplets: 0 of 1 triplets have all three texts among the rows to train on; a recipe with "
        "`pretrain.triplets: labelled` needs 2\n  cure: put these texts into a file of shard.sources, too, "
        "so that the teacher reads them, or set the recipe's pretrain.triplets to mined"
    )


def test_an_anchor_is_looked_for_among_queries_and_the_others_among_documents(place):
    texts = sentences(80)
    corpus = place.corpus({"query": texts[:50], "document": texts[30:]})
    split = Split(corpus=corpus.manifest.content, heldout=1e-9, evaluation=())
    both, query, document = texts[40], texts[3], texts[70]
    found = labelled_rows([(both, both, query), (document, query, both)], corpus, split)
    texts_found = corpus.take(found.ravel())
    assert texts_found == [both, both, query, document, query, both]
    roles = corpus.roles_of(found.ravel())
    assert roles == ["query", "document", "query", "document", "query", "document"]


def test_a_run_learns_the_classes_of_labelled_triplets_and_needs_no_neighbours(warm):
    params = recipe(**LABELLED)
    assert params.reads_labels and not params.reads_neighbours
    assert distill.recipe(params)["pretrain"] == {"share": 0.25, "triplets": "labelled"}
    warm.negatives = None
    train = warm.split.train_rows(warm.corpus)
    lines = np.random.default_rng(1).choice(train, (60, 3))
    warm.labelled = lines
    warm.train(params, "labelled")
    rows = list(csv.DictReader((warm.place.root / "labelled.csv").read_text().splitlines()))
    assert rows[1]["loss_pretraining"] and not rows[1]["loss_kd"]
    # Other triplets, other weights, also where the run before has left a checkpoint.
    warm.labelled = lines[::-1].copy()
    warm.train(params, "reversed")
    assert warm.weights("reversed") != warm.weights("labelled")


def test_a_recipe_without_it_keeps_its_fingerprint():
    assert "pretrain" not in distill.recipe(recipe())
    assert fingerprint(distill.recipe(recipe())) == "749bf85d61c89e1d1da31fddf3f7eae471b46b7f"
    assert distill.recipe(recipe(**WARM))["pretrain"] == {"share": 0.25}
    assert not recipe().reads_neighbours and recipe(**WARM).reads_neighbours


class Mined:
    """The neighbours of `World.mine`, with the teacher's cosines."""

    def __init__(self, lists, embeddings):
        self.lists, self.vectors = lists, embeddings.rows_of(np.arange(400)).astype(np.float32)
        self.manifest = lists.manifest

    def rows_of(self, rows):
        ids, _ = self.lists.rows_of(rows)
        return ids, np.einsum("nd,nkd->nk", self.vectors[rows], self.vectors[ids])


@pytest.fixture
def warm(world):  # noqa: F811 - the fixture
    world.negatives = Mined(world.mine("a", 7), world.embeddings)
    return world


def test_a_run_learns_the_classes_then_its_objectives(warm):
    warm.train(recipe(**WARM, epochs=2))
    rows = list(csv.DictReader((warm.place.root / "student.csv").read_text().splitlines()))
    steps = json.loads((warm.place.root / "student.json").read_text())["steps"]
    assert steps == 44 and [int(row["step"]) for row in rows] == [0, 10, 20, 30, 40, 44]
    told = [(row["loss_kd"] != "", row["loss_pretraining"] != "") for row in rows]
    # Steps 0 to 10 are of classes, in 11 to 20 the first one is.
    assert told == [(False, False), (False, True), (True, True), *[(True, False)] * 3]
    # A mean over the steps that had it, not over all.
    assert 0.5 < float(rows[2]["loss_pretraining"]) / float(rows[1]["loss_pretraining"]) < 2
    kept = load_file(warm.place.root / "student/model.safetensors")
    assert set(kept) == set(load_file(warm.start / "model.safetensors"))


def test_the_classes_alone_bring_a_student_nearer_to_its_teacher(warm):
    warm.train(
        recipe(
            pretrain={"share": 0.9, "triplets": "mined"},
            epochs=6,
            evaluate_every=119,
            batch_size=18,
        )
    )
    scores = [row["agreement"] for row in warm.tracked]
    assert scores[1] > scores[0] + 0.03


class Short(Mined):
    """Two rows of five have one neighbour."""

    def rows_of(self, rows):
        ids, cosines = super().rows_of(rows)
        few = (rows % 5 < 2)[:, None] & (np.arange(ids.shape[1]) > 0)
        return np.where(few, NONE, ids), cosines


def test_a_step_among_rows_without_two_neighbours_changes_nothing(warm):
    """A batch of four pretrains on one row, so two steps in five are such."""
    warm.negatives = Short(warm.negatives.lists, warm.embeddings)
    warm.train(
        recipe(
            pretrain={"share": 0.2, "triplets": "mined"}, batch_size=4, epochs=1, evaluate_every=1
        )
    )
    learned = [row["loss_pretraining"] is not None for row in warm.tracked[1:18]]
    assert 0.3 < np.mean(learned) < 0.9
    scores = [row["agreement"] for row in warm.tracked[:18]]
    assert [before != after for before, after in pairwise(scores)] == learned


@pytest.mark.parametrize("dies_after", [1, 3, 10, 11, 12, 30])
def test_a_killed_run_ends_with_the_same_weights(warm, dies_after):
    params = recipe(**(LABELLED if dies_after == 3 else WARM))
    train = warm.split.train_rows(warm.corpus)
    warm.labelled = np.random.default_rng(2).choice(train, (60, 3))
    warm.train(params, "whole")
    with power_cut(after=dies_after):
        warm.train(params, "killed")
    warm.train(params, "killed")
    assert warm.weights("killed") == warm.weights("whole")
    curves = [(warm.place.root / f"{name}.csv").read_bytes() for name in ("killed", "whole")]
    assert curves[0] == curves[1]
