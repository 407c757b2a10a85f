"""Take the inventory of a store: its files by kind, its refs, and the objects that could be deleted.

Nothing here changes the store. A file whose name is a key is an object; one with the name that `durable`
gives to the scratch file of an object or a ref, in the right folder, is a scratch file; files that `gc`
takes away and that `repair` quarantines have names of their own, too. All others are foreign: they are
listed and never touched, since a user may have pointed `store` to a folder with other files.

This file is long because every kind of file in a store is recognised here, by one rule.
"""

from __future__ import annotations

import os
import platform
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from storage import durable, holders, trash
from storage.errors import DamagedError, MissingError, TeachonceError, shown
from storage.holders import MAX_BYTES, REF_PATTERN, REFS
from storage.journal import ANSWERS_PATTERN, JOURNAL, SPENT_PATTERN
from storage.manifest import Manifest
from storage.probe import probe_key
from storage.store import KEY_PATTERN, digest
from storage.work import WORK_PATTERN

QUARANTINE = "quarantine"
QUARANTINED_PATTERN = rf"{KEY_PATTERN.replace('/', '_')}-[0-9]{{8}}T[0-9]{{6}}Z-[0-9a-f]{{8}}"
"""Names that `upkeep.quarantine` gives to quarantined objects."""

WRITTEN_PATTERN = (
    rf"{KEY_PATTERN}|{REFS}/{REF_PATTERN}|{trash.MARKS}/{trash.ID_PATTERN}|{WORK_PATTERN}"
)
"""Names of all files that are written into a store."""

SHOWN_DIGITS = 8

DAY = 86_400.0
"""Seconds. A scratch file is written within minutes and changes until it is complete, so one that has not
changed for a day was abandoned. (The process id in its name does not help: in a shared store it may be of
another machine.)"""


class Note(BaseModel):
    """A ref as `Manifest.save` writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest: Manifest
    made: Mapping[str, str]


@dataclass(frozen=True)
class Ref:
    """A manifest that keeps its objects in the store, for one holder."""

    name: str  # the file's name without `.json`
    manifest: Manifest
    # by, on, at, in of the holder; with the prefix `maker_` those of the maker if it is another.
    made: Mapping[str, str]
    seen: float  # time of the holder's last use, in seconds since the epoch, renewed once a day

    @property
    def holder(self) -> str:
        """The holder as a phrase for messages."""
        return holders.describe(self.made)

    @property
    def maker(self) -> str:
        """The maker as a phrase for messages."""
        return holders.describe(holders.maker_in(self.made))

    @property
    def manifest_digest(self) -> str:
        """The digest of the manifest, equal for all its holders."""
        return self.name.partition(".")[0]

    @property
    def full_name(self) -> str:
        """The digests of manifest and holder, also if the file's name lacks the holder's."""
        return f"{self.manifest_digest}.{holders.holder_digest(self.made)}"

    @property
    def is_gone(self) -> bool:
        """Whether the holder's folder was deleted; False for a folder on another machine."""
        if self.made.get("on") != platform.node() or not self.made.get("in"):
            return False
        if "\\x" in self.made["in"]:  # may be the escape of a byte that is no UTF-8, see `as_utf8`
            return False
        try:
            Path(os.fsdecode(self.made["in"].encode())).stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except (OSError, ValueError):
            return False  # not visible to this user
        return False


@dataclass(frozen=True)
class File:
    """A file of the store: its name below the root, size in bytes, and mtime in seconds since the epoch."""

    name: str
    bytes: int
    written: float

    @property
    def folder(self) -> str:
        """Name of its folder: the objects of one teacher, tokenizer or mining, or all texts."""
        return self.name.rpartition("/")[0]


@dataclass(frozen=True)
class Inventory:
    """All files of a store but its refs, sorted by name."""

    objects: tuple[File, ...]  # files whose name is a key
    # Scratch files of living or dead writers, and what stages made for themselves.
    scratch: tuple[File, ...]
    answers: tuple[File, ...]  # paid answers of an API that stand in no published shard yet
    # Objects that a running or killed gc has taken away and not yet deleted.
    aside: tuple[File, ...]
    marks: tuple[File, ...]  # files that each mark a gc that has begun and not ended
    quarantine: tuple[File, ...]  # objects that `repair` moved away; a folder counts as one
    foreign: tuple[File, ...]  # all other files


def take_inventory(root: Path) -> Inventory:
    """Walk the store; no file is opened and no link followed.

    Raises:
        MissingError: there is no store.
        StorageError: a folder cannot be listed.
    """
    check_store(root)
    kinds: dict[str, list[File]] = defaultdict(list)
    for path in _walk(root):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # a scratch file whose writer has just finished
        file = File(path.relative_to(root).as_posix(), status.st_size, status.st_mtime)
        kinds[_kind(file.name, status.st_mode)].append(file)
    return Inventory(
        *(
            tuple(sorted(kinds[kind], key=lambda file: file.name))
            for kind in ("object", "scratch", "answers", "aside", "mark", QUARANTINE, "foreign")
        )
    )


