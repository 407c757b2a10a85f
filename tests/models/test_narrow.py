"""Narrower starts: what is cut exactly, what is fitted to what, and what other programs read of them."""

import filecmp

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel

from stages import start
from stages.models import narrow
from stages.models.layers import distance, keep_layers, token_vectors
from stages.models.loading import load_model
from stages.models.narrow import make_narrow
from stages.models.widths import check_narrow_of, narrower
from stages.params import StartParams
from storage.errors import TeachonceError
from tests.conftest import sentences
from tests.models.families import make_family, make_tokenizer

CPU = torch.device("cpu")
AT = "starts.thin"
TEXTS, OTHERS = sentences(150), sentences(40, seed=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="module")
def bert(tokenizer, tmp_path_factory):
    """4 layers of 32 values, 64 neurons and 4 heads."""
    return make_family(tmp_path_factory.mktemp("bert") / "m", tokenizer, "BERT")


def settings(**changes):
    return StartParams.model_validate({"from": "teacher", "layers": None} | changes)


def narrowed(folder, layers=None, change=None, **widths):
    """The model in a folder, and a narrow one of it; `change` is done to both."""
    own, made = load_model(folder, device=CPU), load_model(folder, device=CPU)
    for model in (own, made):
        if change is not None:
            change(model[0].auto_model)
    whole = made[0].auto_model
    if layers is not None:
        keep_layers(made, layers, address=AT)
    make_narrow(made, whole, settings(**widths), layers, TEXTS, address=AT)
    return own, made


def apart(own, made):
    pairs = zip(token_vectors(own, OTHERS), token_vectors(made, OTHERS), strict=True)
    return max(distance(*pair) for pair in pairs)


def likeness(own, made):
    """Mean cosine of texts that the model was not fitted to."""
    return float((own.encode(OTHERS) * made.encode(OTHERS)).sum(axis=1).mean())


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "XLM-RoBERTa"])
def test_a_model_that_is_as_wide_as_it_was_is_as_it_was(family, tokenizer, tmp_path):
    folder = make_family(tmp_path / "m", tokenizer, family)
    own, made = narrowed(folder, hidden=32, intermediate=64, heads=4)
    assert apart(own, made) < 1e-5
    assert [type(module).__name__ for module in made] == ["Transformer", "Pooling", "Normalize"]
    assert likeness(own, narrowed(folder, hidden=16)[1]) > 0.8


def test_neurons_that_say_nothing_can_go(bert):
    def silence(body):
        for layer in body.encoder.layer:
            layer.output.dense.weight.data[:, 5:50:2] = 0

    own, made = narrowed(bert, intermediate=64 - 23, change=silence)
    assert made[0].auto_model.encoder.layer[3].intermediate.dense.weight.shape == (41, 32)
    assert apart(own, made) < 1e-5
    # One more has to be made up for.
    assert apart(*narrowed(bert, intermediate=64 - 24, change=silence)) > 1e-4


def test_heads_get_smaller_without_loss_where_they_use_half_of_their_values(bert):
    """Scores and what a head adds are as before; of its 8 values 4 depend on the others."""
    layer = load_model(bert, device=CPU)[0].auto_model.encoder.layer[0]
    draw = torch.Generator().manual_seed(0)

    def of_rank_four(rows):
        heads = [
            torch.randn(rows, 4, generator=draw) @ torch.randn(4, 8, generator=draw)
            for _ in range(4)
        ]
        return torch.cat(heads, dim=1)

    query, key, context = of_rank_four(500), of_rank_four(500), of_rank_four(500)
    context = context - context.mean(0)
    nothing = torch.zeros(500, 1)
    own = narrow.Trace(query, key, context, context, *[nothing] * 6)
    read = type(
        "Read", (), {"attention_head_size": 4, "num_attention_heads": 4, "all_head_size": 16}
    )
    with torch.no_grad():
        to_query, to_key, to_value, back = narrow._heads(layer, own, read)
        outward = layer.attention.output.dense.weight
        wanted = context @ outward.T
        added = context @ to_value.T @ back @ outward.T
    for head in range(4):
        small, large = slice(4 * head, 4 * head + 4), slice(8 * head, 8 * head + 8)
        scores = (query @ to_query.T)[:, small] @ (key @ to_key.T)[:, small].T / 4**0.5
        before = query[:, large] @ key[:, large].T / 8**0.5
        assert torch.allclose(scores, before, rtol=0, atol=2e-3 * float(before.abs().max()))
    assert distance(wanted, added) < 2e-3


