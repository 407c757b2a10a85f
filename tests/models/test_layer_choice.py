"""Layers that are chosen by agreement: the best of all sets, or those left when others were taken out."""

from itertools import combinations

import numpy as np
import pytest
import torch

from stages import start
from stages.models import layer_choice
from stages.models.encoder import Encoder
from stages.models.layer_choice import choose_layers
from stages.models.layers import blocks_of, keep_layers
from stages.models.loading import load_model, save_model
from stages.params import StartParams
from stages.vectors import rank_agreement
from storage.errors import MissingError, TeachonceError
from tests.conftest import make_tiny_model, sentences
from tests.models.families import make_family, make_tokenizer

CPU = torch.device("cpu")
AT = "starts.best.layers"
TEXTS = [*sentences(30), "amber lantern " * 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random layers that each change a text's vector."""
    made = tmp_path_factory.mktemp("choice") / "model"
    model = load_model(make_tiny_model(made.with_name("plain")), device=CPU)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model[0].auto_model.encoder.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    made.mkdir()
    save_model(model, made, address=AT)
    return made


@pytest.fixture(scope="module")
def teacher(folder):
    return Encoder(folder, device=CPU, max_tokens=16).encode(TEXTS)


@pytest.fixture(scope="module")
def by_definition(folder, teacher, tmp_path_factory):
    """Set of layers -> agreement of a model that was cut to it, saved, and read as evaluate reads it."""
    at = tmp_path_factory.mktemp("cut")
    agreement = {}
    for layers in [one for size in (2, 3) for one in combinations(range(4), size)]:
        model = load_model(folder, device=CPU)
        keep_layers(model, layers, address=AT)
        (at / str(layers)).mkdir()
        save_model(model, at / str(layers), address=AT)
        ours = Encoder(at / str(layers), device=CPU, max_tokens=16).encode(TEXTS)
        agreement[layers] = rank_agreement(ours, teacher)
    return agreement


def chosen(folder, count, teacher, model=None):
    return choose_layers(
        model or load_model(folder, device=CPU),
        count,
        texts=TEXTS,
        teacher=teacher,
        max_tokens=16,
        device=CPU,
        address=AT,
    )


def test_the_best_of_all_sets_is_chosen(folder, teacher, by_definition):
    pairs = {layers: value for layers, value in by_definition.items() if len(layers) == 2}
    order = sorted(pairs, key=pairs.get, reverse=True)
    assert pairs[order[0]] - pairs[order[1]] > 1e-3
    choice = chosen(folder, 2, teacher)
    assert choice.layers == order[0] and choice.tried == 6
    assert [layers for layers, _ in choice.others] == order[1:4]
    for layers, value in [(choice.layers, choice.agreement), *choice.others]:
        assert value == pytest.approx(pairs[layers], abs=1e-5)
    assert choice.summary.startswith(
        f"chosen among 6 sets by agreement ({choice.agreement:.4f}; then ["
    )
    assert choice == chosen(folder, 2, teacher)
    assert chosen(folder, 4, teacher).agreement == 1 and chosen(folder, 4, teacher).tried == 1


def test_of_many_sets_the_least_needed_layers_are_taken_out(
    folder, teacher, by_definition, monkeypatch
):
    monkeypatch.setattr(layer_choice, "MOST_SETS", 5)
    three = max((one for one in by_definition if len(one) == 3), key=by_definition.get)
    two = max(combinations(three, 2), key=by_definition.get)
    choice = chosen(folder, 2, teacher)
    assert choice.layers == two
    assert choice.tried == 4 + 3
    assert choice.agreement == pytest.approx(by_definition[two], abs=1e-5)
    assert {layers for layers, _ in choice.others} == set(combinations(three, 2)) - {two}


def test_the_model_is_the_same_after_the_choice(folder, teacher):
    model = load_model(folder, device=CPU)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer, longest = model.tokenizer.backend_tokenizer.to_str(), model.max_seq_length
    chosen(folder, 2, teacher, model)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert model.tokenizer.backend_tokenizer.to_str() == tokenizer
    assert model.max_seq_length == longest != 16


@pytest.mark.parametrize("family", ["T5 encoder", "Qwen3", "ModernBERT"])
def test_layers_read_alone_as_in_a_model_that_was_cut_to_them(family, tmp_path):
    """T5 shares its first layer's bias, Qwen remembers states, ModernBERT's first layer stays first."""
    folder = make_family(tmp_path / "m", make_tokenizer(tmp_path / "t"), family)
    model = load_model(folder, device=CPU)
    _, blocks = blocks_of(model[0].auto_model)
    sets = [(0, 2), (0, 1, 3)] + ([] if family == "ModernBERT" else [(1, 3)])
    assert layer_choice._is_only_first(blocks) is (family == "ModernBERT")
    with layer_choice._reading(model, blocks, TEXTS, 40, CPU, address=AT) as reader:
        found = reader.vectors(sets)
    for layers in sets:
        cut = load_model(folder, device=CPU)
        keep_layers(cut, layers, address=AT)
        cut.max_seq_length = 40
        alone = np.concatenate([cut.encode([text]) for text in TEXTS])
        np.testing.assert_allclose(found[layers], alone, atol=1e-5)
    if family == "ModernBERT":
        assert chosen(folder, 1, Encoder(folder, device=CPU).encode(TEXTS)).layers == (0,)


def test_a_model_that_does_not_read_layer_by_layer_is_refused(folder, teacher):
    model = load_model(folder, device=CPU)
    layer = model[0].auto_model.encoder.layer[1]
    layer.register_forward_hook(lambda block, _, output: output * next(counted))
    counted = iter(range(1, 99))
    with pytest.raises(TeachonceError) as error:
        chosen(folder, 2, teacher, model)
    assert "does not read texts layer by layer as it does in one piece: vectors are off by" in str(
        error.value
    )


def test_more_layers_than_there_are_are_refused(folder, teacher):
    with pytest.raises(TeachonceError) as error:
        chosen(folder, 5, teacher)
    assert str(error.value) == f"{AT}: 5 layers of 4\n  cure: set it to 4 or less"


def test_without_vectors_no_layers_are_chosen(folder, tmp_path):
    def absent():
        raise MissingError(tmp_path / "data/embeddings.json", "not there", "run `teachonce embed`")

    model = load_model(folder, device=CPU)
    with pytest.raises(MissingError) as error:
        start.chosen_layers("best", absent, model, 2, max_tokens=16, device=CPU)
    assert str(error.value) == (
        "starts.best.layers: 2 layers are chosen by the teacher's vectors of texts held out, and "
        "embeddings.json is of no use: not there\n"
        "  cure: run `teachonce embed`; or name the layers, as in [0, 1]"
    )


def test_a_start_of_chosen_layers_is_that_of_these_layers(folder, teacher, tmp_path):
    """Byte for byte; and it says which they are."""

    def made(layers, choose=None):
        params = StartParams.model_validate({"from": "teacher", "layers": layers, "passes": 2})
        out = tmp_path / str(layers)
        outcome = start.run(
            params, name="best", folder=folder, trust_remote_code=False, out=out, choose=choose
        )
        return outcome, {
            path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()
        }

    choice = chosen(folder, 2, teacher)
    outcome, files = made(2, lambda model, count: chosen(folder, count, teacher, model))
    assert outcome.facts["layers"] == list(choice.layers)
    assert outcome.facts["layers_next"][0]["agreement"] == choice.others[0][1]
    assert outcome.summary.startswith(
        f"layers {list(choice.layers)} of teacher, chosen among 6 sets"
    )
    assert made(list(choice.layers))[1] == files


@pytest.mark.parametrize(
    "layers, problem",
    [
        (0, "greater than or equal to 1"),
        (True, "valid integer"),
        ("3", "valid tuple"),
        ([], "1 item"),
    ],
)
def test_what_is_no_number_of_layers_is_refused(layers, problem):
    with pytest.raises(ValueError, match=problem):
        StartParams.model_validate({"from": "teacher", "layers": layers})
