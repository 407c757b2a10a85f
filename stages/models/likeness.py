"""Compare two models by their vectors of a few probe texts."""

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
"""Lowest cosine, and largest relative difference in length, between a copy's vector and the model's own."""

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
"""Length in words; attention over more would take long."""


def probes(limit: int | None) -> list[str]:
    """Returns texts whose vectors reveal a wrong tokenizer, limit, mask or pooling.

    The last has more tokens than `limit`, the number that a model reads; None for no limit.
    """
    words = min(limit or LONGEST_PROBE, LONGEST_PROBE) + 8
    return [*PROBES, " ".join(itertools.islice(itertools.cycle(LONG_PROBE.split()), words))]


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
) -> NDArray[np.float32]:
    """Returns (n, D) vectors, encoded in one padded batch; without a prompt, behind the model's default."""
    vectors: NDArray[np.float32] = model.encode(
        list(texts),
        prompt=prompt,
        prompt_name=prompt_name,
        batch_size=len(texts),
        show_progress_bar=False,
    )
    return vectors


def likeness(
    own: NDArray[np.float32], copied: NDArray[np.float32], *, least: float = LEAST_COSINE
) -> float:
    """Returns the lowest cosine between rows of `own` and `copied`; two rows of zeros are alike.

    Args:
        own: (n, D) vectors of the model.
        copied: (n, D) vectors of its copy.
        least: Lowest cosine.

    Raises:
        ValueError: the cosine is below `least` or NaN, lengths or widths differ, or all are zeros.
    """
    if own.shape != copied.shape:
        raise ValueError(f"its vectors are {copied.shape[1]} wide, not {own.shape[1]}")
    # A static model has a vector of zeros for a text without a token that it knows.
    some = own.any(axis=1) | copied.any(axis=1)
    if not some.any():
        raise ValueError("its vectors of all probe texts are zeros")
    lowest = float(row_cosines(own[some], copied[some]).min())
    stretch = float(row_stretches(own[some], copied[some]).max())
    # Not `lowest < least`, which is False for NaN.
    if not lowest >= least:
        raise ValueError(f"on a probe text the cosine of the two is {lowest:.6f}")
    if stretch > LENGTH_TOLERANCE:
        raise ValueError(f"on a probe text the vector's length is off by {100 * stretch:.1f} %")
    return lowest