def test_the_heads_and_the_neurons_that_are_kept_add_most(bert):
    layer = load_model(bert, device=CPU)[0].auto_model.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.dense.weight[:, 8:16] *= 0.01
        layer.output.dense.weight[:, 7] *= 0.01
        states = [torch.randn(40, 9, 32, generator=torch.Generator().manual_seed(0))]
        own, _ = narrow._trace(layer, states)
        read = type("Read", (), {"attention_head_size": 8, "num_attention_heads": 3})
        heads = narrow._heads(layer, own, read)[2]
        neurons = narrow._neurons(layer, own, torch.eye(32), 63)
    kept = [*range(8), *range(16, 32)]
    assert heads.nonzero().tolist() == [[row, kept[row]] for row in range(24)]
    assert neurons.argmax(1).tolist() == [n for n in range(64) if n != 7]


def test_a_map_is_mended_by_ridge_regression():
    """Where the sum of squares plus the penalty has no slope."""
    draw = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(50, 6, generator=draw) + 2, torch.randn(50, 3, generator=draw) - 1
    linear = torch.nn.Linear(6, 3)
    before = linear.weight.detach().clone()
    with torch.no_grad():
        narrow._mend(linear, inputs, wanted)
        left = wanted - linear(inputs)
    assert torch.allclose(left.mean(0), torch.zeros(3), atol=1e-6)
    centred = inputs - inputs.mean(0)
    strength = narrow.RIDGE * centred.square().sum(0).mean()
    slope = left.T @ centred - strength * (linear.weight.detach() - before)
    assert torch.allclose(slope, torch.zeros(3, 6), atol=1e-4)


def test_states_are_cut_to_the_directions_that_vary_most(bert):
    whole = load_model(bert, device=CPU)[0].auto_model
    groups = narrow._of_one_length(load_model(bert, device=CPU), TEXTS)
    with torch.no_grad():
        basis = narrow._basis(whole, [0, 3], groups, 12)
        places = [narrow._flat([whole.embeddings(ids) for ids in groups])]
        for own, wanted in narrow._wanted(whole, [0, 3], groups):
            places += [own.middle, wanted.end]
    states = torch.cat([place - place.mean(0) for place in places])
    values = torch.linalg.svdvals(states.double())
    lost = (states - states @ basis.T @ basis).double().square().sum()
    assert float(lost) == pytest.approx(float((values[12:] ** 2).sum()), rel=1e-3)


def test_a_layer_learns_the_work_of_those_that_are_left_out(bert):
    """As far as its last map can; what is left of the model is closer to the whole than without."""
    cut = load_model(bert, device=CPU)
    keep_layers(cut, [0, 3], address=AT)
    own, made = narrowed(bert, layers=[0, 3], intermediate=64)
    assert likeness(own, made) > likeness(own, cut) + 0.01
    # In another order there are no such states: it is fitted to itself, and stays as it is.
    turned, made = load_model(bert, device=CPU), narrowed(bert, layers=[3, 0], intermediate=64)[1]
    keep_layers(turned, [3, 0], address=AT)
    assert apart(turned, made) < 1e-5


def test_what_it_was_fitted_to_makes_it_better(bert, monkeypatch):
    own, made = narrowed(bert, hidden=16, intermediate=48)
    monkeypatch.setattr(narrow, "_mend", lambda *_: None)
    own, plain = narrowed(bert, hidden=16, intermediate=48)
    assert likeness(own, made) > likeness(own, plain) + 0.01


def test_several_poolings_are_led_back_one_by_one(bert):
    model = load_model(bert, device=CPU)
    model._modules["1"] = Pooling(32, ("cls", "mean"))
    del model._modules["2"]
    whole, own = model[0].auto_model, load_model(bert, device=CPU)
    make_narrow(model, whole, settings(hidden=24), None, TEXTS, address=AT)
    assert model[1].embedding_dimension == 24
    assert model.get_embedding_dimension() == 64
    halves = model.encode(OTHERS).reshape(len(OTHERS), 2, 32)
    states = token_vectors(own, OTHERS)
    for place, wanted in enumerate(([s[0] for s in states], [s.mean(0) for s in states])):
        wanted = torch.stack(wanted).numpy()
        cosines = (halves[:, place] * wanted).sum(1) / np.linalg.norm(wanted, axis=1)
        cosines /= np.linalg.norm(halves[:, place], axis=1)
        assert cosines.mean() > 0.85