def check_store(root: Path) -> None:
    """Raise MissingError unless there is a folder."""
    with durable.named(root, "looking for the store"):
        is_there = root.is_dir()
    if not is_there:
        raise MissingError(
            root,
            "no store there",
            "point `store` (or $TEACHONCE_STORE) to one, or make it by a run",
        )


def _walk(root: Path) -> Iterator[Path]:
    """Every file, and every entry of the quarantine."""
    with durable.named(root, "listing"):
        for folder, folders, files in os.walk(root, onerror=_raise):
            entries = files + [name for name in folders if (Path(folder) / name).is_symlink()]
            if Path(folder) == root / QUARANTINE:
                entries, folders[:] = files + folders, []
            yield from (Path(folder) / name for name in entries)


def _raise(error: OSError) -> None:
    raise error


def _kind(name: str, mode: int) -> str:
    folder, _, last = name.rpartition("/")
    if folder == QUARANTINE:
        return QUARANTINE if re.fullmatch(QUARANTINED_PATTERN, last) else "foreign"
    if not stat.S_ISREG(mode):
        return "ref" if folder == REFS and not last.startswith(".") else "foreign"
    if re.fullmatch(KEY_PATTERN, name):
        return "object"
    if (key := key_aside(name)) and re.fullmatch(KEY_PATTERN, key):
        return "aside"
    if folder.partition("/")[0] == JOURNAL:
        return _kind_in_journal(name)
    scratch = re.fullmatch(durable.SCRATCH_PATTERN, last)
    is_scratch = scratch and re.fullmatch(WRITTEN_PATTERN, f"{folder}/{scratch[1]}")
    if is_scratch or re.fullmatch(WORK_PATTERN, name):
        return "scratch"
    if folder == trash.MARKS and re.fullmatch(trash.ID_PATTERN, last):
        return "mark"
    return "ref" if folder == REFS and not last.startswith(".") else "foreign"


def _kind_in_journal(name: str) -> str:
    if re.fullmatch(ANSWERS_PATTERN, name):
        return "answers"
    return "ledger" if re.fullmatch(SPENT_PATTERN, name) else "foreign"


def key_aside(name: str) -> str | None:
    """Returns the key that a file had before a gc took it away; None for other files."""
    folder, _, last = name.rpartition("/")
    before = trash.original(last)
    return before and f"{folder}/{before}"


def read_refs(root: Path) -> tuple[list[Ref], list[DamagedError]]:
    """Returns the refs of a store, sorted by name, and an error for each unreadable one.

    Raises:
        MissingError: the store has no folder of refs, so it is unknown which objects are needed.
        StorageError: the folder cannot be listed.
    """
    folder = root / REFS
    with durable.named(folder, "looking for it"):
        is_there = folder.is_dir()
    if not is_there:
        raise MissingError(
            folder,
            "not there, so it cannot be known which objects are needed",
            "restore it, or run a stage in each work tree that uses this store: that writes its ref",
        )
    contents = list(_contents(folder).values())
    refs = [content for content in contents if isinstance(content, Ref)]
    return refs, [content for content in contents if isinstance(content, DamagedError)]


def _contents(folder: Path) -> dict[Path, Ref | DamagedError]:
    """Returns each file of a folder of refs, sorted by name, with its ref or why it is none."""
    with durable.named(folder, "listing"):
        # Names with a dot are of scratch files, or of the file system's own.
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    contents: dict[Path, Ref | DamagedError] = {}
    for path in paths:
        try:
            contents[path] = _read_ref(path)
        except DamagedError as error:
            contents[path] = error
        except FileNotFoundError:
            continue  # forgotten by somebody else meanwhile
    return contents


def _read_ref(path: Path) -> Ref:
    cure = f"restore it, or if nobody needs it: `teachonce gc --forget {path.stem}`"
    try:
        # A link or a device is no ref.
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a plain file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes are too many")
        note = Note.model_validate_json(path.read_bytes())
        match = re.fullmatch(REF_PATTERN, path.name)
        if match is None or digest(note.manifest.encoded) != match[1]:
            raise ValueError("its manifest is not the one that its name says")
        if match[2] not in (None, holders.holder_digest(note.made)):
            raise ValueError("its holder is not the one that its name says")
    except FileNotFoundError:
        raise
    except ValidationError as error:
        raise DamagedError(path, f"no ref ({error.error_count()} faults)", cure) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(path, f"no ref: {shown(error)}", cure) from error
    return Ref(path.stem, note.manifest, note.made, status.st_mtime)


