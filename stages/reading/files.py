"""Find the files that settings name by path or glob, and name them in errors."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import has_magic
from itertools import zip_longest
from pathlib import Path

import pyarrow as pa
import zstandard

from storage import durable, regular
from storage.errors import MissingError, TeachonceError, shown

COMPRESSED_ENDINGS = (".gz", ".zst")

ANY_ENDING = ("",)


def with_compressed(*endings: str) -> tuple[str, ...]:
    """Returns an ending, plain and compressed: `.txt`, `.txt.gz`, `.txt.zst`."""
    return (*endings, *(ending + packed for ending in endings for packed in COMPRESSED_ENDINGS))


def unpacked_name(path: Path) -> str:
    """Returns the name in lower case without `.gz` or `.zst`, so that its ending tells the format."""
    return path.name.lower().removesuffix(".gz").removesuffix(".zst")


def located(setting: str, root: Path, address: str) -> Path:
    """Returns the path that a setting names: relative to `root`, absolute, or beginning with `~`.

    Args:
        setting: A path or a glob.
        root: The work tree.
        address: The setting to name in an error.

    Raises:
        MissingError: `~` stands for no folder on this machine.
    """
    # A name in params.yaml is UTF-8 whatever the locale is.
    setting = os.fsdecode(setting.encode())
    if setting.startswith("~"):
        who = setting.split("/", 1)[0]
        # Not Path.expanduser, which raises; an account without a home has a made-up one in its record.
        if not Path(os.path.expanduser(who)).is_dir():  # noqa: PTH111
            raise MissingError(
                address,
                f"{shown(repr(setting))}: there is no home folder {shown(who)} on this machine",
                "write the whole path, beginning with /" + (", or set $HOME" if who == "~" else ""),
            )
    return root / Path(setting).expanduser()


def matching(pattern: str, root: Path, *, address: str, endings: Sequence[str]) -> list[Path]:
    """Returns the files that a glob matches, sorted; or the one file of exactly that name, if it exists.

    No match is skipped silently. A folder is skipped only where the pattern reads files
    in it, too (as `**` does), or where it has none to read.

    Args:
        pattern: A glob (`**` too), relative to `root` or absolute or with `~`.
        root: The work tree.
        address: The setting to name in an error.
        endings: Supported endings of file names.

    Raises:
        MissingError: it matches no file.
        TeachonceError: it matches one with another ending, a folder whose files it does not reach, a link
            to nothing, a pipe, a socket or a device.
        StorageError: the operating system refused to look.
    """
    wanted = located(pattern, root, address)
    with durable.named(wanted, "looking for the file"):
        matches = (
            [wanted]
            if wanted.is_file()
            else _expanded(Path(os.fsdecode(pattern.encode())).expanduser(), root)
        )
        files = _only_files(matches, pattern, address=address, endings=endings)
    if not files:
        raise MissingError(
            address,
            f"{shown(repr(pattern))} matches no file below {root}",
            "mend the pattern in params.yaml, or put the files there",
        )
    for path in files:
        if not path.name.lower().endswith(tuple(endings)):
            raise TeachonceError(
                address,
                f"{shown(repr(pattern))} matches {shown(path)}, and nothing reads that ending",
                f"narrow the pattern to files that end in one of {' '.join(endings)}",
            )
    return files


def each_once(
    patterns: Iterable[str], root: Path, *, address: str, endings: Sequence[str]
) -> list[Path]:
    """Returns the files of several globs, each once, in the order of the globs; raises as `matching`."""
    files: dict[Path, Path] = {}
    for pattern in patterns:
        for path in matching(pattern, root, address=address, endings=endings):
            files.setdefault(path.resolve(), path)
    return list(files.values())


def _expanded(pattern: Path, root: Path) -> list[Path]:
    """Returns the sorted matches of a glob, as the module `glob` does, with three differences.

    The module silently skips a folder that it may not list, needs a minute for many `**`, and follows a
    link to an enclosing folder forty times.

    Raises:
        StorageError: a folder may not be listed.
    """
    paths = {root / pattern.anchor}
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    for part, following in zip_longest(parts, parts[1:]):
        if part == following == "**":
            continue  # two of them mean what one does
        if part == "**":
            paths = {
                path for folder in paths for path in walk(folder, with_files=following is None)
            }
        elif has_magic(part):
            paths = {
                folder / name
                for folder in paths
                if folder.is_dir()
                for name in _names(folder, hidden=part.startswith("."))
                if fnmatchcase(name, part)
            }
        else:
            paths = {path for folder in paths if _exists(path := folder / part)}
    return sorted(paths, key=str)


def walk(
    folder: Path,
    *,
    with_files: bool = True,
    hidden: bool = False,
    within: Sequence[tuple[int, int]] = (),
) -> Iterator[Path]:
    """Yield a folder and all paths below it; links are followed, but not to an enclosing folder.

    Args:
        folder: The folder; yields nothing if it is none.
        with_files: Whether to yield files, too.
        hidden: Whether to yield names that begin with a dot.
        within: Device and inode of the enclosing folders.

    Raises:
        StorageError: a folder may not be listed.
    """
    if not folder.is_dir():
        return
    status = folder.stat()
    here = status.st_dev, status.st_ino
    if here in within:
        return
    yield folder
    for name in _names(folder, hidden=hidden):
        path = folder / name
        if path.is_dir():
            further = [*within, here]
            yield from walk(path, with_files=with_files, hidden=hidden, within=further)
        elif with_files:
            yield path


def _names(folder: Path, *, hidden: bool) -> list[str]:
    with durable.named(folder, "reading"):
        names = [path.name for path in folder.iterdir()]
    return [name for name in names if hidden or not name.startswith(".")]


def _exists(path: Path) -> bool:
    """Whether a path exists, be it only a broken link."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _only_files(
    matches: Sequence[Path], pattern: str, *, address: str, endings: Sequence[str]
) -> list[Path]:
    """Returns the files among the matches; raises for the first match that cannot be read."""
    files = [path for path in matches if path.is_file()]
    reached = {folder for file in files for folder in file.parents}
    for path in matches:
        if path in reached or path.is_file():
            continue
        if path.is_dir() and _may_be_passed_over(path, pattern, endings):
            continue
        # Where nothing else is there, the files may be on another machine, as `check` allows.
        kind = MissingError if path.is_symlink() and not files else TeachonceError
        raise kind(
            address,
            f"{shown(repr(pattern))} matches {shown(path)}, which is {kind_of(path)}",
            _regular_again(path),
        )
    return files


