"""Read labelled files: one record of named fields for each line, row or element.

JSON lines, one JSON array of all records, TSV, CSV and Parquet. Values are not
validated here: a record has all requested fields of its row. Rows without names (a JSON array as a line, a
table without a header line) are read by position, in the order of the fields that are asked for.

A header line is one that has the names of the first two of these fields, or one whose
every cell is a name that such files usually have (`HEADER_WORDS`). Anything else is data; a first line
that looks like a header but is none by this rule is an error, never a row.

This file is long because every format of labelled files is here.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.outcome import log
from stages.reading.corpus_files import (
    Rejected,
    begins_array_of_records,
    cells,
    for_arrow,
    holds_text,
)
from stages.reading.files import reading, unpacked_name, with_compressed
from stages.reading.lines import content, is_utf8, lines
from storage.errors import TeachonceError, shown

ENDINGS = (*with_compressed(".jsonl", ".json", ".tsv", ".csv"), ".parquet")
ROWS_AT_ONCE = 4096
HEAD_ROWS = 100  # of a table, from which it is decided whether it has a header line
MAX_JSON_BYTES = 2 << 30  # of one JSON array, which is parsed as a whole

Record = dict[str, Any]

# The names that such files usually have, the commonest first.
ANCHOR_WORDS = (
    *("anchor", "query", "question", "sentence1", "sentence_1", "sentence_a", "text1", "text_1"),
    *("text_a", "sent0", "sent1", "premise", "source", "src", "input", "instruction", "prompt"),
    *("title", "summary", "claim", "sentence", "text"),
)
POSITIVE_WORDS = (
    *("positive", "pos", "positives", "answer", "passage", "sentence2", "sentence_2"),
    *("sentence_b", "text2", "text_2", "text_b", "sent1", "sent2", "entailment", "hypothesis"),
    *("document", "doc", "positive_passage", "positive_passages", "context", "response", "output"),
    *("target", "tgt", "abstract", "description", "paraphrase", "evidence", "body"),
)
NEGATIVE_WORDS = (
    *("negative", "neg", "negatives", "negs", "hard_negative", "hard_negatives", "hard_neg"),
    *("hard_negs", "negative_passage", "negative_passages", "contradiction"),
)
GRADE_WORDS = (
    *("label", "labels", "score", "scores", "similarity", "similarity_score", "relevance"),
    *("relatedness", "relatedness_score", "gold_label", "is_duplicate", "rating", "grade"),
)
OTHER_WORDS = (
    *("", "id", "ids", "idx", "index", "qid", "pid", "docid", "doc_id", "query_id", "corpus_id"),
    *("type", "lang", "language", "split", "pos_scores", "neg_scores", "pos_score", "neg_score"),
    *("neutral", "margin", "sentence3", "sentence_3", "text3", "text_3", "sentence_c", "text_c"),
)
LABEL_VALUES = {
    *("entailment", "neutral", "contradiction", "true", "false", "yes", "no"),
    *("similar", "dissimilar", "relevant", "irrelevant", "positive", "negative"),
}
HEADER_WORDS = {*ANCHOR_WORDS, *POSITIVE_WORDS, *NEGATIVE_WORDS, *GRADE_WORDS, *OTHER_WORDS}

NUMBERED = re.compile(r"([_ -]?)(\d+)")  # behind the name of a field: negative_3, negative3
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Purpose:
    """What labelled files are read for, as errors and the log say it."""

    stage: str  # the stage that reads them
    setting: str  # the setting that names them
    # What to do if a first line is of names of other fields than those that are asked for.
    if_names: str


TRIPLETS = Purpose(
    "finetune",
    "finetune.triplets",
    "set finetune.fields in params.yaml to those of anchor, positive and negative",
)


class LabelledFile:
    """One labelled file.

    Args:
        path: Path of the file; its ending, before .gz or .zst, says its format.
        fields: Names of anchor and positive, and of the negative if there may be any.
        purpose: What it is read for.
    """

    def __init__(self, path: Path, fields: Sequence[str], purpose: Purpose = TRIPLETS) -> None:
        self.path, self.fields, self.purpose = path, fields, purpose
        self.kinds: dict[str, str] = {}
        """Field -> what it holds, such as `text` or `list of texts`; grows while the file is read."""
        self._roles: dict[str, tuple[int, int] | None] = {}

    def records(self) -> Iterator[Record | Rejected]:
        """Yield one record for each line, row or element.

        Raises:
            TeachonceError: the file is damaged, or the meaning of its columns is ambiguous.
        """
        name = unpacked_name(self.path)
        cure = f"fetch or make the file again, or take it out of `{self.purpose.setting}` in params.yaml"
        with reading(self.path, cure):
            if name.endswith(".parquet"):
                yield from self._from_parquet()
            elif name.endswith((".jsonl", ".json")):
                for record in self._from_json():
                    if isinstance(record, dict):
                        self._note_kinds(record)
                    yield record
            else:
                rows = self._csv_rows() if name.endswith(".csv") else self._tsv_rows()
                yield from self._from_table(rows)

    def role(self, name: str) -> tuple[int, int] | None:
        """Returns a field's place in `fields` and its number: 0 for `negative`, 3 for `negative_3`.

        None if it is none of them.
        """
        if name not in self._roles:
            self._roles[name] = self._role(name)
        return self._roles[name]

    def _role(self, name: str) -> tuple[int, int] | None:
        if name in self.fields:
            return self.fields.index(name), 0
        for place, field in enumerate(self.fields[1:], 1):
            numbered = NUMBERED.fullmatch(name.removeprefix(field))
            # The next number of a field that ends in one (text1, text12) stands behind a sign.
            if name.startswith(field) and numbered and (numbered[1] or not field[-1].isdigit()):
                return place, int(numbered[2])
        return None

    def _note_kinds(self, record: Record) -> None:
        for name, value in record.items():
            if self.kinds.get(name, "null") in {"null", "empty list"}:
                self.kinds[name] = _kind(value)

    # --- JSON

    def _from_json(self) -> Iterator[Record | Rejected]:
        """Read one JSON array of all records, or else a record from each line."""
        first = next((line for line in lines(self.path) if line is None or line.strip()), b"")
        if first is None or begins_array_of_records(first):
            try:
                parsed = json.loads(content(self.path, MAX_JSON_BYTES))
            except (ValueError, RecursionError) as error:
                # A line may also be too long where each line is a record.
                if first is not None:
                    raise ValueError(f"no whole JSON array: {error}") from error
            else:
                elements = parsed if isinstance(parsed, list) else [parsed]
                yield from self._without_header(map(self._named, elements))
                return
        yield from self._without_header(map(self._from_json_line, lines(self.path)))

    def _without_header(
        self, records: Iterator[Record | Rejected | list[Any]]
    ) -> Iterator[Record | Rejected]:
        """Turn arrays into records; the first array may hold the names of the fields."""
        names: list[str] | None = None
        for number, record in enumerate(records):
            if not isinstance(record, list):
                yield record
                continue
            if number == 0 and all(isinstance(cell, str) for cell in record):
                names = self._header([record])
                if names is not None:
                    continue
            yield (
                self._by_place(record) if names is None else dict(zip(names, record, strict=False))
            )

    def _from_json_line(self, line: bytes | None) -> Record | Rejected | list[Any]:
        if line is None:
            return Rejected("too_long")
        try:
            return self._named(json.loads(line.decode()))
        except UnicodeDecodeError:
            return Rejected("undecodable")
        except (ValueError, RecursionError):
            return Rejected("malformed")

    def _named(self, value: object) -> Record | Rejected | list[Any]:
        return value if isinstance(value, dict | list) else Rejected("malformed")

    def _by_place(self, row: Sequence[Any]) -> Record:
        """Turn a row without names into a record: from the third on, cells are negatives."""
        anchor, positive, *negative = self.fields
        numbered = (f"{name}_{number}" for name in negative for number in range(1, len(row) - 1))
        return dict(zip([anchor, positive, *numbered], row, strict=False))

    # --- tables

    def _tsv_rows(self) -> Iterator[list[str] | Rejected]:
        for line in lines(self.path):
            # Bytes that are no UTF-8 become lone surrogates, which the reader of the cell rejects.
            yield (
                Rejected("too_long")
                if line is None
                else line.decode(errors="surrogateescape").split("\t")
            )

    def _csv_rows(self) -> Iterator[list[str] | Rejected]:
        decoded = (_csv_line(line) for line in lines(self.path))
        csv.field_size_limit(16 << 20)
        # Strict: otherwise an unclosed quote would turn the rest of the file into one cell.
        reader = csv.reader(decoded, strict=True)
        try:
            yield from reader
        except csv.Error as error:
            raise TeachonceError(
                f"{self.path}:{reader.line_num}",
                f"no CSV: {shown(error)}",
                'put texts with a comma, a quote or a line end in "quotes" and double quotes within',
            ) from error

    def _from_table(self, rows: Iterator[list[str] | Rejected]) -> Iterator[Record | Rejected]:
        head = list(islice(rows, HEAD_ROWS))
        table = [row for row in head if isinstance(row, list) and any(row)]
        names = self._header(table)
        if names is None:
            self._check_nameless(table)
            if table:
                log.info(
                    "%s: %s: no header line, so its columns are %s; the first row is %s",
                    self.purpose.stage,
                    self.path,
                    shown(", ".join(self.fields[: len(table[0])])),
                    shown(table[0]),
                )
        else:
            head.remove(table[0])
        for row in chain(head, rows):
            most = len(self.fields) if names is None else len(names)
            if isinstance(row, Rejected):
                yield row
            elif len(row) > most:
                # A separator within a text has shifted what follows it.
                yield Rejected("malformed")
            else:
                record = (
                    self._by_place(row)
                    if names is None
                    else dict(zip(names, row, strict=False))  # a short row lacks its last fields
                )
                self._note_kinds(record)
                yield record

    def _header(self, table: Sequence[list[str]]) -> list[str] | None:
        """Returns the names in the header line; None if the first line is data."""
        if not table:
            return None
        names = [cell.strip().strip('"') for cell in table[0]]
        roles = {role[0] for name in names if (role := self.role(name))}
        if {0, 1} <= roles or (len(names) > 1 and all(map(_is_header_word, names))):
            twice = sorted({name for name in names if self.role(name) and names.count(name) > 1})
            if twice:
                raise TeachonceError(
                    self.path,
                    f"its header line has {shown(', '.join(twice))} twice",
                    "rename one of the columns",
                )
            return names
        if self._looks_like_names(names, table[1:]):
            raise TeachonceError(
                self.path,
                f"its first line may be a header or a row: {shown(', '.join(names))}",
                f"if these are names, {self.purpose.if_names}; if they are texts, write the line "
                f"{shown(self._header_line())} above them",
            )
        return None

    @staticmethod
    def _looks_like_names(first: Sequence[str], rest: Sequence[list[str]]) -> bool:
        """Whether all cells of a line are single words, where some column has none below."""
        return (
            bool(rest)
            and all(map(IDENTIFIER.fullmatch, first))
            and any(
                not any(
                    IDENTIFIER.fullmatch(row[place].strip()) for row in rest if len(row) > place
                )
                for place in range(len(first))
            )
        )

    def _check_nameless(self, table: Sequence[list[str]]) -> None:
        """Raise unless a table without names has two columns or one for each field, all of texts."""
        several = shown(self.fields[-1])
        cure = (
            f"write a header line: {shown(self._header_line())} (and {several}_1, {several}_2, … for "
            "several) above these texts, any other name above the rest"
        )
        if table and len(table[0]) > len(self.fields):
            problem = f"{len(table[0])} columns, and no header line says what they are"
            raise TeachonceError(self.path, problem, cure)
        if table and max(map(len, table)) == 1:
            problem = f"one column, where {shown(' and '.join(self.fields[:2]))} are wanted"
            separated = "separate columns by commas in .csv files, by tabs in .tsv files"
            raise TeachonceError(self.path, problem, separated)
        for place in range(len(self.fields)):
            column = [
                row[place].strip() for row in table if len(row) > place and row[place].strip()
            ]
            # The first line may be a header of unknown names.
            if column and all(map(_is_grade_or_id, column[1:] or column)):
                raise TeachonceError(
                    self.path,
                    f"its column {place + 1} holds numbers or labels, and no header line says what they "
                    "are: grades of pairs, or ids, are no texts to learn from",
                    cure,
                )

    def _header_line(self) -> str:
        separator = "," if unpacked_name(self.path).endswith(".csv") else "<tab>"
        return separator.join(self.fields)

    # --- columns

    def _from_parquet(self) -> Iterator[Record | Rejected]:
        from pyarrow import parquet

        with parquet.ParquetFile(
            for_arrow(self.path), page_checksum_verification=True, buffer_size=1 << 20
        ) as file:
            schema = file.schema_arrow
            self.kinds = {field.name: _kind_of_type(field.type) for field in schema}
            wanted = [name for name in self.kinds if self.role(name) or is_grade(name)]
            twice = [name for name in wanted if schema.names.count(name) > 1]
            if twice:
                raise ValueError(f"two columns have the name {shown(twice[0])}")
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted):
                columns = [_values(batch.column(name)) for name in wanted]
                for row in range(len(batch)):
                    yield {name: column[row] for name, column in zip(wanted, columns, strict=True)}


def texts_of(values: Sequence[Any]) -> list[str] | Rejected:
    """Returns the stripped texts among values; flattens lists, skips nulls. The rest is malformed."""
    texts: list[str] = []
    for value in values:
        if isinstance(value, str):
            if not is_utf8(value):
                return Rejected("undecodable")
            texts.append(value.strip())
        elif isinstance(value, Rejected):
            return value
        elif isinstance(value, list):
            inner = texts_of(value)
            if isinstance(inner, Rejected):
                return inner
            texts += inner
        elif value is not None:
            return Rejected("malformed")
    return texts


def is_grade(name: str) -> bool:
    """Whether a field of this name holds a similarity grade of the row's texts."""
    return name.casefold() in GRADE_WORDS


