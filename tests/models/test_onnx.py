"""The graph of a model: what it gives, and that ONNX Runtime is not led to its slow norm."""

import numpy as np
import pytest
import torch

from stages.models.loading import load_model
from stages.models.onnx import INPUTS, write_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TEXTS = ["alpha beta", "", "gamma delta epsilon zeta eta theta", "beta"]


@pytest.fixture(scope="module")
def graph(tiny_model, tmp_path_factory):
    """A model, and the file of its graph."""
    model = load_model(tiny_model, device=torch.device("cpu"))
    path = tmp_path_factory.mktemp("graph") / "onnx/model.onnx"
    before = model[0].auto_model.config._attn_implementation
    write_onnx(model, path, address="tiny")
    assert model[0].auto_model.config._attn_implementation == before == "sdpa"
    return model, path


def test_a_batch_of_texts_of_several_lengths_has_the_models_vectors(graph):
    model, path = graph
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    features = model.preprocess(TEXTS)
    assert 0 in features["attention_mask"]
    [vectors] = session.run(
        ["sentence_embedding"], {name: features[name].numpy() for name in INPUTS}
    )
    np.testing.assert_allclose(vectors, model.encode(TEXTS), rtol=0, atol=2e-6)
    hidden = {name: features[name].numpy().copy() for name in INPUTS}
    hidden["attention_mask"][1] = 0  # as a text of no tokens is given
    [vectors] = session.run(["sentence_embedding"], hidden)
    assert (vectors[1] == 0).all()
    np.testing.assert_allclose(vectors[2], model.encode(TEXTS[2]), rtol=0, atol=2e-6)


def test_onnx_runtime_leaves_the_layer_norms_as_they_are(graph, tmp_path):
    model, path = graph
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    norms = sum(isinstance(part, torch.nn.LayerNorm) for part in model.modules())
    assert nodes.count("LayerNormalization") == norms == 9
    assert "SkipLayerNormalization" not in nodes and "IsNaN" not in nodes
