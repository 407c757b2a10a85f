"""What `embed` knows of a teacher and of where it runs: texts go there, vectors come back.

Only encoding is done elsewhere. Reading texts, copying known vectors, checking, publishing and handing over
stay in the one process that `embed` is, whatever the engine: so a worker needs the teacher and nothing
else, no store and no common disk, and losing one loses nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from storage.errors import TeachonceError
from storage.probe import PROBE_TEXTS


class Encoded(Protocol):
    """What a teacher returns for n texts: vectors (n, dim) float32, tokens read, texts cut.

    `whole` (n, width) float32 are the vectors before `embed.dim` took values off.
    """

    @property
    def vectors(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def tokens(self) -> int: ...  # noqa: D102
    @property
    def truncated(self) -> int: ...  # noqa: D102
    @property
    def whole(self) -> NDArray[np.float32]: ...  # noqa: D102


Encode = Callable[[Sequence[str]], Encoded]
"""The whole interface to a teacher: texts -> vectors in the same order, with counts."""


Given = TypeVar("Given")


@runtime_checkable
class ReadsAhead(Protocol):
    """An `Encode` in two steps; the first can be taken while the second is busy with other texts."""

    def __call__(self, texts: Sequence[str], /) -> Encoded:
        """Both steps."""

    def read(self, texts: Sequence[str], /) -> Any:  # noqa: ANN401 - for `encode_read` alone
        """Tokenise; in a thread of its own."""

    def encode_read(self, read: Any, /) -> Encoded:  # noqa: ANN401
        """What was read -> vectors."""


@dataclass(frozen=True)
class Plain:
    """`Encoded` that can be sent to a process that has no torch."""

    vectors: NDArray[np.float32]
    whole: NDArray[np.float32]
    tokens: int = 0
    truncated: int = 0


NOTHING = Plain(*2 * (np.empty((0, 0), np.float32),))
"""What is encoded of no texts."""


@dataclass(frozen=True)
class Task:
    """Texts of one shard that a teacher is to read."""

    shard: int
    texts: Sequence[str]


Results = Generator[tuple[int, Encoded | TeachonceError], None, None]
"""Shard -> what came of it, in the order in which they are done; an error is of that shard alone."""


class Engine(Protocol):
    """Where the teacher runs."""

    def __call__(
        self,
        load_teacher: Callable[[], Encode],
        tasks: Iterator[Task],
        admit: Callable[[Encoded], None],
    ) -> Results:
        """Encode all tasks; a task is drawn when there is a teacher for it.

        Args:
            load_teacher: Called once by each worker; picklable if workers are other processes.
            tasks: What is to be encoded.
            admit: Called with what each loaded teacher says of the probe texts, before it is given a task;
                raises if that teacher must not be used, which ends the pass.

        Raises:
            TeachonceError: no teacher can be loaded.
        """


def this_process(
    load_teacher: Callable[[], Encode],
    tasks: Iterator[Task],
    admit: Callable[[Encoded], None],
) -> Results:
    """One teacher, here; one task after the other. The next one's texts are read meanwhile, if it can."""
    encode = load_teacher()
    admit(encode(PROBE_TEXTS))
    if not isinstance(encode, ReadsAhead):
        for task in tasks:
            yield task.shard, encoded(encode, task.texts)
        return

    def second_step(reading: Future[Any]) -> Encoded:
        return encode.encode_read(reading.result())

    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        ahead: deque[tuple[int, Future[Any]]] = deque()
        for task in tasks:
            ahead.append((task.shard, reader.submit(encode.read, task.texts)))
            if len(ahead) == 1:
                continue
            shard, reading = ahead.popleft()
            yield shard, encoded(second_step, reading)
        for shard, reading in ahead:
            yield shard, encoded(second_step, reading)


def encoded(encode: Callable[[Given], Encoded], given: Given) -> Plain | TeachonceError:
    """What a teacher makes of texts, or what a person can mend about them; any other error is a bug."""
    try:
        made = encode(given)
    except TeachonceError as error:
        return error
    return Plain(made.vectors, made.whole, made.tokens, made.truncated)
