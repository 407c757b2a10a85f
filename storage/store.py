"""The store: immutable objects, each named by what it was made from and able to prove itself.

An object is an Arrow IPC file with one record batch, uncompressed, so that a mapped file is the
array itself. Its schema metadata holds a header: format, its own key, rows, facts of its making, and
the sha256 of all of that together with every value. An object therefore knows its name, and a swapped,
renamed, truncated or flipped one is found out before a byte of it is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
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
    StringConstraints,
    ValidationError,
)
from typing_extensions import Buffer

from storage import durable, trash
from storage.errors import (
    AnotherCopyError,
    DamagedError,
    MissingError,
    StorageError,
    shown,
)
from storage.ipc import first_batch

FORMAT = 1
HEADER = b"teachonce"
MAGIC = b"ARROW1"
FRONT = 8  # where what follows the magic begins: a stream of Arrow, so first the schema

UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, KeyError)
"""What Arrow and Python raise for bytes that are not what they should be."""

DIGEST_PATTERN = r"[0-9a-f]{40}"
KEY_PATTERN = (
    rf"(text/{DIGEST_PATTERN}"
    rf"|(vectors|tokens)/{DIGEST_PATTERN}/{DIGEST_PATTERN}"
    rf"|negatives/{DIGEST_PATTERN}/[0-9]{{6}})\.arrow"
)

# What stands in an object of each kind. All code below the store relies on it, and no other type can
# hide a value from the sha256 (a dictionary), nest without end or be a class of somebody's.
COLUMNS = {
    kind: rf"text_key: fixed_size_binary\[16\], {columns}"
    for kind, columns in {
        "text": r"text: large_string",
        "vectors": r"vector: fixed_size_list<item: "
        r"((halffloat|float)>\[[1-9][0-9]*\]|int8>\[[1-9][0-9]*\], scale: float)",
        "tokens": r"token_ids: large_list<item: int32>",
        "negatives": r"neighbours: fixed_size_list<item: int64>\[([1-9][0-9]*)\], "
        r"scores: fixed_size_list<item: float>\[\1\]",
    }.items()
}

# A key becomes a path, so it is matched as a whole before it touches the file system: no "..", no
# absolute path and no link can be spelled in it.
Key = Annotated[str, StringConstraints(pattern=rf"^{KEY_PATTERN}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

# So many that sums over all objects of a manifest stay within 64 bits.
Rows = Annotated[int, Field(ge=0, lt=1 << 40)]


# What `open` says of a link and of a socket: no object of ours. Anything else it refuses for (no
# permission, no more descriptors, a stale mount) says nothing about the object.
NO_PLAIN_FILE = {errno.ELOOP, errno.ENXIO}

# Not at each find: what is touched is another file for whoever remembers that he has checked it. The grace
# of `gc` is days; with one of less than an hour, what was found may be deleted, and the stage says so.
YOUNG_SECONDS = 3600.0

# Token ids are missing here: whoever needs them makes them.
MADE_BY = {"text": "teachonce shard", "vectors": "teachonce embed", "negatives": "teachonce mine"}


class Object(BaseModel):
    """One object as a manifest names it. `sha256` is that of the payload, not of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Key
    rows: Rows
    bytes: NonNegativeInt
    sha256: Sha256


