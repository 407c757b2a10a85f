"""What a student proposes: the pool, the teacher's answer, and when the pool is read anew."""

from functools import lru_cache

import numpy as np
import pytest
import torch

from stages.learning.candidates import CandidateSource
from stages.learning.proposals import Proposals
from stages.params import SpeculativeObjective
from storage.column import text_keys_of
from storage.embeddings import Embeddings
from storage.manifest import Manifest, fingerprint
from storage.negatives import NONE, Negatives, put_negatives
from tests.conftest import HashTeacher, sentences

ROWS, DIM, MINED, SEED, STEPS = 120, 16, 5, 3, 40
TRAIN = np.flatnonzero(np.arange(ROWS) % 5 != 0)
TAU = 0.2
LONELY = 7
"""A row without any mined neighbour."""


def objective(**changes):
    return SpeculativeObjective.model_validate(
        {
            "name": "speculative",
            "weight": 1.0,
            "temperature": 0.1,
            "teacher_temperature": TAU,
            "alpha": 0.1,
            "queue": 0,
            "neighbours": 4,
            "proposals": 3,
            "pool": 40,
            "refresh_every": 5,
            "threshold": 0.5,
        }
        | changes
    )


@lru_cache
def all_of_student():
    """(120, D) vectors of a student that knows some of its teacher."""
    teacher = HashTeacher(DIM)
    vectors = np.stack([teacher.vector(text) for text in sentences(ROWS)])
    noise = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)
    return torch.from_numpy(vectors + 0.1 * noise)


def student(rows):
    """(n, D) vectors of rows."""
    return all_of_student()[rows]


