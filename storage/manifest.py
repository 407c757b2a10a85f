"""Manifests: the small JSON files that a stage leaves behind, tracked by Git and DVC.

A manifest says what was made (kind), by which settings (recipe), from what (parent) and which objects
of the store hold it, in order. It holds no time, host or path: equal inputs give equal bytes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from storage import durable, holders, regular
from storage.errors import DamagedError, MissingError, StorageError, TeachonceError, shown
from storage.holders import MAX_BYTES, REFS, HeldManifest
from storage.regular import IrregularError
from storage.store import Object, Store, canonical_json, digest

Kind = Literal["corpus", "readings", "embeddings", "mixes", "negatives"]

MADE_BY = {
    "corpus": "teachonce shard",
    "readings": "teachonce shard",
    "embeddings": "teachonce embed",
    "mixes": "teachonce embed",
    "negatives": "teachonce mine",
}


MAX_OBJECTS = 250_000
"""With the longest keys that is a manifest of 60 MB: one that is written can be read (`MAX_BYTES`)."""

READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
NOT_TO_BE_WRITTEN = {*READ_ONLY, errno.ENOSPC, errno.EDQUOT}

log = logging.getLogger("teachonce")


class Manifest(BaseModel):
    """One kind of column over a whole corpus."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Kind
    # Settings (and hashes of model files) that decide the values; see each stage's `recipe`.
    recipe: dict[str, Any]
    parent: str | None  # `content` of the manifests it was made from; None for a corpus
    objects: tuple[Object, ...]  # in row order

    @property
    def rows(self) -> int:
        """Rows of all objects together."""
        return sum(entry.rows for entry in self.objects)

    @property
    def size(self) -> int:
        """Size of all objects together, in bytes."""
        return sum(entry.bytes for entry in self.objects)

    @property
    def content(self) -> str:
        """Digest of the objects' keys and checksums: equal objects give equal content for any recipe."""
        return digest(canonical_json([[entry.key, entry.sha256] for entry in self.objects]))

    @property
    def encoded(self) -> bytes:
        """The bytes of the manifest file."""
        return canonical_json(self.model_dump(mode="json"))

    def save(self, path: Path, store: Store) -> None:
        """Write a ref into the store, check that all named objects exist, then write the manifest.

        Raises:
            TeachonceError: the manifest names too many objects; it is not written.
            MissingError, AnotherCopyError, DamagedError, StorageError: as `hold`; it is not written.
        """
        if len(self.objects) > MAX_OBJECTS:
            raise TeachonceError(
                path,
                f"{len(self.objects):,} shards, and a manifest names {MAX_OBJECTS:,} at most",
                "raise shard.rows_per_shard, then run `teachonce shard`",
            )
        self.hold(path, store, again=MADE_BY[self.kind])
        durable.replace(path, self.encoded)

    def hold(
        self, path: Path, store: Store, *, again: str, maker: Mapping[str, str] | None = None
    ) -> None:
        """Write a ref into the store, then check that all objects of the manifest exist.

        The ref comes first: `gc` reads the refs again after it took something away, so an object that is
        seen here stays (storage/trash.py has the whole argument). A read-only store can have no ref; its
        objects are used nevertheless, with a warning.

        Args:
            path: Path of the manifest, existing or about to be written.
            store: The store of its objects.
            again: The command that makes missing objects again.
            maker: by, on, at, in of the maker; None to take it from the refs in the store.

        Raises:
            MissingError: an object vanished after it was found or made.
            AnotherCopyError, DamagedError: it is not the one that was found or made.
            StorageError: the operating system refused.
        """
        try:
            ref = self.write_ref(path, store, maker=maker)
        except StorageError as error:
            # A refusal is an error unless the whole store is read-only.
            folders = store.root, store.root / REFS
            if not _is_refused(error, READ_ONLY) or any(os.access(f, os.W_OK) for f in folders):
                raise
            ref = None
            log.warning(
                "%s may only be read here, so no ref says that %s needs it: `teachonce gc` of those who "
                "may write deletes what no manifest of theirs names",
                store.root,
                path.name,
            )
        inode = None if ref is None else _inode(ref)
        try:
            for entry in self.objects:
                store.check_present(entry)
        except TeachonceError as error:
            # The ref would name a missing object. Removed only if it is still ours: another process of this
            # holder may have written its own meanwhile.
            if ref is not None and inode is not None and _inode(ref) == inode:
                durable.remove(ref)
            if not isinstance(error, MissingError):
                raise
            raise MissingError(
                error.where,
                "vanished from the store after it was found or made: `teachonce gc --delete` was at work "
                "there",
                f"run `{again}` again: what is there is kept",
            ) from error

    def renew(self, path: Path, store: Store) -> None:
        """Renew the ref of the manifest `path` in the store, if that is possible.

        For commands that only read. A store that is read-only, full, or lacks objects is no error here; a
        missing object is reported when it is opened.

        Raises:
            StorageError: the operating system refused for another reason, such as a failing disk.
        """
        try:
            # A store without refs has lost them: with this one alone, `gc` would delete all the rest.
            with durable.named(store.root / REFS, "looking for it"):
                if not (store.root / REFS).is_dir():
                    return
            is_held = holders.own_ref(store.root, self.manifested, path)
            if is_held or all(store.has(entry.key) for entry in self.objects):
                self.write_ref(path, store)
        except StorageError as error:
            if isinstance(error.__cause__, OSError) and not _is_refused(error, NOT_TO_BE_WRITTEN):
                raise

    def write_ref(
        self, path: Path, store: Store, *, maker: Mapping[str, str] | None = None
    ) -> Path | None:
        """Write or renew the ref of the manifest `path`; returns the ref if it is new, else None.

        The ref keeps `gc`, run by anybody, from deleting the objects. A manifest without any has no ref.
        """
        if not self.objects:
            return None
        return holders.write_ref(store.root, self.manifested, path, maker)

    @property
    def ref(self) -> str:
        """The name of the first holder's ref, in a store or on a remote."""
        return f"{REFS}/{digest(self.encoded)}.json"

    @property
    def manifested(self) -> HeldManifest:
        """The manifest as refs need it."""
        return HeldManifest(digest(self.encoded), json.loads(self.encoded))

    def note(self, path: Path, *, maker: Mapping[str, str] | None = None) -> bytes:
        """The content of a ref: the manifest, and its holder's user, machine, time and folder."""
        return holders.note(self.manifested, path, maker)

    @classmethod
    def load(cls, path: Path, kind: Kind | None) -> Self:
        """Read a manifest of `kind`; None for one of any kind.

        Raises:
            MissingError: there is no such file.
            DamagedError: it is no manifest of this kind, or of another format.
            StorageError: the operating system refused to read it.
        """
        again = f"`{MADE_BY[kind]}`" if kind else "the stage that left it"
        cure = f"restore it from Git, or make it again with {again}"
        try:
            content = regular.content(path, MAX_BYTES)
        except FileNotFoundError:
            raise MissingError(path, "not there", f"run {again}") from None
        except IrregularError as error:
            raise DamagedError(path, f"no manifest: it {error.problem}", cure) from error
        try:
            manifest = cls.model_validate_json(content)
            if manifest.encoded != content:
                # Duplicate keys or other spellings of numbers: not written by this program.
                raise ValueError("not in canonical form")
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DamagedError(
                path, f"no manifest: {shown(place)}: {first['msg']}", cure
            ) from error
        except (ValueError, RecursionError) as error:
            raise DamagedError(path, f"no manifest: {shown(error)}", cure) from error
        if kind and manifest.kind != kind:
            raise DamagedError(path, f"a manifest of {manifest.kind}, not of {kind}", cure)
        return manifest


def _is_refused(error: StorageError, numbers: Collection[int]) -> bool:
    """Whether the operating system refused something for one of these reasons."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in numbers


def _inode(path: Path) -> int | None:
    """Returns the inode of the file of this name; None if there is none."""
    with durable.named(path, "looking for it"):
        try:
            return path.lstat().st_ino
        except FileNotFoundError:
            return None


def check_made_by(manifest: Manifest, names: Iterable[str]) -> None:
    """Raise unless each object of a manifest stands under its fingerprint, of those that its recipe has.

    Raises:
        DamagedError: names the first that does not.
    """
    for entry, name in zip(manifest.objects, names, strict=False):
        if entry.key.split("/")[1] != name:
            raise DamagedError(
                f"{manifest.kind} manifest",
                f"its recipe has the fingerprint {name}, but it names {entry.key}",
                f"restore it from Git, or make it again with `{MADE_BY[manifest.kind]}`",
            )


def fingerprint(recipe: dict[str, Any]) -> str:
    """40 hex digits naming a recipe. Floats are allowed: Python prints the shortest exact form."""
    return digest(canonical_json(json.loads(json.dumps(recipe, allow_nan=False))))
