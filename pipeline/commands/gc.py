"""`teachonce gc`: delete store objects that no ref keeps.

The store is shared, so the refs of all holders count, and not only this work tree's manifests.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.commands.ls import bytes_of, other_lines, sizes_of, some
from stages.outcome import Facts, Outcome
from storage import durable, trash
from storage.errors import DamagedError, shown
from storage.holders import REFS, describe
from storage.upkeep.inventory import (
    DAY,
    File,
    Inventory,
    Ref,
    Sweep,
    check_store,
    find_ref,
    key_aside,
    plan_sweep,
    read_refs,
    take_inventory,
)


def run(
    root: Path,
    *,
    delete: bool,
    quarantine: bool = False,
    forget: Sequence[str] = (),
    forget_gone: bool = False,
    grace_days: float,
) -> Outcome:
    """Delete the objects that no ref keeps; without `delete` only list them.

    A running worker loses nothing: its objects stay while its folder is younger than `grace_days` (see
    `plan_sweep`), its scratch file stays for a day, and objects that a ref names at the last moment are put
    back (see storage/trash.py). Objects of an interrupted run that is not resumed for `grace_days` are
    deleted; they may be weeks of a GPU, so the command's default is two weeks.

    Args:
        root: The folder of the store.
        delete: Delete, instead of a dry run.
        quarantine: Delete quarantined objects, too.
        forget: Prefixes of the names of refs to remove first; each must match one ref.
        forget_gone: Remove the refs of holders whose folder on this machine is gone, too.
        grace_days: Age in days below which a folder's objects are kept, >= 0.

    Raises:
        DamagedError: a ref cannot be read; nothing is removed, not even a ref.
        MissingError: there is no store, or it has no refs folder.
        TeachonceError: a prefix in `forget` matches no ref, or more than one.
    """
    check_store(root)  # a wrong path is not a store without refs
    forgotten = [find_ref(root, prefix) for prefix in forget]
    if forget_gone:
        abandoned = [root / REFS / f"{ref.name}.json" for ref in read_refs(root)[0] if ref.is_gone]
        forgotten += [path for path in abandoned if path not in forgotten]
    names = {path.stem for path in forgotten}
    needed = _still_needed(names, _all_refs(root, names)) if names else {}
    if delete:
        for path in forgotten:
            durable.remove(path)
    # Removed refs are not ignored again: a holder may have written its ref anew in this moment.
    inventory, sweep = _survey(root, () if delete else names, grace_days)
    put_back: tuple[File, ...] = ()
    if delete:
        put_back = _delete(root, inventory, sweep, grace_days=grace_days)
        for file in inventory.quarantine if quarantine else ():
            durable.remove(root / file.name)
    orphans = _without(sweep.orphans, put_back)
    scratch = _without(sweep.scratch, put_back)
    doomed = [*orphans, *scratch, *(inventory.quarantine if quarantine else ())]
    return Outcome(
        stage="gc",
        made=root,
        summary=(
            f"{len(orphans):,} objects that no ref names, {_size(orphans)}, "
            f"{len(scratch)} scratch files and API answers of dead writers"
            + (f", {len(inventory.quarantine)} files in quarantine" if quarantine else "")
            + (
                f": deleted, {_size(doomed)} freed"
                if delete
                else f": `--delete` would free {_size(doomed)}; this was a dry run"
            )
        ),
        facts={
            "deleted": delete,
            "grace_days": grace_days,
            "forgotten": sorted(names),
            "still_needed": needed,
            "bytes": sum(file.bytes for file in doomed),
            "orphans": sizes_of(orphans),
            "put_back": sizes_of(put_back),
            "young": sizes_of(sweep.young),
            "scratch": sizes_of(scratch),
            "live": sizes_of(sweep.live),
            "emptied": sizes_of(inventory.quarantine if quarantine else ()),
            "quarantine": sizes_of(() if quarantine else inventory.quarantine),
            "foreign": sizes_of(inventory.foreign),
        },
    )


def _survey(root: Path, forgotten: Collection[str], grace_days: float) -> tuple[Inventory, Sweep]:
    """Returns the inventory of a store and what can be deleted from it.

    Objects that a gc has taken away count as if they were in place: that gc was killed, or is running.
    """
    # In this order: see `plan_sweep`.
    inventory = take_inventory(root)
    refs = [ref for ref in _all_refs(root, forgotten) if ref.name not in forgotten]
    objects = tuple(
        {file.name: file for file in [*_at_their_places(inventory), *inventory.objects]}.values()
    )
    now = time.time()
    sweep = plan_sweep(replace(inventory, objects=objects), refs, now=now, grace=grace_days * DAY)
    return inventory, sweep


def _at_their_places(inventory: Inventory) -> Iterator[File]:
    for file in inventory.aside:
        key = key_aside(file.name)
        assert key is not None, file
        yield replace(file, name=key)


def _delete(root: Path, before: Inventory, sweep: Sweep, *, grace_days: float) -> tuple[File, ...]:
    """Delete the files of `sweep` that are still unneeded; returns those that were kept.

    storage/trash.py explains why the steps are in this order.
    """
    gc = trash.begin(root)
    try:
        for file in sweep.orphans:
            trash.take_away(root / file.name, gc)
        now, plan = _survey(root, (), grace_days)
    except BaseException:
        for file in sweep.orphans:
            path = root / file.name
            trash.put_back(path.with_name(trash.name_aside(path.name, gc)))
        trash.end(root, gc)
        raise
    # A changed time means that a stage has found the object since then.
    before_gc = {(file.name, file.written) for file in [*_at_their_places(before), *before.objects]}
    orphans = {file.name for file in plan.orphans}
    to_delete = {
        aside: file
        for aside, file in zip(now.aside, _at_their_places(now), strict=True)
        if file.name in orphans and (file.name, file.written) in before_gc
    }
    for aside in now.aside:
        if aside not in to_delete:
            trash.put_back(root / aside.name)
    scratch = [file for file in sweep.scratch if file.name in {left.name for left in plan.scratch}]
    # Marks of killed gcs; the files that those took away were decided about above.
    marks = [mark for mark in now.marks if time.time() - mark.written >= DAY]
    for file in [*to_delete, *scratch, *marks]:
        durable.remove(root / file.name)
    trash.end(root, gc)
    return _without([*sweep.orphans, *sweep.scratch], [*to_delete.values(), *scratch])


def _without(files: Iterable[File], kept: Iterable[File]) -> tuple[File, ...]:
    names = {file.name for file in kept}
    return tuple(file for file in files if file.name not in names)


def _still_needed(forgotten: set[str], refs: Sequence[Ref]) -> dict[str, dict[str, Any]]:
    """Returns for each forgotten ref the other refs that need some of its objects, with their number."""
    keys = {ref.name: {entry.key for entry in ref.manifest.objects} for ref in refs}
    return {
        name: {
            other.name: {**other.made, "objects": shared, "of": len(keys[name])}
            for other in refs
            if other.name not in forgotten and (shared := len(keys[name] & keys[other.name]))
        }
        for name in sorted(forgotten & keys.keys())
    }


def lines(facts: Facts) -> Iterator[str]:
    """Yield lines for people: by folder, what is deleted and what is kept."""
    word = "deleted" if facts["deleted"] else "would go"
    yield from (f"{word}: ref {name}" for name in facts["forgotten"])
    for others in facts["still_needed"].values():
        yield from (
            f"  {other['objects']:,} of its {other['of']:,} objects are needed by {describe(other)}"
            f" (ref {other_name})"
            for other_name, other in others.items()
        )
    yield from _by_folder(word, facts["orphans"])
    yield from some(f"{word}: {name}" for name in facts["scratch"])
    yield from some(f"{word}: {shown(name)}" for name in facts["emptied"])
    yield from _by_folder("kept, needed or touched meanwhile", facts["put_back"])
    yield from _by_folder(
        f"kept, younger than {facts['grace_days']:g} days (--grace)", facts["young"]
    )
    yield from some(f"kept, younger than a day: {name}" for name in facts["live"])
    yield from other_lines(facts)


def _all_refs(root: Path, forgotten: Collection[str]) -> list[Ref]:
    """Returns all refs; raises if one is unreadable, since it may keep anything, unless it is forgotten."""
    refs, unreadable = read_refs(root)
    blocking = [error for error in unreadable if Path(error.where).stem not in forgotten]
    if blocking:
        names = "; ".join(f"{shown(Path(e.where).name)}: {e.problem}" for e in blocking)
        raise DamagedError(
            root / REFS,
            f"{len(blocking)} refs cannot be read, so nobody knows what they keep ({names})",
            blocking[0].cure,
        )
    return refs


def _by_folder(word: str, sizes: Mapping[str, int]) -> Iterator[str]:
    folders: dict[str, list[int]] = defaultdict(list)
    for name, size in sizes.items():
        folders[name.rpartition("/")[0]].append(size)
    for folder, sizes_in_folder in folders.items():
        yield f"{word}: {folder}: {len(sizes_in_folder):,} objects, {bytes_of(sum(sizes_in_folder))}"


def _size(files: Iterable[File]) -> str:
    return bytes_of(sum(file.bytes for file in files))
