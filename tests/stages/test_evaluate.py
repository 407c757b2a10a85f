"""Evaluation: files read or refused, formulas beside their slow forms, and a model measured end to end."""

import gzip
import hashlib
import json
import logging
import math
import re
import subprocess
from itertools import combinations

import numpy as np
import pytest
import zstandard

from stages import evaluate, vectors
from stages.measuring.documents import read_documents, write_documents
from stages.measuring.index import TYPES
from stages.measuring.metrics import retrieval_scores
from stages.models.speed import Speed
from stages.params import EvaluateParams
from stages.reading.evaluation_sets import (
    RetrievalSet,
    beir_files,
    beir_folder,
    evaluation_texts,
    read_beir,
    read_sts,
    sts_files,
)
from stages.vectors import evenly, rank_agreement, spearman, top_overlaps
from storage.corpus import Corpus, cut, put_texts, shard_digest
from storage.embeddings import Embeddings, put_vectors
from storage.errors import DamagedError, TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.split import Split
from storage.store import Store
from tests.conftest import Made, sentences

STS_CURE = "write each line as score, tab, sentence, tab, sentence, and no header line"
JSON_CURE = "write one JSON object a line, with a string under each of _id and text"
QRELS_CURE = "write a header line, then each line as query id, tab, document id, tab, whole number"


