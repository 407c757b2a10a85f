"""Layers are taken out of any family, and what cannot read as before without the others is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from stages import start
from stages.models.abilities import check_layers_of
from stages.models.layers import PROOF_TEXTS, keep_layers
from stages.models.loading import load_model, save_model
from stages.params import StartParams
from storage.errors import TeachonceError
from tests.conftest import sentences
from tests.models.families import (
    BERT,
    DISENTANGLED,
    FAMILIES,
    SPECIAL,
    Family,
    make_family,
    make_tokenizer,
    table,
)

CPU = torch.device("cpu")
TEXTS = [*sentences(3), "x", " ".join(sentences(20))]
AT = "starts.half.layers"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="module")
def bert(tokenizer, tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("bert") / "m", tokenizer, "BERT")


def make_start(folder, layers, out):
    params = StartParams.model_validate({"from": "teacher", "layers": layers})
    start.run(params, name="half", folder=folder, trust_remote_code=False, out=out)
    return load_model(out, device=CPU)


def blocks(body):
    lists = [module for module in body.modules() if isinstance(module, torch.nn.ModuleList)]
    return next(found for found in lists if len(found) == body.config.num_hidden_layers)


def after_block(model, place):
    """What comes out of one layer for each text, read alone."""
    outputs = []

    def take(_, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hook = blocks(model[0].auto_model)[place].register_forward_hook(take)
    with torch.inference_mode():
        for text in TEXTS:
            model[0](model.preprocess([text]))
    hook.remove()
    return outputs


def fails(folder, layers, tmp_path):
    with pytest.raises(TeachonceError) as error:
        make_start(folder, layers, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    return str(error.value).splitlines()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_reads_as_the_layers_that_it_has(family, tokenizer, tmp_path):
    folder = make_family(tmp_path / "m", tokenizer, family)
    whole = load_model(folder, device=CPU)
    first = make_start(folder, [0, 1], tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_bytes())
    assert 2 in {config.get(name) for name in ("num_hidden_layers", "n_layers", "num_layers")}
    for cut, own in zip(after_block(first, 1), after_block(whole, 1), strict=True):
        assert torch.allclose(cut, own, rtol=0, atol=1e-5 * own.abs().max())

    said = {"any": True, "0 first": False}[table()[family]["layers"]]
    try:
        other = make_start(folder, [1, 3], tmp_path / "other")
    except TeachonceError:
        assert not said
        other = make_start(folder, [0, 3], tmp_path / "other")
    else:
        assert said
    own = blocks(whole[0].auto_model)[3].state_dict()
    assert len(own) >= 6
    for name, weight in blocks(other[0].auto_model)[1].state_dict().items():
        assert torch.equal(weight, own[name])


def test_a_layer_stays_global_or_local(tokenizer, tmp_path):
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    family = FAMILIES["Gemma 2"].with_settings(layer_types=kinds)
    folder = make_family(tmp_path / "m", tokenizer, family)
    half = make_start(folder, [1, 3], tmp_path / "half")
    assert half[0].auto_model.config.layer_types == ["full_attention", "sliding_attention"]
    assert [block.self_attn.sliding_window for block in blocks(half[0].auto_model)] == [None, 8]


def test_the_bias_that_all_layers_share_is_carried_to_the_new_first(tokenizer, tmp_path):
    folder = make_family(tmp_path / "m", tokenizer, "T5 encoder")
    whole = load_model(folder, device=CPU)[0].auto_model.encoder.block
    half = make_start(folder, [1, 3], tmp_path / "half")[0].auto_model.encoder.block
    bias = half[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.equal(bias, whole[0].layer[0].SelfAttention.relative_attention_bias.weight)


def test_layers_are_read_in_the_order_they_are_named(bert, tmp_path):
    """As if they were called by hand."""
    whole = load_model(bert, device=CPU)
    turned = make_start(bert, [2, 3, 0], tmp_path / "turned")
    body = whole[0].auto_model
    for text in TEXTS:
        features = turned.preprocess([text])
        with torch.inference_mode():
            states = body.embeddings(features["input_ids"])
            for layer in (2, 3, 0):
                states = body.encoder.layer[layer](states)
            made = turned[0](features)["token_embeddings"]
        assert torch.allclose(made, states, atol=1e-5)


def test_what_needs_its_first_layer_is_refused_with_the_weight(tokenizer, tmp_path):
    folder = make_family(tmp_path / "m", tokenizer, "ModernBERT")
    alone = "alone does not read texts as these layers do in the whole model"
    whole = "set layers: null to start from the whole model, or name a small model in `from`"
    assert fails(folder, [1, 2], tmp_path) == [
        f"{AT}: a ModernBertModel of layers [1, 2] {alone}: the weight "
        "layers.0.attn_norm.weight is in one of the two only",
        f"  cure: keep the first layers [0, 1], {whole}",
    ]


def test_what_reads_otherwise_without_its_first_layer_is_refused(tokenizer, tmp_path):
    """A convolution stands behind the first layer, whichever that is."""
    settings = BERT | DISENTANGLED | {"conv_kernel_size": 3, "conv_act": "gelu"}
    family = Family("DebertaV2Model", "DebertaV2Config", settings)
    folder = make_family(tmp_path / "m", tokenizer, family)
    [problem, cure] = fails(folder, [1, 3], tmp_path)
    assert "a DebertaV2Model of layers [1, 3] alone does not read texts as these" in problem
    assert "its vectors of tokens are off by" in problem
    assert "keep the first layers [0, 1]" in cure
    make_start(folder, [0, 1], tmp_path / "half")
    make_start(folder, [0, 3], tmp_path / "far")


def test_a_configuration_whose_part_for_texts_is_empty_counts_its_own_layers(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "null")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": None}))
    check_layers_of(folder, [3], address=AT)
    with pytest.raises(TeachonceError, match=rf"{AT}: layer 4 of 4"):
        check_layers_of(folder, [4], address=AT)


OTHERS = {
    "AlbertModel": Family("AlbertModel", "AlbertConfig", BERT | {"embedding_size": 16}),
    "BartModel": Family(
        "BartModel",
        "BartConfig",
        SPECIAL | {f"{side}_layers": 4 for side in ("encoder", "decoder")} | {"d_model": 32},
    ),
}


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_a_model_without_one_list_of_layers_is_refused_by_name(kind, tokenizer, tmp_path):
    folder = make_family(tmp_path / "m", tokenizer, OTHERS[kind])
    [problem, cure] = fails(folder, [0], tmp_path)
    assert problem == (
        f"{AT}: layers can be taken from a transformer with one list of equal layers, not from {kind}"
    )
    assert "set layers: null" in cure


def spoil_weight(body):
    blocks(body)[1].mlp.Wo.weight.data *= 1.01


def spoil_window(body):
    blocks(body)[1].attn.sliding_window = 9


def spoil_types(body):
    body.config.layer_types = ["full_attention", "full_attention"]


def spoil_count(body):
    body.layers.append(body.layers[0])
    body.config.num_hidden_layers = 3


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_weight, "its vectors of tokens are off by"),
        (spoil_window, "attn.sliding_window of layer 3 is 9, not 501"),
        (spoil_types, "layer_types of layer 3 is full_attention, not sliding_attention"),
        (spoil_count, "it has 3 layers"),
    ],
)
def test_a_start_that_is_loaded_as_another_is_refused(spoil, said, tokenizer, tmp_path):
    """Its window is wider than the texts of the proof are long: no vector of theirs would show it."""
    family = FAMILIES["ModernBERT"].with_settings(local_attention=1000)
    model = load_model(make_family(tmp_path / "m", tokenizer, family), device=CPU)
    proof = keep_layers(model, [0, 3], address=AT)
    save_model(model, tmp_path / "half", address="half")
    proof.check_saved(tmp_path / "half", trust_remote_code=False)
    spoil(model[0].auto_model)
    with pytest.raises(TeachonceError) as error:
        proof.check(model, when="saved and loaded again, ")
    assert f"in the whole model: saved and loaded again, {said}" in str(error.value)


def test_a_start_that_cannot_be_loaded_again_is_refused(bert, tmp_path):
    model = load_model(bert, device=CPU)
    proof = keep_layers(model, [0, 3], address=AT)
    save_model(model, tmp_path / "half", address="half")
    (tmp_path / "half" / "config.json").write_text("{}")
    with pytest.raises(TeachonceError, match=r"in the whole model: it was saved, and then sent"):
        proof.check_saved(tmp_path / "half", trust_remote_code=False)


def test_the_texts_of_the_proof_are_of_several_lengths(bert):
    lengths = [
        len(load_model(bert, device=CPU).tokenizer(text)["input_ids"]) for text in PROOF_TEXTS
    ]
    assert len(set(lengths)) >= 4
    assert max(lengths) > 2 * 64, "the longest is within what ModernBERT's local layers see"


def test_layers_that_are_all_of_them_in_their_order_leave_the_model_as_it_is(bert, tmp_path):
    model = make_start(bert, [0, 1, 2, 3], tmp_path / "all")
    own = load_model(bert, device=CPU).encode(TEXTS)
    assert np.allclose(model.encode(TEXTS), own, atol=1e-6)


CONFIGURATION = """
from transformers import PretrainedConfig
class MineConfig(PretrainedConfig):
    model_type = "mine"
    def __init__(self, num_hidden_layers=4, hidden_size=32, vocab_size=200, **others):
        self.num_hidden_layers, self.hidden_size = num_hidden_layers, hidden_size
        self.vocab_size = vocab_size
        super().__init__(**others)
        self.scales = [1.0 + layer for layer in range(num_hidden_layers)]
