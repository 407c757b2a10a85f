"""`push` and `pull`: move the objects that manifests name between the store and the remote.

Bytes before names: the ref of a manifest is uploaded after all its objects, so a ref on the remote never
names a missing object. Both commands can be interrupted and run again; moved objects stay moved. Token ids
are in no manifest: each machine makes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from stages.outcome import Outcome, Progress, log
from stages.teaching.sharing import TRANSFERS, push_probe_record
from storage import holders
from storage.embeddings import fingerprints
from storage.errors import MissingError, TeachonceError
from storage.manifest import Manifest
from storage.probe import probe_key
from storage.remote import Remote, RemoteError
from storage.store import Object, Store, remake_command

MEMORY_BYTES = 1 << 30
"""Memory for objects under way. An object is sent from memory, so large ones are moved by fewer threads."""


@dataclass
class Transfer:
    """The result of a transfer: objects by what became of them, and errors."""

    moved: list[Object] = field(default_factory=list)
    existing: list[Object] = field(default_factory=list)
    missing: list[Object] = field(default_factory=list)
    problems: list[TeachonceError] = field(default_factory=list)


def push(manifests: Mapping[Path, Manifest], *, store: Store, remote: Remote) -> Outcome:
    """Upload the objects that manifests name, by their files, to the remote, then their refs.

    Raises:
        TeachonceError: the first error (others are logged); all other objects were uploaded, but no refs.
    """

    def send(entry: Object, result: Transfer) -> None:
        (result.moved if remote.push(entry, store) else result.existing).append(entry)

    objects = _objects(manifests)
    result = _each("push", objects, send)
    _raise_problems("push", result, len(objects))
    for manifest in manifests.values():
        teachers = fingerprints(manifest.recipe) if manifest.kind == "embeddings" else {}
        for teacher in dict.fromkeys(teachers.values()):
            if record := store.find(probe_key(teacher)):
                push_probe_record(record, store, remote)
    notes = sum(_push_ref(manifest, path, store, remote) for path, manifest in manifests.items())
    return _outcome("push", result, to=remote.url, manifests=manifests, notes=notes)


def pull(manifests: Mapping[Path, Manifest], *, store: Store, remote: Remote) -> Outcome:
    """Fetch the objects that manifests name, by their files, from the remote into the store.

    Raises:
        MissingError: the remote lacks some objects; all others were fetched.
        TeachonceError: the first error (others are logged); all other objects were fetched.
    """

    def fetch(entry: Object, result: Transfer) -> None:
        if store.find(entry.key) is None:
            (result.moved if remote.pull(entry, store) else result.missing).append(entry)
        else:
            store.open(entry)
            result.existing.append(entry)

    objects = _objects(manifests)
    result = _each("pull", objects, fetch)
    _raise_problems("pull", result, len(objects))
    if result.missing:
        first = result.missing[0].key
        raise MissingError(
            remote.url,
            f"{len(result.missing)} of {len(objects)} objects are neither here nor there (such as "
            f"{first}); {len(result.moved)} were brought",
            f"run `teachonce push` where they were made, or {remake_command(first)}",
        )
    # All refs are read from the remote before the first is written here.
    makers = {path: _maker(manifest, store, remote) for path, manifest in manifests.items()}
    for path, manifest in manifests.items():
        manifest.hold(path, store, again="teachonce pull", maker=makers[path])
    return _outcome("pull", result, to=store.root, manifests=manifests, notes=0)


def _push_ref(manifest: Manifest, path: Path, store: Store, remote: Remote) -> bool:
    """Upload the ref of a holder unless the remote has it; as `holders.write_ref` does in a store."""
    held = manifest.manifested
    content = manifest.note(path, maker=holders.recorded_maker(store.root, held))
    first, later = holders.names(held, path)
    if remote.push_ref(first, content):
        return True
    holder = holders.parse(remote.ref(first) or b"", held)
    if holder is not None and holders.is_same(holder, holders.this_holder(path)):
        return False
    return remote.push_ref(later, content)


def _maker(manifest: Manifest, store: Store, remote: Remote) -> dict[str, str] | None:
    """Returns the maker of a manifest from the refs in the store or on the remote; None if unknown."""
    held = manifest.manifested
    return holders.recorded_maker(store.root, held) or holders.maker_of(
        remote.ref(manifest.ref) or b"", held
    )


def threads(objects: Sequence[Object]) -> int:
    """Returns the number of `objects` that may be moved at a time."""
    largest = max((entry.bytes for entry in objects), default=0)
    return max(1, min(TRANSFERS, MEMORY_BYTES // max(largest, 1)))


def _objects(manifests: Mapping[Path, Manifest]) -> list[Object]:
    """Returns each object once, also if several manifests, or a corpus with a repeated shard, name it."""
    named = {entry: None for manifest in manifests.values() for entry in manifest.objects}
    return list(named)


def _each(
    stage: str, objects: Sequence[Object], move: Callable[[Object, Transfer], None]
) -> Transfer:
    """Move objects, several at a time. One failure does not stop the others; an unreachable remote does."""
    result = Transfer()
    progress = Progress(stage, total=len(objects), unit="objects")
    workers = threads(objects)
    pool = ThreadPoolExecutor(workers, thread_name_prefix=stage)
    # All transfers under way when a remote dies fail; a single failure proves nothing, so at least two.
    most_in_a_row = max(2, workers)
    failed_in_a_row, lock = 0, Lock()

    def move_unless_unreachable(entry: Object) -> None:
        # Counted here and not where results are read, which a busy machine may do long after.
        nonlocal failed_in_a_row
        if failed_in_a_row >= most_in_a_row:
            raise CancelledError
        failed = False
        try:
            move(entry, result)
        except RemoteError:
            failed = True
            raise
        finally:
            with lock:
                failed_in_a_row = failed_in_a_row + 1 if failed else 0

    futures = [pool.submit(move_unless_unreachable, entry) for entry in objects]
    counted, bytes_moved = 0, 0
    try:
        for future in as_completed(futures):
            try:
                future.result()
            except CancelledError:
                continue  # not `break`: the failures that ended it may come after this one
            except TeachonceError as error:
                if isinstance(error, RemoteError) and error.is_of_all:
                    raise
                result.problems.append(error)
            new = result.moved[counted:]  # only these: to add up all of them each time is quadratic
            counted, bytes_moved = (
                counted + len(new),
                bytes_moved + sum(entry.bytes for entry in new),
            )
            progress.advance(
                1,
                f"{bytes_moved / 1e6:,.1f} MB moved, {bytes_moved / 1e6 / progress.seconds:,.1f} MB/s",
            )
    finally:
        # Also on Ctrl-C: running transfers are finished, waiting ones are dropped.
        pool.shutdown(cancel_futures=True)
    return result


def _raise_problems(stage: str, result: Transfer, total: int) -> None:
    if not result.problems:
        return
    first, *others = result.problems
    for error in others:
        log.warning("%s: %s", stage, error)
    if isinstance(first, RemoteError):
        not_moved = total - len(result.moved) - len(result.existing) - len(result.missing)
        problem = f"{first.problem}; {not_moved} of {total} objects were not moved"
        raise RemoteError(first.where, problem, first.cure) from first
    raise first


def _outcome(
    stage: str, result: Transfer, *, to: str | Path, manifests: Mapping[Path, Manifest], notes: int
) -> Outcome:
    size = sum(entry.bytes for entry in result.moved)
    return Outcome(
        stage=stage,
        made=to,
        summary=(
            f"{len(result.moved)} objects moved ({size / 1e6:,.1f} MB), {len(result.existing)} were there "
            f"already; named by {', '.join(path.name for path in manifests)}"
        ),
        facts={
            "objects_moved": len(result.moved),
            "objects_there": len(result.existing),
            "bytes_moved": size,
            "notes": notes,
        },
    )
