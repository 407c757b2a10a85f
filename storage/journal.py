"""What was paid for: answers of an API that stand in no published shard yet, and the sum of all tokens.

A teacher behind an API is paid by the token, and a shard is published when all of it is there. So each
answer is kept here as soon as it arrives, and found again by the teacher's fingerprint and the text key,
whatever shard asks for it. When the shard is published, its answers are forgotten.

    <store>/journal/<teacher fingerprint>/<random>    answers, a record for each request
            journal/<digest of the API's model>.spent    a line for each request: its tokens

Each run writes to files of its own. A record holds the digest of its content: one that a crash has cut
off, or that rotted, is not read, nor what stands behind it in that file, and is asked for again.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import re
import secrets
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from storage import durable, regular
from storage.column import TEXT_KEY_BYTES
from storage.store import DIGEST_PATTERN, digest

log = logging.getLogger("teachonce")

JOURNAL = "journal"
ANSWERS_PATTERN = rf"{JOURNAL}/{DIGEST_PATTERN}/[0-9a-f]{{16}}"
SPENT_PATTERN = rf"{JOURNAL}/{DIGEST_PATTERN}\.spent"

FILE_BYTES = 64 << 20
"""A file that has grown so large gets no more records. A larger one is kept longer: it is deleted when all
of its answers are forgotten, and the next shard's stand among them."""

MAGIC = b"answers1"
HEAD = struct.Struct("<8sII16s")  # magic, texts, values of a vector, digest


@dataclass(frozen=True, slots=True)
class Answer:
    """The vector of one text, (dim,) float32, and the number of its tokens."""

    vector: NDArray[np.float32]
    tokens: int


@dataclass
class _File:
    """A file of answers: its size when it was last read or written here, and the keys that it keeps."""

    size: int
    keys: set[bytes]


