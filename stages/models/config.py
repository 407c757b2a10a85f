"""A model's own configuration, and the choices that it leaves to the user.

Imports no torch: `check` calls these functions before anything is computed. The loader calls them again,
since a stage can run without `check`; neither guesses.

This file is long because each choice is read from several generations of configuration files.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.models.folder import MAX_JSON_BYTES, MODULES, ROUTERS, TRANSFORMER, modules_of
from stages.params import EmbedParams, PromptsParams
from storage import regular
from storage.errors import TeachonceError, shown
from storage.roles import ROLES, Role

DENSE = "SentenceTransformer"
"""Values of `model_type` of models with one vector a text."""

TEXTS = "text"
"""Name of the text modality in a router."""

NAMED: dict[Role, str] = {"text": "plain texts", "query": "queries", "document": "documents"}

OWN_NAMES: Mapping[Role, Sequence[str]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}
"""Role -> the names of a model's own prompts for it, the first that it has wins.

These are the names that sentence-transformers' `encode_document` looks for; but its version 6 finds an
empty `document` in every model, so that it puts nothing before the documents of one that says `passage`.
"""

NO_PROMPTS: Mapping[Role, str] = {}

CHARACTERS = 4
"""Of a token, in most languages that are written in letters."""

LEAST_ROOM = 4
"""Tokens of a text that must be read behind a prompt, as embed.max_tokens must be 4 at least."""

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
    """Returns the pooling of a transformer without modules.json; None if that file exists and decides.

    Args:
        folder: The model.
        setting: The pooling mode in the settings, or None.
        address: The setting, to name in an error.

    Raises:
        TeachonceError: neither the model nor the setting names a pooling, or they contradict each other.
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
            own_pooling = " and ".join(own) if own else "no pooling"
            raise TeachonceError(
                address,
                f"{setting}, but {folder / MODULES} says {own_pooling}",
                "set it to null: the model knows its own pooling",
            )
    return None


def undecided(
    folder: Path, params: EmbedParams, *, reads_texts: bool = True
) -> Iterator[TeachonceError]:
    """Returns the problems with a teacher's choices that the settings `embed` leave open or contradict.

    Args:
        folder: The model.
        params: The settings `embed`.
        reads_texts: Whether it reads texts that are neither queries nor documents.
    """
    questions: Sequence[tuple[str, Callable[[str], object]]] = (
        ("pooling", lambda at: decided_pooling(folder, params.pooling, address=at)),
        (
            "prompts",
            lambda at: (
                check_prompts(folder, params.prompts, address=f"{at}.text") if reads_texts else None
            ),
        ),
        ("similarity", lambda at: check_similarity(folder, params.similarity, address=at)),
        ("dim", lambda at: check_width(folder, params.dim, address=at)),
        ("teacher", lambda at: decided_routes(folder, address=at)),
        ("max_tokens", lambda at: _check_room(folder, params, at)),
    )
    for setting, ask in questions:
        # A setting that is wrong in params.yaml is no attribute; `check` has listed it.
        if hasattr(params, setting):
            try:
                ask(f"embed.{setting}")
            except TeachonceError as error:
                yield error


def own_prompts(folder: Path, address: str) -> dict[str, str]:
    """Returns the non-empty prompts in a model's configuration, by name."""
    declared = model_config(folder, address).get("prompts")
    prompts = declared.items() if isinstance(declared, dict) else ()
    return {str(name): str(prompt) for name, prompt in prompts if prompt}


@dataclass(frozen=True)
class Prompt:
    """What stands before the texts of a role, empty for nothing, and what says so, in a few words."""

    text: str
    origin: str


def prompts_by_role(settings: PromptsParams, own: Mapping[str, str]) -> dict[Role, Prompt]:
    """Returns the prompt of each role: that of the settings, else the model's own.

    A model without prompts reads queries and documents as it reads texts. One that has prompts, but none
    for a role, reads that role's texts as they are, as by sentence-transformers' `encode_query`.

    Args:
        settings: The settings `embed.prompts`.
        own: The model's `own_prompts`.
    """
    return {role: _prompt_of(role, settings, own) for role in ROLES}


def _prompt_of(role: Role, settings: PromptsParams, own: Mapping[str, str]) -> Prompt:
    setting: str | None = getattr(settings, role)
    if setting is not None:
        return Prompt(setting, f"embed.prompts.{role}")
    if role == "text":
        return Prompt("", "the model has none")
    name = next((name for name in OWN_NAMES[role] if name in own), None)
    if name is not None:
        return Prompt(own[name], f"the model's own, {name}")
    if own:
        return Prompt("", f"the model has none for {NAMED[role]}")
    return Prompt(settings.text or "", "as before texts")


