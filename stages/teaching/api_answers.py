"""What a server answers: vectors in some order and form, the reason of a refusal, how long to wait."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Reply:
    """What the server answered for n texts."""

    vectors: NDArray[np.float32]  # (n, dim) float32, in the order of the texts, not checked for NaN
    tokens: int | None  # number of tokens by the server's count; None if it names none


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Returns the seconds that a server asks to wait, which may stand there as a date; None for none."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def message_in(content: bytes) -> str:
    """Returns what a server says in the body of an error, in whatever form it does."""
    try:
        message: Any = json.loads(content)
    except (ValueError, RecursionError):
        return content.decode(errors="replace").strip()
    for _ in range(3):
        for name in ("error", "message", "detail", "msg"):
            if isinstance(message, dict) and message.get(name):
                message, code = message[name], message.get("code")
                if isinstance(message, str) and isinstance(code, str) and code not in message:
                    return f"{message} ({code})"
                break
        if isinstance(message, list) and message:
            message = message[0]
    return message if isinstance(message, str) else json.dumps(message)


def read_reply(content: bytes, texts: int) -> tuple[NDArray[np.float32], int | None]:
    """Returns the (n, dim) float32 vectors in an answer, in the order of the texts, and its tokens.

    Raises:
        ValueError: it is no answer to that many texts; says why.
    """
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError):
        # Not cut here: a part of a key would not be known as one.
        raise ValueError(f"no JSON: {message_in(content)}") from None
    entries = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(message_in(content))
    if len(entries) != texts:
        raise ValueError(f"{len(entries)} vectors for {texts} texts")
    places = [entry.get("index", place) for place, entry in enumerate(entries)]
    if sorted(map(str, places)) != sorted(map(str, range(texts))):
        raise ValueError(f"its vectors have no place each among {texts} texts")
    vectors = [_values_of(entry.get("embedding")) for entry in entries]
    if len({len(vector) for vector in vectors}) > 1 or not len(vectors[0]):
        raise ValueError("its vectors have different numbers of values, or none")
    in_order = np.stack(
        [
            vector
            for _, vector in sorted(
                zip(map(int, places), vectors, strict=True), key=lambda pair: pair[0]
            )
        ]
    )
    return in_order, _tokens_in(reply)


def _values_of(embedding: object) -> NDArray[np.float32]:
    """(dim,) float32, from a list of numbers or from base64."""
    try:
        if isinstance(embedding, str):
            content = base64.b64decode(embedding, validate=True)
            return np.frombuffer(content, "<f4").astype(np.float32)
        if not isinstance(embedding, list) or not all(
            isinstance(value, int | float) for value in embedding
        ):
            if isinstance(embedding, list) and None in embedding:
                return np.full(len(embedding), np.nan, np.float32)
            raise ValueError("a vector is no list of numbers")
        with np.errstate(over="ignore"):
            return np.array(embedding, np.float64).astype(np.float32)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"a vector that cannot be read ({error})") from None


def _tokens_in(reply: Mapping[str, Any]) -> int | None:
    usage = reply.get("usage")
    for name in ("total_tokens", "prompt_tokens"):
        count = usage.get(name) if isinstance(usage, dict) else None
        if isinstance(count, int) and count > 0:
            return count
    return None
