"""Texts laid end to end give the vectors that sentence-transformers gives, family by family."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.learning.student import Student, encode_ids
from stages.models import packed
from stages.models.encoder import Encoder, PaddedReader, token_batches
from stages.models.loading import load_model, save_model
from stages.models.packed import LengthRun, PackedReader, length_runs
from stages.teaching.interface import ReadsAhead
from tests.conftest import sentences
from tests.models.families import BERT, FAMILIES, Family, make_family, make_tokenizer, table

CPU = torch.device("cpu")
PROMPT = "amber basin: "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_its_own_vectors(family, tokenizer, tmp_path):
    folder = make_family(tmp_path / "m", tokenizer, family)
    texts = [*sentences(40), " ".join(sentences(20)), "x", ""]
    encoder = Encoder(folder, device=CPU, max_tokens=48, batch_tokens=256, prompts={"text": PROMPT})
    assert type(encoder.reader) is FAMILIES[family].reader
    row = table()[family]
    assert row["read"] == ("packed" if encoder.reader.__class__ is PackedReader else "padded")
    own = load_model(folder, device=CPU)
    own.max_seq_length = 48
    expected = own.encode(texts, prompt=PROMPT)
    assert np.allclose(encoder.encode(texts), expected, atol=2e-6)
    assert row["vectors"] == "equal"
    assert len({tuple(np.round(row, 3)) for row in expected}) == len(texts)


@pytest.fixture
def left(tokenizer, tmp_path):
    """A model that reads absolute positions, pools the first token and pads on the left."""
    first_token = replace(FAMILIES["BERT"], pooling="cls")
    folder = make_family(tmp_path / "left", tokenizer, first_token)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"padding_side": "left"}))
    return folder


@pytest.fixture
def conv(tokenizer, tmp_path):
    """A model that convolves over tokens, padding among them, and cannot be packed."""
    settings = {"embedding_size": 32, "conv_kernel_size": 3, "head_ratio": 2, "num_groups": 1}
    return make_family(
        tmp_path / "c", tokenizer, Family("ConvBertModel", "ConvBertConfig", BERT | settings)
    )


@pytest.mark.parametrize(("kind", "reader"), [("left", PackedReader), ("conv", PaddedReader)])
def test_a_texts_vector_is_the_one_it_has_alone(kind, reader, request):
    """Whatever `batch_tokens` puts beside it; sentence-transformers' own batches change it."""
    folder = request.getfixturevalue(kind)
    own = load_model(folder, device=CPU).eval()
    own.max_seq_length = 48
    texts = [*sentences(20), " ".join(sentences(20)), "x"]
    alone = np.concatenate([own.encode([text]) for text in texts])
    assert np.sum(own.encode(texts) * alone, axis=1).min() < 0.995
    for batch_tokens in (64, 2048):
        encoder = Encoder(folder, device=CPU, max_tokens=48, batch_tokens=batch_tokens)
        assert type(encoder.reader) is reader
        assert np.allclose(encoder.encode(texts), alone, atol=2e-6)


def test_a_student_learns_the_vectors_that_texts_have_alone(conv):
    """Random batches would put other padding beside a text at every step."""
    student = Student(
        load_model(conv, device=CPU), teacher_dim=32, unit_length=True, project=False, dropout=False
    ).eval()
    rows = [np.arange(5, 5 + length, dtype=np.int32) for length in (3, 30, 3, 12, 7, 12)]
    options = {"pad_id": 0, "device": CPU, "precision": "fp32", "gradient_caching": False}
    with torch.no_grad():
        batch = encode_ids(student, rows, **options)
        alone = torch.cat([encode_ids(student, [row], **options) for row in rows])
    assert torch.allclose(batch, alone, atol=2e-6)


def test_what_is_saved_pads_on_the_right(left, tmp_path):
    """A student never saw padding on the left, and `encode` is to give the vectors that it learned."""
    model = load_model(left, device=CPU)
    save_model(model, tmp_path / "saved", address="saved")
    saved = load_model(tmp_path / "saved", device=CPU)
    texts = [*sentences(9), " ".join(sentences(20)), "x"]
    alone = np.concatenate([saved.encode([text]) for text in texts])
    assert np.allclose(saved.encode(texts), alone, atol=2e-6)


def test_even_batches_have_one_length():
    lengths = np.random.default_rng(0).integers(1, 9, size=200)
    batches = list(token_batches(lengths, 24, equal_lengths=True))
    assert sorted(np.concatenate(batches)) == list(range(200))
    assert all(len(set(lengths[batch])) == 1 for batch in batches)
    assert all(len(batch) * lengths[batch[0]] <= 24 for batch in batches)


def test_a_model_that_says_something_else_when_packed_is_padded(tokenizer, tmp_path, caplog):
    """Here the positions begin after a padding token that the tokenizer does not know of."""
    family = FAMILIES["RoBERTa"].with_settings(pad_token_id=1)
    folder = make_family(tmp_path / "m", tokenizer, family)
    caplog.set_level(logging.INFO, logger="teachonce")
    encoder = Encoder(folder, device=CPU, max_tokens=16)
    assert type(encoder.reader) is PaddedReader
    assert "texts are padded for this model; without padding: on a probe text the" in caplog.text
    own = load_model(folder, device=CPU)
    own.max_seq_length = 16
    texts = sentences(20)
    assert np.allclose(encoder.encode(texts), own.encode(texts), atol=2e-6)


