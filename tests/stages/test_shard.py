"""Corpus files -> text shards: the ledger balances, rows never shift, equal input gives equal bytes."""

import gzip
import hashlib
import json
import logging
import tracemalloc
import unicodedata
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import shard
from stages.params import ShardParams, larger_shards
from stages.reading.corpus_files import MALFORMED, TOO_LONG, UNDECODABLE
from storage.corpus import Corpus
from storage.errors import DamagedError, TeachonceError
from storage.manifest import Manifest
from storage.store import Store

RULES = (
    "undecodable",
    "malformed",
    "control_characters",
    "empty",
    "too_short",
    "too_long",
    "duplicate",
)


class Place:
    """A work tree with a store."""

    def __init__(self, root):
        self.root, self.store = root, Store(root / "store")
        self.out, self.facts = root / "data/corpus.json", root / "reports/stages/shard.json"

    def run(self, *sources, **changed):
        params = ShardParams(
            **{
                "sources": sources or ("*.txt",),
                "field": "text",
                "rows_per_shard": 16,
                "min_chars": 3,
                "max_chars": 200,
                **changed,
            }
        )
        return shard.run(
            params, root=self.root, store=Store(self.root / "store"), out=self.out, facts=self.facts
        )

    def texts(self):
        corpus = Corpus(self.store, Manifest.load(self.out, "corpus"))
        return [text for number in range(len(corpus.objects)) for text in corpus.texts(number)]

    def ledger(self):
        return json.loads(self.facts.read_text())

    def keys(self):
        return [entry.key for entry in Manifest.load(self.out, "corpus").objects]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def many(count, prefix="text number"):
    return [f"{prefix} {hashlib.sha256(str(n).encode()).hexdigest()[:20]}" for n in range(count)]


def write_lines(path, texts):
    path.write_bytes("".join(f"{text}\n" for text in texts).encode())


def test_each_rule_is_counted_and_the_kept_texts_are_stripped(place):
    lines = [
        b"  a first text \t",
        b"\xff\xfe not UTF-8",
        b"",
        b" \xe2\x80\xa8 ",
        b"ab",
        b"x" * 201,
        b"a first text",
        b"y" * 200,
        b"abc",
        b" abc\r",
    ]
    (place.root / "a.txt").write_bytes(b"\n".join(lines))
    (place.root / "b.jsonl").write_text(
        '{"text": "from JSON"}\n{"text": 3}\n{"text": "\\ud800 half"}\n{"text": "N\\u0000L"}\n'
    )
    outcome = place.run("a.txt", "b.jsonl")
    assert place.texts() == ["a first text", "y" * 200, "abc", "from JSON"]
    rejected = dict(zip(RULES, (2, 1, 1, 2, 1, 1, 2), strict=True))
    assert place.ledger() == {"read": 14, "kept": 4, "rejected": rejected}
    assert outcome.summary == (
        "4 texts in 1 shard (14 read; rejected: 2 undecodable, 1 malformed, 1 control_characters, "
        "2 empty, 1 too_short, 1 too_long, 2 duplicate)"
    )
    assert outcome.facts["shards"] == outcome.facts["shards_new"] == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_control_characters_are_rejected_but_not_white_space_that_texts_are_made_of(place, name):
    """All of category Cc; a carriage return is one unless a line feed follows."""
    codes = [*range(32), 127, *range(128, 160)]
    texts = [f"word {chr(code)} word {code}" for code in codes]
    kept = [f"word {letter} word {code}" for code, letter in ((9, "\t"), (10, "\n"))]
    kept += [
        "two\r\nlines",
        "line\u2028separator",
        "zero\u200bwidth",
        "no\xa0break",
        "\x0cfeed first",
    ]
    texts += kept[2:]
    if name == "a.txt":
        # There it is a line feed that ends a line.
        texts.remove("two\r\nlines")
        texts.remove(kept[1])
        kept = [kept[0], *kept[3:]]
        write_lines(place.root / name, texts)
    elif name == "a.jsonl.gz":
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (place.root / name).write_bytes(gzip.compress(lines.encode()))
    elif name == "a.parquet":
        pq.write_table(pa.table({"text": texts}), place.root / name)
    else:
        table = pa.table({"text": texts})
        with pa.ipc.new_file(place.root / name, table.schema) as writer:
            writer.write_table(table)
    place.run(name)
    assert place.texts() == [text.strip() for text in kept]
    assert place.ledger()["rejected"]["control_characters"] == len(codes) - 2
    assert place.ledger()["kept"] == len(kept)


