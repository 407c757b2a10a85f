"""The store: immutable objects, each named by what it was made from and able to prove itself.

An object is an Arrow IPC file with one record batch, uncompressed, so that a mapped file is the
array itself. Its schema metadata holds a header: format, its own key, rows, facts of its making, and
the sha256 of all of that together with every value. So a swapped, renamed, truncated or corrupted object is
detected before any of it is used.

This file is long because naming, checking, publishing and opening an object must agree to the byte.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import mmap
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
)
from typing_extensions import Buffer

from storage import durable, trash
from storage.errors import AnotherCopyError, DamagedError, MissingError, StorageError, first_line
from storage.ipc import first_batch
from storage.roles import Role

log = logging.getLogger("teachonce")

FORMAT = 1
HEADER = b"teachonce"
MAGIC = b"ARROW1"
FRONT = 8  # offset in bytes of the Arrow stream behind the magic; it begins with the schema

UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, KeyError)
"""Errors that Arrow and Python raise for malformed bytes."""

DIGEST_PATTERN = r"[0-9a-f]{40}"
KEY_PATTERN = (
    rf"((text|readings)/{DIGEST_PATTERN}"
    rf"|(vectors|mixes|tokens)/{DIGEST_PATTERN}/{DIGEST_PATTERN}"
    rf"|negatives/{DIGEST_PATTERN}/[0-9]{{6}})\.arrow"
)

# Columns of each kind of object. All readers rely on them. Other types are refused: a dictionary would hide
# values from the sha256, and nested or extension types could be of any depth or class.
VECTOR = (
    r"vector: fixed_size_list<item: "
    r"((halffloat|float)>\[[1-9][0-9]*\]|int8>\[[1-9][0-9]*\], scale: float)"
)
COLUMNS = {
    kind: rf"text_key: fixed_size_binary\[16\], {columns}"
    for kind, columns in {
        "text": r"text: large_string",
        "readings": r"reading: large_string",
        "vectors": VECTOR,
        "mixes": rf"first: int32, second: int32, ratio: float, {VECTOR}",
        "tokens": r"token_ids: large_list<item: int32>",
        "negatives": r"neighbours: fixed_size_list<item: int64>\[([1-9][0-9]*)\], "
        r"scores: fixed_size_list<item: float>\[\1\]"
        r"(, rejected: fixed_size_list<item: uint16>\[[1-9][0-9]*\])?",
    }.items()
}

# A key becomes a path, so it is matched as a whole before it touches the file system: no "..", no
# absolute path and no link can be spelled in it.
Key = Annotated[str, StringConstraints(pattern=rf"^{KEY_PATTERN}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

# Limited, so that sums over all objects of a manifest stay within 64 bits.
Rows = Annotated[int, Field(ge=0, lt=1 << 40)]


# `open` raises these for a link and a socket, which are damage. Its other errors (no permission, no more
# descriptors, a stale mount) say nothing about the object.
NO_PLAIN_FILE = {errno.ELOOP, errno.ENXIO}

# `find` touches an object older than this. Not a younger one: a touched file has another identity, so every
# process checks it again. `gc` spares objects for days; with a grace period below an hour it may delete one
# that a stage has found, and the stage reports that.
YOUNG_SECONDS = 3600.0

# Token ids have no entry: each stage that needs them makes them.
MADE_BY = {
    "text": "teachonce shard",
    "readings": "teachonce shard",
    "vectors": "teachonce embed",
    "mixes": "teachonce embed",
    "negatives": "teachonce mine",
}


TEXT_ROLE = ("role", "text")


class Object(BaseModel):
    """One object as a manifest names it. `sha256` is that of the payload, not of the file.

    `role` is that of a text shard's texts, or of the texts that readings stand for. The role `text` is not
    written: a corpus without roles has the bytes that it had before there were any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Key
    rows: Rows
    bytes: NonNegativeInt
    sha256: Sha256
    role: Role = "text"

    @model_serializer(mode="wrap")
    def _without_text(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if (name, value) != TEXT_ROLE}


