"""Models that are not BERT: without a token of padding, with code of their own, without a transformer."""

import json
import shutil

import numpy as np
import pytest
import torch

from stages import distill, export, finetune, start
from stages.models.encoder import Encoder
from stages.models.loading import load_model
from stages.params import StartParams
from storage.caches import Caches
from storage.errors import TeachonceError
from tests.conftest import exporting, sentences
from tests.stages.test_distill import World, recipe

CPU = torch.device("cpu")
TEXTS = [*sentences(20), "x", LONG := " ".join(sentences(20, seed=3))]
WHOLE = StartParams.model_validate({"from": "x", "layers": None})


def copied(tiny_model, folder):
    """A tiny model's files, to be given other weights."""
    shutil.copytree(tiny_model, folder)
    return folder, json.loads((folder / "config.json").read_bytes())["vocab_size"]


def without_padding(tiny_model, folder, kind):
    """A decoder as they come: a tokenizer with an end of text and no token of padding."""
    from transformers import AutoConfig, AutoModel

    folder, words = copied(tiny_model, folder)
    torch.manual_seed(0)
    config = type(AutoConfig.for_model(kind))(
        vocab_size=words,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=3,
        eos_token_id=3,
        initializer_range=0.3,
    )
    AutoModel.from_config(config).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_bytes())
    gone = {"pad_token", "cls_token", "sep_token", "mask_token"}
    kept = {name: value for name, value in said.items() if name not in gone}
    path.write_text(json.dumps({**kept, "eos_token": "[SEP]"}))
    for place in folder.glob("1_Pooling/config.json"):
        place.write_text('{"embedding_dimension": 16, "pooling_mode": "lasttoken"}')
    return folder


def alone(folder, texts, **loading):
    """The vector of each text as the transformer itself makes it of that text and nothing else."""
    model = load_model(folder, device=CPU, **loading).eval()
    with torch.inference_mode():
        return np.concatenate([model.encode([text], batch_size=1) for text in texts])


@pytest.fixture(params=["gpt2", "llama", "qwen2"])
def decoder(request, tiny_model, tmp_path):
    return without_padding(tiny_model, tmp_path / request.param, request.param)


def test_a_tokenizer_without_padding_pads_with_what_the_mask_hides(decoder, place, tiny_model):
    from transformers import AutoTokenizer

    before = AutoTokenizer.from_pretrained(decoder)
    # That of Qwen2 gets one that this model has no vector for.
    assert before.pad_token_id in {None, len(before) - 1}
    model = load_model(decoder, device=CPU)
    assert model.tokenizer.pad_token == "[SEP]"
    own = alone(decoder, TEXTS)
    assert np.ptp(own, axis=0).max() > 0.05, "all texts are alike: nothing would be seen"
    assert np.allclose(model.encode(TEXTS, batch_size=len(TEXTS)), own, atol=1e-5)
    assert np.allclose(Encoder(decoder, device=CPU).encode(TEXTS), own, atol=1e-5)

    made = place.root / "start"
    start.run(WHOLE, name="s", folder=decoder, trust_remote_code=False, out=made)
    assert np.allclose(alone(made, TEXTS), own, atol=1e-5)
    world = World(place, tiny_model, made)
    world.train(recipe(epochs=1))
    texts = sentences(12, seed=5)
    student = place.root / "student"
    together = load_model(student, device=CPU).encode(texts, batch_size=len(texts))
    assert np.allclose(alone(student, texts), together, atol=1e-5)


CONFIGURATION = """
from transformers import PretrainedConfig
class MineConfig(PretrainedConfig):
    model_type = "mine"
    def __init__(self, width=32, vocab_size=100, positions=64, **others):
        self.width, self.vocab_size, self.positions = width, vocab_size, positions
        self.hidden_size = width
        super().__init__(**others)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_mine import MineConfig
from .layers_mine import Mixer
class MineModel(PreTrainedModel):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.mixer = Mixer(config.width)
        self.post_init()
    def get_input_embeddings(self):
        return self.words
    def forward(self, input_ids=None, attention_mask=None, **others):
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        states = self.words(input_ids) + self.position_embeddings(place)
        mask = attention_mask[..., None].to(states.dtype)
        return BaseModelOutput(last_hidden_state=self.mixer(states, mask))
"""
LAYERS = """
from torch import nn
class Mixer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
    def forward(self, states, mask):
        mean = (states * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return states + self.inner(mean).tanh()
"""


