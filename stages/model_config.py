"""What a model says of itself in its small files, and what it leaves for a person to decide.

No torch here: `check` asks before anything is computed. The loader asks the same functions again, since a
stage can run without `check`; so nothing is guessed by either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.models import MODULES, modules_of
from stages.params import EmbedParams
from storage.errors import TeachonceError, shown

DENSE = "SentenceTransformer"
"""What a model of one vector a text calls itself."""

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
    kind = model_config(folder, address).get("model_type") or DENSE
    if kind != DENSE:
        # sentence-transformers would turn it into one, with a pooling that it guesses.
        raise TeachonceError(
            address,
            f"the model in {folder} is a {shown(kind)}, which makes no one vector of a text",
            f"name a {DENSE}",
        )
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


def undecided(folder: Path, params: EmbedParams) -> Iterator[TeachonceError]:
    """What a teacher leaves open and the settings of `embed` do not say, or say otherwise."""
    questions: Sequence[tuple[str, Callable[[str], object]]] = (
        ("pooling", lambda at: decided_pooling(folder, params.pooling, address=at)),
        ("prompt", lambda at: decided_prompt(folder, params.prompt, address=at)),
        ("similarity", lambda at: check_similarity(folder, params.similarity, address=at)),
        ("dim", lambda at: check_width(folder, params.dim, address=at)),
    )
    for setting, ask in questions:
        # A setting that is wrong in params.yaml is no attribute, and is told already.
        if hasattr(params, setting):
            try:
                ask(f"embed.{setting}")
            except TeachonceError as error:
                yield error


def own_prompts(folder: Path, address: str) -> dict[str, str]:
    """The prompts that a model's configuration has, by name, without empty ones."""
    found = model_config(folder, address).get("prompts")
    prompts = found.items() if isinstance(found, dict) else ()
    return {str(name): str(prompt) for name, prompt in prompts if prompt}


def decided_prompt(folder: Path, setting: str | None, *, address: str) -> str:
    """What the teacher reads before every text.

    Args:
        folder: The model.
        setting: What a person says; None: the model has no prompt of its own.
        address: The setting, to name in an error.

    Raises:
        TeachonceError: nobody said it, and the model has prompts.
    """
    own = own_prompts(folder, address) if setting is None else {}
    if own:
        default = model_config(folder, address).get("default_prompt_name")
        names = ", ".join(
            f"{shown(name)}{' (its default)' if name == default else ''}: {shown(repr(prompt))}"
            for name, prompt in own.items()
        )
        raise TeachonceError(
            address,
            f"null, but the model in {folder} has prompts of its own ({names})",
            'write the one that is to stand before every text, whatever it is, or "" for none',
        )
    return setting or ""


def check_similarity(folder: Path, setting: str | None, *, address: str) -> None:
    """Raise if a model compares its vectors by what ranks them otherwise than cosine, and nobody knows.

    Dot products and distances of vectors of length 1 rank as their cosines do.
    """
    own = model_config(folder, address).get("similarity_fn_name") or "cosine"
    modules = modules_of(folder, address)
    same = own == "cosine" or (
        own in {"dot", "euclidean"} and modules[-1:] and modules[-1][0] == "Normalize"
    )
    if setting is None and not same:
        raise TeachonceError(
            address,
            f"null, but the model in {folder} compares its vectors by {shown(own)}, while mining, training "
            "and evaluation compare by cosine",
            "set it to cosine if that is what you want all the same; students are made for cosine",
        )


def check_width(folder: Path, setting: int | None, *, address: str) -> None:
    """Raise if a model itself keeps only the first so many values of each vector, and nobody decided."""
    own = model_config(folder, address).get("truncate_dim")
    if own is not None and setting is None:
        raise TeachonceError(
            address,
            f"null, but the model in {folder} keeps {shown(own)} values of each vector (its truncate_dim)",
            f"set it to {shown(own)}, or to the number of all values",
        )


def model_config(folder: Path, address: str) -> Mapping[str, Any]:
    """config_sentence_transformers.json, or nothing: older models have none."""
    path = folder / "config_sentence_transformers.json"
    return read_object(path, address) if path.is_file() else {}


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
