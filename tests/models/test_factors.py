"""Word embeddings as two factors: what they begin with, how they learn, and what other programs read."""

import filecmp
import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from stages import export, start
from stages.models.abilities import check_embedding_of
from stages.models.encoder import Encoder
from stages.models.factors import COLUMNS, Factors, factorise, folded_in
from stages.models.int8 import quantize_graph
from stages.models.layers import distance, token_vectors
from stages.models.loading import load_model
from stages.models.onnx import run_onnx, write_onnx
from stages.params import StartParams
from storage.errors import TeachonceError
from tests.conftest import exporting, sentences
from tests.stages.test_distill import World, power_cut, recipe, start_folder

__all__ = ["start_folder"]

CPU = torch.device("cpu")
TEXTS = sentences(40, seed=1)
AT = "starts.lite.embedding"


def made(world, tiny_model, out, **changes):
    params = StartParams.model_validate(
        {"from": "teacher", "layers": [0, 3], "embedding": 6} | changes
    )
    how = {"name": "lite", "folder": tiny_model, "trust_remote_code": False}
    return start.run(params, out=out, corpus=lambda: world.corpus, **how)


@pytest.fixture
def world(place, tiny_model, start_folder):
    return World(place, tiny_model, start_folder)


def table_of(model):
    return model[0].auto_model.get_input_embeddings()


def test_what_is_lost_of_frequent_tokens_is_least(world, tiny_model):
    """No other projection to six directions loses less of the tokens as often as they occur."""
    model = load_model(tiny_model, device=CPU)
    whole = table_of(model).weight.detach().double()
    factorise(model, 6, corpus=world.corpus, address=AT)
    kept = table_of(model).folded().weight.detach().double()
    counts = np.zeros(len(whole)) + 1
    for text in world.corpus.take(np.arange(world.corpus.rows)):
        for token in model.tokenizer(text, add_special_tokens=False)["input_ids"]:
            counts[token] += 1
    root = torch.from_numpy(counts).sqrt()[:, None]
    least = torch.linalg.svdvals(root * whole)[6:].square().sum()
    assert float((root * (whole - kept)).square().sum()) == pytest.approx(float(least), rel=1e-4)


def test_a_start_is_a_stock_model_on_disk_and_two_factors_in_memory(world, tiny_model, tmp_path):
    outcome = made(world, tiny_model, tmp_path / "lite", hidden=16, passes=2)
    ours = load_model(tmp_path / "lite", device=CPU)
    table = table_of(ours)
    assert isinstance(table, Factors)
    assert (table.table.embedding_dim, table.embedding_dim) == (6, 16)
    tokens = table.num_embeddings
    assert folded_in(ours) == tokens * 16 - tokens * 6 - 6 * 16
    assert outcome.facts["parameters"] == sum(w.numel() for w in ours.parameters())
    stock = SentenceTransformer(str(tmp_path / "lite"), device="cpu")
    assert table_of(stock).weight.shape == (tokens, 16)
    for own, other in zip(
        token_vectors(ours, TEXTS[:9]), token_vectors(stock, TEXTS[:9]), strict=True
    ):
        assert distance(own, other) < 1e-5
    read = Encoder(tmp_path / "lite", device=CPU)
    assert read.parameters + read.copied_parameters == sum(
        value.numel()
        for path in (tmp_path / "lite").rglob("*.safetensors")
        for value in load_file(path).values()
    )
    made(world, tiny_model, tmp_path / "again", hidden=16, passes=2)
    weights = "model.safetensors"
    assert filecmp.cmp(tmp_path / "lite" / weights, tmp_path / "again" / weights, shallow=False)


def test_the_factors_stay_factors_in_training_and_in_a_killed_run(world, tiny_model, tmp_path):
    made(world, tiny_model, tmp_path / "lite")
    world.start = tmp_path / "lite"
    world.train(recipe(), "whole")
    with power_cut(after=13):
        world.train(recipe(), "killed")
    world.train(recipe(), "killed")
    assert world.weights("killed") == world.weights("whole")
    student = load_model(world.place.root / "whole", device=CPU)
    assert isinstance(table_of(student), Factors)
    before = table_of(load_model(tmp_path / "lite", device=CPU)).folded().weight
    assert distance(before.detach(), table_of(student).folded().weight.detach()) > 0.01
    stock = SentenceTransformer(str(world.place.root / "whole"), device="cpu")
    assert int(torch.linalg.matrix_rank(table_of(stock).weight.detach(), rtol=1e-4)) == 6
    # Of such a student, a start has a whole table again unless it says otherwise.
    params = StartParams.model_validate({"from": "x", "layers": [0]})
    how = {"name": "next", "folder": world.place.root / "whole", "trust_remote_code": False}
    start.run(params, out=tmp_path / "next", **how)
    assert COLUMNS not in json.loads((tmp_path / "next/config.json").read_text())


