"""Vectors in the place of a teacher's: `teachonce import` takes them from files, `join` from caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.workspace import Workspace
from stages import embed
from stages.check import read_sources
from stages.outcome import Outcome
from stages.params import IMPORTED, SettingsError
from stages.teaching import joined, vector_files
from storage.column import matrix_of
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.manifest import Manifest, fingerprint


def run(here: Workspace, vectors: Path, texts: Path) -> Outcome:
    """Put the vectors of the corpus into the store and leave their manifest, as `embed` would.

    What was imported is noted in data/sources.json, so neither file is needed again: not by `check`, not
    by `embed`, and in no clone. Imports of one name add up: a text whose vector is in the store under it
    needs none in the file.

    Args:
        here: The work tree; its corpus is made already.
        vectors: A .npy file of shape (texts, dim).
        texts: Their texts in the same order.

    Raises:
        SettingsError: embed.teacher names a model.
        TeachonceError: the two files do not fit each other or what was imported before, or are not what
            they should be.
        MissingError: a text of the corpus has no vector yet; what was given is kept.
    """
    params = here.params.embed
    _check_takes_vectors(here)
    corpus = here.corpus()
    given = vector_files.read(vectors, texts, field=here.params.shard.field)
    files = _name_of(here, given.dim)
    used = vector_files.put(
        given,
        corpus=corpus,
        store=here.store,
        teacher=fingerprint(embed.recipe(params, files)),
        storage=params.storage,
    )
    found = _adopt(here, files)
    count, dim = given.vectors.shape
    unused, before = count - used, corpus.rows - used
    covered = (
        f"; {before:,} texts of the corpus were imported before"
        if before
        else ", for all texts of the corpus"
    )
    spare = (
        f"; {unused:,} not used: no text of the corpus, or one that came before" if unused else ""
    )
    return replace(
        found,
        stage="import",
        summary=(f"{used:,} of {count:,} vectors of {dim} numbers{covered}{spare}"),
        facts={
            "vectors": count,
            "dim": dim,
            "unused": unused,
            "before": before,
            "bytes": found.facts["bytes"],
            "fingerprint": found.facts["fingerprint"],
        },
    )


def join(here: Workspace, manifests: Sequence[Path]) -> Outcome:
    """Put joined vectors of several teachers into the store and leave their manifest, as `embed` would.

    Args:
        here: The work tree; its corpus is made already.
        manifests: Two or more manifests of embeddings of this corpus, in the order of the values.

    Raises:
        SettingsError: embed.teacher names a model.
        TeachonceError: fewer than two manifests, or one that is not there or of another corpus.
    """
    params = here.params.embed
    _check_takes_vectors(here)
    if len(manifests) < 2:
        raise TeachonceError(
            "join", f"{len(manifests)} manifest to join", "name two or more, one for each teacher"
        )
    corpus = here.corpus()
    teachers = [
        Embeddings(here.store, Manifest.load(path, "embeddings"), corpus) for path in manifests
    ]
    files = joined.files_of(teachers)
    joined.put(
        teachers,
        corpus=corpus,
        store=here.store,
        teacher=fingerprint(embed.recipe(params, files)),
        storage=params.storage,
    )
    found = _adopt(here, files)
    widths = " + ".join(str(teacher.dim) for teacher in teachers)
    return replace(
        found,
        stage="join",
        summary=f"{corpus.rows:,} vectors of {widths} numbers, of {len(teachers)} teachers",
        facts={
            "teachers": len(teachers),
            "dim": sum(teacher.dim for teacher in teachers),
            "bytes": found.facts["bytes"],
            "fingerprint": found.facts["fingerprint"],
        },
    )


def _name_of(here: Workspace, dim: int) -> dict[str, str]:
    """What stands for imported vectors in the recipe: the name given to them, and their width.

    Until this was so, it was the hashes of the two files. Where such a cache was imported here under this
    name, its vectors keep the name they have, and what is imported now is added to them.
    """
    params = here.params.embed
    entry = read_sources(here.at.sources).get("teacher", {})
    files: dict[str, str] = entry.get("files", {})
    if entry.get("declared", {}).get("name") == params.teacher and set(files) == {
        "vectors",
        "texts",
    }:
        teacher = fingerprint(embed.recipe(params, files))
        keys = here.store.keys(f"vectors/{teacher}")
        if not keys or matrix_of(here.store.glance(keys[0]), "vector").shape[1] == dim:
            return files
    return {"imported": params.teacher.removeprefix(IMPORTED), "dim": str(dim)}


def _check_takes_vectors(here: Workspace) -> None:
    teacher = here.params.embed.teacher
    if not here.params.embed.is_imported:
        problem = f"{teacher} is a model; write {IMPORTED}NAME, with a name of your choice"
        raise SettingsError(here.at.params.name, [("embed.teacher", problem)])


def _adopt(here: Workspace, files: dict[str, str]) -> Outcome:
    """Make what is in the store the work tree's embeddings."""
    here.adopt_teacher(files)
    return embed.run(
        here.params.embed,
        files=files,
        corpus=here.corpus(),
        store=here.store,
        remote=None,
        load_teacher=None,
        out=here.at.embeddings,
        facts=here.at.stage_facts("embed"),
    )
