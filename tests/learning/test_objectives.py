"""Objectives, candidates and batches: each formula beside its slow definition."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.learning import objectives
from stages.learning.batches import epoch_batches, some_rows
from stages.learning.candidates import CandidateSource
from stages.learning.loop import TrainingSetup, learning_rate, make_optimizer, take_step
from stages.learning.objectives import (
    Candidates,
    MixedBatch,
    Objectives,
    Temperature,
    ckd,
    info_nce,
    kd,
    narrow,
)
from stages.params import (
    LEAST_TEMPERATURE,
    CkdObjective,
    DiscoCkdObjective,
    GramObjective,
    KdObjective,
    MixesObjective,
    RecipeParams,
    RelationalObjective,
)
from stages.vectors import rank_agreement, top_overlaps
from storage.column import text_keys_of
from storage.embeddings import Embeddings
from storage.manifest import Manifest, fingerprint
from storage.negatives import NONE, Negatives, put_negatives
from tests.conftest import HashTeacher, sentences


def unit(*shape, seed=0):
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


def ckd_objective(**changes):
    return CkdObjective.model_validate(
        {
            "name": "ckd",
            "weight": 1.0,
            "temperature": 0.1,
            "learnable_temperature": True,
            "queue": 8,
            "neighbours": 2,
        }
        | changes
    )


def relational(**changes):
    return RelationalObjective.model_validate(
        {
            "name": "relational",
            "weight": 1.0,
            "temperature": 0.1,
            "teacher_temperature": 0.1,
            "queue": 0,
            "neighbours": 2,
            "deleted_tokens": 0.0,
        }
        | changes
    )


# --------------------------------------------------------------------------------------- definitions


def slow_kd(student, teacher):
    rows, width = student.shape
    total = 0.0
    for i in range(rows):
        for d in range(width):
            total += (float(student[i, d]) - float(teacher[i, d])) ** 2
    return total / (rows * width)


def test_kd_is_its_definition():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    assert float(kd(student, teacher)) == pytest.approx(slow_kd(student, teacher), rel=1e-5)
    assert float(kd(teacher, teacher)) == 0.0


def slow_centred_kd(student, teacher):
    """Differences of all pairs of rows."""
    rows, width = student.shape
    total = 0.0
    for i in range(rows):
        for j in range(rows):
            for d in range(width):
                ours = float(student[i, d]) - float(student[j, d])
                total += (ours - (float(teacher[i, d]) - float(teacher[j, d]))) ** 2
    return total / (2 * rows * rows * width)


def test_centred_kd_is_its_definition_and_leaves_an_offset_free():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    objective = KdObjective(name="kd", weight=1.0, centred=True)

    def loss(vectors):
        return Objectives([objective])({0.0: vectors}, teacher, [None])[1][0]

    found = loss(student)
    assert found == pytest.approx(slow_centred_kd(student, teacher), rel=1e-5)
    assert found < slow_kd(student, teacher)
    assert loss(student + torch.randn(7)) == pytest.approx(found, rel=1e-4)
    assert loss(teacher + 3.0) == pytest.approx(0.0, abs=1e-10)


def test_mixes_are_kd_on_vectors_of_their_own_at_each_width():
    mixed = MixedBatch(torch.randn(5, 7), torch.randn(5, 7))
    plain, teacher = torch.randn(9, 7), torch.randn(9, 7)
    for centred, slow in ((False, slow_kd), (True, slow_centred_kd)):
        objective = MixesObjective(name="mixes", weight=3.0, centred=centred, rows=5)
        total, parts = Objectives([objective], widths=[4])({0.0: plain}, teacher, [mixed])
        expected = [
            slow(narrow(mixed.student, width), narrow(mixed.teacher, width)) for width in (7, 4)
        ]
        assert parts == [pytest.approx(expected[0], rel=1e-5)]
        assert float(total) == pytest.approx(3.0 * np.mean(expected), rel=1e-5)
    with pytest.raises(TypeError, match="needs MixedBatch"):
        Objectives([objective])({0.0: plain}, teacher, [None])


def slow_ckd(student, candidates, scale):
    """One row, one candidate at a time, in double precision."""
    losses = []
    for i, vector in enumerate(student.double()):
        direction = vector / vector.norm()
        terms, own = [], None
        for j, other in enumerate(candidates.vectors.double()):
            term = math.exp(scale * float(direction @ other))
            if j == int(candidates.positives[i]):
                own = term
            elif candidates.not_negative[i, j]:
                continue
            terms.append(term)
        losses.append(-math.log(own / sum(terms)))
    return sum(losses) / len(losses)


def test_ckd_is_its_definition():
    same = torch.zeros(4, 11, dtype=torch.bool)
    same[0, [0, 7]] = same[1, 1] = same[2, [2, 3, 9]] = same[3, [2, 3]] = True
    candidates = Candidates(unit(11, 6), positives=torch.arange(4), not_negative=same)
    student = 3 * torch.randn(4, 6)
    fast = float(ckd(student, candidates, torch.tensor(8.0)))
    assert fast == pytest.approx(slow_ckd(student, candidates, 8.0), rel=1e-5)


@pytest.mark.parametrize("queued", [0, 17])
@pytest.mark.parametrize("width", [16, 10])
def test_ckd_and_its_gradients_are_those_of_info_nce(width, queued, monkeypatch):
    """A pass in chunks of 7 beside autograd over the whole matrix of logits, keys of any length."""
    monkeypatch.setattr(objectives, "CHUNK", 7)
    draw = torch.Generator().manual_seed(3)
    vectors = 5 * torch.rand(40, 1, generator=draw) * unit(40, 16, seed=4)
    same = torch.rand(5, 40 + queued, generator=draw) < 0.2
    candidates = Candidates(
        vectors,
        positives=torch.tensor([3, 0, 39, 8, 21]),
        not_negative=same,
        queue=unit(queued, 16, seed=6) if queued else None,
    )
    found = []
    for objective in (ckd, info_nce):
        student = unit(5, width, seed=5).mul(2).requires_grad_()
        # Warm: at 30, float32 in another order of adding (another CPU) is off by more than this bound.
        scale = torch.tensor(5.0, requires_grad=True)
        loss = objective(student, candidates, scale)
        (3 * loss).backward()
        found.append((loss.detach(), student.grad, scale.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert float(found[0][0]) > 1


def test_ckd_in_bfloat16_is_near_and_never_negative():
    vectors = unit(3000, 64, seed=6)
    same = torch.zeros(4, 3000, dtype=torch.bool)
    candidates = Candidates(vectors.half(), positives=torch.arange(4), not_negative=same)
    student, scale = unit(4, 64, seed=7), torch.tensor(20.0)
    exact = float(ckd(student, candidates, scale))
    assert float(ckd(student, candidates, scale, precision="bf16")) == pytest.approx(
        exact, rel=1e-2
    )
    assert 0 <= float(ckd(vectors[:4], candidates, torch.tensor(100.0), precision="bf16")) < 1e-3


def test_ckd_of_a_student_that_knows_nothing_is_the_logarithm_of_the_candidates():
    vectors = torch.eye(8)[:, :]
    candidates = Candidates(
        vectors, positives=torch.arange(3), not_negative=torch.zeros(3, 8, dtype=torch.bool)
    )
    student = torch.ones(3, 8)
    assert float(ckd(student, candidates, torch.tensor(20.0))) == pytest.approx(
        math.log(8), rel=1e-5
    )


def test_a_perfect_student_has_no_floor_although_its_own_text_stands_in_the_queue():
    """Six copies of each row's text among the candidates: without the mask the loss is log(1 + 6)."""
    own = torch.eye(4)
    vectors = torch.cat([own, own.repeat(6, 1)])
    same = vectors @ own.T > 0.5
    masked = Candidates(vectors, positives=torch.arange(4), not_negative=same.T)
    unmasked = Candidates(vectors, positives=torch.arange(4), not_negative=torch.zeros_like(same.T))
    scale = torch.tensor(100.0)
    assert float(ckd(own, masked, scale)) == pytest.approx(0.0, abs=1e-6)
    assert float(ckd(own, unmasked, scale)) == pytest.approx(math.log(7), rel=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.5, 0.1)])
