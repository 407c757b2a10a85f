"""The remote: a folder or an object store that boxes without a common disk share.

It is laid out like a store and holds to the same rule. An object goes there if its name is free, whole or
not at all, and only from bytes that were checked a moment before; it comes from there through a scratch
file, and gets its name in the store after it has proved itself. A remote is believed nothing.

What makes a name appear whole: on S3 a put is one step, and `If-None-Match` refuses a name that is taken;
a folder goes through `durable`. Where a server ignores that condition, the worst is a second upload of the
same thing: same key, same origin.

This file is long because a folder and an object store have one contract, kept by one class.
"""

from __future__ import annotations

import errno
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa

from storage import durable
from storage.errors import AnotherCopyError, DamagedError, TeachonceError, shown
from storage.holders import MAX_BYTES, REF_PATTERN, REFS
from storage.store import KEY_PATTERN, MAGIC, Accept, Header, Object, Store, header_at_front

PROTOCOLS = {"file", "s3", "memory"}
"""Protocols whose uploads are known to appear whole or not at all."""

ATTEMPTS = 8
"""Of one request: if 30 % are refused, one in 15,000 fails. A dead server is reported in half a minute."""

LONGEST_PAUSE = 8.0
"""Seconds between two attempts, at most."""

CHUNK_BYTES = 8 << 20
HEAD_BYTES = 64 << 10
SLACK_BYTES = 1 << 20
"""Allowed excess over the manifest's size: another version of Arrow may lay out the same values larger."""

# The attempts are ours: s3fs makes five of each, botocore five of those, and a dead server takes minutes.
S3_OPTIONS = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}

FINAL = (PermissionError, IsADirectoryError, NotADirectoryError)
CLIENTS = {"botocore", "aiobotocore", "aiohttp"}

Result = TypeVar("Result")


class RemoteError(TeachonceError):
    """The remote could not be reached, or refused."""

    @property
    def is_of_all(self) -> bool:
        """Whether everything else that is asked of the remote would fail alike."""
        cause = self.__cause__
        return isinstance(cause, FileNotFoundError) or (
            isinstance(cause, Exception) and _is_final(cause)
        )


