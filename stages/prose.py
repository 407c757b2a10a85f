"""What in a documentation string is prose, where a sentence ends, and which one a person would call one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

SENTENCE_CHARS = range(25, 401)
MIN_WORDS = 5
MAX_WORDS = 60


@dataclass(frozen=True)
class Paragraph:
    """Sentences that stand together, and the heading they stand under ("" before the first)."""

    heading: str
    sentences: list[str]


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
            return []
        if UNDERLINE.match(below):
            ended = self._end()
            self.heading = line.strip().rstrip(":")
            return ended
        if line[0] == " ":
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
