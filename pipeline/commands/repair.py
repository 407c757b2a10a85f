"""`teachonce repair`: quarantine damaged objects, then make them and the missing ones again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.commands.verify import Manifests, entries_of, manifests_of
from pipeline.workspace import Workspace
from stages import embed, mine, shard
from stages.outcome import Outcome, Progress, log
from stages.params import SettingsError
from storage.errors import AnotherCopyError, DamagedError, MissingError, TeachonceError
from storage.manifest import MADE_BY, Kind, Manifest
from storage.negatives import parent_of
from storage.remote import RemoteError
from storage.store import Store
from storage.upkeep.difference import differing
from storage.upkeep.examination import quarantine
from storage.upkeep.inventory import read_refs


def run(workspace: Workspace) -> tuple[Outcome, TeachonceError | None]:
    """Move damaged objects into quarantine, and make them and the missing ones again; nothing else.

    It is long because all damage is examined, moved and made again in one order that loses nothing.

    Every object of this work tree's manifests is read. Intact objects stay, other copies included. Missing
    ones are fetched from the remote; else texts are made from the sources, vectors by the teacher and
    negatives from the vectors. Token ids are left to the stages that need them. Nothing is made with other
    settings than the manifest's, since that would be a new cache.

    Returns:
        The outcome, and the error that ended the repair, or None: a `MissingError` if an object can't be
        made again here (it says where or how), a `StorageError` if an object could not be opened, which is
        no proof of damage. Quarantined objects stay there.

    Raises:
        DamagedError: a manifest is damaged, so it is unknown which objects to examine.
        MissingError: there is no manifest, or no store.
    """
    workspace.renew()
    manifests, broken = manifests_of(workspace.at)
    if broken:
        raise broken[0]
    entries = entries_of(workspace.store, manifests.values())
    moved: dict[str, str] = {}
    fetched: list[str] = []
    missing: dict[Kind, list[str]] = {}
    failure: TeachonceError | None = None
    try:
        _move_damaged(workspace.store, list(entries), moved)
        _fetch_missing(workspace, manifests, fetched)
        missing = _missing(workspace.store, manifests)
        _remake(workspace, manifests, missing)
    except TeachonceError as error:
        failure = error
    still_missing = _missing(workspace.store, manifests)
    remade = {
        kind: [key for key in keys if key not in still_missing[kind]]
        for kind, keys in missing.items()
    }
    changed = [
        str(path.relative_to(workspace.at.root))
        for kind, path in workspace.at.manifests.items()
        if kind in manifests and Manifest.load(path, kind).encoded != manifests[kind].encoded
    ]
    words = {
        "corpus": "texts",
        "readings": "readings",
        "embeddings": "vectors",
        "mixes": "mixes",
        "negatives": "negatives",
    }
    remade_counts = ", ".join(
        f"{len(keys)} of {words[kind]}" for kind, keys in remade.items() if keys
    )
    outcome = Outcome(
        stage="repair",
        made=workspace.store.root,
        summary=(
            f"{len(entries):,} objects read, {len(moved)} damaged and moved to quarantine; made again: "
            f"{remade_counts or 'none'}"
            + (f"; brought from the remote: {len(fetched)}" if fetched else "")
            + (
                f"; still missing: {left}"
                if (left := sum(map(len, still_missing.values())))
                else ""
            )
            + (
                f". {' and '.join(changed)} changed (equal settings, other last bits): `dvc repro` "
                "trains what depends on it again"
                if changed
                else ""
            )
        ),
        facts={
            "objects": len(entries),
            "moved": moved,
            "brought": fetched,
            "made": remade,
            "missing": still_missing,
            "changed": changed,
        },
    )
    return outcome, failure


def _missing(store: Store, manifests: Manifests) -> dict[Kind, list[str]]:
    """Returns the keys of each manifest that have no file in the store."""
    return {
        kind: [entry.key for entry in manifest.objects if not store.has(entry.key)]
        for kind, manifest in manifests.items()
    }


def _fetch_missing(workspace: Workspace, manifests: Manifests, fetched: list[str]) -> None:
    """Fetch missing objects if the remote has the same copy; appends their keys to `fetched`."""
    missing = {key for keys in _missing(workspace.store, manifests).values() for key in keys}
    remote = workspace.remote() if missing else None
    if remote is None:
        return
    named = {entry.key: entry for manifest in manifests.values() for entry in manifest.objects}
    for key in sorted(missing):
        try:
            if remote.pull(named[key], workspace.store):
                fetched.append(key)
        except RemoteError as error:
            log.warning("repair: %s; going on without it", error)
            return
        except (AnotherCopyError, DamagedError) as error:
            log.warning("repair: refused from the remote: %s", error)


def _remake(workspace: Workspace, manifests: Manifests, lost: Mapping[Kind, list[str]]) -> None:
    if texts := [*lost.get("corpus", ()), *lost.get("readings", ())]:
        _remake_texts(workspace, texts)
    of_teacher: dict[Kind, int] = {
        kind: len(lost[kind]) for kind in ("embeddings", "mixes") if lost.get(kind)
    }
    if of_teacher:
        _remake_vectors(workspace, manifests, of_teacher)
    if lost.get("negatives"):
        _remake_negatives(workspace, manifests, len(lost["negatives"]))


def _move_damaged(store: Store, keys: list[str], moved: dict[str, str]) -> None:
    """Quarantine each object that fails its own check; adds key -> new path to `moved`."""
    progress = Progress("repair", total=len(keys), unit="objects")
    for key in keys:
        if target := quarantine(store, key):
            log.warning("repair: %s is damaged; it is now %s", key, target)
            moved[key] = str(target)
        progress.advance(1)


def _remake_texts(workspace: Workspace, keys: list[str]) -> None:
    irreproducible = shard.make_again(
        workspace.params.shard,
        root=workspace.at.root,
        store=workspace.store,
        keys=keys,
        distill=workspace.params.distill,
    )
    if irreproducible:
        raise MissingError(
            workspace.at.corpus,
            f"{len(irreproducible)} of its shards of texts or readings are lost, and the sources have "
            f"changed: they do not give them any more (first: {irreproducible[0]})",
            "put the old sources and settings of `shard` back, or run `teachonce shard` for a new corpus",
        )


def _remake_vectors(workspace: Workspace, manifests: Manifests, of_kind: dict[Kind, int]) -> None:
    """Run `embed` for so many lost objects of vectors and mixes, if it makes the same again."""
    corpus, lost = workspace.corpus(), sum(of_kind.values())
    first = manifests[next(iter(of_kind))]
    for kind, count in of_kind.items():
        if manifests[kind].parent != corpus.manifest.content:
            raise MissingError(
                workspace.at.manifests[kind],
                f"older than {workspace.at.corpus.name}, so its {count} lost objects cannot be made again",
                "run `teachonce embed`",
            )
    try:
        files, load_teacher = workspace.teacher()
    except SettingsError as error:
        # Even the hashes of the teacher's files are unknown here.
        raise _teacher_is_elsewhere(workspace.store, first, lost) from error
    params = workspace.embed_params(corpus)
    recipes = embed.recipes(params, files, corpus.roles)
    for kind, count in of_kind.items():
        _check_settings(workspace.at.manifests[kind], manifests[kind], recipes[kind], count)
    remote = workspace.remote()
    # Imported vectors have no teacher anywhere: `embed` says how to import them again.
    if load_teacher is None and remote is None and not workspace.params.embed.is_imported:
        raise _teacher_is_elsewhere(workspace.store, first, lost)
    embed.run(
        params,
        files=files,
        corpus=corpus,
        store=workspace.store,
        load_teacher=load_teacher,
        remote=remote,
        out=workspace.at.embeddings,
        facts=workspace.at.stage_facts("embed"),
        mixes=workspace.at.mixes,
        engine=workspace.engine(),
        journal=workspace.journal,
    )


def _teacher_is_elsewhere(store: Store, manifest: Manifest, lost: int) -> MissingError:
    return MissingError(
        "embed.teacher",
        f"{lost} shards of vectors are lost, and the teacher is not on this machine",
        f"run `teachonce repair` on this store where it is{_makers_phrase(store, manifest)}",
    )


def _remake_negatives(workspace: Workspace, manifests: Manifests, lost: int) -> None:
    from stages.models.devices import pick_device

    manifest = manifests["negatives"]
    corpus, embeddings, split = workspace.corpus(), workspace.embeddings(), workspace.split()
    params, device = (
        mine.with_resolved_index(workspace.params.mine, manifest.recipe),
        pick_device(workspace.params.device),
    )
    asking = mine.rows_of_roles(params, corpus, split.train_rows(corpus))
    pools = mine.pools_of(params, corpus, asking)
    index = mine.resolve(params, rows=mine.largest(pools), dim=embeddings.dim, device=device)
    _check_settings(workspace.at.negatives, manifest, mine.recipe(params, index), lost)
    if manifest.parent != parent_of(embeddings.manifest, split):
        raise MissingError(
            workspace.at.negatives,
            f"mined from other vectors or another split, so its {lost} lost objects cannot be made again",
            "run `dvc repro`, or `teachonce mine`, for new ones",
        )
    mine.run(
        params,
        corpus=corpus,
        embeddings=embeddings,
        split=split,
        store=workspace.store,
        device=device,
        out=workspace.at.negatives,
        facts=workspace.at.stage_facts("mine"),
    )


def _check_settings(path: Path, manifest: Manifest, recipe: dict[str, Any], lost: int) -> None:
    """Raise MissingError if the stage would run with other settings than the lost objects' recipe."""
    if differ := list(differing(manifest.recipe, recipe)):
        raise MissingError(
            path,
            f"made with other settings than those of now ({', '.join(differ)}), so its {lost} lost objects "
            "cannot be made again",
            f"put the old ones back in params.yaml, or run `{MADE_BY[manifest.kind]}` for the new ones",
        )


def _makers_phrase(store: Store, manifest: Manifest) -> str:
    """Returns a phrase with the makers of such objects, from the refs; empty if unknown."""
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