class Remote:
    """A place that objects are pushed to and pulled from. Safe to use from several threads.

    Args:
        url: `s3://bucket/folder`, or an existing folder (also as `file://`).
        first_pause: Seconds before the second attempt; each further one waits twice as long, up to 8.

    Raises:
        RemoteError: no such folder, or a kind of URL that is not known here.
    """

    def __init__(self, url: str, *, first_pause: float = 0.5) -> None:
        self.url, self.first_pause = url.rstrip("/"), first_pause
        self._files, root = _file_system(url)
        self._root = root.rstrip("/")
        self._folder = Path(root) if "file" in _protocols(self._files) else None
        if self._folder is not None and not self._folder.is_dir():
            # Made here, it would fill the disk below a mount point that is not mounted.
            raise RemoteError(
                url, "no such folder", f"mount it, make it (mkdir -p '{root}'), or mend `remote`"
            )

    def find(self, key: str) -> Object | None:
        """Returns the remote's object under `key`, from its first and last bytes; None if there is none.

        Enough to see that it is there, complete in length and which copy; not that no bit is flipped. A
        name without content, as an upload that was cut may leave it, is nothing.

        Raises:
            DamagedError: it is cut off, no object, or another one.
            RemoteError: the remote cannot be reached.
        """
        return _read_twice(lambda: self._find(key))

    def _find_copy(self, named: Object, store: Store) -> Object | None:
        """As `find`, of an object that a manifest names.

        Raises:
            AnotherCopyError: it is another copy than the manifest's.
            DamagedError, RemoteError: as `find`.
        """

        def look() -> Object | None:
            remote_object = self._find(named.key)
            if remote_object is not None:
                self._check_same_copy(remote_object, named, store)
            return remote_object

        return _read_twice(look)

    def _find(self, key: str) -> Object | None:
        path = self._path(key)
        try:
            size = self._with_retries(key, lambda: self._size(path))
            if size == 0:
                return None
            head = self._range(key, 0, min(size, HEAD_BYTES))
            tail = self._range(key, max(0, size - len(MAGIC)), size)
        except FileNotFoundError:
            return None
        try:
            header = header_at_front(head)
            if header.key != key:
                raise ValueError(f"it is {header.key} under a foreign name")
            if tail != MAGIC:
                raise ValueError("its end is missing")
        except ValueError as error:
            raise self._damaged(key, str(error)) from error
        return Object(key=key, rows=header.rows, bytes=size, sha256=header.sha256, role=header.role)

    def pull(self, named: Object, store: Store) -> bool:
        """Fetch an object that a manifest names into the store; returns False if the remote has none.

        Raises:
            AnotherCopyError: the remote has another copy than the manifest's.
            DamagedError: what came is not what the manifest names; nothing is left behind.
            RemoteError: the remote cannot be reached.
        """
        remote_object = self._find_copy(named, store)
        if remote_object is None:
            return False

        def accept(_: pa.RecordBatch, header: Header) -> None:
            if header.sha256 != named.sha256:
                raise ValueError("another copy than it said before")

        self._fetch(remote_object, store, accept, most=named.bytes)
        return True

    def try_pull(self, key: str, store: Store, accept: Accept, *, max_bytes: int) -> bool:
        """Fetch an object that no manifest names yet; returns False if the remote has none.

        Args:
            key: The key of the object.
            store: The destination.
            accept: A further check of the intact object; raises ValueError to refuse it.
            max_bytes: Size in bytes above which the object is refused unread.

        Raises:
            DamagedError, RemoteError: as `pull`.
        """
        remote_object = self.find(key)
        if remote_object is None:
            return False
        self._fetch(remote_object, store, accept, most=max_bytes)
        return True

    def push(self, named: Object, store: Store) -> bool:
        """Upload an object that a manifest names; returns False if the remote has that copy already.

        Raises:
            AnotherCopyError: the remote has another copy; it stays.
            MissingError, DamagedError: the store has it not, or not whole; nothing is sent.
            RemoteError: the remote cannot be reached or refuses.
        """
        if self._find_copy(named, store) is not None:
            return False
        if self._put(named.key, store.content(named)):
            return True
        if self._find_copy(named, store) is None:
            raise RemoteError(
                self._url_of(named.key), "there and gone again", "run `teachonce push` again"
            )
        return False

    def push_ref(self, ref: str, note: bytes) -> bool:
        """Upload the ref of a manifest, after its objects; returns False if the remote has it already.

        What is there and is no JSON, as an upload that was cut may leave it, is replaced.
        """
        existing = self.ref(ref)
        if existing is not None and _is_json(existing):
            return False
        return self._put(ref, note, replace=existing is not None)

    def ref(self, ref: str) -> bytes | None:
        """The content of a ref, unchecked; None if the remote has none, or a file too large for a ref.

        Raises:
            RemoteError: the remote cannot be reached.
        """
        path = self._path(ref)
        try:
            size = self._with_retries(ref, lambda: self._size(path))
            return self._range(ref, 0, size) if 0 < size <= MAX_BYTES else None
        except FileNotFoundError:
            return None

    def _fetch(self, remote_object: Object, store: Store, accept: Accept, *, most: int) -> None:
        key = remote_object.key
        if remote_object.bytes > most + SLACK_BYTES:
            raise self._damaged(key, f"{remote_object.bytes:,} bytes where {most:,} are expected")

        def write(sink: BinaryIO) -> None:
            for start in range(0, remote_object.bytes, CHUNK_BYTES):
                end = min(start + CHUNK_BYTES, remote_object.bytes)
                try:
                    sink.write(self._range(key, start, end))
                except FileNotFoundError:
                    raise RemoteError(
                        self._url_of(key),
                        "vanished while it was read",
                        "run the same command again",
                    ) from None

        def receive() -> None:
            try:
                store.receive(key, write, accept)
            except ValueError as error:
                raise self._damaged(key, str(error)) from error

        _read_twice(receive)

    def _put(self, key: str, content: bytes, *, replace: bool = False) -> bool:
        """Upload `key` in one step; returns False if the remote has a non-empty file of that name.

        Args:
            key: The key of the object, or the name of a ref.
            content: The bytes to upload.
            replace: Overwrite a file that is known to be damaged.
        """
        path = self._path(key)
        if self._folder is not None:

            def write(sink: BinaryIO) -> None:
                sink.write(content)

            if replace or self._length(key, path) == 0:
                durable.remove(Path(path))
            return durable.publish(Path(path), write)

        try:
            return self._with_retries(key, lambda: self._upload(key, path, content, replace))
        except FileNotFoundError as error:
            raise RemoteError(
                self.url, f"cannot be written: {shown(error)}", "make the bucket, or mend `remote`"
            ) from error

    def _upload(self, key: str, path: str, content: bytes, replace: bool) -> bool:
        """One attempt to put `content` under `path`; False if the name is taken by a file that stays."""
        try:
            self._files.pipe_file(path, content, mode="overwrite" if replace else "create")
        except Exception as error:
            # A put may have worked though its answer was lost, and not all servers name a taken name
            # alike: look.
            if not _is_transport(error) or (length := self._length(key, path)) is None:
                raise
            if length:
                return False
            self._files.pipe_file(path, content)
        if (length := self._size(path)) != len(content):
            raise OSError(errno.EIO, f"{length} bytes arrived of {len(content)}")
        return True

    def _length(self, key: str, path: str) -> int | None:
        """Bytes under `key`; None if there is nothing of that name."""
        try:
            return self._with_retries(key, lambda: self._size(path))
        except FileNotFoundError:
            return None

    def _size(self, path: str) -> int:
        info = self._files.info(path)
        if info["type"] != "file":
            raise IsADirectoryError(errno.EISDIR, f"a {info['type']}, not a file")
        return int(info["size"])

    def _range(self, key: str, start: int, end: int) -> bytes:
        path = self._path(key)

        def read() -> bytes:
            # By name: the second argument of s3fs is another one than that of fsspec.
            content: bytes = self._files.cat_file(path, start=start, end=end)
            if len(content) != end - start:
                raise OSError(errno.EIO, f"{len(content)} bytes came of {end - start} at {start}")
            return content

        return self._with_retries(key, read)

    def _with_retries(self, key: str, call: Callable[[], Result]) -> Result:
        """Retry `call` until it returns; FileNotFoundError is an answer and is not retried.

        Raises:
            RemoteError: none succeeded, or a retry would fail alike.
        """
        attempt = 1
        while True:
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:
                if not _is_transport(error):
                    raise
                if _is_final(error) or attempt == ATTEMPTS:
                    raise RemoteError(
                        self._url_of(key),
                        f"failed{f' {attempt} times' if attempt > 1 else ''}: "
                        f"{shown(error) or type(error).__name__}",
                        "check the network, the credentials and `remote`, then run the same command "
                        "again: what was moved is kept",
                    ) from error
            # Half of the pause is random, so that machines that failed together do not retry together.
            pause = min(self.first_pause * 2 ** (attempt - 1), LONGEST_PAUSE)
            time.sleep(pause * random.uniform(0.5, 1))
            attempt += 1

    def _path(self, key: str) -> str:
        """Where `key` lies. Refuses anything that is neither a key nor the name of a note."""
        if not re.fullmatch(rf"{KEY_PATTERN}|{REFS}/{REF_PATTERN}", key):
            raise DamagedError(
                key, "not the name of an object", "restore the manifest that names it"
            )
        return f"{self._root}/{key}"

    def _url_of(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _check_same_copy(self, remote_object: Object, named: Object, store: Store) -> None:
        if remote_object.sha256 == named.sha256:
            return
        cure = "`git pull` the manifest of whoever pushed it; or delete it there, then run `teachonce push`"
        if named.key.startswith("vectors/"):
            # One move for all of them: if one is another copy, most are.
            folder = store.path(named.key).parent
            ours = f"mv '{folder}' '{folder}.mine', then " if folder.exists() else ""
            cure = f"{ours}run `teachonce embed`, which takes the remote's, then `dvc repro`"
        raise AnotherCopyError(
            self._url_of(named.key),
            f"another copy than the manifest's (sha256 {remote_object.sha256[:12]}… there, "
            f"{named.sha256[:12]}… in the manifest); the first to be pushed stays",
            cure,
        )

    def _damaged(self, key: str, problem: str) -> DamagedError:
        return DamagedError(
            self._url_of(key),
            f"damaged on the remote: {problem}",
            "delete it there, then run `teachonce push` where the store has it whole",
        )


def _read_twice(read: Callable[[], Result]) -> Result:
    """Call `read`, and once more after an error: a bit may have flipped in transit."""
    try:
        return read()
    except (DamagedError, AnotherCopyError):
        return read()


def _file_system(url: str) -> tuple[Any, str]:
    """The file system that fsspec has for `url`, and the path in it."""
    import fsspec  # here: 70 ms that commands without a remote need not wait for

    # Looked at first: asked for another kind, fsspec would build it, and some open a connection then.
    scheme = url.partition("://")[0] if "://" in url else "file"
    cure = f"use s3://bucket/folder or a folder in `remote` ({', '.join(sorted(PROTOCOLS))})"
    if not _is_known(scheme) or "::" in url:
        raise RemoteError(url, "a kind of URL where half an upload could be seen", cure)
    try:
        # A cached listing would hide what another worker has pushed meanwhile.
        options = S3_OPTIONS if url.startswith("s3") else {}
        files, root = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        raise RemoteError(url, shown(error), "pip install 'teachonce[s3]'") from error
    except (ValueError, OSError) as error:
        raise RemoteError(url, f"no remote: {shown(error)}", cure) from error
    if hasattr(files, "retries"):
        files.retries = 1  # as S3_OPTIONS: the attempts are ours
    return files, root


def _is_known(scheme: str) -> bool:
    """Whether URLs of a scheme are of `PROTOCOLS`, or of a class registered as one of these."""
    import fsspec

    registered = fsspec.registry.get(scheme)
    return scheme in {*PROTOCOLS, "s3a"} or bool(registered and _protocols(registered) & PROTOCOLS)


def _protocols(files: Any) -> set[str]:  # noqa: ANN401 - fsspec has no types
    return {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)


def _is_transport(error: Exception) -> bool:
    """Whether an error comes from the connection or the remote, not from this program.

    Not all errors of S3 clients are `OSError`s, and those clients are not installed everywhere.
    """
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in CLIENTS


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _is_final(error: Exception) -> bool:
    """Whether a retry would fail in the same way."""
    kind = type(error).__name__
    return isinstance(error, FINAL) or "Credentials" in kind or "Validation" in kind
