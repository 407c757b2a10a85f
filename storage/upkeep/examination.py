"""Examine objects one by one, and quarantine those that fail their own check."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage import durable
from storage.errors import DamagedError, MissingError, StorageError
from storage.store import DIGEST_PATTERN, Object, Store
from storage.upkeep.inventory import QUARANTINE

State = Literal["missing", "damaged", "unreadable", "another copy"]


@dataclass(frozen=True)
class Finding:
    """Something about an object that is not as its manifest says.

    Args:
        key: Its name.
        state: `another copy` is no fault: whole, but not what the manifest names. `unreadable` says
            nothing about the object: the operating system refused to open it.
        said: What exactly.
    """

    key: str
    state: State
    said: str


def examine(store: Store, key: str, named: Object | None, *, read: bool) -> Finding | None:
    """Compare an object with what a manifest says of it.

    Without `read` only its header is looked at, and its size: one of another size is read, since
    another version of Arrow may lay the same values out differently, and a hole is another size too.

    Args:
        store: Where it should be.
        key: Its name.
        named: What the manifest says; None for what no manifest names.
        read: Read every value and compare the sha256.

    Returns:
        None if all is well.
    """
    try:
        header, size = store.header(key)
        if read or (named is not None and size != named.bytes):
            store.find(key)
    except MissingError as error:
        return Finding(key, "missing", error.problem)
    except DamagedError as error:
        return Finding(key, "damaged", error.problem.removeprefix("damaged: "))
    except StorageError as error:
        return Finding(key, "unreadable", error.problem)
    if named is not None and header.sha256 != named.sha256:
        return Finding(
            key,
            "another copy",
            f"sha256 {header.sha256[:12]}… there, {named.sha256[:12]}… in the manifest",
        )
    return None


def tokens_of(store: Store, texts: Iterable[Object]) -> Iterator[str]:
    """The keys of all token ids in the store that were made of these text shards."""
    folder = store.root / "tokens"
    with durable.named(folder, "listing"):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    entries = list(texts)
    for name in sorted(name for name in names if re.fullmatch(DIGEST_PATTERN, name)):
        for entry in entries:
            path = folder / name / entry.key.rpartition("/")[2]
            # A link that leads nowhere is there too: `examine` says what is wrong with it.
            if path.exists() or path.is_symlink():
                yield path.relative_to(store.root).as_posix()


def quarantine(store: Store, key: str) -> Path | None:
    """Read an object; if it fails its own check, move it away so that it can be made again.

    Returns:
        Where it is now; None if it is whole, or not there.

    Raises:
        StorageError: it cannot be opened or moved; it is where it was.
    """
    path = store.path(key)
    try:
        before = path.lstat().st_ino
        store.find(key)
    except FileNotFoundError:
        return None
    except DamagedError:
        when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        name = f"{key.replace('/', '_')}-{when}-{secrets.token_hex(4)}"
        target = store.root / QUARANTINE / name
        durable.move(path, target)
        if target.lstat().st_ino != before:
            # While this one was read, somebody else mended it: what was moved is the new one.
            durable.move(target, path)
            return None
        return target
    return None