class Header(BaseModel):
    """The header of an object. `facts` are counts of its making, such as tokens read.

    `role` is that of a text shard's texts, or of those that readings stand for; `text` is not written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    key: Key
    rows: Rows
    facts: dict[str, int]
    sha256: Sha256
    role: Role = "text"


Accept = Callable[[pa.RecordBatch, Header], None]
"""A further check of an intact object from elsewhere; raises ValueError to refuse it."""


class Store:
    """A folder of objects, made by the first `put`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Identity of each file that this process has checked -> its sha256. A published file never changes,
        # so it is read and hashed once.
        self._checked: dict[tuple[int, ...], str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled: the folder; another process checks each file itself."""
        return {"root": self.root, "_checked": {}}

    def put(
        self,
        key: str,
        batch: pa.RecordBatch,
        facts: Mapping[str, int] | None = None,
        *,
        role: Role = "text",
    ) -> Object:
        """Publish `batch` under `key` and return the object of that key.

        If the key was published before, that object stays and is returned: equal keys mean equal sources,
        so at most last bits differ.

        Raises:
            StorageError: the disk refused; nothing is left behind.
            DamagedError: the object published before is damaged.
            ValueError: the batch has a null, or other columns than those of its kind; nothing is written.
        """
        # A wrong object would block its key for every later one.
        _check_columns(key, batch.schema)
        facts = dict(facts or {})
        header = Header(
            format=FORMAT,
            key=key,
            rows=len(batch),
            facts=facts,
            sha256=payload_sha256(key, batch, facts, role),
            role=role,
        )
        encoded = header.model_dump_json(exclude_defaults=True).encode()
        schema = batch.schema.with_metadata({HEADER: encoded})

        def write(sink: BinaryIO) -> None:
            with pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(batch)

        durable.publish(self.path(key), write)
        log.debug("%s: published, %d rows", key, len(batch))
        published = self.find(key)
        if published is None:
            raise self._missing(key)
        return published

    def find(self, key: str) -> Object | None:
        """Returns the object under `key` after a full check, or None if there is none.

        The caller will rely on the object, so its file time is set to now: `gc` spares it like a new one.

        Raises:
            DamagedError: its bytes are not what its header says.
        """
        try:
            batch, header, size = self._map(key, take_up=True)
        except MissingError:
            return None
        return Object(key=key, rows=len(batch), bytes=size, sha256=header.sha256, role=header.role)

    def open(self, named: Object) -> pa.RecordBatch:
        """Returns the memory-mapped batch of an object that a manifest names, checked against it.

        Raises:
            MissingError: it is not in the store.
            DamagedError: its bytes are not what its header says.
            AnotherCopyError: it is whole, but another copy than the manifest's.
        """
        batch, header, _ = self._map(named.key)
        for what, ours, theirs in (
            # A wrong count would shift every row behind this object, a wrong role give it another prompt.
            ("rows", named.rows, header.rows),
            ("is its role", named.role, header.role),
        ):
            if ours != theirs:
                raise DamagedError(
                    f"the manifest that names {named.key}",
                    f"{ours} {what} there, {theirs} in the object",
                    "restore the manifest from Git, or make it again with the stage that left it",
                )
        self._check_copy(header.sha256, named)
        return batch

    def _check_copy(self, sha256: str, named: Object) -> None:
        if sha256 != named.sha256:
            raise AnotherCopyError(
                self.path(named.key),
                f"another copy than the manifest's (whole, sha256 {sha256[:12]}… there, "
                f"{named.sha256[:12]}… in the manifest)",
                f"{remake_command(named.key)} to adopt the copy that is there, then `dvc repro`",
            )

    def keys(self, folder: str) -> list[str]:
        """The keys of all objects in a folder of the store, such as `vectors/<fingerprint>`, sorted.

        Raises:
            StorageError: it cannot be listed.
        """
        path = self.root / folder
        with durable.named(path, "listing"):
            names = [f"{folder}/{file.name}" for file in path.iterdir()] if path.is_dir() else []
        return sorted(name for name in names if re.fullmatch(KEY_PATTERN, name))

    def glance(self, key: str) -> pa.RecordBatch:
        """Returns the memory-mapped batch under `key`, not compared with its sha256.

        For a first look, such as which texts it has; use `find` and `open` before relying on a value.

        Raises:
            MissingError, DamagedError, StorageError: as `header`.
        """
        content, _ = self._content(key)
        try:
            return _prove(key, content, values=False)[0]
        except ValueError as error:
            raise self._damaged(key, str(error)) from error

    def receive(self, key: str, write: Callable[[BinaryIO], None], accept: Accept) -> bool:
        """Check the object that `write` fetches from elsewhere, and publish it under `key`.

        Returns:
            False if the key was published meanwhile; that object stays.

        Raises:
            ValueError: it is damaged, of another key, or refused by `accept`; nothing is left behind.
            StorageError: the disk refused; nothing is left behind.
        """

        def write_and_prove(sink: BinaryIO) -> None:
            write(sink)
            sink.flush()
            content = mmap.mmap(sink.fileno(), 0, access=mmap.ACCESS_READ)
            accept(*_prove(key, pa.py_buffer(content)))

        return durable.publish(self.path(key), write_and_prove)

    def content(self, named: Object) -> bytes:
        """Returns the bytes of an object that a manifest names, to be sent elsewhere.

        Exactly these bytes are checked, since the file may have rotted after an earlier check.

        Raises:
            MissingError, DamagedError, AnotherCopyError: as `open`.
        """
        self.open(named)
        path = self.path(named.key)
        with durable.named(path, "reading"):
            content = path.read_bytes()
        try:
            _prove(named.key, pa.py_buffer(content))
        except ValueError as error:
            raise self._damaged(named.key, str(error)) from error
        return content

    def facts(self, key: str) -> dict[str, int]:
        """The facts in the header of the object under `key`."""
        return self._map(key)[1].facts

    def path(self, key: str) -> Path:
        """Where the object `key` lies. Refuses anything that is not a key."""
        if not re.fullmatch(KEY_PATTERN, key):
            raise DamagedError(
                key, "not the name of an object", "restore the manifest that names it"
            )
        return self.root / key

    def header(self, key: str) -> tuple[Header, int]:
        """Returns the header of the object under `key` and its size in bytes; no value is read.

        Raises:
            MissingError: it is not in the store.
            DamagedError: it has no header, or another object's.
            StorageError: the operating system refused to open it.
        """
        content, status = self._content(key)
        try:
            _, header = _open(key, content)
        except UNREADABLE as error:
            raise self._damaged(key, first_line(error)) from error
        return header, status.st_size

    def check_present(self, named: Object) -> None:
        """Raise unless an object that was found or made before is still at its place. No value is read.

        Raises:
            MissingError, DamagedError, AnotherCopyError: as `open`.
        """
        path = self.path(named.key)
        checked = None
        with durable.named(path, "looking for it"), suppress(FileNotFoundError):
            checked = self._checked.get(durable.identity(path.lstat()))
        if checked != named.sha256:  # which covers the key
            self._check_copy(self.header(named.key)[0].sha256, named)

    def has(self, key: str) -> bool:
        """Whether a file exists under `key`; its content is not checked."""
        path = self.path(key)
        with durable.named(path, "looking for it"):
            return path.is_file() or trash.take_back(self.root, path) or path.is_file()

    def _map(self, key: str, *, take_up: bool = False) -> tuple[pa.RecordBatch, Header, int]:
        """The batch, the header and the size in bytes of the object under `key`, checked."""
        content, status = self._content(key, take_up=take_up)
        seen = durable.identity(status)
        try:
            batch, header = (_open_proved if seen in self._checked else _prove)(key, content)
        except ValueError as error:
            raise self._damaged(key, str(error)) from error
        self._checked[seen] = header.sha256
        log.debug("%s: mapped, %d rows", key, len(batch))
        return batch, header, status.st_size

    def _content(self, key: str, *, take_up: bool = False) -> tuple[pa.Buffer, os.stat_result]:
        """Map the file of `key`; `take_up` sets its time to now first if it is older than YOUNG_SECONDS."""
        path = self.path(key)
        try:
            descriptor = _open_object(path, self.root)
        except FileNotFoundError:
            raise self._missing(key) from None
        except OSError as error:
            cause = os.strerror(error.errno or 0)
            if error.errno in NO_PLAIN_FILE:
                raise self._damaged(key, f"cannot be opened ({cause})") from error
            raise StorageError(
                path, f"opening failed: {cause}", "mend that, then run the same command again"
            ) from error
        with durable.named(path, "reading"):
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
                    raise self._damaged(key, "not a file with content")
                if take_up and time.time() - status.st_mtime > YOUNG_SECONDS:
                    durable.touch(descriptor)
                    status = os.fstat(descriptor)
                return _map_file(descriptor), status
            finally:
                os.close(descriptor)

    def _missing(self, key: str) -> MissingError:
        return MissingError(
            self.path(key),
            "not in the store",
            f"{remake_command(key)}, or point `store` (or $TEACHONCE_STORE) to the store that has it",
        )

    def _damaged(self, key: str, problem: str) -> DamagedError:
        path = self.path(key)
        return DamagedError(
            path,
            f"damaged: {problem}",
            "run `teachonce repair`; if it finds nothing, no manifest here names it yet: "
            f"rm -f '{path}', then {remake_command(key)}",
        )


def _open_object(path: Path, root: Path) -> int:
    """Open an object of the store `root`, after taking it back if a gc has taken it away."""
    # No links and no devices: the store may come from a stranger.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        trash.take_back(root, path)
    # Also if nothing was taken back: the gc may have put it back itself.
    return os.open(path, flags)


def _map_file(descriptor: int) -> pa.Buffer:
    """The content of an open file, mapped as long as an array points into it.

    The map holds no descriptor. Python's `mmap` keeps a copy of one for each map (until 3.13), and of those
    a process may have 1,024 where maps are 65,530.
    """
    # Not the path: another file may have it by now.
    with pa.memory_map(f"/dev/fd/{descriptor}") as file:
        return file.read_buffer()


def remake_command(key: str) -> str:
    """Returns the advice to run the command that makes the object `key` again.

    Not `dvc repro`: DVC compares manifests, and a manifest does not change when an object is lost.
    """
    command = MADE_BY.get(key.split("/", 1)[0])
    return f"run `{command}`" if command else "run the same command again"


def digest(*parts: Buffer) -> str:
    """Returns 40 hex digits: blake2b over `parts`, length-prefixed, so that no two sequences agree."""
    total = hashlib.blake2b(digest_size=20)
    for part in parts:
        view = memoryview(part).cast("B")
        total.update(len(view).to_bytes(8, "little"))
        total.update(view)
    return total.hexdigest()


def canonical_json(value: object) -> bytes:
    """`value` as the one JSON text that equal values share; NaN is refused."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, indent=2, allow_nan=False)
    return f"{text}\n".encode()


def payload_sha256(
    key: str, batch: pa.RecordBatch, facts: Mapping[str, int], role: Role = "text"
) -> str:
    """The sha256 over an object's header and every value in it.

    It is taken from the values, not from the file, so that it stands inside the file and does not
    depend on how a version of Arrow lays out its messages.
    """
    columns = [[field.name, str(field.type)] for field in batch.schema]
    other = [] if role == "text" else [role]
    total = hashlib.sha256(canonical_json([FORMAT, key, len(batch), dict(facts), columns, *other]))
    for column in batch.columns:
        for piece in _pieces(column):
            view = memoryview(piece).cast("B")
            total.update(len(view).to_bytes(8, "little"))
            total.update(view)
    return total.hexdigest()


def _pieces(array: pa.Array) -> Iterator[Buffer]:
    """The bytes that hold the values of `array`, without padding: equal values, equal bytes."""
    if array.null_count:
        raise ValueError(f"{array.null_count} nulls in a column of {array.type}")
    if pa.types.is_fixed_size_list(array.type):
        yield from _pieces(array.flatten())
        return
    if pa.types.is_large_list(array.type) or pa.types.is_large_string(array.type):
        offsets = np.frombuffer(
            array.buffers()[1], np.int64, count=len(array) + 1, offset=array.offset * 8
        )
        yield np.ascontiguousarray(offsets - offsets[0]).data
        if pa.types.is_large_list(array.type):
            # Arrow does not check the one offset of no lists, and ends the process when it follows it.
            if not 0 <= offsets[0] <= len(array.values):
                raise ValueError(f"lists that begin at value {offsets[0]} of {len(array.values)}")
            yield from _pieces(array.flatten())
        else:
            yield memoryview(array.buffers()[2] or b"")[offsets[0] : offsets[-1]]
        return
    width = array.type.byte_width
    start = array.offset * width
    yield memoryview(array.buffers()[1] or b"")[start : start + len(array) * width]


def header_at_front(head: bytes) -> Header:
    """The header of an object of which only the first bytes are here, not yet checked.

    Raises:
        ValueError: these are not the first bytes of an object.
    """
    if not head.startswith(MAGIC):
        raise ValueError("not an Arrow file")
    try:
        return _header_in(pa.ipc.read_schema(pa.py_buffer(head)[FRONT:]))
    except UNREADABLE as error:
        raise ValueError(first_line(error)) from error


def _prove(key: str, content: pa.Buffer, *, values: bool = True) -> tuple[pa.RecordBatch, Header]:
    """The batch and the header in the content of a file, whole and of the object `key`.

    Unless `values`, its values are not compared with its sha256.

    Raises:
        ValueError: says in one line what is wrong.
    """
    try:
        reader, header = _open(key, content)
        batch = reader.get_batch(0)
        # Arrow checks no offset by itself: a damaged one read without this ends the process.
        batch.validate(full=True)
        if values:
            _check_values(batch, header)
    except UNREADABLE as error:
        raise ValueError(first_line(error)) from error
    return batch, header


def _open_proved(key: str, content: pa.Buffer) -> tuple[pa.RecordBatch, Header]:
    """As `_prove`, for a file that was proved and has not changed since: nothing is hashed again."""
    try:
        reader, header = _read(key, content)
        return reader.get_batch(0), header
    except UNREADABLE as error:
        raise ValueError(first_line(error)) from error


def _header_in(schema: pa.Schema) -> Header:
    metadata = schema.metadata or {}
    if HEADER not in metadata:
        raise ValueError("an Arrow file without our header")
    try:
        return Header.model_validate_json(metadata[HEADER])
    except ValidationError as error:
        raise ValueError(f"an unreadable header ({error.error_count()} wrong fields)") from error


def _read(key: str, content: pa.Buffer) -> tuple[pa.ipc.RecordBatchFileReader, Header]:
    """The Arrow file of the object `key`, and its header."""
    reader = pa.ipc.open_file(content)
    if reader.num_record_batches != 1:
        raise ValueError(f"{reader.num_record_batches} record batches instead of one")
    header = _header_in(reader.schema)
    if header.key != key:
        raise ValueError(f"it is {header.key} under a foreign name")
    return reader, header


def _open(key: str, content: pa.Buffer) -> tuple[pa.ipc.RecordBatchFileReader, Header]:
    """As `_read`, with all checks that need no values."""
    reader, header = _read(key, content)
    _check_columns(key, reader.schema)
    # An Arrow file holds its schema twice, and stream readers use the copy at the front.
    front = pa.BufferReader(content[FRONT:])
    start, is_compressed = first_batch(content)
    schema = pa.ipc.read_schema(front)
    if not schema.equals(reader.schema, check_metadata=True) or front.tell() != start - FRONT:
        raise ValueError("its front and its end do not say the same of what is between them")
    if is_compressed:
        raise ValueError("compressed, which no object is")
    return reader, header


def _check_columns(key: str, schema: pa.Schema) -> None:
    """Raise ValueError unless the columns are those of the kind of object that `key` names."""
    kind = key.split("/", 1)[0]
    columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
    if not re.fullmatch(COLUMNS[kind], columns):
        raise ValueError(f"other columns than those of {kind}: {columns}")


def _check_values(batch: pa.RecordBatch, header: Header) -> None:
    """Raise ValueError unless the batch has the values that its header says."""
    if header.rows != len(batch):
        raise ValueError(f"{len(batch)} rows instead of {header.rows}")
    if payload_sha256(header.key, batch, header.facts, header.role) != header.sha256:
        raise ValueError("its values are not those that were written (sha256 differs)")
