"""Read texts longer than a model's limit in windows; the mean of the windows' vectors is the text's vector.

A window ends between two words where possible. The mean is weighted by the windows' numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stages.models.token_counts import AnyTokenizer


@dataclass(frozen=True)
class Windows:
    """The windows of n texts."""

    texts: list[str]  # m >= n windows; those of a text are adjacent, and a short text is one window
    owners: NDArray[np.int64]  # (m,) int64 place of each window's text, ascending
    tokens: NDArray[np.int64]  # (m,) int64 tokens of each window, without special tokens

    @property
    def split_texts(self) -> int:
        """Number of texts with more than one window."""
        return int((np.bincount(self.owners) > 1).sum())

    def means(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Average (m, dim) vectors of windows to (n, dim): v = sum_w tokens_w v_w / sum_w tokens_w."""
        if not len(vectors):
            return vectors
        firsts = np.flatnonzero(np.diff(self.owners, prepend=-1))
        # A text without tokens is one window, whose weight must not be 0.
        weights = np.maximum(self.tokens, 1).astype(np.float32)
        sums = np.add.reduceat(vectors * weights[:, None], firsts, axis=0)
        means = np.asarray(sums / np.add.reduceat(weights, firsts)[:, None], np.float32)
        # The vector of a text that is one window stays as it is, bit by bit.
        alone = np.diff(firsts, append=len(self.owners)) == 1
        means[alone] = vectors[firsts[alone]]
        return means


def windows_of(texts: Sequence[str], tokenizer: AnyTokenizer, *, window_tokens: int) -> Windows:
    """Cut texts into windows of at most `window_tokens` tokens.

    Args:
        texts: The n texts.
        tokenizer: A fast tokenizer, which returns the offsets of tokens in the text.
        window_tokens: Tokens of a window without special and prompt tokens, >= 1.
    """
    if not texts:
        return Windows([], np.empty(0, np.int64), np.empty(0, np.int64))
    offsets_of_texts = tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )["offset_mapping"]
    pieces, owners, tokens = [], [], []
    for place, (text, offsets) in enumerate(zip(texts, offsets_of_texts, strict=True)):
        ends = _ends(text, offsets, window_tokens)
        for first, end in pairwise([0, *ends]):
            # The first window keeps what stands before its first token, the last what stands after.
            begin = offsets[first][0] if first else 0
            stop = offsets[end][0] if end < len(offsets) else len(text)
            pieces.append(text[begin:stop])
            owners.append(place)
            tokens.append(end - first)
    return Windows(pieces, np.array(owners, np.int64), np.array(tokens, np.int64))


def _ends(text: str, offsets: Sequence[tuple[int, int]], window_tokens: int) -> list[int]:
    """Returns the token counts after which windows end; the last is the text's."""
    ends: list[int] = []
    first = 0
    while len(offsets) - first > window_tokens:
        end = first + window_tokens
        between = (place for place in range(end, first, -1) if _begins_word(text, offsets[place]))
        first = next(between, end)
        ends.append(first)
    return [*ends, len(offsets)]


def _begins_word(text: str, offset: tuple[int, int]) -> bool:
    """Whether a token stands after a blank; some tokenizers count the blank as the token's own."""
    start = offset[0]
    return text[start - 1 : start].isspace() or text[start : start + 1].isspace()
