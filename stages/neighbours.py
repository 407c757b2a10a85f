"""Write a file for each recipe with the neighbours, mixes, readings and labels it reads, for DVC.

In a DVC template all entries have the same dependencies, so every `distill` depends on the file of its
recipe. The file of a recipe that reads no neighbours never changes, however often they are mined, so its
students are not trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stages.outcome import Outcome, write_json
from stages.params import RecipeParams
from storage import durable
from storage.manifest import Manifest
from storage.store import digest

VERSION = 1  # raise it when a code change writes other files for the same recipes and manifests


def run(
    recipes: Mapping[str, RecipeParams],
    *,
    negatives: Manifest,
    mixes: Manifest | None = None,
    readings: Manifest | None = None,
    labelled: Callable[[], Sequence[tuple[str, str, str]]] = tuple,
    out: Path,
) -> Outcome:
    """Write a file for each recipe.

    Args:
        recipes: All recipes of params.yaml, by name.
        negatives: The manifest of the mined negatives.
        mixes: The manifest of mixes; None if `embed` left none.
        readings: The manifest of readings; None if `shard` left none.
        labelled: Returns the labelled triplets; called only if a recipe reads them.
        out: Destination folder, replaced atomically.
    """
    reads_labels = any(recipe.reads_labels for recipe in recipes.values())
    labels = digest(*(text.encode() for row in labelled() for text in row)) if reads_labels else ""
    reading = [name for name, recipe in recipes.items() if recipe.reads_neighbours]
    with durable.replace_folder(out) as scratch:
        for name in recipes:
            read = {"negatives": negatives.content if name in reading else None}
            if recipes[name].reads_mixes:
                read["mixes"] = mixes.content if mixes else None
            if recipes[name].readings:
                read["readings"] = readings.content if readings else None
            if recipes[name].reads_labels:
                read["labelled"] = labels
            write_json(scratch / f"{name}.json", read)
    return Outcome(
        stage="neighbours",
        made=out,
        summary=f"{len(reading)} of {len(recipes)} recipes read mined neighbours"
        + (f": {', '.join(reading)}" if reading else ""),
        facts={"reading": reading},
    )
