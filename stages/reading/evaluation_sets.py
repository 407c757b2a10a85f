"""Evaluation files: pairs of sentences with a score (STS), and retrieval sets in BEIR form.

Read by `check` (which files), `split` (which texts must stay out of training) and `evaluate`. Files are
split into lines at the byte 0A alone, since sentences may hold any other line separator of Unicode.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.params import EvaluateParams
from stages.reading.files import ANY_ENDING, is_regular, located, matching, reading, with_compressed
from stages.reading.lines import lines
from stages.vectors import NO_DOCUMENT
from storage.corpus import text_key
from storage.errors import MissingError, TeachonceError, shown
from storage.roles import Role

STS_CURE = "write each line as score, tab, sentence, tab, sentence, and no header line"
JSON_CURE = "write one JSON object a line, with a string under each of _id and text"
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")

QRELS_CURE = "write a header line, then each line as query id, tab, document id, tab, whole number"


@dataclass(frozen=True)
class StsSet:
    """Pairs of sentences with human similarity scores."""

    # (n,) float64 scores on any scale, higher is more similar; at least two differ.
    scores: NDArray[np.float64]
    first: list[str]  # the n first sentences
    second: list[str]  # the n second sentences

    @property
    def texts(self) -> list[str]:
        """The first sentences of all pairs, then the second."""
        return [*self.first, *self.second]


@dataclass(frozen=True)
class RetrievalSet:
    """Documents, and queries that have at least one relevant document among them."""

    document_ids: list[str]  # distinct document ids, in the order of the file
    documents: list[str]  # title and text of each document
    query_ids: list[str]  # distinct query ids, in the order of the file
    queries: list[str]  # text of each query
    # Query id -> document id -> score, >= 1; each query has at least one document.
    relevant: dict[str, dict[str, int]]

    @property
    def identical_ids(self) -> NDArray[np.int64]:
        """(queries,) place of the document that has the query's id and is not judged relevant to it.

        NO_DOCUMENT where there is none: a query may have the id of its answer.
        """
        places = {document: place for place, document in enumerate(self.document_ids)}
        return np.array(
            [
                NO_DOCUMENT if query in self.relevant[query] else places.get(query, NO_DOCUMENT)
                for query in self.query_ids
            ],
            np.int64,
        )


def sts_files(pattern: str, root: Path, address: str) -> list[Path]:
    """Returns the files of an STS set, sorted.

    Args:
        pattern: A glob, relative to `root` unless it is absolute or begins with `~`.
        root: The folder that has params.yaml.
        address: The setting to name in an error, such as `evaluate.sts.STSB`.

    Raises:
        TeachonceError: no file matches, or a match is no regular file.
    """
    return matching(pattern, root, address=address, endings=ANY_ENDING)


def read_sts(files: Sequence[Path]) -> StsSet:
    """One set from all `files` together: a single correlation is taken over all their lines.

    Lines are `score<tab>sentence<tab>sentence`, without quoting; further columns are ignored.

    Raises:
        TeachonceError: names the first wrong line, or the set if no two scores in it differ.
    """
    scores: list[float] = []
    first: list[str] = []
    second: list[str] = []
    for where, line in (pair for path in files for pair in _lines(path)):
        fields = line.split("\t")
        if len(fields) < 3:
            raise TeachonceError(where, f"{len(fields)} of 3 columns", STS_CURE)
        scores.append(_finite(fields[0], where))
        first.append(fields[1])
        second.append(fields[2])
    if len(set(scores)) < 2:
        raise TeachonceError(
            ", ".join(map(str, files)),
            f"{len(scores)} pairs without two different scores, so nothing can correlate with them",
            "name files with scored pairs",
        )
    return StsSet(np.array(scores), first, second)


def beir_folder(setting: str, root: Path, name: str) -> Path:
    """Returns the folder that `setting` names: relative to `root`, absolute, or beginning with `~`."""
    return located(setting, root, f"evaluate.retrieval.{name}")


def beir_files(folder: Path, name: str) -> list[Path]:
    """Returns the three files of the retrieval set `name`: documents, queries, judgements.

    Judgements are in qrels/test.tsv, as BEIR has them, or else in qrels.tsv.

    Raises:
        MissingError: a file is missing.
        TeachonceError: a path is no regular file.
    """
    address = f"evaluate.retrieval.{name}"
    wanted = (("corpus.jsonl",), ("queries.jsonl",), ("qrels/test.tsv", "qrels.tsv"))
    files = []
    for choices in wanted:
        paths = (folder / file for choice in choices for file in with_compressed(choice))
        file = next((path for path in paths if is_regular(path, address)), None)
        if file is None:
            raise MissingError(
                address,
                f"no {' or '.join(choices)} in {shown(folder)}",
                _lacking_cure(folder, choices),
            )
        files.append(file)
    return files


def _lacking_cure(folder: Path, choices: Sequence[str]) -> str:
    """Returns the cure if a folder in BEIR form has none of the files `choices`."""
    others = sorted((folder / "qrels").glob("*.tsv*")) if "qrels.tsv" in choices else []
    if others:
        ending = "".join(others[0].suffixes)
        target = shlex.quote(str(folder / f"qrels{ending}"))
        return f"to measure on {shown(others[0].name)}, run `cp {shlex.quote(str(others[0]))} {target}`"
    return "correct the folder in params.yaml, or remove the entry"


def read_beir(folder: Path, name: str) -> RetrievalSet:
    """Read the retrieval set `name`, without queries that have no relevant document.

    Raises:
        TeachonceError: a line is malformed, repeats an id or a judgement, or judges an unknown query or
            document (names the line); or no query has a relevant document (names the file).
    """
    corpus, asked, judged = beir_files(folder, name)
    documents = _by_id(corpus, _titled)
    queries = _by_id(asked, lambda record, where: _string(record, "text", where))
    relevant = _relevant(judged, queries, documents)
    kept = [query for query in queries if query in relevant]
    return RetrievalSet(
        document_ids=list(documents),
        documents=list(documents.values()),
        query_ids=kept,
        queries=[queries[query] for query in kept],
        relevant=relevant,
    )


def read_sets(
    params: EvaluateParams, root: Path
) -> tuple[dict[str, StsSet], dict[str, RetrievalSet]]:
    """Returns the sets of sentence pairs, and those with queries and documents, by their names.

    Raises:
        TeachonceError: as `read_sts` and `read_beir`.
    """
    sts = {
        name: read_sts(sts_files(pattern, root, f"evaluate.sts.{name}"))
        for name, pattern in params.sts.items()
    }
    retrieval = {
        name: read_beir(beir_folder(setting, root, name), name)
        for name, setting in params.retrieval.items()
    }
    return sts, retrieval


def evaluation_texts(sts: Iterable[StsSet], retrieval: Iterable[RetrievalSet]) -> Iterator[str]:
    """Yield the texts that are kept away from training: all STS sentences and all retrieval queries.

    Documents are not excluded, since corpora commonly hold them.
    """
    for pairs in sts:
        yield from pairs.texts
    for asked in retrieval:
        yield from asked.queries


def evaluation_keys(text: str, role: Role = "text") -> set[bytes]:
    """Returns the keys, in a role, of a text as `shard` would clean it, and of each of its sentences."""
    sentences = SENTENCE_END.split(text)
    return {text_key(part.strip(), role) for part in (text, *sentences) if part.strip()}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (file:line, text) of each line, without its LF or CR LF."""
    with reading(path, "give yourself permission to read it, or fetch it again"):
        for number, line in _without_last_blanks(lines(path)):
            where = f"{path}:{number}"
            if line is None:
                raise TeachonceError(where, "a line of more than 16 MiB", "take it out")
            if b"\r" in line:
                problem = "a carriage return within the line, and only a line feed ends a line here"
                raise TeachonceError(where, problem, "take it out, or put a line feed in its place")
            yield where, _decoded(line, where)


