"""Static models: what their table begins with, how they learn, and what other programs read of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from stages import export, start
from stages.learning.student import Student, encode_ids
from stages.learning.token_rows import token_ids, token_rows
from stages.models.abilities import check_static_of
from stages.models.encoder import Encoder
from stages.models.lineage import read_lineage
from stages.models.loading import load_model, save_model
from stages.models.static import FREQUENCY, make_static, static_model
from stages.models.token_counts import token_counts
from stages.models.vocabulary import keep_tokens
from stages.params import StartParams, VocabularyShare
from storage.errors import TeachonceError
from tests.conftest import WORDS, exporting, sentences
from tests.stages.test_distill import CPU, World, power_cut, recipe
from tests.stages.test_finetune import settings

STATIC = {"from": "teacher", "layers": None, "kind": "static", "hidden": 12}


@pytest.fixture(scope="module")
def counts(tiny_model):
    """Of a corpus in which no two words are equally frequent."""
    size = len(AutoTokenizer.from_pretrained(tiny_model))
    return np.random.default_rng(5).permutation(size) ** 2


def made_of(tiny_model, counts, width):
    model = load_model(tiny_model, device=CPU)
    return static_model(model, counts, width=width, address="starts.bag")


def words_of_one_token(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return [word for word in WORDS if len(tokenizer.tokenize(word)) == 1]


def test_the_table_has_the_teachers_vector_of_each_token_alone(tiny_model, counts):
    """By the definition, with as many components as there are values, so that none is lost."""
    model = made_of(tiny_model, counts, 32)
    table, back = model[0].embedding.weight.detach(), model[1].linear.weight.detach()
    tokenizer, words = AutoTokenizer.from_pretrained(tiny_model), words_of_one_token(tiny_model)
    assert len(words) > 20
    teacher = Encoder(tiny_model, device=CPU)
    every = table @ back.T  # token -> weight * (vector - mean)
    shares = (counts + 1) / (counts + 1).sum()
    alone = teacher.encode(words)
    ids = [tokenizer.convert_tokens_to_ids(word) for word in words]
    weights = FREQUENCY / (FREQUENCY + shares[ids])
    plain = every[ids].numpy() / weights[:, None]
    # All are off by the same mean.
    np.testing.assert_allclose(plain - plain[0], alone - alone[0], atol=2e-5)
    assert weights.max() / weights.min() > 3


def test_components_are_those_that_lose_least(tiny_model, counts):
    whole, cut = made_of(tiny_model, counts, 32), made_of(tiny_model, counts, 12)
    back = cut[1].linear.weight.detach()
    assert torch.allclose(back.T @ back, torch.eye(12), atol=1e-5)
    shares = (counts + 1) / (counts + 1).sum()
    weights = torch.from_numpy(FREQUENCY / (FREQUENCY + shares)).float()[:, None]
    centred = whole[0].embedding.weight.detach() @ whole[1].linear.weight.detach().T / weights
    kept = cut[0].embedding.weight.detach() @ back.T / weights
    values = torch.linalg.svdvals(centred.double())
    lost = float(((centred - kept) ** 2).sum())
    assert lost == pytest.approx(float((values[12:] ** 2).sum()), rel=1e-3)
    again = made_of(tiny_model, counts, 12)
    assert torch.equal(again[0].embedding.weight, cut[0].embedding.weight)


def test_what_no_static_model_can_be_made_of_is_refused(place, tiny_model, counts):
    """Before a text is read."""
    corpus, model = place.corpus(sentences(30)), load_model(tiny_model, device=CPU)
    with pytest.raises(TeachonceError) as error:
        make_static(model, corpus, width=33, address="starts.bag")
    assert str(error.value) == (
        "starts.bag.hidden: 33, but the model's vectors have 32 values\n  cure: set it to 32 or less"
    )
    static = made_of(tiny_model, counts, 12)
    with pytest.raises(TeachonceError, match=r"has no tokenizer\.json"):
        make_static(static, corpus, width=4, address="starts.bag")


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"hidden": None}, "kind: static wants hidden"),
        ({"intermediate": 8}, "take intermediate and heads away"),
        ({"heads": 2}, "take intermediate and heads away"),
        ({"layers": [0]}, "a static model has no layers"),
        ({"passes": 2}, "a static model has no layers"),
        ({"hidden": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        StartParams.model_validate(STATIC | changes)


def test_check_says_it_before_anything_is_computed(tiny_model, tmp_path, world):
    check_static_of(tiny_model, 32, address="starts.bag")
    with pytest.raises(TeachonceError) as error:
        check_static_of(tiny_model, 33, address="starts.bag")
    assert str(error.value) == (
        "starts.bag.hidden: 33, but the model's vectors have 32 values\n  cure: set it to 32 or less"
    )
    with pytest.raises(TeachonceError, match=r"made of a transformer, and .* a StaticEmbedding"):
        check_static_of(world.start, 8, address="starts.bag")
    slow = tmp_path / "slow"
    shutil.copytree(tiny_model, slow)
    (slow / "tokenizer.json").rename(slow / "vocab.txt")
    with pytest.raises(TeachonceError, match=r"no tokenizer\.json\n  cure: name a model with one"):
        check_static_of(slow, 8, address="starts.bag")


def test_counts_are_those_of_each_text_without_special_tokens(place, tiny_model):
    texts = [*sentences(90), "東京 amber, amber!", "violin " * 90]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    wanted = np.zeros(len(tokenizer), np.int64)
    for text in texts:
        for number in tokenizer(text, add_special_tokens=False)["input_ids"]:
            wanted[number] += 1
    found = token_counts(tokenizer, place.corpus(texts))
    assert found.tolist() == wanted.tolist()
    assert found[tokenizer.unk_token_id] > 0 and wanted.max() > 90


# -------------------------------------------------------------------------------------------- learning


@pytest.fixture
def world(place, tiny_model, tmp_path):
    out = tmp_path / "bag"
    made = World(place, tiny_model, out)
    params = StartParams.model_validate(STATIC)
    outcome = start.run(
        params,
        name="bag",
        folder=tiny_model,
        trust_remote_code=False,
        out=out,
        corpus=lambda: made.corpus,
    )
    assert outcome.summary.startswith("a table of 12 values for each token of teacher, 0.0 million")
    return made


def test_a_start_is_of_the_corpus_it_is_given(world, tiny_model, tmp_path):
    model = SentenceTransformer(str(world.start), device="cpu")
    assert [type(module).__name__ for module in model] == ["StaticEmbedding", "Dense", "Normalize"]
    own = token_counts(AutoTokenizer.from_pretrained(tiny_model), world.corpus)
    wanted = made_of(tiny_model, own, 12)
    assert torch.equal(model[0].embedding.weight, wanted[0].embedding.weight)


def test_a_static_start_with_fewer_tokens_is_the_table_of_those(world, tiny_model, tmp_path):
    outcome = start.run(
        StartParams.model_validate(STATIC | {"vocabulary": {"keep": 0.8}}),
        name="bag",
        folder=tiny_model,
        trust_remote_code=False,
        out=tmp_path / "few",
        corpus=lambda: world.corpus,
    )
    whole = SentenceTransformer(str(world.start), device="cpu")
    few = SentenceTransformer(str(tmp_path / "few"), device="cpu")
    kept, there = (len(model.tokenizer.get_vocab()) for model in (few, whole))
    assert few[0].embedding.weight.shape == (kept, 12)
    assert (outcome.facts["tokens"], outcome.facts["tokens_before"]) == (kept, there)
    assert 0.8 <= outcome.facts["corpus_tokens_kept"] < 1
    assert f"for each token of teacher, {kept} of {there} tokens (" in outcome.summary
    # Each has the vector that a transformer of these tokens gives it alone.
    cut = load_model(tiny_model, device=torch.device("cpu"))
    keep_tokens(cut, VocabularyShare(keep=0.8), corpus=world.corpus, address="starts.bag")
    wanted = static_model(cut, token_counts(cut.tokenizer, world.corpus), width=12, address="")
    assert torch.equal(few[0].embedding.weight, wanted[0].embedding.weight)
    known = {*few.tokenizer.get_vocab()}
    assert {*few.tokenizer.encode("amber basin").tokens} <= known


def test_a_static_student_reads_as_its_saved_folder_does(world):
    model = load_model(world.start, device=CPU)
    student = Student(model, teacher_dim=32, unit_length=True, project=False, dropout=False)
    texts = [*sentences(40, seed=3), "", "???"]
    ids = [np.array(row, np.int32) for row in token_ids(model.tokenizer, texts, max_tokens=None)]
    how = {"pad_id": 0, "device": CPU, "precision": "fp32"}
    plain = encode_ids(student, ids, gradient_caching=False, **how)
    cached = encode_ids(student, ids, gradient_caching=True, **how)
    assert torch.equal(plain, cached)
    read = SentenceTransformer(str(world.start), device="cpu").encode(texts)
    np.testing.assert_allclose(plain.detach().numpy(), read, atol=1e-6)
    assert not read[-2].any()


def test_a_static_student_learns_is_saved_and_exported(world, tmp_path):
    world.train(recipe(epochs=12, learning_rate=0.01))
    scores = [row["agreement"] for row in world.tracked]
    assert scores[0] > 0.4 and max(scores) > scores[0] + 0.05
    folder = world.place.root / "student"
    texts = ["Amber harbor, silver lantern.", "violin " * 99, "unknown xyzzy", ""]
    own = Encoder(folder, device=CPU).encode(texts)
    how = {"lineage": read_lineage(folder), "metrics": {}, "facts": {}}
    export.run(folder=folder, **how, **exporting(tmp_path / "out"))
    exported = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(exported.encode(texts), own, atol=1e-6)
    modules = json.loads((tmp_path / "out/modules.json").read_text())
    assert modules[0]["type"] == "sentence_transformers.models.StaticEmbedding"
    assert modules[0]["path"] == "0_StaticEmbedding"  # version 3.4 reads it nowhere else
    with pytest.raises(TeachonceError, match="a static model has no ONNX form"):
        from stages.models.onnx import write_onnx

        write_onnx(exported, tmp_path / "model.onnx", address="x")


def test_a_killed_static_run_ends_with_the_same_weights(world):
    world.train(recipe(), "whole")
    with power_cut(after=13):
        world.train(recipe(), "killed")
    world.train(recipe(), "killed")
    assert world.weights("killed") == world.weights("whole")


def test_token_ids_of_two_static_tokenizers_are_apart_in_the_store(world, tiny_model, tmp_path):
    """Their folders may hold the same names of files, or none at all."""
    first = load_model(world.start, device=CPU)
    core = json.loads(first.tokenizer.to_str())
    core["normalizer"] = {"type": "Lowercase"}
    second = type(first.tokenizer).from_str(json.dumps(core))
    how = {"corpus": world.corpus, "store": world.place.store, "max_tokens": 5}
    empty = tmp_path / "empty"
    empty.mkdir()
    ours, theirs = (token_rows(one, empty, **how) for one in (first.tokenizer, second))
    assert {entry.key for entry in ours.objects}.isdisjoint({entry.key for entry in theirs.objects})
    texts = world.corpus.take(np.arange(30))
    for row, text in zip(ours.rows_of(np.arange(30)), texts, strict=True):
        assert row.tolist() == first.tokenizer.encode(text, add_special_tokens=False).ids[:5]
    # A transformer with that very tokenizer reads special tokens, too.
    whole = load_model(tiny_model, device=CPU)
    read = token_rows(whole.tokenizer, tiny_model, **how)
    assert read.rows_of(np.arange(1))[0].tolist() != ours.rows_of(np.arange(1))[0].tolist()


def test_a_static_student_is_finetuned(world, tmp_path):
    from stages import finetune

    rows = sentences(200, seed=9)
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"anchor": text, "positive": " ".join(text.split()[:3])}) + "\n"
            for text in rows
        )
    )
    world.train(recipe())
    tracked, root = [], world.place.root
    outcome = finetune.run(
        settings(learning_rate=0.02),
        name="tuned",
        student=root / "student",
        root=tmp_path,
        evaluation=set(),
        caches=None,
        device=CPU,
        work=root / "work",
        out=root / "tuned",
        curve=root / "tuned.csv",
        training=root / "tuned.json",
        track=tracked.append,
    )
    assert outcome.facts["steps"] > 10
    assert tracked[-1]["dev"] > tracked[0]["dev"]
    before, after = (Encoder(root / name, device=CPU) for name in ("student", "tuned"))
    assert not np.allclose(before.encode(rows[:3]), after.encode(rows[:3]))


def test_a_saved_table_is_a_start_and_a_teacher_of_its_own(world, tmp_path):
    """Any StaticEmbedding is a start as it is, without `kind`."""
    model = load_model(world.start, device=CPU)
    folder = tmp_path / "words"
    save_model(model, folder, address="x")
    params = StartParams.model_validate({"from": str(folder), "layers": None})
    start.run(
        params, name="as_it_is", folder=folder, trust_remote_code=False, out=tmp_path / "again"
    )
    world.start = tmp_path / "again"
    world.train(recipe(epochs=1))
    assert world.tracked[0]["agreement"] > 0.4