def hashed(text, dim=16):
    """A vector that depends on the text alone."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


class HashEncoder:
    """A model whose vectors depend on nothing but the text; it remembers what it was asked."""

    parameters, copied_parameters, megabytes, in_windows = 1234, 0, 5.67891, False

    def __init__(self):
        self.asked = []

    def encode(self, texts, *, role):
        self.asked.append((role, list(texts)))
        return np.array([hashed(text) for text in texts])

    def encode_counted(self, texts, *, role):
        vectors = self.encode(texts, role=role)
        return Made(vectors, tokens=0, truncated=sum(len(text) > 20 for text in texts))

    def speed(self, texts):
        self.asked.append(("speed", list(texts)))
        return Speed(texts_per_second=213.456, texts_per_reference=9.87654, device="abacus")


class BrokenEncoder(HashEncoder):
    """A model that has seen a learning rate too large: it knows no vector for one text."""

    def __init__(self, unknown):
        super().__init__()
        self.unknown = unknown

    def encode(self, texts, *, role):
        vectors = super().encode(texts, role=role)
        vectors[[text == self.unknown for text in texts], 3] = np.nan
        return vectors


def write_beir(folder, *, corpus, queries, qrels, qrels_file="qrels.tsv"):
    (folder / qrels_file).parent.mkdir(parents=True, exist_ok=True)
    for file, lines in (("corpus.jsonl", corpus), ("queries.jsonl", queries)):
        text = "".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines)
        (folder / file).write_text(text)
    (folder / qrels_file).write_text("".join(f"{line}\n" for line in qrels))
    return folder


@pytest.fixture
def beir(tmp_path):
    """Two documents, three queries; the last has no relevant document."""
    return write_beir(
        tmp_path / "docs",
        corpus=[
            {"_id": "d1", "title": "Join", "text": "puts strings together"},
            {"_id": "d0", "title": "", "text": "cuts a string"},
        ],
        queries=[
            {"_id": "q1", "text": "how to split"},
            {"_id": "q0", "text": "how to join"},
            {"_id": "q2", "text": "how to fly"},
        ],
        qrels=["query-id\tcorpus-id\tscore", "q0\td1\t2", "q1\td0\t1", "q1\td1\t0", "q2\td1\t0"],
    )


@pytest.fixture
def corpus(tmp_path):
    store = Store(tmp_path / "store")
    texts = [f"Sentence number {i} is about {i * 7 % 13}." for i in range(120)]
    objects = [put_texts(store, shard) for shard in cut(texts, rows_per_shard=32)]
    return Corpus(store, Manifest(kind="corpus", recipe={}, parent=None, objects=objects))


@pytest.fixture
def embeddings(corpus):
    """The vectors of a teacher that is `HashEncoder`."""
    objects = [
        put_vectors(
            corpus.store,
            f"vectors/{fingerprint({})}/{shard_digest(entry)}.arrow",
            vectors=np.array([hashed(text) for text in corpus.texts(shard)]),
            text_keys=corpus.text_keys[corpus.starts[shard] : corpus.starts[shard + 1]],
            storage="float32",
            facts={},
        )
        for shard, entry in enumerate(corpus.objects)
    ]
    manifest = Manifest(
        kind="embeddings", recipe={}, parent=corpus.manifest.content, objects=objects
    )
    return Embeddings(corpus.store, manifest, corpus)


def split_of(corpus, heldout):
    return Split(corpus=corpus.manifest.content, heldout=heldout, evaluation=())


def measure(
    tmp_path,
    corpus,
    embeddings,
    encoder,
    *,
    heldout=0.4,
    name="kd",
    widths=(),
    load=None,
    readings=None,
    **params,
):
    params = EvaluateParams.model_validate(
        {
            "sts": {},
            "retrieval": {},
            "max_tokens": 64,
            "ignore_identical_ids": True,
            "speed_texts": 8,
        }
        | params
    )
    return evaluate.run(
        params,
        name=name,
        load=load or (lambda for_sets: encoder),
        corpus=corpus,
        embeddings=embeddings,
        split=split_of(corpus, heldout),
        root=tmp_path,
        out=tmp_path / "kd.json",
        details=tmp_path / "kd-details.json",
        documents=tmp_path / "documents",
        in_teachers_space=name != "teacher",
        widths=widths,
        readings=readings,
    )


def without_intervals(metrics):
    return {key: v for key, v in metrics.items() if not key.endswith((".low", ".high"))}


def message(call, *arguments):
    with pytest.raises(TeachonceError) as caught:
        call(*arguments)
    return str(caught.value)


# --- files ------------------------------------------------------------------------------------------


def test_files_of_one_name_are_one_set(tmp_path):
    (tmp_path / "STS12").mkdir()
    (tmp_path / "STS12/b.tsv").write_text("3\tx\ty\n")
    (tmp_path / "STS12/a.tsv").write_bytes(
        '4.5\tsaid "no\tor so\textra\n0\tline\u2028break\tcr\r\n'.encode()
    )
    pairs = read_sts(sts_files("STS12/*.tsv", tmp_path, "STS12"))
    assert pairs.scores.tolist() == [4.5, 0, 3]
    assert pairs.first == ['said "no', "line\u2028break", "x"]
    assert pairs.second == ["or so", "cr", "y"]


def test_a_glob_may_be_absolute_or_below_home(tmp_path, monkeypatch):
    (tmp_path / "a.tsv").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    assert sts_files(f"{tmp_path}/*.tsv", elsewhere, "x") == [tmp_path / "a.tsv"]
    assert sts_files("~/*.tsv", elsewhere, "x") == [tmp_path / "a.tsv"]
    assert beir_folder("~/set", elsewhere, "x") == tmp_path / "set"
    assert beir_folder("set", elsewhere, "x") == elsewhere / "set"


@pytest.mark.parametrize("pattern", ["none/*.tsv", "**x", "/nowhere/*.tsv"])
def test_a_glob_that_matches_nothing_is_refused(tmp_path, pattern):
    assert message(sts_files, pattern, tmp_path, "evaluate.sts.STSB") == (
        f"evaluate.sts.STSB: {pattern!r} matches no file below {tmp_path}\n"
        "  cure: mend the pattern in params.yaml, or put the files there"
    )


@pytest.mark.parametrize(
    ("line", "problem", "cure"),
    [
        (b"score\tsentence1\tsentence2", "the score is no number: 'score'", STS_CURE),
        (b"nan\tx\ty", "the score is no number: 'nan'", STS_CURE),
        (b"1e999\tx\ty", "the score is no number: '1e999'", STS_CURE),
        (b"4.0\tx", "2 of 3 columns", STS_CURE),
        (
            b"4.0\tx\ty\r5.0\tv\tw",
            "a carriage return within the line, and only a line feed ends a line here",
            "take it out, or put a line feed in its place",
        ),
        (b"4.0\tx\t\xff", "byte 7 of the line is no UTF-8", "save the file as UTF-8"),
    ],
)
def test_a_wrong_pair_is_named_with_its_line(tmp_path, line, problem, cure):
    path = tmp_path / "dev.tsv"
    path.write_bytes(b"1\ta\tb\n2\ta\tb\n" + line + b"\n")
    assert message(read_sts, [path]) == f"{path}:3: {problem}\n  cure: {cure}"


def test_blank_lines_at_the_end_of_an_evaluation_file_are_no_lines(tmp_path, beir):
    (tmp_path / "a.tsv").write_bytes(b"1\ta\tb\n2\tc\td\n\r\n \n\n")
    assert read_sts([tmp_path / "a.tsv"]).scores.tolist() == [1, 2]
    (tmp_path / "a.tsv").write_bytes(b"1\ta\tb\n\n2\tc\td\n")
    assert message(read_sts, [tmp_path / "a.tsv"]).startswith(f"{tmp_path}/a.tsv:2: 1 of 3 columns")
    whole = read_beir(beir, "docs")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"):
        path = beir / name
        content = path.read_text()
        path.write_text(f"\n{content}")
        assert message(read_beir, beir, "docs").startswith(f"{path}:")
        path.write_text(f"{content}\n\n")
    assert read_beir(beir, "docs") == whole


def test_a_retrieval_set_may_be_marked_or_compressed(beir):
    whole = read_beir(beir, "docs")
    packers = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    names = ("corpus.jsonl", "queries.jsonl", "qrels.tsv")
    for name, ending in zip(names, (".gz", ".zst", ".gz"), strict=True):
        content = b"\xef\xbb\xbf" + (beir / name).read_bytes()
        (beir / name).write_bytes(content)
        assert read_beir(beir, "docs") == whole
        (beir / name).unlink()
        (beir / f"{name}{ending}").write_bytes(packers[ending](content))
        assert read_beir(beir, "docs") == whole


def test_judgements_of_another_part_are_named_with_what_to_type(beir):
    (beir / "qrels").mkdir()
    whole = read_beir(beir, "docs")
    (beir / "qrels.tsv").rename(beir / "qrels/dev.tsv")
    said = message(read_beir, beir, "docs")
    command = f"cp {beir}/qrels/dev.tsv {beir}/qrels.tsv"
    assert said.endswith(f"  cure: to measure on dev.tsv, run `{command}`")
    subprocess.run(command, shell=True, check=True)
    assert read_beir(beir, "docs") == whole


def test_a_file_of_pairs_may_be_marked_or_compressed(tmp_path):
    content = b"\xef\xbb\xbf1\ta\tb\n2\tc\td\r\n"
    (tmp_path / "a.tsv").write_bytes(content)
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(content))
    for name in ("a.tsv", "a.tsv.gz"):
        pairs = read_sts([tmp_path / name])
        assert (pairs.scores.tolist(), pairs.texts) == ([1, 2], ["a", "c", "b", "d"])


def test_pairs_of_one_score_are_refused(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text("1\ta\tb\n1\tc\td\n")
    assert message(read_sts, [path, path]) == (
        f"{path}, {path}: 4 pairs without two different scores, so nothing can correlate with them\n"
        "  cure: name files with scored pairs"
    )


def test_queries_without_a_relevant_document_are_left_out(beir):
    assert read_beir(beir, "docs") == RetrievalSet(
        document_ids=["d1", "d0"],
        documents=["Join puts strings together", "cuts a string"],
        query_ids=["q1", "q0"],
        queries=["how to split", "how to join"],
        relevant={"q0": {"d1": 2}, "q1": {"d0": 1}},
    )


def test_judgements_of_the_test_part_are_preferred(beir):
    assert beir_files(beir, "docs")[2] == beir / "qrels.tsv"
    (beir / "qrels").mkdir()
    (beir / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td1\t1\n")
    assert beir_files(beir, "docs")[2] == beir / "qrels/test.tsv"
    assert read_beir(beir, "docs").relevant == {"q2": {"d1": 1}}


@pytest.mark.parametrize(
    ("file", "missing"),
    [("queries.jsonl", "queries.jsonl"), ("qrels.tsv", "qrels/test.tsv or qrels.tsv")],
)
def test_a_missing_file_of_a_retrieval_set_is_named(beir, file, missing):
    (beir / file).unlink()
    assert message(read_beir, beir, "docs") == (
        f"evaluate.retrieval.docs: no {missing} in {beir}\n"
        "  cure: correct the folder in params.yaml, or remove the entry"
    )


@pytest.mark.parametrize(
    ("file", "line", "problem", "cure"),
    [
        ("corpus.jsonl", "{'_id'", "no JSON: \"{'_id'\"", JSON_CURE),
        ("corpus.jsonl", "[1]", "no JSON object: '[1]'", JSON_CURE),
        ("corpus.jsonl", '{"_id": 7, "text": "x"}', "no string under _id", JSON_CURE),
        ("corpus.jsonl", '{"_id": "d7", "title": "x"}', "no string under text", JSON_CURE),
        (
            "corpus.jsonl",
            '{"_id": "d7", "text": "x", "title": [1]}',
            "no string under title",
            JSON_CURE,
        ),
        (
            "queries.jsonl",
            r'{"_id": "q7", "text": "\ud800"}',
            "half a surrogate pair under text",
            "mend the text",
        ),
        (
            "queries.jsonl",
            '{"_id": "q0", "text": "x"}',
            "the id 'q0' was there before",
            "give each its own id",
        ),
        (
            "qrels.tsv",
            "q9\td1\t1",
            "no query has the id 'q9'",
            "remove the line, or add what it names",
        ),
        (
            "qrels.tsv",
            "q0\td9\t0",
            "no document has the id 'd9'",
            "remove the line, or add what it names",
        ),
        ("qrels.tsv", "q0\td1\t1", "this pair was judged before", "remove one of the two lines"),
        ("qrels.tsv", "q0\td0\thigh", r"no judgement: 'q0\td0\thigh'", QRELS_CURE),
        ("qrels.tsv", "q0 0 d0 1", "no judgement: 'q0 0 d0 1'", QRELS_CURE),
    ],
)
def test_a_wrong_line_of_a_retrieval_set_is_named(beir, file, line, problem, cure):
    path = beir / file
    before = path.read_text()
    path.write_text(f"{before}{line}\n")
    number = before.count("\n") + 1
    assert message(read_beir, beir, "docs") == f"{path}:{number}: {problem}\n  cure: {cure}"


def test_judgements_without_a_header_are_refused(beir):
    (beir / "qrels.tsv").write_text("q0\td1\t1\nq1\td0\t1\n")
    assert message(read_beir, beir, "docs") == (
        f"{beir}/qrels.tsv:1: a judgement where the header line should be\n  cure: {QRELS_CURE}"
    )


def test_judgements_that_find_nothing_relevant_are_refused(beir):
    (beir / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t0\n")
    assert message(read_beir, beir, "docs") == (
        f"{beir}/qrels.tsv: no query has a relevant document\n  cure: {QRELS_CURE}"
    )


def test_training_must_not_see_sentences_and_queries(tmp_path, beir):
    (tmp_path / "dev.tsv").write_text("1\ta\tb\n2\tc\td\n")
    texts = evaluation_texts([read_sts([tmp_path / "dev.tsv"])], [read_beir(beir, "docs")])
    assert list(texts) == ["a", "c", "b", "d", "how to split", "how to join"]


# --- formulas beside their slow forms -----------------------------------------------------------------


def slow_ranks(values):
    """Rank of each value, from 1; equal values share the mean of their places."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def slow_spearman(left, right):
    a, b = slow_ranks(left), slow_ranks(right)
    mean = (len(a) + 1) / 2
    both = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return both / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


