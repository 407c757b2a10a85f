"""`teachonce gc`: away with what nobody needs.

The store is shared, so this goes by everybody's refs, and not by this work tree's manifests.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.ls import bytes_of, other_lines, sizes_of, some
from stages.outcome import Facts, Outcome
from storage import durable
from storage.errors import DamagedError, shown
from storage.inventory import (
    DAY,
    REFS,
    File,
    Ref,
    find_ref,
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
    grace_days: float,
) -> Outcome:
    """Delete what no ref keeps; without `delete` only say what that would be.

    A running worker is safe: its objects stay while its folder is younger than `grace_days` (see
    `plan_sweep`), its scratch file for a day. An interrupted run that nobody resumes for so long is not:
    its objects are listed before they go. They may be weeks of a GPU, and waiting costs some disk only, so
    the command waits two weeks. A run that takes up such objects in the moment in which they are deleted
    finds at its end that they vanished, and says to run again; nothing wrong is written.

    Args:
        root: The store.
        delete: Do it.
        quarantine: Also what `repair` moved away.
        forget: Beginnings of the names of refs to remove first.
        grace_days: >= 0.

    Raises:
        DamagedError: a ref cannot be read; nothing is removed, not even a ref.
        MissingError: there is no store, or it has no refs folder.
        TeachonceError: `forget` names no ref, or more than one.
    """
    take_inventory(root)  # a wrong path is not a store without refs
    forgotten = [find_ref(root, prefix) for prefix in forget]
    names = {path.stem for path in forgotten}
    _refs_but(root, names)
    if delete:
        for path in forgotten:
            durable.remove(path)
    # In this order: see `plan_sweep`.
    inventory = take_inventory(root)
    refs = _refs_but(root, names)
    sweep = plan_sweep(inventory, refs, now=time.time(), grace=grace_days * DAY)
    doomed = [*sweep.orphans, *sweep.scratch, *(inventory.quarantine if quarantine else ())]
    if delete:
        for file in doomed:
            durable.remove(root / file.name)
    return Outcome(
        stage="gc",
        made=root,
        summary=(
            f"{len(sweep.orphans):,} objects that no ref names, {_size(sweep.orphans)}, "
            f"{len(sweep.scratch)} scratch files of dead writers"
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
            "bytes": sum(file.bytes for file in doomed),
            "orphans": sizes_of(sweep.orphans),
            "young": sizes_of(sweep.young),
            "scratch": sizes_of(sweep.scratch),
            "live": sizes_of(sweep.live),
            "emptied": sizes_of(inventory.quarantine if quarantine else ()),
            "quarantine": sizes_of(() if quarantine else inventory.quarantine),
            "foreign": sizes_of(inventory.foreign),
        },
    )


def lines(facts: Facts) -> Iterator[str]:
    """For people: by folder, what goes and what is left alone."""
    word = "deleted" if facts["deleted"] else "would go"
    yield from (f"{word}: ref {name}" for name in facts["forgotten"])
    yield from _by_folder(word, facts["orphans"])
    yield from some(f"{word}: {name}" for name in facts["scratch"])
    yield from some(f"{word}: {shown(name)}" for name in facts["emptied"])
    yield from _by_folder(
        f"kept, younger than {facts['grace_days']:g} days (--grace)", facts["young"]
    )
    yield from some(f"kept, younger than a day: {name}" for name in facts["live"])
    yield from other_lines(facts)


def _refs_but(root: Path, forgotten: Collection[str]) -> list[Ref]:
    """All refs but those to be forgotten; one that cannot be read may keep anything, so it stops us."""
    refs, unreadable = read_refs(root)
    left = [error for error in unreadable if Path(error.where).stem not in forgotten]
    if left:
        names = "; ".join(f"{shown(Path(e.where).name)}: {e.problem}" for e in left)
        raise DamagedError(
            root / REFS,
            f"{len(left)} refs cannot be read, so nobody knows what they keep ({names})",
            left[0].cure,
        )
    return [ref for ref in refs if ref.name not in forgotten]


def _by_folder(word: str, sizes: Mapping[str, int]) -> Iterator[str]:
    folders: dict[str, list[int]] = defaultdict(list)
    for name, size in sizes.items():
        folders[name.rpartition("/")[0]].append(size)
    for folder, found in folders.items():
        yield f"{word}: {folder}: {len(found):,} objects, {bytes_of(sum(found))}"


def _size(files: Iterable[File]) -> str:
    return bytes_of(sum(file.bytes for file in files))
