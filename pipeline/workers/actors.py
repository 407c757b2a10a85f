"""Workers that are actors of a Ray cluster, on this machine or on many. Needs no common disk."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pipeline.workers.messages import Done, Loaded, Lost, Word, introduced
from stages.teaching.interface import Encode, Task, Teacher
from storage.errors import TeachonceError

if TYPE_CHECKING:
    from stages.params import RayParams

SECONDS_TO_CONNECT = 10.0


class Actors:
    """Workers that are actors of a Ray cluster, wherever it has room.

    Args:
        load_teacher: Picklable; called on the actor's machine, which has teachonce and the teacher.
        workers: How many at once; auto: as many as there is room for.
        params: Where, and how many GPUs each takes.
    """

    def __init__(
        self,
        load_teacher: Callable[[], Encode],
        *,
        workers: int | Literal["auto"],
        params: RayParams,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise TeachonceError(
                "engine", "ray is not installed", "pip install 'teachonce[ray]', or engine: local"
            ) from error
        self.ray, self.load_teacher = ray, load_teacher
        address = params.address or "local"
        handler = signal.getsignal(signal.SIGTERM)
        try:
            _check_there(address)
            ray.init(address=address, include_dashboard=False if address == "local" else None)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise TeachonceError(
                "ray.address",
                f"{address}: {str(error).splitlines()[0]}",
                "start it (`ray start --head`), mend the address, or set it to null for a cluster of this "
                "machine alone",
            ) from error
        finally:
            # Ray puts one in its place that ends a command without a word.
            signal.signal(signal.SIGTERM, handler)
        # A cluster elsewhere may grow when it is asked for more; one of this machine alone cannot.
        room = self._room(params) if workers == "auto" or not params.address else 0
        self.size = room if workers == "auto" else workers
        of_ray = ray.remote(num_cpus=1, num_gpus=params.num_gpus, max_restarts=0)(_Actor)
        self._actor = of_ray.options(max_concurrency=2)
        self._started = 0
        self._workers: dict[int, Any] = {}
        self._waited_for: dict[Any, int] = {}

    def _room(self, params: RayParams) -> int:
        """How many workers the cluster has room for now; at least one."""
        there = self.ray.cluster_resources()
        if not params.num_gpus:
            return max(1, int(there.get("CPU", 1)))
        gpus = there.get("GPU", 0)
        if gpus < params.num_gpus:
            self.ray.shutdown()
            raise TeachonceError(
                "ray.num_gpus",
                f"{params.num_gpus:g} for each worker, but the cluster has {gpus:g} GPUs",
                "set it to 0 to run on CPUs, or name a cluster that has some in ray.address",
            )
        return int(gpus // params.num_gpus)

    def start(self) -> int:
        """An actor; it waits until the cluster has room for it."""
        self._started += 1
        worker = self._started
        self._workers[worker] = self._actor.remote(self.load_teacher)
        self._waited_for[self._workers[worker].load.remote()] = worker
        return worker

    def give(self, worker: int, task: Task) -> None:
        """Send a task."""
        self._waited_for[self._workers[worker].do.remote(task)] = worker

    def next_word(self) -> tuple[int, Word]:
        """Wait for an answer or an end."""
        done, _ = self.ray.wait(list(self._waited_for), num_returns=1)
        worker = self._waited_for.pop(done[0])
        try:
            word: Word = self.ray.get(done[0])
        except self.ray.exceptions.RayError as error:
            # Also an error of the teacher that is not a person's: its device may be of no use any more.
            self.dismiss(worker)
            return worker, Lost(str(error).strip().splitlines()[-1])
        return worker, word

    def dismiss(self, worker: int) -> None:
        """End an actor."""
        self.ray.kill(self._workers.pop(worker))
        self._waited_for = {of: who for of, who in self._waited_for.items() if who != worker}

    def close(self) -> None:
        """End all actors, and the cluster if it was started here."""
        for worker in list(self._workers):
            self.dismiss(worker)
        self.ray.shutdown()


class _Actor:
    """A worker of `Actors`. Two tasks may be in hand: one is read while the other is encoded."""

    def __init__(self, load_teacher: Callable[[], Encode]) -> None:
        self.load_teacher = load_teacher
        self._encoding = threading.Lock()

    def load(self) -> Loaded | TeachonceError:
        """Load the teacher."""
        try:
            self._teacher = Teacher(self.load_teacher())
        except TeachonceError as error:
            return error
        return introduced(self._teacher)

    def do(self, task: Task) -> Done:
        """Encode a task's texts."""
        finish = self._teacher.begin(task.texts)
        with self._encoding:
            return Done(task.shard, finish())


def _check_there(address: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT: Ray tries that for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_CONNECT).close()