def slow_cosine(a, b):
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


def slow_retrieval(ranking, relevant):
    """nDCG@10, MRR@10 and recall@100 of one query, from document ids best first."""
    ndcg = sum(
        relevant.get(document, 0) / math.log2(rank + 1)
        for rank, document in enumerate(ranking[:10], 1)
    ) / sum(
        score / math.log2(rank + 1)
        for rank, score in enumerate(sorted(relevant.values(), reverse=True)[:10], 1)
    )
    hits = [rank for rank, document in enumerate(ranking[:10], 1) if document in relevant]
    recall = sum(document in relevant for document in ranking[:100]) / len(relevant)
    return ndcg, (1 / hits[0] if hits else 0.0), recall


def test_spearman_is_the_correlation_of_mean_ranks():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 6, 50) / 4, rng.integers(0, 9, 50) / 4
    assert spearman(left, right) == pytest.approx(slow_spearman(left, right), abs=1e-12)
    assert spearman(left, -(left**3)) == pytest.approx(-1)
    assert spearman(left, np.ones(50)) == 0


def test_sts_is_spearman_of_cosines_times_100():
    rng = np.random.default_rng(1)
    first, second = (rng.standard_normal((30, 8)).astype(np.float32) for _ in range(2))
    second[4] = 0
    second[10:25] = first[10:25]
    scores = rng.integers(0, 6, 30).astype(float)
    cosines = [slow_cosine(first[i], second[i]) if i != 4 else 0 for i in range(30)]
    cosines[10:25] = [1] * 15
    found = vectors.sts_correlation(first * 7, second, scores)
    assert found == pytest.approx(100 * slow_spearman(cosines, scores), abs=1e-9)


@pytest.mark.parametrize(
    ("queries", "documents", "depth"), [(600, 40, 7), (3, 5, 100), (5, 300, 100)]
)
def test_nearest_sorts_all_documents_and_breaks_ties_by_their_order(queries, documents, depth):
    rng = np.random.default_rng(2)
    # One non-zero element a row: each cosine is exactly -1, 0 or 1, so ties are everywhere.
    asked = np.eye(4, dtype=np.float32)[rng.integers(0, 4, queries)] * 3
    held = np.eye(4, dtype=np.float32)[rng.integers(0, 4, documents)] * rng.choice(
        [-2, 1], (documents, 1)
    )
    expected = [
        sorted(range(documents), key=lambda d: -np.sign(query @ held[d]))[:depth] for query in asked
    ]
    assert vectors.nearest(asked, held.astype(np.float32), depth).tolist() == expected


