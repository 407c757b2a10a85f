"""Indexes of a model's vectors, against loops that follow the definitions."""

import numpy as np
import pytest

from stages.measuring.index import (
    LEAST_DOCUMENTS,
    TYPES,
    bytes_of,
    index_of_rows,
    index_of_set,
    recall,
    search,
    set_to_index,
)
from stages.reading.evaluation_sets import RetrievalSet
from stages.vectors import NO_DOCUMENT

RNG = np.random.default_rng(7)
DOCUMENTS = RNG.standard_normal((60, 24)).astype(np.float32) * RNG.uniform(0.1, 5, (60, 1)).astype(
    np.float32
)
QUERIES = RNG.standard_normal((15, 24)).astype(np.float32)
DOCUMENTS[3] = 0  # a static model's vector of a text without known tokens
DOCUMENTS[[4, 5], [0, 1]] = 0  # single values of 0


def cosine(a, b):
    lengths = np.linalg.norm(a.astype(float)) * np.linalg.norm(b.astype(float))
    return float(a.astype(float) @ b.astype(float) / lengths) if lengths else 0.0


def slow_int8(vector):
    scale = max(abs(float(value)) for value in vector) / 127
    return np.array([round(float(value) / scale) * scale if scale else 0 for value in vector])


def slow_hamming(a, b):
    return sum((x > 0) != (y > 0) for x, y in zip(a, b, strict=True))


def slow_search(query, documents, kind, ignored=None):
    """Places of the ten nearest by the definition of a type."""
    far = {
        "float32": lambda document: -cosine(query, document),
        "int8": lambda document: -cosine(query, slow_int8(document)),
        "binary": lambda document: slow_hamming(query, document),
    }[kind]
    places = [place for place in range(len(documents)) if place != ignored]
    return sorted(places, key=lambda place: far(documents[place]))[:10]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("width", [24, 7])
def test_an_index_finds_what_its_definition_says(kind, width):
    found = search(QUERIES[:, :width], DOCUMENTS[:, :width], kind, 10, None)
    slow = [slow_search(q[:width], DOCUMENTS[:, :width], kind) for q in QUERIES]
    assert found.tolist() == slow


@pytest.mark.parametrize(
    ("kind", "counts"),
    [("float32", [1536, 512, 4]), ("int8", [388, 132, 5]), ("binary", [48, 16, 1])],
)
def test_bytes_of_a_vector(kind, counts):
    assert [bytes_of(dim, kind) for dim in (384, 128, 1)] == counts
    assert bytes_of(9, "binary") == 2  # bits fill whole bytes


def test_recall_is_the_share_of_the_wanted():
    wanted = np.array([[1, 2, 3, 4], [5, 6, NO_DOCUMENT, NO_DOCUMENT]])
    found = np.array([[4, 9, 1, 8], [6, 5, NO_DOCUMENT, 7]])
    assert recall(found, wanted) == (2 / 4 + 2 / 2) / 2


def test_each_width_and_type_is_measured_against_the_whole_float32_vectors():
    widths = {"": None, "widths.7.": 7}
    metrics = index_of_set("docs", QUERIES, DOCUMENTS, widths)
    slow = {"index.among": "60 documents of docs, asked with 15 queries"}
    for width in (24, 7):
        for kind in TYPES:
            key = f"index.{kind}" if width == 24 else f"index.7.{kind}"
            shares = [
                len(
                    {*slow_search(q, DOCUMENTS, "float32")}
                    & {*slow_search(q[:width], DOCUMENTS[:, :width], kind)}
                )
                / 10
                for q in QUERIES
            ]
            slow[f"{key}.bytes"] = bytes_of(width, kind)
            slow[f"{key}.recall@10"] = pytest.approx(np.mean(shares), abs=1e-6)
    assert metrics == slow
    assert metrics["index.float32.recall@10"] == 1
    assert metrics["index.int8.recall@10"] > metrics["index.binary.recall@10"] > 0.3


def test_held_out_texts_are_asked_for_the_others():
    metrics = index_of_rows(DOCUMENTS, {"": None})
    assert metrics["index.among"] == "60 held-out texts, each asked for the others"
    shares = [
        len(
            {*slow_search(DOCUMENTS[row], DOCUMENTS, "float32", row)}
            & {*slow_search(DOCUMENTS[row], DOCUMENTS, "binary", row)}
        )
        / 10
        for row in range(60)
    ]
    assert metrics["index.binary.recall@10"] == pytest.approx(np.mean(shares), abs=1e-6)


def test_the_largest_set_is_indexed_if_it_is_large_enough():
    def of(count):
        ids = [f"d{n}" for n in range(count)]
        return RetrievalSet(ids, ids, ["q"], ["a query"], {"q": {"d0": 1}})

    few, enough = of(LEAST_DOCUMENTS - 1), of(LEAST_DOCUMENTS)
    assert set_to_index({"few": few, "enough": enough}) == "enough"
    assert set_to_index({"few": few}) is None
    assert set_to_index({}) is None
