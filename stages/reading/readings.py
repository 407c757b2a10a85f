"""Read files of readings: a text, and another form of it that a student is to read in its place.

The form may be a translation, what speech or character recognition made of the text, a misspelling or
keywords. A row is a text and a reading; a text may have several, as a list, under numbered names
(`reading_1`, `reading_2`), or in several rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from stages.params import ReadingsSource
from stages.reading.corpus_files import Rejected
from stages.reading.files import each_once
from stages.reading.records import ENDINGS, LabelledFile, Purpose, Record, texts_of
from storage.errors import TeachonceError, shown

SETTING = "distill.readings"
FIELDS = TEXT, READING = "text", "reading"
NAME_THEM = f"name the columns or fields {TEXT} and {READING}"
PURPOSE = Purpose("shard", SETTING, NAME_THEM)
LOOKED_AT = 200  # records of a file that `check` reads


class PairOfTexts(NamedTuple):
    """A text and its reading, both stripped, either may be empty."""

    text: str
    reading: str


def reading_files(sources: Sequence[ReadingsSource], root: Path) -> list[Path]:
    """Returns the files of some entries of `distill.readings`, each once, in order.

    Raises:
        TeachonceError: a pattern matches no file, or a file with an unsupported ending.
    """
    patterns = [source.files for source in sources]
    return each_once(patterns, root, address=SETTING, endings=ENDINGS)


def read_readings(path: Path) -> Iterator[PairOfTexts | Rejected]:
    """Yield the pairs of a file, in order, and a rejection for each row without one.

    Raises:
        TeachonceError: the file is damaged, its columns are ambiguous, or no row has a text and a reading.
    """
    file = LabelledFile(path, FIELDS, PURPOSE)
    records = understood = 0
    for record in file.records():
        records += 1
        for pair in [record] if isinstance(record, Rejected) else _pairs_of(record, file):
            understood += not isinstance(pair, Rejected)
            yield pair
    if not understood:
        raise _nothing_understood(file, records)


def look_at(path: Path) -> None:
    """Check the fields of a file by its first rows, before anything is computed.

    Raises:
        TeachonceError: as `read_readings`.
    """
    file = LabelledFile(path, FIELDS, PURPOSE)
    records = list(islice(file.records(), LOOKED_AT))
    read = (_pairs_of(record, file) for record in records if not isinstance(record, Rejected))
    if not any(not isinstance(pair, Rejected) for pairs in read for pair in pairs):
        raise _nothing_understood(file, len(records))


def _pairs_of(record: Record, file: LabelledFile) -> list[PairOfTexts | Rejected]:
    """Returns the pairs of a record: one for each reading."""
    values: tuple[list[Any], list[Any]] = ([], [])
    for name, value in record.items():
        if role := file.role(name):
            values[role[0]].append(value)
    texts, readings = texts_of(values[0]), texts_of(values[1])
    if isinstance(texts, Rejected):
        return [texts]
    if isinstance(readings, Rejected):
        return [readings]
    if len(texts) != 1 or isinstance(values[0][0], list) or not readings:
        return [Rejected("malformed")]
    return [PairOfTexts(texts[0], reading) for reading in readings]


def _nothing_understood(file: LabelledFile, records: int) -> TeachonceError:
    if not records:
        return TeachonceError(
            file.path, "has no rows", f"take it out of `{SETTING}` in params.yaml"
        )
    has = ", ".join(f"{name} ({kind})" for name, kind in file.kinds.items())
    problem = f"no row gives texts under {TEXT} and {READING}"
    return TeachonceError(
        file.path,
        f"{problem}; it has {shown(has)}" if has else f"{problem}: none of its lines is an object",
        NAME_THEM,
    )
