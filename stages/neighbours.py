"""Write a file for each recipe with the mined neighbours it reads, so that DVC retrains only if needed.

In a DVC template all entries have the same dependencies, so every `distill` depends on the file of its
recipe. The file of a recipe that reads no neighbours never changes, however often they are mined.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stages.outcome import Outcome, write_json
from stages.params import RecipeParams
from storage import durable
from storage.manifest import Manifest

VERSION = 1  # raise it when a code change writes other files for the same recipes and negatives


def run(recipes: Mapping[str, RecipeParams], *, negatives: Manifest, out: Path) -> Outcome:
    """Write a file for each recipe.

    Args:
        recipes: All recipes of params.yaml, by name.
        negatives: The manifest of the mined negatives.
        out: Destination folder, replaced atomically.
    """
    reading = [name for name, recipe in recipes.items() if recipe.reads_neighbours]
    with durable.replace_folder(out) as scratch:
        for name in recipes:
            read = negatives.content if name in reading else None
            write_json(scratch / f"{name}.json", {"negatives": read})
    return Outcome(
        stage="neighbours",
        made=out,
        summary=f"{len(reading)} of {len(recipes)} recipes read mined neighbours"
        + (f": {', '.join(reading)}" if reading else ""),
        facts={"reading": reading},
    )