@pytest.mark.parametrize("family", ["ModernBERT", "MPNet"])
def test_a_student_pads_what_cannot_be_packed(family, tokenizer, tmp_path, caplog):
    reader = FAMILIES[family].reader
    caplog.set_level(logging.INFO, logger="teachonce")
    model = load_model(make_family(tmp_path / "m", tokenizer, family), device=CPU)
    student = Student(model, teacher_dim=32, unit_length=True, project=False, dropout=False)
    assert (student.packed is not None) == (reader is PackedReader)
    assert ("texts are padded for this student" in caplog.text) == (reader is PaddedReader)
    rows = [np.array([2, *range(5, 5 + n), 3], np.int32) for n in (9, 1, 12, 4)]
    vectors = encode_ids(
        student.eval(), rows, pad_id=1, device=CPU, precision="fp32", gradient_caching=False
    ).detach()
    for row, vector in zip(rows, vectors, strict=True):
        ids = torch.from_numpy(row.astype(np.int64))[None]
        assert torch.allclose(student(ids, torch.ones_like(ids))[0], vector, atol=2e-6)


def test_the_model_itself_is_left_as_it_is(tiny_model):
    encoder = Encoder(tiny_model, device=CPU, max_tokens=16)
    texts = sentences(20)
    vectors = encoder.encode(texts)
    assert type(encoder.reader) is PackedReader
    assert np.allclose(encoder.model.encode(texts), vectors, atol=2e-6)


def test_runs_are_neighbours_of_one_length():
    assert length_runs([5, 5, 3, 5]) == [LengthRun(2, 5), LengthRun(1, 3), LengthRun(1, 5)]
    assert [run.tokens for run in length_runs([5, 5, 3, 5])] == [10, 3, 5]
    assert length_runs([]) == []


def test_tokens_are_counted_before_and_after_cutting(tiny_model):
    encoder = Encoder(tiny_model, device=CPU, max_tokens=12, prompts={"text": PROMPT})
    texts = sentences(100)
    assert type(encoder.reader) is PackedReader
    lengths = [len(encoder.model.tokenizer(PROMPT + text)["input_ids"]) for text in texts]
    assert encoder.reader.read(texts, PROMPT).lengths.tolist() == lengths
    made = encoder.encode_counted(texts)
    assert made.tokens == sum(min(length, 12) for length in lengths)
    assert made.truncated == sum(length > 12 for length in lengths) > 0


def test_a_packed_teacher_reads_ahead_and_its_two_steps_are_the_one(tiny_model):
    encoder = Encoder(tiny_model, device=CPU, max_tokens=12, in_windows=True)
    teacher = encoder.as_teacher()
    assert isinstance(teacher, ReadsAhead)
    first, second = sentences(60), sentences(60, seed=1)
    expected = [encoder.encode_counted(texts) for texts in (first, second)]
    read = [teacher.read(first), teacher.read(second)]
    for found, wanted in zip(
        [*map(teacher.encode_read, read), teacher(first)], [*expected, expected[0]], strict=True
    ):
        assert np.array_equal(found.vectors, wanted.vectors)
        assert (found.tokens, found.truncated) == (wanted.tokens, wanted.truncated)
    # Padded, a model needs its tokenizer for every batch, and two threads must not share that.
    encoder.reader = PaddedReader(encoder.model)
    assert not isinstance(encoder.as_teacher(), ReadsAhead)


def test_gradients_flow_through_the_packed_model(tiny_model):
    """Weights learn the same from texts laid end to end as from a padded batch."""
    texts = sentences(9)
    encoder = Encoder(tiny_model, device=CPU, max_tokens=16)
    packed = encoder.reader.read(texts, "")
    places = np.argsort(-packed.lengths, kind="stable")
    packed.forward(places)[:, 0].sum().backward()
    own = load_model(tiny_model, device=CPU).eval()
    own(own.preprocess([texts[place] for place in places]))["sentence_embedding"][
        :, 0
    ].sum().backward()
    for mine, theirs in zip(encoder.model.parameters(), own.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)


@pytest.mark.parametrize("prompt_tokens", [0, 2])
def test_filling_up_changes_neither_vectors_nor_gradients(
    prompt_tokens, tokenizer, tmp_path, monkeypatch
):
    """In bfloat16 with gradients, where oneDNN keeps code for each size that it has multiplied."""
    model = load_model(make_family(tmp_path / "m", tokenizer, FAMILIES["BERT"]), device=CPU)
    model.train(False)
    reader, body = PackedReader(model), model[0].auto_model
    ids = [np.arange(5, 5 + length, dtype=np.int32) for length in (9, 9, 4, 13)]
    lengths = []
    body.embeddings.register_forward_hook(lambda _, __, out: lengths.append(out.shape[1]))

    def read(filled_to):
        monkeypatch.setattr(packed, "FILLED_TO", filled_to)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            vectors = reader(ids, np.arange(4), prompt_tokens)
        (vectors.float() * torch.arange(vectors.numel()).view(vectors.shape)).sum().backward()
        return vectors.detach().float(), [weight.grad for weight in body.parameters()]

    plain, filled = read(1), read(64)
    assert lengths == [35, 64]
    assert torch.allclose(plain[0], filled[0], rtol=0, atol=1e-2)
    assert plain[0].abs().max() > 0.1
    for ours, theirs in zip(filled[1], plain[1], strict=True):
        if theirs is not None:
            assert float((ours - theirs).norm()) <= 0.02 * float(theirs.norm()) + 1e-6
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        reader(ids, np.arange(4))
    reader(ids, np.arange(4))
    assert lengths == [35, 64, 35, 35]
