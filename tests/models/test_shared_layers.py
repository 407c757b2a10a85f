"""Layers that share weights: one parameter in memory, a plain deeper model on disk."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from pipeline.settings import load_params
from stages import export, start
from stages.learning.student import Student, encode_ids
from stages.models.abilities import check_passes_of
from stages.models.encoder import Encoder
from stages.models.loading import load_model
from stages.models.shared_layers import DISTINCT, copied
from stages.params import StartParams
from stages.reporting import legend
from storage.errors import TeachonceError
from tests.conftest import exporting, make_tiny_model

CPU = torch.device("cpu")
TEXTS = ["Amber harbor, silver lantern.", "violin", "basin cedar delta ember fjord"]
ROOT = Path(__file__).parents[2]


def make(folder, out, **settings):
    params = StartParams.model_validate({"from": "teacher", "layers": [0, 3], **settings})
    return start.run(params, name="twice", folder=folder, trust_remote_code=False, out=out)


@pytest.fixture(scope="module")
def twice(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("starts") / "twice"
    outcome = make(tiny_model, out, passes=2)
    assert outcome.summary == (
        "layers [0, 3] of teacher, 0.0 million parameters (0.0 with copies of shared layers)"
    )
    return out


def layers_of(model):
    return model[0].auto_model.encoder.layer


def plain(folder):
    """The folder as anybody loads it."""
    return SentenceTransformer(str(folder), device="cpu")


def test_each_pass_has_the_same_weights_queries_and_keys_swapped_in_every_second(
    tiny_model, tmp_path
):
    make(tiny_model, tmp_path / "thrice", passes=3)
    taken = [layers_of(load_model(tiny_model, device=CPU))[place].state_dict() for place in (0, 3)]
    made = plain(tmp_path / "thrice")
    assert made[0].auto_model.config.num_hidden_layers == len(layers_of(made)) == 6
    for place, layer in enumerate(layers_of(made)):
        for name, weight in layer.state_dict().items():
            twin = name
            if place in {2, 3}:
                twin = name.replace("query", "?").replace("key", "query").replace("?", "key")
            assert torch.equal(weight, taken[place % 2][twin]), (place, name)


@torch.no_grad()
def test_a_swapped_layer_attends_by_the_transposed_scores(twice):
    """By the formula: softmax((K x)(Q x)^T / sqrt(d)) V x, one head at a time."""
    first, _, second, _ = (
        layer.attention.self for layer in layers_of(load_model(twice, device=CPU))
    )
    torch.manual_seed(0)
    x = torch.randn(5, 32)
    heads = []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        q, k, v = (
            x @ linear.weight[part].T + linear.bias[part]
            for linear in (first.query, first.key, first.value)
        )
        heads.append(torch.softmax(k @ q.T / math.sqrt(8), dim=1) @ v)
    assert torch.allclose(second(x[None])[0][0], torch.cat(heads, dim=1), atol=1e-5)
    assert not torch.allclose(first(x[None])[0][0], torch.cat(heads, dim=1), atol=1e-2)


def test_shared_weights_are_one_parameter_with_the_gradient_of_all_passes(twice):
    shared, apart = load_model(twice, device=CPU), plain(twice)
    both = [sum(weight.numel() for weight in model.parameters()) for model in (shared, apart)]
    assert (
        both[1] - both[0]
        == copied(shared)
        == sum(weight.numel() for layer in layers_of(shared)[:2] for weight in layer.parameters())
    )
    assert copied(apart) == both[1] - both[0]  # what the file says, tied or not
    for model in (shared, apart):
        model.eval()
        model(model.preprocess(TEXTS))["sentence_embedding"].square().sin().sum().backward()
    one, copies = layers_of(shared)[0].attention.self, layers_of(apart)
    own, other = copies[0].attention.self.query, copies[2].attention.self.key
    assert torch.allclose(one.query.weight.grad, own.weight.grad + other.weight.grad, atol=1e-6)
    assert other.weight.grad.norm() > 1e-3


def test_a_student_in_training_stays_shared_and_is_saved_as_a_plain_model(twice, tmp_path):
    model = load_model(twice, device=CPU)
    student = Student(model, teacher_dim=48, unit_length=True, project=False, dropout=False)
    assert student.packed is not None
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    ids = [np.arange(5, 5 + n, dtype=np.int32) for n in (9, 4, 7)]
    settings = {"pad_id": 0, "device": CPU, "precision": "fp32"}
    vectors = [
        encode_ids(student, ids, gradient_caching=caching, **settings) for caching in (False, True)
    ]
    gradients = []
    for found in vectors:
        optimizer.zero_grad()
        found[:, 0].sum().backward()
        gradients.append(layers_of(model)[0].attention.self.query.weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6)
    optimizer.step()
    before = encode_ids(student, ids, gradient_caching=False, **settings).detach()
    student.save(tmp_path, {"student": "twice"})
    weights = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.{}.attention.self.{}.weight"
    assert torch.equal(weights[name.format(0, "query")], weights[name.format(2, "key")])
    assert not torch.equal(
        weights[name.format(0, "query")],
        load_file(twice / "model.safetensors")[name.format(0, "query")],
    )
    # Saving untied nothing, and a new load ties again.
    assert (
        layers_of(model)[0].attention.self.query.weight
        is layers_of(model)[2].attention.self.key.weight
    )
    again = load_model(tmp_path, device=CPU)
    assert (
        layers_of(again)[0].attention.self.query.weight
        is layers_of(again)[2].attention.self.key.weight
    )
    whole = Student(again, teacher_dim=48, unit_length=True, project=False, dropout=False)
    assert whole.projection is None  # it is a module of the model now
    assert torch.allclose(
        before, encode_ids(whole, ids, gradient_caching=False, **settings), atol=1e-6
    )
    ours = Encoder(tmp_path, device=CPU, max_tokens=16).encode(TEXTS)
    assert np.allclose(plain(tmp_path).encode(TEXTS), ours, atol=1e-6)


@pytest.mark.parametrize("change", ["weight", 3, 4, 0, -1, "x", None])
def test_layers_that_do_not_share_are_refused(twice, tmp_path, change):
    folder = tmp_path / "changed"
    shutil.copytree(twice, folder)
    config = json.loads((folder / "config.json").read_text())
    said = 2
    if change == "weight":
        weights = load_file(folder / "model.safetensors")
        weights["encoder.layer.3.output.dense.bias"][0] += 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        said = change
        (folder / "config.json").write_text(json.dumps(config | {DISTINCT: change}))
    if change is None:  # no such word: a plain model
        assert copied(load_model(folder, device=CPU)) == 0
        return
    with pytest.raises(TeachonceError) as error:
        load_model(folder, device=CPU)
    assert str(error.value) == (
        f"{folder}: its config.json says that all layers have the weights of the first {said}, but they "
        f"differ\n  cure: if they were trained apart, delete {DISTINCT} there; else make the model anew"
    )


def test_layers_taken_of_a_shared_model_are_their_own(twice, tmp_path):
    make(twice, tmp_path / "two", layers=[0, 2])
    config = json.loads((tmp_path / "two/config.json").read_text())
    assert DISTINCT not in config and config["num_hidden_layers"] == 2
    made = load_model(tmp_path / "two", device=CPU)
    one, other = (layer.attention.self for layer in layers_of(made))
    assert torch.equal(one.query.weight, other.key.weight)
    assert one.query.weight is not other.key.weight
    make(twice, tmp_path / "whole", layers=None)
    assert copied(load_model(tmp_path / "whole", device=CPU)) == copied(
        load_model(twice, device=CPU)
    )


def test_a_model_whose_queries_and_keys_cannot_change_places_is_refused(tiny_model, tmp_path):
    folder = make_tiny_model(tmp_path / "fused")
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace(".key.", ".keys."): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    check_passes_of(tiny_model, address="starts.x.passes")
    with pytest.raises(TeachonceError) as error:
        check_passes_of(folder, address="starts.x.passes")
    assert str(error.value) == (
        "starts.x.passes: the layers of bert have no weights of queries and keys that could change places\n"
        "  cure: set passes: null, or start from a model like BERT"
    )


@pytest.mark.parametrize("with_onnx", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_export_is_expanded_and_says_so(twice, tmp_path, with_onnx):
    outcome = export.run(
        folder=twice,
        lineage={"projection": False},
        metrics={},
        facts={},
        **exporting(tmp_path / "export", "safetensors", *(["onnx"] if with_onnx else [])),
    )
    megabytes, copies = outcome.facts["megabytes"], outcome.facts["megabytes_of_copies"]
    assert copies == round(4 * copied(load_model(twice, device=CPU)) / 1e6, 3)
    assert (
        f"{megabytes:.1f} MB instead of {megabytes - copies:.1f}: shared layers are"
        in outcome.summary
    )
    assert min(outcome.facts["cosine"].values()) > 0.99999
    ours = Encoder(twice, device=CPU, max_tokens=16).encode(TEXTS)
    assert np.allclose(plain(tmp_path / "export").encode(TEXTS), ours, atol=1e-6)


def test_the_table_says_that_shared_weights_are_counted_once():
    metrics = {"kd": {"parameters": 3_000_000}, "twice": {"parameters_in_file": 22_640_000}}
    assert legend.notes(metrics, ["kd", "twice"]) == [
        "Weights that layers share are counted once in twice (22.6 million in its file)."
    ]


def test_the_start_that_params_yaml_shows_works_without_its_hash(tmp_path):
    settings = (ROOT / "params.yaml").read_text()
    assert settings.count("\n  # twice: ") == 1
    (tmp_path / "params.yaml").write_text(settings.replace("\n  # twice: ", "\n  twice: "))
    params = load_params(tmp_path / "params.yaml")
    teacher = make_tiny_model(tmp_path / "six", layers=6)
    start.run(
        params.starts["twice"],
        name="twice",
        folder=teacher,
        trust_remote_code=False,
        out=tmp_path / "s",
    )
    assert len(layers_of(load_model(tmp_path / "s", device=CPU))) == 6
    assert yaml.safe_load(settings)["recipes"]["shared_layers"]["objectives"][0]["name"] == "kd"