def test_a_start_is_a_stock_model_of_fewer_tokens_values_and_layers(bert, place, tmp_path):
    corpus = place.corpus(TEXTS)
    params = settings(layers=[0, 3], hidden=16, intermediate=24, heads=2)

    def made(out):
        how = {"name": "thin", "folder": bert, "trust_remote_code": False}
        return start.run(params, out=out, corpus=lambda: corpus, **how)

    outcome = made(tmp_path / "thin")
    assert outcome.summary.startswith(
        "layers [0, 3] (hidden 16, intermediate 24, heads 2) of teacher, 0.0 million"
    )
    assert outcome.facts["dim"] == 32
    body = AutoModel.from_pretrained(tmp_path / "thin")
    config = body.config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (16, 24, 2)
    assert body.encoder.layer[1].attention.self.query.weight.shape == (16, 16)
    stock = SentenceTransformer(str(tmp_path / "thin"), device="cpu")
    ours = load_model(tmp_path / "thin", device=CPU)
    assert np.array_equal(stock.encode(OTHERS), ours.encode(OTHERS))
    made(tmp_path / "again")
    for name in ("model.safetensors", "2_Dense/model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "thin" / name, tmp_path / "again" / name, shallow=False)


def test_a_model_that_reads_otherwise_when_saved_is_refused(bert, tmp_path):
    model = narrowed(bert, hidden=16)[1]
    model.save(str(tmp_path / "thin"), create_model_card=False)
    narrow.check_saved(tmp_path / "thin", model, trust_remote_code=False, address=AT)
    model[0].auto_model.encoder.layer[1].output.dense.weight.data *= 1.01
    with pytest.raises(TeachonceError, match=r"starts\.thin: the narrow model was saved, and its"):
        narrow.check_saved(tmp_path / "thin", model, trust_remote_code=False, address=AT)


@pytest.mark.parametrize(
    "widths, said",
    [
        ({"hidden": 64}, ["hidden: 64, but the model has 32", "set it to 32 or less"]),
        ({"intermediate": 65}, ["intermediate: 65, but the model has 64", "set it to 64 or less"]),
        ({"heads": 5, "hidden": 20}, ["heads: 5, but the model has 4", "set it to 4 or less"]),
        (
            {"hidden": 18},
            [
                "heads: 4 heads of 18 / 4 values, which must be a whole number, and at most the "
                "model's own 8",
                "set it to 3",
            ],
        ),
        (
            {"heads": 2},
            [
                "heads: 2 heads of 32 / 2 values, which must be a whole number, and at most the "
                "model's own 8",
                "set it to 4",
            ],
        ),
        (
            {"hidden": 31},
            [
                "heads: 4 heads of 31 / 4 values, which must be a whole number, and at most the "
                "model's own 8",
                "set hidden to a multiple of 4",
            ],
        ),
    ],
)
def test_widths_that_cannot_be_are_refused(widths, said, bert):
    with pytest.raises(TeachonceError) as error:
        check_narrow_of(bert, settings(**widths), address=AT)
    assert str(error.value) == f"{AT}.{said[0]}\n  cure: {said[1]}"


def test_models_of_another_kind_are_refused(tokenizer, tmp_path, bert):
    folder = make_family(tmp_path / "m", tokenizer, "DistilBERT")
    said = "models of the kinds bert, camembert, roberta, xlm-roberta can be made narrower, not "
    with pytest.raises(TeachonceError) as error:
        check_narrow_of(folder, settings(intermediate=8), address=AT)
    assert str(error.value).startswith(f"{AT}.intermediate: {said}distilbert\n  cure: take hidden")
    config = {"model_type": "bert", "is_decoder": True}
    with pytest.raises(TeachonceError, match=r"narrower, not bert"):
        narrower(config, settings(hidden=8), address=AT)
    (folder / "modules.json").write_text(
        '[{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}]'
    )
    with pytest.raises(TeachonceError, match=rf"{AT}\.hidden: {said}StaticEmbedding"):
        check_narrow_of(folder, settings(hidden=8), address=AT)
    bag = load_model(bert, device=CPU)
    bag._modules["0"] = torch.nn.Identity()
    with pytest.raises(TeachonceError, match=rf"{AT}\.heads: {said}Identity"):
        make_narrow(bag, None, settings(heads=2), None, TEXTS, address=AT)
