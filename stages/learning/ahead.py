"""What is needed next is made by threads while what is there is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(
    make: Callable[[Item], Made], items: Iterable[Item], *, threads: int = 1
) -> Iterator[Made]:
    """Yield `make(item)` of each item, in their order; the next ones are made in threads meanwhile.

    At most `threads` of them are made or wait beside the one that is used. The items are drawn in the
    thread that asks. When it stops asking, on an error or Ctrl-C too, nothing further is begun, and what is
    being made is waited for.

    Raises:
        Whatever `make` raises, in its turn.
    """
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