def with_prompts(params: EmbedParams, own: Mapping[str, str]) -> EmbedParams:
    """Returns the settings of a teacher with the prompt of each role in place of null."""
    prompts = prompts_by_role(params.prompts, own)
    decided = PromptsParams(**{role: prompt.text for role, prompt in prompts.items()})
    return params.model_copy(update={"prompts": decided})


def check_prompts(folder: Path, settings: PromptsParams, *, address: str) -> None:
    """Raise if nothing says what stands before texts that are neither queries nor documents.

    Args:
        folder: The model.
        settings: The settings `embed.prompts`.
        address: The setting, to name in an error.

    Raises:
        TeachonceError: the setting is null, and the model has prompts to choose from.
    """
    own = own_prompts(folder, address)
    if own and settings.text is None:
        default = model_config(folder, address).get("default_prompt_name")
        names = ", ".join(
            f"{shown(name)}{' (its default)' if name == default else ''}: {shown(repr(prompt))}"
            for name, prompt in own.items()
        )
        raise TeachonceError(
            address,
            f"null, but the model in {folder} has prompts of its own ({names})",
            'write the one before a text that is neither query nor document, or "" for none',
        )


def check_similarity(folder: Path, setting: str | None, *, address: str) -> None:
    """Raise if a model's own similarity ranks otherwise than cosine, and the settings do not accept that.

    Dot products and distances of unit vectors rank like their cosines.
    """
    own = model_config(folder, address).get("similarity_fn_name") or "cosine"
    same = own == "cosine" or (
        own in {"dot", "euclidean"} and _last_kinds(folder, address) == {"Normalize"}
    )
    if setting is None and not same:
        raise TeachonceError(
            address,
            f"null, but the model in {folder} compares its vectors by {shown(own)}, while mining, training "
            "and evaluation compare by cosine",
            "set it to cosine if that is what you want all the same; students are made for cosine",
        )


def check_width(folder: Path, setting: int | None, *, address: str) -> None:
    """Raise if a model cuts its vectors to a smaller width, and `embed.dim` is not set."""
    own = model_config(folder, address).get("truncate_dim")
    if own is not None and setting is None:
        raise TeachonceError(
            address,
            f"null, but the model in {folder} keeps {shown(own)} values of each vector (its truncate_dim)",
            f"set it to {shown(own)}, or to the number of all values",
        )


def room_for_texts(
    max_tokens: int, *, around: int, prompted: Role | None, address: str = "embed.max_tokens"
) -> int:
    """Returns the number of tokens that are left for a text.

    Args:
        max_tokens: Number of tokens that are read at once.
        around: Number of special and prompt tokens.
        prompted: Role of the texts; None if no prompt is before them: then any `max_tokens` is accepted.
        address: The setting that says `max_tokens`, to name in an error.

    Raises:
        TeachonceError: too few tokens are left to tell texts apart.
    """
    room = max_tokens - around
    least = 1 if prompted is None else LEAST_ROOM
    if room < least:
        raise TeachonceError(
            address,
            f"{max_tokens}, but special tokens and the prompt take {around} of them: {max(room, 0)} are "
            f"left for a text, and it takes at least {least}",
            f"set it to {around + least} or more, or write a shorter embed.prompts.{prompted or 'text'}",
        )
    return room


def _check_room(folder: Path, params: EmbedParams, address: str) -> None:
    """Raise if a prompt leaves no room for a text, in any transformer of a model."""
    if not hasattr(params, "prompts"):
        return
    prompts = prompts_by_role(params.prompts, own_prompts(folder, address))
    prompted = {role: prompt.text for role, prompt in prompts.items() if prompt.text}
    if not prompted:
        return
    from tokenizers import Tokenizer

    for path in transformers_of(folder, address):
        file = path / "tokenizer.json"
        if file.is_file():  # others are tokenised in Python; the loader asks those
            try:
                tokenizer = Tokenizer.from_file(str(file))
            except Exception as error:  # its own class is none but Exception
                raise TeachonceError(
                    address, f"{file} cannot be read ({shown(error)})", "fetch the file again"
                ) from None
            tokenizer.no_truncation()
            tokenizer.no_padding()
            special = tokenizer.num_special_tokens_to_add(False)
            for role, prompt in prompted.items():
                around = special + len(tokenizer.encode(prompt, add_special_tokens=False).ids)
                room_for_texts(params.max_tokens, around=around, prompted=role)


def transformers_of(folder: Path, address: str) -> list[Path]:
    """Returns the folders of a model's transformers, those behind a router included."""
    if not (folder / MODULES).is_file():
        return [folder]
    folders = []
    for kind, path in modules_of(folder, address):
        if kind == TRANSFORMER:
            folders.append(folder / path)
        elif kind in ROUTERS:
            router = _read_router(folder / path, address)
            folders += [
                folder / path / name for name, kind in router.kinds.items() if kind == TRANSFORMER
            ]
    return folders