def find_ref(root: Path, prefix: str) -> Path:
    """Returns the one file in refs/ whose name begins with `prefix`, readable or not.

    Args:
        root: The folder of the store.
        prefix: At least the first four characters of a manifest's digest; if it has several holders, then
            a dot and the first characters of a holder's digest. Or the whole name of a file.

    Raises:
        TeachonceError: no file matches, or more than one.
    """
    folder = root / REFS
    manifest, _, holder = prefix.partition(".")
    with durable.named(folder, "listing"):
        contents = _contents(folder) if folder.is_dir() else {}
    names = {
        path: content.full_name if isinstance(content, Ref) else path.stem
        for path, content in contents.items()
    }
    matches = [
        path
        for path, name in names.items()
        if name.startswith(manifest) and name.partition(".")[2].startswith(holder)
    ]
    if exact := [path for path in matches if path.stem == prefix]:
        return exact[0]
    if len(manifest) < 4 or len(matches) != 1:
        named = ", ".join(_described(path, contents[path]) for path in matches[:5]) or "none"
        raise TeachonceError(
            f"ref {shown(prefix)}",
            f"{len(matches)} refs begin like that ({named})",
            "give at least four characters that only one begins with, and a dot and the holder's where one "
            "manifest has several; `teachonce ls` lists all",
        )
    return matches[0]


def short_name(full_name: str, *, alone: bool) -> str:
    """Returns a prefix for `find_ref`: digits of the manifest, and of the holder if it has several."""
    manifest, _, holder = full_name.partition(".")
    return manifest[:SHOWN_DIGITS] + ("" if alone else f".{holder[:SHOWN_DIGITS]}")


def _described(path: Path, content: Ref | DamagedError) -> str:
    if isinstance(content, DamagedError):
        return shown(path.stem)
    return f"{short_name(content.full_name, alone=False)} of {content.holder}"


def orphans(objects: Iterable[File], refs: Iterable[Ref]) -> list[File]:
    """Returns the objects that no ref keeps.

    A ref keeps what its manifest names. Token ids stand in no manifest: they are kept as long as the
    texts or readings that they were made of. Neither do a teacher's vectors of the probe texts: they are
    kept as long as any vectors of that teacher.
    """
    named = {entry.key for ref in refs for entry in ref.manifest.objects}
    texts = {_last(key) for key in named if key.startswith(("text/", "readings/"))}
    named |= {probe_key(key.split("/")[1]) for key in named if key.startswith("vectors/")}
    return [
        file
        for file in objects
        if file.name not in named
        and not (file.name.startswith("tokens/") and _last(file.name) in texts)
    ]


def _last(name: str) -> str:
    return name.rpartition("/")[2]


@dataclass(frozen=True)
class Sweep:
    """The files that `gc` would delete, and those of the same kinds that it would keep."""

    orphans: tuple[File, ...]  # objects that no ref keeps, to be deleted
    # Such objects, and answers of an API, in a folder that may be in use, to be kept.
    young: tuple[File, ...]
    # Scratch files of dead writers, and answers that no run has asked for, to be deleted.
    scratch: tuple[File, ...]
    live: tuple[File, ...]  # scratch files of writers that may be alive, to be kept


def plan_sweep(inventory: Inventory, refs: Sequence[Ref], *, now: float, grace: float) -> Sweep:
    """Decide which files can be deleted.

    A worker writes its manifest, and so its ref, when it is done; until then its objects are orphans.
    A teacher pass takes weeks, so it is not the age of each object that counts but that of the folder:
    as long as the youngest orphan or scratch file in `vectors/<teacher>/` is younger than `grace`, all
    of that folder is left alone. Objects that a ref keeps do not count: they are finished.

    For the same reason `refs` must be read after `inventory` was taken: a worker that ends in between is
    then seen as one that is done.

    Args:
        inventory: The files of the store.
        refs: The refs whose objects are kept.
        now: Seconds since the epoch, by the clock that sets the file times.
        grace: Seconds, >= 0, for which a folder in use is spared; 0 spares no orphan. Scratch files are
            spared for a day in any case.
    """
    unnamed = orphans(inventory.objects, refs)
    newest: dict[str, float] = defaultdict(float)
    for file in (*unnamed, *inventory.scratch, *inventory.answers):
        newest[file.folder] = max(newest[file.folder], file.written)
    # A file of the future (another machine's clock) is a young one too, unless none is spared.
    spared = {folder for folder, written in newest.items() if grace and now - written < grace}
    return Sweep(
        orphans=tuple(file for file in unnamed if file.folder not in spared),
        young=tuple(file for file in (*unnamed, *inventory.answers) if file.folder in spared),
        scratch=(
            *(file for file in inventory.scratch if now - file.written >= DAY),
            *(file for file in inventory.answers if file.folder not in spared),
        ),
        live=tuple(file for file in inventory.scratch if now - file.written < DAY),
    )
