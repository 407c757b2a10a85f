"""Layouts of labelled files: each read as what it is, or refused by a sentence that names the cure."""

import csv
import gzip
import io
import json
import logging

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from stages.reading.triplets import Triplet, look_at, read_triplets
from storage.errors import TeachonceError

FIELDS = ("anchor", "positive", "negative")
FLAG = ("query", "pos", "neg")

CATS = Triplet("a cat sits", "a kitten rests", ("a dog barks", "a bird sings"))
BOATS = Triplet("two boats", "some ships, at sea", ("one car",))
NIGHT = Triplet('a "night" of rain', "dark hours")
ROWS = [CATS, BOATS, NIGHT]


def read(folder, name, content, fields=FIELDS):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_triplets([path], fields, ())


def refusal(folder, name, content, fields=FIELDS):
    """What is said, by the stage and by `check` alike."""
    with pytest.raises(TeachonceError) as by_stage:
        read(folder, name, content, fields)
    with pytest.raises(TeachonceError) as by_check:
        look_at(folder / name, fields)
    assert str(by_check.value) == str(by_stage.value)
    return str(by_stage.value).removeprefix(f"{folder / name}: ")


def table(rows, separator):
    return "".join(separator.join(row) + "\n" for row in rows)


def numbered(row):
    named = {f"negative_{place}": text for place, text in enumerate(row.negatives, 1)}
    return {"anchor": row.anchor, "positive": row.positive, **named}


def flagged(row):
    return {"query": row.anchor, "pos": [row.positive], "neg": list(row.negatives)}


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def csv_text(header, rows):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


# ------------------------------------------------------------------------------- layouts that are read


FULL = ["anchor", "positive", "negative_1", "negative_2"]
TABLE = [[*row.texts, *[""] * (4 - len(row.texts))] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [
        ("n_tuple.jsonl", json_lines(map(numbered, ROWS)), FIELDS),
        ("flag.jsonl", json_lines(map(flagged, ROWS)), FLAG),
        ("flag.json", json.dumps([flagged(row) for row in ROWS]), FLAG),
        ("indented.json", json.dumps([numbered(row) for row in ROWS], indent=1), FIELDS),
        ("lines.json", json_lines(map(numbered, ROWS)), FIELDS),
        ("packed.json.gz", gzip.compress(json.dumps(list(map(numbered, ROWS))).encode()), FIELDS),
        ("arrays.jsonl", json_lines(row.texts for row in ROWS), FIELDS),
        ("one_array.json", json.dumps([row.texts for row in ROWS]), FIELDS),
        ("table.csv", csv_text(FULL, TABLE), FIELDS),
        ("packed.csv.zst", zstandard.compress(csv_text(FULL, TABLE).encode()), FIELDS),
        ("table.tsv", table([FULL, *TABLE], "\t"), FIELDS),
        ("packed.tsv.gz", gzip.compress(table([FULL, *TABLE], "\t").encode()), FIELDS),
    ],
)
def test_every_layout_gives_the_same_rows(tmp_path, name, content, fields):
    found, rejected = read(tmp_path, name, content, fields)
    assert found == ROWS
    assert rejected.total() == 0
    look_at(tmp_path / name, fields)


def test_columns_of_parquet_are_lists_numbered_or_dictionaries(tmp_path):
    lists = pa.Table.from_pylist([flagged(row) for row in ROWS])
    columns = pa.Table.from_pylist([numbered(row) for row in ROWS])
    columns = columns.set_column(0, "anchor", columns["anchor"].dictionary_encode())
    for place, (content, fields) in enumerate([(lists, FLAG), (columns, FIELDS)]):
        parquet.write_table(content, tmp_path / f"{place}.parquet")
        assert read_triplets([tmp_path / f"{place}.parquet"], fields, ())[0] == ROWS
        look_at(tmp_path / f"{place}.parquet", fields)


def test_several_positives_are_several_rows_and_equal_texts_one(tmp_path):
    record = {"query": "a", "pos": ["p", "q", "p"], "neg": ["n", None, "", "n ", "m"]}
    found, rejected = read(tmp_path, "rows.jsonl", json_lines([record]), FLAG)
    assert found == [Triplet("a", "p", ("n", "m")), Triplet("a", "q", ("n", "m"))]
    assert rejected.total() == 0