def means(scores):
    return {what: float(of_queries.mean()) for what, of_queries in scores.items()}


def test_retrieval_metrics_are_those_of_the_loops():
    rng = np.random.default_rng(3)
    documents = [f"d{i}" for i in range(150)]
    queries = [f"q{i}" for i in range(40)]
    relevant = {
        query: {
            str(d): int(rng.integers(1, 4))
            for d in rng.choice(documents, rng.choice([1, 3, 25]), replace=False)
        }
        for query in queries
    }
    found = np.array([rng.permutation(150)[:100] for _ in queries])
    asked = RetrievalSet(documents, documents, queries, queries, relevant)
    slow = np.mean(
        [
            slow_retrieval([documents[d] for d in row], relevant[query])
            for row, query in zip(found, queries, strict=True)
        ],
        axis=0,
    )
    fast = means(retrieval_scores(found, asked))
    assert list(fast) == ["ndcg@10", "mrr@10", "recall@100"]
    assert list(fast.values()) == pytest.approx(slow.tolist(), abs=1e-12)


def drawn_places(count, resamples):
    """Which things the resamples of `count` things have."""
    return np.random.default_rng([0, count]).integers(0, count, (resamples, count))


def test_the_bootstrap_of_a_mean_is_the_mean_of_each_resample():
    values = np.random.default_rng(4).random(50)
    found = vectors.bootstrap_mean(values)
    assert found == pytest.approx(values[drawn_places(50, 1000)].mean(axis=1), abs=1e-12)
    low, high = vectors.interval(found, float(values.mean()))
    # The textbook's: 1.96 standard errors on either side.
    error = 1.96 * values.std() / math.sqrt(50)
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.02)


def test_the_bootstrap_of_a_rank_correlation_is_near_that_of_ranking_each_resample_anew():
    rng = np.random.default_rng(5)
    left = rng.standard_normal(300)
    right = np.round(left + rng.standard_normal(300), 1)
    found = vectors.bootstrap_spearman(left, right)
    exact = np.array([spearman(left[some], right[some]) for some in drawn_places(300, 1000)])
    assert np.abs(found - exact).mean() < 0.006
    whole = spearman(left, right)
    assert vectors.interval(found, whole) == pytest.approx(vectors.interval(exact, whole), abs=0.01)
    assert vectors.bootstrap_spearman(left, np.ones(300)).tolist() == [0.0] * 1000


def test_the_bootstrap_of_agreement_draws_texts_and_leaves_pairs_of_one_text_out():
    rng = np.random.default_rng(6)
    ours = rng.standard_normal((40, 8)).astype(np.float32)
    teacher = ours + rng.standard_normal((40, 8)).astype(np.float32)
    found = vectors.bootstrap_agreement(ours, teacher)
    mine, theirs = vectors.cosines(ours), vectors.cosines(teacher)
    for value, some in zip(found[:10], drawn_places(40, 200), strict=False):
        pairs = [(i, j) for i, j in combinations(some, 2) if i != j]
        exact = spearman(*(np.array([side[pair] for pair in pairs]) for side in (mine, theirs)))
        assert value == pytest.approx(exact, abs=0.03)


def test_large_sets_are_resampled_less_often():
    assert len(vectors.bootstrap_mean(np.ones(40_000))) == 500
    assert vectors.interval(np.array([0.5, 0.6]), 0.7) == pytest.approx((0.5025, 0.7))


def test_a_hit_at_rank_11_counts_for_recall_alone():
    documents = [f"d{i}" for i in range(12)]
    asked = RetrievalSet(documents, documents, ["q"], ["q"], {"q": {"d10": 1}})
    found = means(retrieval_scores(np.arange(12)[None], asked))
    assert found == {"ndcg@10": 0, "mrr@10": 0, "recall@100": 1}


def test_ties_are_broken_in_row_order():
    # All the same: everybody's nearest are the first ten others, whoever is asked.
    same = np.ones((30, 3), np.float32)
    assert (rank_agreement(same, same), top_overlaps(same, same, 10).mean()) == (0, 1)


def test_rows_are_taken_at_equal_steps():
    assert evenly(np.arange(5, 15), 4).tolist() == [5, 7, 10, 12]
    assert evenly(np.array([3, 8]), 5).tolist() == [3, 3, 3, 8, 8]


# --- a model end to end ---------------------------------------------------------------------------------


def test_a_perfect_student_keeps_everything(tmp_path, corpus, embeddings, beir):
    (tmp_path / "a.tsv").write_text("5\tsame\tsame\n1\tred\tblue\n0\tcat\tfish\n")
    (tmp_path / "b.tsv").write_text("0\tsame\tsame\n1\tred\tblue\n")
    encoder = HashEncoder()
    outcome = measure(
        tmp_path, corpus, embeddings, encoder,
        sts={"A": "a.tsv", "B": "b.tsv"}, retrieval={"docs": "docs"},
    )  # fmt: skip
    metrics = json.loads((tmp_path / "kd.json").read_bytes())
    assert metrics == outcome.facts
    assert set(without_intervals(metrics)) == {
        "sts.A", "sts.B", "sts.average", "sts.A.truncated", "sts.B.truncated",
        "retrieval.docs.truncated",
        "retrieval.docs.ndcg@10", "retrieval.docs.mrr@10", "retrieval.docs.recall@100",
        "fidelity.spearman", "fidelity.top10_overlap", "fidelity.cosine_shift",
        "index.among",
        *(f"index.{kind}.{what}" for kind in TYPES for what in ("bytes", "recall@10")),
        "sentences_per_second", "texts_per_reference", "device", "parameters", "megabytes",
    }  # fmt: skip
    assert (metrics["fidelity.spearman"], metrics["fidelity.top10_overlap"]) == (1, 1)
    assert metrics["fidelity.cosine_shift"] == 0
    assert metrics["sts.B"] == -100
    assert metrics["sts.average"] == pytest.approx((metrics["sts.A"] - 100) / 2, abs=1e-6)
    assert metrics["retrieval.docs.recall@100"] == 1
    assert (metrics["parameters"], metrics["megabytes"], metrics["device"]) == (
        1234,
        5.679,
        "abacus",
    )
    assert (metrics["sentences_per_second"], metrics["texts_per_reference"]) == (213.5, 9.877)
    assert outcome.summary.startswith(f"kd: STS {metrics['sts.average']:.2f}, nDCG@10 ")

    asked = dict(encoder.asked)
    assert asked["query"] == ["how to split", "how to join"]
    assert asked["document"] == ["Join puts strings together", "cuts a string"]
    heldout = split_of(corpus, 0.4).heldout_rows(corpus)
    assert ("text", corpus.take(heldout)) in encoder.asked
    assert encoder.asked[-1] == ("speed", corpus.take(evenly(heldout, 8)))