def test_the_objectives_are_summed_by_weight(weights):
    objectives = Objectives(
        [
            KdObjective(name="kd", weight=weights[0], centred=False),
            ckd_objective(weight=weights[1], temperature=0.25),
        ]
    )
    student, teacher = torch.randn(3, 6), unit(3, 6)
    candidates = Candidates(
        unit(9, 6, seed=2),
        positives=torch.arange(3),
        not_negative=torch.zeros(3, 9, dtype=torch.bool),
    )
    total, parts = objectives({0.0: student}, teacher, [None, candidates])
    total = total.detach()
    assert objectives.names == ["kd", "ckd"]
    assert parts[0] == pytest.approx(slow_kd(student, teacher), rel=1e-5)
    assert parts[1] == pytest.approx(slow_ckd(student, candidates, 4.0), rel=1e-5)
    assert float(total) == pytest.approx(weights[0] * parts[0] + weights[1] * parts[1], rel=1e-5)


def test_only_a_learnable_temperature_learns_and_it_stays_above_its_floor():
    student = torch.randn(3, 6, requires_grad=True)
    candidates = Candidates(
        unit(9, 6), positives=torch.arange(3), not_negative=torch.zeros(3, 9, dtype=torch.bool)
    )
    for learnable in (True, False):
        objectives = Objectives([ckd_objective(learnable_temperature=learnable)])
        total, _ = objectives({0.0: student}, unit(3, 6), [candidates])
        (total + 0 * student.sum()).backward()
        (scale,) = objectives.parameters()
        assert (scale.grad is not None and float(scale.grad) != 0) == learnable
        assert objectives.notes(unit(2, 6)) == {"temperature_ckd": pytest.approx(0.1)}
        with torch.no_grad():
            scale.fill_(50.0)
        objectives.learned["0"].keep_in_bounds()
        found = objectives.notes(unit(2, 6))["temperature_ckd"]
        assert (found == pytest.approx(LEAST_TEMPERATURE)) == learnable