def test_numbers_behind_a_name_count_by_value(tmp_path):
    record = {f"negative_{number}": f"n{number}" for number in (10, 2, 1)}
    record |= {"anchor": "a", "positive": "p", "negative": "n0", "negatives_of_others": "x"}
    found, _ = read(tmp_path, "rows.jsonl", json_lines([record]))
    assert found == [Triplet("a", "p", ("n0", "n1", "n2", "n10"))]


def test_an_own_positive_among_the_negatives_is_contradictory(tmp_path):
    record = {"query": "a", "pos": ["p", "q"], "neg": ["q", "n"]}
    found, rejected = read(tmp_path, "rows.jsonl", json_lines([record]), FLAG)
    assert found == [Triplet("a", "p", ("q", "n"))]
    assert rejected["contradictory"] == 1


def test_csv_has_quotes_commas_and_lines_within_a_text(tmp_path):
    rows = [["a, b", 'said "no"', "two\nlines"]]
    assert read(tmp_path, "rows.csv", csv_text(FIELDS, rows))[0] == [
        Triplet("a, b", 'said "no"', ("two\nlines",))
    ]
    said = refusal(tmp_path, "open.csv", 'anchor,positive\n"a cat,a kitten\nb,c\n')
    assert ":3: no CSV: " in said
    # A comma that nobody quoted shifts what follows: no row.
    found, rejected = read(tmp_path, "bare.csv", "anchor,positive\na cat,a kitten\na, b,c\n")
    assert found == [Triplet("a cat", "a kitten")]
    assert rejected["malformed"] == 1


# ------------------------------------------------------------------------------------- header lines


@pytest.mark.parametrize("separator", ["\t", ","])
@pytest.mark.parametrize(
    "header",
    [
        ("anchor", "positive", "negative"),
        ("negative", "positive", "anchor"),
        ("id", "anchor", "something of mine", "positive"),
    ],
)
def test_a_header_line_names_the_columns_and_is_no_row(tmp_path, header, separator):
    texts = {"anchor": "a cat", "positive": "a kitten", "negative": "a dog"}
    row = [texts.get(name, "17") for name in header]
    ending = {"\t": "tsv", ",": "csv"}[separator]
    found, rejected = read(tmp_path, f"rows.{ending}", table([header, row], separator))
    negatives = ("a dog",) if "negative" in header else ()
    assert found == [Triplet("a cat", "a kitten", negatives)]
    assert rejected.total() == 0


def test_names_of_the_settings_make_a_header(tmp_path):
    content = table([("frage", "antwort"), ("a cat", "a kitten")], "\t")
    assert read(tmp_path, "rows.tsv", content, ("frage", "antwort", "falsch"))[0] == [
        Triplet("a cat", "a kitten")
    ]


def test_without_a_header_the_first_line_is_a_row(tmp_path):
    rows = [("Where is it", "Here it is"), ("cat", "kitten"), ("a boat", "ships at sea", "a car")]
    found, _ = read(tmp_path, "rows.tsv", table(rows, "\t"))
    assert [row.texts for row in found] == rows
    # A text may be one of the words of headers, as long as not all are.
    rows = [("query", "what one asks of a base of data"), ("two boats", "ships")]
    assert [row.texts for row in read(tmp_path, "b.tsv", table(rows, "\t"))[0]] == rows


def test_a_header_of_usual_names_that_the_settings_do_not_have_is_an_error(tmp_path):
    content = table([("Query", "Passage", "hard_neg"), ("a cat", "a kitten", "a dog")], "\t")
    assert refusal(tmp_path, "rows.tsv", content) == (
        "no row gives texts under anchor and positive; it has Query (text), Passage (text), "
        "hard_neg (text)\n"
        "  cure: set finetune.fields in params.yaml to [Query, Passage, hard_neg]"
    )


def test_a_first_line_that_may_be_a_header_is_an_error_with_two_cures(tmp_path):
    content = table(
        [("src_text", "tgt_text"), ("a cat", "a kitten"), ("boats", "many ships")], "\t"
    )
    said = refusal(tmp_path, "rows.tsv", content)
    assert said.startswith("its first line may be a header or a row: src_text, tgt_text\n")
    assert "write the line anchor<tab>positive<tab>negative above them" in said
    rows, _ = read(tmp_path, "cured.tsv", "anchor\tpositive\tnegative\n" + content)
    assert rows[0] == Triplet("src_text", "tgt_text")
    rows, _ = read(tmp_path, "named.tsv", content, ("src_text", "tgt_text", "none"))
    assert rows == [Triplet("a cat", "a kitten"), Triplet("boats", "many ships")]