def _may_be_passed_over(folder: Path, pattern: str, endings: Sequence[str]) -> bool:
    """Whether a matched folder may be skipped, since it holds no readable file."""
    name = folder.name.lower()
    if Path(pattern).name not in {"*", "**"} or any(name.endswith(e) for e in endings if e):
        return False
    return not any(
        path.name.lower().endswith(tuple(endings))
        for path in walk(folder, hidden=True)
        if not path.name.startswith(".") and not path.is_dir()
    )


def is_regular(path: Path, address: str) -> bool:
    """Whether a regular file exists; False if the path does not exist.

    Raises:
        TeachonceError: the path is a folder, a broken link, a pipe, a socket or a device.
    """
    with durable.named(path, "looking for the file"):
        if path.is_file():
            return True
        if not path.exists() and not path.is_symlink():
            return False
        raise TeachonceError(address, f"{shown(path)} is {kind_of(path)}", _regular_again(path))


def files_below(folder: Path, address: str) -> list[Path]:
    """Returns all files in a folder and its subfolders, sorted by path; links to folders are followed.

    Raises:
        TeachonceError: something in it is neither a file nor a folder.
    """
    with durable.named(folder, "listing"):
        paths = sorted(walk(folder, hidden=True))
        return [path for path in paths if not path.is_dir() and is_regular(path, address)]


def kind_of(path: Path) -> str:
    """Returns the kind of a file in words."""
    try:
        return regular.KINDS.get(stat.S_IFMT(path.stat().st_mode), "something unknown")
    except OSError:
        if not path.is_symlink():
            raise
        return f"a link to nothing ({shown(path.readlink())})"


def _regular_again(path: Path) -> str:
    if path.is_dir():
        return f"name the files in it, such as {shown(repr(f'{path}/*'))}, or move the folder away"
    if path.is_symlink() and not path.exists():
        return "bring back what the link points to, or remove the link"
    return "put a file in its place, or remove it"


@contextmanager
def reading(path: Path, cure: str) -> Iterator[None]:
    """Turn errors of a damaged or unreadable file inside the block into one that names the file."""
    try:
        yield
    except TeachonceError:
        raise
    except EOFError as error:
        raise TeachonceError(path, "truncated: it ends before its content does", cure) from error
    except (OSError, ValueError, zlib.error, zstandard.ZstdError, pa.ArrowException) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TeachonceError(path, f"cannot be read: {shown(cause)}", cure) from error
