"""Nasty texts through every reader: kept to the letter, or rejected by a named rule; nobody else moves."""

import gzip
import json
import unicodedata
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages import shard
from stages.params import ShardParams
from stages.reading.lines import MAX_LINE_BYTES
from storage.corpus import Corpus
from storage.manifest import Manifest
from storage.store import Store

LONGEST = 20_000_000

# Texts that UTF-8 can hold; what is left of each after stripping must come back to the letter.
TEXTS = {
    "NUL inside": "a\0b",
    "NUL only": "\0",
    "byte order mark": "\ufeffa",
    "byte order mark twice": "\ufeff\ufeffa",
    "byte order mark inside": "a\ufeffb",
    "byte order mark only": "\ufeff",
    "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b",
    "next line": "a\x85b",
    "vertical tab": "a\x0bb",
    "form feed": "a\x0cb",
    "file, group, record, unit separators": "a\x1cb\x1dc\x1ed\x1fe",
    "lone carriage return": "a\rb",
    "tab": "a\tb",
    "escape sequence": "a\x1b[31mb\x1b]0;title\x07",
    "backspace and delete": "a\x08\x7fb",
    "spaces around": "  a b  ",
    "spaces of other kinds around": "\u3000\u2003\xa0a\u205f",
    "spaces only": "   ",
    "spaces of other kinds only": "\u3000\u2003\xa0\u205f\u1680",
    "empty": "",
    "zero width space": "a\u200bb",
    "zero width space only": "\u200b",
    "zero width joiner family": "👩\u200d👩\u200d👧\u200d👦 family",
    "flags": "🇪🇺🇯🇵 flags",
    "skin tones": "👍🏽👍🏿",
    "variation selectors": "☺\ufe0f ☺\ufe0e",
    "right to left": "שלום עולם",
    "right to left override": "a\u202edcb\u202c",
    "isolates": "\u2066a\u2069 b",
    "arabic": "السلام عليكم",
    "devanagari": "नमस्ते दुनिया",
    "thai": "สวัสดีชาวโลก",
    "han": "漢字と仮名",
    "hangul": "한국어 문장",
    "hangul in letters": unicodedata.normalize("NFD", "한국어"),
    "composed": unicodedata.normalize("NFC", "Ångström café"),
    "decomposed": unicodedata.normalize("NFD", "Ångström café"),
    "compatibility": "ﬁ ½ ² Å",
    "many combining marks": "Z" + "\u0300\u0301\u0302\u0303" * 300,
    "combining mark first": "\u0301a",
    "private use": "\ue000\uf8ff",
    "noncharacters": "\uffff\ufffe\ufdd0",
    "replacement character": "\ufffd",
    "last code point": "\U0010ffff",
    "tag characters": "\U000e0041\U000e0042",
    "mathematical letters": "\U0001d49c\U0001d505\u2102",
    "dotless and dotted i": "\u0131\u0130iI",
    "sharp s": "straße STRASSE ẞ",
    "quotes and backslashes": "\"a\" 'b' \\n \\u0041 \\",
    "JSON inside": '{"text": "inner"}',
    "JSON null": "null",
    "markup": "<script>alert(1)</script>&amp;<!--",
    "template": "{{ 7*7 }} ${HOME} $(id) `id`",
    "formula": "=cmd|' /C calc'!A0",
    "path": "../../etc/passwd",
    "SQL": "'; DROP TABLE texts; --",
    "percent": "%s %n %00 %0a",
    "number": "1e400",
    "not a number": "NaN",
    "special tokens": "[CLS] [SEP] <s> </s> <|endoftext|>",
    "one letter": "a",
    "million letters": "a" * 1_000_000,
    "megabytes of words": "long word " * 300_000 + "end",
    "one long word of two bytes": "é" * 500_000,
}
assert len(TEXTS) >= 60

