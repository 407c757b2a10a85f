"""Installed packages: their versions and their documentation strings. Nothing is ever imported."""

from __future__ import annotations

import ast
import gc
import importlib.util
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from storage import regular
from storage.errors import TeachonceError, shown
from storage.regular import IrregularError

READERS = ("docstring_parser", "sentencex")
"""Packages of the extra `demo` that `stages.reading.prose` imports."""


def missing(packages: Sequence[str]) -> list[str]:
    """Returns the packages that are not installed; imports nothing."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Returns import name -> version of its distribution; imports nothing.

    A module of the standard library has the version of Python. Where several distributions share an
    import name, their versions are joined by `+`.

    Raises:
        TeachonceError: a package is not installed, or the extra `demo` is not.
    """
    if not names:
        return {}
    if lacking := missing(READERS):
        raise TeachonceError(
            "docs.packages",
            f"{' and '.join(lacking)} cannot be imported, and documentation is read with "
            f"{'it' if len(lacking) == 1 else 'them'}",
            "pip install 'teachonce[demo]', or set docs.packages: [] to have no texts of packages",
        )
    owners = metadata.packages_distributions()
    versions = {}
    for name in names:
        if name in sys.stdlib_module_names:
            versions[name] = platform.python_version()
            continue
        if name not in owners:
            raise _not_installed(name)
        versions[name] = "+".join(metadata.version(owner) for owner in sorted(set(owners[name])))
    return versions


def _not_installed(name: str) -> TeachonceError:
    return TeachonceError(
        "docs.packages",
        f"no installed package is imported as {shown(repr(name))}",
        "install it, or take it out of docs.packages in params.yaml",
    )


def docstrings(name: str) -> Iterator[str]:
    """Yield the docstrings of a package, by path and line; skips files that do not parse."""
    for path in _source_paths(name):
        try:
            content = regular.content(path)
        except IrregularError:
            continue
        if b'"""' not in content and b"'''" not in content:
            continue  # saves a tenth of the time; what else documents in one line has little to say
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "\d" in a stranger's string is not our warning
                tree = ast.parse(content)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        yield from _documented(tree)


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause the garbage collector: parsing makes millions of nodes without cycles, a third of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _documented(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, in the order of the file."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in getattr(node, "body", ()):
        # Definitions also stand under `if` and `try`; a lambda's body is no list and has none.
        if isinstance(child, ast.stmt):
            yield from _documented(child)


def _source_paths(name: str) -> list[Path]:
    """Returns the sorted .py files of a package or module, without its tests.

    Only the top-level name is looked up: for a dotted one, Python would import what stands before it.
    """
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # it is loaded, and does not say from where
        spec = None
    if spec is None:
        raise _not_installed(name)
    paths = [Path(spec.origin)] if spec.has_location and spec.origin else []
    for folder in spec.submodule_search_locations or ():
        paths += sorted(path for path in Path(folder).rglob("*.py") if not _is_test(path, folder))
    paths = [path for path in dict.fromkeys(paths) if path.suffix == ".py"]
    if not paths:
        raise TeachonceError(
            "docs.packages",
            f"{name} has no Python source to read",
            "take it out of docs.packages in params.yaml",
        )
    return paths


def _is_test(path: Path, folder: str) -> bool:
    parts = path.relative_to(folder).parts
    return path.name.startswith(("test_", "conftest")) or not TEST_FOLDERS.isdisjoint(parts[:-1])


TEST_FOLDERS = {"test", "tests", "_test", "_tests", "testing", "_testing", "idle_test"}
