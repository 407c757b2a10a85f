"""A teacher behind an API by the commands that a person types, in processes of their own where they die."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import teachonce
from pipeline.cli import app
from stages.params import SettingsError
from tests.conftest import sentences, shipped_settings
from tests.embedding_server import PROBES, EmbeddingServer, refuses, running
from tests.teaching.test_api import words_tokenizer

ROOT = Path(__file__).parents[2]
KEY = "sk-0123456789-of-nobody"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Yields what writes params.yaml; the folder has texts and a tokenizer, and is the current one."""
    (tmp_path / "texts.txt").write_text("\n".join(sentences(300)))
    (tmp_path / "words").mkdir()
    words_tokenizer().save(str(tmp_path / "words" / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_KEY", KEY)

    def write(url, *, params=(), embed=(), **api):
        settings = shipped_settings()
        settings["docs"]["packages"] = []
        settings["shard"] |= {"sources": ["texts.txt"], "rows_per_shard": 64}
        settings["split"]["heldout"] = 0.1
        settings["embed"] |= {"teacher": "api:a-model", "max_tokens": 512, **dict(embed)}
        settings["embed"]["api"] |= {"url": url, "key_env": "MY_KEY", "batch_texts": 16} | api
        settings["evaluate"]["retrieval"] = {}
        settings["starts"] = {"half": {"from": "models/none", "layers": [0]}}
        settings["students"] = {"kd": {"recipe": "kd", "start": "half"}}
        settings["finetune"]["students"], settings["export"]["model"] = [], "kd"
        settings |= {"store": "store", **dict(params)}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))

    return write


def typed(*words):
    ended = CliRunner().invoke(app, words)
    if ended.exception and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    assert ended.exit_code == 0, ended.output
    return ended.output