def test_a_noticeable_loss_is_told_with_its_cure(place, caplog):
    texts = [*many(140), *(f"{text} {'x' * 200}" for text in many(60, "long"))]
    write_lines(place.root / "a.txt", [*texts, *many(100), *[""] * 50])
    outcome = place.run()
    assert caplog.messages == [
        "shard: 60 of 300 texts (20 %) are lost as too_long: raise shard.max_chars (200), or cut the texts "
        "into shorter ones before"
    ]
    assert caplog.records[0].levelname == "WARNING"
    assert outcome.facts["lost"] == {"too_long": 60}
    assert outcome.summary.endswith("60 too_long, 100 duplicate); many are lost: 20 % too_long")


@pytest.mark.parametrize(
    ("line", "rule", "cure"),
    [
        (b"caf\xe9 no %d", "undecodable", "convert the files to UTF-8"),
        (b'{"body": "no %d"}', "malformed", "under the name that shard.field says (text)"),
        (
            b'{"text": "\\u0001no %d"}',
            "control_characters",
            "take these characters out of the texts",
        ),
        (b'{"text": "%d"}', "too_short", "lower shard.min_chars (3), if you want them"),
        (b'{"text": "%0300d"}', "too_long", "raise shard.max_chars (200)"),
    ],
)
def test_each_rule_that_loses_texts_has_a_cure(place, caplog, line, rule, cure):
    kept = [json.dumps({"text": text}).encode() for text in many(6)]
    lines = [*kept, *(line % number for number in range(6))]
    (place.root / "a.jsonl").write_bytes(b"\n".join(lines))
    place.run("a.jsonl")
    (message,) = caplog.messages
    assert message.startswith(f"shard: 6 of 12 texts (50 %) are lost as {rule}: ")
    assert cure in message
    # A handful, or 1 %, is told in the account alone.
    caplog.clear()
    (place.root / "a.jsonl").write_bytes(b"\n".join(lines[:-1]))
    place.run("a.jsonl")
    kept = [json.dumps({"text": text}).encode() for text in many(594)]
    (place.root / "a.jsonl").write_bytes(b"\n".join([*kept, *lines[-6:]]))
    outcome = place.run("a.jsonl")
    assert place.ledger()["rejected"][rule] == 6
    assert (caplog.messages, outcome.facts["lost"]) == ([], {})


def test_nothing_rejected_is_said_shortly(place):
    write_lines(place.root / "a.txt", many(3))
    assert place.run().summary == "3 texts in 1 shard (3 read)"


ODD = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *(
                "",
                " ",
                "\0\0\0",
                "\ufefffeff",
                "a\rb\r",
                "e\u0301e\u0301",
                "éé",
                "\u202eabc",
                "abc",
                " abc ",
            ),
            *(
                "\u2028abc\u2028",
                "a\x85bc",
                "👩‍👩‍👧",
                "Z\u0351\u036b\u0343",
                "x" * 41,
                "\x1cabc\x1c",
            ),
        ]
    ),
)


def expected(texts):
    """The slow version: what stays of `texts`, and under which rule the others go."""
    kept, rejected = [], Counter()
    for text in map(str.strip, texts):
        line_ends_right = "\r" not in text.replace("\r\n", "")
        others = {unicodedata.category(letter) for letter in text if letter not in "\t\n\r"}
        if "Cc" in others or not line_ends_right:
            rejected["control_characters"] += 1
        elif text == "":
            rejected["empty"] += 1
        elif len(text) < 3:
            rejected["too_short"] += 1
        elif len(text) > 40:
            rejected["too_long"] += 1
        elif text in kept:
            rejected["duplicate"] += 1
        else:
            kept.append(text)
    return kept, rejected