class Cache:
    """Vectors of 120 rows, every fifth no training row, and their five nearest training rows."""

    def __init__(self, place):
        corpus = place.corpus(sentences(ROWS))
        place.embed(corpus, HashTeacher(DIM, scale=3.0))
        self.embeddings = Embeddings(place.store, place.embeddings, corpus)
        vectors = self.embeddings.rows_of(np.arange(ROWS)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self.cosines = vectors @ vectors.T
        self.mined, self.scores = self._mined()
        objects = []
        for shard in range(len(corpus.objects)):
            rows = slice(corpus.starts[shard], corpus.starts[shard + 1])
            made = put_negatives(
                place.store,
                f"negatives/{fingerprint({'parent': 'p'})}/{shard:06}.arrow",
                neighbours=self.mined[rows],
                scores=self.scores[rows],
                text_keys=text_keys_of(corpus.batch(shard)),
                facts={},
            )
            objects.append(made)
        manifest = Manifest(kind="negatives", recipe={}, parent="p", objects=tuple(objects))
        self.negatives = Negatives(place.store, manifest, corpus, mined_from="p")

    def _mined(self):
        near = np.where(np.isin(np.arange(ROWS), TRAIN), self.cosines, -2.0)
        np.fill_diagonal(near, -2.0)
        mined = np.argsort(-near, axis=1)[:, :MINED]
        scores = np.take_along_axis(near, mined, axis=1).astype(np.float32)
        mined[LONELY], scores[LONELY] = NONE, 0
        mined[8, 2:], scores[8, 2:] = NONE, 0
        return mined, scores

    def proposals(self, seed=SEED, **changes):
        return Proposals(
            objective(**changes),
            embeddings=self.embeddings,
            negatives=self.negatives,
            train=TRAIN,
            steps=STEPS,
            seed=seed,
        )

    def answer(self, row, pool, noise, neighbours=4, proposals=3):
        """Row ids kept and put in by the definition, one proposal at a time."""
        ours = student(np.arange(ROWS)).numpy().astype(np.float64)
        ours /= np.linalg.norm(ours, axis=1, keepdims=True)
        others = sorted((-ours[row] @ ours[other], other) for other in pool if other != row)
        mined = [int(other) for other in self.mined[row][:neighbours] if other != NONE]
        kept = []
        for _, other in others[:proposals]:
            if mined and self.cosines[row, other] >= self.cosines[row, mined[-1]] - 1e-5:
                kept.append(int(other))
        left = [place for place, other in enumerate(mined) if other not in kept]
        left.sort(key=lambda place: -(self.cosines[row, mined[place]] / TAU + noise[place]))
        return kept, [mined[place] for place in left[: proposals - len(kept)]]


@pytest.fixture
def cache(place):
    return Cache(place)


@pytest.mark.parametrize("pool", [40, 500])
def test_what_is_proposed_is_its_definition(cache, pool):
    proposals = cache.proposals(pool=pool)
    proposals.refresh(0, student)
    ids = np.array([8, 1, LONELY, *range(11, 35), 44])
    found = proposals.propose(ids, 2 * student(ids), step=6)
    noise = np.random.default_rng([SEED, 6, 1]).gumbel(size=(len(ids), 4))
    answers = [
        cache.answer(row, proposals.rows.tolist(), noise[place]) for place, row in enumerate(ids)
    ]
    expected = {other for kept, drawn in answers for other in [*kept, *drawn]}
    assert found.tolist() == sorted(expected)
    kept = sum(len(kept) for kept, _ in answers)
    assert 5 < kept < 2 * len(ids)
    proposals.evaluated(0.5)
    assert proposals.notes()["acceptance"] == pytest.approx(kept / (3 * len(ids)))


def test_a_student_that_is_its_teacher_has_all_that_it_proposes_accepted(cache):
    def teacher(rows):
        return torch.from_numpy(cache.embeddings.rows_of(rows)).float()

    proposals = cache.proposals(pool=500)
    proposals.refresh(0, teacher)
    ids = np.array([11, 23])
    found = proposals.propose(ids, teacher(ids), step=0)
    assert found.tolist() == sorted({*cache.mined[11][:3], *cache.mined[23][:3]})
    proposals.evaluated(0.5)
    assert proposals.notes()["acceptance"] == 1


def test_a_row_without_neighbours_accepts_nothing_and_is_given_nothing(cache):
    proposals = cache.proposals()
    proposals.refresh(0, student)
    ids = np.array([LONELY])
    assert proposals.propose(ids, student(ids), step=0).tolist() == []
    assert (int(proposals.kept), int(proposals.proposed)) == (0, 3)


def test_only_training_rows_are_proposed_and_never_the_row_itself(cache):
    proposals = cache.proposals(pool=500, neighbours=1, proposals=20)
    proposals.refresh(0, student)
    assert proposals.rows.tolist() == TRAIN.tolist()
    for row in (1, 11, 23):
        found = proposals._nearest(np.array([row]), student(np.array([row])))
        assert set(found[0].tolist()) <= {*TRAIN.tolist()} - {row}
        assert len(set(found[0].tolist())) == 20


def test_in_place_of_a_rejected_proposal_the_teacher_draws_by_its_softmax(cache):
    """One proposal of a row, rejected: each of its four neighbours is drawn as often as its share says."""
    proposals = cache.proposals(proposals=1)
    proposals.refresh(0, student)
    row = next(
        row
        for row in range(11, ROWS)
        if not cache.answer(row, proposals.rows.tolist(), np.zeros(4), proposals=1)[0]
    )
    drawn = [
        int(proposals.propose(np.array([row]), student(np.array([row])), step=step)[0])
        for step in range(2000)
    ]
    shares = np.exp(cache.scores[row][:4] / TAU)
    counts = [drawn.count(int(other)) / 2000 for other in cache.mined[row][:4]]
    assert counts == pytest.approx(shares / shares.sum(), abs=0.05)
    assert sum(counts) == 1


class Reads:
    """A student that writes down when it reads a pool."""

    def __init__(self):
        self.steps, self.step = [], 0

    def __call__(self, rows):
        self.steps.append(self.step)
        return student(rows)


def refreshes(proposals, scores):
    """The steps before which the pool was read, if `scores` are those of evaluations each fifth step."""
    reads = Reads()
    for step in range(STEPS):
        reads.step = step
        proposals.refresh(step, reads)
        if step % 5 == 4:
            proposals.evaluated(scores[step // 5])
    return reads.steps


def test_the_scheduler_is_its_definition(cache):
    scores = [0.5, 0.6, 0.5, 0.5, 0.7, 0.8, 0.9, 0.9]
    phi, before, expected = 0.5, -1.0, []
    for step in range(STEPS):
        if step == 0 or (
            step % 5 == 0
            and np.random.default_rng([SEED, step]).random() < phi * (1 - step / STEPS)
        ):
            expected.append(step)
        if step % 5 == 4:
            score = scores[step // 5]
            phi, before = (min(phi + 0.1, 1) if score <= before else phi), score
    proposals = cache.proposals()
    assert refreshes(proposals, scores) == expected
    assert 1 < len(expected) < 8
    assert proposals.notes()["phi"] == pytest.approx(0.8)


def test_a_threshold_of_nothing_keeps_the_first_pool_while_the_score_rises(cache):
    better = [0.1 * n for n in range(8)]
    assert refreshes(cache.proposals(threshold=0), better) == [0]
    proposals = cache.proposals(threshold=0.95)
    worse = refreshes(proposals, better[::-1])
    assert len(worse) > 3
    assert proposals.notes()["phi"] == 1
    assert worse[0] == 0


def test_a_pool_is_read_at_the_first_step_that_proposes_whichever_it_is(cache):
    """A recipe may begin with other steps (`pretrain`)."""
    proposals, reads = cache.proposals(threshold=0), Reads()
    for reads.step in range(3, 12):
        proposals.refresh(reads.step, reads)
    assert reads.steps == [3]


def test_the_pool_has_an_address_and_its_state_is_that_of_a_checkpoint(cache):
    first, other, again = cache.proposals(), cache.proposals(seed=4), cache.proposals()
    for proposals in (first, other):
        proposals.refresh(0, student)
    assert first.rows.tolist() != other.rows.tolist()
    ids = np.array([11, 23, 31])
    first.propose(ids, student(ids), step=0)
    first.evaluated(0.5)
    first.evaluated(0.4)
    first.propose(ids, student(ids), step=1)
    assert first.notes()["phi"] == pytest.approx(0.6)
    again.load_state_dict(first.state_dict())
    for proposals in (first, again):
        proposals.found = proposals.propose(ids, student(ids), step=2).tolist()
        proposals.evaluated(0.3)
    assert first.found == again.found
    assert first.notes() == again.notes()


def test_candidates_are_the_batch_and_what_was_proposed(cache):
    source = CandidateSource(
        cache.embeddings,
        cache.negatives,
        train=TRAIN,
        rows_of_step=lambda step: TRAIN[:3],
        seed=SEED,
        device=torch.device("cpu"),
    )
    ids = np.array([23, 11])
    drawn = source.draw(objective(), ids, step=0, proposed=np.array([3, 11, 44]))
    expected = cache.embeddings.rows_of(np.array([23, 11, 3, 44]))
    assert np.array_equal(drawn.vectors.numpy(), expected)
    assert drawn.not_negative.tolist() == [[True, False, False, False], [False, True, False, False]]
    assert drawn.positives.tolist() == [0, 1]