def test_a_graph_keeps_the_factors(world, tiny_model, tmp_path):
    onnx = pytest.importorskip("onnx")
    made(world, tiny_model, tmp_path / "lite")
    model = load_model(tmp_path / "lite", device=CPU)
    write_onnx(model, tmp_path / "onnx/model.onnx", address="lite")
    shapes = {tuple(w.dims) for w in onnx.load(tmp_path / "onnx/model.onnx").graph.initializer}
    tokens = table_of(model).num_embeddings
    assert (tokens, 6) in shapes and (tokens, 32) not in shapes
    vectors = run_onnx(tmp_path / "onnx/model.onnx", model, TEXTS)
    np.testing.assert_allclose(vectors, model.encode(TEXTS), atol=1e-5)


def test_an_int8_graph_keeps_them_too(world, tiny_model, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    made(world, tiny_model, tmp_path / "lite")
    model = load_model(tmp_path / "lite", device=CPU)
    write_onnx(model, tmp_path / "onnx/model.onnx", address="lite")
    quantize_graph(tmp_path / "onnx/model.onnx", tmp_path / "int8.onnx")
    stored = onnx.load(tmp_path / "int8.onnx").graph.initializer
    small = (table_of(model).num_embeddings, 6)
    assert [w.data_type for w in stored if tuple(w.dims) == small] == [onnx.TensorProto.UINT8]
    vectors, own = run_onnx(tmp_path / "int8.onnx", model, TEXTS), model.encode(TEXTS)
    cosines = (vectors * own).sum(axis=1) / np.linalg.norm(vectors, axis=1)
    assert cosines.min() > 0.97 * np.linalg.norm(own, axis=1).max()


def test_a_table_that_was_trained_as_a_whole_is_refused(world, tiny_model, tmp_path):
    made(world, tiny_model, tmp_path / "lite")
    path = tmp_path / "lite/model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name] = weights[name] + 0.1 * torch.randn(weights[name].shape)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(TeachonceError, match="have 6 independent columns, but they have more"):
        load_model(tmp_path / "lite", device=CPU)


def test_what_has_no_such_factors_is_refused(tiny_model, world):
    with pytest.raises(TeachonceError) as error:
        check_embedding_of(tiny_model, 32, None, address=AT)
    said = (
        f"{AT}: 32, but the word embeddings have 32 values\n  cure: set it to less than 32, or take"
    )
    assert str(error.value).startswith(said)
    check_embedding_of(tiny_model, 31, None, address=AT)
    with pytest.raises(TeachonceError, match="12, but the word embeddings have 8 values"):
        check_embedding_of(tiny_model, 12, 8, address=AT)
    model = load_model(tiny_model, device=CPU)
    with pytest.raises(TeachonceError, match="32, but the word embeddings have 32 values"):
        factorise(model, 32, corpus=world.corpus, address=AT)
    model._modules["0"] = torch.nn.Identity()
    with pytest.raises(TeachonceError, match="can have fewer columns, not those of Identity"):
        factorise(model, 6, corpus=world.corpus, address=AT)
    static = {"from": "teacher", "layers": None, "kind": "static", "hidden": 8, "embedding": 4}
    with pytest.raises(ValidationError, match="a static model's table has hidden columns"):
        StartParams.model_validate(static)


def test_as_float16_they_are_one_table_in_half_of_the_bytes(world, tiny_model, tmp_path):
    folder, out = tmp_path / "lite", tmp_path / "out"
    made(world, tiny_model, folder)
    how = {"folder": folder, "lineage": {}, "metrics": {}, "facts": {}}
    outcome = export.run(**how, **exporting(out, "safetensors-fp16"))
    own, copy = load_model(folder, device=CPU), load_model(out, device=CPU)
    assert isinstance(table_of(own), Factors) and not isinstance(table_of(copy), Factors)
    assert (own.encode(TEXTS) * copy.encode(TEXTS)).sum(1).min() > 0.9999
    # What a program without factors has beyond them, in two bytes each.
    assert outcome.facts["megabytes_of_copies"] == round(2 * folded_in(own) / 1e6, 3) > 0
    assert COLUMNS in json.loads((folder / "config.json").read_bytes())
