"""The one door for writes: a file is whole or absent, and what was reported written survives.

Three ways to write, and no fourth:

- `publish` makes an immutable file (an object of the store). Whoever links it first wins.
- `replace` and `replace_folder` change something mutable in the work tree in one step.
- `append` adds to the end of a file whose reader finds out what was not written whole (storage/journal.py).

The first two write a scratch file beside the target, flush it to the disk, give it its final name and flush
the folder. A failed flush is never retried: Linux reports a lost page once and then calls it clean,
so the scratch file is thrown away and the caller starts it again.

A file system without hard links (FAT, exFAT, many of FUSE, some network disks) serves as well. There
`publish` looks whether the name is free and renames, with the folder locked. A rename gives the name to a
whole file or to none. The kernel takes the lock back from who dies: none is left behind, and nobody has to
judge by a clock whether one is stale. Between two machines, or where there are no locks either, both may
find the name free. Then the later file replaces the earlier and is as whole: of an object, that is another
copy, which is found out; of a ref, one of the same manifest, and the other holder's next command leaves his
anew.

What was written is taken away by `move`, `rename` and `remove`, which only the upkeep of the store calls;
`restore` undoes a `rename`.

This file is long because it is the only place that writes, and says for each step what a crash leaves.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from storage.errors import StorageError

SCRATCH_SUFFIX = ".tmp"
SCRATCH_PATTERN = rf"\.(.+)\.[0-9]+\.[0-9a-f]{{8}}{re.escape(SCRATCH_SUFFIX)}"
"""What `_scratch_name` makes; the first group is the name that the file is to have in the end."""

CURES = {
    errno.ENOSPC: "free some space there, then run the same command again: what is finished is kept",
    errno.EDQUOT: "raise the quota or free some space, then run the same command again",
    errno.EFBIG: "raise the file size limit (ulimit -f), then run the same command again",
    errno.EROFS: "mount it writable, or point `store` in params.yaml to a folder that is",
    errno.EACCES: "give yourself write permission there, or point `store` to another folder",
    errno.EPERM: "give yourself write permission there, or point `store` to another folder",
    errno.EMFILE: "allow more open files (ulimit -n), then run the same command again",
    errno.ESTALE: "mount the network disk again, then run the same command again",
    errno.EIO: "the device reports errors: check it, then run the same command again",
}
LACKING = {
    *(errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY),
    *(errno.EINVAL, errno.EMLINK, errno.EXDEV),
}
"""Errors of file systems without hard links, modes or the flush of a folder.

EPERM can also mean a lack of permission; then the rename fails, too, and that error is raised.
"""

QUOTED_ERRNO = re.compile(r"\(os error (\d+)\)")
"""The form in which libraries written in Rust quote an error of the operating system."""

TORCH_WRITER = "inline_container"
"""Source file of torch's writer of weights, named in its errors, which give no cause."""

READING_CURES = CURES | {
    errno.EACCES: "give yourself permission to read it, then run the same command again",
    errno.EPERM: "give yourself permission to read it, then run the same command again",
}
OTHER_CURE = "mend the cause, then run the same command again: what is finished is kept"


@contextmanager
def named(path: Path, doing: str, *, but: type[OSError] | tuple[()] = ()) -> Iterator[None]:
    """Turn an `OSError` raised inside into a `StorageError` that says which file and what to do.

    Python leaves the file name out of errors of write and fsync, which are the ones that matter.

    Args:
        path: The file.
        doing: The attempted action, as in "writing".
        but: Exceptions that are raised unchanged, since the caller handles them.
    """
    try:
        yield
    except but:
        raise
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        cure = (READING_CURES if doing == "reading" else CURES).get(error.errno or 0, OTHER_CURE)
        raise StorageError(path, f"{doing} failed: {cause}", cure) from error