def test_the_share_of_texts_that_were_cut_is_measured_and_told(
    tmp_path, corpus, embeddings, beir, caplog
):
    (tmp_path / "a.tsv").write_text("5\tsame\tsame\n1\tred\ta sentence of some length\n")
    sets = {"sts": {"A": "a.tsv"}, "retrieval": {"docs": "docs"}}
    facts = measure(tmp_path, corpus, embeddings, HashEncoder(), **sets).facts
    # Of four sentences the last has more than 20 letters; of two documents and two queries the first.
    assert (facts["sts.A.truncated"], facts["retrieval.docs.truncated"]) == (0.25, 0.25)
    said = "texts are longer than the model reads here, and were cut (evaluate.max_tokens)"
    assert [r.getMessage() for r in caplog.records if said in r.getMessage()] == [
        f"evaluate: kd, retrieval.docs, 1 of 4 {said}",
        f"evaluate: kd, sts.A, 1 of 4 {said}",
    ]

    class InWindows(HashEncoder):
        in_windows = True

    whole = measure(tmp_path, corpus, embeddings, InWindows(), name="teacher", **sets).facts
    assert (whole["sts.A.truncated"], whole["retrieval.docs.truncated"]) == (0, 0)


def test_sets_are_read_by_an_encoder_of_their_own(tmp_path, corpus, embeddings, beir):
    """Sets to `evaluate.max_tokens`, corpus rows as far as the cache was made with."""
    encoders = {True: HashEncoder(), False: HashEncoder()}
    measure(
        tmp_path, corpus, embeddings, None, retrieval={"docs": "docs"},
        load=lambda for_sets: encoders[for_sets],
    )  # fmt: skip
    assert {role for role, _ in encoders[True].asked} == {"query", "document"}
    assert {role for role, _ in encoders[False].asked} == {"text", "speed"}


def test_a_student_of_another_mind_keeps_little(tmp_path, corpus, embeddings):
    class Stranger(HashEncoder):
        def encode(self, texts, *, role):
            return super().encode([text[::-1] for text in texts], role=role)

    facts = measure(tmp_path, corpus, embeddings, Stranger()).facts
    assert abs(facts["fidelity.spearman"]) < 0.2
    assert facts["fidelity.top10_overlap"] < 0.5


def test_likeness_takes_a_thousand_rows_at_most(tmp_path, corpus, embeddings, monkeypatch):
    monkeypatch.setattr(evaluate, "MOST_ROWS", 20)
    encoder = HashEncoder()
    measure(tmp_path, corpus, embeddings, encoder)
    heldout = split_of(corpus, 0.4).heldout_rows(corpus)
    assert encoder.asked[0] == ("text", corpus.take(evenly(heldout, 20)))


def test_with_few_rows_held_out_likeness_is_left_out(tmp_path, corpus, embeddings, caplog):
    few = len(split_of(corpus, 0.05).heldout_rows(corpus))
    assert few < 12
    encoder = HashEncoder()
    outcome = measure(tmp_path, corpus, embeddings, encoder, heldout=0.05, speed_texts=200)
    assert set(outcome.facts) == {
        *("sentences_per_second", "texts_per_reference", "device", "parameters", "megabytes")
    }
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"evaluate: kd, left out: fidelity: {few} rows are held out, and it takes 12; raise "
        "split.heldout, or add texts"
    ]
    assert outcome.summary.endswith("; raise split.heldout, or add texts")
    # More than are held out, more than there are: all rows, some of them twice.
    assert {len(texts) for _, texts in encoder.asked} == {200}
    assert {*encoder.asked[0][1]} == {*corpus.take(np.arange(corpus.rows))}


def test_a_model_with_nan_has_no_metrics(tmp_path, corpus, embeddings):
    (tmp_path / "a.tsv").write_text("5\tsame\tsame\n1\tred\tblue\n")
    encoder = BrokenEncoder("blue")
    with pytest.raises(TeachonceError) as caught:
        measure(tmp_path, corpus, embeddings, encoder, sts={"A": "a.tsv"})
    assert str(caught.value) == (
        "kd: 1 of 4 vectors have NaN or Inf, the first that of 'blue'\n"
        "  cure: train it again with a smaller learning_rate or with precision: fp32"
    )
    assert not (tmp_path / "kd.json").exists()


class Closed(HashEncoder):
    """A model behind a server: interrupted at one text, and closed once."""

    closed = 0

    def __init__(self, interrupts):
        super().__init__()
        self.interrupts = interrupts

    def encode(self, texts, *, role):
        if self.interrupts in texts:
            raise KeyboardInterrupt
        return super().encode(texts, role=role)

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("set_alone", [True, False])
def test_a_model_is_closed_also_after_an_interrupt(tmp_path, corpus, embeddings, set_alone):
    (tmp_path / "a.tsv").write_text("5\tsame\tsame\n1\tred\tblue\n")
    models = []

    def load(for_sets):
        heldout = corpus.take(split_of(corpus, 0.4).heldout_rows(corpus))
        models.append(Closed("blue" if set_alone else heldout[3]))
        return models[-1]

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, corpus, embeddings, None, load=load, sts={"A": "a.tsv"})
    assert [model.closed for model in models] == ([1] if set_alone else [1, 1])