# Lines of a text file that are no text, or no line of their own.
ODD_LINES = {
    "0xff": b"\xff",
    "lone continuation": b"a\x80b",
    "overlong slash": b"\xc0\xaf",
    "overlong NUL": b"\xe0\x80\x80",
    "surrogate in UTF-8": b"\xed\xa0\x80",
    "above the last code point": b"\xf4\x90\x80\x80",
    "five bytes": b"\xf8\x88\x80\x80\x80",
    "cut sequence": b"\xe2\x82",
    "latin-1": "café".encode("latin-1"),
    "UTF-16": "ab".encode("utf-16"),
}
ODD_JSON = {
    "half a surrogate pair": (b'{"text": "a\\ud800b"}', "undecodable"),
    "the other half": (b'{"text": "\\udc00"}', "undecodable"),
    "no UTF-8 in JSON": (b'{"text": "\xff"}', "undecodable"),
    "null": (b'{"text": null}', "malformed"),
    "number": (b'{"text": 1}', "malformed"),
    "not a number": (b'{"text": NaN}', "malformed"),
    "list": (b'{"text": ["a"]}', "malformed"),
    "mapping": (b'{"text": {"text": "a"}}', "malformed"),
    "boolean": (b'{"text": true}', "malformed"),
    "no field": (b'{"other": "a"}', "malformed"),
    "other case": (b'{"Text": "a"}', "malformed"),
    "no mapping": (b'["text", "a"]', "malformed"),
    "a string": (b'"text"', "malformed"),
    "two values": (b'{"text": "a"} {"text": "b"}', "malformed"),
    "cut": (b'{"text": "a', "malformed"),
    "single quotes": (b"{'text': 'a'}", "malformed"),
    "trailing comma": (b'{"text": "a",}', "malformed"),
    "deep": (b"[" * 100_000, "malformed"),
    "deep and right": (
        b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "malformed",
    ),
    "many digits": (b'{"text": ' + b"9" * 5000 + b"}", "malformed"),
    "raw control character": (b'{"text": "a\tb"}', "malformed"),
}

BEFORE, AFTER = "the text before", "the text after"


def rule_of(text, seen):
    """None if a text is kept, or the rule that it breaks: a slow and simple copy of the stage's."""
    text = text.strip()
    control = (c for c in text if unicodedata.category(c) == "Cc" and c not in "\t\n\r")
    if any(control) or "\r" in text.replace("\r\n", ""):
        return "control_characters"
    if not text:
        return "empty"
    if len(text) > LONGEST:
        return "too_long"
    return "duplicate" if text in seen else None


def run(root, name):
    """The ledger and the texts that `shard` makes of one file."""
    params = ShardParams(
        sources=(name,), field="text", rows_per_shard=16, min_chars=1, max_chars=LONGEST
    )
    store = Store(root / "store")
    out, facts = root / "corpus.json", root / "facts.json"
    shard.run(params, root=root, store=store, out=out, facts=facts)
    corpus = Corpus(Store(root / "store"), Manifest.load(out, "corpus"))
    texts = [text for number in range(len(corpus.objects)) for text in corpus.texts(number)]
    ledger = json.loads(facts.read_bytes())
    assert ledger["read"] == ledger["kept"] + sum(ledger["rejected"].values())
    assert ledger["kept"] == len(texts)
    return {rule: count for rule, count in ledger["rejected"].items() if count}, texts


def as_lines(texts, ending, parse):
    content = b"".join(parse(text) + b"\n" for text in texts)
    if ending == "gz":
        return gzip.compress(content)
    return zstandard.ZstdCompressor().compress(content) if ending == "zst" else content


