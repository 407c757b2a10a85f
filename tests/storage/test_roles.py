"""A row is a text in a role: keys, shards, manifests and fingerprints; without roles nothing moves."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

from storage.corpus import Corpus, cut, key_of_texts, put_texts, text_digest, text_key
from storage.embeddings import Embeddings, fingerprints, prompts_of, put_vectors
from storage.errors import DamagedError
from storage.manifest import Manifest, fingerprint
from storage.roles import ROLES
from storage.store import HEADER, Store
from storage.tokens import Tokens
from storage.upkeep.examination import examine

KEY = "572b993ce8768156883ede034944069e"
DIGEST = "fc360e6c35e9ee38f9c8752b3c4af01dfe6412dd"
SHA256 = "fe1f8cfc89c23f8d04b780af6dff35f8b2bf8a06bd7f90bbf280a690cac717b7"
OBJECT_SHA256 = "a368fe2fa86adf53a179b5f3c0b2edeaba2aaac38b383643a33d45773f5ae6fb"
"""Of the release before there were roles: a text's key, a shard's digest, its payload and its file."""

TEXTS = ["An amber basin.", "A cedar delta."]
RECIPE = {"prompts": {"query": "query: ", "document": ""}, "storage": "float32"}


def shard_of(store, role, texts=TEXTS):
    return put_texts(store, [(text, text_key(text, role)) for text in texts], role)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def corpus(store):
    objects = tuple(shard_of(store, role) for role in ("query", "document"))
    return Corpus(store, Manifest(kind="corpus", recipe={}, parent=None, objects=objects))


def vectors_of(corpus, names):
    objects = []
    for shard, entry in enumerate(corpus.objects):
        key = f"vectors/{names[shard]}/{corpus.shard_digest(shard)}.arrow"
        vectors = np.full((entry.rows, 4), shard + 1, np.float32)
        keys = corpus.text_keys_in([shard])
        objects.append(
            put_vectors(
                corpus.store, key, vectors=vectors, text_keys=keys, storage="float32", facts={}
            )
        )
    parent = corpus.manifest.content
    return Manifest(kind="embeddings", recipe=RECIPE, parent=parent, objects=tuple(objects))


def test_names_of_texts_without_a_role_are_those_of_before_there_were_roles(store):
    """Of the previous release; every cache that exists is named by them."""
    assert text_key("An amber basin.").hex() == KEY
    assert text_digest(TEXTS) == DIGEST
    entry = shard_of(store, "text")
    assert (entry.key, entry.sha256) == (f"text/{DIGEST}.arrow", SHA256)
    file = store.path(entry.key).read_bytes()
    # Another version of Arrow may lay out the same values differently.
    assert pa.__version__ != "26.0.1" or hashlib.sha256(file).hexdigest() == OBJECT_SHA256
    manifest = Manifest(kind="corpus", recipe={"a": 1}, parent=None, objects=(entry,))
    assert "role" not in json.loads(manifest.encoded)["objects"][0]
    header = json.loads(store.glance(entry.key).schema.metadata[HEADER])
    assert list(header) == ["format", "key", "rows", "facts", "sha256"]


def test_a_text_is_another_row_in_each_role(store):
    assert len({text_key(TEXTS[0], role) for role in ROLES}) == 3
    assert len({text_digest(TEXTS, role) for role in ROLES}) == 3
    # No text of the role `text` spells another role's.
    assert text_digest(["query", *TEXTS]) != text_digest(TEXTS, "query")
    entries = {role: shard_of(store, role) for role in ROLES}
    assert {role: entry.role for role, entry in entries.items()} == {role: role for role in ROLES}
    assert len({entry.key for entry in entries.values()}) == 3
    for role, entry in entries.items():
        assert store.find(entry.key) == entry
        assert store.header(entry.key)[0].role == role
        assert key_of_texts([(text, b"") for text in TEXTS], role) == entry.key
    (shard,) = cut(TEXTS, 16, "query")
    assert shard == [(text, text_key(text, "query")) for text in TEXTS]


def test_a_manifest_says_the_role_of_each_shard_and_is_read_back(corpus, tmp_path):
    assert (corpus.roles, corpus.role_of(0), corpus.role_of(1)) == (
        ("query", "document"),
        "query",
        "document",
    )
    path = tmp_path / "corpus.json"
    corpus.manifest.save(path, corpus.store)
    assert [one["role"] for one in json.loads(path.read_bytes())["objects"]] == [
        "query",
        "document",
    ]
    assert Manifest.load(path, "corpus") == corpus.manifest
    # The role `text` is written nowhere, so saying it is no manifest of ours.
    path.write_bytes(path.read_bytes().replace(b'"query"', b'"text"'))
    with pytest.raises(DamagedError, match="not in canonical form"):
        Manifest.load(path, "corpus")


def test_a_shard_of_another_role_than_its_manifest_says_is_refused(corpus):
    query, document = corpus.objects
    wrong = query.model_copy(update={"role": "document"})
    manifest = corpus.manifest.model_copy(update={"objects": (wrong, document)})
    with pytest.raises(DamagedError, match="document is its role there, query in the object"):
        Corpus(corpus.store, manifest).texts(0)
    found = examine(corpus.store, query.key, wrong, read=False)
    assert found.said == "of role query there, document in the manifest"
    assert examine(corpus.store, query.key, query, read=True) is None


def test_the_role_in_an_object_is_proved(corpus):
    entry = corpus.objects[0]
    path = corpus.store.path(entry.key)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"role":"query"', b'"role":"text" '))
    with pytest.raises(DamagedError, match="sha256 differs"):
        Store(corpus.store.root).find(entry.key)


def test_a_fingerprint_holds_the_prompt_of_its_role_alone(corpus):
    names = fingerprints(RECIPE)
    assert list(names) == ["query", "document"]
    other = fingerprints(RECIPE | {"prompts": {"query": "find: ", "document": ""}})
    assert names["document"] == other["document"] and names["query"] != other["query"]
    # A role is a route through some models, so one prompt does not make two roles one.
    alike = fingerprints(RECIPE | {"prompts": dict.fromkeys(ROLES, "")})
    assert len(set(alike.values())) == 3
    # Texts without a role have the vectors of a corpus without roles.
    assert alike["text"] == fingerprint({"prompt": "", "storage": "float32"})
    plain = {"prompt": "", "storage": "float32"}
    assert fingerprints(plain, ["text"]) == {"text": fingerprint(plain)}


def test_vectors_are_read_by_the_fingerprint_of_their_role(corpus):
    names = fingerprints(RECIPE, corpus.roles)
    embeddings = Embeddings(
        corpus.store, vectors_of(corpus, [names["query"], names["document"]]), corpus
    )
    assert embeddings.rows_of(np.arange(4))[:, 0].tolist() == [1, 1, 2, 2]
    swapped = vectors_of(corpus, [names["document"], names["query"]])
    with pytest.raises(DamagedError, match="its recipe has the fingerprint"):
        Embeddings(corpus.store, swapped, corpus)


def test_what_the_teacher_read_before_texts_of_a_role_stands_in_the_recipe():
    assert prompts_of(RECIPE) == {"query": "query: ", "document": ""}
    assert prompts_of({"prompt": "clue: "}) == {"text": "clue: "}
    assert prompts_of({}) == {"text": ""}


def test_rows_know_their_roles(corpus):
    assert corpus.roles_of(np.array([2, 0, 1, 3, 2])) == [
        *("document", "query", "query"),
        *("document", "document"),
    ]
    assert corpus.roles_of(np.empty(0, np.int64)) == []


def test_token_ids_know_how_many_of_them_are_the_prompt(corpus):
    tokens = Tokens(corpus.store, corpus.objects, corpus, {"query": 3})
    assert tokens.prompt_tokens(np.array([3, 1, 0])).tolist() == [0, 3, 3]
    plain = Tokens(corpus.store, corpus.objects, corpus)
    assert plain.prompt_tokens(np.arange(4)).tolist() == [0] * 4