def test_wrong_files_are_found_before_the_model_is_used(tmp_path, corpus, embeddings, beir):
    (beir / "queries.jsonl").write_text("nonsense\n")
    (tmp_path / "a.tsv").write_text("5\tsame\tsame\n1\tred\tblue\n")
    encoder = HashEncoder()
    with pytest.raises(TeachonceError, match=r"queries\.jsonl:1: no JSON: 'nonsense'"):
        measure(
            tmp_path, corpus, embeddings, encoder, sts={"A": "a.tsv"}, retrieval={"docs": "docs"}
        )
    assert encoder.asked == []


class ByRole(HashEncoder):
    """A teacher that reads a query otherwise than a document."""

    def encode(self, texts, *, role):
        return super().encode([f"{role}: {text}" for text in texts], role=role)


def test_held_out_texts_are_read_in_their_roles_as_for_the_cache(tmp_path, place):
    queries, documents = sentences(40, seed=1), sentences(80, seed=2)
    corpus = place.corpus({"query": queries, "document": documents}, rows_per_shard=32)
    teacher = ByRole()

    def encode(texts, role):
        vectors = teacher.encode(texts, role=role)
        return Made(vectors, tokens=0, truncated=0)

    place.embed(corpus, encode)
    cached = Embeddings(place.store, place.embeddings, corpus)
    metrics = measure(tmp_path, corpus, cached, teacher, name="teacher").facts
    assert metrics["fidelity.spearman"] > 0.999 and metrics["fidelity.top10_overlap"] > 0.99
    student = ByRole()
    shift = measure(tmp_path, corpus, cached, student).facts["fidelity.cosine_shift"]
    assert shift == pytest.approx(0, abs=1e-3)
    assert [role for role, _ in student.asked] == ["query", "document", "speed"]


# --- the teacher's index ------------------------------------------------------------------------------


class TurnedEncoder(HashEncoder):
    """A student that is its teacher on queries, and nothing like it on documents."""

    def encode(self, texts, *, role):
        vectors = super().encode(texts, role=role)
        return vectors if role == "query" else -vectors


def test_a_students_queries_are_asked_of_the_documents_that_the_teacher_left(
    tmp_path, corpus, embeddings, beir
):
    sets = {"docs": "docs"}
    teacher = measure(
        tmp_path, corpus, embeddings, HashEncoder(), name="teacher", retrieval=sets
    ).facts
    student = measure(tmp_path, corpus, embeddings, TurnedEncoder(), retrieval=sets).facts
    for what in ("ndcg@10", "mrr@10", "recall@100"):
        assert student[f"teacher_index.docs.{what}"] == teacher[f"retrieval.docs.{what}"]
    assert student["retrieval.docs.ndcg@10"] != teacher["retrieval.docs.ndcg@10"]
    assert not [key for key in teacher if key.startswith("teacher_index")]


def test_without_documents_of_the_teacher_it_is_said_loudly_and_how_to_have_them(
    tmp_path, corpus, embeddings, beir, caplog
):
    sets = {"docs": "docs"}
    outcome = measure(tmp_path, corpus, embeddings, HashEncoder(), retrieval=sets)
    assert not [key for key in outcome.facts if key.startswith("teacher_index")]
    said = (
        "teacher_index.docs: the teacher left no vectors of these documents; run `teachonce evaluate "
        "teacher`, then `teachonce evaluate kd` again"
    )
    assert outcome.summary.endswith(f"; left out: {said}")
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warned[0] == f"evaluate: kd, left out: {said}"
    # Once it has, nothing is missing.
    measure(tmp_path, corpus, embeddings, HashEncoder(), name="teacher", retrieval=sets)
    again = measure(tmp_path, corpus, embeddings, HashEncoder(), retrieval=sets)
    assert "teacher_index.docs.ndcg@10" in again.facts
    assert "left out" not in again.summary


def test_what_cannot_be_had_has_no_cure_that_fails(caplog):
    caplog.set_level("INFO", logger="teachonce")

    def told(**changes):
        given = {"sets": ["docs"], "of_teacher": [], "in_teachers_space": True, "imported": False}
        return evaluate._left_out("kd", **given | {"heldout": 12} | changes)

    assert told(imported=True) == [
        "teacher_index.docs: the teacher's vectors were imported, and it reads no documents"
    ]
    assert told(in_teachers_space=False) == told(of_teacher=["docs"]) == told(sets=[]) == []
    assert [r.getMessage() for r in caplog.records if r.levelname == "INFO"] == [
        "evaluate: kd, no teacher_index.docs: it is not in this teacher's space"
    ]


def test_documents_are_those_of_this_teacher_and_this_set_or_refused(tmp_path):
    folder, vectors = tmp_path / "documents", np.eye(2, dtype=np.float32) * 3
    write_documents(folder, {"docs": (["a", "b"], vectors)}, teacher="me", as_read="max_tokens 64")
    found = read_documents(folder, "docs", ["a", "b"], teacher="me", as_read="max_tokens 64")
    assert np.array_equal(found, np.eye(2))
    assert read_documents(folder, "others", ["a"], teacher="me", as_read="max_tokens 64") is None
    wrong = {
        "vectors of other documents than the set docs has now": (["b", "a"], "me"),
        "vectors of another teacher": (["a", "b"], "you"),
    }
    for problem, (texts, teacher) in wrong.items():
        with pytest.raises(DamagedError, match=problem):
            read_documents(folder, "docs", texts, teacher=teacher, as_read="max_tokens 64")
    with pytest.raises(
        DamagedError, match="read with max_tokens 64, where evaluate has max_tokens 9 now"
    ):
        read_documents(folder, "docs", ["a", "b"], teacher="me", as_read="max_tokens 9")
    (folder / "docs.safetensors").write_bytes(b"no weights")
    with pytest.raises(DamagedError, match="run `teachonce evaluate teacher`"):
        read_documents(folder, "docs", ["a", "b"], teacher="me", as_read="max_tokens 64")
    write_documents(folder, {}, teacher="me", as_read="max_tokens 64")
    assert list(folder.iterdir()) == []


# --- a document with the query's own id ------------------------------------------------------------------


