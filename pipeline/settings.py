"""params.yaml -> Params, or everything that is wrong with it at once, each with its address."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from stages.params import (
    NO_STORE_URL,
    Params,
    Problem,
    RecipeParams,
    Section,
    Sections,
    SettingsError,
    StartParams,
    StudentParams,
    contradictions,
    path_problem,
)
from stages.reading.files import kind_of, located
from storage import durable, regular
from storage.errors import TeachonceError, shown
from storage.regular import IrregularError

# The shipped settings have 6 KB; PyYAML needs a second for this much.
MAX_BYTES = 64 << 10
MAX_VALUES = 20_000
"""In all, each alias counted as often as it is used: a few lines of aliases to aliases are billions."""

MAX_DEPTH = 32
"""Of brackets within brackets; the shipped settings have two."""

ANCHORS = "x-"
"""How a section begins that is there for YAML's anchors alone."""

# Sections that hold named entries: a mistake in one entry must not hide those in the others.
NAMED: dict[str, type[BaseModel]] = {
    "recipes": RecipeParams,
    "starts": StartParams,
    "students": StudentParams,
}


SENTENCES = {
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "must be a whole number"
    ),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "must be a number"),
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be greater than or equal to {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be less than or equal to {le}",
    "string_type": "must be a text (in quotes, if it looks like a number)",
    "string_too_short": "must not be empty",
    "string_unicode": "has half a surrogate pair in it, which no text can hold",
    "string_pattern_mismatch": "must be lower case letters, digits, - and _: at most 64, the first no sign",
    "literal_error": "must be {expected}",
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type"),
        "must be a mapping: a name, a colon and a value on each line",
    ),
    "invalid_key": "has a name that is no text: put it in quotes",
    "tuple_type": "must be a list, such as [a, b]",
    "too_short": "must have at least {min_length} items, and has {actual_length}",
    "too_long": "must have at most {max_length} items, and has {actual_length}",
    "union_tag_invalid": "no objective is named {tag}; `name` is one of {expected_tags}",
    "union_tag_not_found": "has no `name` that says which objective it is",
}
"""pydantic's word for a mistake -> what is said of it, with its bounds."""

RENAMED = {
    "embed.prompt": "embed.prompts.text",
    "export.onnx": "export.formats ([safetensors, onnx] for true, [safetensors] for false)",
}
"""Setting of an earlier version -> its name now."""

SECRETIVE = {"embed.api.key_env", "embed.api.url"}
"""Settings whose wrong values are not told: somebody may have written a key there."""

WRONG = object()
"""In place of a value that is wrong; None may be right."""


def load_params(path: Path) -> Params:
    """Read params.yaml.

    Raises:
        SettingsError: lists every wrong setting with its address.
        TeachonceError: there is no such file.
    """
    content, problems, _ = examine(path)
    if problems:
        raise SettingsError(path.name, problems)
    return Params.model_validate(content)


def examine(path: Path) -> tuple[object, list[Problem], Sections]:
    """What params.yaml says, everything wrong with it, and the sections that are right.

    Raises:
        SettingsError: it is no YAML at all.
        TeachonceError: there is no such file.
    """
    content = _read(path)
    try:
        Params.model_validate(content)
        problems = []
    except ValidationError as error:
        errors = error.errors()
        by_address: dict[str, list[str]] = {}
        for entry in errors:
            if not (entry["type"] == "too_short" and _has_wrong_entries(entry["loc"], errors)):
                by_address.setdefault(_address(entry["loc"]), []).append(_problem(entry))
        # Several sentences of one setting are of the types that it may have; the last has the value.
        problems = [
            (address, ", or ".join([*(each.partition(", got")[0] for each in others), last]))
            for address, (*others, last) in by_address.items()
        ]
    raw = content if isinstance(content, dict) else {}
    sections = _readable(raw)
    names = {
        section: [str(name) for name in raw[section]]
        for section in NAMED
        if isinstance(raw.get(section), dict)
    }
    problems += contradictions(sections, names)
    store = raw.get("store")
    if isinstance(store, str) and store and not any(address == "store" for address, _ in problems):
        try:
            store_folder(store, path.parent)
        except TeachonceError as error:
            problems.append((error.where, f"{error.problem}\n    cure: {error.cure}"))
    return content, problems, sections


def store_folder(setting: str, root: Path) -> Path:
    """The store: $TEACHONCE_STORE, or the setting, relative to the work tree.

    Raises:
        TeachonceError: neither can be meant as a folder, or something else is there.
    """
    address, value = "$TEACHONCE_STORE", os.environ.get("TEACHONCE_STORE")
    if not value:
        address, value = "store", setting
    cure = "name a folder in `store`, or in $TEACHONCE_STORE, which wins"
    if problem := path_problem(value, NO_STORE_URL):
        raise TeachonceError(address, f"{problem}, got {shown(repr(value))}", cure)
    folder = located(value, root, address).resolve()
    with durable.named(folder, "looking for the store"):
        is_other = folder.exists() and not folder.is_dir()
    if is_other:
        raise TeachonceError(address, f"{shown(folder)} is {kind_of(folder)}", cure)
    return folder


