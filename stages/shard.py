"""Read the corpus files, clean the texts by named rules, and cut them into shards by content.

Nothing is shuffled and nothing is held out here: a text that is added or removed must move the borders
of its own shard only, so that the vectors of all others stay valid.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from stages.outcome import Fact, Facts, Outcome, is_noticeable, write_json
from stages.params import ShardParams
from stages.reading.corpus_files import Item, Rejected, read, sources_with_fields
from stages.reading.lines import has_control_characters
from storage.column import TEXT_KEY_BYTES
from storage.corpus import cut, key_of_texts, put_texts, text_key
from storage.errors import TeachonceError
from storage.manifest import Manifest
from storage.roles import Role
from storage.store import Object, Store

log = logging.getLogger("teachonce")

VERSION = 2  # raise it when a code change gives other rows for the same texts and settings

# In the order in which they are asked; each rejected item is counted under the first that it breaks.
RULES = (
    "undecodable",
    "malformed",
    "control_characters",
    "empty",
    "too_short",
    "too_long",
    "duplicate",
)

# What to do where a rule rejects many texts.
CURES = {
    "undecodable": "convert the files to UTF-8, such as by `iconv -f LATIN1 -t UTF-8`",
    "malformed": "write a JSON object a line, with the text under the name that shard.field says ({field})",
    "control_characters": "take these characters out of the texts; NULs may mean that a file is UTF-16",
    "too_short": "lower shard.min_chars ({min_chars}), if you want them",
    "too_long": "raise shard.max_chars ({max_chars}), or cut the texts into shorter ones before",
}

SECONDS_BETWEEN_LINES = 5.0


def recipe(params: ShardParams) -> dict[str, object]:
    """Returns the settings that decide which texts become rows, and where shards end.

    `sources` and `field` are left out: the same texts from elsewhere (renamed files, another format) are
    the same corpus.
    """
    return {
        # Not VERSION: a corpus in which its rise changes no row keeps its manifest, and nothing that
        # follows from it runs again.
        "version": 1,
        "rows_per_shard": params.rows_per_shard,
        "min_chars": params.min_chars,
        "max_chars": params.max_chars,
    }


def run(params: ShardParams, *, root: Path, store: Store, out: Path, facts: Path) -> Outcome:
    """Read all sources, publish their shards and leave the corpus manifest.

    Holds one shard of texts, and 21 to 43 bytes for each unique text (see `TextKeySet`).

    Args:
        params: The settings `shard`.
        root: The work tree, to which sources are relative.
        store: The store for the shards; existing ones are not written again.
        out: The corpus manifest; equal input gives equal bytes.
        facts: The ledger {read, kept, rejected: {rule: count}}; read is the sum of the others.

    Raises:
        TeachonceError: a source is missing, truncated or unreadable, or no text is left.
    """
    counted = CountedItems()
    rejected = Counter(dict.fromkeys(RULES, 0))
    made, new = _publish(store, shards_of(params, root, counted, rejected))
    manifest = Manifest(kind="corpus", recipe=recipe(params), parent=None, objects=tuple(made))
    _check_balance(counted.read, manifest.rows, rejected)
    account = f"{counted.read:,} read{_rejections(rejected)}"
    lost = losses(counted.read, rejected)
    if not manifest.rows:
        raise TeachonceError(
            "shard.sources",
            f"no text is left: {account}",
            "name files with texts in params.yaml, or loosen shard.min_chars and shard.max_chars",
        )
    manifest.save(out, store)
    ledger: dict[str, Fact | Facts] = {
        "read": counted.read,
        "kept": manifest.rows,
        "rejected": dict(rejected),
    }
    write_json(facts, ledger)
    texts = counted.read - rejected["empty"]
    for rule, count in lost.items():
        log.warning(
            "shard: %s of %s texts (%.0f %%) are lost as %s: %s",
            f"{count:,}",
            f"{texts:,}",
            100 * count / texts,
            rule,
            CURES[rule].format(**params.model_dump()),
        )
    shares = ", ".join(f"{100 * count / texts:.0f} % {rule}" for rule, count in lost.items())
    plural = "s" if len(made) > 1 else ""
    return Outcome(
        stage="shard",
        made=out,
        summary=f"{manifest.rows:,} texts in {len(made):,} shard{plural} ({account})"
        + (f"; many are lost: {shares}" if lost else ""),
        facts={
            **ledger,
            "lost": lost,
            "shards": len(made),
            "shards_new": new,
            "bytes": manifest.size,
        },
    )


def losses(read: int, rejected: Mapping[str, int]) -> dict[str, int]:
    """Returns the rules that reject a noticeable share of texts, without duplicates and empty lines."""
    texts = read - rejected["empty"]
    return {rule: rejected[rule] for rule in CURES if is_noticeable(rejected[rule], texts)}


def make_again(
    params: ShardParams, *, root: Path, store: Store, keys: Collection[str]
) -> list[str]:
    """Publish those of the text shards `keys` that the sources still yield, and nothing else.

    A shard is named by its texts, so it is the lost one, to the bit.

    Args:
        params: The settings `shard`.
        root: The work tree.
        store: The store for the shards.
        keys: Keys of text shards.

    Returns:
        The keys of those that the sources no longer yield.

    Raises:
        TeachonceError: a source is missing, truncated or unreadable.
    """
    wanted = dict.fromkeys(keys)
    for role, shard in shards_of(params, root, CountedItems(), Counter()):
        if (key := key_of_texts(shard, role)) in wanted:
            put_texts(store, shard, role)
            del wanted[key]
        if not wanted:
            break
    return list(wanted)


def shards_of(
    params: ShardParams, root: Path, counted: CountedItems, rejected: Counter[str]
) -> Iterator[tuple[Role, Sequence[tuple[str, bytes]]]]:
    """Yield each shard with its role: the texts of one role after those of another.

    Args:
        params: The settings `shard`.
        root: The work tree, to which sources are relative.
        counted: Counts all items.
        rejected: Counts those that are not kept.

    Raises:
        TeachonceError: a source is missing, truncated or unreadable.
    """
    # All are looked for before any is read.
    named = {role: sources_with_fields(params, role, root) for role in params.roles}
    for role, found in named.items():
        items = chain.from_iterable(read(source, field) for source, field in found)
        kept = clean(counted.over(items), params, rejected, role)
        for shard in cut(kept, params.rows_per_shard, role):
            yield role, shard


def _publish(
    store: Store, shards: Iterable[tuple[Role, Sequence[tuple[str, bytes]]]]
) -> tuple[list[Object], int]:
    """Publish all shards; returns their objects, and the number of new ones."""
    objects: list[Object] = []
    new = 0
    for role, shard in shards:
        entry = store.find(key_of_texts(shard, role))
        new += entry is None
        objects.append(entry or put_texts(store, shard, role))
    return objects, new


def clean(
    items: Iterable[Item], params: ShardParams, rejected: Counter[str], role: Role = "text"
) -> Iterator[str]:
    """Yield the texts of one role to keep, stripped, in order; the others are counted in `rejected`."""
    seen = TextKeySet()
    for item in items:
        if isinstance(item, Rejected):
            rejected[item.rule] += 1
            continue
        text = item.strip()
        broken = "control_characters" if has_control_characters(text) else None
        broken = broken or _wrong_length(text, params)
        if broken is None and not seen.add(text_key(text, role)):
            broken = "duplicate"
        if broken is None:
            yield text
        else:
            rejected[broken] += 1


def _wrong_length(text: str, params: ShardParams) -> str | None:
    """Returns the rule that a stripped text breaks by its length in characters, or None."""
    if not text:
        return "empty"
    if len(text) < params.min_chars:
        return "too_short"
    if len(text) > params.max_chars:
        return "too_long"
    return None


class TextKeySet:
    """A set of text keys: one flat table with open addressing.

    Between 3/8 and 3/4 of its slots are in use, so it takes 21 to 43 bytes a key (64 while it grows),
    where a Python set of `bytes` takes 98 to 145: measured, 22 against 109 for 3 million keys. A corpus
    of 100 million texts is read with 4 GB instead of 11.
    """

    def __init__(self) -> None:
        self._table = bytearray(TEXT_KEY_BYTES << 10)
        self._used = 0

    def add(self, key: bytes) -> bool:
        """Add a key of 16 bytes; returns False if it was in the set."""
        if not _put(self._table, key):
            return False
        self._used += 1
        if 4 * self._used * TEXT_KEY_BYTES > 3 * len(self._table):
            larger = bytearray(2 * len(self._table))
            for start in range(0, len(self._table), TEXT_KEY_BYTES):
                old = bytes(self._table[start : start + TEXT_KEY_BYTES])
                if old != FREE:
                    _put(larger, old)
            self._table = larger
        return True


# A key of 16 zeros could not be stored; no text is known whose blake2b is that.
FREE = bytes(TEXT_KEY_BYTES)


def _put(table: bytearray, key: bytes) -> bool:
    """Write `key` into the first free slot from its own place on; returns False if the table has it."""
    place = int.from_bytes(key[:8], "little") * TEXT_KEY_BYTES % len(table)
    while (stored := table[place : place + TEXT_KEY_BYTES]) != FREE:
        if stored == key:
            return False
        place = (place + TEXT_KEY_BYTES) % len(table)
    table[place : place + TEXT_KEY_BYTES] = key
    return True


class CountedItems:
    """Counts items on their way, and logs the count every few seconds."""

    def __init__(self) -> None:
        self.read = 0
        self._started = self._last = time.monotonic()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items."""
        for item in items:
            self.read += 1
            # The clock costs more than a short text does.
            if (
                self.read % 1024 == 0
                and (now := time.monotonic()) - self._last > SECONDS_BETWEEN_LINES
            ):
                self._last = now
                rate = self.read / (now - self._started)
                log.info("shard: %s texts so far, %s texts/s", f"{self.read:,}", f"{rate:,.0f}")
            yield item


def _check_balance(read: int, kept: int, rejected: Counter[str]) -> None:
    """Raise unless every item read was kept or rejected: a bug, so it is no TeachonceError."""
    if read != kept + rejected.total():
        raise RuntimeError(f"{read} items read, but {kept} kept and {dict(rejected)} rejected")


def _rejections(rejected: Counter[str]) -> str:
    named = [f"{count:,} {rule}" for rule, count in rejected.items() if count]
    return f"; rejected: {', '.join(named)}" if named else ""
