"""The error that storing vectors adds, measured during `embed` on a sample of its unrounded vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.vectors import MOST_ROWS, row_cosines, top_overlaps
from storage.embeddings import as_read

OVERLAP = 10


class Rounding:
    """Samples at most 1,000 of a run's vectors, as the teacher returned them, evenly over its texts.

    `texts` is the largest number that the run embeds.
    """

    def __init__(self, storage: str, *, texts: int) -> None:
        self.storage = storage
        count = min(MOST_ROWS, texts)
        self.wanted = np.arange(count) * texts // max(count, 1)
        self.rows_seen = 0
        self.vectors: list[NDArray[np.float32]] = []
        self.whole: list[NDArray[np.float32]] = []

    def sample(self, vectors: NDArray[np.float32], whole: NDArray[np.float32]) -> None:
        """Keep the sampled ones of the next (n, dim) vectors to be stored, and of (n, width) whole ones."""
        first, last = np.searchsorted(self.wanted, [self.rows_seen, self.rows_seen + len(vectors)])
        rows = self.wanted[first:last] - self.rows_seen
        self.vectors.append(vectors[rows])
        self.whole.append(whole[rows])
        self.rows_seen += len(vectors)

    def measure(self) -> dict[str, Any] | None:
        """Compare the sampled vectors with what the store returns for them.

        Returns:
            `texts`: sample size; `mean` and `worst`: 1 - cosine of returned and stored vectors;
            `top10_overlap`: share of each text's 10 nearest texts in the sample that are the same by stored
            and by whole vectors, so it includes the cost of `embed.dim`. It is left out below 12 texts,
            where every text is among the 10 nearest of every other. None if nothing was embedded or
            nothing was rounded.
        """
        vectors = np.concatenate(self.vectors) if self.vectors else np.empty((0, 0), np.float32)
        if not len(vectors):
            return None
        whole, as_stored = np.concatenate(self.whole), as_read(vectors, self.storage)
        if np.array_equal(as_stored, whole):
            return None
        exact = (as_stored == vectors).all(axis=1)
        losses = np.where(exact, 0, np.maximum(1 - row_cosines(vectors, as_stored), 0))
        facts: dict[str, Any] = {
            "storage": self.storage,
            "texts": len(vectors),
            "mean": float(f"{losses.mean():.3g}"),
            "worst": float(f"{losses.max():.3g}"),
        }
        if len(vectors) >= OVERLAP + 2:
            overlaps = top_overlaps(as_stored, whole, OVERLAP)
            facts[f"top{OVERLAP}_overlap"] = round(float(overlaps.mean()), 4)
        return facts


def rounding_summary(facts: dict[str, Any] | None) -> str:
    """Returns the result of `Rounding.measure` as the end of a sentence; empty for None."""
    if facts is None:
        return ""
    overlap = facts.get(f"top{OVERLAP}_overlap")
    return (
        f"; 1 - cosine with what {facts['storage']} keeps: {facts['mean']:.1e} on average, "
        f"{facts['worst']:.1e} at worst"
        + (
            ""
            if overlap is None
            else f", top-{OVERLAP} overlap with all of it {100 * overlap:.2f} %"
        )
        + f" (on {facts['texts']:,} texts)"
    )
