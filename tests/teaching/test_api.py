"""A teacher behind an API, against a real server on this machine that can be told to misbehave."""

import logging
import os
import re
import signal
import socket
import threading
from contextlib import closing, contextmanager
from email.utils import formatdate

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from stages import embed
from stages.embed import FailedShardsError
from stages.params import ApiParams
from stages.teaching.api import ApiTeacher, ReadAs
from stages.teaching.api_budget import BudgetError, Purse
from stages.teaching.api_pace import Pace
from stages.teaching.api_server import ATTEMPTS, LONGEST_WAIT, Server, endpoint, key_in
from stages.teaching.api_texts import TextCounter
from stages.teaching.drift import DriftedTeacherError
from stages.teaching.interface import StoppedTeacherError
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.journal import Journal, Ledger
from storage.manifest import fingerprint
from tests.conftest import embed_params, sentences
from tests.embedding_server import (
    EmbeddingServer,
    cuts,
    floats,
    refuses,
    reversed_order,
    running,
    sends,
    tokens_of,
    with_vector,
    without_one,
)

KEY = "sk-very-secret-0123456789/+="
FILES = {"api": "a-model"}


def api_params(**changes):
    """As the shipped ones, but for the address."""
    return {
        "url": None,
        "key_env": None,
        "dimensions": None,
        "input_type": {"text": None, "query": None, "document": None},
        "tokenizer": None,
        "batch_texts": 16,
        "concurrency": 4,
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "price_per_million_tokens": None,
        "budget": None,
        "timeout": 1000,  # more than all sleepers together move the clock
    } | changes


class Time:
    """A clock that moves only when somebody sleeps."""

    def __init__(self, now=1_000_000.0):
        self.now, self.slept, self.lock = now, [], threading.Lock()

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        with self.lock:
            self.slept.append(seconds)
            self.now += seconds


