"""Who needs a manifest: a ref in the store for each holder, and its maker kept apart.

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
"""So long a ref counts as seen just now: it says who has used a store in the last months, not minutes."""

HOLDER = ("by", "on", "in")
MAKER = "maker_"
"""Before `by`, `on`, `at` and `in` of the maker, where that is somebody else than the holder."""


@dataclass(frozen=True)
class Manifested:
    """A manifest as refs need it.

    Args:
        digest: Of its file.
        content: What its JSON says.
    """

    digest: str
    content: Mapping[str, Any]


def here(path: Path) -> dict[str, str]:
    """by, on, at, in: this user, this machine, now, and the folder of the manifest `path`."""
    return {
        "by": user(),
        "on": platform.node(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "in": as_utf8(path.resolve().parent),
    }


def user() -> str:
    """The name of this user; his number where he has no name, as in many containers."""
    try:
        return as_utf8(getpass.getuser())
    except (KeyError, OSError):
        return str(os.getuid())


def is_same(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Whether two refs are of one holder."""
    return all(a.get(word) == b.get(word) for word in HOLDER)


def holder_digest(made: Mapping[str, str]) -> str:
    """40 hex digits naming the holder."""
    return digest(*(made.get(word, "").encode() for word in HOLDER))


def maker_in(made: Mapping[str, str]) -> dict[str, str]:
    """by, on, at, in of the maker, of what a ref says."""
    apart = {
        word.removeprefix(MAKER): said for word, said in made.items() if word.startswith(MAKER)
    }
    return apart or dict(made)


def told(made: Mapping[str, str]) -> str:
    """A holder or a maker for people."""
    by, on, at, place = (shown(made.get(word, "?")) for word in ("by", "on", "at", "in"))
    return f"{by} on {on}, {at}, in {place}"


def note(manifest: Manifested, path: Path, maker: Mapping[str, str] | None) -> bytes:
    """The content of the ref that the holder of `path` leaves."""
    made = here(path)
    if maker is not None and not is_same(maker, made):
        made |= {f"{MAKER}{word}": said for word, said in maker.items()}
    return canonical_json({"manifest": manifest.content, "made": made})


def names(manifest: Manifested, path: Path) -> tuple[str, str]:
    """The names of a holder's ref: if it is the first, and if it is not."""
    return (
        f"{REFS}/{manifest.digest}.json",
        f"{REFS}/{manifest.digest}.{holder_digest(here(path))}.json",
    )


def leave(
    root: Path, manifest: Manifested, path: Path, maker: Mapping[str, str] | None = None
) -> Path | None:
    """See to it that the store `root` has the ref of the holder of `path`.

    Args:
        root: The store.
        manifest: Held.
        path: The file that the holder has, or is to have, it in.
        maker: Who made it, if not what the refs of other holders say.

    Returns:
        The new ref; None if there was one, which is as young as a new one now.

    Raises:
        StorageError: it could not be written.
    """
    if (own := own_ref(root, manifest, path)) is not None:
        _renew(own)
        return None
    maker = maker or known_maker(root, manifest)
    content = note(manifest, path, maker)

    def write(sink: BinaryIO) -> None:
        sink.write(content)

    for name in names(manifest, path):
        ref = root / name
        if durable.publish(ref, write):
            return ref
        made = read(ref, manifest)
        if made is None:
            # Damaged: it stops every gc, and says of nobody that he needs it.
            durable.replace(ref, content)
            return ref
        if is_same(made, here(path)):
            return None  # another process of this holder was faster
    raise StorageError(
        ref,
        "the ref of another holder under the name of this one",
        f"rm -f '{ref}', then try again",
    )


def own_ref(root: Path, manifest: Manifested, path: Path) -> Path | None:
    """The ref of the holder of `path`, if there is a sound one."""
    me = here(path)
    for name in names(manifest, path):
        made = read(root / name, manifest)
        if made is not None and is_same(made, me):
            return root / name
    return None


def known_maker(root: Path, manifest: Manifested) -> dict[str, str] | None:
    """Who made a manifest, by the refs that there are of it."""
    for made in _all(root, manifest):
        return maker_in(made)
    return None


def read(ref: Path, manifest: Manifested) -> dict[str, str] | None:
    """What a ref of `manifest` says of its holder; None if there is none, or a damaged one.

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


def parse(content: bytes, manifest: Manifested) -> dict[str, str] | None:
    """The same of the content of a ref."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.keys() != {"manifest", "made"}:
        return None
    made = found["made"]
    if found["manifest"] != manifest.content or not isinstance(made, dict):
        return None
    return made if all(isinstance(said, str) for said in made.values()) else None


def maker_of(content: bytes, manifest: Manifested) -> dict[str, str] | None:
    """Who made a manifest, by the content of a ref of it."""
    made = parse(content, manifest)
    return None if made is None else maker_in(made)


def _all(root: Path, manifest: Manifested) -> Iterator[dict[str, str]]:
    folder = root / REFS
    with durable.named(folder, "listing"):
        there = sorted(folder.glob(f"{manifest.digest}*.json")) if folder.is_dir() else []
    for ref in there:
        if (made := read(ref, manifest)) is not None:
            yield made


def _renew(ref: Path) -> None:
    """Give a ref the time of now, if it is older than a day and that is allowed."""
    try:
        if time.time() - ref.lstat().st_mtime > FRESH_SECONDS:
            durable.touch(ref)
    except OSError:
        return  # it is only for people, who look for holders that are no more
