"""Vectors in place of a teacher's: `teachonce import` takes them from files, `join` from other caches."""

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


def run(workspace: Workspace, vectors: Path, texts: Path) -> Outcome:
    """Import the vectors of the corpus into the store and write their manifest, as `embed` would.

    The import is recorded in data/sources.json, so neither `check` nor `embed` nor a clone needs the files
    again. Imports under one name add up: a text whose vector is in the store needs none in the file.

    Args:
        workspace: The work tree; its corpus must exist.
        vectors: A .npy file of shape (texts, dim).
        texts: The file of the texts, in the same order.

    Raises:
        SettingsError: embed.teacher names a model.
        TeachonceError: a file is malformed, the two do not match, or a text had another vector before.
        MissingError: a text of the corpus has no vector yet; the imported ones are kept.
    """
    params = workspace.params.embed
    _check_takes_vectors(workspace)
    corpus = workspace.corpus()
    imported = vector_files.read(vectors, texts, field=workspace.params.shard.field)
    files = _name_of(workspace, imported.dim)
    used = vector_files.put(
        imported,
        corpus=corpus,
        store=workspace.store,
        teacher=fingerprint(embed.recipe(params, files)),
        storage=params.storage,
    )
    outcome = _adopt(workspace, files)
    count, dim = imported.vectors.shape
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
        outcome,
        stage="import",
        summary=(f"{used:,} of {count:,} vectors of {dim} numbers{covered}{spare}"),
        facts={
            "vectors": count,
            "dim": dim,
            "unused": unused,
            "before": before,
            "bytes": outcome.facts["bytes"],
            "fingerprint": outcome.facts["fingerprint"],
        },
    )


def join(workspace: Workspace, manifests: Sequence[Path]) -> Outcome:
    """Publish joined vectors of several teachers and write their manifest, as `embed` would.

    Args:
        workspace: The work tree; its corpus must exist.
        manifests: Two or more manifests of embeddings of this corpus, in the order of concatenation.

    Raises:
        SettingsError: embed.teacher names a model.
        TeachonceError: fewer than two manifests, or one that is not there or of another corpus.
    """
    params = workspace.params.embed
    _check_takes_vectors(workspace)
    if len(manifests) < 2:
        raise TeachonceError(
            "join", f"{len(manifests)} manifest to join", "name two or more, one for each teacher"
        )
    corpus = workspace.corpus()
    teachers = [
        Embeddings(workspace.store, Manifest.load(path, "embeddings"), corpus) for path in manifests
    ]
    files = joined.files_of(teachers)
    joined.put(
        teachers,
        corpus=corpus,
        store=workspace.store,
        teacher=fingerprint(embed.recipe(params, files)),
        storage=params.storage,
    )
    outcome = _adopt(workspace, files)
    widths = " + ".join(str(teacher.dim) for teacher in teachers)
    return replace(
        outcome,
        stage="join",
        summary=f"{corpus.rows:,} vectors of {widths} numbers, of {len(teachers)} teachers",
        facts={
            "teachers": len(teachers),
            "dim": sum(teacher.dim for teacher in teachers),
            "bytes": outcome.facts["bytes"],
            "fingerprint": outcome.facts["fingerprint"],
        },
    )


def _name_of(workspace: Workspace, dim: int) -> dict[str, str]:
    """Returns the entry of imported vectors in the recipe: their name and width.

    Older versions used the hashes of the two files. A cache imported here by such a version keeps its
    fingerprint, and new imports are added to it.
    """
    params = workspace.params.embed
    entry = read_sources(workspace.at.sources).get("teacher", {})
    files: dict[str, str] = entry.get("files", {})
    if entry.get("declared", {}).get("name") == params.teacher and set(files) == {
        "vectors",
        "texts",
    }:
        teacher = fingerprint(embed.recipe(params, files))
        keys = workspace.store.keys(f"vectors/{teacher}")
        if not keys or matrix_of(workspace.store.glance(keys[0]), "vector").shape[1] == dim:
            return files
    return {"imported": params.teacher.removeprefix(IMPORTED), "dim": str(dim)}


def _check_takes_vectors(workspace: Workspace) -> None:
    teacher = workspace.params.embed.teacher
    if not workspace.params.embed.is_imported:
        problem = f"{teacher} is a model; write {IMPORTED}NAME, with a name of your choice"
        raise SettingsError(workspace.at.params.name, [("embed.teacher", problem)])


def _adopt(workspace: Workspace, files: dict[str, str]) -> Outcome:
    """Write the manifest of the work tree's embeddings from the shards in the store."""
    workspace.adopt_teacher(files)
    return embed.run(
        workspace.params.embed,
        files=files,
        corpus=workspace.corpus(),
        store=workspace.store,
        remote=None,
        load_teacher=None,
        out=workspace.at.embeddings,
        facts=workspace.at.stage_facts("embed"),
        mixes=workspace.at.mixes,
    )
