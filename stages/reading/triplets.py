"""Read labelled files as triplets, cleaned by named rules; every rejected row is counted.

A row is an anchor, a positive (a text that should be near it) and any number of hard negatives (similar
texts that should not). A row without negatives is a pair, with in-batch negatives only. A record with
several positives becomes several rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from stages.outcome import log
from stages.reading.corpus_files import Rejected
from stages.reading.files import each_once
from stages.reading.lines import has_control_characters
from stages.reading.records import (
    ANCHOR_WORDS,
    ENDINGS,
    NEGATIVE_WORDS,
    POSITIVE_WORDS,
    LabelledFile,
    Record,
    base_name,
    is_grade,
    texts_of,
)
from storage.corpus import text_key
from storage.errors import TeachonceError, shown

# In the order in which they are asked; each rejected row is counted under the first that it breaks.
RULES = (
    "undecodable",
    "malformed",
    "missing",
    "control_characters",
    "empty",
    "contradictory",
    "duplicate",
    "in_evaluation",
)

NOT_READ = {"malformed", "missing"}
LOOKED_AT = 200  # records of a file that `check` reads
GRADED_CURE = (
    "keep the rows whose texts belong together, as anchor and positive, and take that field out; graded "
    "pairs can pick the best weights as `finetune.dev`, or be measured on as `evaluate.sts`"
)


class Triplet(NamedTuple):
    """A labelled row; a pair has no negatives."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Anchor, positive, then the negatives."""
        return self.anchor, self.positive, *self.negatives


Row = Triplet | Rejected | None
"""The result of a record: a triplet, a rejection by a rule of reading, or None if the anchor or the
positive is missing."""


def triplet_files(patterns: Sequence[str], root: Path) -> list[Path]:
    """Returns the files that `finetune.triplets` names, each once, in the order of the patterns.

    Raises:
        TeachonceError: a pattern matches no file, or a file with an unsupported ending.
    """
    return each_once(patterns, root, address="finetune.triplets", endings=ENDINGS)


def read_triplets(
    files: Sequence[Path], fields: Sequence[str], evaluation: Collection[bytes]
) -> tuple[list[Triplet], Counter[str]]:
    """Returns all valid rows of `files`, in order, and the number of rejected rows by rule.

    Holds every row in memory, and logs the counts of each file.

    Args:
        files: See `stages.reading.records` for what is read.
        fields: Names of anchor, positive and negative. Positives and negatives may be lists, and stand
            under numbered names, too: `negative_1`, `negative_2`.
        evaluation: Text keys of evaluation texts: a row with one of them is not learned from.

    Raises:
        TeachonceError: a file is damaged, none of its rows gives an anchor and a positive, its pairs are
            graded, or its negatives stand under other names.
    """
    kept: dict[Triplet, None] = {}
    rejected = Counter(dict.fromkeys(RULES, 0))
    for path in files:
        reader = _TripletReader(path, fields)
        counts: Counter[int] = Counter()
        for row in reader.rows():
            rule = _broken(row, kept, evaluation)
            reader.understood += rule not in NOT_READ
            if rule is None and isinstance(row, Triplet):
                kept[row] = None
                counts[len(row.negatives)] += 1
            else:
                rejected[str(rule)] += 1
        reader.check()
        reader.tell(counts)
    return list(kept), rejected


def look_at(path: Path, fields: Sequence[str]) -> None:
    """Check the fields of a file by its first rows, before anything is computed.

    Raises:
        TeachonceError: `read_triplets` would refuse it for its fields.
    """
    reader = _TripletReader(path, fields)
    for row in islice(reader.rows(), LOOKED_AT):
        reader.understood += _broken(row, (), ()) not in NOT_READ
    reader.negatives += reader.names_negatives  # which may come later
    reader.check()


