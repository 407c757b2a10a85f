"""What the storage of vectors costs: measured where the vectors are still whole, on a sample of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.vectors import MOST_ROWS, row_cosines, top_overlap
from storage.embeddings import as_read

OVERLAP = 10


class Rounding:
    """Collects vectors of a run as the teacher returned them, evenly from its texts.

    Args:
        storage: How vectors are stored.
        texts: How many the run embeds, at most; from 1,000 on, about 1,000 of them are looked at.
    """

    def __init__(self, storage: str, *, texts: int) -> None:
        self.storage = storage
        count = min(MOST_ROWS, texts)
        self.wanted = np.arange(count) * texts // max(count, 1)
        self.seen = 0
        self.vectors: list[NDArray[np.float32]] = []
        self.whole: list[NDArray[np.float32]] = []

    def look_at(self, vectors: NDArray[np.float32], whole: NDArray[np.float32]) -> None:
        """Keep some of the next n vectors.

        Args:
            vectors: (n, dim), to be stored.
            whole: (n, width), before `embed.dim` took values off.
        """
        first, last = np.searchsorted(self.wanted, [self.seen, self.seen + len(vectors)])
        rows = self.wanted[first:last] - self.seen
        self.vectors.append(vectors[rows])
        self.whole.append(whole[rows])
        self.seen += len(vectors)

    def measured(self) -> dict[str, Any] | None:
        """Texts looked at; mean and worst 1 - cosine of vectors as returned and as read again; overlap.

        The overlap is that of the 10 nearest among these texts, by what is read again and by the teacher's
        whole vectors: so it has the cost of `embed.dim`, too. It is left out below 12 texts: of 11,
        everybody is among everybody's 10 nearest.

        Returns:
            None where nothing was embedded, or where what is read again is what was returned.
        """
        vectors = np.concatenate(self.vectors) if self.vectors else np.empty((0, 0), np.float32)
        if not len(vectors):
            return None
        whole, again = np.concatenate(self.whole), as_read(vectors, self.storage)
        if np.array_equal(again, whole):
            return None
        kept = (again == vectors).all(axis=1)
        lost = np.where(kept, 0, np.maximum(1 - row_cosines(vectors, again), 0))
        found: dict[str, Any] = {
            "storage": self.storage,
            "texts": len(vectors),
            "mean": float(f"{lost.mean():.3g}"),
            "worst": float(f"{lost.max():.3g}"),
        }
        if len(vectors) >= OVERLAP + 2:
            found[f"top{OVERLAP}_overlap"] = round(top_overlap(again, whole, OVERLAP), 4)
        return found


def told(found: dict[str, Any] | None) -> str:
    """What `Rounding.measured` found, as the end of a sentence; empty if it found nothing."""
    if found is None:
        return ""
    overlap = found.get(f"top{OVERLAP}_overlap")
    return (
        f"; 1 - cosine with what {found['storage']} keeps: {found['mean']:.1e} on average, "
        f"{found['worst']:.1e} at worst"
        + (
            ""
            if overlap is None
            else f", top-{OVERLAP} overlap with all of it {100 * overlap:.2f} %"
        )
        + f" (on {found['texts']:,} texts)"
    )
