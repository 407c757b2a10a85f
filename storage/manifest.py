"""Manifests: the small JSON files that a stage leaves behind, tracked by Git and DVC.

A manifest says what was made (kind), by which settings (recipe), from what (parent) and which objects
of the store hold it, in order. It holds no time, host or path: equal inputs give equal bytes.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import time
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from storage import durable
from storage.errors import DamagedError, MissingError, shown
from storage.store import Object, Store, canonical_json, digest

Kind = Literal["corpus", "embeddings", "negatives"]

# 1 TB of 64 MB objects is 3 MB of JSON; more than this is no manifest of ours, and is not read.
MAX_BYTES = 64 << 20

MADE_BY = {
    "corpus": "teachonce shard",
    "embeddings": "teachonce embed",
    "negatives": "teachonce mine",
}


class Manifest(BaseModel):
    """One kind of column over a whole corpus.

    Args:
        kind: What the objects hold.
        recipe: Settings (and hashes of model files) that decide the values; see each stage's `recipe`.
        parent: `content` of the manifests it was made from; None for a corpus.
        objects: In the order of their rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Kind
    recipe: dict[str, Any]
    parent: str | None
    objects: tuple[Object, ...]

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
        """What the objects hold, whatever recipe led there: equal objects give equal content."""
        return digest(canonical_json([[entry.key, entry.sha256] for entry in self.objects]))

    @property
    def encoded(self) -> bytes:
        """The bytes of the manifest file."""
        return canonical_json(self.model_dump(mode="json"))

    def save(self, path: Path, store: Store) -> None:
        """Write the manifest and leave a note in the store that it exists."""
        self.leave_note(path, store)
        durable.replace(path, self.encoded)

    def leave_note(self, path: Path, store: Store) -> None:
        """Note in the store that the manifest `path` names objects of it.

        The note is what keeps the objects of one person from being cleaned away by another.
        """
        durable.replace(store.root / self.ref, self.note(path))

    @property
    def ref(self) -> str:
        """Where the note of this manifest lies, in a store as on a remote."""
        return f"refs/{digest(self.encoded)}.json"

    def note(self, path: Path) -> bytes:
        """The manifest with who has it, when, on which machine and where (`path`)."""
        made = {
            "by": getpass.getuser(),
            "on": platform.node(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "in": str(path.resolve().parent),
        }
        return canonical_json({"manifest": self.model_dump(mode="json"), "made": made})

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
        with durable.named(path, "reading"):
            try:
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    content = file.read() if size <= MAX_BYTES else b""
            except FileNotFoundError:
                raise MissingError(path, "not there", f"run {again}") from None
            except IsADirectoryError as error:
                raise DamagedError(path, "a folder, no manifest", cure) from error
        if size > MAX_BYTES:
            raise DamagedError(path, f"{size} bytes are too many for a manifest", cure)
        try:
            manifest = cls.model_validate_json(content)
            if manifest.encoded != content:
                # Duplicate keys, numbers in other clothes: somebody else wrote it.
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


def check_made_by(manifest: Manifest, recipe: dict[str, Any]) -> None:
    """Raise unless every object of a manifest stands under the fingerprint of `recipe`.

    Raises:
        DamagedError: names the first that does not.
    """
    name = fingerprint(recipe)
    for entry in manifest.objects:
        if entry.key.split("/")[1] != name:
            raise DamagedError(
                f"{manifest.kind} manifest",
                f"its recipe has the fingerprint {name}, but it names {entry.key}",
                f"restore it from Git, or make it again with `{MADE_BY[manifest.kind]}`",
            )


def fingerprint(recipe: dict[str, Any]) -> str:
    """40 hex digits naming a recipe. Floats are allowed: Python prints the shortest exact form."""
    return digest(canonical_json(json.loads(json.dumps(recipe, allow_nan=False))))
