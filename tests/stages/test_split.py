"""Rows that a model will be judged on are not learned from."""

import numpy as np
import pytest

from stages import split
from stages.params import SplitParams
from storage.corpus import text_key
from storage.errors import TeachonceError
from storage.split import Split
from tests.conftest import sentences


def run(place, corpus, evaluation, heldout=0.1):
    return split.run(
        SplitParams(heldout=heldout),
        corpus=corpus,
        evaluation=evaluation,
        out=place.root / "split.json",
        facts=place.root / "split-facts.json",
    )


def test_evaluation_texts_and_their_sentences_are_found(place):
    texts = sentences(200)
    corpus = place.corpus(texts)
    evaluation = [
        texts[3],
        f"  {texts[5]}  ",
        f"{texts[7]} {texts[9]}  Something else!",
        "Not there.",
    ]
    outcome = run(place, corpus, evaluation)
    found = Split.load(place.root / "split.json", corpus)
    assert found.evaluation == (3, 5, 7, 9)
    assert outcome.facts["evaluation"] == 4
    assert sum(outcome.facts.values()) == 200


def test_all_rows_for_evaluation_is_an_error(place):
    texts = sentences(20)
    with pytest.raises(TeachonceError, match="none is left for training"):
        run(place, place.corpus(texts), texts)


def test_keys_are_compared_as_a_whole():
    """Two keys that agree in their first half only."""
    keys = np.frombuffer(b"aaaaaaaabbbbbbbb" + b"aaaaaaaacccccccc", "V16")
    assert split.rows_with_keys(keys, {b"aaaaaaaacccccccc"}).tolist() == [1]
    assert split.rows_with_keys(keys, set()).tolist() == []


def test_a_text_is_cut_into_sentences():
    keys = split.evaluation_keys('He said "no." (Really?) Yes! OK')
    assert text_key("Yes!") in keys
    assert text_key("OK") in keys
    assert text_key('He said "no." (Really?) Yes! OK') in keys


def test_the_same_inputs_give_the_same_bytes(place):
    corpus = place.corpus(sentences(100))
    run(place, corpus, sentences(5))
    first = (place.root / "split.json").read_bytes()
    run(place, corpus, reversed(sentences(5)))
    assert (place.root / "split.json").read_bytes() == first