def process(*words):
    command = [sys.executable, "-m", "pipeline.cli", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_killed_run_asks_again_only_for_what_is_missing_and_the_key_is_nowhere(tree, tmp_path):
    texts = sentences(300)
    server = EmbeddingServer(key=KEY)
    died = []

    def kills(handler, _):
        died.append(Path(f"/proc/{run.pid}/cmdline").read_bytes())
        os.kill(run.pid, signal.SIGKILL)

    with running(server) as url:
        tree(url, concurrency=1)
        typed("shard")
        server.misbehave.extend([None] * 9 + [kills])
        run = process("embed")
        told = run.communicate(timeout=120)[0]
        assert run.returncode == -signal.SIGKILL, told
        answered = server.texts.copy()
        assert 100 < len(answered) < 300
        asked = len(server.bodies)
        # The second: the server refuses, and says the key.
        server.misbehave.append(refuses(401, {"error": {"message": f"wrong key: {KEY}"}}))
        run = process("embed")
        told += run.communicate(timeout=120)[0]
        assert run.returncode == 1
        assert "refuses the key (401: wrong key: ***)\n  cure: put a key of this server" in told
        run = process("embed")
        told += run.communicate(timeout=120)[0]
        assert run.returncode == 0, told
    assert server.texts == dict.fromkeys(texts, 1)  # each was answered once in all
    again = [text for body in server.bodies[asked:] for text in body["input"]]
    assert not set(again) & set(answered)
    left = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 10
    assert KEY.encode() not in b"".join([*left, *died, told.encode()])


def test_plan_says_the_tokens_that_the_server_then_counts(tree):
    server = EmbeddingServer(key=KEY)
    with running(server) as url:
        tree(url, tokenizer="words", price_per_million_tokens=2.0, budget=1.0)
        typed("shard")
        planned = json.loads(typed("plan", "--json"))["facts"]["counted"]["api"]
        assert server.requests == 0
        typed("embed")
    assert planned["tokens"] + planned["probe_tokens"] == server.tokens
    assert planned["price"] == pytest.approx(server.tokens * 2 / 1e6)
    assert planned["how"] == "counted by embed.api.tokenizer"
    assert planned["tokens_spent"] == 0


def test_queries_and_documents_are_asked_for_as_such_and_paid_once(tree, tmp_path):
    """A text in two roles is two rows; what a killed run was answered is found again in its role."""
    documents = sentences(300)
    queries = [*sentences(40, seed=1), *documents[:20]]
    (tmp_path / "queries.txt").write_text("\n".join(queries))
    sources = [
        {"files": "queries.txt", "role": "query"},
        {"files": "texts.txt", "role": "document"},
    ]
    shard = shipped_settings()["shard"]
    # No shards of these sizes are whole with the ninth request, in whatever order they are asked for.
    shard |= {"sources": sources, "rows_per_shard": 200}
    server = EmbeddingServer(by_input_type=True)

    def asked_since(first):
        asked = {}
        for body in server.bodies[first:]:
            texts = asked.setdefault(body["input_type"], set())
            texts |= set(body["input"]) - PROBES
        return asked

    def kills(handler, _):
        os.kill(run.pid, signal.SIGKILL)

    with running(server) as url:

        def write(**input_type):
            kinds = {"text": None, "document": "search_document"} | input_type
            how = {"key_env": None, "concurrency": 1, "tokenizer": "words", "input_type": kinds}
            tree(url, params={"shard": shard}, **how)

        write(query="search_query")
        typed("shard")
        planned = json.loads(typed("plan", "--json"))["facts"]["counted"]["api"]
        server.misbehave.extend([None] * 9 + [kills])
        run = process("embed")
        told = run.communicate(timeout=120)[0]
        assert run.returncode == -signal.SIGKILL, told
        tokens_before = server.tokens
        left = json.loads(typed("plan", "--json"))["facts"]["counted"]["api"]
        assert 0 < left["texts_kept"] < 160  # of shards that are not whole
        typed("embed")
        both = {"search_query": set(queries), "search_document": set(documents)}
        assert asked_since(0) == both
        assert sum(server.texts.values()) == len(queries) + len(documents)  # each was paid once
        assert left["tokens"] + left["probe_tokens"] == server.tokens - tokens_before
        assert planned["tokens"] == sum(len(text.split()) for text in [*queries, *documents])
        project, rows = teachonce.open(tmp_path), len(queries)
        for row, kind in [
            (3, "query"),
            (rows - 1, "query"),
            (rows, "document"),
            (rows + 9, "document"),
        ]:
            expected = server.vector(f"search_{kind}|{project.texts[row]}")
            assert project.vectors[row] == pytest.approx(expected, abs=1e-3)
        # Another field for queries asks for queries alone.
        first = len(server.bodies)
        write(query="clustering")
        typed("embed")
        assert asked_since(first) == {"clustering": set(queries)}


def test_plan_without_a_tokenizer_estimates_and_says_so(tree):
    with running(EmbeddingServer()) as url:
        tree(url, price_per_million_tokens=2.0, tokens_per_minute=1000)
        typed("shard")
        told = typed("plan")
    expected = sum(-(-len(text) // 4) for text in sentences(300))
    assert f"{expected:,}  estimated, 4 characters a token, in 19 requests" in told
    assert "mine, distill" in told


def test_plan_knows_how_wide_vectors_are_that_were_never_asked_for(tree):
    with running(EmbeddingServer()) as url:
        tree(url, dimensions=24, tokens_per_minute=1000)
        typed("shard")
        facts = json.loads(typed("plan", "--json"))["facts"]
    rows = facts["counted"]["texts"]
    shards = facts["counted"]["shards"]
    assert facts["extrapolated"]["embed"]["bytes"] == rows * (16 + 2 * 24) + 1100 * shards
    assert "mine" in facts["extrapolated"]
    assert "mine, distill" not in facts["not_planned"]


def test_the_teacher_is_evaluated_and_searched_over_the_api(tree, tmp_path):
    server = EmbeddingServer(key=KEY)
    types = {"text": "clustering", "query": "search_query", "document": "search_document"}
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    documents = sentences(30, seed=3)
    rows = [json.dumps({"_id": f"d{n}", "title": "", "text": t}) for n, t in enumerate(documents)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": documents[4]}))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td4\t1\n")
    with running(server) as url:
        tree(url, input_type=types)
        settings = yaml.safe_load(Path("params.yaml").read_text())
        settings["evaluate"]["retrieval"] = {"mine": "beir"}
        Path("params.yaml").write_text(yaml.safe_dump(settings))
        for words in (["shard"], ["split"], ["embed"]):
            typed(*words)
        told = typed("evaluate", "teacher")
        hits = json.loads(typed("search", sentences(300)[7], "--model", "teacher", "--json"))
    metrics = json.loads(Path("reports/metrics/teacher.json").read_text())
    assert metrics["retrieval.mine.ndcg@10"] == 1
    assert metrics["fidelity.spearman"] > 0.99
    assert not {"sentences_per_second", "device", "parameters", "megabytes"} & set(metrics)
    assert "speed and size: the model is behind an API" in told
    assert hits["facts"]["hits"][0]["row"] == 7
    asked = {body["input_type"]: body["input"] for body in server.bodies}
    assert asked["search_document"][0] in documents
    assert asked["search_query"] == [sentences(300)[7]]


def refused(change):
    return {
        "engine: local": "engine: local, but a server reads the texts: set this_process",
        "windows": "embed.long_texts: windows, but the teacher is behind an API",
        "dim": "embed.dim: 8, but .* by embed.api.dimensions",
        "no url": "embed.api.url: null, but api:a-model is behind an API: name its server",
        "start": "starts.half.from: teacher, but embed.teacher stands for a model behind an API: name",
        "a key": "embed.api.key_env: must be the name of an environment variable",
    }[change]


@pytest.mark.parametrize("change", ["a key", "dim", "engine: local", "no url", "start", "windows"])
def test_check_says_what_cannot_be(tree, change):
    tree(
        None if change == "no url" else "http://host/v1",
        params={
            "engine: local": {"engine": "local"},
            "start": {"starts": {"half": {"from": "teacher", "layers": [0]}}},
        }.get(change, {}),
        embed={"windows": {"long_texts": "windows"}, "dim": {"dim": 8}}.get(change, {}),
        **({"key_env": KEY} if change == "a key" else {}),
    )
    with pytest.raises(SettingsError, match=refused(change)) as error:
        typed("check")
    assert KEY not in str(error.value)


def test_a_box_without_the_key_goes_on_from_the_store(tree, monkeypatch, caplog):
    server = EmbeddingServer(key=KEY)
    with running(server) as url:
        tree(url)
        for words in (["shard"], ["embed"]):
            typed(*words)
    monkeypatch.delenv("MY_KEY")
    before = Path("data/embeddings.json").read_bytes()
    typed("embed")
    assert Path("data/embeddings.json").read_bytes() == before
    assert server.texts == dict.fromkeys(sentences(300), 1)
