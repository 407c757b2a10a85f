"""What the pages take from the code when `mkdocs` builds them, so that nothing is written twice.

A page says where with a line of its own: `<!-- generated: settings -->`. Files at the top of the repository
and the results of benchmarks become pages, too; pages of docs/ link to them as in the checkout: `../X.md`.
"""

from __future__ import annotations

import ast
import io
import posixpath
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import typer.main
import yaml
from pydantic import BaseModel

from pipeline.cli import app
from stages import params as settings_module
from stages.params import Objective, Params, RecipeParams, StartParams, StudentParams

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
TO_A_PAGE = re.compile(r"\]\(([\w./-]+\.md)((?:#[\w-]+)?)\)")
FROM_THE_CHECKOUT = ("CONTRIBUTING.md", "EXPERIMENTS.md", "CHANGELOG.md", "benchmarks/results/*.md")
PACKAGES = ("teachonce", "pipeline", "stages", "storage")


def on_files(files: Any, config: Any) -> Any:  # noqa: ANN401 - of mkdocs, which only `make docs` installs
    """Add the files of the checkout that pages link to."""
    from mkdocs.structure.files import File

    for pattern in FROM_THE_CHECKOUT:
        for path in sorted(ROOT.glob(pattern)):
            name = f"repository/{path.relative_to(ROOT)}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401 - as above
    """A page with what is generated in it."""
    name = page.file.src_uri
    if name.startswith("repository/"):
        return linked(markdown, name.removeprefix("repository/"))
    return linked(MARKER.sub(lambda found: GENERATED[found[1]](), markdown), f"docs/{name}")


def linked(markdown: str, file: str) -> str:
    """The text of a page with links to pages of the site where the checkout's file links to files.

    Args:
        markdown: The text of the file.
        file: The file's path from the top of the checkout: `docs/texts.md`, `EXPERIMENTS.md`.
    """
    folder = posixpath.dirname(_page(file)) or "."

    def to_page(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), link[1]))
        return f"]({posixpath.relpath(_page(target), folder)}{link[2]})"

    return TO_A_PAGE.sub(to_page, markdown)


def _page(file: str) -> str:
    """The site's name of the page that is made of a file of the checkout."""
    return file.removeprefix("docs/") if file.startswith("docs/") else f"repository/{file}"


# Settings

ENTRIES: dict[str, type[BaseModel]] = {
    "starts": StartParams,
    "recipes": RecipeParams,
    "students": StudentParams,
}
"""Sections of named entries, and what an entry is."""


def settings() -> str:
    """Every setting by section: what it takes, the shipped value, and what stages/params.py says of it."""
    shipped, source = (
        yaml.safe_load((ROOT / "params.yaml").read_text()),
        (ROOT / "params.yaml").read_text(),
    )
    sections = {
        name: field.annotation
        for name, field in Params.model_fields.items()
        if isinstance(shipped[name], dict)
    }
    alone = [name for name in Params.model_fields if name not in sections]
    parts = ["## For the whole pipeline", _table(Params, shipped, alone), "As shipped:"]
    parts += [_fenced("yaml", "".join(section_text(source, name) for name in alone))]
    for name, kind in sections.items():
        model = ENTRIES.get(name, kind)
        parts += [f"## `{name}`", _docstring(model)]
        values = {} if name in ENTRIES else shipped[name]
        parts += [_table(model, values, beside=value_notes(section_text(source, name)))]
        if name == "recipes":
            parts += ["### Objectives", "Entries of a recipe's list `objectives`."]
            for objective in get_args(get_args(Objective)[0]):
                title = get_args(objective.model_fields["name"].annotation)[0]
                parts += [f"#### `{title}`", _docstring(objective), _table(objective, {})]
        parts += ["As shipped:", _fenced("yaml", section_text(source, name))]
    return "\n\n".join(parts)


