"""The interface between `embed` and a teacher, and between `embed` and the engine that runs the teacher.

A worker only encodes. The process of `embed` reads texts, copies reused vectors, checks, publishes and
uploads, whatever the engine. So a worker needs the teacher and nothing else, no store and no common disk,
and losing one loses nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from stages.models.abilities import NO_MIXES
from storage.errors import TeachonceError
from storage.mixes import MixedTexts
from storage.probe import PROBE_TEXTS
from storage.roles import Role


class StoppedTeacherError(TeachonceError):
    """The teacher cannot go on, whatever it is given: the run ends, and not the shard alone."""


class RefusedTextsError(TeachonceError):
    """The teacher refuses some of the texts that it was given.

    Args:
        where: The teacher.
        problems: Place of a text among those given -> why.
        cure: As for every error.
    """

    def __init__(self, where: str, problems: Mapping[int, str], cure: str) -> None:
        self.problems = dict(problems)
        first = next(iter(self.problems.values()))
        super().__init__(where, f"refuses {len(self.problems)} texts; the first: {first}", cure)


class TeacherOutput(Protocol):
    """What a teacher returns for n texts.

    `vectors`: (n, dim) float32. `tokens`: number of tokens read. `truncated`: number of texts that were
    longer than the limit. `whole`: (n, width) float32, the vectors before they were cut to `embed.dim`.
    """

    @property
    def vectors(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def tokens(self) -> int: ...  # noqa: D102
    @property
    def truncated(self) -> int: ...  # noqa: D102
    @property
    def whole(self) -> NDArray[np.float32]: ...  # noqa: D102


class Encode(Protocol):
    """The whole interface to a teacher."""

    def __call__(self, texts: Sequence[str], role: Role, /) -> TeacherOutput:
        """Returns the vectors of texts of one role, in the same order, with counts of tokens."""


@runtime_checkable
class ReadsAhead(Protocol):
    """An `Encode` in two steps, so that one batch can be tokenised while another is encoded."""

    def __call__(self, texts: Sequence[str], role: Role, /) -> TeacherOutput:
        """Tokenise and encode."""

    def read(self, texts: Sequence[str], role: Role, /) -> Any:  # noqa: ANN401 - for `encode_read` alone
        """Tokenise texts; called in a separate thread."""

    def encode_read(self, read: Any, /) -> TeacherOutput:  # noqa: ANN401
        """Encode what `read` returned."""


@runtime_checkable
class ReadsMixes(Protocol):
    """An `Encode` that can read mixed input embeddings."""

    def encode_mixed(self, mixed: MixedTexts, /) -> TeacherOutput:
        """Encode n mixes."""


@runtime_checkable
class Closes(Protocol):
    """An `Encode` that has something to end, such as connections."""

    def close(self) -> None:
        """Called once, after the last text, also of a run that failed or was interrupted."""


@dataclass(frozen=True)
class PlainOutput:
    """`TeacherOutput` that can be sent to a process that has no torch."""

    vectors: NDArray[np.float32]
    whole: NDArray[np.float32]
    tokens: int = 0
    truncated: int = 0


NO_OUTPUT = PlainOutput(*2 * (np.empty((0, 0), np.float32),))
"""The output for no texts."""


@dataclass(frozen=True)
class Task:
    """The texts of a shard that the teacher has to encode, all of one role, or their mixes."""

    shard: int
    texts: Sequence[str] | MixedTexts
    role: Role = "text"


Results = Generator[tuple[int, TeacherOutput | TeachonceError], None, None]
"""Pairs of a shard and its output, in the order of completion; an error concerns that shard alone."""


Admit = Callable[[Mapping[Role, TeacherOutput]], None]
"""Check a loaded teacher by its output for the probe texts in each role."""


class Engine(Protocol):
    """Where the teacher runs."""

    def __call__(
        self, load_teacher: Callable[[], LoadedTeacher], tasks: Iterator[Task], admit: Admit
    ) -> Results:
        """Encode all tasks; the next task is drawn when a loaded teacher can take it.

        Args:
            load_teacher: Called once by each worker; picklable if workers are other processes.
            tasks: The texts to encode, by shard.
            admit: Called with each loaded teacher's outputs for the probe texts, before its first task;
                raises if that teacher must not be used, which ends the run.

        Raises:
            TeachonceError: no teacher can be loaded.
        """


def this_process(
    load_teacher: Callable[[], LoadedTeacher], tasks: Iterator[Task], admit: Admit
) -> Results:
    """An `Engine` with one teacher in this process; a teacher that `ReadsAhead` tokenises meanwhile."""
    with closing(load_teacher()) as teacher:
        probe_outputs = teacher.probe()
        if isinstance(probe_outputs, TeachonceError):
            raise probe_outputs
        admit(probe_outputs)
        started: deque[tuple[int, Finish]] = deque()
        for task in tasks:
            started.append((task.shard, teacher.begin(task)))
            if len(started) > teacher.prefetch:
                shard, finish = started.popleft()
                yield shard, finish()
        for shard, finish in started:
            yield shard, finish()


Finish = Callable[[], PlainOutput | TeachonceError]
"""Wait until the texts of a begun task are tokenised, and encode them."""


class LoadedTeacher:
    """A loaded teacher of texts in some roles, which tokenises while it encodes if it `ReadsAhead`."""

    def __init__(self, encode: Encode, roles: Sequence[Role] = ("text",)) -> None:
        self.encode, self.roles = encode, roles
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")

    @property
    def prefetch(self) -> int:
        """Number of tasks that may be begun while another is encoded: 0 or 1."""
        return int(isinstance(self.encode, ReadsAhead))

    @classmethod
    def load(cls, load_teacher: Callable[[], Encode], roles: Sequence[Role]) -> Self:
        """Load a teacher."""
        return cls(load_teacher(), roles)

    def probe(self) -> Mapping[Role, PlainOutput] | TeachonceError:
        """Returns the output for the probe texts in each role, or the error that was raised."""
        outputs: dict[Role, PlainOutput] = {}
        for role in self.roles:
            output = output_or_error(partial(self.encode, PROBE_TEXTS, role))
            if isinstance(output, TeachonceError):
                return output
            outputs[role] = output
        return outputs

    def begin(self, task: Task) -> Finish:
        """Begin to tokenise texts; returns a call that waits until that is done and encodes them."""
        if isinstance(task.texts, MixedTexts):
            return partial(output_or_error, partial(self._encode_mixed, task.texts))
        if not isinstance(self.encode, ReadsAhead):
            return partial(output_or_error, partial(self.encode, task.texts, task.role))
        reading = self._reader.submit(self.encode.read, task.texts, task.role)
        encode_read = self.encode.encode_read
        return partial(output_or_error, lambda: encode_read(reading.result()))

    def _encode_mixed(self, mixed: MixedTexts) -> TeacherOutput:
        if not isinstance(self.encode, ReadsMixes):
            raise TeachonceError("embed.mixes", "the teacher reads texts alone", NO_MIXES)
        return self.encode.encode_mixed(mixed)

    def close(self) -> None:
        """Wait until all begun texts are tokenised, and close a teacher that `Closes`."""
        self._reader.shutdown()
        if isinstance(self.encode, Closes):
            self.encode.close()


def output_or_error(encode: Callable[[], TeacherOutput]) -> PlainOutput | TeachonceError:
    """Encode a batch; returns the output, or the `TeachonceError` that was raised.

    Others are raised, and a `StoppedTeacherError`, which ends the run.
    """
    try:
        output = encode()
    except StoppedTeacherError:
        raise
    except TeachonceError as error:
        return error
    return PlainOutput(output.vectors, output.whole, output.tokens, output.truncated)
