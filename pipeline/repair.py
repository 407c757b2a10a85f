"""`teachonce repair`: what is damaged is moved away, and exactly that and what is missing is made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.verify import Manifests, entries_of, manifests_of
from pipeline.workspace import Workspace
from stages import embed, mine, shard
from stages.outcome import Outcome, Progress, log
from stages.params import SettingsError
from storage.difference import differing
from storage.errors import MissingError, TeachonceError
from storage.inventory import read_refs
from storage.manifest import MADE_BY, Manifest
from storage.store import Store
from storage.upkeep import quarantine


def run(here: Workspace) -> Outcome:
    """Move damaged objects into quarantine, and make them and the missing ones again; nothing else.

    Every object of this work tree's manifests is read. A whole one stays, other copies too. Texts come
    from the sources, vectors from the teacher, negatives from the vectors; token ids are made by whoever
    needs them. Nothing is made by other settings than the manifest's: that would be a new cache.

    Raises:
        MissingError: something can't be made again here; says where or how. What is moved is moved.
        DamagedError: a manifest is damaged, so nobody knows what to look at.
        StorageError: an object could not be opened, which is no proof of damage: it is where it was.
    """
    manifests, broken = manifests_of(here.at)
    if broken:
        raise broken[0]
    entries = entries_of(here.store, manifests)
    moved = _move_damaged(here.store, list(entries))
    lost = {
        kind: [e.key for e in manifest.objects if not here.store.path(e.key).exists()]
        for kind, manifest in manifests.items()
    }
    if lost.get("corpus"):
        _texts_again(here, lost["corpus"])
    if lost.get("embeddings"):
        _vectors_again(here, manifests, len(lost["embeddings"]))
    if lost.get("negatives"):
        _negatives_again(here, manifests, len(lost["negatives"]))
    changed = [
        str(path.relative_to(here.at.root))
        for kind, path in here.at.manifests.items()
        if kind in manifests and Manifest.load(path, kind).encoded != manifests[kind].encoded
    ]
    made = {kind: len(keys) for kind, keys in lost.items() if keys}
    words = {"corpus": "texts", "embeddings": "vectors", "negatives": "negatives"}
    again = ", ".join(f"{count} of {words[kind]}" for kind, count in made.items()) or "none"
    return Outcome(
        stage="repair",
        made=here.store.root,
        summary=(
            f"{len(entries):,} objects read, {len(moved)} damaged and moved to quarantine; made again: "
            f"{again}"
            + (
                f". {' and '.join(changed)} changed (equal settings, other last bits): `dvc repro` "
                "trains what depends on it again"
                if changed
                else ""
            )
        ),
        facts={"objects": len(entries), "moved": moved, "made": lost, "changed": changed},
    )


def _move_damaged(store: Store, keys: list[str]) -> dict[str, str]:
    """Key -> where it is now, of those that failed their own check."""
    progress = Progress("repair", total=len(keys), unit="objects")
    moved = {}
    for key in keys:
        if target := quarantine(store, key):
            log.warning("repair: %s is damaged; it is now %s", key, target)
            moved[key] = str(target)
        progress.advance(1)
    return moved


def _texts_again(here: Workspace, keys: list[str]) -> None:
    gone = shard.make_again(here.params.shard, root=here.at.root, store=here.store, keys=keys)
    if gone:
        raise MissingError(
            here.at.corpus,
            f"{len(gone)} of its text shards are lost, and the sources have changed: they do not give "
            f"them any more (first: {gone[0]})",
            "put the old sources and settings of `shard` back, or run `teachonce shard` for a new corpus",
        )


def _vectors_again(here: Workspace, manifests: Manifests, lost: int) -> None:
    manifest = manifests["embeddings"]
    corpus = here.corpus()
    if manifest.parent != corpus.manifest.content:
        raise MissingError(
            here.at.embeddings,
            f"older than {here.at.corpus.name}, so its {lost} lost objects cannot be made again",
            "run `teachonce embed`",
        )
    try:
        files, load_teacher = here.teacher()
    except SettingsError as error:
        # Not even its hashes are here.
        raise _teacher_is_elsewhere(here.store, manifest, lost) from error
    _check_settings(here.at.embeddings, manifest, embed.recipe(here.params.embed, files), lost)
    remote = here.remote()
    if load_teacher is None and remote is None:
        raise _teacher_is_elsewhere(here.store, manifest, lost)
    embed.run(
        here.params.embed,
        files=files,
        corpus=corpus,
        store=here.store,
        load_teacher=load_teacher,
        remote=remote,
        out=here.at.embeddings,
        facts=here.at.stage_facts("embed"),
    )


def _teacher_is_elsewhere(store: Store, manifest: Manifest, lost: int) -> MissingError:
    return MissingError(
        "embed.teacher",
        f"{lost} shards of vectors are lost, and the teacher is not on this machine",
        f"run `teachonce repair` on this store where it is{_made_where(store, manifest)}",
    )


def _negatives_again(here: Workspace, manifests: Manifests, lost: int) -> None:
    manifest = manifests["negatives"]
    embeddings, split = here.embeddings(), here.split()
    _check_settings(here.at.negatives, manifest, mine.recipe(here.params.mine), lost)
    if manifest.parent != mine.parent_of(embeddings, split):
        raise MissingError(
            here.at.negatives,
            f"mined from other vectors or another split, so its {lost} lost objects cannot be made again",
            "run `dvc repro`, or `teachonce mine`, for new ones",
        )
    mine.run(
        here.params.mine,
        corpus=here.corpus(),
        embeddings=embeddings,
        split=split,
        store=here.store,
        out=here.at.negatives,
        facts=here.at.stage_facts("mine"),
    )


def _check_settings(path: Path, manifest: Manifest, recipe: dict[str, Any], lost: int) -> None:
    """Raise if running the stage would make something else than what was lost."""
    if differ := list(differing(manifest.recipe, recipe)):
        raise MissingError(
            path,
            f"made with other settings than those of now ({', '.join(differ)}), so its {lost} lost objects "
            "cannot be made again",
            f"put the old ones back in params.yaml, or run `{MADE_BY[manifest.kind]}` for the new ones",
        )


def _made_where(store: Store, manifest: Manifest) -> str:
    """Who made vectors like these, and where, as far as the refs say."""
    try:
        refs, _ = read_refs(store.root)
    except TeachonceError:
        return ""
    makers = {
        ref.maker: None
        for ref in refs
        if ref.manifest.kind == manifest.kind and ref.manifest.recipe == manifest.recipe
    }
    return f": such vectors were made by {'; '.join(makers)}" if makers else ""
