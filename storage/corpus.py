"""The corpus: texts in shards, identified by text keys. The texts of a shard are of one role.

Shards are cut by content: a shard ends after a text whose key meets a condition, not after a fixed count. A
text added or removed moves only the borders around it, so all other shards keep their names and vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.column import TEXT_KEY_BYTES, Column, text_key_array, text_keys_from
from storage.errors import DamagedError
from storage.manifest import Manifest
from storage.roles import ROLES, Role
from storage.store import Object, Store, digest

Row = TypeVar("Row")

NO_TEXT = b"\xff"
"""A byte that is in no UTF-8."""


def text_key(text: str, role: Role = "text") -> bytes:
    """Returns the 16 bytes that identify a text in a role: blake2b over its UTF-8.

    Of another role than `text`, blake2b is personalised by the role: it is then another function, so that
    no text of one role has the key of a text of another.
    """
    person = b"" if role == "text" else role.encode()
    return hashlib.blake2b(text.encode(), digest_size=TEXT_KEY_BYTES, person=person).digest()


def text_digest(texts: Iterable[str], role: Role = "text") -> str:
    """Returns the digest that names a text shard: over its rows in order, each length-prefixed.

    Of another role than `text`, its name comes first, behind a byte that no text has in UTF-8.
    """
    first = [] if role == "text" else [NO_TEXT + role.encode()]
    return digest(*first, *(text.encode() for text in texts))


def ends_shard(key: bytes, *, rows: int, rows_per_shard: int) -> bool:
    """Whether a shard that has `rows` rows, the last with text key `key`, ends there.

    A shard has at least a quarter of and at most four times `rows_per_shard`; in between, each text ends it
    with a probability that makes `rows_per_shard` the mean.
    """
    least = max(1, rows_per_shard // 4)
    if rows < least:
        return False
    if rows >= 4 * rows_per_shard:
        return True
    return int.from_bytes(key[:8], "little") % max(1, rows_per_shard - least) == 0


def cut(
    texts: Iterable[str], rows_per_shard: int, role: Role = "text"
) -> Iterator[list[tuple[str, bytes]]]:
    """Yield shards of texts of one role as lists of (text, text key); holds one shard in memory."""
    keyed = ((text, text_key(text, role)) for text in texts)
    return cut_by(keyed, rows_per_shard, lambda row: row[1])


def cut_by(
    rows: Iterable[Row], rows_per_shard: int, key_of: Callable[[Row], bytes]
) -> Iterator[list[Row]]:
    """Yield shards of rows of any kind, ended by `ends_shard` of their keys; holds one shard in memory."""
    shard: list[Row] = []
    for row in rows:
        shard.append(row)
        if ends_shard(key_of(row), rows=len(shard), rows_per_shard=rows_per_shard):
            yield shard
            shard = []
    if shard:
        yield shard


def key_of_texts(shard: Sequence[tuple[str, bytes]], role: Role = "text") -> str:
    """Returns the key of a text shard."""
    return f"text/{text_digest((text for text, _ in shard), role)}.arrow"


def put_texts(store: Store, shard: Sequence[tuple[str, bytes]], role: Role = "text") -> Object:
    """Publish one text shard."""
    texts = [text for text, _ in shard]
    keys = text_keys_from(key for _, key in shard)
    batch = pa.record_batch(
        [text_key_array(keys), pa.array(texts, pa.large_string())], names=["text_key", "text"]
    )
    return store.put(key_of_texts(shard, role), batch, role=role)


@dataclass(frozen=True)
class ShardSlice:
    """The shards of a corpus that one of `count` workers, `number` 1 to `count`, takes: every count-th.

    Not a block of shards: a corpus grows at one end, and no worker should get all of the growth.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, shards: int) -> range:
        """Returns the numbers of this slice's shards, out of `shards`."""
        return range(self.number - 1, shards, self.count)


class Corpus(Column):
    """All texts, by row id."""

    texts_in: ClassVar[str] = "text"
    """The column of an object that holds them."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.manifest = manifest
        super().__init__(store, manifest.objects)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of its texts, in the order of their shards; `text` alone for a corpus without roles."""
        roles = {entry.role for entry in self.objects}
        return tuple(role for role in ROLES if role in roles) or ("text",)

    def role_of(self, shard: int) -> Role:
        """The role of the texts of one shard."""
        return self.objects[shard].role

    def of_role(self, rows: NDArray[np.int64], role: Role) -> NDArray[np.int64]:
        """Returns those of some row ids whose texts are of a role, in their order."""
        is_of = np.array([entry.role == role for entry in self.objects], bool)
        chosen: NDArray[np.int64] = rows[is_of[self.shards_of(rows)]]
        return chosen

    def roles_of(self, ids: NDArray[np.int64]) -> list[Role]:
        """The roles of some rows, in the order of `ids`."""
        return [self.objects[shard].role for shard in self.shards_of(ids).tolist()]

    def texts(self, shard: int) -> list[str]:
        """The texts of one shard, in row order."""
        texts: list[str] = self.batch(shard).column(self.texts_in).to_pylist()
        return texts

    def texts_in_parts(self, shard: int, rows: int) -> Iterator[list[str]]:
        """Yield the texts of one shard in row order, `rows` at a time."""
        column = self.batch(shard).column(self.texts_in)
        for first in range(0, len(column), rows):
            yield column.slice(first, rows).to_pylist()

    def take(self, ids: NDArray[np.integer]) -> list[str]:
        """The texts of some rows, in the order of `ids`."""
        texts_by_place: list[str] = [""] * len(ids)
        for shard, places, rows in self.by_shard(ids):
            texts = self.batch(shard).column(self.texts_in).take(pa.array(rows)).to_pylist()
            for place, text in zip(places, texts, strict=True):
                texts_by_place[place] = text
        return texts_by_place

    def shard_digest(self, shard: int) -> str:
        """The text digest of one shard: the last part of the key of everything derived from it."""
        return shard_digest(self.objects[shard])


def shard_digest(entry: Object) -> str:
    """The text digest in the key of a text, vectors or tokens object."""
    return entry.key.rsplit("/", 1)[1].removesuffix(".arrow")


def check_derived(manifest: Manifest, corpus: Corpus) -> None:
    """Raise unless each object of a column was derived from the shard at its place in the corpus.

    Raises:
        DamagedError: names the first shard that differs.
    """
    ours = [shard_digest(entry) for entry in manifest.objects]
    theirs = [shard_digest(entry) for entry in corpus.objects]
    if ours == theirs:
        return
    both = min(len(ours), len(theirs))
    place = next((i for i in range(both) if ours[i] != theirs[i]), both)
    raise DamagedError(
        f"{manifest.kind} manifest",
        f"made from another corpus: {len(ours)} shards beside {len(theirs)}, the first difference at "
        f"shard {place}",
        "run `dvc repro`, which makes it for this corpus",
    )
