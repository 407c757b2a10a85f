"""`teachonce diff A B`: in which settings and shards two manifests differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.commands.ls import some
from stages.outcome import Facts, Outcome
from storage.errors import shown
from storage.manifest import Manifest
from storage.store import canonical_json
from storage.upkeep.difference import compare
from storage.upkeep.inventory import SHOWN_DIGITS


def run(a: Path, b: Path) -> Outcome:
    """Compare two manifests.

    Raises:
        MissingError: one of the files does not exist.
        DamagedError: one of the files is no manifest.
    """
    first, second = Manifest.load(a, None), Manifest.load(b, None)
    difference = compare(first, second)
    return Outcome(
        stage="diff",
        made=a,
        summary=(
            f"{'equal' if difference.none else 'they differ'}; {len(difference.common):,} shards in "
            f"both, {len(difference.only_a):,} only in A, {len(difference.only_b):,} only in B, "
            f"{len(difference.copies):,} in both as another copy"
        ),
        facts={"a": str(a), "b": str(b), "equal": difference.none, **asdict(difference)},
    )


def lines(facts: Facts) -> Iterator[str]:
    """Yield lines for people, with A's value first."""
    if facts["kind"]:
        yield f"kind: {facts['kind'][0]} | {facts['kind'][1]}"
    for name, sides in facts["recipe"].items():
        yield f"recipe.{shown(name)}: {_side(sides, 'a')} | {_side(sides, 'b')}"
    if facts["parent"]:
        a, b = (parent and f"{parent[:SHOWN_DIGITS]}…" for parent in facts["parent"])
        yield f"parent: {a} | {b}"
    if facts["moved"]:
        yield "the same shards in another order, so rows have other ids"
    for title, word in (("only A", "only_a"), ("only B", "only_b"), ("other copy", "copies")):
        yield from some(f"{title}: {key}" for key in facts[word])


def _side(sides: Mapping[str, Any], side: str) -> str:
    return shown(canonical_json(sides[side]).decode().strip()) if side in sides else "not there"
