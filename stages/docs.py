"""Installed packages -> English sentences of their documentation, and summary/description pairs.

The embedded default: a corpus, labelled pairs and a retrieval test that every machine with the packages
has, without an account or a download.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.outcome import Fact, Facts, Outcome, log, write_json
from stages.params import DOCS_PAIR, DOCS_TEXT, DocsParams
from stages.reading.packages import docstrings, without_collector
from stages.reading.prose import paragraphs, reads_well
from storage import durable

VERSION = 2  # raise it when a code change gives other texts or pairs for the same packages

# Documents of the retrieval test beside those that are answers: enough to be hard, quick to encode.
MAX_OTHER_DOCUMENTS = 2000

DESCRIPTION_CHARS = range(60, 801)


@dataclass(frozen=True)
class Pair:
    """A documentation string with a summary of one sentence and a paragraph that says more."""

    summary: str
    description: str


def recipe(params: DocsParams) -> dict[str, object]:
    """Every setting changes the texts. So do the versions of the packages: `check` writes those down."""
    return {
        "version": VERSION,
        "packages": list(params.packages),
        "max_texts": params.max_texts,
        "heldout_pairs": params.heldout_pairs,
    }


def run(params: DocsParams, *, out: Path, facts: Path) -> Outcome:
    """Read the packages and leave a folder of texts, pairs and a retrieval test.

    Args:
        params: The settings `docs`.
        out: The folder, replaced as a whole: `texts.jsonl` (text), `pairs.jsonl` (anchor, positive)
            without the pairs held out, `retrieval/` (BEIR: corpus.jsonl, queries.jsonl,
            qrels/test.tsv) whose queries are the summaries held out.
        facts: Counts, in all and for each package.

    Raises:
        TeachonceError: a package is not installed or has no Python source.
    """
    sentences: dict[str, None] = {}
    pairs: list[Pair] = []
    packages: dict[str, Fact | Facts] = {}
    for name in params.packages:
        ours, its_pairs, packages[name] = _read_package(name)
        sentences |= dict.fromkeys(ours)
        pairs += its_pairs
    texts = in_fair_order(sentences)[: params.max_texts]
    unique = unambiguous(pairs)
    # Half at most, so that as many pairs are left to learn from.
    heldout = unique[: min(params.heldout_pairs, len(unique) // 2)]
    rest = unique[len(heldout) :]
    others = [pair.description for pair in rest[:MAX_OTHER_DOCUMENTS]]
    _write(out, texts=texts, rest=rest, heldout=heldout, others=others)
    counts: dict[str, Fact | Facts] = {
        "texts": len(texts),
        "pairs": len(rest),
        "queries": len(heldout),
        "documents": len(heldout) + len(others),
        "packages": packages,
    }
    write_json(facts, counts)
    return Outcome(
        stage="docs",
        made=out,
        summary=f"{len(texts):,} sentences and {len(rest):,} pairs from {len(packages)} packages; "
        f"{len(heldout):,} queries held out, to be found among "
        f"{len(heldout) + len(others):,} descriptions",
        facts=counts,
    )


def _read_package(name: str) -> tuple[list[str], list[Pair], Facts]:
    """The sentences of one package, each once, its pairs, and how many there are."""
    with without_collector():
        prose_of_docstrings = [paragraphs(text) for text in docstrings(name)]
    candidates = dict.fromkeys(s for prose in prose_of_docstrings for p in prose for s in p)
    sentences = [sentence for sentence in candidates if reads_well(sentence)]
    pairs = [pair for prose in prose_of_docstrings if (pair := pair_of(prose))]
    log.info("docs: %s, %s sentences, %s pairs", name, f"{len(sentences):,}", f"{len(pairs):,}")
    counts = {
        "docstrings": len(prose_of_docstrings),
        "sentences": len(sentences),
        "pairs": len(pairs),
    }
    return sentences, pairs, counts


def in_fair_order(texts: Iterable[str]) -> list[str]:
    """Texts by their blake2b: any first part of it is a fair sample of all packages.

    A text keeps its place among the others when a package is added, so few shards change.
    """
    return sorted(texts, key=_hash)


def unambiguous(pairs: Iterable[Pair]) -> list[Pair]:
    """Distinct pairs in fair order, without those that share a summary or description with another pair.

    "Fit the model to data." stands over a hundred different descriptions: as a query it has no answer,
    as training it calls the other answers wrong.
    """
    unique = set(pairs)
    summaries = Counter(pair.summary.casefold() for pair in unique)
    descriptions = Counter(pair.description.casefold() for pair in unique)
    return sorted(
        (
            pair
            for pair in unique
            if summaries[pair.summary.casefold()] == 1
            and descriptions[pair.description.casefold()] == 1
        ),
        key=lambda pair: _hash(pair.summary),
    )


def pair_of(prose: list[list[str]]) -> Pair | None:
    """Summary and description of one documentation string, from the sentences of each paragraph.

    The summary is its first paragraph if that is one sentence; the description begins the first further
    paragraph that begins well.
    """
    if len(prose) < 2 or len(prose[0]) != 1 or not reads_well(prose[0][0]):
        return None
    summary = prose[0][0]
    descriptions = (_beginning(sentences) for sentences in prose[1:])
    description = next((d for d in descriptions if len(d) in DESCRIPTION_CHARS), None)
    if description is None or summary.rstrip(".").casefold() in description.casefold():
        return None
    return Pair(summary, description)


def _beginning(sentences: list[str]) -> str:
    """Sentences up to the first that does not read well, and no more than a description may have."""
    text = ""
    for sentence in sentences:
        longer = f"{text} {sentence}".lstrip()
        if not reads_well(sentence) or len(longer) >= DESCRIPTION_CHARS.stop:
            break
        text = longer
    return text


def _hash(text: str) -> bytes:
    # Personal to this stage: in the order of the text keys themselves, which decide where shards end,
    # hardly a text would end one (seen: 40,000 texts in 10 shards instead of 39).
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"docs order").digest()


# --- files


def _write(
    out: Path, *, texts: list[str], rest: list[Pair], heldout: list[Pair], others: list[str]
) -> None:
    with durable.replace_folder(out) as folder:
        _write_lines(folder / "texts.jsonl", ({DOCS_TEXT: text} for text in texts))
        _write_lines(
            folder / "pairs.jsonl",
            (dict(zip(DOCS_PAIR, (pair.summary, pair.description), strict=True)) for pair in rest),
        )
        _write_retrieval(folder / "retrieval", heldout, others)


def _write_lines(path: Path, records: Iterable[dict[str, str]]) -> None:
    with durable.named(path, "writing"), path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write_retrieval(folder: Path, heldout: list[Pair], others: list[str]) -> None:
    """BEIR form: the answer to query q<n> is document d<n>; the others follow."""
    (folder / "qrels").mkdir(parents=True)
    documents = [*(pair.description for pair in heldout), *others]
    _write_lines(
        folder / "corpus.jsonl",
        ({"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(documents)),
    )
    _write_lines(
        folder / "queries.jsonl",
        ({"_id": f"q{n}", "text": pair.summary} for n, pair in enumerate(heldout)),
    )
    rows = "".join(f"q{n}\td{n}\t1\n" for n in range(len(heldout)))
    qrels = folder / "qrels/test.tsv"
    with durable.named(qrels, "writing"):
        qrels.write_text(f"query-id\tcorpus-id\tscore\n{rows}", encoding="utf-8")
