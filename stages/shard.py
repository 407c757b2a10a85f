"""Read the corpus files, clean the texts by named rules, and cut them into shards by content.

Files of readings are read, too: a reading's text is added to the corpus if no source has it, and the
readings are cut into shards of their own.

This file is long because the rules for texts and for readings are one, and so is their ledger.

Nothing is shuffled and nothing is held out here: a text that is added or removed must move the borders
of its own shard only, so that the vectors of all others stay valid.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from stages.outcome import Fact, Facts, Outcome, is_noticeable, write_json
from stages.params import NO_READINGS, DistillParams, ShardParams, larger_shards, roles_of_corpus
from stages.reading.corpus_files import Item, Rejected, read, sources_with_fields
from stages.reading.lines import has_control_characters
from stages.reading.readings import PairOfTexts, read_readings, reading_files
from storage.column import TEXT_KEY_BYTES
from storage.corpus import cut, key_of_texts, put_texts, text_key
from storage.errors import TeachonceError
from storage.manifest import Manifest
from storage.readings import Reading, cut_readings, key_of_readings, put_readings
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

RULES_OF_READINGS = (*RULES[:-1], "unchanged", "duplicate")
"""Of a text and its reading. `too_short` is asked of the text alone; an `unchanged` reading is its text."""

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


def run(
    params: ShardParams,
    *,
    root: Path,
    store: Store,
    out: Path,
    facts: Path,
    distill: DistillParams = NO_READINGS,
    readings: Path | None = None,
) -> Outcome:
    """Read all sources, publish their shards and leave the corpus manifest and that of the readings.

    It is long because it reads in the order in which files are: texts, readings, what is said of both.

    Holds one shard of texts, and 21 to 43 bytes for each unique text and reading (see `TextKeySet`).

    Args:
        params: The settings `shard`.
        root: The work tree, to which sources are relative.
        store: The store for the shards; existing ones are not written again.
        out: The corpus manifest; equal input gives equal bytes.
        facts: The ledger {read, kept, rejected: {rule: count}}; read is the sum of the others. With
            readings also {added, readings: {read, kept, rejected}}: texts that only readings brought are
            kept, and were not read from sources.
        distill: The settings `distill`, which name files of readings.
        readings: The manifest of the readings, without objects if there are none; None to write none.

    Raises:
        TeachonceError: a source is missing, truncated or unreadable, or no text is left.
    """
    counted = CountedItems()
    rejected = Counter(dict.fromkeys(RULES, 0))
    added = Counter[Role]()
    objects, new = _publish(store, shards_of(params, root, counted, rejected, distill, added))
    manifest = Manifest(kind="corpus", recipe=recipe(params), parent=None, objects=tuple(objects))
    _check_balance(counted.read, manifest.rows - added.total(), rejected)
    account = f"{counted.read:,} read{_rejections(rejected)}"
    lost = losses(counted.read, rejected)
    if not manifest.rows:
        raise TeachonceError(
            "shard.sources",
            f"no text is left: {account}",
            "name files with texts in params.yaml, or loosen shard.min_chars and shard.max_chars",
        )
    of_readings = _put_readings(params, distill, root, store, manifest, readings)
    manifest.save(out, store)
    ledger: dict[str, Fact | Facts] = {
        "read": counted.read,
        "kept": manifest.rows,
        "rejected": dict(rejected),
    }
    if distill.readings:
        ledger |= {"added": added.total(), "readings": of_readings}
        account += f"; {added.total():,} added by readings"
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
    if note := larger_shards(params, rows=manifest.rows, shards=len(objects)):
        log.warning("shard: %s", note)
    shares = ", ".join(f"{100 * count / texts:.0f} % {rule}" for rule, count in lost.items())
    plural = "s" if len(objects) > 1 else ""
    return Outcome(
        stage="shard",
        made=out,
        summary=f"{manifest.rows:,} texts in {len(objects):,} shard{plural} ({account})"
        + (f"; many are lost: {shares}" if lost else "")
        + (
            f"; {of_readings['kept']:,} readings ({of_readings['read']:,} read"
            f"{_rejections(of_readings['rejected'])})"
            if distill.readings
            else ""
        ),
        facts={
            **ledger,
            "lost": lost,
            "shards": len(objects),
            "shards_new": new,
            "bytes": manifest.size,
        },
    )


def losses(read: int, rejected: Mapping[str, int]) -> dict[str, int]:
    """Returns the rules that reject a noticeable share of texts, without duplicates and empty lines."""
    texts = read - rejected["empty"]
    return {rule: rejected[rule] for rule in CURES if is_noticeable(rejected[rule], texts)}


def make_again(
    params: ShardParams,
    *,
    root: Path,
    store: Store,
    keys: Collection[str],
    distill: DistillParams = NO_READINGS,
) -> list[str]:
    """Publish those of the shards `keys` of texts or readings that the files still yield, and nothing else.

    A shard is named by what is in it, so it is the lost one, to the bit.

    Returns:
        The keys of those that the files no longer yield.

    Raises:
        TeachonceError: a source is missing, truncated or unreadable.
    """
    wanted = dict.fromkeys(keys)
    # The sources may be large: they are not read for readings alone.
    texts = (
        shards_of(params, root, CountedItems(), Counter(), distill, Counter())
        if any(key.startswith("text/") for key in keys)
        else ()
    )
    of_readings = reading_shards(params, distill, root, Counter())
    for key, put in chain(
        (
            (key_of_texts(shard, role), partial(put_texts, store, shard, role))
            for role, shard in texts
        ),
        (
            (key_of_readings(shard, role), partial(put_readings, store, shard, role))
            for role, shard in of_readings
        ),
    ):
        if key in wanted:
            put()
            del wanted[key]
        if not wanted:
            break
    return list(wanted)


def shards_of(
    params: ShardParams,
    root: Path,
    counted: CountedItems,
    rejected: Counter[str],
    distill: DistillParams,
    added: Counter[Role],
) -> Iterator[tuple[Role, Sequence[tuple[str, bytes]]]]:
    """Yield each shard with its role: the texts of one role after those of another.

    All items of the sources are counted, those that are rejected by rule, and those that readings added.
    Texts that no source has, but a file of readings, come last in their role.

    Raises:
        TeachonceError: a source is missing, truncated or unreadable.
    """
    # All are looked for before any is read.
    roles = roles_of_corpus({"shard": params, "distill": distill})
    named = {
        role: (
            sources_with_fields(params, role, root),
            reading_files(distill.readings_of(role), root),
        )
        for role in roles
    }
    for role, (found, files) in named.items():
        items = chain.from_iterable(read(source, field) for source, field in found)
        seen = TextKeySet()
        kept = clean(counted.over(items), params, rejected, role, seen)
        more = _texts_read(files, params, role, seen, added)
        for shard in cut(chain(kept, more), params.rows_per_shard, role):
            yield role, shard


def _texts_read(
    files: Sequence[Path], params: ShardParams, role: Role, seen: TextKeySet, added: Counter[Role]
) -> Iterator[str]:
    """Yield the texts of readings that are not among those seen before."""
    for pair in chain.from_iterable(map(read_readings, files)):
        if isinstance(pair, Rejected) or _broken_pair(pair, params) is not None:
            continue
        if seen.add(text_key(pair.text, role)):
            added[role] += 1
            yield pair.text


def reading_shards(
    params: ShardParams, distill: DistillParams, root: Path, counts: Counter[str]
) -> Iterator[tuple[Role, Sequence[Reading]]]:
    """Yield each shard of readings with the role of their texts.

    Counts all pairs as `read`, and those that are not kept by `RULES_OF_READINGS`.

    Raises:
        TeachonceError: a file is missing, truncated or unreadable.
    """
    files = {role: reading_files(distill.readings_of(role), root) for role in distill.roles}
    for role, of_role in files.items():
        kept = _clean_readings(of_role, params, role, counts)
        for shard in cut_readings(kept, params.rows_per_shard):
            yield role, shard


def _clean_readings(
    files: Sequence[Path], params: ShardParams, role: Role, counts: Counter[str]
) -> Iterator[Reading]:
    seen = TextKeySet()
    for pair in chain.from_iterable(map(read_readings, files)):
        counts["read"] += 1
        if isinstance(pair, Rejected):
            counts[pair.rule] += 1
            continue
        reading = Reading(text_key(pair.text, role), pair.reading)
        broken = _broken_pair(pair, params)
        if broken is None and pair.text == pair.reading:
            broken = "unchanged"
        if broken is None and not seen.add(reading.key):
            broken = "duplicate"
        if broken is None:
            yield reading
        else:
            counts[broken] += 1


def _broken_pair(pair: PairOfTexts, params: ShardParams) -> str | None:
    """Returns the rule that a text or its reading breaks, or None."""
    if any(map(has_control_characters, pair)):
        return "control_characters"
    of_text = _wrong_length(pair.text, params)
    of_reading = _wrong_length(pair.reading, params)
    # Keywords may be short, and so are texts in some scripts.
    return of_text or (None if of_reading == "too_short" else of_reading)


def _put_readings(
    params: ShardParams,
    distill: DistillParams,
    root: Path,
    store: Store,
    corpus: Manifest,
    out: Path | None,
) -> dict[str, Any]:
    """Publish the readings and leave their manifest; returns the ledger."""
    counts = Counter(dict.fromkeys(("read", *RULES_OF_READINGS), 0))
    objects = tuple(
        store.find(key_of_readings(shard, role)) or put_readings(store, shard, role)
        for role, shard in reading_shards(params, distill, root, counts)
    )
    manifest = Manifest(
        kind="readings", recipe=recipe(params), parent=corpus.content, objects=objects
    )
    if out is not None:
        manifest.save(out, store)
    read = counts.pop("read")
    _check_balance(read, manifest.rows, counts)
    if distill.readings and not manifest.rows:
        raise TeachonceError(
            "distill.readings",
            f"no reading is left: {read:,} read{_rejections(counts)}",
            "name files with readings of other texts in params.yaml, or loosen shard.min_chars and "
            "shard.max_chars",
        )
    return {"read": read, "kept": manifest.rows, "rejected": dict(counts)}


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
    items: Iterable[Item],
    params: ShardParams,
    rejected: Counter[str],
    role: Role = "text",
    seen: TextKeySet | None = None,
) -> Iterator[str]:
    """Yield the texts of one role to keep, stripped, in order; the others are counted in `rejected`.

    The keys of those that are kept are added to `seen`.
    """
    seen = TextKeySet() if seen is None else seen
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