def with_code(tiny_model, folder):
    """A model whose maker wrote its classes, in three files beside the weights."""
    from safetensors.torch import save_file

    folder, words = copied(tiny_model, folder)
    for name, code in (
        ("configuration", CONFIGURATION),
        ("modeling", MODELING),
        ("layers", LAYERS),
    ):
        (folder / f"{name}_mine.py").write_text(code)
    classes = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModel": "modeling_mine.MineModel",
    }
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mine", "vocab_size": words, "auto_map": classes})
    )
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "words.weight": (words, 32),
        "position_embeddings.weight": (64, 32),
        "mixer.inner.weight": (32, 32),
        "mixer.inner.bias": (32,),
    }
    weights = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_start_with_code_of_its_own_goes_all_the_way(place, tiny_model, tmp_path):
    """The code goes along from folder to folder, and is run only where that is allowed."""
    from tests.stages.test_finetune import settings

    own = with_code(tiny_model, tmp_path / "own")
    with pytest.raises(TeachonceError, match="cannot load it"):
        load_model(own, device=CPU)
    texts = TEXTS[:8]
    vectors = alone(own, texts, trust_remote_code=True)
    encoder = Encoder(own, device=CPU, max_tokens=64, trust_remote_code=True)
    assert np.allclose(encoder.encode(texts), vectors, atol=1e-5)

    made = tmp_path / "start"
    start.run(WHOLE, name="s", folder=own, trust_remote_code=True, out=made)
    shutil.rmtree(own)
    assert {path.name for path in made.glob("*.py")} == {
        f"{name}_mine.py" for name in ("configuration", "modeling", "layers")
    }
    assert np.allclose(alone(made, texts, trust_remote_code=True), vectors, atol=1e-5)

    world = World(place, tiny_model, made)
    caches = Caches(world.corpus, world.embeddings, None, world.split, place.store)
    run = {"device": CPU, "work": tmp_path / "work", "track": lambda row: None}
    run |= {"curve": tmp_path / "c.csv", "training": tmp_path / "t.json", "trust_remote_code": True}
    student = tmp_path / "kd"
    distill.run(recipe(epochs=1), name="kd", start=made, caches=caches, out=student, **run)
    assert not np.allclose(alone(student, texts, trust_remote_code=True), vectors, atol=1e-3)
    (tmp_path / "pairs.tsv").write_text(
        "".join(f"{text[:-1]}\t{text[:9]}\n" for text in sentences(60))
    )
    finetuned = tmp_path / "kd-finetuned"
    finetune.run(
        settings(triplets=["pairs.tsv"], distill_weight=0.0),
        name="kd-finetuned",
        student=student,
        root=tmp_path,
        evaluation=(),
        caches=None,
        out=finetuned,
        **run,
    )
    exported = tmp_path / "export"
    export.run(
        folder=finetuned,
        lineage=json.loads((finetuned / "teachonce.json").read_bytes()),
        metrics={},
        facts={},
        trust_remote_code=True,
        **exporting(exported, model="kd-finetuned"),
    )
    assert np.allclose(
        alone(exported, texts, trust_remote_code=True),
        alone(finetuned, texts, trust_remote_code=True),
        atol=1e-5,
    )
    assert "trust_remote_code=True" in (exported / "README.md").read_text()
    with pytest.raises(TeachonceError, match="cannot load it"):
        load_model(exported, device=CPU)


POOLING = """
from sentence_transformers.sentence_transformer.modules import Pooling
class Shifted(Pooling):
    def forward(self, features, **others):
        found = super().forward(features, **others)
        found["sentence_embedding"] = found["sentence_embedding"] + 1
        return found
"""


def test_the_code_of_a_module_goes_along_too(tiny_model, tmp_path):
    """sentence-transformers writes it where it does not look for it."""
    folder, _ = copied(tiny_model, tmp_path / "own")
    (folder / "shifted.py").write_text(POOLING)
    modules = json.loads((folder / "modules.json").read_bytes())
    modules[1]["type"] = "shifted.Shifted"
    (folder / "modules.json").write_text(json.dumps(modules))
    own = alone(folder, TEXTS[:4], trust_remote_code=True)
    assert not np.allclose(own, alone(tiny_model, TEXTS[:4]), atol=0.01)
    first, second = tmp_path / "first", tmp_path / "second"
    start.run(WHOLE, name="s", folder=folder, trust_remote_code=True, out=first)
    start.run(WHOLE, name="s", folder=first, trust_remote_code=True, out=second)
    assert np.allclose(alone(second, TEXTS[:4], trust_remote_code=True), own, atol=1e-5)


def test_a_static_teacher_has_transformers_as_students(place, tmp_path, tiny_model):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    core = AutoTokenizer.from_pretrained(tiny_model).backend_tokenizer
    static = SentenceTransformer(modules=[StaticEmbedding(core, embedding_dim=8)], device="cpu")
    static.save(str(tmp_path / "static"), create_model_card=False)
    made = tmp_path / "start"
    start.run(WHOLE, name="s", folder=tiny_model, trust_remote_code=False, out=made)
    world = World(place, tmp_path / "static", made)
    assert np.allclose(
        world.embeddings.rows_of(np.arange(4)), static.encode(world.corpus.texts(0)[:4])
    )
    world.train(recipe(epochs=1))
    assert Encoder(place.root / "student", device=CPU).encode(["x"]).shape == (1, 8)
