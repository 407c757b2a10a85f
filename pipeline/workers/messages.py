"""Messages from a worker to the dispatcher, and the protocol that both kinds of worker pool follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from stages.teaching.interface import LoadedTeacher, Task, TeacherOutput
from storage.errors import TeachonceError
from storage.roles import Role


@dataclass(frozen=True)
class WorkerLost:
    """The worker process exited or was lost."""

    reason: str


@dataclass(frozen=True)
class WorkerReady:
    """The worker has loaded its teacher."""

    # What the teacher returned for the probe texts in each role.
    probe_outputs: Mapping[Role, TeacherOutput]
    prefetch: int  # number of tasks that the worker accepts while it encodes another one


@dataclass(frozen=True)
class ShardDone:
    """The worker has encoded a shard, or failed at it."""

    shard: int
    result: TeacherOutput | TeachonceError


WorkerMessage = WorkerReady | TeachonceError | ShardDone | WorkerLost
"""A worker first sends `WorkerReady`, or the error that loading raised; then one `ShardDone` a task."""


def ready_or_error(teacher: LoadedTeacher) -> WorkerReady | TeachonceError:
    """Encode the probe texts and return the worker's first message."""
    probe_outputs = teacher.probe()
    return (
        probe_outputs
        if isinstance(probe_outputs, TeachonceError)
        else WorkerReady(probe_outputs, teacher.prefetch)
    )


class WorkerPool(Protocol):
    """Worker processes, each known by a number."""

    size: int

    def start(self) -> int:
        """Start a worker, which loads the teacher; returns its number."""

    def submit(self, worker: int, task: Task) -> None:
        """Send a task to a worker that has loaded its teacher."""

    def next_message(self) -> tuple[int, WorkerMessage]:
        """Wait for any worker's message; `WorkerLost` is a worker's last one."""

    def stop(self, worker: int) -> None:
        """End a worker that has no task in flight."""

    def close(self) -> None:
        """End all workers at once, busy or not."""