def section_text(source: str, name: str) -> str:
    """A section of params.yaml as it stands there, with the comments above it and in it."""
    lines = source.splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if line.startswith(f"{name}:"))
    last = first + 1
    while last < len(lines) and (lines[last].startswith(" ") or not lines[last].strip()):
        last += 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    if name == "recipes":  # what the recipes have in common stands above them
        first = next(n for n, line in enumerate(lines) if line.startswith("x-recipe:"))
    return "".join(lines[first:last]).strip() + "\n"


def value_notes(text: str) -> dict[str, str]:
    """Setting -> the comment beside its value in a section of params.yaml, which may go on below it."""
    notes: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if found := re.match(r"  (\w+):.*?  ?# (.+)", line):
            name = found[1]
            notes[name] = found[2]
        elif name and (more := re.match(r"\s{20,}# ?(.+)", line)):
            notes[name] += f" {more[1]}"
        else:
            name = ""
    return notes


def _table(
    model: type[BaseModel],
    shipped: Mapping[str, Any],
    names: list[str] | None = None,
    *,
    beside: Mapping[str, str] | None = None,
) -> str:
    schema = model.model_json_schema(by_alias=True)
    notes = {**field_notes(model), **(beside or {})}
    rows = []
    for name in names or model.model_fields:
        key = model.model_fields[name].alias or name
        row = [f"`{key}`", takes(schema["properties"][key], schema.get("$defs", {}))]
        if shipped:
            row += [_value(shipped[key])]
        rows.append([*row, _prose(notes.get(key) or notes.get(name, ""))])
    titles = ["setting", "takes", *(["shipped"] if shipped else []), "meaning"]
    return markdown_table(titles, rows)


