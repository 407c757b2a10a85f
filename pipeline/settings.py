"""params.yaml -> Params, or everything that is wrong with it at once, each with its address."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stages.params import Params, Section, contradictions
from storage.errors import TeachonceError, shown

MAX_BYTES = 1 << 20


class SettingsError(TeachonceError):
    """Wrong settings: one line for each."""

    def __init__(self, path: Path, wrong: list[tuple[str, str]]) -> None:
        lines = "".join(f"\n  {address}: {problem}" for address, problem in wrong)
        super().__init__(path.name, f"{len(wrong)} wrong{lines}", f"edit {path.name}")


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        SettingsError: lists every wrong setting with its address.

    """
    content = _read(path)
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        wrong = [(_address(entry["loc"]), _problem(entry)) for entry in error.errors()]
        raise SettingsError(path, wrong) from None
    wrong = contradictions(params)
    if wrong:
        raise SettingsError(path, wrong)
    return params


def _read(path: Path) -> object:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(path, [("file", f"larger than {MAX_BYTES} bytes")])
        return _UniqueKeys(path.read_bytes()).get_single_data()
    except FileNotFoundError:
        raise TeachonceError(
            path, "not there", "run this in a folder that has a params.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise SettingsError(path, [("file", f"no YAML: {shown(error)}")]) from None


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word; a second `kd:` is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"{key.value} stands twice, the second time{key.start_mark}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _address(location: tuple[int | str, ...]) -> str:
    """`recipes.ckd.objectives.0.queue`; without the tag that pydantic adds for a kind of objective."""
    parts = [str(part) for part in location]
    if len(parts) > 4 and parts[0] == "recipes" and parts[2] == "objectives":
        del parts[4]
    return ".".join(parts) or "file"


def _problem(entry: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    problem: str = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "missing":
        return "is missing"
    if entry["type"] == "extra_forbidden":
        close = get_close_matches(str(entry["loc"][-1]), _known_names(), n=1)
        return f"no such setting{f'; did you mean {close[0]}?' if close else ''}"
    given = entry["input"]
    return problem if isinstance(given, dict) else f"{problem}, got {shown(repr(given))}"


def _known_names() -> list[str]:
    names: set[str] = set()
    for section in Section.__subclasses__():
        names |= {field.alias or name for name, field in section.model_fields.items()}
    return sorted(names)
