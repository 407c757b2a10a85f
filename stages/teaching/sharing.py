"""One pass of the teacher, shared through a remote by boxes that have no common disk.

Nobody hands out work. Each box asks for a shard before it makes it and hands over what it made, in the
background; boxes take their shards in orders of their own, so they seldom make the same one at the same
time, and if they do the first to hand it over is kept.

The remote is a convenience: once a run has begun, its failures cost no work. They are told at the end.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from stages.outcome import log
from storage.errors import AnotherCopyError, DamagedError, TeachonceError
from storage.remote import Remote, RemoteError
from storage.store import Accept, Object, Store

TRANSFERS = 8
"""Objects that are moved at a time."""

REST_SECONDS = 60.0
"""A remote that failed is left alone this long, so that nothing waits for it again and again."""

WIDEST_ROW_BYTES = 4 << 16
"""A vector of 65,536 float32 values; an object of the remote with more a row is refused unread."""


class Sharing:
    """Asks and hands over; without a remote it does neither.

    Args:
        remote: Where to; None where nothing is shared.
        store: Where objects come from and go to.
    """

    def __init__(self, remote: Remote | None, store: Store) -> None:
        self.remote, self.store = remote, store
        self.fetched: set[str] = set()
        self.sent = 0
        self.problems: list[TeachonceError] = []
        self._sending: list[Future[bool]] = []
        self._rests_until = 0.0
        self._failed: RemoteError | None = None

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="sharing")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Whoever interrupts wants to leave; whoever failed at one shard keeps the others.
        interrupted = kind is not None and not issubclass(kind, Exception)
        self._pool.shutdown(cancel_futures=interrupted)
        if not interrupted:
            self._settle()

    def fetch(self, wanted: Mapping[str, Accept], *, most: Mapping[str, int]) -> None:
        """Ask for many shards, several at a time. One that does not come is embedded here.

        Raises:
            RemoteError: the remote does not answer: no request succeeded, or `TRANSFERS` failed one after
                the other. Better now than after a night in which all boxes made the same.
        """
        if self.remote is None:
            return
        futures = [self._pool.submit(self._ask, key, wanted[key], most[key]) for key in wanted]
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

    def ask(self, key: str, accept: Accept, *, most: int) -> bool:
        """Whether another box has handed over `key` meanwhile; it is in the store then."""
        if self.remote is None or self._is_resting():
            return False
        try:
            return self._ask(key, accept, most)
        except RemoteError as error:
            log.warning("embed: %s; going on alone", error)
            self._rest(error)
            return False

    def hand_over(self, entry: Object) -> None:
        """Send an object in the background."""
        if self.remote is not None:
            self._sending.append(self._pool.submit(self._send, self.remote, entry))

    def offer(self, entry: Object) -> None:
        """Send, now, an object that all boxes compare themselves with; another box's copy stays."""
        if self.remote is None or self._is_resting():
            return
        try:
            offer(entry, self.store, self.remote)
        except RemoteError as error:
            log.warning("embed: %s; going on alone", error)
            self._rest(error)

    def order(self, todo: list[int]) -> list[int]:
        """The shards `todo` in an order of this worker's own: others may be at work on the same store."""
        # No result depends on it, so it needs no seed; two workers must not have the same.
        return random.SystemRandom().sample(todo, len(todo))

    def _ask(self, key: str, accept: Accept, most: int) -> bool:
        assert self.remote is not None
        try:
            found = self.remote.ask(key, self.store, accept, most=most)
        except DamagedError as error:
            # It is made here, as if nothing were there.
            log.warning("embed: not taken: %s", error)
            return False
        if found:
            self.fetched.add(key)
        return found

    def _send(self, remote: Remote, entry: Object) -> bool:
        # A long queue must not wait for each of its entries to fail by itself.
        if self._is_resting() and self._failed is not None:
            raise self._failed
        try:
            return remote.push(entry, self.store)
        except RemoteError as error:
            self._rest(error)
            raise

    def _is_resting(self) -> bool:
        return time.monotonic() < self._rests_until

    def _rest(self, error: RemoteError) -> None:
        self._failed, self._rests_until = error, time.monotonic() + REST_SECONDS

    def _settle(self) -> None:
        for future in self._sending:
            try:
                self.sent += future.result()
            except TeachonceError as error:
                self.problems.append(error)
        self._sending = []
        if self.problems:
            log.warning(
                "embed: %d shards could not be handed over: `teachonce push` does it later. The first: %s",
                len(self.problems),
                self.problems[0],
            )


def offer(entry: Object, store: Store, remote: Remote) -> None:
    """Send the record of a teacher's probe texts, if the remote has none: the first one stays.

    Another copy there is left alone, since other hardware gives other last bits. Boxes that fetch it are
    compared with it; a box that has a record of its own already goes by that one.

    Raises:
        RemoteError: the remote cannot be reached or refuses.
    """
    try:
        remote.push(entry, store)
    except (AnotherCopyError, DamagedError) as error:
        log.info("%s: not sent: %s", entry.key, error.problem)
