"""One pass of the teacher, shared through a remote by machines that have no common disk.

No coordinator distributes the work. Each machine looks on the remote before it embeds a shard, and uploads
finished shards in the background. Each takes its shards in a random order, so two seldom embed the same one
at the same time; if they do, the first upload is kept.

Once a run has begun, a failing remote costs no work: failures are reported at the end.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self

from stages.outcome import log
from storage.errors import AnotherCopyError, DamagedError, TeachonceError
from storage.remote import Remote, RemoteError
from storage.store import Accept, Object, Store

TRANSFERS = 8
"""Number of simultaneous requests to a remote."""

BACKOFF_SECONDS = 60.0
"""Pause after a request to the remote failed, so that not every shard waits for its timeout."""

WIDEST_ROW_BYTES = 4 << 16
"""A vector of 65,536 float32 values; an object of the remote with more a row is refused unread."""


class Sharing:
    """Fetches objects from a remote and uploads finished ones; without a remote it does nothing."""

    def __init__(self, remote: Remote | None, store: Store) -> None:
        self.remote, self.store = remote, store
        self.fetched: set[str] = set()
        self.uploaded = 0
        self.problems: list[TeachonceError] = []
        self._uploads: list[Future[bool]] = []
        self._backoff_ends = 0.0
        self._failed: RemoteError | None = None

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="sharing")
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Ctrl-C should end at once; after an error at one shard the others are still uploaded.
        interrupted = error_type is not None and not issubclass(error_type, Exception)
        self._pool.shutdown(cancel_futures=interrupted)
        if not interrupted:
            self._collect_uploads()

    def fetch(self, wanted: Mapping[str, Accept], *, max_bytes: Mapping[str, int]) -> None:
        """Fetch those objects that the remote has, several at a time. Failed ones are embedded here.

        Args:
            wanted: Key -> check that a fetched object must pass.
            max_bytes: Key -> size in bytes above which an object is refused unread.

        Raises:
            RemoteError: the remote is unreachable: no request succeeded, or `TRANSFERS` consecutive ones
                failed. That ends the run, so that machines do not spend a night on the same shards.
        """
        if self.remote is None:
            return
        futures = [
            self._pool.submit(self._fetch_one, key, wanted[key], max_bytes[key]) for key in wanted
        ]
        errors: list[RemoteError] = []
        failed_in_a_row = 0
        try:
            for future in futures:
                try:
                    future.result()
                    failed_in_a_row = 0
                except RemoteError as error:
                    errors.append(error)
                    failed_in_a_row += 1
                    if error.is_of_all or failed_in_a_row in {TRANSFERS, len(futures)}:
                        raise
        finally:
            for future in futures:
                future.cancel()
        for failure in errors:
            log.warning("embed: %s; this shard is embedded here", failure)

    def try_fetch(self, key: str, accept: Accept, *, max_bytes: int) -> bool:
        """Fetch one object; returns whether the remote had it. A failing remote is logged, not raised."""
        if self.remote is None or self._is_backing_off():
            return False
        try:
            return self._fetch_one(key, accept, max_bytes)
        except RemoteError as error:
            log.warning("embed: %s; going on alone", error)
            self._back_off(error)
            return False

    def upload(self, entry: Object) -> None:
        """Upload an object in the background."""
        if self.remote is not None:
            self._uploads.append(self._pool.submit(self._upload, self.remote, entry))

    def push_probe_record(self, entry: Object) -> None:
        """Upload the record of the probe texts and wait for it; a record that is there already stays."""
        if self.remote is None or self._is_backing_off():
            return
        try:
            push_probe_record(entry, self.store, self.remote)
        except RemoteError as error:
            log.warning("embed: %s; going on alone", error)
            self._back_off(error)

    def shuffled(self, todo: list[int]) -> list[int]:
        """Returns the shards `todo` in random order, since others may be working on the same store."""
        # No result depends on the order, so it has no seed; two workers must not have the same.
        return random.SystemRandom().sample(todo, len(todo))

    def _fetch_one(self, key: str, accept: Accept, max_bytes: int) -> bool:
        assert self.remote is not None
        try:
            fetched = self.remote.try_pull(key, self.store, accept, max_bytes=max_bytes)
        except DamagedError as error:
            # The shard is embedded here, as if the remote did not have it.
            log.warning("embed: refused from the remote: %s", error)
            return False
        if fetched:
            self.fetched.add(key)
        return fetched

    def _upload(self, remote: Remote, entry: Object) -> bool:
        # A long queue of uploads must not wait for a timeout each.
        if self._is_backing_off() and self._failed is not None:
            raise self._failed
        try:
            return remote.push(entry, self.store)
        except RemoteError as error:
            self._back_off(error)
            raise

    def _is_backing_off(self) -> bool:
        return time.monotonic() < self._backoff_ends

    def _back_off(self, error: RemoteError) -> None:
        self._failed, self._backoff_ends = error, time.monotonic() + BACKOFF_SECONDS

    def _collect_uploads(self) -> None:
        for future in self._uploads:
            try:
                self.uploaded += future.result()
            except TeachonceError as error:
                self.problems.append(error)
        self._uploads = []
        if self.problems:
            log.warning(
                "embed: %d shards could not be handed over: `teachonce push` does it later. The first: %s",
                len(self.problems),
                self.problems[0],
            )


def push_probe_record(entry: Object, store: Store, remote: Remote) -> None:
    """Upload the record of a teacher's probe texts unless the remote has one: the first one stays.

    Another copy there is kept, since other hardware gives other last bits. Machines that fetch it are
    compared with it; a machine with a record of its own goes on using that one.

    Raises:
        RemoteError: the remote cannot be reached or refuses.
    """
    try:
        remote.push(entry, store)
    except (AnotherCopyError, DamagedError) as error:
        log.info("%s: not sent: %s", entry.key, error.problem)


def lacking_shards(keys: Sequence[str], store: Store, remote: Remote | None) -> list[int]:
    """Returns the indices of the keys that neither the store nor the remote has; opens no object.

    Raises:
        RemoteError: the remote cannot be asked.
    """
    here = {
        key for folder in {key.rpartition("/")[0] for key in keys} for key in store.keys(folder)
    }
    lacking = [shard for shard, key in enumerate(keys) if key not in here]
    if remote is None:
        return lacking

    def is_there(shard: int) -> bool:
        with suppress(DamagedError):  # it is made here, as if nothing were there
            return remote.find(keys[shard]) is not None
        return False

    with ThreadPoolExecutor(TRANSFERS) as pool:
        remote_has = list(pool.map(is_there, lacking))
    return [shard for shard, has_it in zip(lacking, remote_has, strict=True) if not has_it]