class Header(BaseModel):
    """What an object says of itself. `facts` are counts made along with it, such as tokens read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    key: Key
    rows: Rows
    facts: dict[str, int]
    sha256: Sha256


Accept = Callable[[pa.RecordBatch, Header], None]
"""What else must be true of a whole object that comes from elsewhere; raises ValueError if it is not."""


class Store:
    """A folder of objects.

    Args:
        root: The folder; made by the first `put`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        # Identity of each file that this process has checked -> its sha256: a published file never changes,
        # so the second map of it needs no second read.
        self._checked: dict[tuple[int, ...], str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the folder. The process that reads it checks each file itself."""
        return {"root": self.root, "_checked": {}}

    def put(
        self, key: str, batch: pa.RecordBatch, facts: Mapping[str, int] | None = None
    ) -> Object:
        """Publish `batch` under `key` and return the object that is there afterwards.

        If somebody published the same key before, theirs stays and is what is returned: same key means
        made from the same things, so at most the last bits differ.

        Raises:
            StorageError: the disk refused; nothing is left behind.
            DamagedError: the object that was there before is damaged.
            ValueError: a null, or other columns than those of its kind; nothing is written.
        """
        # A wrong object that has its name would keep every later one from it.
        _check_columns(key, batch.schema)
        facts = dict(facts or {})
        sha256 = payload_sha256(key, batch, facts)
        header = Header(format=FORMAT, key=key, rows=len(batch), facts=facts, sha256=sha256)
        schema = batch.schema.with_metadata({HEADER: header.model_dump_json().encode()})

        def write(sink: BinaryIO) -> None:
            with pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(batch)

        durable.publish(self.path(key), write)
        found = self.find(key)
        if found is None:
            raise self._missing(key)
        return found

    def find(self, key: str) -> Object | None:
        """The whole object under `key`, or None if there is none. Damage is an error, not a None.

        Who finds an object relies on it, so it is given the time of now: `gc` takes it for as young as
        one that was just made.
        """
        try:
            batch, header, size = self._map(key, take_up=True)
        except MissingError:
            return None
        return Object(key=key, rows=len(batch), bytes=size, sha256=header.sha256)

    def open(self, named: Object) -> pa.RecordBatch:
        """The batch of an object that a manifest names, mapped, checked and the very copy meant.

        Raises:
            MissingError: it is not in the store.
            DamagedError: its bytes are not what its header says.
            AnotherCopyError: it is whole, but another copy than the manifest's.
        """
        batch, header, _ = self._map(named.key)
        if header.rows != named.rows:
            # Believed, it would shift every row behind it.
            raise DamagedError(
                f"the manifest that names {named.key}",
                f"{named.rows} rows there, {header.rows} in the object",
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
                f"{made_again(named.key)} to adopt the copy that is there, then `dvc repro`",
            )

    def keys(self, folder: str) -> list[str]:
        """The keys of all objects in a folder of the store, such as `vectors/<fingerprint>`, sorted.

        Raises:
            StorageError: it cannot be listed.
        """
        path = self.root / folder
        with durable.named(path, "listing"):
            names = [f"{folder}/{one.name}" for one in path.iterdir()] if path.is_dir() else []
        return sorted(name for name in names if re.fullmatch(KEY_PATTERN, name))

    def glance(self, key: str) -> pa.RecordBatch:
        """The batch under `key`, mapped, but not compared with its sha256.

        Only to see whether it is worth that: what is to be used is opened after `find`.

        Raises:
            MissingError, DamagedError, StorageError: as `header`.
        """
        content, _ = self._content(key)
        try:
            return _prove(key, content, values=False)[0]
        except ValueError as error:
            raise self._damaged(key, str(error)) from error

    def receive(self, key: str, write: Callable[[BinaryIO], None], accept: Accept) -> bool:
        """Publish under `key` what `write` brings from elsewhere, once it has proved itself.

        Returns:
            False if somebody else published the key meanwhile; theirs stays.

        Raises:
            ValueError: it is damaged, foreign, or not what `accept` wants; nothing is left behind.
            StorageError: the disk refused; nothing is left behind.
        """

        def write_and_prove(sink: BinaryIO) -> None:
            write(sink)
            sink.flush()
            content = mmap.mmap(sink.fileno(), 0, access=mmap.ACCESS_READ)
            accept(*_prove(key, pa.py_buffer(content)))

        return durable.publish(self.path(key), write_and_prove)

    def content(self, named: Object) -> bytes:
        """The file of an object that a manifest names, as it may be sent elsewhere.

        The very bytes that are returned were checked: what this process checked when it first mapped
        the file may have rotted since.

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
        """What the object under `key` says of itself, and its size in bytes; no value is read.

        Raises:
            MissingError: it is not in the store.
            DamagedError: it has no header, or that of another object.
            StorageError: the operating system refused to open it.
        """
        content, status = self._content(key)
        try:
            _, header = _open(key, content)
        except UNREADABLE as error:
            raise self._damaged(key, _one_line(error)) from error
        return header, status.st_size

    def see(self, named: Object) -> None:
        """Look once more whether an object that was found or made is at its place. No value is read.

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
        """Whether there is a file under `key`, of whatever content."""
        path = self.path(key)
        with durable.named(path, "looking for it"):
            return path.is_file() or trash.take_back(self.root, path) or path.is_file()

    def _map(self, key: str, *, take_up: bool = False) -> tuple[pa.RecordBatch, Header, int]:
        """The batch, the header and the size in bytes of the object under `key`, checked."""
        content, status = self._content(key, take_up=take_up)
        seen = durable.identity(status)
        try:
            batch, header = (_again if seen in self._checked else _prove)(key, content)
        except ValueError as error:
            raise self._damaged(key, str(error)) from error
        self._checked[seen] = header.sha256
        return batch, header, status.st_size

    def _content(self, key: str, *, take_up: bool = False) -> tuple[pa.Buffer, os.stat_result]:
        """The mapped file; with `take_up` it is given the time of now first, unless it is young."""
        path = self.path(key)
        try:
            descriptor = _opened(path, self.root)
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
                return _mapped(descriptor), status
            finally:
                os.close(descriptor)

    def _missing(self, key: str) -> MissingError:
        return MissingError(
            self.path(key),
            "not in the store",
            f"{made_again(key)}, or point `store` (or $TEACHONCE_STORE) to the store that has it",
        )

    def _damaged(self, key: str, problem: str) -> DamagedError:
        path = self.path(key)
        return DamagedError(
            path,
            f"damaged: {problem}",
            "run `teachonce repair`; if it finds nothing, no manifest here names it yet: "
            f"rm -f '{path}', then {made_again(key)}",
        )


def _opened(path: Path, root: Path) -> int:
    """A descriptor of an object of the store `root`, taken back if a gc has taken it away."""
    # No links and no devices: the store may come from a stranger.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        trash.take_back(root, path)
    # Also if nothing was taken back: the gc may have put it back itself.
    return os.open(path, flags)


def _mapped(descriptor: int) -> pa.Buffer:
    """The content of an open file, mapped as long as an array points into it.

    The map holds no descriptor. Python's `mmap` keeps a copy of one for each map (until 3.13), and of those
    a process may have 1,024 where maps are 65,530.
    """
    # Not the path: another file may have it by now.
    with pa.memory_map(f"/dev/fd/{descriptor}") as file:
        return file.read_buffer()


def made_again(key: str) -> str:
    """What to type to get the object `key` back.

    Not `dvc repro`: DVC compares manifests, and a manifest does not change when an object is lost.
    """
    command = MADE_BY.get(key.split("/", 1)[0])
    return f"run `{command}`" if command else "run the same command again"


def digest(*parts: Buffer) -> str:
    """40 hex digits naming the sequence `parts`; each is length-prefixed, so no two sequences agree."""
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


def payload_sha256(key: str, batch: pa.RecordBatch, facts: Mapping[str, int]) -> str:
    """The sha256 over an object's header and every value in it.

    It is taken from the values, not from the file, so that it stands inside the file and does not
    depend on how a version of Arrow lays out its messages.
    """
    columns = [[field.name, str(field.type)] for field in batch.schema]
    total = hashlib.sha256(canonical_json([FORMAT, key, len(batch), dict(facts), columns]))
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
        raise ValueError(_one_line(error)) from error


def _prove(key: str, content: pa.Buffer, *, values: bool = True) -> tuple[pa.RecordBatch, Header]:
    """The batch and the header in `content`, whole and of the object `key`.

    Args:
        key: The name it must have.
        content: A file.
        values: False if its values need not be compared with its sha256.

    Raises:
        ValueError: says in one line what is wrong.
    """
    try:
        reader, header = _open(key, content)
        batch = reader.get_batch(0)
        # Arrow checks no offset by itself: a damaged one read without this ends the process.
        batch.validate(full=True)
        if values:
            _check(batch, header)
    except UNREADABLE as error:
        raise ValueError(_one_line(error)) from error
    return batch, header


def _again(key: str, content: pa.Buffer) -> tuple[pa.RecordBatch, Header]:
    """The same of a file that `_prove` has proved and nobody has written to since."""
    try:
        reader, header = _read(key, content)
        return reader.get_batch(0), header
    except UNREADABLE as error:
        raise ValueError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return shown((str(error) or type(error).__name__).splitlines()[0])


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
    """The same, checked as far as it goes without its values."""
    reader, header = _read(key, content)
    _check_columns(key, reader.schema)
    # An Arrow file has its schema twice, and who reads it as a stream believes the other one.
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


def _check(batch: pa.RecordBatch, header: Header) -> None:
    """Raise ValueError unless the batch has the values that its header says."""
    if header.rows != len(batch):
        raise ValueError(f"{len(batch)} rows instead of {header.rows}")
    if payload_sha256(header.key, batch, header.facts) != header.sha256:
        raise ValueError("its values are not those that were written (sha256 differs)")
