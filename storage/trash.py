"""How `gc` deletes objects while others work on the same store, and why no named object is lost by it.

Nobody takes a lock. A stage does three things in this order: it finds or makes its objects, it leaves its
ref, and then it looks whether each object is at its place (`Manifest.hold`). Only if all are there does it
write its manifest. `gc` does three things in this order as well: it renames an object to a name of its own
in the same folder (here: takes it away), it reads all refs again, and only then it deletes what it took
away, or puts it back if a ref names it now or somebody has touched it.

Take an object at which a stage looked and which was there. If gc takes it away later than that look, then
the ref was left before, so gc finds the ref when it reads them again, and puts the object back. If gc took
it away earlier than that look, then what the stage saw had been put back or made again, and gc deletes only
under its own name. So gc deletes no object that a stage has seen after it left its ref, whatever the order
of all other steps. If the stage does not see an object, it fails, takes its ref back and names the cure.

This needs no clock. Ages only save the work of making something again: whoever finds an object gives it the
time of now, where the file is his, and gc leaves young objects alone. It holds for several gcs, too: each
uses names of its own, and deletes what another one has taken away only if it found that file before it read
the refs. It needs a disk on which all see one order of changes. A client of a network disk that remembers
names (NFS: up to `acdirmax`, a minute) sees changes late, and then only the ages protect.

A gc that is killed leaves what it took away under these names. Nothing of it is lost: whoever asks the
store for one of these objects gets it back (`take_back`), and the next gc decides about all of them anew.
So that this costs nothing while there is no such file, a gc says by a file in `trash/` that it has begun.
The rename is within one folder, so a power cut leaves the object under one of the two names.
"""

from __future__ import annotations

import errno
import re
import secrets
from pathlib import Path

from storage import durable
from storage.errors import StorageError

MARKS = "trash"
"""The folder of the store in which each gc that has begun and not ended has an empty file."""

ID_PATTERN = r"[0-9a-f]{16}"
NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM}


def name_aside(name: str, gc: str) -> str:
    """Returns the file name that the gc with the id `gc` gives to an object that it takes away."""
    return f".{name}.{gc}.trash"


def original(name: str) -> str | None:
    """Returns the file name that an object had before it was taken away; None for other files."""
    match = re.fullmatch(rf"\.(.+)\.{ID_PATTERN}\.trash", name)
    return match[1] if match else None


def begin(root: Path) -> str:
    """Write the mark of a gc that begins; returns its id."""
    gc = secrets.token_hex(8)
    durable.publish(root / MARKS / gc, lambda _: None)
    return gc


def end(root: Path, gc: str) -> None:
    """Remove the mark of a gc that has deleted or put back all that it took away."""
    durable.remove(root / MARKS / gc)


def take_away(path: Path, gc: str) -> None:
    """Rename the object `path`, so that no stage finds it; does nothing if it is gone already."""
    durable.rename(path, path.with_name(name_aside(path.name, gc)))


def put_back(aside: Path) -> None:
    """Rename an object back to its key, unless a new object has that name."""
    name = original(aside.name)
    assert name is not None, aside
    durable.restore(aside, aside.with_name(name))
    durable.remove(aside)


def take_back(root: Path, path: Path) -> bool:
    """Put an object of the store `root` back that a gc has taken away; whether it is at its place now.

    What may not be written does not come back.
    """
    with durable.named(root / MARKS, "listing"):
        try:
            marks = sorted(mark.name for mark in (root / MARKS).iterdir())
        except FileNotFoundError:
            return False
    try:
        # What is left under the other name is for a gc to delete; one may be about to.
        return any(
            durable.restore(path.with_name(name_aside(path.name, gc)), path)
            for gc in marks
            if re.fullmatch(ID_PATTERN, gc)
        )
    except StorageError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in NOT_ALLOWED:
            return False
        raise