@settings(max_examples=60)
@given(texts=st.lists(ODD, max_size=60))
def test_odd_texts_never_shift_a_row_and_the_ledger_balances(tmp_path_factory, texts):
    place = Place(tmp_path_factory.mktemp("odd"))
    (place.root / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    write_lines(place.root / "b.txt", ["a last text"])
    kept, rejected = expected([*texts, "a last text"])
    place.run("a.jsonl", "b.txt", max_chars=40)
    ledger = place.ledger()
    assert place.texts() == kept
    assert Counter(ledger["rejected"]) == rejected
    assert ledger["read"] == ledger["kept"] + sum(ledger["rejected"].values()) == len(texts) + 1


def test_equal_input_gives_equal_bytes_and_writes_no_shard_twice(place):
    write_lines(place.root / "a.txt", many(300))
    first = place.run()
    manifest, ledger = place.out.read_bytes(), place.facts.read_bytes()
    files = {path: path.stat() for path in (place.root / "store/text").iterdir()}
    again = place.run()
    assert (place.out.read_bytes(), place.facts.read_bytes()) == (manifest, ledger)
    assert {path: path.stat() for path in (place.root / "store/text").iterdir()} == files
    assert first.facts["shards_new"] == first.facts["shards"] == len(files) > 5
    assert again.facts["shards_new"] == 0


def test_the_same_texts_from_another_format_are_the_same_corpus(place, tmp_path):
    texts = many(100)
    write_lines(place.root / "a.txt", texts)
    place.run()
    manifest = place.out.read_bytes()
    lines = "".join(json.dumps({"body": text}) + "\r\n" for text in texts)
    (place.root / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    place.run("b.jsonl.gz", field="body")
    assert place.out.read_bytes() == manifest


def test_a_text_added_at_the_front_leaves_most_shards_as_they_are(place):
    texts = many(2000)
    write_lines(place.root / "a.txt", texts)
    place.run()
    before = place.keys()
    write_lines(place.root / "a.txt", ["a new first text", *texts])
    outcome = place.run()
    kept = set(before) & set(place.keys())
    assert len(before) > 60
    assert len(kept) >= 0.9 * len(before)
    assert outcome.facts["shards_new"] == outcome.facts["shards"] - len(kept)
    assert place.texts() == ["a new first text", *texts]


def test_the_manifest_holds_the_recipe_and_no_source(place):
    write_lines(place.root / "a.txt", many(20))
    place.run()
    manifest = Manifest.load(place.out, "corpus")
    assert manifest.parent is None
    assert manifest.recipe == {
        "version": 1,
        "rows_per_shard": 16,
        "min_chars": 3,
        "max_chars": 200,
    }


def test_golden_text_shards(place):
    # If this fails on purpose, every vector made before is of other shards: raise the recipe's version.
    write_lines(place.root / "a.txt", many(40))
    place.run()
    assert [entry.rows for entry in Manifest.load(place.out, "corpus").objects] == GOLDEN_ROWS
    assert place.keys()[0] == GOLDEN_KEY


GOLDEN_ROWS = [15, 4, 6, 4, 11]
GOLDEN_KEY = "text/5466e2834f76e1472283fdc2ea1087b29b4ff9a5.arrow"


@pytest.mark.parametrize(
    ("rows", "shards", "wanted", "then"),
    [
        (2_100_000, 2051, 6000, 350),
        (5_000_000, 4883, 20_000, 250),
        (10**9, 976_563, 3_000_000, 334),
    ],
)
def test_very_many_shards_are_told_with_a_size_that_makes_fewer(rows, shards, wanted, then):
    params = ShardParams(
        sources=("a.txt",), field="text", rows_per_shard=1024, min_chars=1, max_chars=9
    )
    note = larger_shards(params, rows=rows, shards=shards)
    assert note.startswith(f"shard.rows_per_shard: 1024 cuts {rows:,} texts into {shards:,} shards")
    assert f"; {wanted} would make about {then}. Then `embed` copies" in note
    assert larger_shards(params, rows=rows, shards=2000) is None


def test_a_corpus_of_very_many_shards_is_told(place, monkeypatch, caplog):
    monkeypatch.setattr("stages.params.MANY_SHARDS", 1)
    (place.root / "a.txt").write_text("\n".join(f"text {number}" for number in range(300)))
    place.run("a.txt")
    assert "shard: shard.rows_per_shard: " in caplog.text


def test_no_text_left_is_an_error_and_leaves_no_manifest(place):
    write_lines(place.root / "a.txt", ["a", "", "bb"])
    with pytest.raises(TeachonceError) as caught:
        place.run()
    assert str(caught.value) == (
        "shard.sources: no text is left: 3 read; rejected: 1 empty, 2 too_short\n"
        "  cure: name files with texts in params.yaml, or loosen shard.min_chars and shard.max_chars"
    )
    assert not place.out.exists()
    assert not place.facts.exists()


def test_a_truncated_source_leaves_the_old_manifest(place):
    write_lines(place.root / "a.txt", many(20))
    place.run()
    manifest = place.out.read_bytes()
    (place.root / "b.txt.gz").write_bytes(gzip.compress("\n".join(many(90, "other")).encode())[:-9])
    with pytest.raises(TeachonceError, match=r"b\.txt\.gz: truncated"):
        place.run("a.txt", "b.txt.gz")
    assert place.out.read_bytes() == manifest


def test_a_damaged_shard_that_is_there_is_not_taken_for_done(place):
    write_lines(place.root / "a.txt", many(20))
    place.run()
    path = place.store.path(place.keys()[0])
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[content.index(b"text number") + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="its values are not those that were written"):
        place.run()


def test_an_item_lost_on_the_way_is_a_bug_and_not_a_smaller_corpus(place, monkeypatch):
    def forgetful(items, params, rejected, role, seen):
        return (text for n, text in enumerate(items) if n != 5)

    monkeypatch.setattr(shard, "clean", forgetful)
    write_lines(place.root / "a.txt", many(20))
    with pytest.raises(RuntimeError, match="20 items read, but 19 kept"):
        place.run()


def test_rejections_of_the_reader_keep_their_names():
    params = ShardParams(sources=("a",), field="t", rows_per_shard=16, min_chars=1, max_chars=9)
    rejected = Counter()
    kept = list(shard.clean([MALFORMED, "a", UNDECODABLE, "a", TOO_LONG, "b"], params, rejected))
    assert kept == ["a", "b"]
    assert rejected == {"malformed": 1, "undecodable": 1, "too_long": 1, "duplicate": 1}


@settings(max_examples=30)
@given(numbers=st.lists(st.integers(0, 5000), max_size=3000))
def test_keys_are_a_set(numbers):
    # Few distinct beginnings, so that many keys want the same slot.
    keys = [bytes([n % 7]) * 8 + n.to_bytes(8, "little") for n in numbers]
    keys = [key for key in keys if any(key)]
    table, known = shard.TextKeySet(), set()
    for key in keys:
        assert table.add(key) == (key not in known)
        known.add(key)


def test_keys_take_at_most_43_bytes_each_when_grown():
    keys = [
        hashlib.blake2b(n.to_bytes(4, "little"), digest_size=16).digest() for n in range(50_000)
    ]
    tracemalloc.start()
    table = shard.TextKeySet()
    assert all(table.add(key) for key in keys)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not any(table.add(key) for key in keys)
    assert held < 43 * len(keys)
    assert peak < 66 * len(keys)


def test_a_long_run_says_how_far_it_is(place, monkeypatch, caplog):
    monkeypatch.setattr(shard, "SECONDS_BETWEEN_LINES", 0.0)
    write_lines(place.root / "a.txt", many(2500))
    with caplog.at_level(logging.INFO, logger="teachonce"):
        place.run()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[1].startswith("shard: 2,048 texts so far, ")
