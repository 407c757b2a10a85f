"""Files of readings: which pairs they give, and what is said of one that gives none."""

import gzip
import json

import pytest

from stages.params import DistillParams
from stages.reading.corpus_files import Rejected
from stages.reading.readings import PairOfTexts, look_at, read_readings, reading_files
from storage.errors import TeachonceError

PAIRS = [PairOfTexts("a text", "ein Text"), PairOfTexts("a house", "ein Haus")]


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*records):
    return "".join(f"{json.dumps(record)}\n" for record in records)


FILES = {
    "a.tsv": "a text\tein Text\na house\tein Haus\n",
    "b.tsv": "text\treading\na text\tein Text\n a house \tein Haus\r\n",
    "c.tsv": "lang\treading\ttext\nde\tein Text\ta text\nde\tein Haus\ta house\n",
    "d.csv": 'text,reading\na text,"ein Text"\na house,ein Haus\n',
    "e.jsonl": lines(
        {"text": "a text", "reading": "ein Text"}, {"text": "a house", "reading": ["ein Haus"]}
    ),
    "f.jsonl": lines(["a text", "ein Text"], ["a house", "ein Haus"]),
    "g.json": json.dumps([{"text": t, "reading": r} for t, r in PAIRS]),
    "h.tsv.gz": gzip.compress(b"a text\tein Text\na house\tein Haus\n"),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_pairs_of_every_format(tmp_path, name):
    path = write(tmp_path / name, FILES[name])
    assert list(read_readings(path)) == PAIRS
    look_at(path)


def test_a_text_has_several_readings(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        lines(
            {"text": "a text", "reading": ["ein Text", "un texte"]},
            {"text": "a house", "reading_1": "ein Haus", "reading_2": "une maison"},
        ),
    )
    assert [tuple(pair) for pair in read_readings(path)] == [
        ("a text", "ein Text"),
        ("a text", "un texte"),
        ("a house", "ein Haus"),
        ("a house", "une maison"),
    ]


def test_every_row_without_a_pair_is_counted_by_its_rule(tmp_path):
    records = [
        lines({"text": "a text", "reading": "ein Text"}),
        lines({"text": "a text"}),
        lines({"reading": "ein Text"}),
        lines({"text": ["a text", "a house"], "reading": "ein Text"}),
        lines({"text": "a text", "reading": 3}),
        lines({"text": "a text", "reading": "\ud800"}),
        lines({"text": "\ud800", "reading": "ein Text"}),
        "no json\n",
        lines({"text": "a text", "reading": ""}),
    ]
    path = write(tmp_path / "a.jsonl", "".join(records))
    found = list(read_readings(path))
    rules = [one.rule if isinstance(one, Rejected) else tuple(one) for one in found]
    assert rules == [
        ("a text", "ein Text"),
        *["malformed"] * 4,
        *["undecodable"] * 2,
        "malformed",
        ("a text", ""),
    ]


WRONG = {
    "source\ttarget\na text\tein Text\n": (
        r"no row gives texts under text and reading; it has source \(text\), target \(text\)"
        r"\n  cure: name the columns or fields text and reading"
    ),
    "english\tgerman\na text\tein Text\n": (
        "its first line may be a header or a row: english, german\n  cure: if these are names, name the "
        "columns or fields text and reading; if they are texts, write the line text<tab>reading above"
    ),
    "a text\tein Text\t0.7\n": r"3 columns, and no header line says what they are\n  cure: write a header",
    "a text\na house\n": "one column, where text and reading are wanted\n  cure: separate",
    "a text\t17\na house\t18\n": r"its column 2 holds numbers or labels",
    "text\treading\treading\na\tb\tc\n": "its header line has reading twice",
    "": r"has no rows\n  cure: take it out of `distill.readings`",
}


@pytest.mark.parametrize("content", sorted(WRONG))
def test_a_file_that_cannot_be_meant_is_refused_with_a_cure(tmp_path, content):
    path = write(tmp_path / "a.tsv", content)
    for read in (lambda: list(read_readings(path)), lambda: look_at(path)):
        with pytest.raises(TeachonceError, match=WRONG[content]) as error:
            read()
        assert str(error.value).startswith(str(path))


def test_lines_of_no_object_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", "ein Text\nein Haus\n")
    with pytest.raises(TeachonceError, match="none of its lines is an object"):
        list(read_readings(path))


def test_a_file_cut_off_is_refused_by_its_setting(tmp_path):
    whole = gzip.compress(b"a text\tein Text\n" * 1000)
    path = write(tmp_path / "a.tsv.gz", whole[:-20])
    with pytest.raises(TeachonceError, match=r"truncated.*\n.*take it out of `distill.readings`"):
        list(read_readings(path))


def test_files_of_globs_each_once_and_by_role(tmp_path):
    for name in ("b.tsv", "a.tsv", "q.jsonl"):
        write(tmp_path / name, FILES["a.tsv"])
    params = DistillParams(readings=["*.tsv", "a.tsv", {"files": "q.jsonl", "role": "query"}])
    assert params.roles == ("text", "query")
    names = {
        role: [path.name for path in reading_files(params.readings_of(role), tmp_path)]
        for role in params.roles
    }
    assert names == {"text": ["a.tsv", "b.tsv"], "query": ["q.jsonl"]}
    with pytest.raises(TeachonceError, match=r"distill.readings: '\*.txt' matches no file"):
        reading_files(DistillParams(readings="*.txt").readings_of("text"), tmp_path)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b"))]
)
def test_one_glob_several_or_none(value, expected):
    assert DistillParams(readings=value).readings == expected