def decided_routes(folder: Path, *, address: str) -> dict[Role, str] | None:
    """Returns the route of each role's texts through a router; None for a model without one.

    As sentence-transformers routes them: queries by `encode_query`, documents by `encode_document`, the
    texts of a corpus by `encode`.

    Raises:
        TeachonceError: texts of a role have no route, or it has several routers.
    """
    routers = [path for kind, path in modules_of(folder, address) if kind in ROUTERS]
    if not routers:
        return None
    router = _read_router(folder / routers[0], address)
    if len(routers) > 1 or ROUTERS & set(router.kinds.values()):
        raise TeachonceError(
            address,
            f"the model in {folder} has several routers",
            "name a model that has one router or none",
        )
    tasks: dict[Role, str | None] = {"text": None, "query": "query", "document": "document"}
    routes = {role: router.route(task) for role, task in tasks.items()}
    lost = [NAMED[role] for role, route in routes.items() if route is None]
    if lost:
        raise TeachonceError(
            address,
            f"the router of the model in {folder} says no route for {' and '.join(lost)}; its routes are "
            f"{', '.join(map(shown, router.routes))}",
            "save the model with routes named query and document and a default_route, or name a model "
            "without a router",
        )
    return {role: route for role, route in routes.items() if route is not None}


def first_kind(folder: Path, address: str) -> str:
    """Returns the kind of the module that reads texts."""
    modules = modules_of(folder, address)
    return modules[0][0] if modules else TRANSFORMER


def check_one_model(folder: Path, *, address: str) -> None:
    """Raise for a router, which has several models and cannot be a start."""
    if any(kind in ROUTERS for kind, _ in modules_of(folder, address)):
        raise TeachonceError(
            address,
            f"the model in {folder} is a router of several models",
            "name a model without a router to start from",
        )


@dataclass(frozen=True)
class _Router:
    """A router's configuration."""

    routes: Mapping[str, Sequence[str]]  # name -> the modules that a text passes, by name
    kinds: Mapping[str, str]  # module -> its kind
    default: str | None  # the route of texts without a rule
    rules: Mapping[Any, str]  # (task, modality) -> route; None stands for any

    def route(self, task: str | None) -> str | None:
        """Returns the route of texts with this task, by sentence-transformers' rules; None for none."""
        for rule in ((task, TEXTS), (task, None), (None, TEXTS), (None, None)):
            if rule in self.rules:
                return self.rules[rule]
        for name in (task, TEXTS):
            if name in self.routes:
                return name
        return self.default if task is None else None


def _read_router(folder: Path, address: str) -> _Router:
    path = folder / "router_config.json"
    router_config = read_object(path if path.is_file() else folder / "config.json", address)
    try:
        routes = {str(name): list(modules) for name, modules in router_config["structure"].items()}
        settings = router_config.get("parameters", {})
        default = settings.get("default_route")
        if default is None and settings.get("allow_empty_key", True):
            default = next(iter(routes), None)
        return _Router(
            routes,
            {
                str(name): str(kind).rpartition(".")[2]
                for name, kind in router_config["types"].items()
            },
            default,
            {
                ast.literal_eval(rule): route
                for rule, route in (settings.get("route_mappings") or {}).items()
            },
        )
    except (ValueError, TypeError, LookupError, AttributeError, SyntaxError) as error:
        raise TeachonceError(
            address, f"{folder} is no router ({shown(error)})", "fetch the folder again"
        ) from None


def _last_kinds(folder: Path, address: str) -> set[str]:
    """The kinds of the last module that a text passes: one, or one for each route."""
    modules = modules_of(folder, address)
    if not modules:
        return set()
    kind, path = modules[-1]
    if kind not in ROUTERS:
        return {kind}
    router = _read_router(folder / path, address)
    return {router.kinds.get(route[-1], "") if route else "" for route in router.routes.values()}


def model_config(folder: Path, address: str) -> Mapping[str, Any]:
    """Returns the content of config_sentence_transformers.json; empty for older models without it."""
    path = folder / "config_sentence_transformers.json"
    return read_object(path, address) if path.is_file() else {}


def _pooling_modes(folder: Path, address: str) -> list[str]:
    """Returns the modes of all pooling modules of a model."""
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
                modes += [mode] if isinstance(mode, str) else [str(each) for each in mode]
    return modes


def read_object(path: Path, address: str) -> Mapping[str, Any]:
    """Read a JSON object from a model's folder.

    Raises:
        TeachonceError: the file is missing, or holds no JSON object.
    """
    try:
        content = json.loads(regular.content(path, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise TeachonceError(
            address, f"{path} cannot be read ({shown(error)})", "fetch the file again"
        ) from None
    if not isinstance(content, dict):
        raise TeachonceError(address, f"{path} is no JSON object", "fetch the file again")
    return content
