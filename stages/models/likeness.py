"""Whether two models are the same: a handful of texts, and how alike their vectors are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.vectors import row_cosines, row_stretches

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LEAST_COSINE = 0.99999
LENGTH_TOLERANCE = 1e-3
"""How far a copy's vector may be from the model's own: in direction, and as a share of its length."""

PROBES = (
    "A short sentence.",
    "Zürich, Ελλάδα, 東京, العربية, नमस्ते: naïve café № 5 🚀 e\u0301\u200b",
    "don't  SHOUT;\ttabs\nand (lines)",
    " ",
    "",
)
LONG_PROBE = "the harbor keeps a lantern for every rocket and needle of a distant river valley"
MIXED_PROBES = (LONG_PROBE, " ".join(reversed(LONG_PROBE.split())))
"""Texts of one length and longer than `PROBES`, so that a batch with those pads most of it."""
LONGEST_PROBE = 2048
"""Words: attention over more would take long."""


def probes(limit: int | None) -> list[str]:
    """Texts that a broken tokenizer, limit, mask or pooling would show on.

    Args:
        limit: How many tokens a model reads; the last text has more.
    """
    words = min(limit or LONGEST_PROBE, LONGEST_PROBE) + 8
    return [*PROBES, " ".join(itertools.islice(itertools.cycle(LONG_PROBE.split()), words))]


def encode(
    model: SentenceTransformer, texts: Sequence[str], *, prompt: str | None = None
) -> NDArray[np.float32]:
    """(n, D) vectors, all in one batch, so that padding is seen, too; prompt None is the model's own."""
    vectors: NDArray[np.float32] = model.encode(
        list(texts), prompt=prompt, batch_size=len(texts), show_progress_bar=False
    )
    return vectors


def likeness(own: NDArray[np.float32], copied: NDArray[np.float32]) -> float:
    """The lowest cosine between rows of `own` and `copied`.

    Args:
        own: (n, D) vectors of the model.
        copied: (n, D) vectors of its copy.

    Raises:
        ValueError: below `LEAST_COSINE` or not a number, other lengths, or another width.
    """
    if own.shape != copied.shape:
        raise ValueError(f"its vectors are {copied.shape[1]} wide, not {own.shape[1]}")
    lowest = float(row_cosines(own, copied).min())
    stretch = float(row_stretches(own, copied).max())
    # Not `lowest < LEAST_COSINE`: a vector with NaN in it is like nothing.
    if not lowest >= LEAST_COSINE:
        raise ValueError(f"on a probe text the cosine of the two is {lowest:.6f}")
    if stretch > LENGTH_TOLERANCE:
        raise ValueError(f"on a probe text the vector's length is off by {100 * stretch:.1f} %")
    return lowest
