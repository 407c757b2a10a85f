"""Files of lines, plain or compressed: bytes in, lines out, in bounded memory.

Lines end at a line feed and nowhere else: `str.splitlines` and text mode also cut at U+2028, U+0085 or
a lone carriage return, and shift every row after it.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

MAX_LINE_BYTES = 16 << 20
BOM = b"\xef\xbb\xbf"

# 2 KiB of zstd can say "128 KiB of the same byte" five hundred times; a larger piece would let a small
# file ask for gigabytes at once.
CHUNK_BYTES = 2 << 10
MAX_WINDOW_BYTES = 2**27


def lines(path: Path) -> Iterator[bytes | None]:
    """The lines of a file, without line ends and a byte order mark; None for one that is too long.

    Args:
        path: Compressed if its name ends in .gz or .zst.

    Raises:
        EOFError: a compressed file was cut off.
        OSError, zlib.error, zstandard.ZstdError: it cannot be read or unpacked.
    """
    with path.open("rb") as file:
        for number, line in enumerate(_lines(_unpacked(path, file))):
            yield line.removeprefix(BOM) if line is not None and number == 0 else line


def content(path: Path, most: int) -> bytes:
    """All bytes of a file, unpacked, without a byte order mark.

    Args:
        path: Compressed if its name ends in .gz or .zst.
        most: Bytes that are held at once.

    Raises:
        EOFError: a compressed file was cut off.
        ValueError: it has more bytes than `most`.
        OSError, zlib.error, zstandard.ZstdError: it cannot be read or unpacked.
    """
    held = bytearray()
    with path.open("rb") as file:
        for chunk in _unpacked(path, file):
            held += chunk
            if len(held) > most:
                raise ValueError(f"one value of more than {most:,} bytes; write one a line instead")
    return bytes(held).removeprefix(BOM)


def _unpacked(path: Path, file: BinaryIO) -> Iterator[bytes]:
    return {".gz": _gunzipped, ".zst": _unzstd}.get(path.suffix.lower(), _chunks)(path, file)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines without their line feed and one carriage return before it; None for one that is too long."""
    held = bytearray()
    too_long = False
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            if too_long or len(held) + len(end) > MAX_LINE_BYTES:
                yield None
            else:
                yield (bytes(held) + end if held else end).removesuffix(b"\r")
            held.clear()
            too_long = False
        held += rest
        if too_long or len(held) > MAX_LINE_BYTES:
            too_long = True
            held.clear()
    if too_long:
        yield None
    elif held:
        yield bytes(held).removesuffix(b"\r")


def _chunks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(1 << 20):
        yield chunk


def _gunzipped(path: Path, file: BinaryIO) -> Iterator[bytes]:
    _refuse_empty(path, file)
    with gzip.open(file) as unpacked:
        while chunk := unpacked.read(1 << 20):
            yield chunk


def _unzstd(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The content of all frames.

    The readers of `zstandard` end without a word at a truncated frame; an object for each frame knows
    whether its frame is complete. Truncation between two frames cannot be seen in any zstd file.
    """
    _refuse_empty(path, file)
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


def _refuse_empty(path: Path, file: BinaryIO) -> None:
    """Nothing compressed is still a header: a file of no bytes was cut off, or never written."""
    if path.stat().st_size == 0:
        raise EOFError
