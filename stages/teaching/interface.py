"""What `embed` knows of a teacher and of where it runs: texts go there, vectors come back.

Only encoding is done elsewhere. Reading texts, copying known vectors, checking, publishing and handing over
stay in the one process that `embed` is, whatever the engine: so a worker needs the teacher and nothing
else, no store and no common disk, and losing one loses nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
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
    with closing(Teacher(load_teacher())) as teacher:
        admit(teacher.encode(PROBE_TEXTS))
        begun: deque[tuple[int, Finish]] = deque()
        for task in tasks:
            begun.append((task.shard, teacher.begin(task.texts)))
            if len(begun) > teacher.ahead:
                shard, finish = begun.popleft()
                yield shard, finish()
        for shard, finish in begun:
            yield shard, finish()


Finish = Callable[[], Plain | TeachonceError]
"""Encode texts that were begun."""


class Teacher:
    """A loaded teacher. The next texts can be read while it encodes, if it does that in two steps.

    Args:
        encode: What was loaded.
    """

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")

    @property
    def ahead(self) -> int:
        """So many lists of texts may be begun before the one that is encoded is finished."""
        return int(isinstance(self.encode, ReadsAhead))

    def begin(self, texts: Sequence[str]) -> Finish:
        """Begin to read texts; what is returned waits until they are read, and encodes them."""
        if not isinstance(self.encode, ReadsAhead):
            return partial(encoded, self.encode, texts)
        reading = self._reader.submit(self.encode.read, texts)
        encode_read = self.encode.encode_read
        return partial(encoded, lambda reading: encode_read(reading.result()), reading)

    def close(self) -> None:
        """Wait until what was begun is read."""
        self._reader.shutdown()


def encoded(encode: Callable[[Given], Encoded], given: Given) -> Plain | TeachonceError:
    """What a teacher makes of texts, or what a person can mend about them; any other error is a bug."""
    try:
        made = encode(given)
    except TeachonceError as error:
        return error
    return Plain(made.vectors, made.whole, made.tokens, made.truncated)
