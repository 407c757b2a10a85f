"""Installed packages -> English sentences of their documentation, and summary/description pairs.

The embedded default: a corpus, labelled pairs and a retrieval test that every machine with the packages
has, without an account or a download. Sources are parsed with `ast` and never imported.

Longer than 200 lines because reading documentation strings is one matter: where they are, what in them
is prose, where a sentence ends, and which sentence a person would call one.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import json
import logging
import platform
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path

from stages.outcome import Outcome, write_json
from stages.params import DocsParams
from storage import durable
from storage.errors import TeachonceError, shown

log = logging.getLogger("teachonce")

VERSION = 1  # raise it when a code change gives other texts or pairs for the same packages

# Documents of the retrieval test beside those that are answers: enough to be hard, quick to encode.
MAX_OTHER_DOCUMENTS = 3000

SENTENCE_CHARS = range(25, 401)
DESCRIPTION_CHARS = range(60, 801)
MIN_WORDS = 5
MAX_WORDS = 60


@dataclass(frozen=True)
class Pair:
    """A documentation string with a summary of one sentence and a paragraph that says more."""

    summary: str
    description: str


@dataclass(frozen=True)
class Paragraph:
    """Sentences that stand together, and the heading they stand under ("" before the first)."""

    heading: str
    sentences: list[str]


def recipe(params: DocsParams) -> dict[str, object]:
    """Every setting changes the texts. So do the versions of the packages: `check` writes those down."""
    return {
        "version": VERSION,
        "packages": list(params.packages),
        "max_texts": params.max_texts,
        "heldout_pairs": params.heldout_pairs,
    }


def package_versions(params: DocsParams) -> dict[str, str]:
    """Import name -> version of the distribution that has it; nothing is imported.

    A module of the standard library has the version of Python. Where several distributions share an
    import name, their versions are joined by `+`.

    Raises:
        TeachonceError: a package is not installed.
    """
    owners = metadata.packages_distributions() if params.packages else {}
    versions = {}
    for name in params.packages:
        if name in sys.stdlib_module_names:
            versions[name] = platform.python_version()
            continue
        if name not in owners:
            raise _not_installed(name)
        versions[name] = "+".join(metadata.version(owner) for owner in sorted(set(owners[name])))
    return versions


def run(params: DocsParams, *, out: Path, facts: Path) -> Outcome:
    """Read the packages and leave a folder of texts, pairs and a retrieval test.

    Args:
        params: Which packages, and how much of them.
        out: The folder, replaced as a whole: `texts.jsonl` (text), `pairs.jsonl` (anchor, positive)
            without the pairs held out, `retrieval/` (BEIR: corpus.jsonl, queries.jsonl,
            qrels/test.tsv) whose queries are the summaries held out.
        facts: Counts, in all and for each package.

    Raises:
        TeachonceError: a package is not installed or has no Python source.
    """
    sentences: dict[str, None] = {}
    pairs: list[Pair] = []
    packages: dict[str, dict[str, int]] = {}
    for name in params.packages:
        with _without_collector():
            found = [paragraphs(text) for text in _docstrings(name)]
        candidates = dict.fromkeys(s for prose in found for p in prose for s in p.sentences)
        ours = dict.fromkeys(filter(reads_well, candidates))
        its_pairs = [pair for prose in found if (pair := pair_of(prose))]
        packages[name] = {"docstrings": len(found), "sentences": len(ours), "pairs": len(its_pairs)}
        log.info("docs: %s, %s sentences, %s pairs", name, f"{len(ours):,}", f"{len(its_pairs):,}")
        sentences |= ours
        pairs += its_pairs
    texts = in_fair_order(sentences)[: params.max_texts]
    unique = unambiguous(pairs)
    # Half at most: a test that leaves nothing to learn from is of no use.
    heldout = unique[: min(params.heldout_pairs, len(unique) // 2)]
    rest = unique[len(heldout) :]
    others = [pair.description for pair in rest[:MAX_OTHER_DOCUMENTS]]
    with durable.replace_folder(out) as folder:
        _write_lines(folder / "texts.jsonl", ({"text": text} for text in texts))
        _write_lines(
            folder / "pairs.jsonl",
            ({"anchor": pair.summary, "positive": pair.description} for pair in rest),
        )
        _write_retrieval(folder / "retrieval", heldout, others)
    counts = {
        "texts": len(texts),
        "pairs": len(rest),
        "queries": len(heldout),
        "documents": len(heldout) + len(others),
    }
    write_json(facts, {**counts, "packages": packages})
    return Outcome(
        stage="docs",
        made=out,
        summary=f"{len(texts):,} sentences and {len(rest):,} pairs of {len(packages)} packages; "
        f"{len(heldout):,} queries held out, to be found among {counts['documents']:,} descriptions",
        facts={**counts, "packages": packages},
    )


def in_fair_order(texts: Iterable[str]) -> list[str]:
    """Texts by their blake2b: any first part of it is a fair sample of all packages.

    A text keeps its place among the others when a package is added, so few shards change.
    """
    return sorted(texts, key=_hash)


def unambiguous(pairs: Iterable[Pair]) -> list[Pair]:
    """Each pair once, in fair order, without those whose summary or description another pair has too.

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


