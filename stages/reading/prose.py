"""Split a docstring into English sentences, and judge which of them are prose."""

from __future__ import annotations

import re

SENTENCE_CHARS = range(25, 401)
MIN_WORDS = 5
MAX_WORDS = 60

BLANK_LINES = re.compile(r"\n\s*\n")
# What a block of lines may hold that makes it a list, a table, a session, a directive, a heading or code.
NO_PROSE = re.compile(
    r"""
      ^\s                                                      # indented: code, items, definitions
    | ^(?:>>>|\.\.(?:\s|\.|$)|\$\s|```|:[\w ]+:|@\w)           # sessions, directives, fields
    | ^(?:[-*+•]\s|\(?\w{1,2}[.)]\s|[|+<\#]|https?://\S+$)     # lists, tables, HTML, addresses
    | ^[=\-~^"'`\#*+.:_]{3,}(?:\s|$)                           # underlines, borders of tables
    """,
    re.VERBOSE | re.MULTILINE,
)
# :role:`~package.module.Name`, ``code``, `title <target>`_ : what is seen of it is the first group.
TICKS = re.compile(r"(?::[\w:+.-]+:)?`+(?:~[\w.]*\.)?([^`<]*[^`<\s])(?:\s*<[^<>`]*>)?`+_*")
LINK = re.compile(r"\[([^\]]+)\]\([^()\s]*\)")  # of Markdown
STARS = re.compile(r"(?<![\w*])(\*{1,2})(?=[^\s*])([^*]*[^\s*])\1(?![\w*])")
FOOTNOTE = re.compile(r"\s*\[[\w#]+\]_+")


def paragraphs(docstring: str) -> list[list[str]]:
    """Returns the sentences of each paragraph: of the summary, then of the description.

    Sections (arguments, returns, notes, examples of any convention) and sentences that are no prose are
    left out.
    """
    # Here, and below: the extra `demo` has them, and a project with texts of its own needs neither.
    import docstring_parser

    description = docstring_parser.parse(docstring).description or ""
    blocks = (block for block in BLANK_LINES.split(description) if not NO_PROSE.search(block))
    return [sentences for block in blocks if (sentences := _sentences(block))]


def _sentences(block: str) -> list[str]:
    import sentencex

    sentences = [""]
    for part in sentencex.segment("en", unwrapped(" ".join(block.split()))):
        # Without a blank before it, it is the rest of a name: pandas.DataFrame.
        if sentences[-1].endswith(" ") or not sentences[-1]:
            sentences.append(part)
        else:
            sentences[-1] += part
    return [sentence for each in sentences if (sentence := each.strip())]


def unwrapped(text: str) -> str:
    """Returns a paragraph without the inline markup of reST and Markdown."""
    return FOOTNOTE.sub("", STARS.sub(r"\2", LINK.sub(r"\1", TICKS.sub(r"\1", text))))


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
    r"""[\\{}|<>=`$^~@]|\w+_\w+\(|\*\*|::|https?:|www\.|\[[\w.]*\]|\.\.|\s[.,;:!?](?:\s|$)|\s[*+/%-]\s
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
