"""Files that a stage makes for itself while it works, such as an index: made once, found, then removed.

They lie beside the objects, so that all processes that share a store share them, and are no objects.
Nothing names them but what they were made of, no manifest needs them, and each can be made again. `gc`
deletes those that nobody has used for a day, as it does what a dead writer left.

A library reads the file itself, by its path, and stops where its own data ends. Behind them stands the
sha256 of all before, so that a file that was cut short or changed is not believed.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from storage import durable
from storage.store import DIGEST_PATTERN

WORK = "work"
WORK_PATTERN = rf"{WORK}/{DIGEST_PATTERN}\.[a-z]+"
"""Names of these files in a store: the digest of what it was made of, and its format."""

BYTES_AT_ONCE = 1 << 20


def publish(path: Path, write: Callable[[Callable[[bytes], int]], None]) -> None:
    """Make the file `path`, unless somebody else did meanwhile.

    Args:
        path: `work/<digest>.<format>` in a store.
        write: Writes the content by the function it is given, which returns how many bytes it took.

    Raises:
        StorageError: nothing of this call is left behind.
    """

    def write_and_prove(sink: BinaryIO) -> None:
        total = hashlib.sha256()

        def take(content: bytes) -> int:
            total.update(content)
            return sink.write(content)

        write(take)
        sink.write(total.digest())

    durable.publish(path, write_and_prove)


def find(path: Path) -> bool:
    """Whether the file exists whole; its time is set to now. A file that is not whole is removed.

    Raises:
        StorageError: the operating system refused to read or to remove it.
    """
    with durable.named(path, "reading"):
        try:
            status = path.lstat()
            is_whole = stat.S_ISREG(status.st_mode) and _is_whole(path, status.st_size)
        except FileNotFoundError:
            return False
    if not is_whole:
        durable.remove(path)
        return False
    durable.touch(path)
    return True


def _is_whole(path: Path, size: int) -> bool:
    total = hashlib.sha256()
    left = size - total.digest_size
    with path.open("rb") as file:
        while left > 0 and (content := file.read(min(BYTES_AT_ONCE, left))):
            total.update(content)
            left -= len(content)
        return left == 0 and file.read() == total.digest()
