"""Where the teacher runs when one process is not enough: in several here, or on a Ray cluster.

A worker is a process with one loaded teacher. Each gets one shard's texts after the other, as it finishes.
One that is lost is replaced, and what it had in hand is done again. What a worker does not do stands in
`stages/encoding.py`.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from stages.encoding import Encode, Encoded, Engine, Results, Task, this_process
from storage.errors import TeachonceError

if TYPE_CHECKING:
    from stages.params import Params

log = logging.getLogger("teachonce")

ATTEMPTS = 3
"""A shard that was in hand when so many workers were lost has failed; and if so many are lost one after
the other before they have loaded a teacher, none ever will."""


def engine_of(params: Params) -> Engine:
    """The engine that the settings name."""
    if params.engine == "local":
        from pipeline.processes import Processes

        return crewed(lambda load: Processes(load, workers=params.workers, device=params.device))
    if params.engine == "ray":
        from pipeline.actors import Actors

        return crewed(lambda load: Actors(load, workers=params.workers, params=params.ray))
    return this_process


def crewed(crew_for: Callable[[Callable[[], Encode]], Crew]) -> Engine:
    """The engine whose workers are a crew, given the teacher that each loads."""
    return partial(_hand_out, crew_for)


@dataclass(frozen=True)
class Lost:
    """A worker is no more."""

    why: str


Word = Encoded | TeachonceError | Lost
"""What comes from a worker: vectors, why there are none, or that it is gone."""


class Crew(Protocol):
    """Workers, by number. A worker's first word is what its teacher says of the probe texts."""

    size: int

    def start(self) -> int:
        """A new worker; it loads the teacher."""

    def give(self, worker: int, texts: Sequence[str]) -> None:
        """Texts for a worker that has nothing in hand."""

    def next_word(self) -> tuple[int, Word]:
        """Wait for any worker; one that is lost is not heard of again."""

    def dismiss(self, worker: int) -> None:
        """End a worker that has nothing in hand."""

    def close(self) -> None:
        """End all, whatever they are at."""


def _hand_out(
    crew_for: Callable[[Callable[[], Encode]], Crew],
    load_teacher: Callable[[], Encode],
    tasks: Iterator[Task],
    admit: Callable[[Encoded], None],
) -> Results:
    """An `Engine` over a crew: tasks are handed out as they finish, those of lost workers again."""
    crew = crew_for(load_teacher)
    try:
        yield from _Foreman(crew, tasks, admit).results()
    finally:
        crew.close()


class _Foreman:
    """Who has which task in hand, and which are to be done again."""

    def __init__(self, crew: Crew, tasks: Iterator[Task], admit: Callable[[Encoded], None]) -> None:
        self.crew, self.tasks, self.admit = crew, tasks, admit
        self.in_hand: dict[int, Task] = {}
        self.loading: set[int] = set()
        self.again: deque[Task] = deque()
        self.losses: Counter[int] = Counter()
        self.stillborn = 0

    def results(self) -> Results:
        """Shard -> what came of it, until all tasks are done."""
        for _ in range(self.crew.size):
            self._start_one()
        while self.in_hand:
            worker, word = self.crew.next_word()
            task = self.in_hand.pop(worker)
            if isinstance(word, Lost):
                error = self._lost(worker, task, word.why)
                # Before anything is published: its teacher is loaded meanwhile.
                self._start_one()
                if error is not None:
                    yield task.shard, error
            elif worker in self.loading:
                self._loaded(worker, task, word)
            else:
                # So is this: the worker is at the next task while what it made is published.
                if (following := self._draw()) is None:
                    self.crew.dismiss(worker)
                else:
                    self._give(worker, following)
                yield task.shard, word

    def _start_one(self) -> None:
        """A worker for the next task; none if there is none."""
        if (task := self._draw()) is not None:
            worker = self.crew.start()
            self.loading.add(worker)
            self.in_hand[worker] = task

    def _draw(self) -> Task | None:
        # Those to be done again come first: a shard that kills its workers is known for it soon.
        return self.again.popleft() if self.again else next(self.tasks, None)

    def _give(self, worker: int, task: Task) -> None:
        self.in_hand[worker] = task
        self.crew.give(worker, task.texts)

    def _loaded(self, worker: int, task: Task, word: Encoded | TeachonceError) -> None:
        if isinstance(word, TeachonceError):
            raise word
        self.admit(word)
        self.loading.remove(worker)
        self.stillborn = 0
        self._give(worker, task)

    def _lost(self, worker: int, task: Task, why: str) -> TeachonceError | None:
        """Keep account of a lost worker; the error of its task if that is not to be tried again."""
        if worker in self.loading:
            self.loading.remove(worker)
            self.stillborn += 1
            if self.stillborn == ATTEMPTS:
                raise TeachonceError(
                    "engine",
                    f"{ATTEMPTS} workers were lost before they had loaded the teacher: {why}",
                    "set `workers` lower, or engine: this_process, which shows more",
                )
            log.warning("embed: a worker was lost before it had loaded the teacher: %s", why)
            self.again.append(task)
            return None
        self.losses[task.shard] += 1
        if self.losses[task.shard] == ATTEMPTS:
            return TeachonceError(
                f"shard {task.shard}",
                f"{ATTEMPTS} workers were lost at it: {why}",
                "look at the texts of these shards; if memory ran out, set embed.batch_tokens or "
                "`workers` lower",
            )
        log.warning(
            "embed: a worker was lost at shard %d, which is done again: %s", task.shard, why
        )
        self.again.append(task)
        return None
