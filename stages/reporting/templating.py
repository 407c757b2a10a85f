"""Templates of the page and of the card, and the one way in which a text gets into them.

Texts come from strangers' files. Each that a template prints is escaped, whether or not its author thought
of it: in HTML by Jinja2, in Markdown, which Jinja2 does not know, by `escaped`. What is markup already (a
drawing, a fenced block) is a `Markup` and stays as it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from storage.errors import harmless

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
DIRECTION_MARKS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""They change in which direction the text around them is read."""
BLANKS = re.compile("[^\\S\N{NO-BREAK SPACE}]+")


def html(template: str, **values: object) -> str:
    """The HTML that a template makes of `values`.

    Raises:
        jinja2.UndefinedError: the template prints or tests a value that is not there.
    """
    return _environment(True).get_template(template).render(values)


def markdown(template: str, **values: object) -> str:
    """The Markdown that a template makes of `values`; raises as `html` does."""
    return _environment(False).get_template(template).render(values)


@cache
def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("stages.reporting"),
        autoescape=autoescape,
        finalize=_unless_markup(clean if autoescape else escaped),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["fenced"] = fenced
    return environment


def _unless_markup(change: Callable[[object], str]) -> Callable[[object], str]:
    return lambda value: value if isinstance(value, Markup) else change(value)


def clean(text: object) -> str:
    """`text` on one line without what HTML and UTF-8 cannot hold, or what would turn its neighbours around.

    Control characters, lone surrogates and marks that turn the direction of reading are replaced; blanks
    and line ends become one blank. It is not escaped.
    """
    # Not str.isprintable: it refuses the joiners that emoji and Persian are made with.
    visible = "".join(
        REPLACEMENT if unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() else c
        for c in str(text)
    )
    return BLANKS.sub(" ", DIRECTION_MARKS.sub(REPLACEMENT, visible)).strip()


def escaped(text: object) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would take for markup."""
    line = harmless(str(text).replace("\n", "\\n"))
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$])", r"\\\1", line)


def fenced(value: object) -> Markup:
    """`value` as a block of YAML that nothing in it can end; invisible characters are escaped."""
    text = yaml.safe_dump(value, sort_keys=True, allow_unicode=True, width=10_000)
    if harmless(text) != text:
        text = yaml.safe_dump(value, sort_keys=True, allow_unicode=False, width=10_000)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}yaml\n{text}{fence}")