@pytest.mark.parametrize("kind", ["ckd", "disco_ckd", "info_nce"])
def test_a_learned_temperature_that_reached_its_bound_comes_back(kind):
    """Colder is better while the own key is the nearest, and warmer as soon as it is not."""
    same = torch.zeros(2, 4, dtype=torch.bool)
    right = Candidates(torch.eye(4), positives=torch.tensor([0, 1]), not_negative=same)
    wrong = Candidates(torch.eye(4), positives=torch.tensor([2, 3]), not_negative=same)
    anchors = torch.eye(4)[:2] + 0.5
    if kind == "info_nce":
        model = Temperature(0.0101, learnable=True)
        learned = model
    else:
        params = ckd_objective(temperature=0.0101)
        if kind == "disco_ckd":
            params = DiscoCkdObjective(name="disco_ckd", weight=1.0, queue=0)
        model = Objectives([params])
        (learned,) = model.learned.values()
        with torch.no_grad():
            learned.log_scale.fill_(math.log(99))

    def loss(rows, step):
        among = right if step < 100 else wrong
        if kind == "info_nce":
            total = info_nce(anchors, among, learned.scale())
        else:
            total, _ = model({0.0: anchors}, torch.eye(4), [among])
        # At 100 x cosine the right key has all of the share: nothing but this pushes beyond the bound.
        return (total - (learned.log_scale if step < 100 else 0)), [0.0]

    params = RecipeParams.model_construct(
        learning_rate=0.02, warmup=0.0, weight_decay=0.0, clip=None, seed=0
    )
    optimizer = make_optimizer(model, params)
    work = TrainingSetup(
        batches=lambda epoch: [],
        loss=loss,
        score=float,
        score_name="",
        initial_may_win=False,
        parts=[],
        notes=dict,
    )
    values = []
    for step in range(150):
        take_step(model, optimizer, work, np.arange(2), step, 10_000, params)
        values.append(learned.value())
    assert min(values) == values[99] == pytest.approx(LEAST_TEMPERATURE)
    assert values[149] > 1.2 * LEAST_TEMPERATURE


def test_two_of_a_kind_have_two_names():
    assert Objectives([ckd_objective(), ckd_objective()]).names == ["ckd", "ckd-2"]


def test_the_gradient_goes_to_the_student_alone():
    student, vectors = torch.randn(3, 6, requires_grad=True), unit(9, 6).requires_grad_()
    same = torch.zeros(3, 9, dtype=torch.bool)
    with torch.no_grad():
        frozen = vectors.clone()
    ckd(student, Candidates(frozen, torch.arange(3), same), torch.tensor(5.0)).backward()
    assert torch.isfinite(student.grad).all()
    assert float(student.grad.abs().sum()) > 0
    assert vectors.grad is None


