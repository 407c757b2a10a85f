"""What a start says of itself before it is trained, and when it stays as it is."""

import json
from itertools import combinations

import numpy as np
import pytest

from stages.measuring.heldout import HeldOut, agreement_of_start
from stages.models.encoder import Encoder
from stages.outcome import Outcome
from stages.params import StartParams
from stages.start import as_it_is, measure, recipe
from storage.caches import Caches
from storage.errors import MissingError, TeachonceError
from storage.split import Split
from tests.conftest import sentences
from tests.stages.test_distill import CPU, World, start_folder

__all__ = ["start_folder"]

HALF = StartParams.model_validate({"from": "teacher", "layers": [0, 3]})


@pytest.fixture
def world(place, tiny_model, start_folder):
    return World(place, tiny_model, start_folder)


def caches_of(world, heldout=0.1):
    split = Split(corpus=world.corpus.manifest.content, heldout=heldout, evaluation=())
    return Caches(world.corpus, world.embeddings, None, split, world.place.store)


def ranks(values):
    """1-based; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]


def by_definition(ours, theirs):
    """Spearman's correlation of the cosines of all pairs, in plain Python."""

    def all_pairs(vectors):
        unit = [v / np.linalg.norm(v.astype(float)) for v in vectors.astype(float)]
        return [float(unit[i] @ unit[j]) for i, j in combinations(range(len(unit)), 2)]

    return float(np.corrcoef(ranks(all_pairs(ours)), ranks(all_pairs(theirs)))[0, 1])


def test_a_start_says_how_it_agrees_with_its_teacher_on_rows_held_out(
    world, start_folder, tmp_path
):
    record = tmp_path / "starts/half.json"
    outcome = measure(
        Outcome("start", start_folder, "layers", {"dim": 32}),
        name="half",
        load=lambda: Encoder(start_folder, device=CPU, max_tokens=16),
        caches=lambda: caches_of(world),
        record=record,
        made_from="abc",
    )
    rows = world.split.heldout_rows(world.corpus)
    assert 20 < len(rows) < 80
    ours = Encoder(start_folder, device=CPU, max_tokens=16).encode(world.corpus.take(rows))
    wanted = by_definition(ours, world.embeddings.rows_of(rows))
    facts = {"dim": 32, "agreement": pytest.approx(wanted, abs=1e-4), "agreement_rows": len(rows)}
    assert outcome.facts == facts
    assert 0.05 < wanted < 0.999
    assert outcome.summary == (
        f"layers; its agreement with the teacher is {outcome.facts['agreement']:.4f} on {len(rows)} rows "
        "held out"
    )
    assert json.loads(record.read_bytes()) == {**facts, "made_from": "abc"}


def test_where_there_is_nothing_to_measure_on_the_reason_is_said(world, tmp_path):
    def absent():
        raise MissingError(tmp_path / "data/embeddings.json", "not there", "run `teachonce embed`")

    def never():
        raise AssertionError("nothing is measured, so nothing is loaded")

    said, facts = agreement_of_start("half", never, absent)
    assert said == (
        "its agreement with the teacher is not measured (embeddings.json: not there; run `teachonce embed`)"
    )
    assert facts["agreement"] is None
    said, _ = agreement_of_start("half", never, lambda: caches_of(world, heldout=0.001))
    assert "rows are held out, and it takes 10; raise it, or add texts)" in said
    record = tmp_path / "half.json"
    outcome = Outcome("start", tmp_path, "layers", {"dim": 32})
    measure(outcome, name="half", load=never, caches=absent, record=record, made_from=None)
    # What is committed names no place on a machine.
    assert json.loads(record.read_bytes()) == {"dim": 32, "agreement": None, "made_from": None}


def test_a_model_that_gives_nan_is_no_reason_to_be_silent(world):
    class Broken:
        in_windows = False

        def encode_counted(self, texts, *, role):
            return type(
                "Encoded", (), {"vectors": np.full((len(texts), 4), np.nan), "truncated": 0}
            )

    with pytest.raises(TeachonceError, match="vectors have NaN or Inf"):
        agreement_of_start("half", Broken, lambda: caches_of(world))


def test_rows_of_each_role_are_read_in_that_role(place):
    texts = sentences(60)
    corpus = place.corpus({"document": texts[:40], "query": texts[40:]})
    heldout = np.arange(0, 60, 2)
    sample = HeldOut.of(corpus, heldout, 15)
    read = []

    class Recording:
        in_windows = False

        def encode_counted(self, texts, *, role):
            read.extend((role, text) for text in texts)
            return type(
                "Encoded", (), {"vectors": np.ones((len(texts), 4), np.float32), "truncated": 0}
            )

    assert sample.vectors("half", Recording()).shape == (15, 4)
    assert [text for _, text in read] == corpus.take(sample.rows)
    for role, text in read:
        assert role == ("query" if text in texts[40:] else "document")
    assert {role for role, _ in read} == {"query", "document"}


def test_a_start_that_cannot_be_made_here_stays_if_it_was_made_from_the_same(
    world, start_folder, tmp_path
):
    files = {"model.safetensors": "0" * 64}
    made = recipe(HALF, pooling=None, files=files, corpus=None)
    record = tmp_path / "half.json"
    facts = {"dim": 32, "agreement": 0.5, "agreement_rows": 40, "made_from": "abc"}
    record.write_text(json.dumps(facts))
    outcome = as_it_is("half", folder=start_folder, record=record, made_from="abc")
    assert outcome.facts == {"dim": 32}  # it is measured anew
    assert outcome.made == start_folder and "stays as it was made" in outcome.summary
    for wrong in ("abd", None):
        assert as_it_is("half", folder=start_folder, record=record, made_from=wrong) is None
    assert as_it_is("half", folder=tmp_path, record=record, made_from="abc") is None
    for content in ("", "[]", "{}", '"abc"'):
        record.write_text(content)
        assert as_it_is("half", folder=start_folder, record=record, made_from="abc") is None
    others = [
        recipe(HALF.model_copy(update={"passes": 2}), pooling=None, files=files, corpus=None),
        recipe(HALF, pooling="mean", files=files, corpus=None),
        recipe(HALF, pooling=None, files={"model.safetensors": "1" * 64}, corpus=None),
        recipe(HALF, pooling=None, files=files, corpus=world.corpus),
    ]
    assert all(other != made for other in others)
