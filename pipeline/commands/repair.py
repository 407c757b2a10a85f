"""`teachonce repair`: what is damaged is moved away, and exactly that and what is missing is made again."""

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
from storage.remote import RemoteError
from storage.store import Store
from storage.upkeep.difference import differing
from storage.upkeep.examination import quarantine
from storage.upkeep.inventory import read_refs


def run(here: Workspace) -> tuple[Outcome, TeachonceError | None]:
    """Move damaged objects into quarantine, and make them and the missing ones again; nothing else.

    Every object of this work tree's manifests is read. A whole one stays, other copies too. What the
    remote has, if there is one, is brought; else texts come from the sources, vectors from the teacher and
    negatives from the vectors; token ids are made by whoever needs them. Nothing is made by other settings
    than the manifest's: that would be a new cache.

    Returns:
        What was done, and what ended it, if anything did: a `MissingError` if something can't be made
        again here (it says where or how), a `StorageError` if an object could not be opened, which is no
        proof of damage. What is moved is moved.

    Raises:
        DamagedError: a manifest is damaged, so nobody knows what to look at.
        MissingError: there is no manifest, or no store.
    """
    here.renew()
    manifests, broken = manifests_of(here.at)
    if broken:
        raise broken[0]
    entries = entries_of(here.store, manifests.values())
    moved: dict[str, str] = {}
    brought: list[str] = []
    lost: dict[Kind, list[str]] = {}
    failure: TeachonceError | None = None
    try:
        _move_damaged(here.store, list(entries), moved)
        _bring(here, manifests, brought)
        lost = _missing(here.store, manifests)
        _make_again(here, manifests, lost)
    except TeachonceError as error:
        failure = error
    still = _missing(here.store, manifests)
    made = {kind: [key for key in keys if key not in still[kind]] for kind, keys in lost.items()}
    changed = [
        str(path.relative_to(here.at.root))
        for kind, path in here.at.manifests.items()
        if kind in manifests and Manifest.load(path, kind).encoded != manifests[kind].encoded
    ]
    words = {"corpus": "texts", "embeddings": "vectors", "negatives": "negatives"}
    again = ", ".join(f"{len(keys)} of {words[kind]}" for kind, keys in made.items() if keys)
    outcome = Outcome(
        stage="repair",
        made=here.store.root,
        summary=(
            f"{len(entries):,} objects read, {len(moved)} damaged and moved to quarantine; made again: "
            f"{again or 'none'}"
            + (f"; brought from the remote: {len(brought)}" if brought else "")
            + (f"; still missing: {left}" if (left := sum(map(len, still.values()))) else "")
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
            "brought": brought,
            "made": made,
            "missing": still,
            "changed": changed,
        },
    )
    return outcome, failure


def _missing(store: Store, manifests: Manifests) -> dict[Kind, list[str]]:
    """The keys of each manifest under which nothing is in the store."""
    return {
        kind: [entry.key for entry in manifest.objects if not store.has(entry.key)]
        for kind, manifest in manifests.items()
    }


def _bring(here: Workspace, manifests: Manifests, brought: list[str]) -> None:
    """Pull what is missing, as far as the remote has the very copy; note in `brought` what came."""
    missing = {key for keys in _missing(here.store, manifests).values() for key in keys}
    remote = here.remote() if missing else None
    if remote is None:
        return
    named = {entry.key: entry for manifest in manifests.values() for entry in manifest.objects}
    for key in sorted(missing):
        try:
            if remote.pull(named[key], here.store):
                brought.append(key)
        except RemoteError as error:
            log.warning("repair: %s; going on without it", error)
            return
        except (AnotherCopyError, DamagedError) as error:
            log.warning("repair: not taken: %s", error)


def _make_again(here: Workspace, manifests: Manifests, lost: Mapping[Kind, list[str]]) -> None:
    if lost.get("corpus"):
        _texts_again(here, lost["corpus"])
    if lost.get("embeddings"):
        _vectors_again(here, manifests, len(lost["embeddings"]))
    if lost.get("negatives"):
        _negatives_again(here, manifests, len(lost["negatives"]))


def _move_damaged(store: Store, keys: list[str], moved: dict[str, str]) -> None:
    """Note in `moved` where each object is now that failed its own check."""
    progress = Progress("repair", total=len(keys), unit="objects")
    for key in keys:
        if target := quarantine(store, key):
            log.warning("repair: %s is damaged; it is now %s", key, target)
            moved[key] = str(target)
        progress.advance(1)


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
    # What was imported is nowhere else either: embed says how to import it again.
    if load_teacher is None and remote is None and not here.params.embed.is_imported:
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
        engine=here.engine(),
    )


def _teacher_is_elsewhere(store: Store, manifest: Manifest, lost: int) -> MissingError:
    return MissingError(
        "embed.teacher",
        f"{lost} shards of vectors are lost, and the teacher is not on this machine",
        f"run `teachonce repair` on this store where it is{_made_where(store, manifest)}",
    )


def _negatives_again(here: Workspace, manifests: Manifests, lost: int) -> None:
    from stages.models.devices import pick_device

    manifest = manifests["negatives"]
    corpus, embeddings, split = here.corpus(), here.embeddings(), here.split()
    params, device = (
        mine.as_made(here.params.mine, manifest.recipe),
        pick_device(here.params.device),
    )
    rows = len(split.train_rows(corpus))
    index = mine.resolve(params, rows=rows, dim=embeddings.dim, device=device)
    _check_settings(here.at.negatives, manifest, mine.recipe(params, index), lost)
    if manifest.parent != mine.parent_of(embeddings, split):
        raise MissingError(
            here.at.negatives,
            f"mined from other vectors or another split, so its {lost} lost objects cannot be made again",
            "run `dvc repro`, or `teachonce mine`, for new ones",
        )
    mine.run(
        params,
        corpus=corpus,
        embeddings=embeddings,
        split=split,
        store=here.store,
        device=device,
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