# ---------------------------------------------------------------------------------------- candidates


@pytest.fixture
def source(place):
    """Candidates from a corpus of 200 rows, of which every fifth takes no part.

    The teacher's vectors have lengths other than 1, and a row has more neighbours than most tests ask for.
    """
    corpus = place.corpus(sentences(200))
    place.embed(corpus, HashTeacher(scale=3.0))
    embeddings = Embeddings(place.store, place.embeddings, corpus)
    train = np.flatnonzero(np.arange(200) % 5 != 0)
    objects = []
    for shard in range(len(corpus.objects)):
        ids = np.arange(corpus.starts[shard], corpus.starts[shard + 1])
        none = np.full(len(ids), NONE)
        neighbours = np.stack([*((ids + step) % 200 for step in (1, 2, 30)), none], axis=1)
        objects.append(
            put_negatives(
                place.store,
                f"negatives/{fingerprint({'parent': 'p'})}/{shard:06}.arrow",
                neighbours=neighbours,
                scores=np.zeros(neighbours.shape, np.float32),
                text_keys=text_keys_of(corpus.batch(shard)),
                facts={},
            )
        )
    manifest = Manifest(kind="negatives", recipe={}, parent="p", objects=tuple(objects))
    return CandidateSource(
        embeddings,
        Negatives(place.store, manifest, corpus, mined_from="p"),
        train=train,
        rows_of_step=lambda step: 10 * step + np.arange(10),
        seed=7,
        device=torch.device("cpu"),
    )


def test_candidates_are_the_batch_its_neighbours_and_a_queue_of_training_rows(source):
    ids = np.array([11, 3, 12])
    objective = ckd_objective(queue=50, neighbours=2)
    assert source.rows(objective, ids, step=0).tolist() == [11, 3, 12, 4, 5, 13, 14]
    queue = source.queue(objective, step=0).rows.tolist()
    assert len(queue) == 50
    assert sorted(set(queue)) == queue
    assert not any(row % 5 == 0 for row in queue)
    alone = ckd_objective(queue=0, neighbours=0)
    assert source.rows(alone, ids, step=0).tolist() == [11, 3, 12]
    assert source.queue(alone, step=0) is None


@pytest.mark.parametrize(
    ("count", "mined"), [(1, [4, 12]), (2, [4, 5, 12, 13]), (3, [4, 5, 12, 13, 33, 41])]
)
def test_a_row_brings_as_many_of_its_nearest_as_the_objective_asks_for(source, count, mined):
    ids = np.array([11, 3])
    for objective in (ckd_objective(queue=0, neighbours=count), relational(neighbours=count)):
        assert source.rows(objective, ids, step=0).tolist() == [11, 3, *mined]
        drawn = source.draw(objective, ids, step=0)
        assert drawn.vectors.shape[0] == drawn.not_negative.shape[1] == 2 + len(mined)


def test_neighbours_that_are_asked_for_and_not_there_are_an_error(source):
    source.negatives = None
    assert source.rows(ckd_objective(neighbours=0), np.array([3]), step=0).tolist() == [3]
    with pytest.raises(TypeError, match="needs mined neighbours"):
        source.rows(ckd_objective(neighbours=1), np.array([3]), step=0)


def test_the_queue_is_drawn_by_seed_and_step_alone_and_anew_after_some_steps(source):
    objective = ckd_objective(queue=50, neighbours=0)
    steps = [0, 15, 16, 31, 32]
    found = [source.queue(objective, step=step).rows.tolist() for step in steps]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] != found[2] != found[4] != found[0]
    # A run that was killed at step 31 and goes on has it again: of those asked for last, two are known.
    assert source.queue(objective, step=0).rows.tolist() == found[0]
    assert source.queue(objective, step=31).rows.tolist() == found[3]
    source.seed = 8
    assert source.queue(objective, step=32).rows.tolist() != found[4]


