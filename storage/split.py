"""The split: which rows are for training, held out, or found in an evaluation set.

Held-out rows are chosen by text key, so a text stays held out however the corpus grows, without a list.
Rows found in evaluation sets are few and are listed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from storage import durable, regular
from storage.column import text_keys_of
from storage.corpus import Corpus
from storage.errors import DamagedError, MissingError
from storage.regular import IrregularError
from storage.store import canonical_json, digest


class Split(BaseModel):
    """The file data/split.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    corpus: str  # `content` of the corpus manifest it was made for
    heldout: Annotated[float, Field(gt=0, le=0.5)]  # share of the rows held out
    evaluation: tuple[NonNegativeInt, ...]  # row ids found in evaluation sets, ascending

    @property
    def content(self) -> str:
        """Equal splits have equal content."""
        return digest(self.encoded)

    @property
    def encoded(self) -> bytes:
        """The bytes of the file."""
        return canonical_json(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        """Write the file in one step."""
        durable.replace(path, self.encoded)

    @classmethod
    def load(cls, path: Path, corpus: Corpus) -> Self:
        """Read the split of `corpus`.

        Raises:
            MissingError: there is no such file.
            DamagedError: it is no split, or that of another corpus.
            StorageError: the operating system refused to read it.
        """
        cure = "run `teachonce split`"
        try:
            content = regular.content(path)
        except FileNotFoundError:
            raise MissingError(path, "not there", cure) from None
        except IrregularError as error:
            raise DamagedError(path, f"no split: it {error.problem}", cure) from error
        try:
            split = cls.model_validate_json(content)
        except ValidationError as error:
            raise DamagedError(path, "no split", cure) from error
        if any(row >= corpus.rows for row in split.evaluation):
            raise DamagedError(path, f"names rows that a corpus of {corpus.rows} has not", cure)
        if split.corpus != corpus.manifest.content:
            raise DamagedError(path, "made for another corpus", cure)
        return split

    def is_heldout(self, text_keys: NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """(rows,) True for rows held out, from (rows,) V16 text keys."""
        halves = np.ascontiguousarray(text_keys).view("<u8").reshape(-1, 2)
        # The second half of the key: the first half decides where shards end, which must be independent.
        chosen: NDArray[np.bool_] = halves[:, 1] < np.uint64(int(self.heldout * 2.0**64))
        return chosen

    def train_rows(self, corpus: Corpus) -> NDArray[np.int64]:
        """Ids of the rows that are neither held out nor found in evaluation, ascending."""
        keep = ~self._heldout_of(corpus)
        keep[list(self.evaluation)] = False
        return np.flatnonzero(keep)

    def heldout_rows(self, corpus: Corpus) -> NDArray[np.int64]:
        """Ids of the rows held out and not found in evaluation, ascending."""
        keep = self._heldout_of(corpus)
        keep[list(self.evaluation)] = False
        return np.flatnonzero(keep)

    def _heldout_of(self, corpus: Corpus) -> NDArray[np.bool_]:
        """(rows,) True for rows held out; the keys of one shard at a time, so that none stays in memory."""
        shards = range(len(corpus.objects))
        parts = [self.is_heldout(text_keys_of(corpus.batch(shard))) for shard in shards]
        return np.concatenate([np.empty(0, bool), *parts])


def drawn(text_keys: NDArray[np.bytes_], count: int) -> NDArray[np.int64]:
    """Places of `count` of (n,) V16 text keys, ascending, as good as drawn at random; all of fewer.

    They have the highest second halves: a key is a hash. Rows held out have the lowest, so none of them is
    drawn from twice as many, and a corpus that grows changes few of the places.
    """
    halves = np.ascontiguousarray(text_keys).view("<u8").reshape(-1, 2)[:, 1]
    places: NDArray[np.int64] = np.sort(np.argsort(halves, kind="stable")[::-1][:count])
    return places