def base_name(name: str) -> str:
    """A field's name without its number: `negative` of `negative_3`."""
    return re.sub(rf"{NUMBERED.pattern}$", "", name)


def _is_header_word(name: str) -> bool:
    word = re.sub("[ -]", "_", name.casefold())
    return word in HEADER_WORDS or base_name(word) in {*POSITIVE_WORDS, *NEGATIVE_WORDS}


def _csv_line(line: bytes | None) -> str:
    if line is None:
        raise ValueError("a line of more than 16 MiB")
    return line.decode(errors="surrogateescape") + "\n"


def _is_grade_or_id(text: str) -> bool:
    if text.casefold() in LABEL_VALUES:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _values(column: pa.Array) -> list[Any]:
    """Yield cells as Python values, and `Rejected` for a cell that is no UTF-8."""
    if holds_text(column.type):
        return [
            None if isinstance(cell, Rejected) and cell.rule == "malformed" else cell
            for cell in cells(column)
        ]
    # A damaged offset read without this ends the process.
    column.validate(full=True)
    values: list[Any] = column.to_pylist()
    return values


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "text"
        case int() | float():
            return "number"
        case [] | ():
            return "empty list"
        case list():
            return f"list of {_kind(value[0])}s"
    return "object"


def _kind_of_type(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return _kind_of_type(kind.value_type)
    if holds_text(kind):
        return "text"
    if pa.types.is_null(kind):
        return "null"
    if pa.types.is_boolean(kind):
        return "true or false"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if hasattr(kind, "value_type"):
        return f"list of {_kind_of_type(kind.value_type)}s"
    return "object" if pa.types.is_struct(kind) else str(kind)