class Noted:
    """Vectors, and the ids of those that were read since it was last asked."""

    def __init__(self, embeddings):
        self.embeddings, self.ids = embeddings, []

    def rows_of(self, ids):
        self.ids += ids.tolist()
        return self.embeddings.rows_of(ids)

    def taken(self):
        ids, self.ids = set(self.ids), []
        return ids


@pytest.mark.parametrize("size", [0, 50, 159, 160, 16384])
def test_the_vectors_that_a_step_will_read_are_those_that_it_reads(source, size):
    source.embeddings = noted = Noted(source.embeddings)
    for objective in (ckd_objective(queue=size, neighbours=2), relational(queue=size)):
        source._queue.cache_clear()
        for step in range(35):
            ids = np.array([(7 * step) % 200, (7 * step + 31) % 200])
            wanted = set(source.vectors_read(objective, ids, step=step).tolist())
            source.draw(objective, ids, step=step)
            assert wanted == noted.taken()
            assert (len(wanted) > 40) == (
                size > 0 and step in ((0, 16, 32) if size < 160 else (0,))
            )
    past = DiscoCkdObjective(name="disco_ckd", weight=1, queue=25)
    wanted = set(source.vectors_read(past, np.array([61, 62]), step=6).tolist())
    source.draw(past, np.array([61, 62]), step=6)
    assert wanted == noted.taken() == {61, 62, *range(50, 60), *range(40, 50), *range(30, 35)}
    assert source.vectors_read(KdObjective(name="kd", weight=1, centred=True), ids, step=0) is ids


@pytest.mark.parametrize("size", [159, 160, 161, 16384])
def test_a_queue_has_as_many_distinct_rows_as_it_says_and_all_of_them_if_it_is_larger(source, size):
    queues = [source.queue(ckd_objective(queue=size), step=step) for step in (0, 16, 32)]
    for queue in queues:
        assert len(set(queue.rows.tolist())) == len(queue.keys) == min(size, 160)
        assert set(queue.rows.tolist()) <= set(source.train.tolist())
    if size >= 160:
        assert queues[0].rows.tolist() == source.train.tolist()
        assert queues[0] is queues[1] is queues[2]  # fetched once
    else:
        assert queues[0].rows.tolist() != queues[1].rows.tolist()


def test_a_few_of_many_rows_are_drawn_evenly_and_by_seed_and_number_alone():
    rows = 3 * np.arange(1_000_000)
    drawn = np.stack([some_rows(rows, 2000, seed=5, number=number) for number in range(40)])
    for one in drawn:
        assert len(set(one.tolist())) == 2000
        assert (np.diff(one) > 0).all()
        assert not (one % 3).any()
    # Thirds of the corpus have thirds of the queue: 80,000 draws, a deviation of 0.0017.
    assert np.histogram(drawn, bins=3, range=(0, 3_000_000))[0] / 80_000 == pytest.approx(
        [1 / 3] * 3, abs=0.01
    )
    assert some_rows(rows, 2000, seed=5, number=3).tolist() == drawn[3].tolist()
    assert some_rows(rows, 2000, seed=6, number=3).tolist() != drawn[3].tolist()
    assert some_rows(rows[:9], 10, seed=0, number=0).tolist() == rows[:9].tolist()


def test_candidate_vectors_are_the_teachers_and_know_their_own_text(source):
    ids = np.array([11, 3])
    objective = ckd_objective(queue=20)
    drawn = source.draw(objective, ids, step=1)
    rows, queue = source.rows(objective, ids, step=1), source.queue(objective, step=1).rows
    assert np.allclose(drawn.vectors.numpy(), source.embeddings.rows_of(rows), atol=1e-6)
    queued = source.embeddings.rows_of(queue).astype(np.float32)
    queued /= np.linalg.norm(queued, axis=1, keepdims=True)
    assert np.allclose(drawn.queue.numpy(), queued, atol=1e-6)
    keys = source.embeddings.rows_of(np.concatenate([rows, queue]))
    assert np.linalg.norm(keys, axis=1) == pytest.approx(3.0, abs=1e-5)
    assert np.allclose(drawn.keys.numpy(), keys / 3, atol=1e-6)
    assert drawn.positives.tolist() == [0, 1]
    own = ids[:, None] == np.concatenate([rows, queue])[None, :]
    twice = np.isin(queue, rows)
    assert twice.any()
    assert drawn.not_negative[:, : len(rows)].tolist() == own[:, : len(rows)].tolist()
    assert drawn.not_negative[:, len(rows) :].tolist() == [twice.tolist()] * 2


