"""A corpus of queries and documents: shard, split, embed and mine, and what is made anew when."""

import json

import numpy as np
import pytest
import torch

from stages import embed, mine, shard, split
from stages.params import ShardParams
from storage.corpus import Corpus, text_key
from storage.embeddings import Embeddings, fingerprints
from storage.errors import TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.negatives import NONE, Negatives, parent_of
from storage.probe import probe_key
from tests.conftest import HashTeacher, embed_params, is_probe, prompts, sentences
from tests.faults.samples import mine_params, split_of

QUERIES, DOCUMENTS, PLAIN = sentences(60, seed=1), sentences(150, seed=2), sentences(40, seed=3)
FILES = {"model.safetensors": "0" * 64}


class ByRole(HashTeacher):
    """Its vector of a text depends on the role; remembers the roles it was asked for."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.asked = []

    def __call__(self, texts, role="text"):
        self.asked += [] if is_probe(texts) else [role] * len(texts)
        return super().__call__([f"{role}: {text}" for text in texts], role)


def source(place, name, texts, **said):
    (place.root / name).write_text("\n".join(json.dumps({"t": one, "u": one}) for one in texts))
    return {"files": name, **said}


def sharded(place, sources):
    params = ShardParams(sources=sources, field="t", rows_per_shard=16, min_chars=3, max_chars=500)
    out = place.root / "corpus.json"
    shard.run(params, root=place.root, store=place.store, out=out, facts=place.root / "facts.json")
    return Corpus(place.store, Manifest.load(out, "corpus")), params


@pytest.fixture
def corpus(place):
    sources = [
        source(place, "d.jsonl", DOCUMENTS, role="document", field="u"),
        source(place, "q.jsonl", [*QUERIES, QUERIES[0]], role="query"),
        source(place, "p.jsonl", PLAIN)["files"],
    ]
    return sharded(place, sources)[0]


def rows_of(corpus, role):
    at = [np.arange(*corpus.starts[s : s + 2]) for s in shards_of(corpus, role)]
    return np.concatenate(at)


def shards_of(corpus, role):
    return [s for s in range(len(corpus.objects)) if corpus.role_of(s) == role]


def test_shards_are_cut_by_role_texts_first_then_queries_then_documents(place, corpus):
    assert corpus.roles == ("text", "query", "document")
    assert corpus.take(np.arange(250)) == [*PLAIN, *QUERIES, *DOCUMENTS]
    assert json.loads((place.root / "facts.json").read_text())["rejected"]["duplicate"] == 1
    for role, texts in (("text", PLAIN), ("query", QUERIES), ("document", DOCUMENTS)):
        keys = corpus.text_keys[rows_of(corpus, role)]
        assert [key.tobytes() for key in keys] == [text_key(text, role) for text in texts]
        assert len(shards_of(corpus, role)) > 1


def test_the_shards_of_one_role_stay_when_another_is_added_or_grows(place, corpus):
    alone, _ = sharded(place, ["p.jsonl"])
    assert alone.objects == corpus.objects[: len(alone.objects)]
    with_queries, _ = sharded(
        place, ["p.jsonl", source(place, "more.jsonl", QUERIES, role="query")]
    )
    assert with_queries.objects == corpus.objects[: len(with_queries.objects)]
    # The role `text` in words is that of a plain glob.
    in_words, _ = sharded(place, [source(place, "p.jsonl", PLAIN, role="text")])
    assert in_words.manifest == alone.manifest


def test_the_same_text_as_query_and_as_document_is_two_rows(place):
    both = [source(place, f"{role}.jsonl", PLAIN, role=role) for role in ("query", "document")]
    corpus, params = sharded(place, both)
    assert corpus.rows == 80 and len(set(corpus.text_keys.tolist())) == 80
    lost = [corpus.objects[0].key, corpus.objects[-1].key]
    for key in lost:
        place.store.path(key).unlink()
    assert shard.make_again(params, root=place.root, store=place.store, keys=lost) == []
    assert [place.store.find(key) for key in lost] == [corpus.objects[0], corpus.objects[-1]]


def test_a_text_of_an_evaluation_set_is_found_in_whatever_role(place, corpus):
    params = split.SplitParams(heldout=0.1)
    asked = [PLAIN[3], QUERIES[5], DOCUMENTS[7]]
    out, facts = place.root / "split.json", place.root / "split-facts.json"
    split.run(params, corpus=corpus, evaluation=asked, out=out, facts=facts)
    assert json.loads(out.read_text())["evaluation"] == [3, 45, 107]


def test_each_role_has_its_prompt_and_only_its_shards_are_made_anew_for_another(place, corpus):
    before = embed_params(prompts=prompts("", "query: ", "passage: "))
    teacher = ByRole()
    place.embed(corpus, teacher, params=before)
    assert {role: teacher.asked.count(role) for role in set(teacher.asked)} == {
        "text": 40,
        "query": 60,
        "document": 150,
    }
    recipe = place.embeddings.recipe
    assert "prompt" not in recipe
    assert recipe["prompts"] == {"text": "", "query": "query: ", "document": "passage: "}
    names = fingerprints(recipe)
    assert all(place.store.find(probe_key(name)) for name in names.values())
    # That of a corpus without roles.
    assert names["text"] == fingerprint(embed.recipe(embed_params(), FILES))
    first = place.embeddings
    vectors = Embeddings(place.store, first, corpus).rows_of(np.arange(250))
    expected = [
        teacher.vector(f"{role}: {text}")
        for role, texts in (("text", PLAIN), ("query", QUERIES), ("document", DOCUMENTS))
        for text in texts
    ]
    assert np.array_equal(vectors, np.stack(expected))

    other = ByRole(scale=2.0)
    place.embed(corpus, other, params=embed_params(prompts=prompts("", "find: ", "passage: ")))
    assert set(other.asked) == {"query"} and len(other.asked) == 60
    again = Embeddings(place.store, place.embeddings, corpus).rows_of(np.arange(250))
    changed = np.flatnonzero((again != vectors).any(axis=1))
    assert np.array_equal(changed, rows_of(corpus, "query"))

    back = ByRole()
    place.embed(corpus, back, params=before)
    assert back.asked == [] and place.embeddings == first


def test_a_text_in_an_older_shard_is_taken_in_its_own_role_alone(place, corpus):
    params = embed_params(prompts=prompts("", "", ""))
    place.embed(corpus, ByRole(), params=params)
    swapped = [
        source(place, "q2.jsonl", [*DOCUMENTS[:20], *QUERIES[:20]], role="query"),
    ]
    grown, _ = sharded(place, swapped)
    teacher = ByRole()
    place.embed(grown, teacher, params=params)
    assert teacher.asked == ["query"] * 20


def mined(place, corpus, **settings):
    params = mine_params(**{"max_score": 1.0, "neighbours": 5, "range_max": 12} | settings)
    embeddings = Embeddings(place.store, place.embeddings, corpus)
    out, chosen = place.root / "negatives.json", split_of(corpus)
    mine.run(
        params,
        corpus=corpus,
        embeddings=embeddings,
        split=chosen,
        store=place.store,
        device=torch.device("cpu"),
        out=out,
        facts=place.root / "mine-facts.json",
    )
    parent = parent_of(embeddings.manifest, chosen)
    found = Negatives(place.store, Manifest.load(out, "negatives"), corpus, mined_from=parent)
    return found.rows_of(np.arange(corpus.rows)), embeddings, chosen.train_rows(corpus)


@pytest.mark.parametrize(
    "among",
    [
        {"text": "text", "query": "document", "document": "document"},
        {"text": "query", "query": "query", "document": "text"},
    ],
)
def test_rows_of_a_role_find_rows_of_the_role_that_mine_among_says(place, corpus, among):
    place.embed(corpus, ByRole())
    (ids, scores), embeddings, train = mined(place, corpus, among=among)
    vectors = embeddings.rows_of(np.arange(corpus.rows))
    for role in corpus.roles:
        pool = np.intersect1d(rows_of(corpus, among[role]), train)
        for row in rows_of(corpus, role):
            if row not in train:
                assert (ids[row] == NONE).all()
                continue
            others = pool[pool != row]
            cosines = vectors[others] @ vectors[row]
            best = others[np.argsort(-cosines, kind="stable")[:5]]
            assert ids[row].tolist() == best.tolist()
            assert np.allclose(scores[row], np.sort(cosines)[::-1][:5], atol=1e-6)


def test_rows_that_find_a_role_of_which_there_is_none_are_refused(place):
    corpus, _ = sharded(place, [source(place, "q.jsonl", QUERIES, role="query")])
    place.embed(corpus, ByRole())
    with pytest.raises(
        TeachonceError, match=r"mine\.among\.query: document, but the corpus has no"
    ):
        mined(place, corpus)


def test_lists_of_a_corpus_without_roles_have_the_recipe_of_before(place):
    assert "among" not in mine.recipe(mine_params())
    other = {"text": "text", "query": "query", "document": "document"}
    assert mine.recipe(mine_params(among=other))["among"] == other