def words_tokenizer():
    """A word is a token, as the server counts."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@contextmanager
def behind(server, place, *, time=None, tokenizer=None, max_tokens=512, environment=(), **changes):
    """Yields what embeds a corpus with the teacher behind a server; each call is a run of its own."""
    time = time or Time()
    with running(server) as url:
        params = embed_params(
            teacher="api:a-model", max_tokens=max_tokens, api=api_params(url=url) | changes
        )
        teacher = fingerprint(embed.recipe(params, FILES))

        def run(corpus, **where):
            journal = Journal(place.store.root)

            def load():
                api = params.api
                ledger = Ledger(place.store.root, "a-model")
                purse = Purse(ledger, price=api.price_per_million_tokens, budget=api.budget)
                asked = Server(
                    "a-model",
                    api,
                    purse,
                    environment=dict(environment),
                    clock=time,
                    sleep=time.sleep,
                    now=time,
                    draw=lambda: 1.0,
                )
                counter = TextCounter(tokenizer, max_tokens)
                read_as = ReadAs(teacher, params.prompts.of("text"), api.input_type.text)
                return ApiTeacher(asked, counter, {"text": read_as}, journal)

            return place.embed(
                corpus,
                load,
                files=FILES,
                params=params,
                journal=journal,
                engine=embed.this_process,
                **where,
            )

        run.params, run.teacher, run.time = params, teacher, time
        yield run


def vectors_in(place, corpus):
    return Embeddings(place.store, place.embeddings, corpus).rows_of(np.arange(corpus.rows))


def test_vectors_are_the_servers_row_by_row(place):
    texts = sentences(100)
    corpus, server = place.corpus(texts), EmbeddingServer()
    with behind(server, place) as run:
        outcome = run(corpus)
    expected = np.stack([server.vector(text) for text in texts])
    assert np.array_equal(vectors_in(place, corpus), expected)
    assert server.texts == dict.fromkeys(texts, 1)
    assert outcome.facts["tokens"] == sum(map(tokens_of, texts))
    assert (outcome.facts["truncated"], server.probes) == (0, 1)
    assert not list((place.root / "store" / "journal").glob("*/*"))


def test_the_address_is_no_part_of_the_identity_and_what_is_asked_for_is():
    api = api_params(url="http://a/v1")
    name = embed.recipe(embed_params(teacher="api:m", api=api), {"api": "m"})
    for speed_only in (
        {"url": "https://b/v1", "key_env": "A_KEY", "batch_texts": 3, "concurrency": 9},
        {"price_per_million_tokens": 1.0, "budget": 3, "timeout": 1, "requests_per_minute": 6},
    ):
        params = embed_params(teacher="api:m", api=api | speed_only)
        assert embed.recipe(params, {"api": "m"}) == name
    for changes in (
        {"dimensions": 8},
        {"input_type": {"text": "clustering", "query": None, "document": None}},
        {"tokenizer": "a/b"},
    ):
        params = embed_params(teacher="api:m", api=api | changes)
        assert embed.recipe(params, {"api": "m"}) != name
    assert "http" not in str(name)


def test_a_request_says_dimensions_input_type_and_prompt(place):
    server = EmbeddingServer()
    types = {"text": "search_document", "query": None, "document": None}
    corpus = place.corpus(sentences(20))
    with behind(server, place, dimensions=8, input_type=types) as run:
        run(corpus)
    assert {(body["dimensions"], body["input_type"], body["model"]) for body in server.bodies} == {
        (8, "search_document", "a-model")
    }
    assert vectors_in(place, corpus).shape == (20, 8)


MISDEEDS = {
    "busy": refuses(503),
    "slow down": refuses(429, Retry_After="7"),
    "cut": cuts,
    "out of order": sends(reversed_order),
    "floats": sends(floats),
    "too few": sends(without_one),
    "NaN": sends(lambda reply: with_vector(floats(reply), 0, [float("nan")] * 16)),
    "null": sends(lambda reply: with_vector(floats(reply), 0, [None] * 16)),
    "a shorter vector": sends(lambda reply: with_vector(floats(reply), 0, [1.0] * 3)),
    "no JSON": lambda handler, _: handler.send(200, b"<html>hello"),
    "an error as an answer": lambda handler, _: handler.send(200, {"error": {"message": "oh"}}),
}


@pytest.mark.parametrize("value", [float("nan"), None, 0.0], ids=["NaN", "null", "zeros"])
def test_a_text_without_a_vector_is_refused_by_its_row_and_asked_for_twice(place, value):
    texts = sentences(40)
    corpus, server = place.corpus(texts), EmbeddingServer(encodings=("float",))
    plain = server.answer

    def answer(asked):
        status, reply = plain(asked)
        if status == 200 and texts[21] in asked["input"]:
            reply = with_vector(reply, asked["input"].index(texts[21]), [value] * 16)
        return status, reply

    server.answer = answer
    with (
        behind(server, place) as run,
        pytest.raises(
            FailedShardsError, match=r"1 texts are refused: row 21 .*NaN, null, infinity"
        ),
    ):
        run(corpus)
    assert server.texts == dict.fromkeys(texts, 1) | {texts[21]: 2}


@pytest.mark.parametrize("misdeed", sorted(MISDEEDS))
def test_what_passes_is_borne_and_each_vector_is_its_texts(place, misdeed):
    texts = sentences(64)
    corpus, server = place.corpus(texts), EmbeddingServer()
    server.misbehave.extend([None, MISDEEDS[misdeed]])
    with behind(server, place) as run:
        run(corpus)
    expected = np.stack([server.vector(text) for text in texts])
    assert np.array_equal(vectors_in(place, corpus), expected)


def test_a_retry_after_is_waited_for_whether_seconds_or_a_date(place):
    server, time = EmbeddingServer(), Time()
    date = formatdate(time.now + 7 + 30, usegmt=True)
    server.misbehave.extend([refuses(429, Retry_After="7"), refuses(503, Retry_After=date)])
    with behind(server, place, time=time, concurrency=1) as run:
        run(place.corpus(sentences(8)))
    assert time.slept == pytest.approx([7, 30], abs=1.1)  # a date has whole seconds
    assert (server.requests, server.probes) == (4, 1)


def test_waits_double_up_to_a_bound_and_end(place):
    server, time = EmbeddingServer(), Time()
    server.misbehave.extend([refuses(500)] * ATTEMPTS)
    with (
        behind(server, place, time=time, concurrency=1) as run,
        pytest.raises(StoppedTeacherError, match=r"fails \(500: busy\), 8 times in a row") as error,
    ):
        run(place.corpus(sentences(8)))
    assert time.slept == [1, 2, 4, 8, 16, 32, LONGEST_WAIT]
    assert "run `teachonce embed` again: what was answered is kept" in error.value.cure


def test_a_server_that_asks_to_wait_for_hours_ends_the_run(place):
    server = EmbeddingServer()
    server.misbehave.append(refuses(429, Retry_After="86400"))
    with (
        behind(server, place) as run,
        pytest.raises(StoppedTeacherError, match=r"wait for 86,400 s"),
    ):
        run(place.corpus(sentences(8)))


def test_a_server_that_is_not_there_is_said(place):
    with socket.socket() as taken:  # a port at which nobody listens, and no other process will
        taken.bind(("127.0.0.1", 0))
        with (
            behind(
                EmbeddingServer(), place, url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
            ) as run,
            pytest.raises(
                StoppedTeacherError, match=r"cannot be reached .*refused.*8 times in a row"
            ),
        ):
            run(place.corpus(sentences(8)))


def test_an_answer_that_does_not_end_is_given_up(place):
    server, texts, hung_up = EmbeddingServer(), sentences(8), threading.Event()

    def hangs(handler, _):
        if not handler.rfile.read(1):  # the end: the other side closed the connection
            hung_up.set()

    server.misbehave.append(hangs)
    # On a slow machine other answers may be given up, too, and asked for again.
    with behind(server, place, timeout=1.0, concurrency=1) as run:
        run(place.corpus(texts))
    assert hung_up.wait(60)
    assert set(server.texts) == set(texts)


WHOLE_REFUSALS = {
    (401, "Incorrect API key"): "refuses the key .401: .*put a key of this server into",
    (403, "no access"): "does not let this key use the model .403",
    (
        404,
        "no such model",
    ): "knows no such model or address .404: no such model.*ends in /v1.*a-model",
    (
        400,
        "dimensions is not supported",
    ): "refuses the request .400: dimensions .*embed.api.dimensions",
    (402, "pay"): "has no credit left",
    (301, "moved"): "sends one elsewhere",
}


@pytest.mark.parametrize("status, said", sorted(WHOLE_REFUSALS))
def test_what_a_person_must_mend_is_asked_once_and_said_with_a_cure(place, status, said):
    server = EmbeddingServer()
    server.answer = lambda asked: (status, {"error": {"message": said}})
    with (
        behind(server, place, key_env="A_KEY", environment={"A_KEY": KEY}) as run,
        pytest.raises(StoppedTeacherError) as error,
    ):
        run(place.corpus(sentences(8)))
    assert re.search(WHOLE_REFUSALS[status, said], str(error.value), re.DOTALL)
    assert server.requests == 1


def test_an_empty_account_is_not_asked_again(place):
    server = EmbeddingServer()
    said = "You exceeded your quota. " * 20  # more than a message shows
    server.misbehave.append(
        refuses(429, {"error": {"message": said, "code": "insufficient_quota"}})
    )
    with (
        behind(server, place, concurrency=1) as run,
        pytest.raises(StoppedTeacherError, match=r"has no credit left .*You exceeded your quota"),
    ):
        run(place.corpus(sentences(8)))
    assert server.requests == 2


def test_a_request_of_too_many_texts_is_halved_and_the_next_are_smaller(place):
    texts = sentences(64)
    corpus, server = place.corpus(texts, rows_per_shard=64), EmbeddingServer(most_texts=3)
    with behind(server, place, batch_texts=12, concurrency=1) as run:
        run(corpus)
    expected = np.stack([server.vector(text) for text in texts])
    assert np.array_equal(vectors_in(place, corpus), expected)
    assert max(server.texts.values()) == 1
    sizes = [len(body["input"]) for body in server.bodies if len(body["input"]) != 16]
    assert sum(size > 3 for size in sizes) <= 5  # the probe texts 8, 8, ...; then none


def long_text(words):
    return " ".join(sentences(1)[0].split(" ")[:1] * words)


def test_a_text_that_the_server_refuses_is_named_and_the_others_are_kept(place):
    texts = [*sentences(30), long_text(300), *sentences(30, seed=9)]
    corpus, server = place.corpus(texts), EmbeddingServer(most_tokens=200)
    with behind(server, place) as run:
        with pytest.raises(FailedShardsError) as error:
            run(corpus)
        assert re.search(
            r"1 texts are refused: row 30 \(\w+( \w+)+…?\): the server|row 30 .*refuses this text "
            r"\(400: maximum context length is 200 tokens, got 300\)",
            str(error.value),
        )
        assert "embed.api.tokenizer" in error.value.cure
        before = server.texts.copy()
        with pytest.raises(FailedShardsError):
            run(corpus)
    assert server.texts == before


def test_a_text_that_the_server_may_have_cut_is_refused_and_not_paid_for_again(place):
    texts = [*sentences(20), long_text(80)]
    corpus, server = place.corpus(texts), EmbeddingServer(most_tokens=50, truncates=True)
    with behind(server, place, max_tokens=50) as run:
        for _ in range(2):
            with pytest.raises(
                FailedShardsError, match=r"row 20 .*counts 50 tokens, and embed.max_tokens is 50"
            ):
                run(corpus)
    assert server.texts[texts[20]] == 1
    assert len(place.store.keys(f"vectors/{run.teacher}")) == len(
        corpus.objects
    )  # probe texts, too


def test_a_tokenizer_cuts_what_is_longer(place):
    texts = [*sentences(20), long_text(300)]
    corpus, server = place.corpus(texts), EmbeddingServer(most_tokens=60)
    with behind(server, place, tokenizer=words_tokenizer(), max_tokens=60) as run:
        outcome = run(corpus)
    assert outcome.facts["truncated"] == 1
    assert np.array_equal(vectors_in(place, corpus)[20], server.vector(long_text(60)))
    assert max(map(tokens_of, server.texts)) == 60


def test_a_server_that_reads_less_than_the_tokenizer_counts_is_found_out(place):
    server = EmbeddingServer(most_tokens=30, truncates=True)
    with (
        behind(server, place, tokenizer=words_tokenizer(), max_tokens=60) as run,
        pytest.raises(
            StoppedTeacherError, match=r"counts \d+ tokens in 16 texts of which .* read \d+"
        ),
    ):
        run(place.corpus(sentences(20)))
    assert not server.texts


def test_a_text_that_has_no_token_for_the_tokenizer_is_embedded_like_others(place):
    tokenizer = words_tokenizer()
    tokenizer.normalizer = normalizers.Replace("mute", "")
    texts = ["mute mute", *sentences(3)]
    corpus, server = place.corpus(texts), EmbeddingServer()
    with behind(server, place, tokenizer=tokenizer, batch_texts=1) as run:
        run(corpus)
    assert np.array_equal(vectors_in(place, corpus)[0], server.vector("mute mute"))


def test_a_server_without_base64_is_asked_for_lists(place):
    texts = sentences(30)
    corpus, server = place.corpus(texts), EmbeddingServer(encodings=("float",))
    with behind(server, place) as run:
        run(corpus)
    assert np.array_equal(
        vectors_in(place, corpus), np.stack([server.vector(text) for text in texts])
    )


def test_a_model_that_has_changed_behind_its_name_is_found_before_anything_is_asked(place):
    corpus, server = place.corpus(sentences(100)), EmbeddingServer()
    server.misbehave.extend([None] * 5 + [refuses(401)])
    with behind(server, place, concurrency=1) as run:
        with pytest.raises(StoppedTeacherError):
            run(corpus)
        before = server.texts.copy()
        server.teacher = type(server.teacher)(16, scale=-1.0)
        with pytest.raises(DriftedTeacherError, match="another model behind the same name"):
            run(corpus)
    assert server.texts == before


def test_vectors_of_another_width_end_the_run(place):
    server = EmbeddingServer()
    server.misbehave.append(
        sends(lambda r: r | {"data": [e | {"embedding": [0.5] * 8} for e in r["data"]]})
    )
    with (
        behind(server, place) as run,
        pytest.raises(StoppedTeacherError, match=r"8 values, after some of 16"),
    ):
        run(place.corpus(sentences(8)))


def test_dimensions_that_the_server_ignores_are_said(place):
    server = EmbeddingServer(dim=16)
    plain = server.answer
    server.answer = lambda asked: plain({k: v for k, v in asked.items() if k != "dimensions"})
    with (
        behind(server, place, dimensions=8) as run,
        pytest.raises(
            StoppedTeacherError, match=r"embed.api.dimensions: 8, but .* vectors of 16 values"
        ),
    ):
        run(place.corpus(sentences(8)))


def test_a_run_that_was_stopped_asks_only_for_what_is_missing_also_cut_otherwise(place):
    texts = sentences(200)
    server = EmbeddingServer()
    server.misbehave.extend([None] * 6 + [refuses(401)])
    with behind(server, place, concurrency=1) as run:
        with pytest.raises(StoppedTeacherError):
            run(place.corpus(texts, rows_per_shard=400))  # in shards of more than 96 texts
        paid = server.texts.copy()
        assert sum(paid.values()) == 6 * 16
        # Another corpus: other shards, another order.
        corpus = place.corpus(texts[::-1], rows_per_shard=32)
        run(corpus)
    assert server.texts == dict.fromkeys(texts, 1)
    assert np.array_equal(
        vectors_in(place, corpus), np.stack([server.vector(text) for text in texts[::-1]])
    )
    assert not list((place.root / "store" / "journal").glob("*/*"))


def test_the_journal_holds_the_answers_of_unfinished_shards_alone(place, monkeypatch):
    monkeypatch.setattr("storage.journal.FILE_BYTES", 0)  # a file for each answer
    server, held = EmbeddingServer(), []

    def counts(handler, reply):
        held.append(len(list((place.root / "store" / "journal").glob("*/*"))))
        handler.send(200, reply)

    corpus = place.corpus(sentences(1000), rows_per_shard=32)
    server.misbehave.extend([counts] * 100)
    with behind(server, place, concurrency=1) as run:
        run(corpus)
    most = max(entry.rows for entry in corpus.objects) // 16 + 1  # requests of a shard
    assert len(held) > 8 * most
    assert 0 < max(held) <= 3 * most  # one is published while two are asked for


def test_a_run_stops_before_the_budget_and_over_all_runs(place, caplog):
    caplog.set_level(logging.INFO, "teachonce")
    texts = sentences(400)
    corpus, server = place.corpus(texts), EmbeddingServer()
    total = sum(map(tokens_of, texts))
    priced = {"price_per_million_tokens": 1e6, "budget": total // 2}  # a token costs 1
    with behind(server, place, **priced) as run:
        for _ in range(3):
            with pytest.raises(
                BudgetError, match=r"of which [\d.]+ is spent .* tokens in all runs .* is left"
            ):
                run(corpus)
    assert total // 2 - 600 < server.tokens <= total // 2
    assert max(server.texts.values()) == 1
    spent = Ledger(place.store.root, "a-model").total()
    assert spent == server.tokens
    assert f"{total // 2 - spent:.4f} of the budget is left" in caplog.text
    with behind(server, place, **priced | {"budget": 10 * total}) as run:
        run(corpus)
    assert server.texts == dict.fromkeys(texts, 1)


def test_a_teacher_that_is_closed_after_an_interrupt_asks_nothing_more(place):
    server = EmbeddingServer()
    with running(server) as url:
        purse = Purse(Ledger(place.store.root, "a-model"), price=None, budget=None)
        asked = Server("a-model", ApiParams(**api_params(url=url, concurrency=1)), purse)

        def interrupts(handler, reply):
            os.kill(os.getpid(), signal.SIGINT)
            asked._closing.wait(60)  # the next one would be asked after this answer
            handler.send(200, reply)

        server.misbehave.append(interrupts)
        roles = {"text": ReadAs("0" * 40, "", None)}
        before = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's `&` ignores it
        with (
            pytest.raises(KeyboardInterrupt),
            closing(ApiTeacher(asked, TextCounter(None, 512), roles, None)) as teacher,
        ):
            teacher.encode(sentences(64))
        signal.signal(signal.SIGINT, before)
    assert server.requests == 1


def test_answers_that_were_cut_count_as_paid(place):
    server = EmbeddingServer()
    server.misbehave.append(cuts)
    with behind(server, place, price_per_million_tokens=1.0, budget=1.0) as run:
        run(place.corpus(sentences(8)))
    assert Ledger(place.store.root, "a-model").total() > server.tokens


@pytest.mark.parametrize(
    "limits, seconds",
    [({"requests_per_minute": 60.0}, 6), ({"tokens_per_minute": 600.0}, None)],
    ids=["requests", "tokens"],
)
def test_limits_of_a_minute_are_kept(place, limits, seconds):
    server, time, texts = EmbeddingServer(), Time(), sentences(96)
    with behind(server, place, time=time, **limits) as run:
        started = time.now
        run(place.corpus(texts, rows_per_shard=96))
    took = time.now - started
    if seconds is not None:
        assert took >= seconds
    else:
        assert took >= (sum(map(tokens_of, texts)) - 200) / 10


def test_a_pace_spreads_requests_and_learns_what_they_took():
    time = Time(0.0)
    pace = Pace(None, 60.0, time, time.sleep)
    pace.wait(30)
    pace.wait(1)
    assert time.now == 30
    pace.correct(-1)
    pace.wait(1)
    assert time.now == 30
    pace.pause(5)
    pace.wait(1)
    assert time.now == 35


def test_so_many_requests_are_under_way_at_once(place):
    server = EmbeddingServer()
    together = threading.Barrier(3, timeout=60)

    def meets(handler, reply):
        together.wait()
        handler.send(200, reply)

    server.misbehave.extend([meets] * 3)
    with behind(server, place, concurrency=3) as run:
        run(place.corpus(sentences(48), rows_per_shard=64))
    assert server.most_at_once == 3


def test_the_key_is_shown_nowhere_even_if_the_server_echoes_it(place, caplog):
    caplog.set_level(logging.DEBUG)
    server = EmbeddingServer(key="another")
    with (
        behind(server, place, key_env="A_KEY", environment={"A_KEY": KEY}) as run,
        pytest.raises(StoppedTeacherError) as error,
    ):
        run(place.corpus(sentences(8)))
    assert "Incorrect API key provided: Bearer ***." in str(error.value)
    assert "$A_KEY" in error.value.cure
    assert KEY not in caplog.text + str(error.value) + repr(vars(error.value))


def test_no_part_of_the_key_is_shown_of_a_long_answer(place):
    server = EmbeddingServer()
    server.misbehave.extend([sends(lambda _: b"<" * 70 + KEY.encode())] * 3)
    key = {"key_env": "A_KEY", "environment": {"A_KEY": KEY}}
    with (
        behind(server, place, concurrency=1, **key) as run,
        pytest.raises(StoppedTeacherError, match=r"no JSON: <+\*\*\*") as error,
    ):
        run(place.corpus(sentences(8)))
    assert KEY[:5] not in str(error.value)


def test_a_key_that_is_missing_or_is_none_is_said_without_it():
    assert key_in({"A": f" {KEY}\n"}, "A") == KEY
    assert key_in({}, None) is None
    with pytest.raises(TeachonceError, match=r"\$A is not set"):
        key_in({"A": " "}, "A")
    for wrong in ("two words", "schlüssel", "a\x07b"):
        with pytest.raises(TeachonceError, match="is no key") as error:
            key_in({"A": wrong}, "A")
        assert wrong not in str(error.value)


def test_the_address_of_requests():
    assert endpoint("https://host/v1/") == "https://host/v1/embeddings"
    azure = "https://host/openai/deployments/d/embeddings?api-version=2024-10-21"
    assert endpoint(azure) == azure


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"url": "https://user:secret@host/v1"}, "an address with a name or a password"),
        ({"url": "https://host/v1?key=secret"}, "more than api-version"),
        ({"url": "ftp://secret/"}, "no address of a server"),
        ({"url": "https://host:secret/v1"}, "no address of a server"),
        ({"key_env": "sk-secret"}, "pattern"),
        ({"budget": 3.0}, "write price_per_million_tokens beside it"),
    ],
)
def test_settings_that_cannot_be_meant(change, problem):
    with pytest.raises(ValueError, match=problem):
        ApiParams.model_validate(api_params() | change)


def test_a_server_that_counts_characters_is_found_out_and_tokens_are_estimated(place, caplog):
    texts = sentences(40)
    corpus, server = place.corpus(texts), EmbeddingServer()
    plain = server.answer

    def answer(asked):
        status, reply = plain(asked)
        characters = sum(len(text.strip()) for text in asked["input"])
        return status, reply | {"usage": {"total_tokens": characters}}

    server.answer = answer
    with behind(server, place, max_tokens=60) as run:
        outcome = run(corpus)
    assert "counts characters, not tokens" in caplog.text
    assert outcome.facts["tokens"] == sum(-(-len(text) // 4) for text in texts)
