"""Distribute shards over a pool of workers: processes of this machine, or actors of a Ray cluster.

A worker is a process with one loaded teacher. It receives the texts of one shard at a time; one more if its
teacher can tokenise them while it encodes. A lost worker is replaced, and its tasks are requeued. The
division of work between workers and `embed` is described in `stages/teaching/interface.py`.

`concurrent.futures` breaks the whole pool when one worker dies, and Ray's ActorPool does not say which
task a lost actor had. Neither can replace a worker, requeue its tasks and find the shard that kills its
workers.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.workers.messages import ShardDone, WorkerLost, WorkerPool, WorkerReady
from stages.teaching.interface import Admit, Engine, LoadedTeacher, Results, Task, this_process
from storage.errors import TeachonceError

if TYPE_CHECKING:
    from stages.params import Params

log = logging.getLogger("teachonce")

ATTEMPTS = 3
"""A shard fails after it has cost this many workers. The run fails after this many consecutive workers were
lost while loading the teacher."""


def engine_of(params: Params) -> Engine:
    """Returns the engine that the settings name."""
    if params.engine == "local":
        from pipeline.workers.processes import ProcessPool

        return pool_engine(
            lambda load: ProcessPool(load, workers=params.workers, device=params.device)
        )
    if params.engine == "ray":
        from pipeline.workers.actors import RayPool

        return pool_engine(lambda load: RayPool(load, workers=params.workers, params=params.ray))
    return this_process


def pool_engine(pool_for: Callable[[Callable[[], LoadedTeacher]], WorkerPool]) -> Engine:
    """Returns an engine that distributes tasks over the pool that `pool_for(load_teacher)` makes."""

    def dispatch(
        load_teacher: Callable[[], LoadedTeacher], tasks: Iterator[Task], admit: Admit
    ) -> Results:
        pool = pool_for(load_teacher)
        try:
            yield from _Dispatcher(pool, tasks, admit).results()
        finally:
            pool.close()

    return dispatch


class _Dispatcher:
    """Keeps account of the tasks in flight with each worker and of the tasks to be requeued."""

    def __init__(self, pool: WorkerPool, tasks: Iterator[Task], admit: Admit) -> None:
        self.pool, self.tasks, self.admit = pool, tasks, admit
        # Worker -> its tasks, in the order in which they were submitted.
        self.in_flight: dict[int, list[Task]] = {}
        # Worker that has loaded its teacher -> number of tasks that it accepts while it encodes another.
        self.prefetch: dict[int, int] = {}
        self.requeued: deque[Task] = deque()
        # Shards that were in flight when a worker was lost. Each runs alone, to find the one that kills.
        self.suspects: set[int] = set()
        self.losses_of_shard: Counter[int] = Counter()
        self.failed_starts = 0

    def results(self) -> Results:
        """Yield each shard with its output or error, until all tasks are done."""
        for _ in range(self.pool.size):
            self._start_worker()
        while self.in_flight:
            worker, message = self.pool.next_message()
            if isinstance(message, WorkerLost):
                failed = self._requeue_tasks_of(worker, message.reason)
                # Before the caller publishes anything: the new worker loads its teacher meanwhile.
                self._start_worker()
                if failed is not None:
                    yield failed
            elif isinstance(message, ShardDone):
                in_flight = [task for task in self.in_flight[worker] if task.shard != message.shard]
                self.in_flight[worker] = in_flight
                # Before the caller publishes this shard: the worker encodes the next one meanwhile.
                self._refill(worker)
                yield message.shard, message.result
            elif isinstance(message, WorkerReady):
                self.admit(message.probe_outputs)
                self.prefetch[worker] = message.prefetch
                self.failed_starts = 0
                self.pool.submit(worker, self.in_flight[worker][0])
                self._refill(worker)
            else:
                raise message

    def _start_worker(self) -> None:
        """Start a worker for the next task; do nothing if no task is left."""
        if (task := self._next_task()) is not None:
            self.in_flight[self.pool.start()] = [task]

    def _next_task(self) -> Task | None:
        # Requeued tasks come first, so that a shard that kills its workers is found early.
        return self.requeued.popleft() if self.requeued else next(self.tasks, None)

    def _refill(self, worker: int) -> None:
        """Submit as many tasks as the worker accepts; stop it if no task is left."""
        in_flight = self.in_flight[worker]
        while len(in_flight) <= self.prefetch[worker] and not (
            in_flight and self._runs_alone(in_flight[-1])
        ):
            if (task := self._next_task()) is None:
                break
            in_flight.append(task)
            self.pool.submit(worker, task)
        if not in_flight:
            del self.in_flight[worker]
            self.pool.stop(worker)

    def _runs_alone(self, task: Task) -> bool:
        """Whether no other task may be in flight beside it: it, or the next one, may kill its worker."""
        return task.shard in self.suspects or bool(self.requeued)

    def _requeue_tasks_of(self, worker: int, reason: str) -> tuple[int, TeachonceError] | None:
        """Requeue a lost worker's tasks; returns the shard that failed for good with its error, or None.

        Raises:
            TeachonceError: ATTEMPTS consecutive workers were lost while loading the teacher.
        """
        tasks = self.in_flight.pop(worker)
        if worker not in self.prefetch:
            self.failed_starts += 1
            if self.failed_starts == ATTEMPTS:
                raise TeachonceError(
                    "engine",
                    f"{ATTEMPTS} workers were lost before they had loaded the teacher: {reason}",
                    "set `workers` lower, or engine: this_process, which shows more",
                )
            log.warning("embed: a worker was lost before it had loaded the teacher: %s", reason)
            self.requeued.extend(tasks)
            return None
        self.suspects.update(task.shard for task in tasks)
        shard = tasks[0].shard
        self.losses_of_shard[shard] += 1
        if self.losses_of_shard[shard] == ATTEMPTS:
            self.requeued.extend(tasks[1:])
            return shard, TeachonceError(
                f"shard {shard}",
                f"{ATTEMPTS} workers were lost at it: {reason}",
                "look at the texts of these shards; if memory ran out, set embed.batch_tokens or "
                "`workers` lower",
            )
        log.warning("embed: a worker was lost at shard %d, which is requeued: %s", shard, reason)
        self.requeued.extend(tasks)
        return None
