"""The differences between two manifests of one kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from storage.manifest import Manifest
from storage.store import canonical_json


@dataclass(frozen=True)
class Difference:
    """The differences between two manifests, A and B."""

    kind: tuple[str, str] | None  # (A's, B's) if the kinds differ, or None
    # Setting (nested ones dotted) -> {"a": value, "b": value}; a side that lacks it is left out.
    recipe: Mapping[str, Mapping[str, Any]]
    parent: tuple[str | None, str | None] | None  # (A's, B's) if the parents differ, or None
    only_a: tuple[str, ...]  # keys that only A names
    only_b: tuple[str, ...]  # keys that only B names
    copies: tuple[str, ...]  # keys that both name with different copies
    common: tuple[str, ...]  # keys that both name with the same copy
    moved: bool  # whether both name the same keys in another order, so that rows have other ids

    @property
    def none(self) -> bool:
        """Whether the two manifests are equal."""
        shards = self.only_a or self.only_b or self.copies or self.moved
        return not (self.kind or self.recipe or self.parent or shards)


def compare(a: Manifest, b: Manifest) -> Difference:
    """Compare two manifests; keys come in the order of the manifest that names them.

    Sizes are not compared: versions of Arrow may lay out the same values differently.
    """
    ours = {entry.key: entry.sha256 for entry in a.objects}
    theirs = {entry.key: entry.sha256 for entry in b.objects}
    return Difference(
        kind=(a.kind, b.kind) if a.kind != b.kind else None,
        recipe=differing(a.recipe, b.recipe),
        parent=(a.parent, b.parent) if a.parent != b.parent else None,
        only_a=tuple(key for key in ours if key not in theirs),
        only_b=tuple(key for key in theirs if key not in ours),
        copies=tuple(key for key in ours if theirs.get(key, ours[key]) != ours[key]),
        common=tuple(key for key in ours if theirs.get(key) == ours[key]),
        moved=set(ours) == set(theirs) and list(ours) != list(theirs),
    )


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the settings in which two recipes differ: dotted name -> {"a": value, "b": value}."""
    ours, theirs = dict(_flat(a)), dict(_flat(b))
    return {
        name: {side: flat[name] for side, flat in (("a", ours), ("b", theirs)) if name in flat}
        for name in sorted({*ours, *theirs})
        if not _same(name, ours, theirs)
    }


def _same(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    # As fingerprints see them: 1, 1.0 and True are three settings.
    return (
        name in ours
        and name in theirs
        and canonical_json(ours[name]) == canonical_json(theirs[name])
    )


def _flat(recipe: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in recipe.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