def _has_wrong_entries(location: tuple[int | str, ...], errors: Sequence[Any]) -> bool:
    """Whether entries of the list there are wrong: pydantic drops them and calls the list too short."""
    deeper = len(location) + 1
    return any(len(e["loc"]) >= deeper and e["loc"][: deeper - 1] == location for e in errors)


def _readable(raw: Mapping[str, Any]) -> Sections:
    """The sections, as far as they are right on their own."""
    sections: dict[str, Any] = {}
    for name, field in Params.model_fields.items():
        if name in NAMED and isinstance(raw.get(name), dict):
            entries = ((key, _valid(NAMED[name], value)) for key, value in raw[name].items())
            sections[name] = {str(key): value for key, value in entries if value is not WRONG}
        elif isinstance(raw.get(name), dict) and isinstance(field.annotation, type(BaseModel)):
            sections[name] = _right_part(field.annotation, raw[name])
        elif name in raw:
            value = _valid(Annotated[field.annotation, field], raw[name])
            sections |= {} if value is WRONG else {name: value}
    return sections


def _right_part(kind: Any, raw: Mapping[str, Any]) -> BaseModel:  # noqa: ANN401 - an annotation
    """A section with those of its settings that are right; the others are not there at all.

    One misspelt setting must not keep `check` from looking at the files that the others name.
    """
    right = {
        name: value
        for name, field in kind.model_fields.items()
        # The field itself holds the bounds, which its annotation has lost.
        if name in raw
        and (value := _valid(Annotated[field.annotation, field], raw[name])) is not WRONG
    }
    section: BaseModel = kind.model_construct(**right)
    return section


def _valid(kind: Any, value: object) -> Any:  # noqa: ANN401 - whatever the annotation says
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return WRONG


def _read(path: Path) -> object:
    try:
        content = regular.content(path, MAX_BYTES)
    except FileNotFoundError:
        raise TeachonceError(
            path.resolve(), "not there", "run this in a folder that has a params.yaml"
        ) from None
    except IrregularError as error:
        raise SettingsError(path.name, [("file", error.problem)]) from None
    try:
        values = _UniqueKeys(content).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise SettingsError(path.name, [(f"line {line}", shown(error.problem))]) from None
    # Values that are none of their tag (`!!int x`, 2001-99-99) raise what Python makes of them.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise SettingsError(path.name, [("file", f"no YAML: {shown(error)}")]) from None
    if _has_too_many_values(values):
        raise SettingsError(path.name, [("file", f"more than {MAX_VALUES} values")])
    if isinstance(values, dict):
        return {name: value for name, value in values.items() if not str(name).startswith(ANCHORS)}
    return values


def _has_too_many_values(content: object) -> bool:
    left, seen = [content], 0
    while left and seen <= MAX_VALUES:
        seen += 1
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
    return seen > MAX_VALUES


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word; a second `kd:` is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="the name of a setting is a text", problem_mark=key.start_mark
                )
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} stands twice in one mapping", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        # PyYAML's time grows with the square of the depth before Python's recursion ends it.
        if self.flow_level == MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH}", problem_mark=self.get_mark()
            )
        super().fetch_flow_collection_start(token)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            # Merges of merges of merges double at each step.
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_VALUES} values", problem_mark=node.start_mark
            )


def _address(location: tuple[int | str, ...]) -> str:
    """`recipes.ckd.objectives.0.queue`; without the tag that pydantic adds for a kind of objective."""
    # What stands between brackets, and `constrained-int`, are pydantic's names for one of several types.
    parts = [
        str(part) for part in location if not re.fullmatch(r".*\[.*\]|constrained-.*", str(part))
    ]
    if len(parts) > 4 and parts[0] == "recipes" and parts[2] == "objectives":
        del parts[4]
    if len(parts) > 3 and parts[:2] in (["shard", "sources"], ["distill", "readings"]):
        del parts[3]
    if len(parts) > 3 and parts[0] == "starts" and parts[2] in ("layers", "vocabulary"):
        del parts[3]
    return ".".join(parts) or "file"


def _problem(entry: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    if _address(entry["loc"]) == "embed.api.key_env" and entry["type"] == "string_pattern_mismatch":
        return "must be the name of an environment variable (A-Z, 0-9, _), never the key itself"
    problem: str = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "missing":
        return "is missing"
    if entry["type"] == "extra_forbidden":
        if new := RENAMED.get(_address(entry["loc"])):
            return f"is named {new} now: write it there"
        close = get_close_matches(str(entry["loc"][-1]), _known_names(), n=1)
        return f"no such setting{f'; did you mean {close[0]}?' if close else ''}"
    if entry["type"] in SENTENCES:
        problem = SENTENCES[entry["type"]].format(**entry.get("ctx", {}))
    if _address(entry["loc"]) in SECRETIVE:
        return problem
    value = entry["input"]
    return problem if isinstance(value, dict) else f"{problem}, got {shown(repr(value))}"


def _known_names() -> list[str]:
    sections = [Section]
    for section in sections:  # grows while it is walked: subclasses of subclasses, too
        sections += section.__subclasses__()
    return sorted(
        {
            field.alias or name
            for section in sections
            for name, field in section.model_fields.items()
        }
    )