def pair_of(prose: list[Paragraph]) -> Pair | None:
    """Summary and description of one documentation string.

    The summary is its first paragraph if that is one sentence; the description begins the first further
    paragraph before any heading that begins well: what stands under "Notes" rarely says what it is.
    """
    opening = [paragraph.sentences for paragraph in prose if not paragraph.heading]
    if len(opening) < 2 or len(opening[0]) != 1 or not reads_well(opening[0][0]):
        return None
    summary = opening[0][0]
    descriptions = (_beginning(sentences) for sentences in opening[1:])
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
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# --- files


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


# --- where documentation strings are


def _not_installed(name: str) -> TeachonceError:
    return TeachonceError(
        "docs.packages",
        f"no installed package is imported as {shown(repr(name))}",
        "install it, or take it out of docs.packages in params.yaml",
    )


def _docstrings(name: str) -> Iterator[str]:
    """The documentation strings of a package, by path and line; files that do not parse have none."""
    for path in _source_paths(name):
        content = path.read_bytes()
        if b'"""' not in content and b"'''" not in content:
            continue  # saves a tenth of the time; what else documents in one line has little to say
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "\d" in a stranger's string is not our warning
                tree = ast.parse(content)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        yield from _documented(tree)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Parsing makes millions of nodes without a cycle; looking for one took a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _documented(node: ast.AST) -> Iterator[str]:
    """The strings of a module, its classes and functions, and theirs, in the order of the file."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in getattr(node, "body", ()):
        # Definitions also stand under `if` and `try`; a lambda's body is no list and has none.
        if isinstance(child, ast.stmt):
            yield from _documented(child)


def _source_paths(name: str) -> list[Path]:
    """The .py files of a package or module, sorted, without its tests.

    Only the top-level name is looked up: for a dotted one, Python would import what stands before it.
    """
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # it is loaded, and does not say from where
        spec = None
    if spec is None:
        raise _not_installed(name)
    paths = [Path(spec.origin)] if spec.has_location and spec.origin else []
    for folder in spec.submodule_search_locations or ():
        paths += sorted(path for path in Path(folder).rglob("*.py") if not _is_test(path, folder))
    paths = [path for path in dict.fromkeys(paths) if path.suffix == ".py"]
    if not paths:
        raise TeachonceError(
            "docs.packages",
            f"{name} has no Python source to read",
            "take it out of docs.packages in params.yaml",
        )
    return paths


def _is_test(path: Path, folder: str) -> bool:
    parts = path.relative_to(folder).parts
    return path.name.startswith(("test_", "conftest")) or not TEST_FOLDERS.isdisjoint(parts[:-1])


TEST_FOLDERS = {"test", "tests", "_test", "_tests", "testing", "_testing", "idle_test"}

# --- what in them is prose

# Sections of numpydoc whose unindented lines are names and types, not sentences.
TABLE_SECTIONS = {
    *("parameters", "other parameters", "keyword arguments", "arguments", "args", "keyword args"),
    *(
        "returns",
        "return",
        "yields",
        "yield",
        "receives",
        "raises",
        "warns",
        "attributes",
        "methods",
    ),
    *("see also", "references", "reference", "examples", "example", "inputs", "outputs", "input"),
    *("output", "usage", "properties", "functions", "classes", "routine listings", "contents"),
}

UNDERLINE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}\s*$")
FENCE = re.compile(r"\s*```")  # not ~~~, which underlines headings in reST
# A line of code, markup or a list. From it on, the block up to the next blank line is no prose.
NO_PROSE = re.compile(
    r"""
      >>>|\.\.\.(\s|$)|\$\s|In\s\[      # sessions
    | \.\.(\s|$)|:[\w ]+.*?:(\s|$)|@\w  # directives, fields
    | [-*+•]\s|\(?\w{1,2}[.)]\s         # lists
    | [|+]|<|\#|[=\-~^]{3}              # tables, HTML, headings
    | https?://\S+$
    """,
    re.VERBOSE,
)


def paragraphs(docstring: str) -> list[Paragraph]:
    """The prose of a documentation string, markup unwrapped, cut into sentences.

    Only lines without indentation are prose: arguments (Google), bodies of directives, literal blocks,
    code and continued list items are all indented, whatever the convention.
    """
    found = []
    for heading, lines in _blocks(docstring):
        sentences = split_sentences(unwrapped(" ".join(lines)))
        if sentences:
            found.append(Paragraph(heading, sentences))
    return found


def _blocks(docstring: str) -> Iterator[tuple[str, list[str]]]:
    """Blocks of unindented prose lines with their heading; those of table sections are left out."""
    reader = _BlockReader()
    lines = [*_outside_fences(docstring.expandtabs()), "", ""]
    for line, below in pairwise(lines):
        block = reader.feed(line, below)
        if block and reader.block_heading.casefold() not in TABLE_SECTIONS:
            yield reader.block_heading, block


def _outside_fences(docstring: str) -> Iterator[str]:
    """Lines, with a blank one for each that belongs to a fenced block."""
    fenced = False
    for line in docstring.split("\n"):
        border = bool(FENCE.match(line))
        fenced ^= border
        yield "" if fenced or border else line.rstrip()


class _BlockReader:
    """Collects the lines of one block; `closed` means that the rest of it is no prose."""

    def __init__(self) -> None:
        self.heading = self.block_heading = ""
        self.block: list[str] = []
        self.closed = False

    def feed(self, line: str, below: str) -> list[str]:
        """Take the next line; returns the block that ends before it, or nothing."""
        if not line:
            return self._end()
        if UNDERLINE.match(line):
            self.closed = False
        elif UNDERLINE.match(below):
            ended = self._end()
            self.heading = line.strip().rstrip(":")
            return ended
        elif line[0] == " ":
            # What stands over an indented line is its term or heading, and not a sentence.
            self.block, self.closed = self.block[:-1], True
        elif self.closed or NO_PROSE.match(line):
            self.closed = True
        else:
            self.block.append(line)
        return []

    def _end(self) -> list[str]:
        ended, self.block, self.closed = self.block, [], False
        self.block_heading = self.heading
        return ended


MARKUP = re.compile(r"[`*_\[]|::$|\s\s")
ROLE = re.compile(r":[a-zA-Z][\w:+.-]*:`([^`]*)`")
LINK = re.compile(r"\[([^\]]+)\]\((?:[^()\s]|\([^()\s]*\))+\)")
DOUBLE_TICKS = re.compile(r"``(.+?)``")
BRACKETED_TICKS = re.compile(r"\[(`[^`]+`)\](?!\()")
TICKS = re.compile(r"`([^`]+)`(?:__?(?!\w))?")
TARGET = re.compile(r"(.+?)\s*<[^<>]+>$")
STARS = re.compile(r"(?<![\w*])(\*{1,2})(?=[^\s*])([^*]*[^\s*])\1(?![\w*])")
FOOTNOTE = re.compile(r"\s*\[(?:\d+|#\w*|[A-Z][\w+]*\d{2,4}[a-z]?)\]_+")
NAMED_LINK = re.compile(r"\b([A-Za-z]\w*?)__?(?=[\s.,;)]|$)")
SPACES = re.compile(r"\s+")


def unwrapped(text: str) -> str:
    """A paragraph without inline markup of reST and Markdown: what a reader of the page would see."""
    if not MARKUP.search(text):
        return text
    text = ROLE.sub(lambda m: _link_text(m[1]), text)
    text = LINK.sub(r"\1", text)
    text = BRACKETED_TICKS.sub(r"\1", text)
    text = DOUBLE_TICKS.sub(lambda m: m[1].strip("` "), text)
    text = TICKS.sub(lambda m: _link_text(m[1]), text)
    text = STARS.sub(r"\2", text)
    text = FOOTNOTE.sub("", text)
    text = NAMED_LINK.sub(r"\1", text)
    text = text.replace("::", ":") if text.endswith("::") else text
    return SPACES.sub(" ", text).strip()


def _link_text(inner: str) -> str:
    """`title <target>` -> title; `~package.module.Name` -> Name."""
    if inner.startswith("~"):
        return inner.rsplit(".", 1)[-1].lstrip("~")
    titled = TARGET.match(inner)
    return titled[1] if titled else inner.lstrip("!")


# --- where a sentence ends

BORDER = re.compile(r"""[.!?]["')\]]*\s+(?=["'(\[]?[A-Z0-9])""")
ABBREVIATION = re.compile(
    r"""(?:^|[\s("'\[])(?:e\.g|i\.e|cf|vs|viz|al|[Ff]igs?|[Ee]qs?|[Ss]ecs?|[Cc]h|[Rr]efs?|[Nn]o|[Vv]ol|
    [Pp]p?|[Ee]d|[Aa]pprox|resp|w\.r\.t|a\.k\.a|incl|Dr|Mr|Mrs|Ms|Prof|St|Jr|Inc|Dept|Proc|Trans|Conf|
    Univ|J|[A-Z])\.["')\]]*\s+$""",
    re.VERBOSE,
)


def split_sentences(text: str) -> list[str]:
    """Cut after `.`, `!` or `?` before a capital or a digit, but not after an abbreviation or initial."""
    sentences, start = [], 0
    for border in BORDER.finditer(text):
        if not ABBREVIATION.search(text[start : border.end()]):
            sentences.append(text[start : border.end()].strip())
            start = border.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


# --- which sentence is one

_FUNCTION_WORDS = """
    a about after all also an and another any are as at be because been before being between both but by
    can cannot does each either else every for from has have how if in into is it its like may more most
    must no not of on once one only or other our out over same should since so some such than that the
    their them then there these they this those through to two under unless until up upon used using was
    we were what when where whether which while who whose will with within without would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")  # noqa: RUF001 - the apostrophe that people type
NAME = re.compile(r"\S(?:[_(\[]\w|\.\w|\d)\S*")
# Code, mathematics, markup left over, addresses; notes to oneself, licences, mere pointers to elsewhere;
# and two sentences, or a heading and one, that were written without a border between them.
NOT_ENGLISH = re.compile(
    r"""[\\{}|<>=`$^~@]|\w+_\w+\(|\*\*|::|https?:|www\.|\[\d*\]|\.\.|\s[.,;:!?](?:\s|$)|\s[*+/%-]\s
    |\s--?\w|\s/\w|\bself\b|^(?:Returns?|Args?|Raises|Yields):
    |\b(?:TODO|FIXME|XXX|HACK|noqa|pragma|[Cc]opyright|[Ll]icensed?|[Dd]eprecated)\b|^See\s|^Read\smore
    |[a-z)]{4}\.\s+[a-z]|[a-z]\s(?:The|This|These|If|It|We|For|When)\s""",
    re.VERBOSE,
)
PAIRED = ("()", "[]")


def reads_well(sentence: str) -> bool:
    """Whether a sentence is English prose: a capital, a full stop, words between, little else."""
    words = WORD.findall(sentence)
    if len(sentence) not in SENTENCE_CHARS or not MIN_WORDS <= len(words) <= MAX_WORDS:
        return False
    if not sentence[0].isupper() or not sentence.rstrip("\"')").endswith((".", "!", "?")):
        return False
    if NOT_ENGLISH.search(sentence) or not _balanced(sentence):
        return False
    letters = sum(map(str.isalpha, sentence)) + sentence.count(" ")
    names = len(NAME.findall(sentence))
    common = sum(word in FUNCTION_WORDS for word in map(str.lower, words))
    return letters >= 0.88 * len(sentence) and 5 * names <= len(words) and 8 * common >= len(words)


def _balanced(sentence: str) -> bool:
    closed = all(sentence.count(pair[0]) == sentence.count(pair[1]) for pair in PAIRED)
    return closed and sentence.count('"') % 2 == 0
