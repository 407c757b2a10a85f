"""Text from outside as Markdown: whatever is in it, it stays text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from storage.errors import harmless, shown


def escaped(text: object) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$])", r"\\\1", shown(text))


def fenced(value: object) -> str:
    """`value` as a block of YAML that nothing in it can end; what is not to be seen is escaped."""
    text = yaml.safe_dump(value, sort_keys=True, allow_unicode=True, width=10_000)
    if harmless(text) != text:
        text = yaml.safe_dump(value, sort_keys=True, allow_unicode=False, width=10_000)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are escaped already; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