def _without_last_blanks(file: Iterable[bytes | None]) -> Iterator[tuple[int, bytes | None]]:
    """Yield lines with their numbers, from 1, without trailing blank lines."""
    blanks: list[tuple[int, bytes | None]] = []
    for numbered in enumerate(file, 1):
        if numbered[1] is not None and not numbered[1].strip():
            blanks.append(numbered)
            continue
        yield from blanks
        blanks.clear()
        yield numbered


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} of the line is no UTF-8"
        raise TeachonceError(where, problem, "save the file as UTF-8") from None


def _finite(field: str, where: str) -> float:
    try:
        score = float(field)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise TeachonceError(where, f"the score is no number: {shown(repr(field))}", STS_CURE)
    return score


def _by_id(path: Path, text_of: Callable[[dict[str, Any], str], str]) -> dict[str, str]:
    """Returns id -> text of each line of a JSONL file, in order."""
    texts: dict[str, str] = {}
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"no JSON: {shown(repr(line))}" if line else "an empty line"
            raise TeachonceError(where, problem, JSON_CURE) from error
        if not isinstance(record, dict):
            raise TeachonceError(where, f"no JSON object: {shown(repr(line))}", JSON_CURE)
        identifier = _string(record, "_id", where)
        if identifier in texts:
            raise TeachonceError(
                where, f"the id {shown(repr(identifier))} was there before", "give each its own id"
            )
        texts[identifier] = text_of(record, where)
    return texts


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise TeachonceError(where, f"no string under {key}", JSON_CURE)
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair; no tokenizer takes it.
        problem = f"half a surrogate pair under {key}"
        raise TeachonceError(where, problem, "mend the text") from None
    return value


def _titled(record: dict[str, Any], where: str) -> str:
    """Returns a document's title, if any, and text."""
    text = _string(record, "text", where)
    title = _string(record, "title", where) if record.get("title") else ""
    return f"{title} {text}" if title else text


def _relevant(
    path: Path, queries: Container[str], documents: Container[str]
) -> dict[str, dict[str, int]]:
    """Returns query id -> document id -> score, of the judgements above 0."""
    relevant: dict[str, dict[str, int]] = {}
    seen: set[tuple[str, str]] = set()
    for line_number, (where, line) in enumerate(_lines(path)):
        if line_number == 0:
            _check_header(line, where)
            continue
        query, document, score = _judgement(line, where)
        for known, what, value in ((queries, "query", query), (documents, "document", document)):
            if value not in known:
                problem = f"no {what} has the id {shown(repr(value))}"
                raise TeachonceError(where, problem, "remove the line, or add what it names")
        if (query, document) in seen:
            raise TeachonceError(
                where, "this pair was judged before", "remove one of the two lines"
            )
        seen.add((query, document))
        if score > 0:
            relevant.setdefault(query, {})[document] = score
    if not relevant:
        raise TeachonceError(path, "no query has a relevant document", QRELS_CURE)
    return relevant


def _check_header(line: str, where: str) -> None:
    try:
        _judgement(line, where)
    except TeachonceError:
        return
    # Skipping it would lose a judgement without a word.
    raise TeachonceError(where, "a judgement where the header line should be", QRELS_CURE)


def _judgement(line: str, where: str) -> tuple[str, str, int]:
    """Returns query id, document id and score of one line."""
    fields = line.split("\t")
    try:
        query, document, score = fields
        return query, document, int(score)
    except ValueError:
        raise TeachonceError(where, f"no judgement: {shown(repr(line))}", QRELS_CURE) from None
