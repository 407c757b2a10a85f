"""Labelled files to triplets: read, cleaned by named rules, every reject counted.

A row is an anchor, a positive (what should be near it) and perhaps a negative (what looks near and is
not). Without one it is a pair: the other rows of a batch are its negatives.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from stages.files import matching, reading, unpacked_name, with_compressed
from stages.lines import lines
from stages.readers import Item, Rejected, cells
from storage.corpus import text_key
from storage.errors import TeachonceError, shown

ENDINGS = (*with_compressed(".jsonl", ".tsv"), ".parquet")

# In the order in which they are asked; each rejected row is counted under the first that it breaks.
RULES = (
    "undecodable",
    "malformed",
    "missing",
    "empty",
    "contradictory",
    "duplicate",
    "in_evaluation",
)

CURE = "fetch or make the file again, or take it out of `finetune.triplets` in params.yaml"
ROWS_AT_ONCE = 4096


class Triplet(NamedTuple):
    """A labelled row; `negative` is None in a pair."""

    anchor: str
    positive: str
    negative: str | None


Row = Triplet | Rejected | None
"""What a line or record is: a row, what makes it none by the rules of reading, or a row that lacks an
anchor or a positive (None)."""


def triplet_files(patterns: Sequence[str], root: Path) -> list[Path]:
    """The files that `finetune.triplets` names, each once, in the order of the patterns.

    Raises:
        TeachonceError: a pattern matches no file, or one whose ending nobody here reads.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        for path in matching(pattern, root, address="finetune.triplets", endings=ENDINGS):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_triplets(
    files: Sequence[Path], fields: Sequence[str], evaluation: Collection[bytes]
) -> tuple[list[Triplet], Counter[str]]:
    """All right rows of `files`, in order, and how many were rejected by which rule.

    Holds every row in memory.

    Args:
        files: .jsonl and .parquet have fields; .tsv has 2 or 3 columns in this order and no header.
        fields: Names of anchor, positive and negative.
        evaluation: Text keys of evaluation texts: a row with one of them is not learned from.

    Raises:
        TeachonceError: a file is damaged, or none of its rows has the fields.
    """
    kept: dict[Triplet, None] = {}
    rejected = Counter(dict.fromkeys(RULES, 0))
    for path in files:
        right = 0
        for row in _rows(path, fields):
            rule = _broken(row, kept, evaluation)
            right += rule not in {"malformed", "missing"}
            if rule is None and isinstance(row, Triplet):
                kept[row] = None
            else:
                rejected[str(rule)] += 1
        if not right:
            raise TeachonceError(
                path,
                f"no row has the fields {shown(', '.join(fields[:2]))}",
                "set finetune.fields in params.yaml to the names of anchor, positive and negative",
            )
    return list(kept), rejected


def _broken(row: Row, kept: Collection[Triplet], evaluation: Collection[bytes]) -> str | None:
    """The rule that a row breaks, or None."""
    if row is None:
        return "missing"
    if isinstance(row, Rejected):
        return row.rule if row.rule == "undecodable" else "malformed"
    if not (row.anchor and row.positive):
        return "empty"
    if row.positive in (row.anchor, row.negative):
        # The first teaches nothing; the second says that a text is both near and far.
        return "contradictory"
    if row in kept:
        return "duplicate"
    if any(text_key(text) in evaluation for text in row if text is not None):
        return "in_evaluation"
    return None


def _rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path, fields)
        return
    parse = _from_json if unpacked_name(path).endswith(".jsonl") else _from_tabs
    with reading(path, CURE):
        for line in lines(path):
            yield Rejected("too_long") if line is None else _parsed(line, fields, parse)


def _parsed(line: bytes, fields: Sequence[str], parse: Any) -> Row:  # noqa: ANN401 - one of two below
    try:
        row: Row = parse(line.decode(), fields)
        if isinstance(row, Triplet):
            # JSON can spell half of a surrogate pair, which no UTF-8 can hold.
            "".join(filter(None, row)).encode()
    except UnicodeError:
        return Rejected("undecodable")
    except (ValueError, RecursionError):
        return Rejected("malformed")
    return row


def _from_json(text: str, fields: Sequence[str]) -> Row:
    record = json.loads(text)
    if not isinstance(record, dict):
        return Rejected("malformed")
    anchor, positive, negative = (record.get(name) for name in fields)
    if anchor is None or positive is None:
        return None
    if not isinstance(anchor, str) or not isinstance(positive, str):
        return Rejected("malformed")
    if not isinstance(negative, str | None):
        return Rejected("malformed")
    return _stripped(anchor, positive, negative)


def _from_tabs(text: str, fields: Sequence[str]) -> Row:
    columns = text.split("\t")
    if len(columns) < 2:
        return None
    return _stripped(columns[0], columns[1], columns[2] if len(columns) > 2 else None)


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    from pyarrow import parquet

    with reading(path, CURE), parquet.ParquetFile(path, page_checksum_verification=True) as file:
        there = [name for name in fields if name in file.schema_arrow.names]
        if fields[0] not in there or fields[1] not in there:
            raise TeachonceError(
                path,
                f"no columns {shown(', '.join(fields[:2]))} among {shown(file.schema_arrow.names)}",
                "set finetune.fields in params.yaml to the columns of anchor, positive and negative",
            )
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=there):
            negatives = cells(batch.column(fields[2])) if fields[2] in there else repeat(None)
            for anchor, positive, negative in zip(
                cells(batch.column(fields[0])),
                cells(batch.column(fields[1])),
                negatives,
                strict=False,
            ):
                yield _from_cells(anchor, positive, negative)


def _from_cells(anchor: Item, positive: Item, negative: Item | None) -> Row:
    """A row of cells; a null, which `cells` calls malformed, is a field that is not there."""
    for item in (anchor, positive, negative):
        if isinstance(item, Rejected) and item.rule == "undecodable":
            return item
    if isinstance(anchor, Rejected) or isinstance(positive, Rejected):
        return None
    return _stripped(anchor, positive, None if isinstance(negative, Rejected) else negative)


def _stripped(anchor: str, positive: str, negative: str | None) -> Triplet:
    return Triplet(anchor.strip(), positive.strip(), (negative or "").strip() or None)
