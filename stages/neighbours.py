"""Which mined neighbours each recipe reads, in a file for each, so that DVC retrains nobody without need.

DVC knows no dependency that only some entries of a template have, so every `distill` depends on the file of
its recipe: of one that reads no neighbours it never changes, however often they are mined anew.
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
    """Write the files.

    Args:
        recipes: All of params.yaml, by name.
        negatives: What was mined.
        out: The folder, replaced as a whole.
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
