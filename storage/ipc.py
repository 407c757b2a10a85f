"""Checks of Arrow files that must come before pyarrow reads them.

pyarrow unpacks a batch as soon as it is asked for, and a kilobyte of zstd can say "gigabytes of zeros".
Whether a batch is compressed stands in the flatbuffer before its body, and to how much at the front of
each of its buffers.
"""

from __future__ import annotations

import struct

from typing_extensions import Buffer

# Places of fields in the tables of Arrow's Footer, Message and RecordBatch (File.fbs, Message.fbs).
FOOTER_BATCHES, MESSAGE_HEADER, DICTIONARY_BATCH, BATCH_BUFFERS, BATCH_COMPRESSION = 3, 2, 1, 2, 3

CONTINUATION = -1
FOOTER_END = 10  # after the footer: its length in 4 bytes, and the magic


def first_batch(file: Buffer) -> tuple[int, bool]:
    """Returns the offset of the first batch of an Arrow file, and whether it is compressed.

    pyarrow has opened the file, so it has a footer and a batch.

    Raises:
        ValueError: an offset leads out of the file.
    """
    view = memoryview(file).cast("B")
    try:
        end = len(view) - FOOTER_END
        footer = _follow(view, end - _number("<i", view, end))
        blocks = _follow(view, footer + _field(view, footer, FOOTER_BATCHES))
        start = _number("<q", view, blocks + 4)  # a vector: its length, then its entries
        # Files of before Arrow 0.15 have no continuation before the length of the message.
        prefix = 8 if _number("<i", view, start) == CONTINUATION else 4
        message = _follow(view, start + prefix)
        batch = _follow(view, message + _field(view, message, MESSAGE_HEADER))
        return start, _field(view, batch, BATCH_COMPRESSION) != 0
    except struct.error as error:
        raise ValueError("an offset in it leads out of it") from error


def unpacked_bytes(metadata: Buffer, body: Buffer, *, is_dictionary: bool) -> int:
    """Returns the declared unpacked bytes of a batch's buffers; 0 if it is not compressed.

    Args:
        metadata: Metadata of the message, verified by pyarrow.
        body: Body of the message.
        is_dictionary: Whether the message holds a dictionary.

    Raises:
        ValueError: an offset leads out of the message.
    """
    view, packed = memoryview(metadata).cast("B"), memoryview(body).cast("B")
    try:
        message = _follow(view, 0)
        batch = _follow(view, message + _field(view, message, MESSAGE_HEADER))
        if is_dictionary:
            batch = _follow(view, batch + _field(view, batch, DICTIONARY_BATCH))
        if _field(view, batch, BATCH_COMPRESSION) == 0:
            return 0
        buffers = _follow(view, batch + _field(view, batch, BATCH_BUFFERS))
        total = 0
        for entry in range(_number("<I", view, buffers)):
            start, length = (_number("<q", view, buffers + 4 + 16 * entry + n) for n in (0, 8))
            total += max(0, _number("<q", packed, start)) if length else 0
        return total
    except struct.error as error:
        raise ValueError("an offset in it leads out of it") from error


def _number(form: str, view: memoryview, place: int) -> int:
    if place < 0:  # which `struct` would count from the end
        raise struct.error
    number: int = struct.unpack_from(form, view, place)[0]
    return number


def _follow(view: memoryview, place: int) -> int:
    """Returns the target of the offset at `place`."""
    return place + _number("<I", view, place)


def _field(view: memoryview, table: int, number: int) -> int:
    """Returns the offset of field `number` in `table`; 0 if the table lacks it."""
    vtable = table - _number("<i", view, table)
    place = 4 + 2 * number
    return _number("<H", view, vtable + place) if place < _number("<H", view, vtable) else 0