def write(path, texts):
    """A corpus file of the kind that the name says."""
    name = path.name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=7)
    elif name.endswith("arrow"):
        kind = {"large": pa.large_string(), "view": pa.string_view()}.get(name[:-6], pa.string())
        column = pa.array(texts, kind)
        if name.startswith("dictionary"):
            column = column.dictionary_encode()
        make = pa.ipc.new_stream if name.startswith("stream") else pa.ipc.new_file
        table = pa.table({"n": range(len(texts)), "text": column})
        with make(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_bytes(
            as_lines(
                texts,
                name.rpartition(".")[2],
                json_line if "jsonl" in name else str.encode,
            )
        )


def json_line(text):
    return json.dumps({"n": 1, "text": text}, ensure_ascii=len(text) % 2 == 0).encode()


FILES = [
    "a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet",
    "a.arrow", "large.arrow", "view.arrow", "dictionary.arrow", "stream.arrow",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_each_text_alone_and_all_together(tmp_path, name, count):
    for text in TEXTS.values():
        check(tmp_path, name, [BEFORE, text, AFTER])
    check(tmp_path, name, [BEFORE, *TEXTS.values(), *reversed(TEXTS.values()), AFTER])
    never = "changed, dropped without a rule, or moved another"
    count("nasty texts through every kind of file", 3 * len(TEXTS), never)


def check(root, name, texts):
    write(root / name, texts)
    kept, rejected = [], Counter()
    for number, text in enumerate(texts):
        if name.startswith("a.txt"):
            # The first mark of a file says how it is encoded, and one carriage return is a line's end.
            text = text.removeprefix("\ufeff") if number == 0 else text
            text = text.removesuffix("\r")
        rule = rule_of(text, kept)
        if rule is None:
            kept.append(text.strip())
        else:
            rejected[rule] += 1
    found, made = run(root, name)
    assert made == kept
    assert found == rejected


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "txt.zst"])
def test_lines_that_are_no_text(tmp_path, ending, count):
    for wrong in ODD_LINES.values():
        lines = [BEFORE.encode(), wrong, AFTER.encode(), wrong]
        path = tmp_path / f"a.{ending}"
        path.write_bytes(as_lines(lines, ending.rpartition(".")[2], bytes))
        # UTF-16 has a line feed of two bytes only if there is one in the text.
        assert run(tmp_path, path.name) == ({"undecodable": 2}, [BEFORE, AFTER]), wrong
    count("lines and cells that are no text", 2 * len(ODD_LINES), "kept, or moved another")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_lines_of_json_that_hold_no_text(tmp_path, ending, count):
    for line, rule in ODD_JSON.values():
        lines = [b'{"text": "the text before"}', line, b'{"text": "the text after"}']
        path = tmp_path / f"a.{ending}"
        path.write_bytes(as_lines(lines, ending.rpartition(".")[2], bytes))
        assert run(tmp_path, path.name) == ({rule: 1}, [BEFORE, AFTER]), line[:60]
    count("lines and cells that are no text", len(ODD_JSON), "kept, or moved another")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "large.arrow", "view.arrow"])
def test_cells_that_are_no_text(tmp_path, name, count):
    texts = {
        "a.parquet": pa.string(),
        "large.arrow": pa.large_string(),
        "view.arrow": pa.string_view(),
    }
    kind = texts.get(name, pa.string())
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    for wrong in [*ODD_LINES.values(), None]:
        cells = pa.array(
            [BEFORE.encode(), wrong, AFTER.encode()], binary.get(kind, pa.binary_view())
        )
        table = pa.table({"text": cells.view(kind)})
        if name.endswith("parquet"):
            pq.write_table(table, tmp_path / name)
        else:
            with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
                writer.write_table(table)
        rule = "malformed" if wrong is None else "undecodable"
        assert run(tmp_path, name) == ({rule: 1}, [BEFORE, AFTER]), wrong
    count("lines and cells that are no text", len(ODD_LINES) + 1, "kept, or moved another")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_line_of_more_than_16_mb_is_counted(tmp_path, name, count):
    lines = [BEFORE.encode(), b"x" * (MAX_LINE_BYTES + 1), AFTER.encode(), b"y" * MAX_LINE_BYTES]
    (tmp_path / name).write_bytes(as_lines(lines, name.rpartition(".")[2], bytes))
    rejected, texts = run(tmp_path, name)
    assert rejected == {"too_long": 1}
    assert texts == [BEFORE, AFTER, "y" * MAX_LINE_BYTES]
    count("lines and cells that are no text", 1, "kept, or moved another")


@pytest.mark.parametrize("name", FILES)
def test_drawn_texts(tmp_path_factory, name, times, count):
    """What nobody thought of: any code points, together."""
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\n")
    examples = 25 * times

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.text(letters, max_size=12), min_size=1, max_size=12))
    def drawn(texts):
        check(tmp_path_factory.mktemp("drawn"), name, [BEFORE, *texts, AFTER])

    drawn()
    count("drawn lists of texts", examples, "changed, dropped without a rule, or moved another")


def test_the_longest_text_is_shorter_than_the_longest_line():
    assert max(len(text.encode()) for text in TEXTS.values()) < MAX_LINE_BYTES