def test_the_first_of_many_arrays_may_be_a_header(tmp_path):
    arrays = [["positive", "anchor"], ["a kitten", "a cat"], ["ships", "two boats"]]
    for name, content in (("a.json", json.dumps(arrays)), ("b.jsonl", json_lines(arrays))):
        assert read(tmp_path, name, content)[0] == [
            Triplet("a cat", "a kitten"),
            Triplet("two boats", "ships"),
        ]


def test_what_is_read_without_a_header_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="teachonce"):
        read(tmp_path, "rows.tsv", "source text\ttarget text\na cat\ta kitten\n")
    assert (
        "rows.tsv: no header line, so its columns are anchor, positive; the first row is "
        "['source text', 'target text']"
    ) in caplog.text


def test_columns_that_nothing_names_are_two_or_three(tmp_path):
    said = refusal(tmp_path, "semicolons.csv", "anchor;positive\na cat;a kitten\n")
    assert said.startswith("one column, where anchor and positive are wanted\n  cure: separate")
    said = refusal(tmp_path, "rows.tsv", table([("a b", "c d", "e f", "g h")], "\t"))
    assert said.startswith("4 columns, and no header line says what they are\n")
    rows = [("a b", "c d", "e f"), ("g h", "i j", "k l", "m n")]
    found, rejected = read(tmp_path, "some.tsv", table(rows, "\t"))
    assert (len(found), rejected["malformed"]) == (1, 1)


# ------------------------------------------------------------------------- what is no triplet, and why


GRADED = [
    {"sentence1": "a cat", "sentence2": "a kitten", "label": 1},
    {"sentence1": "a cat", "sentence2": "a car", "label": 0},
]


@pytest.mark.parametrize("fields", [FIELDS, ("sentence1", "sentence2", "negative")])
def test_graded_pairs_are_no_positives(tmp_path, fields):
    said = refusal(tmp_path, "rows.jsonl", json_lines(GRADED), fields)
    assert "sentence1 (text), sentence2 (text), label (number)" in said
    assert "grade" in said.splitlines()[0]
    assert "`finetune.dev`" in said
    parquet.write_table(pa.Table.from_pylist(GRADED), tmp_path / "rows.parquet")
    with pytest.raises(TeachonceError, match="grade"):
        read_triplets([tmp_path / "rows.parquet"], fields, ())


@pytest.mark.parametrize(
    "records",
    [
        [
            {"anchor": "a", "positive": "p", "label": 1},
            {"anchor": "a", "positive": "n", "label": 0},
        ],
        [{"anchor": "a", "positive": ["p", "n"], "labels": [1, 0]}],
        [{"anchor": "a", "positive": "p", "score": s} for s in (0.9, 0.2)],
        [{"anchor": "a", "positive": "p", "negative": None, "score": s} for s in (0.9, 0.2)],
    ],
)
def test_mined_pairs_and_lists_with_labels_are_no_positives(tmp_path, records):
    assert read_error(tmp_path, json_lines(records)).startswith(
        "its pairs are graded (anchor (text)"
    )


def read_error(folder, content, fields=FIELDS):
    with pytest.raises(TeachonceError) as error:
        read(folder, "rows.jsonl", content, fields)
    return str(error.value).removeprefix(f"{folder / 'rows.jsonl'}: ")


@pytest.mark.parametrize(
    "content",
    [
        "4.5\ta cat\ta kitten\n1.0\ta cat\ta car\n",
        "a cat\ta kitten\t0.9\na cat\ta car\t0.1\n",
        "die Frage\tdie Antwort\twie gut\na cat\ta kitten\t1\na cat\ta car\t2\n",
        "a cat\tan animal\tentailment\na cat\ta car\tcontradiction\n",
    ],
)
def test_a_table_of_scored_sentences_is_no_table_of_triplets(tmp_path, content):
    said = refusal(tmp_path, "sts.tsv", content)
    assert "holds numbers or labels, and no header line says what they are: grades" in said


def test_scores_beside_negatives_are_named_as_not_used(tmp_path, caplog):
    records = [
        {**numbered(CATS), "scores": [0.9, 0.3, 0.2]},
        {**numbered(BOATS), "scores": [0.8, 0.1]},
    ]
    with caplog.at_level(logging.INFO, logger="teachonce"):
        found, _ = read(tmp_path, "rows.jsonl", json_lines(records))
    assert found == [CATS, BOATS]
    assert "rows.jsonl: 2 rows, 2 with 1 to 2 negatives each, 0 without" in caplog.text
    assert "rows.jsonl: not used: scores" in caplog.text


