"""The lineage of a student: the file `teachonce.json` in its folder, written when it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage import regular
from storage.errors import DamagedError
from storage.roles import ROLES, Role

LINEAGE = "teachonce.json"

SIMILARITIES_ONLY = {"gram"}
"""Objectives whose loss stays the same if all of a student's vectors are rotated together."""


def read_lineage(folder: Path) -> dict[str, Any]:
    """Returns the lineage of the model in `folder`; empty if it was not trained by teachonce.

    Raises:
        DamagedError: the file is no JSON object.
    """
    path = folder / LINEAGE
    try:
        lineage = json.loads(regular.content(path))
        if not isinstance(lineage, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, "no lineage", "train the student again") from error
    return lineage


def prompts_read(lineage: Mapping[str, Any]) -> dict[Role, str]:
    """Returns role -> what a model reads before texts of that role, as in training; no empty ones.

    Not from the model's own configuration: a start may keep prompts that no student of it was taught with.
    """
    prompts = lineage.get("prompts", {})
    return {role: str(prompts[role]) for role in ROLES if prompts.get(role)}


def leaves_teacher_space(lineage: Mapping[str, Any]) -> bool:
    """Whether a model's vectors may be outside the teacher's space.

    That is so if it learned similarities only, which any rotation preserves, or was finetuned without a
    term on the teacher's vectors. A model that learned differences (`comparative`, centred `kd`) may be
    shifted, but not rotated.
    """
    if (finetuned := lineage.get("finetuned")) is not None:
        return not finetuned["recipe"]["distill_weight"]
    learned = {objective["name"] for objective in lineage.get("recipe", {}).get("objectives", [])}
    return bool(learned) and learned <= SIMILARITIES_ONLY