class _TripletReader:
    """Reads the rows of one file, and checks its fields: names of anchor, positive and negative."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path, self.fields = path, fields
        self.file = LabelledFile(path, fields)
        self.understood = 0
        """Rows that have an anchor and a positive, right or not."""
        self.records = self.negatives = 0
        self.grades: dict[str, Any] = {}
        self.graded: str | None = None
        """A field whose grades differ from row to row, or within a row."""

    @property
    def names_negatives(self) -> bool:
        """Whether the file has a field for negatives, empty or not."""
        return any((self.file.role(name) or (0,))[0] == 2 for name in self.file.kinds)

    def rows(self) -> Iterator[Row]:
        """Yield one row or more for each record."""
        for record in self.file.records():
            self.records += 1
            if isinstance(record, Rejected):
                yield record
                continue
            self._look_for_grades(record)
            for row in self._rows_of(record):
                if isinstance(row, Triplet):
                    self.negatives += len(row.negatives)
                yield row

    def check(self) -> None:
        """Raise for a file without usable rows, or with fields that would be misread."""
        unread = [name for name in self.file.kinds if self._is_unread_negative(name)]
        if self.graded and not self.negatives:
            raise TeachonceError(
                self.path,
                f"its pairs are graded ({self._has()}): {shown(repr(self.graded))} differs from pair to "
                "pair, so not every second text is a positive",
                GRADED_CURE,
            )
        if not self.understood:
            raise self._nothing_understood()
        if unread and not self.negatives:
            fields = shown(", ".join([*self.fields[:2], base_name(unread[0])]))
            raise TeachonceError(
                self.path,
                f"no negatives under {shown(repr(self.fields[2]))}, but it has {self._has()}",
                f"set finetune.fields in params.yaml to [{fields}], or take the field out of the file",
            )

    def tell(self, counts: Counter[int]) -> None:
        """Log what was read, and which fields were not."""
        pairs, rows = counts[0], counts.total()
        with_negatives = [number for number in counts if number]
        log.info(
            "finetune: %s: %s rows, %s",
            self.path,
            f"{rows:,}",
            f"{rows - pairs:,} with {_range(with_negatives)}, {pairs:,} without"
            if with_negatives
            else "pairs without negatives",
        )
        if self.names_negatives and not self.negatives:
            log.warning(
                "finetune: %s: %s is empty in every row, so its rows are learned as pairs",
                self.path,
                shown(self.fields[2]),
            )
        unused = [name for name in self.file.kinds if name and self.file.role(name) is None]
        if unused:
            log.info("finetune: %s: not used: %s", self.path, shown(", ".join(unused)))

    def _rows_of(self, record: Record) -> list[Row]:
        """Returns the rows of a record: one for each positive."""
        values_by_role: tuple[list[Any], ...] = ([], [], [])
        for name, value in sorted(record.items(), key=self._order):
            role = self.file.role(name)
            if role is not None:
                values_by_role[role[0]].append(value)
        read = [texts_of(values) for values in values_by_role]
        for texts in read:
            if isinstance(texts, Rejected):
                return [texts]
        anchors, positives, negatives = (texts for texts in read if isinstance(texts, list))
        if len(anchors) > 1 or any(isinstance(value, list) for value in values_by_role[0]):
            return [Rejected("malformed")]
        if not anchors or not positives:
            return [None]
        distinct = tuple(dict.fromkeys(text for text in negatives if text))
        return [Triplet(anchors[0], positive, distinct) for positive in dict.fromkeys(positives)]

    def _order(self, item: tuple[str, Any]) -> int:
        role = self.file.role(item[0])
        return 0 if role is None else role[1]

    def _look_for_grades(self, record: Record) -> None:
        for name in record.keys() & self._grade_names(record):
            values = record[name]
            for value in values if isinstance(values, list) else [values]:
                if self.grades.setdefault(name, value) != value:
                    self.graded = name

    def _grade_names(self, record: Record) -> set[str]:
        if self.graded:
            return set()
        return {name for name in record if is_grade(name) and self.file.role(name) is None}

    def _is_unread_negative(self, name: str) -> bool:
        has_values = self.file.kinds[name] not in {"null", "empty list"}
        return has_values and self.file.role(name) is None and self._is_like_negative(name)

    def _nothing_understood(self) -> TeachonceError:
        if not self.records:
            return TeachonceError(
                self.path, "has no rows", "take it out of `finetune.triplets` in params.yaml"
            )
        anchor, positive = self.fields[:2]
        kinds = self.file.kinds
        wanted = f"no row gives texts under {shown(anchor)} and {shown(positive)}"
        if not kinds:
            problem = f"{wanted}: none of its {self.records:,} lines is a JSON object or array"
            return TeachonceError(self.path, problem, "write one object a line")
        problem = f"{wanted}; it has {self._has()}"
        numbers = [n for n, kind in kinds.items() if kind == "number" and self.file.role(n)]
        if numbers or (any(map(is_grade, kinds)) and not any(map(self._is_like_negative, kinds))):
            return TeachonceError(
                self.path,
                f"{problem}: pairs with a grade, not anchors with a positive",
                GRADED_CURE,
            )
        roles = {role[0] for name in kinds if (role := self.file.role(name))}
        if {0, 1} <= roles:
            return TeachonceError(
                self.path,
                problem,
                f"write a text under {shown(anchor)}, and a text or a list of texts under "
                f"{shown(positive)} and {shown(self.fields[2])}",
            )
        return TeachonceError(self.path, problem, self._names_to_set())

    def _is_like_negative(self, name: str) -> bool:
        return base_name(name).casefold() in NEGATIVE_WORDS

    def _names_to_set(self) -> str:
        """Returns the cure with the field names of a usual layout, if they are known."""
        anchor = self._first_of(ANCHOR_WORDS, {"text"})
        texts = {"text", "list of texts"}
        positive = self._first_of(POSITIVE_WORDS, texts, numbered=True, but=anchor)
        cure = "set finetune.fields in params.yaml to "
        if not (anchor and positive):
            return f"{cure}the names of anchor, positive and negative"
        negative = self._first_of(NEGATIVE_WORDS, {*texts, "null", "empty list"}, numbered=True)
        return f"{cure}[{anchor}, {positive}, {negative or self.fields[2]}]"

    def _first_of(
        self,
        words: Sequence[str],
        kinds: Collection[str],
        *,
        numbered: bool = False,
        but: str | None = None,
    ) -> str | None:
        """Returns the first field with one of the usual names and a fitting type; None if there is none."""
        field_names = {
            spelt.casefold(): spelt
            for name, kind in reversed(self.file.kinds.items())
            if kind in kinds
            for spelt in ([base_name(name), name] if numbered else [name])
        }
        return next(
            (shown(field_names[word]) for word in words if field_names.get(word, but) != but), None
        )

    def _has(self) -> str:
        return shown(", ".join(f"{name} ({kind})" for name, kind in self.file.kinds.items()))


def _broken(row: Row, kept: Collection[Triplet], evaluation: Collection[bytes]) -> str | None:
    """Returns the rule that a row breaks, or None."""
    if row is None:
        return "missing"
    if isinstance(row, Rejected):
        return row.rule if row.rule == "undecodable" else "malformed"
    if any(map(has_control_characters, row.texts)):
        return "control_characters"
    if not (row.anchor and row.positive):
        return "empty"
    if row.positive == row.anchor or row.positive in row.negatives:
        # The first teaches nothing; the second says that a text is both near and far.
        return "contradictory"
    if row in kept:
        return "duplicate"
    if evaluation and any(text_key(text) in evaluation for text in row.texts):
        return "in_evaluation"
    return None


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    each = f"{least}" if least == most else f"{least} to {most}"
    return f"{each} negative{'s' if most > 1 else ''} each"