def test_one_and_the_same_grade_in_every_row_grades_nothing(tmp_path):
    records = [{"anchor": f"a{n}", "positive": f"p{n}", "label": 1} for n in range(3)]
    assert len(read(tmp_path, "rows.jsonl", json_lines(records))[0]) == 3


@pytest.mark.parametrize("kind", [pa.null(), pa.string(), pa.list_(pa.string())])
def test_a_column_of_nulls_makes_pairs_and_is_told(tmp_path, caplog, kind):
    columns = {"anchor": ["a", "c"], "positive": ["b", "d"], "negative": pa.array([None] * 2, kind)}
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    found, rejected = read_triplets([tmp_path / "rows.parquet"], FIELDS, ())
    assert (found, rejected.total()) == ([Triplet("a", "b"), Triplet("c", "d")], 0)
    (line,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "negative is empty in every row, so its rows are learned as pairs" in line.getMessage()


@pytest.mark.parametrize(
    ("record", "problem", "cure"),
    [
        (
            {"anchor": "a", "positive": "p", "negatives": ["n"]},
            "no negatives under 'negative', but it has anchor (text), positive (text), negatives (list of "
            "texts)",
            "set finetune.fields in params.yaml to [anchor, positive, negatives], or take the field",
        ),
        (
            {"anchor": "a", "positive": "p", "neg_1": "n", "neg_2": "m"},
            "no negatives under 'negative', but it has anchor",
            "set finetune.fields in params.yaml to [anchor, positive, neg], or take the field",
        ),
        (
            flagged(CATS),
            "no row gives texts under anchor and positive; it has query (text), pos (list of texts), neg "
            "(list of texts)",
            "set finetune.fields in params.yaml to [query, pos, neg]",
        ),
        (
            {"question": "q", "answer": "a", "negative_1": "n"},
            "no row gives texts under anchor and positive; it has question (text), answer (text), neg",
            "set finetune.fields in params.yaml to [question, answer, negative]",
        ),
        (
            {"anchor": "a", "positive": 7},
            "no row gives texts under anchor and positive; it has anchor (text), positive (number): pairs",
            "keep the rows whose texts belong together",
        ),
        (
            ["one text", "another", 0.8],
            "no row gives texts under anchor and positive; it has anchor (text), positive (text), "
            "negative_1 (number): pairs with a grade",
            "keep the rows whose texts belong together",
        ),
        (
            {"anchor": "a", "positive": "p", "negative": [{"text": "n"}]},
            "no row gives texts under anchor and positive; it has anchor (text), positive (text), negative "
            "(list of objects)",
            "write a text under anchor, and a text or a list of texts",
        ),
        (
            {"anchor": ["a"], "positive": ["p"]},
            "no row gives texts under anchor and positive; it has anchor (list of texts)",
            "write a text under anchor",
        ),
        (
            {"set": ["a", "b", "c"]},
            "no row gives texts under anchor and positive; it has set (list of texts)",
            "set finetune.fields in params.yaml to the names of anchor, positive and negative",
        ),
    ],
)
def test_the_message_says_what_the_file_has_and_what_to_set(tmp_path, record, problem, cure):
    said = refusal(tmp_path, "rows.jsonl", json_lines([record]))
    assert said.startswith(problem)
    assert said.splitlines()[1].startswith(f"  cure: {cure}")


def test_columns_of_parquet_are_named_with_their_types(tmp_path):
    columns = {"query": ["a"], "pos": [["p"]], "pos_scores": [[0.5]], "meta": [{"id": 1}]}
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    for reads in (
        lambda path: read_triplets([path], FIELDS, ()),
        lambda path: look_at(path, FIELDS),
    ):
        with pytest.raises(TeachonceError) as error:
            reads(tmp_path / "rows.parquet")
        assert (
            "it has query (text), pos (list of texts), pos_scores (list of numbers), meta (object)\n"
            in (str(error.value))
        )


def test_a_cut_array_is_damaged_and_no_shorter_array(tmp_path):
    content = json.dumps([numbered(row) for row in ROWS * 9], indent=1)
    assert "no whole JSON array" in refusal(tmp_path, "rows.json", content[: len(content) // 2])