"""
MODELING = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_mine import MineConfig
class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.inner, self.scale = nn.Linear(config.hidden_size, config.hidden_size), config.scales[layer]
    def forward(self, states):
        return states + self.scale * self.inner(states)
class MineModel(PreTrainedModel):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config, n) for n in range(config.num_hidden_layers)])
        self.post_init()
    def get_input_embeddings(self):
        return self.words
    def forward(self, input_ids=None, attention_mask=None, **others):
        states = self.words(input_ids)
        for block in self.blocks:
            states = block(states)
        return BaseModelOutput(last_hidden_state=states)
"""


def test_a_model_that_counts_its_layers_anew_when_it_is_loaded_is_refused(bert, tmp_path):
    """In memory the cut is right; its maker's configuration makes another of it."""
    from safetensors.torch import save_file

    folder = shutil.copytree(bert, tmp_path / "mine")
    (folder / "configuration_mine.py").write_text(CONFIGURATION)
    (folder / "modeling_mine.py").write_text(MODELING)
    classes = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModel": "modeling_mine.MineModel",
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": classes}))
    draw = torch.Generator().manual_seed(0)
    weights = {"words.weight": torch.randn(200, 32, generator=draw)}
    for layer in range(4):
        weights[f"blocks.{layer}.inner.weight"] = torch.randn(32, 32, generator=draw)
        weights[f"blocks.{layer}.inner.bias"] = torch.randn(32, generator=draw)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def cut(layers):
        params = StartParams.model_validate({"from": "teacher", "layers": layers})
        out = tmp_path / f"start-{layers[-1]}"
        start.run(params, name="half", folder=folder, trust_remote_code=True, out=out)

    cut([0, 1])
    said = r"whole model: saved and loaded again, scales of layer 3 is 2.0, not 4.0"
    with pytest.raises(TeachonceError, match=said):
        cut([0, 3])
    assert not (tmp_path / "start-3").exists()
