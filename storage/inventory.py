"""What is in a store, who names it, and what could go.

Nothing here changes anything. A file is an object if its name is a key, a scratch file if it is named as
`durable` names them, and otherwise foreign: somebody else's, listed and left alone.
"""

from __future__ import annotations

import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from storage import durable
from storage.errors import DamagedError, MissingError, TeachonceError, shown
from storage.manifest import MAX_BYTES, Manifest
from storage.probe import probe_key
from storage.store import KEY_PATTERN, digest

REFS, QUARANTINE = "refs", "quarantine"
SCRATCH_PATTERN = rf"\..*{re.escape(durable.SCRATCH_SUFFIX)}"
SHOWN_DIGITS = 8

DAY = 86_400.0
"""Seconds. A scratch file is written in seconds to minutes and changes until it is done, so one that has
not changed for a day has no worker. (The process id in its name does not help: in a shared store it may
be that of another machine.)"""


class Note(BaseModel):
    """A ref as `Manifest.save` writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest: Manifest
    made: Mapping[str, str]


@dataclass(frozen=True)
class Ref:
    """A manifest that keeps its objects in the store.

    Args:
        name: The digest of the manifest.
        manifest: It.
        made: by, on, at, in: who made it, where and when.
    """

    name: str
    manifest: Manifest
    made: Mapping[str, str]

    @property
    def maker(self) -> str:
        """Who made it, where and when, for people."""
        by, on, at, place = (shown(self.made.get(word, "?")) for word in ("by", "on", "at", "in"))
        return f"{by} on {on}, {at}, in {place}"


@dataclass(frozen=True)
class File:
    """A file of the store: its name below the root, size, and when it was written (seconds)."""

    name: str
    bytes: int
    written: float

    @property
    def folder(self) -> str:
        """All objects of one teacher, tokenizer or mining; all texts."""
        return self.name.rpartition("/")[0]


@dataclass(frozen=True)
class Inventory:
    """All files of a store but its refs, each list in the order of names.

    Args:
        objects: Files whose name is a key.
        scratch: What writers have not finished, or left when they died.
        quarantine: What `repair` moved away; a folder counts as one.
        foreign: Everything else.
    """

    objects: tuple[File, ...]
    scratch: tuple[File, ...]
    quarantine: tuple[File, ...]
    foreign: tuple[File, ...]


def take_inventory(root: Path) -> Inventory:
    """Walk the store; no file is opened and no link followed.

    Raises:
        MissingError: there is no store.
        StorageError: a folder cannot be listed.
    """
    if not root.is_dir():
        raise MissingError(
            root,
            "no store there",
            "point `store` (or $TEACHONCE_STORE) to one, or make it by a run",
        )
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
            for kind in ("object", "scratch", QUARANTINE, "foreign")
        )
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
    top, _, _ = name.partition("/")
    if top == QUARANTINE:
        return QUARANTINE
    plain = stat.S_ISREG(mode)
    if plain and re.fullmatch(SCRATCH_PATTERN, name.rpartition("/")[2]):
        return "scratch"
    if top == REFS:
        return "ref"
    return "object" if plain and re.fullmatch(KEY_PATTERN, name) else "foreign"


def read_refs(root: Path) -> tuple[list[Ref], list[DamagedError]]:
    """Every ref of a store by name, and an error for each file among them that is none.

    Raises:
        MissingError: the store has no folder of refs, so nobody knows what is kept.
        StorageError: it cannot be listed.
    """
    folder = root / REFS
    if not folder.is_dir():
        raise MissingError(
            folder,
            "not there, so it cannot be known which objects are needed",
            "restore it, or run a stage in each work tree that uses this store: that writes its ref",
        )
    with durable.named(folder, "listing"):
        names = sorted(path.name for path in folder.iterdir())
    refs, unreadable = [], []
    for name in names:
        if re.fullmatch(SCRATCH_PATTERN, name):
            continue
        try:
            refs.append(_read_ref(folder / name))
        except DamagedError as error:
            unreadable.append(error)
        except FileNotFoundError:
            continue  # forgotten by somebody else meanwhile
    return refs, unreadable


def _read_ref(path: Path) -> Ref:
    cure = f"restore it, or if nobody needs it: `teachonce gc --forget {path.stem}`"
    try:
        # A link or a device here is nobody's ref.
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a plain file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes are too many")
        note = Note.model_validate_json(path.read_bytes())
        if f"{digest(note.manifest.encoded)}.json" != path.name:
            raise ValueError("its manifest is not the one that its name says")
    except FileNotFoundError:
        raise
    except ValidationError as error:
        raise DamagedError(path, f"no ref ({error.error_count()} faults)", cure) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(path, f"no ref: {shown(error)}", cure) from error
    return Ref(path.stem, note.manifest, note.made)


def find_ref(root: Path, prefix: str) -> Path:
    """The one file in refs/ whose name begins with `prefix`, readable or not.

    Args:
        root: The store.
        prefix: At least the first four characters.

    Raises:
        TeachonceError: none does, or more than one.
    """
    folder = root / REFS
    found = sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.startswith(prefix) and not path.name.startswith(".")
    )
    if len(prefix) < 4 or len(found) != 1:
        named = ", ".join(shown(path.stem) for path in found[:5]) or "none"
        raise TeachonceError(
            f"ref {shown(prefix)}",
            f"{len(found)} refs begin like that ({named})",
            "give at least four characters that only one begins with; `teachonce ls` lists all",
        )
    return found[0]


def orphans(objects: Iterable[File], refs: Iterable[Ref]) -> list[File]:
    """The objects that no ref keeps.

    A ref keeps what its manifest names. Token ids stand in no manifest: they are kept as long as the
    texts that they were made of. Neither do a teacher's vectors of the probe texts: they are kept as long
    as any vectors of that teacher.
    """
    named = {entry.key for ref in refs for entry in ref.manifest.objects}
    texts = {_last(key) for key in named if key.startswith("text/")}
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
    """What `gc` would delete, and what of the same kind it would not.

    Args:
        orphans: Objects that no ref keeps.
        young: Such objects, but in a folder that somebody may be working on.
        scratch: Scratch files of dead writers.
        live: Scratch files that may be those of living ones.
    """

    orphans: tuple[File, ...]
    young: tuple[File, ...]
    scratch: tuple[File, ...]
    live: tuple[File, ...]


def plan_sweep(inventory: Inventory, refs: Sequence[Ref], *, now: float, grace: float) -> Sweep:
    """Decide what can go.

    A worker writes its manifest, and so its ref, when it is done; until then its objects are orphans.
    A teacher pass takes weeks, so it is not the age of each object that counts but that of the folder:
    as long as the youngest orphan or scratch file in `vectors/<teacher>/` is younger than `grace`, all
    of that folder is left alone. Objects that a ref keeps do not count: they are finished.

    For the same reason `refs` must be read after `inventory` was taken: a worker that ends in between is
    then seen as one that is done.

    Args:
        inventory: What is there.
        refs: Whose objects are kept.
        now: Seconds, by the clock of the machine whose file times are compared.
        grace: Seconds, >= 0; 0 spares no orphan. Scratch files are spared for a day whatever it is.
    """
    unnamed = orphans(inventory.objects, refs)
    newest: dict[str, float] = defaultdict(float)
    for file in (*unnamed, *inventory.scratch):
        newest[file.folder] = max(newest[file.folder], file.written)
    # A file of the future (another machine's clock) is a young one too, unless none is spared.
    spared = {folder for folder, written in newest.items() if grace and now - written < grace}
    return Sweep(
        orphans=tuple(file for file in unnamed if file.folder not in spared),
        young=tuple(file for file in unnamed if file.folder in spared),
        scratch=tuple(file for file in inventory.scratch if now - file.written >= DAY),
        live=tuple(file for file in inventory.scratch if now - file.written < DAY),
    )
