"""Where the teacher runs when one process is not enough: in several here, or on a Ray cluster.

A worker is a process with one loaded teacher. Each gets one shard's texts after the other, as it finishes;
the next one's before that if its teacher can read them meanwhile. One that is lost is replaced, and what it
had in hand is done again. What a worker does not do stands in `stages/teaching/interface.py`.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from pipeline.workers.messages import Crew, Done, Loaded, Lost
from stages.teaching.interface import (
    Encode,
    Encoded,
    Engine,
    Results,
    Task,
    this_process,
)
from storage.errors import TeachonceError

if TYPE_CHECKING:
    from stages.params import Params

log = logging.getLogger("teachonce")

ATTEMPTS = 3
"""A shard at which so many workers were lost has failed; and if so many are lost one after
the other before they have loaded a teacher, none ever will."""


def engine_of(params: Params) -> Engine:
    """The engine that the settings name."""
    if params.engine == "local":
        from pipeline.workers.processes import Processes

        return crewed(lambda load: Processes(load, workers=params.workers, device=params.device))
    if params.engine == "ray":
        from pipeline.workers.actors import Actors

        return crewed(lambda load: Actors(load, workers=params.workers, params=params.ray))
    return this_process


def crewed(crew_for: Callable[[Callable[[], Encode]], Crew]) -> Engine:
    """The engine whose workers are a crew, given the teacher that each loads."""
    return partial(_hand_out, crew_for)


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
    """Who has which tasks in hand, and which are to be done again."""

    def __init__(self, crew: Crew, tasks: Iterator[Task], admit: Callable[[Encoded], None]) -> None:
        self.crew, self.tasks, self.admit = crew, tasks, admit
        # In the order in which they were given.
        self.in_hand: dict[int, list[Task]] = {}
        # Of workers that have a teacher.
        self.ahead: dict[int, int] = {}
        self.again: deque[Task] = deque()
        # Shards that were in hand when a worker was lost. They are given singly: one of them did it.
        self.suspects: set[int] = set()
        self.losses: Counter[int] = Counter()
        self.stillborn = 0

    def results(self) -> Results:
        """Shard -> what came of it, until all tasks are done."""
        for _ in range(self.crew.size):
            self._start_one()
        while self.in_hand:
            worker, word = self.crew.next_word()
            if isinstance(word, Lost):
                failed = self._lost(worker, word.why)
                # Before anything is published: its teacher is loaded meanwhile.
                self._start_one()
                if failed is not None:
                    yield failed
            elif isinstance(word, Done):
                hand = [task for task in self.in_hand[worker] if task.shard != word.shard]
                self.in_hand[worker] = hand
                # So is this: the worker is at the next task while what it made is published.
                self._fill(worker)
                yield word.shard, word.made
            elif isinstance(word, Loaded):
                self.admit(word.said)
                self.ahead[worker] = word.ahead
                self.stillborn = 0
                self.crew.give(worker, self.in_hand[worker][0])
                self._fill(worker)
            else:
                raise word

    def _start_one(self) -> None:
        """A worker for the next task; none if there is none."""
        if (task := self._draw()) is not None:
            self.in_hand[self.crew.start()] = [task]

    def _draw(self) -> Task | None:
        # Those to be done again come first: a shard that kills its workers is known for it soon.
        return self.again.popleft() if self.again else next(self.tasks, None)

    def _fill(self, worker: int) -> None:
        """Give a worker as many tasks as it may have; dismiss it if there is none."""
        hand = self.in_hand[worker]
        while len(hand) <= self.ahead[worker] and not (hand and self._singly(hand[-1])):
            if (task := self._draw()) is None:
                break
            hand.append(task)
            self.crew.give(worker, task)
        if not hand:
            del self.in_hand[worker]
            self.crew.dismiss(worker)

    def _singly(self, task: Task) -> bool:
        """Whether it is to be done alone: it, or the one that would follow, may kill its worker."""
        return task.shard in self.suspects or bool(self.again)

    def _lost(self, worker: int, why: str) -> tuple[int, TeachonceError] | None:
        """Keep account of a lost worker; a shard, and its error if it is not to be tried again."""
        tasks = self.in_hand.pop(worker)
        if worker not in self.ahead:
            self.stillborn += 1
            if self.stillborn == ATTEMPTS:
                raise TeachonceError(
                    "engine",
                    f"{ATTEMPTS} workers were lost before they had loaded the teacher: {why}",
                    "set `workers` lower, or engine: this_process, which shows more",
                )
            log.warning("embed: a worker was lost before it had loaded the teacher: %s", why)
            self.again.extend(tasks)
            return None
        self.suspects.update(task.shard for task in tasks)
        shard = tasks[0].shard
        self.losses[shard] += 1
        if self.losses[shard] == ATTEMPTS:
            self.again.extend(tasks[1:])
            return shard, TeachonceError(
                f"shard {shard}",
                f"{ATTEMPTS} workers were lost at it: {why}",
                "look at the texts of these shards; if memory ran out, set embed.batch_tokens or "
                "`workers` lower",
            )
        log.warning("embed: a worker was lost at shard %d, which is done again: %s", shard, why)
        self.again.extend(tasks)
        return None
