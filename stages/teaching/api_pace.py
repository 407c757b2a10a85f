"""The limits of an account: requests and tokens a minute."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Pace:
    """Gives each request its turn, so that no minute has more requests or tokens than allowed.

    Args:
        requests_per_minute: The limit; None for none.
        tokens_per_minute: The limit; None for none.
        clock: Seconds of a monotonic clock.
        sleep: Waits this many seconds.
    """

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        clock: Callable[[], float],
        sleep: Callable[[float], object],
    ) -> None:
        self._request_seconds = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_seconds = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free = self._paused_until = clock()

    def wait(self, tokens: int) -> None:
        """Wait for the turn of a request with about this many tokens."""
        with self._lock:
            turn = max(self._clock(), self._free)
            self._free = turn + max(self._request_seconds, tokens * self._token_seconds)
        while (left := max(turn, self._paused_until) - self._clock()) > 0:
            if self._sleep(left):  # an event that is waited for says so when it is set
                return

    def correct(self, tokens: int) -> None:
        """Note that a request had this many tokens more than was thought; negative for fewer."""
        with self._lock:
            self._free += tokens * self._token_seconds

    def pause(self, seconds: float) -> None:
        """Let no request begin for so long."""
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)