def test_only_ckd_has_its_queue_in_the_type_of_its_products(source):
    source.precision = "bf16"
    ids = np.array([11, 3])
    drawn = source.draw(ckd_objective(queue=20), ids, step=0)
    exact = source.draw(relational(queue=20), ids, step=0)
    assert drawn.queue.dtype == torch.bfloat16
    assert exact.queue.dtype == torch.float32
    assert torch.equal(drawn.queue, exact.queue.bfloat16())


def test_the_queue_of_disco_holds_the_rows_of_past_steps_the_newest_batch_first(source):
    ids = np.arange(50, 60)
    disco = DiscoCkdObjective(name="disco_ckd", weight=1.0, queue=25)
    rows = source.rows(disco, ids, step=5)
    assert rows.tolist() == [*ids, *range(40, 50), *range(30, 40), *range(20, 25)]
    assert source.rows(disco, ids, step=0).tolist() == ids.tolist()
    assert source.rows(disco, ids, step=1).tolist() == [*ids, *range(10)]


def test_disco_leaves_no_copy_of_a_rows_own_text_out(source):
    """Row 2 of this batch stood in the batch before, and stays in its own denominator."""
    ids, disco = np.array([2, 11]), DiscoCkdObjective(name="disco_ckd", weight=1.0, queue=4)
    drawn = source.draw(disco, ids, step=1)
    assert source.rows(disco, ids, step=1).tolist() == [2, 11, 0, 1, 2, 3]
    assert drawn.not_negative.int().tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]


def test_objectives_on_the_batch_alone_have_its_rows_as_candidates_and_kd_has_none(source):
    ids = np.array([11, 3, 12])
    drawn = source.draw(GramObjective(name="gram", weight=1.0, temperature=None), ids, step=3)
    assert np.allclose(drawn.vectors.numpy(), source.embeddings.rows_of(ids), atol=1e-6)
    assert source.draw(KdObjective(name="kd", weight=1.0, centred=False), ids, step=3) is None


# ------------------------------------------------------------------------------------------- batches


