"""The one door for reading: only regular files are opened.

A path may lead to a pipe or a device, also through a link in Git. Opened as a file, a pipe blocks forever
and /dev/zero never ends. Call `check` before a library opens a file by its name.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from storage import durable
from storage.errors import TeachonceError

MOST_BYTES = 64 << 20
"""Default size limit in bytes of a file that is read as a whole."""

KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""Names of file types. Only regular files are opened: a pipe without a writer would hang."""

CURE = "put a file in its place, or remove it"


class IrregularError(TeachonceError):
    """A path is no regular file, or the file is larger than allowed."""


def opened(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        IrregularError: the path is a folder, a pipe, a socket or a device, or a file with content and size
            0, as in /proc: such a file may have no end.
        OSError: the operating system refused, or the file does not exist.
    """
    try:
        # Else a pipe is waited for, and a terminal becomes that of this process.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in {errno.ENXIO, errno.EOPNOTSUPP}:  # what Linux and macOS say of a socket
            raise IrregularError(path, f"is {KINDS[stat.S_IFSOCK]}, not a file", CURE) from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = KINDS.get(stat.S_IFMT(status.st_mode), "something unknown")
            raise IrregularError(path, f"is {kind}, not a file", CURE)
        if status.st_size == 0 and os.pread(descriptor, 1, 0):
            problem = "says that it has 0 bytes and has more, as files of the kernel do (/proc)"
            raise IrregularError(path, problem, "copy its content into a file, and name that")
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def content(path: Path, most: int = MOST_BYTES) -> bytes:
    """Returns all bytes of a file.

    Args:
        path: The file.
        most: Largest size in bytes that is read.

    Raises:
        FileNotFoundError: the file does not exist.
        IrregularError: as `opened`; or the file is larger than `most`.
        StorageError: the operating system refused.
    """
    with durable.named(path, "reading", but=FileNotFoundError), opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            problem = f"has {size:,} bytes, where {most:,} are the most"
            raise IrregularError(path, problem, "put the right file in its place")
        return file.read(size)


def check(path: Path) -> None:
    """Raise as `opened`, for a file that a library is to open by its name."""
    opened(path).close()