def takes(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The type and bounds of a setting, in words."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = [takes(kind, definitions) for kind in schema[several]]
            return "an objective" if "mapping" in kinds else " or ".join(kinds)
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        items = takes(schema.get("items") or schema["prefixItems"][0], definitions)
        return f"a list: {items}"
    if kind == "object":
        return "named entries" if "additionalProperties" in schema else "mapping"
    words = {"integer": "a whole number", "number": "a number", "string": "text", "null": "null"}
    words |= {"boolean": "true or false"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:,}" for key, sign in bounds.items() if key in schema]
    return " ".join([words[str(kind)], ", ".join(limits)]).strip()


def field_notes(model: type[BaseModel]) -> dict[str, str]:
    """Field -> what the code says of it: the comment beside or above it, or the docstring below it."""
    notes: dict[str, str] = {}
    classes = [kind.__name__ for kind in reversed(model.__mro__)]
    source = Path(settings_module.__file__).read_text()
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or node.name not in classes:
            continue
        for place, field in enumerate(node.body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
            said = [comments[line][0] for line in lines if line in comments]
            above = comments.get(field.lineno - 1, ("", False))
            if not said and above[1]:
                said = [above[0]]
            below = node.body[place + 1] if place + 1 < len(node.body) else None
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                said = [" ".join(str(below.value.value).split())]
            notes[field.target.id] = " ".join(said).removesuffix("noqa: D102")
    return notes


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "see below" if value else "`{}`"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return f"`{text.removesuffix('...').strip()}`"


# Commands


def commands() -> str:
    """Every command with its arguments and options, as `teachonce COMMAND --help` has them."""
    group = typer.main.get_command(app)
    panels: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        panel = str(getattr(command, "rich_help_panel", None) or "Commands")
        panels.setdefault(panel, []).append(_command(name, command))
    parts = [_fenced("text", "teachonce [OPTIONS] COMMAND [OPTIONS] [ARGUMENTS]")]
    parts += [_parameters(group)]
    for panel, texts in panels.items():
        parts += [f"## {panel.partition(';')[0]}", *texts]
    return "\n\n".join(parts)


def _command(name: str, command: Any) -> str:  # noqa: ANN401 - of typer, whose class it does not export
    words = [_metavar(p) if p.required else f"[{_metavar(p)}]" for p in _arguments(command)]
    usage = " ".join(["teachonce", name, "[OPTIONS]", *words])
    said = [" ".join(part.split()) for part in re.split(r"\n\s*\n", command.help or "")]
    return "\n\n".join([f"### {name}", *said, _fenced("text", usage), _parameters(command)])


def _arguments(command: Any) -> list[Any]:  # noqa: ANN401 - as above
    return [p for p in command.params if p.param_type_name == "argument"]


def _parameters(command: Any) -> str:  # noqa: ANN401 - as above
    rows = []
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        words = [*parameter.opts, *parameter.secondary_opts] if is_option else [_metavar(parameter)]
        shown = ", ".join(f"`{word}`" for word in words)
        if is_option and not getattr(parameter, "is_flag", False):
            shown += f" `{_metavar(parameter)}`"
        default = parameter.default
        said = getattr(parameter, "help", None) or ""
        if default not in (None, False, ()) and not callable(default) and is_option:
            said += f" Default: {default}."
        rows.append([shown, said])
    return markdown_table(["argument or option", "meaning"], rows) if rows else ""


def _metavar(parameter: Any) -> str:  # noqa: ANN401 - as above
    word = parameter.metavar or str(parameter.name).upper().rstrip("_")
    return f"{word}..." if parameter.nargs == -1 else word


# The code


def modules() -> str:
    """Every module by folder, with the first line of its docstring."""
    parts = []
    for package in PACKAGES:
        for init in sorted((ROOT / package).rglob("__init__.py")):
            folder = init.parent
            rows = [
                [f"`{path.name}`", first_line(path)]
                for path in sorted(folder.glob("*.py"))
                if path != init
            ]
            parts += [f"#### {folder.relative_to(ROOT)}/", first_line(init)]
            parts += [markdown_table(["module", "what it does"], rows)] if rows else []
    return "\n\n".join(parts)


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


# Errors


def errors() -> str:
    """Every error that names a cure, by the folder that raises it: what it says, and the cure."""
    rooms: dict[str, list[list[str]]] = {}
    for room, problem, cure in sorted(set(raised())):
        rooms.setdefault(room, []).append([_code(problem), _code(cure)])
    return "\n\n".join(
        f"### {room}/\n\n{first_line(ROOT / room / '__init__.py')}\n\n"
        f"{markdown_table(['what is wrong', 'cure'], rows)}"
        for room, rows in rooms.items()
    )


def raised() -> Iterator[tuple[str, str, str]]:
    """(folder, problem, cure) of each error in the code that says both; what varies is `…`."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            names = {
                target.id: node.value
                for node in tree.body
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and _is_error(node.func) and len(node.args) == 3:
                    problem, cure = (_template(part, names) for part in node.args[1:])
                    if problem.strip(" …") and cure.strip(" …"):
                        yield str(path.parent.relative_to(ROOT)), problem, cure


def _is_error(function: ast.expr) -> bool:
    """Whether what is called makes an error: the class of one, or `super().__init__` in such a class."""
    match function:
        case ast.Name(id=name):
            return name.endswith("Error")
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr="__init__"):
            return True
    return False


def _template(node: ast.expr, names: Mapping[str, ast.expr]) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_template(value, names) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _template(left, names) + _template(right, names)
        case ast.Name(id=name) if name in names:
            return _template(names[name], {})
    return "…"


def _prose(text: str) -> str:
    """A comment in a cell: what stands in angles or bars outside of code is text, too."""
    parts = text.split("`")
    parts[::2] = [_code(part) for part in parts[::2]]
    return "`".join(parts)


def _code(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("\n", " ")


# Markdown


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    """A table; bars in cells are escaped already or stand in code."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()) for cell in row) + " |" for row in lines
    )


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _docstring(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings,
    "commands": commands,
    "modules": modules,
    "errors": errors,
}