def arguments(folder, *, copies=1):
    """Arguments and what answers each: both say the same here, and a query is a document, too (ArguAna).

    All with the words of an argument tie, in the order of the file: the query itself, then `copies` - 1
    that nobody judged, then the answer.
    """
    corpus, queries, judged = [], [], []
    for query in ("a", "b", "c"):
        queries.append({"_id": query, "text": f"argument {query}"})
        names = [query, *(f"{query}{copy}" for copy in range(1, copies)), f"{query}-answer"]
        corpus += [{"_id": name, "text": f"argument {query}"} for name in names]
        judged.append(f"{query}\t{names[-1]}\t1")
    return write_beir(
        folder, corpus=corpus, queries=queries, qrels=["query-id\tcorpus-id\tscore", *judged]
    )


def test_a_document_with_the_querys_own_id_is_no_result_of_it(tmp_path, corpus, embeddings, caplog):
    """So in BEIR; with it the answer is second, and nDCG@10 is 1 / log2(3)."""
    arguments(tmp_path / "arguana")
    sets = {"arguana": "arguana"}
    encoder = HashEncoder()
    for name, widths in (("teacher", ()), ("kd", (4,))):
        for ignored, wanted in ((True, 1.0), (False, 0.63093)):
            caplog.clear()
            with caplog.at_level(logging.INFO, logger="teachonce"):
                metrics = measure(
                    tmp_path, corpus, embeddings, encoder,
                    name=name, widths=widths, retrieval=sets, ignore_identical_ids=ignored,
                ).facts  # fmt: skip
            found = {key: value for key, value in metrics.items() if key.endswith("ndcg@10")}
            assert set(found.values()) == {wanted}
            assert len(found) == (1 if name == "teacher" else 3)
            told = "3 of 3 queries have a document with their own id" in caplog.text
            assert (told, metrics.get("retrieval.arguana.identical_ids_ignored")) == (
                (True, 3) if ignored else (False, None)
            )
            details = json.loads((tmp_path / "kd-details.json").read_bytes())
            first = details["searches"][0]["results"][0]
            assert first == {"text": "argument a", "score": 1.0, "relevant": ignored}


def test_what_is_ignored_costs_no_place_among_the_results(tmp_path, corpus, embeddings):
    arguments(tmp_path / "arguana", copies=100)  # so the answer is the 101st with the query itself
    sets = {"arguana": "arguana"}
    for ignored, recall in ((True, 1.0), (False, 0.0)):
        metrics = measure(
            tmp_path, corpus, embeddings, HashEncoder(),
            retrieval=sets, ignore_identical_ids=ignored,
        ).facts  # fmt: skip
        assert metrics["retrieval.arguana.recall@100"] == recall


def test_a_judged_document_stays_whatever_its_id(tmp_path, corpus, embeddings):
    """Of pairs that somebody numbered, query 1 has the answer 1."""
    write_beir(
        tmp_path / "pairs",
        corpus=[{"_id": str(n), "text": f"pair {n}"} for n in range(4)],
        queries=[{"_id": str(n), "text": f"pair {n}"} for n in range(4)],
        qrels=["query-id\tcorpus-id\tscore", "0\t0\t1", "1\t1\t1", "2\t3\t1", "3\t3\t0", "3\t2\t1"],
    )
    metrics = measure(
        tmp_path, corpus, embeddings, HashEncoder(), retrieval={"pairs": "pairs"}
    ).facts
    assert metrics["retrieval.pairs.identical_ids_ignored"] == 2
    asked = read_beir(tmp_path / "pairs", "pairs")
    assert asked.identical_ids.tolist() == [-1, -1, 2, 3]


# --- fewer values than there are ------------------------------------------------------------------------


@pytest.fixture
def sets(tmp_path):
    """Two sets of scored pairs, and thirty documents, three of which answer each of five queries."""
    names = [f"word{i}" for i in range(30)]
    judged = [f"q{i}\tword{3 * i + j}\t{j + 1}" for i in range(5) for j in range(3)]
    write_beir(
        tmp_path / "docs",
        corpus=[{"_id": name, "text": name} for name in names],
        queries=[{"_id": f"q{i}", "text": f"ask {i}"} for i in range(5)],
        qrels=["query-id\tcorpus-id\tscore", *judged],
    )
    for file, count, left, right in (("a", 4, "left", "right"), ("b", 3, "north", "south")):
        lines = [f"{i % count}\t{left} {i}\t{right} {i}\n" for i in range(20)]
        (tmp_path / f"{file}.tsv").write_text("".join(lines))
    return {"sts": {"A": "a.tsv", "B": "b.tsv"}, "retrieval": {"docs": "docs"}}


def slow_metrics_of_first(width, *, corpus, asked):
    """What `HashEncoder` is worth if all that is kept of its vectors are `width` values, pair by pair."""

    def kept(text):
        vector = hashed(text)[:width].astype(float)
        return vector / math.sqrt(float(vector @ vector))

    def ten_nearest(vectors, own):
        others = [row for row in range(len(vectors)) if row != own]
        return {*sorted(others, key=lambda row: -slow_cosine(vectors[own], vectors[row]))[:10]}

    found = {}
    for key, count, left, right in (("A", 4, "left", "right"), ("B", 3, "north", "south")):
        cosines = [float(kept(f"{left} {i}") @ kept(f"{right} {i}")) for i in range(20)]
        found[f"sts.{key}"] = 100 * slow_spearman(cosines, [i % count for i in range(20)])
    found["sts.average"] = (found["sts.A"] + found["sts.B"]) / 2
    slow = np.mean(
        [
            slow_retrieval(
                sorted(asked.document_ids, key=lambda d: -float(kept(query) @ kept(d))),
                asked.relevant[key],
            )
            for key, query in zip(asked.query_ids, asked.queries, strict=True)
        ],
        axis=0,
    )
    names = ("ndcg@10", "mrr@10", "recall@100")
    found |= {f"retrieval.docs.{name}": value for name, value in zip(names, slow, strict=True)}
    texts = corpus.take(split_of(corpus, 0.4).heldout_rows(corpus))
    ours, teacher = [kept(text) for text in texts], [hashed(text) for text in texts]
    found["fidelity.spearman"] = slow_spearman(
        *([slow_cosine(a, b) for a, b in combinations(side, 2)] for side in (ours, teacher))
    )
    found["fidelity.top10_overlap"] = np.mean(
        [len(ten_nearest(ours, row) & ten_nearest(teacher, row)) / 10 for row in range(len(texts))]
    )
    return found


