"""Texts longer than a model reads, in windows: each is read alone, and the text's vector is their mean.

A window ends between two words where it can. The mean is weighted by the windows' tokens, so that a
short last one counts as little as it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Windows:
    """What is read of n texts.

    Args:
        texts: m >= n windows; those of a text follow each other, and a text that fits is one.
        owners: (m,) place of the text of each, ascending.
        tokens: (m,) tokens of each, without special ones.
    """

    texts: list[str]
    owners: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @property
    def longer(self) -> int:
        """How many of the texts took more than one window."""
        return int((np.bincount(self.owners) > 1).sum())

    def means(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """(m, dim) vectors of windows -> (n, dim) of texts: v = sum_w tokens_w v_w / sum_w tokens_w."""
        if not len(vectors):
            return vectors
        firsts = np.flatnonzero(np.diff(self.owners, prepend=-1))
        # A text of no token is one window that counts alone.
        weights = np.maximum(self.tokens, 1).astype(np.float32)
        sums = np.add.reduceat(vectors * weights[:, None], firsts, axis=0)
        means = np.asarray(sums / np.add.reduceat(weights, firsts)[:, None], np.float32)
        # One window is the text: its vector stays as it is, bit by bit.
        alone = np.diff(firsts, append=len(self.owners)) == 1
        means[alone] = vectors[firsts[alone]]
        return means


def windows_of(
    texts: Sequence[str],
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer; its classes have no common type
    *,
    room: int,
) -> Windows:
    """Cut texts into windows of at most `room` tokens.

    Args:
        texts: n of them.
        tokenizer: A fast one: it knows where in the text a token stands.
        room: Tokens of a window, special ones and a prompt's not counted; at least 1.
    """
    if not texts:
        return Windows([], np.empty(0, np.int64), np.empty(0, np.int64))
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )["offset_mapping"]
    pieces, owners, tokens = [], [], []
    for place, (text, offsets) in enumerate(zip(texts, found, strict=True)):
        ends = _ends(text, offsets, room)
        for first, end in pairwise([0, *ends]):
            # The first window keeps what stands before its first token, the last what stands after.
            begin = offsets[first][0] if first else 0
            stop = offsets[end][0] if end < len(offsets) else len(text)
            pieces.append(text[begin:stop])
            owners.append(place)
            tokens.append(end - first)
    return Windows(pieces, np.array(owners, np.int64), np.array(tokens, np.int64))


def _ends(text: str, offsets: Sequence[tuple[int, int]], room: int) -> list[int]:
    """After which tokens a window ends; the last is the text's last."""
    ends: list[int] = []
    first = 0
    while len(offsets) - first > room:
        end = first + room
        between = (place for place in range(end, first, -1) if _begins_word(text, offsets[place]))
        first = next(between, end)
        ends.append(first)
    return [*ends, len(offsets)]


def _begins_word(text: str, offset: tuple[int, int]) -> bool:
    """Whether a token stands after a blank; some tokenizers count the blank as the token's own."""
    start = offset[0]
    return text[start - 1 : start].isspace() or text[start : start + 1].isspace()
