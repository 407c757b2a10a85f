"""A typed query finds the nearest of all cached vectors, and says so when it cannot."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import cli
from stages.measuring import search
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from tests.conftest import HashTeacher, sentences


class Reader:
    """A student that is the hash teacher itself, of some width."""

    def __init__(self, dim=16):
        self.teacher = HashTeacher(dim)

    def encode(self, texts, *, role):
        assert role == "query"
        return 3 * self.teacher(texts).vectors


@pytest.fixture
def world(place):
    corpus = place.corpus(sentences(300))
    place.embed(corpus, HashTeacher())
    return place, corpus, Embeddings(place.store, place.embeddings, corpus)


def run(world, query, *, dim=16, count=5):
    place, corpus, embeddings = world
    return search.run(
        query,
        model=place.root / "export",
        encoder=Reader(dim),
        corpus=corpus,
        embeddings=embeddings,
        count=count,
    )


def test_the_nearest_texts_of_all_shards_are_found(world):
    _, corpus, embeddings = world
    assert len(corpus.objects) >= 3
    query = "What is not in the corpus"
    vector = HashTeacher().vector(query)
    cosines = embeddings.rows_of(np.arange(corpus.rows)) @ vector
    best = np.argsort(-cosines, kind="stable")[:5]
    hits = run(world, query).facts["hits"]
    assert [hit["row"] for hit in hits] == best.tolist()
    assert [hit["text"] for hit in hits] == corpus.take(best)
    assert [hit["cosine"] for hit in hits] == pytest.approx(cosines[best].tolist(), abs=1e-4)


def test_a_text_of_the_corpus_finds_itself(world):
    _, corpus, _ = world
    for row in (0, 150, 299):
        (text,) = corpus.take(np.array([row]))
        assert run(world, text, count=1).facts["hits"] == [
            {"row": row, "cosine": 1.0, "text": text}
        ]


def test_queries_of_the_corpus_are_no_results_unless_it_has_nothing_else(place):
    asked, documents = sentences(20, seed=1), sentences(60, seed=2)

    def search_in(**texts_of):
        corpus = place.corpus(texts_of, rows_per_shard=16)
        place.embed(corpus, HashTeacher())
        world = place, corpus, Embeddings(place.store, place.embeddings, corpus)
        found = run(world, asked[3], count=100)
        return found.summary, [(hit["row"], hit["text"]) for hit in found.facts["hits"]]

    summary, hits = search_in(query=asked, document=documents)
    assert summary == "60 of 60 texts"
    assert sorted(hits) == [(20 + row, text) for row, text in enumerate(documents)]
    summary, hits = search_in(query=asked)
    assert summary == "20 of 20 texts" and hits[0] == (3, asked[3])


def test_no_more_is_found_than_there_is(world):
    assert len(run(world, "x", count=1000).facts["hits"]) == 300


def test_a_model_of_another_space_is_refused(world):
    place, _, _ = world
    with pytest.raises(TeachonceError) as error:
        run(world, "x", dim=8)
    assert str(error.value) == (
        f"{place.root / 'export'}: its vectors have 8 numbers, the teacher's in the cache 16\n"
        "  cure: set export.space: teacher and run `teachonce export`: that keeps the projection"
    )
    with pytest.raises(TeachonceError, match=r"^query: is empty"):
        run(world, "  ")


def test_a_model_that_left_the_teacher_is_told(world, caplog):
    place, _, _ = world
    (place.root / "export").mkdir()
    learned = {
        name: {"recipe": {"objectives": [{"name": other} for other in name.split()]}}
        for name in ("gram", "gram kd", "comparative")
    }
    for lineage, told in (
        ({"finetuned": {"recipe": {"distill_weight": 400.0}}}, False),
        ({"finetuned": {"recipe": {"distill_weight": 0.0}}}, True),
        (learned["gram"], True),
        (learned["gram kd"], False),
        (learned["comparative"], False),
    ):
        (place.root / "export/teachonce.json").write_text(json.dumps(lineage))
        caplog.clear()
        run(world, "x")
        assert ("may not find its way" in caplog.text) == told


def test_a_line_of_stdin_is_answered_before_the_next_is_read_and_the_model_is_loaded_once(
    world, monkeypatch, capsys
):
    place, corpus, embeddings = world
    texts = corpus.take(np.array([7, 9]))
    loads = []

    def load_encoder(folder, *, is_teacher):
        loads.append(folder)
        return Reader()

    def typed():
        yield texts[0].encode() + b"\n"
        answered.append(capsys.readouterr().out)
        yield b"\n"
        yield b"  " + texts[1].encode() + b"\xff\r\n"

    answered = []
    here = SimpleNamespace(
        exported=lambda: place.root / "export",
        load_encoder=load_encoder,
        corpus=lambda: corpus,
        embeddings=lambda: embeddings,
    )
    monkeypatch.setattr(cli, "workspace", lambda: here)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=typed()))
    cli.search("-", count=2)
    assert answered[0].startswith(f"1.000  {texts[0]}\n") and answered[0].endswith("\n\n")
    assert len(capsys.readouterr().out.splitlines()) == 3
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=typed()))
    cli.search("-", count=1, as_json=True)
    queries = [json.loads(line)["facts"]["query"] for line in capsys.readouterr().out.splitlines()]
    assert json.loads(answered[1])["facts"]["query"] == texts[0]
    assert queries == [f"{texts[1]}\ufffd"]
    assert loads == [place.root / "export"] * 2
