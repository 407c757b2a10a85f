"""What a model says of itself in its small files, and what it leaves for a person to decide.

No torch here: `check` asks before anything is computed. The loader asks the same functions again, since a
stage can run without `check`; so nothing is guessed by either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.models import MODULES, modules_of
from storage.errors import TeachonceError, shown

POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Key of an older pooling configuration -> the mode it stands for."""


def decided_pooling(folder: Path, setting: str | None, *, address: str) -> str | None:
    """The pooling that a transformer without modules.json gets; None where that file decides.

    Args:
        folder: The model.
        setting: What a person says: a mode, or None.
        address: The setting, to name in an error.

    Raises:
        TeachonceError: neither the model nor the setting says it, or they say different things.
    """
    if not (folder / MODULES).is_file():
        if setting is None:
            raise TeachonceError(
                address,
                f"null, and {folder} has no {MODULES}, so nothing says how the vectors of tokens become "
                "that of a text",
                "set it to what the model's authors say (mean, cls, lasttoken, …), or name a folder with "
                f"{MODULES}",
            )
        return setting
    if setting is not None:
        own = _pooling_modes(folder, address)
        if own != [setting]:
            said = " and ".join(own) if own else "no pooling"
            raise TeachonceError(
                address,
                f"{setting}, but {folder / MODULES} says {said}",
                "set it to null: the model knows its own pooling",
            )
    return None


def _pooling_modes(folder: Path, address: str) -> list[str]:
    """The modes of all pooling modules of a model."""
    modes: list[str] = []
    for kind, path in modules_of(folder, address):
        if kind == "Pooling":
            config = read_object(folder / path / "config.json", address)
            mode = config.get("pooling_mode")
            if mode is None:
                modes += [name for flag, name in POOLING_FLAGS.items() if config.get(flag)] or [
                    "mean"
                ]
            else:
                modes += [mode] if isinstance(mode, str) else [str(one) for one in mode]
    return modes


def read_object(path: Path, address: str) -> Mapping[str, Any]:
    """A JSON object of a model.

    Raises:
        TeachonceError: it is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TeachonceError(
            address, f"{path} cannot be read ({shown(error)})", "fetch the file again"
        ) from None
    if not isinstance(found, dict):
        raise TeachonceError(address, f"{path} is no JSON object", "fetch the file again")
    return found
