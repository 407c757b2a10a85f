"""A worker pool of Ray actors, on this machine or on many. The machines need no common disk."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pipeline.workers.messages import (
    ShardDone,
    WorkerLost,
    WorkerMessage,
    WorkerReady,
    ready_or_error,
)
from stages.teaching.interface import LoadedTeacher, Task
from storage.errors import TeachonceError, first_line

if TYPE_CHECKING:
    from stages.params import RayParams

SECONDS_TO_CONNECT = 10.0


class RayPool:
    """A `WorkerPool` of Ray actors, placed wherever the cluster has room.

    Args:
        load_teacher: Picklable; called on the actor's machine, which has teachonce and the teacher.
        workers: Number of actors at once; auto: as many as the cluster has room for.
        params: Address of the cluster, and number of GPUs for each actor.

    Raises:
        TeachonceError: Ray is not installed, the cluster cannot be reached, or it has too few GPUs.
    """

    def __init__(
        self,
        load_teacher: Callable[[], LoadedTeacher],
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
            _check_listening(address)
            ray.init(address=address, include_dashboard=False if address == "local" else None)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise TeachonceError(
                "ray.address",
                f"{address}: {first_line(error)}",
                "start it (`ray start --head`), mend the address, or set it to null for a cluster of this "
                "machine alone",
            ) from error
        finally:
            # Ray installs a handler that ends the command without a message.
            signal.signal(signal.SIGTERM, handler)
        # A cluster elsewhere may grow when it is asked for more; one of this machine alone cannot.
        limit = self._workers_that_fit(params) if workers == "auto" or not params.address else 0
        self.size = limit if workers == "auto" else workers
        worker_class = ray.remote(num_cpus=1, num_gpus=params.num_gpus, max_restarts=0)(_RayWorker)
        self._actor = worker_class.options(max_concurrency=2)
        self._started = 0
        self._workers: dict[int, Any] = {}
        self._worker_of_call: dict[Any, int] = {}

    def _workers_that_fit(self, params: RayParams) -> int:
        """Returns the number of workers that the cluster has room for now; at least one."""
        resources = self.ray.cluster_resources()
        if not params.num_gpus:
            return max(1, int(resources.get("CPU", 1)))
        gpus = resources.get("GPU", 0)
        if gpus < params.num_gpus:
            self.ray.shutdown()
            raise TeachonceError(
                "ray.num_gpus",
                f"{params.num_gpus:g} for each worker, but the cluster has {gpus:g} GPUs",
                "set it to 0 to run on CPUs, or name a cluster that has some in ray.address",
            )
        return int(gpus // params.num_gpus)

    def start(self) -> int:
        """Create an actor, which waits until the cluster has room for it; returns its number."""
        self._started += 1
        worker = self._started
        self._workers[worker] = self._actor.remote(self.load_teacher)
        self._worker_of_call[self._workers[worker].load.remote()] = worker
        return worker

    def submit(self, worker: int, task: Task) -> None:
        """Send a task."""
        self._worker_of_call[self._workers[worker].do.remote(task)] = worker

    def next_message(self) -> tuple[int, WorkerMessage]:
        """Wait for the next result, error or lost actor."""
        done, _ = self.ray.wait(list(self._worker_of_call), num_returns=1)
        worker = self._worker_of_call.pop(done[0])
        try:
            message: WorkerMessage = self.ray.get(done[0])
        except self.ray.exceptions.RayError as error:
            # Also any error of the teacher but a TeachonceError: its device may have become unusable.
            self.stop(worker)
            return worker, WorkerLost(str(error).strip().splitlines()[-1])
        return worker, message

    def stop(self, worker: int) -> None:
        """End an actor."""
        self.ray.kill(self._workers.pop(worker))
        self._worker_of_call = {
            of: who for of, who in self._worker_of_call.items() if who != worker
        }

    def close(self) -> None:
        """End all actors, and the cluster if it was started here."""
        for worker in list(self._workers):
            self.stop(worker)
        self.ray.shutdown()


class _RayWorker:
    """The actor behind a worker of `RayPool`. It tokenises one task's texts while it encodes another's."""

    def __init__(self, load_teacher: Callable[[], LoadedTeacher]) -> None:
        self.load_teacher = load_teacher
        self._encoding = threading.Lock()

    def load(self) -> WorkerReady | TeachonceError:
        """Load the teacher."""
        try:
            self._teacher = self.load_teacher()
        except TeachonceError as error:
            return error
        return ready_or_error(self._teacher)

    def do(self, task: Task) -> ShardDone:
        """Encode a task's texts."""
        finish = self._teacher.begin(task)
        with self._encoding:
            return ShardDone(task.shard, finish())


def _check_listening(address: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT: Ray tries that for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_CONNECT).close()
