"""What a model can be asked for is known from its configuration and the heads of its weights."""

import json
import shutil

import pytest
import torch
import yaml

from stages import start
from stages.models.abilities import AFTER_PADDING, token_limit, token_limit_of
from stages.models.encoder import Encoder
from stages.models.loading import load_model
from stages.models.packed import first_position
from stages.params import StartParams
from storage.errors import TeachonceError
from tests.conftest import make_tiny_model, sentences

CPU = torch.device("cpu")
LONG = " ".join(sentences(30))

SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}
LIMITS = {
    **dict.fromkeys(("bert", "distilbert", "electra", "albert", "deberta-v2", "gpt2", "opt"), 40),
    **dict.fromkeys(("nystromformer", "roformer", "xlm", "bart"), 40),
    **dict.fromkeys(sorted(AFTER_PADDING - {"esm", "lilt", "markuplm", "xmod"}), 38),
    "markuplm": 39,  # its padding is 0
    **dict.fromkeys(("llama", "nomic_bert", "bloom"), None),
}


@pytest.mark.parametrize("kind", sorted(LIMITS))
def test_a_model_reads_so_many_tokens_and_not_one_more(kind):
    from transformers import AutoConfig, AutoModel

    config = type(AutoConfig.for_model(kind))(**SIZES)
    if kind == "gpt2":  # what it needs none of in a batch of one
        config.bos_token_id = config.eos_token_id = 0
    model = AutoModel.from_config(config).eval()
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    limit = token_limit(config.to_dict(), shapes)
    assert limit == LIMITS[kind]
    assert token_limit(config.to_dict(), shapes, first=first_position(model)) == limit

    def read(tokens):
        with torch.inference_mode():
            ids = torch.full((1, tokens), 7)
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    assert torch.isfinite(read(limit or 60)).all()
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            read(limit + 1)


def as_roberta(folder, *, layers=1, **sizes):
    """A tiny model of BERT's as one of RoBERTa's, which takes no more texts than it has positions for."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import RobertaConfig, RobertaModel

    tiny = make_tiny_model(folder.parent / f"{folder.name}-bert", layers=1)
    body = shutil.copytree(tiny, folder.parent / f"{folder.name}-body")
    said = json.loads((body / "config.json").read_bytes())
    torch.manual_seed(0)
    config = RobertaConfig(
        **SIZES
        | {"vocab_size": said["vocab_size"], "num_hidden_layers": layers, "pad_token_id": 0}
        | sizes
    )
    RobertaModel(config).save_pretrained(body)
    # As on the hub where nobody said it: then sentence-transformers takes all rows of the table.
    path = body / "tokenizer_config.json"
    told = json.loads(path.read_bytes())
    path.write_text(json.dumps({**told, "model_max_length": 10**30}))
    modules = [Transformer(str(body)), Pooling(16, pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    (folder / "sentence_bert_config.json").unlink()
    return folder


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """40 rows of positions, of which a text has 39: padding has the first."""
    return as_roberta(tmp_path_factory.mktemp("models") / "roberta")


def test_what_a_model_reads_by_itself_has_positions(roberta):
    """sentence-transformers took all rows, and read beyond the last of them."""
    assert token_limit_of(roberta, "x") == 39
    model = load_model(roberta, device=CPU)
    assert model.max_seq_length == 39
    assert model.encode([LONG]).shape == (1, 16)
    made = Encoder(roberta, device=CPU).encode_counted([LONG])
    assert (made.tokens, made.truncated) == (39, 1)


def test_a_teacher_is_refused_more_tokens_than_it_reads(roberta):
    assert Encoder(roberta, device=CPU, max_tokens=39).encode_counted([LONG]).tokens == 39
    assert Encoder(roberta, device=CPU, max_tokens=64, or_fewer=True).max_tokens == 39
    with pytest.raises(
        TeachonceError, match=r"embed.max_tokens: 40, but .* reads 39 tokens at most"
    ):
        Encoder(roberta, device=CPU, max_tokens=40)


def test_a_start_says_how_much_it_reads(roberta, tmp_path):
    params = StartParams.model_validate({"from": "x", "layers": None})
    start.run(params, name="s", folder=roberta, trust_remote_code=False, out=tmp_path / "s")
    from sentence_transformers import SentenceTransformer

    assert SentenceTransformer(str(tmp_path / "s")).max_seq_length == 39


def test_a_student_that_reads_less_than_its_teacher_is_measured_all_the_same(roberta, tmp_path):
    """The cure of the refusal was to embed the whole corpus again."""
    from pipeline.workspace import Workspace
    from tests.pipeline.test_dvc import settings

    params = settings(tmp_path, roberta)
    params["embed"] |= {"max_tokens": 60}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    here = Workspace(tmp_path)
    assert here.load_encoder(roberta, is_teacher=False).max_tokens == 39
    with pytest.raises(TeachonceError, match=r"embed.max_tokens: 60, but .* reads 39 tokens"):
        here.load_encoder(roberta, is_teacher=True)
