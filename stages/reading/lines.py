"""Read lines from plain or compressed files, in bounded memory.

Lines end at a line feed and nowhere else: `str.splitlines` and text mode also cut at U+2028, U+0085 or
a lone carriage return, and shift every row after it. A file with carriage returns as its only line
ends, or in UTF-16 or UTF-32, is refused: read as UTF-8, it would be a single text, or letters with NULs
between them.
"""

from __future__ import annotations

import gzip
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import zstandard

from storage import regular
from storage.errors import TeachonceError

MAX_LINE_BYTES = 16 << 20
BOM = b"\xef\xbb\xbf"

# 2 KiB of zstd can say "128 KiB of the same byte" five hundred times; a larger piece would let a small
# file ask for gigabytes at once.
CHUNK_BYTES = 2 << 10
MAX_WINDOW_BYTES = 2**27


# The longer mark first: that of UTF-32 begins like that of UTF-16.
WIDE_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
HEAD_BYTES = 4 << 10
FEWEST_NULS = 4
"""In the head of a file that is taken for UTF-16 or UTF-32 without a mark; a text may hold one or two."""

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def has_control_characters(text: str) -> bool:
    """Whether a text holds a control character (category Cc) other than tab, line feed and CR LF."""
    # Nearly all texts are printable, which is known ten times sooner.
    return not text.isprintable() and CONTROL.search(text) is not None


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON can spell half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def lines(path: Path) -> Iterator[bytes | None]:
    """Yield the lines of a file, without line ends and byte order mark; None for a line that is too long.

    It is unpacked if its name ends in .gz or .zst.

    Raises:
        TeachonceError: it is UTF-16 or UTF-32, or its lines end in carriage returns alone.
        EOFError: a compressed file was cut off.
        OSError, zlib.error, zstandard.ZstdError: it cannot be read or unpacked.
    """
    with regular.opened(path) as file:
        for number, line in enumerate(_lines(path, _unpacked(path, file))):
            yield line.removeprefix(BOM) if line is not None and number == 0 else line


def content(path: Path, most: int) -> bytes:
    """Returns all bytes of a file, `most` at most, unpacked as by `lines`, without a byte order mark.

    Raises:
        TeachonceError: it is UTF-16 or UTF-32.
        EOFError: a compressed file was cut off.
        ValueError: it has more bytes than `most`.
        OSError, zlib.error, zstandard.ZstdError: it cannot be read or unpacked.
    """
    held = bytearray()
    with regular.opened(path) as file:
        for chunk in _unpacked(path, file):
            held += chunk
            if len(held) > most:
                raise ValueError(f"one value of more than {most:,} bytes; write one a line instead")
    return bytes(held).removeprefix(BOM)


def _unpacked(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield the content in pieces, a small one first; raises TeachonceError for UTF-16 or UTF-32."""
    unpack = {".gz": _gunzipped, ".zst": _unzstd}.get(path.suffix.lower(), _pieces)
    chunks = unpack(file)
    head = b""
    while len(head) < HEAD_BYTES and (chunk := next(chunks, None)) is not None:
        head += chunk
    _refuse_wide(path, head)
    return chain([head], chunks)


def check_start(path: Path) -> None:
    """Check by the first line that the file is UTF-8 with line feeds.

    Raises:
        As `lines`.
    """
    next(lines(path), None)


def _refuse_wide(path: Path, head: bytes) -> None:
    """Raise if a file begins like UTF-16 or UTF-32: with a mark, or a NUL at every second byte."""
    marked = next((name for mark, name in WIDE_MARKS.items() if head.startswith(mark)), None)
    name = marked or _wide_encoding(head[:HEAD_BYTES])
    if name is not None:
        raise TeachonceError(
            path, f"is {name}, not UTF-8", converted(path, f"iconv -f {name} -t UTF-8")
        )


def _wide_encoding(head: bytes) -> str | None:
    """Returns the encoding without a mark that the places of NULs suggest, or None."""
    if head.count(0) < FEWEST_NULS:
        return None
    # Of each four bytes, which are NUL in nearly all characters that a Western text is made of.
    shares = [head[place::4].count(0) / max(1, len(head[place::4])) for place in range(4)]
    places = "".join("0" if share > 0.5 else "x" if share < 0.1 else "?" for share in shares)
    return {"x0x0": "UTF-16LE", "0x0x": "UTF-16BE", "x000": "UTF-32LE", "000x": "UTF-32BE"}.get(
        places
    )


def converted(path: Path, command: str) -> str:
    """Returns a shell command that rewrites a file through a command that reads and writes a stream."""
    file = shlex.quote(str(path))
    unpack, pack = {".gz": ("gzip -dc", " | gzip"), ".zst": ("zstd -dc", " | zstd")}.get(
        path.suffix.lower(), ("cat", "")
    )
    return f"{unpack} {file} | {command}{pack} > {file}.new && mv {file}.new {file}"


def _lines(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Yield lines without line feed or CR LF; None for a line that is too long."""
    held = bytearray()
    too_long = has_feed = has_return = False
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            if too_long or len(held) + len(end) > MAX_LINE_BYTES:
                yield None
            else:
                yield (bytes(held) + end if held else end).removesuffix(b"\r")
            held.clear()
            too_long = False
        has_feed = has_feed or bool(ends)
        held += rest
        if too_long or len(held) > MAX_LINE_BYTES:
            too_long = True
            has_return = has_return or b"\r" in held
            held.clear()
    if not has_feed and (has_return or b"\r" in held.rstrip(b"\r")):
        raise TeachonceError(
            path,
            "its lines end in carriage returns, and only a line feed ends a line here",
            converted(path, "tr '\\r' '\\n'"),
        )
    if too_long:
        yield None
    elif held:
        yield bytes(held).removesuffix(b"\r")


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    _refuse_empty(file)
    with gzip.open(file) as unpacked:
        yield from _pieces(unpacked)


def _pieces(file: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    """Yield the content in pieces, a small one first: `check` reads no more of thousands of files."""
    size = HEAD_BYTES
    while chunk := file.read(size):
        yield chunk
        size = 1 << 20


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """Yield the content of all frames.

    The readers of `zstandard` end silently at a truncated frame; a decompressor for each frame knows
    whether its frame is complete. Truncation between two frames cannot be seen in any zstd file.
    """
    _refuse_empty(file)
    settings = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    frame = settings.decompressobj()
    while chunk := file.read(CHUNK_BYTES):
        while chunk:
            if frame.eof:
                frame = settings.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
    if not frame.eof:
        raise EOFError


def _refuse_empty(file: BinaryIO) -> None:
    """Raise for a compressed file of no bytes: even empty content has a header."""
    if os.fstat(file.fileno()).st_size == 0:
        raise EOFError
