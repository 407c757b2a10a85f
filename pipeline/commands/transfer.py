"""`push` and `pull`: what manifests name, between the store and the remote.

Bytes before names: the note of a manifest goes to the remote after every object it names is there, so
nobody finds a name there without its object. Both can be cut off anywhere and run again; what was moved
stays moved. Token ids are named by no manifest: they are made where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from stages.outcome import Outcome, Progress, log
from stages.teaching.sharing import TRANSFERS, push_probe_record
from storage import holders
from storage.errors import MissingError, TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.probe import probe_key
from storage.remote import Remote, RemoteError
from storage.store import Object, Store, remake_command

MEMORY_BYTES = 1 << 30
"""An object is sent from memory, so large ones are moved by fewer threads."""


@dataclass
class Moved:
    """How a transfer went."""

    moved: list[Object] = field(default_factory=list)
    there: list[Object] = field(default_factory=list)
    missing: list[Object] = field(default_factory=list)
    problems: list[TeachonceError] = field(default_factory=list)


def push(manifests: Mapping[Path, Manifest], *, store: Store, remote: Remote) -> Outcome:
    """Send what manifests name to the remote, objects first.

    Args:
        manifests: By the file each was read from.
        store: Has the objects.
        remote: Where to.

    Raises:
        TeachonceError: the first thing that went wrong (others are logged); what could be sent was,
            except the notes.
    """

    def send(entry: Object, result: Moved) -> None:
        (result.moved if remote.push(entry, store) else result.there).append(entry)

    objects = _objects(manifests)
    result = _each("push", objects, send)
    _raise_problems("push", result, len(objects))
    for manifest in manifests.values():
        if manifest.kind == "embeddings" and (
            record := store.find(probe_key(fingerprint(manifest.recipe)))
        ):
            push_probe_record(record, store, remote)
    notes = sum(_push_ref(manifest, path, store, remote) for path, manifest in manifests.items())
    return _outcome("push", result, to=remote.url, manifests=manifests, notes=notes)


def pull(manifests: Mapping[Path, Manifest], *, store: Store, remote: Remote) -> Outcome:
    """Bring what manifests name from the remote into the store.

    Args:
        manifests: By the file each was read from.
        store: Where to.
        remote: Has the objects.

    Raises:
        MissingError: the remote lacks some; all others were brought.
        TeachonceError: the first thing that went wrong (others are logged); what could be brought was.
    """

    def fetch(entry: Object, result: Moved) -> None:
        if store.find(entry.key) is None:
            (result.moved if remote.pull(entry, store) else result.missing).append(entry)
        else:
            store.open(entry)
            result.there.append(entry)

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
    # All is asked before anything is named.
    makers = {path: _maker(manifest, store, remote) for path, manifest in manifests.items()}
    for path, manifest in manifests.items():
        manifest.hold(path, store, again="teachonce pull", maker=makers[path])
    return _outcome("pull", result, to=store.root, manifests=manifests, notes=0)


def _push_ref(manifest: Manifest, path: Path, store: Store, remote: Remote) -> bool:
    """Send the note of a holder, unless the remote has one of his; as `holders.leave` does in a store."""
    held = manifest.manifested
    content = manifest.note(path, maker=holders.recorded_maker(store.root, held))
    first, further = holders.names(held, path)
    if remote.push_ref(first, content):
        return True
    made = holders.parse(remote.ref(first) or b"", held)
    if made is not None and holders.is_same(made, holders.this_holder(path)):
        return False
    return remote.push_ref(further, content)


def _maker(manifest: Manifest, store: Store, remote: Remote) -> dict[str, str] | None:
    """Who made a manifest, as far as the store or the remote knows."""
    held = manifest.manifested
    return holders.recorded_maker(store.root, held) or holders.maker_of(
        remote.ref(manifest.ref) or b"", held
    )


def threads(objects: Sequence[Object]) -> int:
    """How many of `objects` may be moved at a time."""
    largest = max((entry.bytes for entry in objects), default=0)
    return max(1, min(TRANSFERS, MEMORY_BYTES // max(largest, 1)))


def _objects(manifests: Mapping[Path, Manifest]) -> list[Object]:
    """Each object once, though several manifests, or a corpus with a repeated shard, name it."""
    named = {entry: None for manifest in manifests.values() for entry in manifest.objects}
    return list(named)


def _each(stage: str, objects: Sequence[Object], move: Callable[[Object, Moved], None]) -> Moved:
    """Move objects, several at a time. One that fails does not keep the others; a dead remote does."""
    result = Moved()
    progress = Progress(stage, total=len(objects), unit="objects")
    workers = threads(objects)
    pool = ThreadPoolExecutor(workers, thread_name_prefix=stage)
    futures: dict[Future[None], Object] = {
        pool.submit(move, entry, result): entry for entry in objects
    }
    counted, size, failed_in_a_row = 0, 0, 0
    # Those that are under way when a remote dies all fail; with one thread, one failure proves no death.
    most_in_a_row = max(2, workers)
    try:
        for future in as_completed(futures):
            try:
                future.result()
                failed_in_a_row = 0
            except RemoteError as error:
                if error.is_of_all:
                    raise
                result.problems.append(error)
                failed_in_a_row += 1
                if failed_in_a_row == most_in_a_row:
                    break
            except TeachonceError as error:
                result.problems.append(error)
                failed_in_a_row = 0  # the remote answers
            new = result.moved[counted:]  # only these: to add up all of them each time is quadratic
            counted, size = counted + len(new), size + sum(entry.bytes for entry in new)
            progress.advance(
                1, f"{size / 1e6:,.1f} MB moved, {size / 1e6 / progress.seconds:,.1f} MB/s"
            )
    finally:
        # On the way out of an interruption, too: what runs is finished, what waits is dropped.
        pool.shutdown(cancel_futures=True)
    return result


def _raise_problems(stage: str, result: Moved, total: int) -> None:
    if not result.problems:
        return
    first, *others = result.problems
    for error in others:
        log.warning("%s: %s", stage, error)
    if isinstance(first, RemoteError):
        left = total - len(result.moved) - len(result.there) - len(result.missing)
        problem = f"{first.problem}; {left} of {total} objects were not moved"
        raise RemoteError(first.where, problem, first.cure) from first
    raise first


def _outcome(
    stage: str, result: Moved, *, to: str | Path, manifests: Mapping[Path, Manifest], notes: int
) -> Outcome:
    size = sum(entry.bytes for entry in result.moved)
    return Outcome(
        stage=stage,
        made=to,
        summary=(
            f"{len(result.moved)} objects moved ({size / 1e6:,.1f} MB), {len(result.there)} were there "
            f"already; named by {', '.join(path.name for path in manifests)}"
        ),
        facts={
            "objects_moved": len(result.moved),
            "objects_there": len(result.there),
            "bytes_moved": size,
            "notes": notes,
        },
    )