def test_at_each_width_it_is_the_first_values_that_are_measured(tmp_path, corpus, embeddings, sets):
    measure(tmp_path, corpus, embeddings, HashEncoder(), name="teacher", **sets)
    whole, cut = HashEncoder(), HashEncoder()
    facts = measure(tmp_path, corpus, embeddings, whole, **sets).facts
    outcome = measure(tmp_path, corpus, embeddings, cut, widths=(4, 9), **sets)
    metrics = json.loads((tmp_path / "kd.json").read_bytes())
    assert metrics == outcome.facts

    asked = read_beir(tmp_path / "docs", "docs")
    slow = {
        f"widths.{width}.{key}": value
        for width in (4, 9)
        for key, value in slow_metrics_of_first(width, corpus=corpus, asked=asked).items()
    }
    # The teacher's documents are not among them: they have all values.
    widths = {key: value for key, value in metrics.items() if key.startswith("widths.")}
    assert without_intervals(widths) == pytest.approx(slow, abs=1e-6)
    assert set(widths) == {f"{key}{end}" for key in slow for end in ("", ".low", ".high")}
    assert any(key.startswith("teacher_index.docs") for key in metrics)
    # What was there is what it was, no text was read twice, and the sentence is that of the whole.
    added = ("widths.", "index.4.", "index.9.")
    assert metrics["index.4.float32.bytes"] == 16
    rest = {key: value for key, value in metrics.items() if not key.startswith(added)}
    assert rest == facts
    assert cut.asked == whole.asked
    assert outcome.summary.startswith(
        f"kd: STS {facts['sts.average']:.2f}, nDCG@10 "
        f"{facts['retrieval.docs.ndcg@10']:.3f} on docs, 1.000 rank correlation"
    )


def test_a_student_whose_vectors_are_moved_says_by_how_much_its_cosines_are(
    tmp_path, corpus, embeddings
):
    class Moved(HashEncoder):
        def encode(self, texts, **how):
            vectors = super().encode(texts, **how) + 0.2
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    facts = measure(tmp_path, corpus, embeddings, Moved()).facts
    rows = split_of(corpus, 0.4).heldout_rows(corpus)
    teacher = [hashed(text).astype(np.float64) for text in corpus.take(rows)]
    shifts = [
        slow_cosine(a + 0.2, b + 0.2) - slow_cosine(a, b) for a, b in combinations(teacher, 2)
    ]
    assert facts["fidelity.cosine_shift"] == pytest.approx(np.mean(shifts), abs=1e-5)
    assert facts["fidelity.cosine_shift"] > 0.03
    # The teacher is the scale itself.
    facts = measure(tmp_path, corpus, embeddings, HashEncoder(), name="teacher").facts
    assert "fidelity.cosine_shift" not in facts


def test_intervals_are_of_resampled_queries_and_pairs(tmp_path, corpus, embeddings, sets):
    facts = measure(tmp_path, corpus, embeddings, HashEncoder(), **sets).facts
    asked = read_beir(tmp_path / "docs", "docs")
    queries, documents = (
        np.array([hashed(text) for text in texts]) for texts in (asked.queries, asked.documents)
    )
    scores = retrieval_scores(vectors.nearest(queries, documents, 100), asked)
    cosines = [slow_cosine(hashed(f"left {i}"), hashed(f"right {i}")) for i in range(20)]
    of_pairs = vectors.bootstrap_spearman(np.array(cosines), np.arange(20) % 4)
    drawn = {
        "retrieval.docs.ndcg@10": scores["ndcg@10"][drawn_places(5, 1000)].mean(axis=1),
        "sts.A": 100 * of_pairs,
    }
    for key, values in drawn.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert (facts[f"{key}.low"], facts[f"{key}.high"]) == pytest.approx((low, high), abs=1e-5)
        assert low < facts[key] < high


def test_widths_without_evaluation_sets_show_likeness_alone(tmp_path, corpus, embeddings):
    facts = measure(tmp_path, corpus, embeddings, HashEncoder(), widths=(4,)).facts
    assert [key for key in without_intervals(facts) if key.startswith("widths.")] == [
        "widths.4.fidelity.spearman",
        "widths.4.fidelity.top10_overlap",
    ]


def test_without_widths_the_file_is_what_it_was_before_there_were_any(
    tmp_path, corpus, embeddings, sets
):
    """Bytes of version 3, but for the speed, whose second key is newer; intervals and indexes are, too."""
    measure(tmp_path, corpus, embeddings, HashEncoder(), name="teacher", **sets)
    measure(tmp_path, corpus, embeddings, TurnedEncoder(), **sets)
    lines = (tmp_path / "kd.json").read_text().splitlines(keepends=True)
    assert (
        "".join(line for line in lines if not re.search(r'^  "index\.|\.(low|high)"', line))
        == """{
  "device": "abacus",
  "fidelity.cosine_shift": 0.0,
  "fidelity.spearman": 1.0,
  "fidelity.top10_overlap": 1.0,
  "megabytes": 5.679,
  "parameters": 1234,
  "retrieval.docs.mrr@10": 0.202222,
  "retrieval.docs.ndcg@10": 0.264344,
  "retrieval.docs.recall@100": 1.0,
  "retrieval.docs.truncated": 0.0,
  "sentences_per_second": 213.5,
  "sts.A": -10.082368,
  "sts.A.truncated": 0.0,
  "sts.B": -21.206229,
  "sts.B.truncated": 0.0,
  "sts.average": -15.644298,
  "teacher_index.docs.mrr@10": 0.273333,
  "teacher_index.docs.ndcg@10": 0.219745,
  "teacher_index.docs.recall@100": 1.0,
  "texts_per_reference": 9.877
}
"""
    )