@contextmanager
def _named_in_libraries(path: Path, scratch: Path) -> Iterator[None]:
    """As `named`, around libraries that write into `scratch`: a refused write is found in what they raise.

    safetensors and tokenizers quote the error of the operating system in one of their own, torch says that
    its writer failed. A file elsewhere that could not be opened is named itself. Other exceptions pass.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        refusal = _refusal_in(error)
        if refusal is None:
            raise
        number, where = refusal
        cause = os.strerror(number) if number else str(error).partition("\n")[0]
        if where is None or where.is_relative_to(scratch):
            place, doing = path, "writing"
        else:
            place, doing = where, "opening"
        raise StorageError(
            place, f"{doing} failed: {cause}", CURES.get(number, OTHER_CURE)
        ) from error


def _refusal_in(error: BaseException) -> tuple[int, Path | None] | None:
    """Find an error of the operating system in an exception and its causes.

    Returns:
        The errno (0 if only a failed write is known) and the file, if it is named; None if there is no such
        error.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in CURES:
            return link.errno, Path(link.filename) if isinstance(link.filename, str) else None
        if (quoted := QUOTED_ERRNO.search(str(link))) and int(quoted[1]) in CURES:
            return int(quoted[1]), None
        if TORCH_WRITER in str(link):
            return 0, None
        link = link.__cause__ or link.__context__
    return None


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Device, inode, size, mtime and ctime: equal while nobody has written to a file or put another there.

    Size and mtime alone are not enough: archives, images and rsync restore the time of the last change,
    and reproducible builds set it. Nobody can set ctime.
    """
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def publish(path: Path, write: Callable[[BinaryIO], None]) -> bool:
    """Create the immutable file `path` with the content that `write` writes.

    Its mode is 0444 less the umask, where there are modes.

    Returns:
        True if this call created the file; False if it existed, which leaves it untouched and discards the
        new content. In both cases the name is on the disk when this returns.

    Raises:
        StorageError: nothing of this call is left behind.
    """
    _make_folder(path.parent)
    with _scratch(path) as (scratch, sink), named(path, "writing"):
        write(sink)
        sink.flush()
        os.fsync(sink.fileno())
        with _if_supported():
            os.fchmod(sink.fileno(), os.fstat(sink.fileno()).st_mode & 0o444)
        won = _name(scratch, path)
        _flush(path.parent)
    return won


def replace(path: Path, content: bytes) -> None:
    """Give the mutable file `path` a new content in one step: readers see the old or the new one."""
    _make_folder(path.parent)
    with _scratch(path) as (scratch, sink), named(path, "writing"):
        sink.write(content)
        sink.flush()
        os.fsync(sink.fileno())
        scratch.replace(path)
        _flush(path.parent)


def append(path: Path, content: bytes) -> None:
    """Add `content` to the end of the file `path`, which is made if it is not there.

    A crash, or an error, may leave a part of it: whoever reads the file must find that out.

    Raises:
        StorageError: the operating system refused.
    """
    _make_folder(path.parent)
    with named(path, "writing"):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o666)
        try:
            is_new = os.fstat(descriptor).st_size == 0
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            _flush(path.parent)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield an empty scratch folder; on a clean exit it becomes `path`, whatever was there before.

    A file or a link that was there is replaced itself; what the link led to is not touched. A crash leaves
    the old folder, or (between two renames) none, but never a mixture of both.

    Raises:
        StorageError: the operating system refused a write, also one of a library; `path` is as it was.
    """
    _make_folder(path.parent)
    scratch = _scratch_name(path)
    with named(path, "writing"):
        scratch.mkdir()
    try:
        with _named_in_libraries(path, scratch):
            yield scratch
        with named(path, "writing"):
            for file in sorted(scratch.rglob("*")):
                _flush(file)
            _flush(scratch)
            if path.is_symlink() or path.exists():
                old = _scratch_name(path)
                path.rename(old)
                scratch.rename(path)
                remove(old)
            else:
                scratch.rename(path)
            _flush(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def move(path: Path, target: Path) -> None:
    """Rename a file or folder to `target` on the same disk, in one step.

    Raises:
        StorageError: it failed; the old name is kept.
    """
    _make_folder(target.parent)
    with named(path, "moving"):
        path.rename(target)
        _flush(target.parent)
        _flush(path.parent)


def rename(path: Path, target: Path) -> None:
    """Rename a file within its folder, in one step; does nothing if it is gone already.

    The rename is not flushed: after a power cut the file has one of the two names.
    """
    with named(path, "renaming"), suppress(FileNotFoundError):
        path.rename(target)


def restore(path: Path, target: Path) -> bool:
    """Undo `rename`: give `path` the name `target`, unless a file of that name exists.

    Returns:
        False if `path` does not exist (any more).

    Raises:
        StorageError: it is not allowed, or failed.
    """
    with named(target, "putting back"):
        try:
            if not _name(path, target):
                return True
        except FileNotFoundError:
            return False
        _flush(target.parent)
        return True


def touch(file: int | Path) -> None:
    """Set the time of a file or descriptor to now; a refusal is ignored (only owners may do that)."""
    with suppress(OSError):
        os.utime(file)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder; does nothing if it is gone already.

    Raises:
        StorageError: it failed; a part may be left.
    """
    with named(path, "deleting"):
        try:
            path.unlink(missing_ok=True)
        except (IsADirectoryError, PermissionError):  # macOS raises the second for a folder
            if path.is_symlink() or not path.is_dir():
                raise
            shutil.rmtree(path)
        _flush(path.parent)


@contextmanager
def _scratch(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `path`, open for writing, removed on the way out if it still has its name."""
    scratch = _scratch_name(path)
    with named(path, "creating a file"):
        # 0666 less the umask, not the 0600 of tempfile: a shared store is read by the whole group.
        # Readable too: what comes from elsewhere is mapped and checked before it gets its name.
        descriptor = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    try:
        with named(path, "writing"), os.fdopen(descriptor, "wb") as sink:
            yield scratch, sink
    finally:
        with named(scratch, "deleting"):
            scratch.unlink(missing_ok=True)


def _scratch_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{SCRATCH_SUFFIX}")


def _name(file: Path, target: Path) -> bool:
    """Give `file` the name `target` in its folder, unless that name is taken.

    Returns:
        False if it is taken. If True, `file` may or may not keep its old name, too.
    """
    with _if_supported():
        try:
            # link, not rename: it refuses an existing name, so two writers cannot both win.
            os.link(file, target)
        except FileExistsError:
            return False
        return True
    # There are no links (see above), or Linux links no file that belongs to somebody else and may not be
    # written (fs.protected_hardlinks), but renames it for all who may write in the folder.
    with _locked(target.parent):
        try:
            target.lstat()
        except FileNotFoundError:
            file.rename(target)
            return True
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock `folder` against other processes of this machine, if the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # closing is not enough if a process was forked meanwhile
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextmanager
def _if_supported() -> Iterator[None]:
    """Suppress the errors of an operation that the file system lacks; the block is left there."""
    try:
        yield
    except OSError as error:
        if error.errno not in LACKING:
            raise


def _make_folder(folder: Path) -> None:
    """Make `folder` and its parents, each flushed into the one above so that none is lost."""
    with named(folder, "looking for the folder"):
        if folder.is_dir():
            return
    _make_folder(folder.parent)
    with named(folder, "making the folder"):
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Flush a file or a folder to the disk. Never call it again for one that failed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _if_supported() if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