def test_an_epoch_visits_each_row_once_in_whole_batches():
    rows = np.arange(10_000) * 3
    batches = epoch_batches(rows, batch_size=64, seed=1, epoch=0)
    assert [len(batch) for batch in batches] == [64] * (10_000 // 64)
    seen = np.concatenate(batches)
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(rows.tolist())
    # In no order: the mean row of a batch says nothing of when it comes.
    order = [batch.mean() for batch in batches]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2


@pytest.mark.parametrize(("of_a_row", "beyond"), [(4, 0), (8, 2**40)])
def test_an_epoch_has_the_order_of_a_permutation_of_places_in_the_narrowest_type(of_a_row, beyond):
    rows = np.arange(1_000) * 7 + beyond
    batches = epoch_batches(rows, batch_size=64, seed=3, epoch=2)
    assert batches.order.itemsize == of_a_row
    order = rows[np.random.default_rng([3, 2]).permutation(1_000)]
    assert len(batches) == 15
    for place, batch in enumerate(batches):
        assert batch.dtype == np.int64
        assert (batch == order[64 * place :][:64]).all()
    assert (batches[-1] == order[64 * 14 : 64 * 15]).all()
    with pytest.raises(IndexError):
        batches[15]


def test_an_epoch_has_an_address():
    def batches(seed, epoch):
        return np.stack(
            epoch_batches(np.arange(500), batch_size=50, seed=seed, epoch=epoch)
        ).tolist()

    assert batches(0, 3) == batches(0, 3)
    assert batches(0, 3) != batches(0, 2)
    assert batches(0, 3) != batches(1, 3)


def test_a_corpus_smaller_than_a_batch_is_one_batch():
    (batch,) = epoch_batches(np.arange(7), batch_size=64, seed=0, epoch=0)
    assert sorted(batch) == list(range(7))


# ---------------------------------------------------------------------------- schedule and agreement


class Weights(torch.nn.Module):
    """One of each kind: a matrix, a vector, a number, a temperature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.matrix = torch.nn.Parameter(torch.randn(3, 2))
        self.bias = torch.nn.Parameter(torch.randn(3))
        self.number = torch.nn.Parameter(torch.tensor(0.7))
        self.temperature = Temperature(0.2, learnable=True)


def slow_adamw(values, gradients, params):
    """Its formulas in double precision, weight by weight; only matrices are decayed."""
    total = len(gradients)
    values = [value.astype(np.float64) for value in values]
    first = [np.zeros_like(value) for value in values]
    second = [np.zeros_like(value) for value in values]
    for step, given in enumerate(gradients):
        norm = math.sqrt(sum(float(np.square(one).sum()) for one in given))
        shrink = min(1.0, params.clip / (norm + 1e-6)) if params.clip else 1.0
        rate = learning_rate(step, total, params)
        for place, one in enumerate(given):
            gradient = shrink * one
            first[place] = 0.9 * first[place] + 0.1 * gradient
            second[place] = 0.98 * second[place] + 0.02 * gradient**2
            decay = params.weight_decay if values[place].ndim > 1 else 0.0
            values[place] = values[place] - rate * decay * values[place]
            mean, spread = (
                first[place] / (1 - 0.9 ** (step + 1)),
                second[place] / (1 - 0.98 ** (step + 1)),
            )
            values[place] = values[place] - rate * mean / (np.sqrt(spread) + 1e-8)
    return values


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_are_those_of_adamw_by_its_formulas(clip, decay):
    """Gradients above and below the clip, and large weights: what is clipped or decayed is seen."""
    params = RecipeParams.model_construct(
        learning_rate=0.05, warmup=0.2, weight_decay=decay, clip=clip, seed=0
    )
    model = Weights()
    weights = list(model.parameters())
    before = [weight.detach().numpy().copy() for weight in weights]
    draw = np.random.default_rng(0)
    gradients = [
        [size * draw.normal(size=value.shape) for value in before]
        for size in (0.01, 3.0, 0.1, 30.0, 0.5)
    ]

    def loss(rows, step):
        given = [torch.tensor(one, dtype=torch.float32) for one in gradients[step]]
        return sum((w * one).sum() for w, one in zip(weights, given, strict=True)), []

    optimizer, work = make_optimizer(model, params), SimpleNamespace(loss=loss)
    for step in range(len(gradients)):
        take_step(model, optimizer, work, np.arange(2), step, len(gradients), params)
    for weight, expected in zip(weights, slow_adamw(before, gradients, params), strict=True):
        assert weight.detach().numpy() == pytest.approx(expected, abs=2e-5)


def test_the_learning_rate_rises_then_falls():
    params = RecipeParams.model_construct(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, params) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))


def slow_rank_agreement(ours, teacher):
    """Ranks by counting, then Pearson by its formula."""

    def pairs(vectors):
        found = []
        for i in range(len(vectors)):
            for j in range(i + 1, len(vectors)):
                a, b = vectors[i], vectors[j]
                found.append(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
        return found

    def ranks(values):
        return [sum(v < w for v in values) + sum(v == w for v in values) / 2 for w in values]

    x, y = ranks(pairs(ours)), ranks(pairs(teacher))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    below = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    return top / below


def test_rank_agreement_is_its_definition():
    draw = np.random.default_rng(0)
    ours, teacher = draw.normal(size=(14, 5)), draw.normal(size=(14, 9))
    assert rank_agreement(ours, teacher) == pytest.approx(
        slow_rank_agreement(ours, teacher), abs=1e-6
    )
    assert rank_agreement(3 * teacher, teacher) == pytest.approx(1.0)


def test_top_overlap_counts_shared_neighbours():
    draw = np.random.default_rng(0)
    ours, teacher = draw.normal(size=(30, 5)), draw.normal(size=(30, 5))

    def nearest(vectors, i):
        cosine = [
            float(vectors[i] @ v) / float(np.linalg.norm(vectors[i]) * np.linalg.norm(v))
            for v in vectors
        ]
        return set(sorted((j for j in range(30) if j != i), key=lambda j: -cosine[j])[:10])

    expected = np.mean([len(nearest(ours, i) & nearest(teacher, i)) / 10 for i in range(30)])
    assert top_overlaps(ours, teacher, 10).mean() == pytest.approx(expected)
    assert top_overlaps(teacher * 2, teacher, 10).mean() == 1.0
