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
    """A deviation of an object from its manifest."""

    key: str  # the key of the object
    # `another copy` is no fault: the object is intact, but the manifest names another copy.
    # `unreadable` says nothing about the object: the operating system refused to open it.
    state: State
    said: str  # description of the deviation


def examine(store: Store, key: str, named: Object | None, *, read: bool) -> Finding | None:
    """Compare an object with what a manifest says of it.

    Without `read` only its header and size are compared. An object of another size is read whole, since
    another version of Arrow may lay out the same values differently.

    Args:
        store: The store of the object.
        key: The key of the object.
        named: The manifest's entry; None for an object that no manifest names.
        read: Whether to read every value and compare the sha256.

    Returns:
        The deviation; None if there is none.
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
    if named is not None and header.role != named.role:
        return Finding(
            key, "another copy", f"of role {header.role} there, {named.role} in the manifest"
        )
    if named is not None and header.sha256 != named.sha256:
        return Finding(
            key,
            "another copy",
            f"sha256 {header.sha256[:12]}… there, {named.sha256[:12]}… in the manifest",
        )
    return None


def tokens_of(store: Store, texts: Iterable[Object]) -> Iterator[str]:
    """Yield the keys of all token ids in the store that were made from these texts or readings."""
    folder = store.root / "tokens"
    with durable.named(folder, "listing"):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    entries = list(texts)
    for name in sorted(name for name in names if re.fullmatch(DIGEST_PATTERN, name)):
        for entry in entries:
            path = folder / name / entry.key.rpartition("/")[2]
            # Broken links are included: `examine` reports them.
            if path.exists() or path.is_symlink():
                yield path.relative_to(store.root).as_posix()


def quarantine(store: Store, key: str) -> Path | None:
    """Read an object; if it fails its own check, move it away so that it can be made again.

    Returns:
        The new path; None if the object is intact, or missing.

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
            # It was repaired by somebody else while this process read it: the new object was moved.
            durable.move(target, path)
            return None
        return target
    return None
