"""What the report page shows of a model: chosen by size or evenly, and right to the digit."""

import itertools
import json

import numpy as np
import pytest

from stages.measuring.details import (
    EDGES,
    POINTS,
    likeness_details,
    neighbour_details,
    search_details,
    shortened,
)
from stages.reading.evaluation_sets import RetrievalSet
from stages.reporting.results import Details


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture
def vectors():
    """A teacher's and a model's vectors of 60 texts; the model sees most as the teacher does."""
    draw = np.random.default_rng(0)
    teacher = draw.normal(size=(60, 8)).astype(np.float32)
    return teacher, teacher @ draw.normal(size=(8, 12)) + 0.3 * draw.normal(size=(60, 12))


TEXTS = [f"text {n}" for n in range(60)]
PAIRS = list(itertools.combinations(range(60), 2))


def test_the_histogram_counts_the_cosines_of_all_pairs(vectors):
    teacher, ours = vectors
    found = likeness_details(ours, teacher, TEXTS)["similarities"]
    assert found["edges"] == EDGES.tolist() == sorted(EDGES.tolist())
    for whose, made in (("teacher", teacher), ("model", ours)):
        counts = [0] * (len(EDGES) - 1)
        for i, j in PAIRS:
            value = min(max(cosine(made[i], made[j]), EDGES[0]), EDGES[-1])
            bins = [n for n in range(len(counts)) if EDGES[n] <= value < EDGES[n + 1]]
            counts[bins[0] if bins else -1] += 1
        # A cosine on an edge may fall to either side of it in float32.
        assert np.abs(np.array(found[whose]) - counts).sum() <= 2
        assert sum(found[whose]) == len(PAIRS)


def test_points_are_pairs_spread_over_the_teachers_range(vectors):
    teacher, ours = vectors
    points = likeness_details(ours, teacher, TEXTS)["scatter"]
    assert POINTS / 2 < len(points) <= POINTS
    theirs = [point[0] for point in points]
    assert theirs == sorted(theirs)
    all_of_them = {
        (round(cosine(teacher[i], teacher[j]), 3), round(cosine(ours[i], ours[j]), 3))
        for i, j in PAIRS
    }
    near = {(round(a, 3), round(b, 3)) for a, b in points}
    assert len(near - all_of_them) <= 0.2 * len(near)  # the third digit is rounded twice
    cosines = [cosine(teacher[i], teacher[j]) for i, j in PAIRS]
    assert theirs[0] == pytest.approx(min(cosines), abs=1e-4)
    assert theirs[-1] == pytest.approx(max(cosines), abs=1e-4)
    assert max(np.diff(theirs)) < 0.1


def test_disagreements_are_the_pairs_that_one_puts_nearer():
    """Texts 0 and 1 are one to the teacher and strangers to the model; 2 and 3 the other way round."""
    draw = np.random.default_rng(1)
    teacher = draw.normal(size=(40, 32))
    ours = teacher.copy()
    teacher[1], ours[3] = teacher[0], ours[2]
    found = likeness_details(ours, teacher, TEXTS[:40])["disagreements"]
    assert (found[0]["first"], found[0]["second"]) == ("text 0", "text 1")
    assert found[0]["teacher"] == 1.0
    assert found[0]["model"] == pytest.approx(cosine(ours[0], ours[1]), abs=1e-4)
    other = next(pair for pair in found if pair["model"] == 1.0)
    assert (other["first"], other["second"]) == ("text 2", "text 3")
    assert other["teacher"] == pytest.approx(cosine(teacher[2], teacher[3]), abs=1e-4)
    texts = [text for pair in found for text in (pair["first"], pair["second"])]
    assert len(set(texts)) == len(texts)
    assert len(found) <= 8


def test_a_model_on_another_scale_does_not_disagree(vectors):
    """Cosines that are all smaller, in the same order: no pair is nearer to one of the two."""
    teacher, _ = vectors
    wide = np.concatenate([teacher, np.full((60, 1), 9.0)], axis=1)
    wide[:, :8] /= np.linalg.norm(wide[:, :8], axis=1, keepdims=True)
    unit = teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
    assert likeness_details(wide, unit, TEXTS)["disagreements"] == []


def test_searches_show_the_nearest_documents_and_who_is_relevant():
    asked = RetrievalSet(
        document_ids=["d0", "d1", "d2", "d3"],
        documents=["zero", "one", "two", "three"],
        query_ids=["q0", "q1"],
        queries=["ask zero", "ask one"],
        relevant={"q0": {"d0": 1}, "q1": {"d0": 1}},
    )
    queries = np.array([[1, 0], [0, 2]], np.float32)
    documents = np.array([[3, 0], [1, 1], [0, 1], [-1, 0]], np.float32)
    assert search_details("docs", asked, queries, documents) == [
        {
            "set": "docs",
            "query": "ask zero",
            "results": [
                {"text": "zero", "score": 1.0, "relevant": True},
                {"text": "one", "score": 0.7071, "relevant": False},
                {"text": "two", "score": 0.0, "relevant": False},
            ],
        },
        {
            "set": "docs",
            "query": "ask one",
            "results": [
                {"text": "two", "score": 1.0, "relevant": False},
                {"text": "one", "score": 0.7071, "relevant": False},
                {"text": "zero", "score": 0.0, "relevant": True},
            ],
        },
    ]


def test_texts_that_nobody_judged_are_searched_among_themselves():
    vectors = np.array([[1, 0], [0, 1], [0.9, 0.1], [1, 0]], np.float32)
    found = neighbour_details(vectors, ["a", "b", "c", "copy of a"])
    assert [search["query"] for search in found] == ["a", "b", "c", "copy of a"]
    assert [result["text"] for result in found[0]["results"]] == ["copy of a", "c", "b"]
    assert [result["text"] for result in found[3]["results"]] == ["a", "c", "b"]
    assert found[0]["results"][0] == {"text": "copy of a", "score": 1.0, "relevant": None}


def test_the_page_reads_what_is_written_here(vectors):
    teacher, ours = vectors
    found = likeness_details(ours, teacher, TEXTS)
    found |= {"texts": 60, "searches": neighbour_details(ours, TEXTS)}
    read = Details.model_validate_json(json.dumps(found))
    assert len(read.disagreements) == len(found["disagreements"])
    assert len(read.searches) == 5


def test_long_texts_are_cut():
    assert shortened("x" * 240) == "x" * 240
    assert shortened("x" * 241) == "x" * 239 + "…"
