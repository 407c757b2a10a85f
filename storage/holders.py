"""Refs: which place needs a manifest. The store has one ref a holder, which also names the maker.

A holder is a place that has the manifest: a user, a machine, a folder. Equal manifests of two work trees
have two refs, so that forgetting one takes nothing from the other. The first holder's ref is
`refs/<manifest digest>.json`, as it was when a manifest had one ref only; those of all others are
`refs/<manifest digest>.<holder digest>.json` beside it. (Programs of that time read the first. At others
their gc stops and deletes nothing.)

Nobody writes into a ref of somebody else. A new one is published like an object, so of two that want to be
first one is; one that is there is renewed by its time.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from storage import durable
from storage.errors import StorageError, as_utf8, shown
from storage.store import DIGEST_PATTERN, canonical_json, digest

REFS = "refs"
REF_PATTERN = rf"({DIGEST_PATTERN})(?:\.({DIGEST_PATTERN}))?\.json"
"""A file of `refs`; the digests of the manifest and, but for the first holder, of the holder."""

MAX_BYTES = 64 << 20
"""1 TB of 64 MB objects is 3 MB of JSON; more than this is no manifest of ours, and is not read."""

FRESH_SECONDS = 86_400.0
"""A ref is touched again after this time; it need only tell the day of the last use."""

HOLDER = ("by", "on", "in")
MAKER = "maker_"
"""Before `by`, `on`, `at` and `in` of the maker, where that is somebody else than the holder."""


@dataclass(frozen=True)
class HeldManifest:
    """A manifest as refs need it: the digest of its file, 40 hex digits, and its parsed JSON."""

    digest: str
    content: Mapping[str, Any]


def this_holder(path: Path) -> dict[str, str]:
    """Returns by, on, at, in: this user, this machine, the time now, and the folder of `path`."""
    return {
        "by": user(),
        "on": platform.node(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "in": as_utf8(path.resolve().parent),
    }


def user() -> str:
    """Returns the name of this user, or the user id if it has no name, as in many containers."""
    try:
        return as_utf8(getpass.getuser())
    except (KeyError, OSError):
        return str(os.getuid())


def is_same(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Whether two refs are of one holder."""
    return all(a.get(word) == b.get(word) for word in HOLDER)


def holder_digest(holder: Mapping[str, str]) -> str:
    """40 hex digits naming the holder."""
    return digest(*(holder.get(word, "").encode() for word in HOLDER))


def maker_in(holder: Mapping[str, str]) -> dict[str, str]:
    """Returns by, on, at, in of the maker, from the entries of a ref."""
    maker_entries = {
        word.removeprefix(MAKER): value for word, value in holder.items() if word.startswith(MAKER)
    }
    return maker_entries or dict(holder)


def describe(holder: Mapping[str, str]) -> str:
    """Returns a holder or a maker as a phrase for messages."""
    by, on, at, place = (shown(holder.get(word, "?")) for word in ("by", "on", "at", "in"))
    return f"{by} on {on}, {at}, in {place}"


def note(manifest: HeldManifest, path: Path, maker: Mapping[str, str] | None) -> bytes:
    """Returns the content of the ref of the holder of `path`."""
    holder = this_holder(path)
    if maker is not None and not is_same(maker, holder):
        holder |= {f"{MAKER}{word}": value for word, value in maker.items()}
    return canonical_json({"manifest": manifest.content, "made": holder})


def names(manifest: HeldManifest, path: Path) -> tuple[str, str]:
    """Returns the two possible names of a holder's ref: as the first holder, and as a later one."""
    return (
        f"{REFS}/{manifest.digest}.json",
        f"{REFS}/{manifest.digest}.{holder_digest(this_holder(path))}.json",
    )


def write_ref(
    root: Path, manifest: HeldManifest, path: Path, maker: Mapping[str, str] | None = None
) -> Path | None:
    """Write the ref of the holder of `path` into the store `root`, or renew the one that exists.

    Args:
        root: The folder of the store.
        manifest: The manifest held.
        path: The manifest file of the holder, existing or about to be written.
        maker: by, on, at, in of the maker; None to take it from the refs of other holders.

    Returns:
        The new ref; None if there was one, whose time is renewed.

    Raises:
        StorageError: it could not be written.
    """
    if (own := own_ref(root, manifest, path)) is not None:
        _renew(own)
        return None
    maker = maker or recorded_maker(root, manifest)
    content = note(manifest, path, maker)

    def write(sink: BinaryIO) -> None:
        sink.write(content)

    for name in names(manifest, path):
        ref = root / name
        if durable.publish(ref, write):
            return ref
        holder = read(ref, manifest)
        if holder is None:
            # A damaged ref names no holder and stops every gc, so it is replaced.
            durable.replace(ref, content)
            return ref
        if is_same(holder, this_holder(path)):
            return None  # another process of this holder was faster
    raise StorageError(
        ref,
        "the ref of another holder under the name of this one",
        f"rm -f '{ref}', then try again",
    )


def own_ref(root: Path, manifest: HeldManifest, path: Path) -> Path | None:
    """Returns the intact ref of the holder of `path`; None if there is none."""
    me = this_holder(path)
    for name in names(manifest, path):
        holder = read(root / name, manifest)
        if holder is not None and is_same(holder, me):
            return root / name
    return None


def recorded_maker(root: Path, manifest: HeldManifest) -> dict[str, str] | None:
    """Returns the maker of a manifest from its refs in the store; None if it has none."""
    for holder in _holders_of(root, manifest):
        return maker_in(holder)
    return None


def read(ref: Path, manifest: HeldManifest) -> dict[str, str] | None:
    """Returns the entries of a ref of `manifest`; None if the ref does not exist or is damaged.

    Raises:
        StorageError: the operating system refused to read it.
    """
    with durable.named(ref, "reading"):
        try:
            status = ref.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                return None
            content = ref.read_bytes()
        except FileNotFoundError:
            return None
    return parse(content, manifest)


def parse(content: bytes, manifest: HeldManifest) -> dict[str, str] | None:
    """Returns the entries in the content of a ref of `manifest`; None if it is damaged."""
    try:
        content_of_ref = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content_of_ref, dict) or content_of_ref.keys() != {"manifest", "made"}:
        return None
    holder = content_of_ref["made"]
    if content_of_ref["manifest"] != manifest.content or not isinstance(holder, dict):
        return None
    return holder if all(isinstance(value, str) for value in holder.values()) else None


def maker_of(content: bytes, manifest: HeldManifest) -> dict[str, str] | None:
    """Returns the maker of a manifest from the content of one of its refs; None if that is damaged."""
    holder = parse(content, manifest)
    return None if holder is None else maker_in(holder)


def _holders_of(root: Path, manifest: HeldManifest) -> Iterator[dict[str, str]]:
    folder = root / REFS
    with durable.named(folder, "listing"):
        refs = sorted(folder.glob(f"{manifest.digest}*.json")) if folder.is_dir() else []
    for ref in refs:
        if (holder := read(ref, manifest)) is not None:
            yield holder


def _renew(ref: Path) -> None:
    """Set a ref's time to now if it is older than a day; a refusal is ignored."""
    try:
        if time.time() - ref.lstat().st_mtime > FRESH_SECONDS:
            durable.touch(ref)
    except OSError:
        return  # the time is only shown to people who look for abandoned refs
