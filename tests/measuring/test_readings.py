"""How a model reads held-out texts under another reading, against slow definitions."""

import numpy as np
import pytest

from stages.measuring.readings import judged_readings
from stages.vectors import rank_agreement
from tests.stages.test_evaluate import HashEncoder, hashed, measure, split_of
from tests.stages.test_evaluate import corpus as corpus
from tests.stages.test_evaluate import embeddings as embeddings
from tests.storage.test_readings import open_readings


class Bilingual(HashEncoder):
    """It reads `de: TEXT` as TEXT; but some with more of another text in them, `drawn_to`."""

    def __init__(self, lost=(), drawn_to=""):
        super().__init__()
        self.lost, self.drawn_to = set(lost), drawn_to

    def vector(self, text):
        own = hashed(text.removeprefix("de: "))
        return own + 1.5 * hashed(self.drawn_to) if text in self.lost else own

    def encode(self, texts, *, role):
        super().encode(texts, role=role)
        return np.array([self.vector(text) for text in texts])


@pytest.fixture
def readings(place, corpus):
    place.root = corpus.store.root.parent
    texts = corpus.take(np.arange(corpus.rows))
    pairs = [(text, f"de: {text}") for text in texts]
    pairs += [(text, f"de: {text} and more") for text in texts[:60]]
    return open_readings(place, corpus, pairs)


def slowly(asked, found):
    """The share of rows whose own row of the other side has the highest cosine; the first of equal ones."""
    hits = 0
    for row, vector in enumerate(asked):
        cosines = [
            float(vector @ other / np.linalg.norm(vector) / np.linalg.norm(other))
            for other in found
        ]
        hits += cosines.index(max(cosines)) == row
    return hits / len(asked)


def test_metrics_of_readings_are_those_of_the_definition(tmp_path, corpus, embeddings, readings):
    heldout = [text for text in corpus.take(split_of(corpus, 0.4).heldout_rows(corpus))]
    model = Bilingual([f"de: {text}" for text in heldout[1::3]], drawn_to=heldout[0])
    metrics = measure(tmp_path, corpus, embeddings, model, readings=readings).facts
    ours = np.array([hashed(text) for text in heldout])
    read = np.array([model.vector(f"de: {text}") for text in heldout])
    assert metrics["readings.pairs"] == len(heldout) > 30
    assert metrics["readings.text_to_reading"] == pytest.approx(slowly(ours, read), abs=1e-6)
    assert metrics["readings.reading_to_text"] == pytest.approx(slowly(read, ours), abs=1e-6)
    assert 0.5 < metrics["readings.reading_to_text"] < metrics["readings.text_to_reading"]
    assert metrics["readings.spearman"] == pytest.approx(rank_agreement(read, ours), abs=1e-6)
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(read, axis=1)
    alike = (ours * read).sum(axis=1) / lengths
    assert metrics["readings.cosine"] == pytest.approx(alike.mean(), abs=1e-6)
    for key in ("text_to_reading", "reading_to_text", "spearman", "cosine"):
        low, high = (metrics[f"readings.{key}.{end}"] for end in ("low", "high"))
        assert low <= metrics[f"readings.{key}"] <= high


def test_a_corpus_without_readings_has_the_metrics_that_it_had(tmp_path, corpus, embeddings):
    metrics = measure(tmp_path, corpus, embeddings, HashEncoder()).facts
    assert not [key for key in metrics if key.startswith("readings")]


def test_the_first_values_alone_are_measured_too(tmp_path, corpus, embeddings, readings):
    metrics = measure(
        tmp_path, corpus, embeddings, Bilingual(), readings=readings, widths=(4,)
    ).facts
    assert metrics["widths.4.readings.reading_to_text"] == 1
    assert metrics["widths.4.readings.spearman"] == metrics["widths.4.fidelity.spearman"]


def test_too_few_readings_are_left_out_with_a_cure(tmp_path, corpus, embeddings, place):
    texts = corpus.take(split_of(corpus, 0.4).heldout_rows(corpus))
    place.root = corpus.store.root.parent
    readings = open_readings(place, corpus, [(text, "one for all") for text in texts])
    outcome = measure(tmp_path, corpus, embeddings, HashEncoder(), readings=readings)
    assert "readings.pairs" not in outcome.facts
    assert "left out: readings: 1 texts with different readings are held out" in outcome.summary


def test_one_reading_of_a_text_is_judged_and_no_two_that_are_the_same(corpus, place):
    texts = corpus.take(split_of(corpus, 0.4).heldout_rows(corpus))[:20]
    pairs = [(text, f"ein {n // 2}") for n, text in enumerate(texts)]
    pairs += [(text, f"zwei {n}") for n, text in enumerate(texts)]
    place.root = corpus.store.root.parent
    readings = open_readings(place, corpus, pairs)
    ids = judged_readings(readings, split_of(corpus, 0.4))
    assert readings.take(ids) == [f"ein {n}" for n in range(10)]
    assert corpus.take(readings.rows_read()[ids]) == texts[::2]