class Journal:
    """The answers in the store `root` that no published shard has yet. Safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self.folder = root / JOURNAL
        self._lock = threading.Lock()
        # Teacher -> text key -> what an earlier run was answered; this run's own are not read again.
        self._answers: dict[str, dict[bytes, Answer]] = {}
        self._files: dict[str, dict[Path, _File]] = {}
        self._writing: dict[str, Path] = {}

    def find(self, teacher: str, text_key: bytes) -> Answer | None:
        """Returns what an earlier run was answered for a text; None if nothing is kept.

        Raises:
            StorageError: the operating system refused to read the answers.
        """
        with self._lock:
            self._read(teacher)
            return self._answers[teacher].get(text_key)

    def is_empty(self, teacher: str) -> bool:
        """Whether no answers are kept for a teacher.

        Raises:
            StorageError: the operating system refused to read them.
        """
        with self._lock:
            self._read(teacher)
            return not self._files[teacher]

    def keep(
        self,
        teacher: str,
        text_keys: Sequence[bytes],
        vectors: NDArray[np.float32],
        tokens: Sequence[int],
    ) -> None:
        """Write the answer to one request; it is on the disk when this returns.

        Args:
            teacher: The teacher's fingerprint.
            text_keys: The 16 bytes of each of n texts.
            vectors: (n, dim) float32.
            tokens: Number of tokens of each text.

        Raises:
            StorageError: the disk refused.
        """
        payload = b"".join(text_keys)
        payload += np.asarray(tokens, "<u4").tobytes() + vectors.astype("<f4").tobytes()
        count, dim = vectors.shape
        record = HEAD.pack(MAGIC, count, dim, _digest(count, dim, payload)) + payload
        with self._lock:
            self._read(teacher)
            files = self._files[teacher]
            # Until it is written: behind what an error has cut off, nothing would be read.
            path = self._writing.pop(teacher, None)
            if path is None or path not in files or files[path].size > FILE_BYTES:
                path = self.folder / teacher / secrets.token_hex(8)
                files[path] = _File(0, set())
            durable.append(path, record)
            files[path].size += len(record)
            files[path].keys.update(text_keys)
            self._writing[teacher] = path

    def forget(self, teacher: str, text_keys: NDArray[np.bytes_]) -> None:
        """Delete the files that have no other answers than those for texts that are in published shards.

        Args:
            teacher: The teacher's fingerprint.
            text_keys: (n,) V16 text keys of a shard that is published.

        Raises:
            StorageError: a file cannot be deleted.
        """
        with self._lock:
            self._read(teacher)
            files = self._files[teacher]
            published = {key.tobytes() for key in text_keys} if files else set()
            for path, file in list(files.items()):
                file.keys -= published
                if not file.keys:
                    del files[path]
                    # One that has grown meanwhile is written by another run.
                    with suppress(FileNotFoundError):
                        if path.stat().st_size == file.size:
                            durable.remove(path)

    def _read(self, teacher: str) -> None:
        """Read the files of a teacher once."""
        if teacher in self._files:
            return
        folder, answers = self.folder / teacher, dict[bytes, Answer]()
        with durable.named(folder, "listing"):
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
        files = {}
        for path in paths:
            if not re.fullmatch(ANSWERS_PATTERN, f"{JOURNAL}/{teacher}/{path.name}"):
                continue
            with durable.named(path, "reading"):
                content = _mapped(path)
            files[path] = _File(len(content), set())
            for kept in _records(path, content):
                files[path].keys.update(kept)
                answers |= kept
        self._answers[teacher], self._files[teacher] = answers, files


def _mapped(path: Path) -> memoryview:
    with regular.opened(path) as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError:  # no byte was written
            return memoryview(b"")


def _records(path: Path, content: memoryview) -> Iterator[dict[bytes, Answer]]:
    """Yield the answers in each whole record by their text keys; the vectors stay in the file."""
    start = 0
    while start < len(content):
        head = bytes(content[start : start + HEAD.size])
        magic, count, dim, expected = HEAD.unpack(head.ljust(HEAD.size))
        begin = start + HEAD.size
        start = begin + count * (TEXT_KEY_BYTES + 4 + 4 * dim)
        payload = content[begin:start]
        if (
            magic != MAGIC
            or start > len(content)
            or _digest(count, dim, payload) != expected
            or not count
        ):
            log.warning(
                "%s: what stands there from byte %d on was not written whole, and is not used",
                path,
                begin - HEAD.size,
            )
            return
        keys = payload[: TEXT_KEY_BYTES * count]
        tokens = np.frombuffer(payload, "<u4", count, offset=len(keys))
        vectors = np.frombuffer(payload, "<f4", offset=len(keys) + 4 * count).reshape(count, dim)
        yield {
            bytes(keys[place * TEXT_KEY_BYTES : (place + 1) * TEXT_KEY_BYTES]): Answer(*answer)
            for place, answer in enumerate(zip(vectors, tokens.tolist(), strict=True))
        }


def _digest(count: int, dim: int, payload: bytes | memoryview) -> bytes:
    total = hashlib.blake2b(struct.pack("<II", count, dim), digest_size=16)
    total.update(payload)
    return total.digest()


class Ledger:
    """The tokens that all runs with the store `root` have paid to one model of an API."""

    def __init__(self, root: Path, model: str) -> None:
        self.path = root / JOURNAL / f"{digest(model.encode())}.spent"
        self._read_to, self._tokens = 0, 0

    def add(self, tokens: int) -> None:
        """Note what a request took; it is on the disk when this returns."""
        line = str(tokens).encode()
        # In lines of its own, whatever a crash has left before it.
        durable.append(self.path, b"\n%s %08x\n" % (line, zlib.crc32(line)))

    def total(self) -> int:
        """Returns the sum, that of other runs at work now included; a line that was cut off counts as 0."""
        with durable.named(self.path, "reading"), suppress(FileNotFoundError):
            with regular.opened(self.path) as file:
                file.seek(self._read_to)
                lines = file.read().rpartition(b"\n")[0]
            self._read_to += len(lines)
            for line in lines.split(b"\n"):
                match = re.fullmatch(rb"([0-9]{1,18}) ([0-9a-f]{8})", line)
                if match and zlib.crc32(match[1]) == int(match[2], 16):
                    self._tokens += int(match[1])
        return self._tokens
