"""Rows of the caches as other people's training loops read them.

`CachedRows` for a loop in PyTorch, `to_datasets` for the trainer of sentence-transformers. Our own loop
reads a batch of token ids and vectors at a time, from the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch.utils.data import Dataset

from stages.outcome import log
from storage.column import fixed_lists
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.negatives import NONE, Negatives
from storage.store import digest

if TYPE_CHECKING:
    import datasets


class CachedRows(Dataset[dict[str, Any]]):
    """Some rows of the caches, each a dict that a `DataLoader` makes batches of.

    The keys: `id`, the row id; `role`, if the corpus has other roles than `text`; `text`; `vector`, (dim,)
    float32; and, if there are negatives, `neighbours`, (k,) int64 row ids with -1 for none, and `scores`,
    (k,) float32.

    What is pickled for the worker of a `DataLoader` names the files; the worker maps them itself.

    Args:
        corpus: The texts.
        embeddings: The teacher's vectors of `corpus`.
        negatives: Mined from both; None for items without neighbours.
        rows: (n,) int64 ids of the rows that are items, in their order.

    Examples:
        >>> project.dataset()[0]["text"]
        'Ember garden needle oyster.'
    """

    def __init__(
        self,
        corpus: Corpus,
        embeddings: Embeddings,
        negatives: Negatives | None,
        rows: NDArray[np.int64],
    ) -> None:
        self.corpus, self.embeddings, self.negatives, self.rows = (
            corpus,
            embeddings,
            negatives,
            rows,
        )

    def __len__(self) -> int:
        """How many items there are."""
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """The item at a place, 0 to len - 1; negative ones count from the end, as in a list.

        Raises:
            IndexError: There is no such place.
        """
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The items at several places, read together: what a `DataLoader` asks for a batch."""
        ids = self.rows[np.asarray(places, np.int64)]
        columns: dict[str, Sequence[Any] | NDArray[Any]] = {
            "id": ids.tolist(),
            **({"role": self.corpus.roles_of(ids)} if has_roles(self.corpus) else {}),
            "text": self.corpus.take(ids),
            "vector": self.embeddings.rows_of(ids).astype(np.float32, copy=False),
        }
        if self.negatives is not None:
            columns["neighbours"], columns["scores"] = self.negatives.rows_of(ids)
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]


def has_roles(corpus: Corpus) -> bool:
    """Whether a corpus has other roles than `text`."""
    return corpus.roles != ("text",)


def to_datasets(
    corpus: Corpus,
    embeddings: Embeddings,
    mined: Negatives | None,
    rows: NDArray[np.int64],
    *,
    negatives: int = 0,
) -> datasets.Dataset:
    """Rows as a `datasets.Dataset`: `id`, `role` of a corpus with roles, `text`, `negative_1`…, `label`.

    Args:
        corpus: The texts.
        embeddings: The teacher's vectors of `corpus`: the labels.
        mined: Where negatives come from; None if there are to be none.
        rows: (n,) int64 ids of the rows, in their order.
        negatives: How many texts of neighbours a row; rows that have fewer are left out.

    Returns:
        A dataset whose rows come without `id` and `role`, which a trainer would read as texts.

    Raises:
        TeachonceError: More negatives than the lists are long, or fewer than none.
    """
    import datasets
    from datasets.table import InMemoryTable

    if negatives < 0:
        raise TeachonceError(f"negatives={negatives}", "less than none", "ask for 0 or more")
    table = _table_of_all(corpus, embeddings)
    columns = ["text", *(f"negative_{place + 1}" for place in range(negatives)), "label"]
    content = [corpus.manifest.content, embeddings.manifest.content]
    if mined is not None:
        content.append(mined.manifest.content)
        rows, neighbours = _with_enough(mined, rows, negatives)
        texts = table["text"]
        table = table.take(pa.array(rows))
        for place in range(negatives):
            table = table.append_column(
                columns[1 + place], texts.take(pa.array(neighbours[:, place]))
            )
        rows = np.arange(len(rows))
    # Without a fingerprint it would read the whole table to make one.
    made_of = digest(*(part.encode() for part in [*content, *columns]), rows.tobytes())
    hidden = ["id", "role"] if has_roles(corpus) else ["id"]
    dataset = datasets.Dataset(
        InMemoryTable(table.select([*hidden, *columns])), fingerprint=made_of
    )
    return dataset.select(rows).with_format(columns=columns)


def _table_of_all(corpus: Corpus, embeddings: Embeddings) -> pa.Table:
    """Every row, shard by shard: views of the mapped files, unless vectors are not stored as float32."""
    return pa.concat_tables(
        pa.table(
            {
                "id": np.arange(corpus.starts[shard], corpus.starts[shard + 1]),
                "role": pa.repeat(corpus.role_of(shard), corpus.objects[shard].rows),
                "text": corpus.batch(shard).column("text"),
                "label": fixed_lists(embeddings.shard(shard).astype(np.float32, copy=False)),
            }
        )
        for shard in range(len(corpus.objects))
    )


def _with_enough(
    mined: Negatives, rows: NDArray[np.int64], wanted: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those of the rows that have `wanted` neighbours, and (n, wanted) row ids of these.

    Raises:
        TeachonceError: No list is so long.
    """
    neighbours, _ = mined.rows_of(rows)
    if len(rows) and wanted > neighbours.shape[1]:
        raise TeachonceError(
            f"negatives={wanted}",
            f"{neighbours.shape[1]} were mined of each row",
            f"ask for {neighbours.shape[1]} at most, or raise mine.neighbours and run `teachonce mine`",
        )
    neighbours = neighbours[:, :wanted]
    enough = (neighbours != NONE).all(axis=1)
    if not enough.all():
        log.warning(
            "to_datasets: %d of %d rows have fewer than %d mined neighbours and are left out",
            int((~enough).sum()),
            len(rows),
            wanted,
        )
    return rows[enough], neighbours[enough]
