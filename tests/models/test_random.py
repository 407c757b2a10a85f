"""Starts drawn at random: of which sizes, by which seed, and what is said where none can be made."""

import filecmp
import json
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer

from stages import start
from stages.models.abilities import check_drawable, check_static_of
from stages.models.loading import load_model
from stages.models.random import drawn_at_random
from stages.models.widths import check_narrow_of
from stages.params import StartParams
from storage.errors import TeachonceError
from tests.conftest import sentences
from tests.models.families import make_family, make_tokenizer
from tests.stages.test_distill import World, recipe, start_folder

__all__ = ["start_folder"]

CPU = torch.device("cpu")
TEXTS = sentences(40, seed=1)


def settings(**changes):
    return StartParams.model_validate({"from": None, "layers": None} | changes)


def made(params, folder, out, **how):
    return start.run(params, name="new", folder=folder, trust_remote_code=False, out=out, **how)


def test_a_transformer_is_drawn_as_its_own_code_draws_it(tiny_model, tmp_path):
    """All but norms and biases normal, with the deviation that its configuration says."""
    params = settings(layers=2, hidden=64, intermediate=100, heads=2)
    outcome = made(params, tiny_model, tmp_path / "new")
    assert outcome.summary == (
        "2 layers (hidden 64, intermediate 100, heads 2) like teacher, drawn at random (seed 0), "
        f"{outcome.facts['parameters'] / 1e6:.1f} million parameters"
    )
    assert outcome.facts["dim"] == 64
    stock = SentenceTransformer(str(tmp_path / "new"), device="cpu")
    assert [type(module).__name__ for module in stock] == ["Transformer", "Pooling", "Normalize"]
    own, body = load_model(tiny_model, device=CPU), stock[0].auto_model
    assert len(body.encoder.layer) == 2
    weight = body.encoder.layer[1].intermediate.dense.weight.detach()
    assert weight.shape == (100, 64)
    assert float(weight.std()) == pytest.approx(body.config.initializer_range, rel=0.05)
    assert body.encoder.layer[1].attention.output.LayerNorm.weight.eq(1).all()
    assert stock.tokenizer.get_vocab() == own.tokenizer.get_vocab()
    assert np.allclose(np.linalg.norm(stock.encode(TEXTS), axis=1), 1, atol=1e-6)


def test_the_seed_alone_decides_what_is_drawn(tiny_model, tmp_path):
    def weights(name, **changes):
        torch.manual_seed(len(name))
        made(settings(layers=1, **changes), tiny_model, tmp_path / name)
        return tmp_path / name / "model.safetensors"

    left_out, none, one = weights("left out"), weights("0", seed=0), weights("one", seed=1)
    assert filecmp.cmp(left_out, none, shallow=False)
    assert not filecmp.cmp(left_out, one, shallow=False)
    model, before = load_model(tiny_model, device=CPU), torch.get_rng_state()
    drawn_at_random(model, settings(), address="starts.new")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_table_is_drawn_where_there_is_no_teacher_to_ask(tiny_model, tmp_path):
    """Its rows are about as long as a teacher's vectors, and may be wider than the model's."""
    params = settings(kind="static", hidden=48)
    outcome = made(params, tiny_model, tmp_path / "new")
    assert outcome.summary.startswith(
        "a table of 48 values for each token like teacher, drawn at random (seed 0), "
    )
    stock = SentenceTransformer(str(tmp_path / "new"), device="cpu")
    assert [type(module).__name__ for module in stock] == ["StaticEmbedding", "Normalize"]
    own = load_model(tiny_model, device=CPU)
    table = stock[0].embedding.weight.detach()
    assert table.shape == (len(own.tokenizer), 48)
    assert float(table.norm(dim=1).mean()) == pytest.approx(1, rel=0.02)
    other = drawn_at_random(own, settings(kind="static", hidden=48, seed=1), address="starts.new")
    assert not torch.equal(table, other[0].embedding.weight)


@pytest.mark.parametrize("changes", [{"layers": 1, "passes": 2}, {"kind": "static", "hidden": 8}])
def test_fewer_tokens_and_shared_layers_are_drawn_too(changes, tiny_model, place, tmp_path):
    corpus = place.corpus(sentences(200))
    params = settings(vocabulary={"keep": 0.8}, **changes)
    assert params.reads_corpus and not params.chooses_layers
    outcome = made(params, tiny_model, tmp_path / "new", corpus=lambda: corpus)
    there = load_model(tiny_model, device=CPU).tokenizer
    kept = load_model(tmp_path / "new", device=CPU).tokenizer
    assert outcome.facts["tokens"] == len(kept.get_vocab()) < len(there)


def test_only_fewer_tokens_depend_on_the_corpus():
    static = {"kind": "static", "hidden": 8}
    assert not settings(**static).reads_corpus and not settings(hidden=8).reads_corpus
    taken = {"from": "teacher"}
    assert settings(**taken, **static).reads_corpus and settings(**taken, hidden=8).reads_corpus


def test_what_it_is_made_from_is_written_down():
    def written(**changes):
        made_from = start.recipe(settings(**changes), pooling=None, files={"a": "b"}, corpus=None)
        return json.dumps(made_from)

    several = [{}, {"seed": 1}, {"like": "other"}, {"from": "teacher"}, {"layers": 2}]
    assert len({written(**changes) for changes in several}) == len(several)


def test_a_student_of_a_random_start_learns(place, tiny_model, start_folder, tmp_path):
    """Whatever its width: it learns a projection into the teacher's space."""
    world = World(place, tiny_model, start_folder)
    world.start = tmp_path / "new"
    made(settings(kind="static", hidden=12), tiny_model, world.start)
    world.train(recipe(epochs=12, learning_rate=0.01))
    scores = [row["agreement"] for row in world.tracked]
    assert max(scores) > scores[0] + 0.1
    student = SentenceTransformer(str(place.root / "student"), device="cpu")
    assert student.encode(["amber"]).shape == (1, 32)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"layers": [0, 2, 3]}, "no layer is another's: set layers to their number, as in 3"),
        (
            {"from": "teacher", "like": "other"},
            "like is of a start that is drawn at random: set from",
        ),
        ({"from": "teacher", "seed": 0}, "set from: null, or take seed away"),
        ({"seed": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        settings(**changes)


def test_what_cannot_be_built_is_refused(tiny_model, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    bert = make_family(tmp_path / "bert", tokenizer, "BERT")
    check_narrow_of(bert, settings(hidden=96, heads=3), address="starts.new")
    with pytest.raises(TeachonceError) as error:
        check_narrow_of(bert, settings(hidden=33), address="starts.new")
    assert str(error.value) == (
        "starts.new.heads: 4 heads of 33 / 4 values, which must be a whole number\n"
        "  cure: set it to 1 or 3"
    )
    check_static_of(bert, 4096, address="starts.new", is_random=True)
    check_drawable(bert, address="starts.new.like")
    check_drawable(tiny_model, address="starts.new.like")
    said = "is like a transformer and its pooling, and the model in"
    for kinds in (["StaticEmbedding"], ["Transformer", "LSTM"]):
        folder = tmp_path / "".join(kinds)
        shutil.copytree(bert, folder)
        modules = [{"path": "", "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
        (folder / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(TeachonceError, match=said) as error:
            check_drawable(folder, address="starts.new.like")
        assert error.value.problem.endswith(f" is {' and '.join(kinds)}")
    model = load_model(bert, device=CPU)
    model._modules["1"] = torch.nn.Identity()
    with pytest.raises(TeachonceError, match=r"this model is Transformer and Identity"):
        drawn_at_random(model, settings(), address="starts.new")
