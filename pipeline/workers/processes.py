"""A worker pool of processes on this machine: one for each GPU, or several that share its cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Literal

from pipeline.workers.messages import ShardDone, WorkerLost, WorkerMessage, ready_or_error
from stages.teaching.interface import Finish, LoadedTeacher, Task
from storage.errors import TeachonceError

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


class ProcessPool:
    """A `WorkerPool` of processes on this machine.

    They are spawned, not forked, so they inherit nothing that this process has loaded or locked. They end
    when this process ends, however it ends.

    Args:
        load_teacher: Picklable; called in each process.
        workers: Number of processes at once; auto: one for each GPU that `device` means, else one.
        device: The setting `device`.
    """

    def __init__(
        self,
        load_teacher: Callable[[], LoadedTeacher],
        *,
        workers: int | Literal["auto"],
        device: str,
    ) -> None:
        self.load_teacher = load_teacher
        gpus = _gpus(device)
        self.size = (len(gpus) or 1) if workers == "auto" else workers
        threads = str(max(1, _cores() // self.size))
        # The environment of each worker that is not running.
        self._free_environments: deque[Mapping[str, str]] = deque(
            dict.fromkeys(THREAD_VARIABLES, threads)
            | ({GPU_VARIABLE: gpus[number % len(gpus)]} if gpus else {})
            for number in range(self.size)
        )
        self._started = 0
        self._workers: dict[int, tuple[SpawnProcess, Connection, Mapping[str, str]]] = {}

    def start(self) -> int:
        """Start a process with a free environment; returns its number."""
        context = multiprocessing.get_context("spawn")
        channel, workers_end = context.Pipe()
        environment = self._free_environments.popleft()
        process = context.Process(target=_run_worker, args=(workers_end, environment), daemon=True)
        process.start()
        # Now only the worker holds its end, so this process reads EOF when the worker exits.
        workers_end.close()
        self._started += 1
        self._workers[self._started] = process, channel, environment
        self._send(channel, self.load_teacher)
        return self._started

    def submit(self, worker: int, task: Task) -> None:
        """Send a task."""
        self._send(self._workers[worker][1], task)

    def next_message(self) -> tuple[int, WorkerMessage]:
        """Wait for the next message or exit of a worker."""
        readable = connection.wait([channel for _, channel, _ in self._workers.values()])
        worker = next(w for w, (_, channel, _) in self._workers.items() if channel in readable)
        process, channel, _ = self._workers[worker]
        try:
            message: WorkerMessage = channel.recv()
        except (EOFError, OSError):  # also in the middle of a message
            process.join()
            reason = _how_it_ended(process.exitcode)
            self._release(worker)
            return worker, WorkerLost(reason)
        # To the end of the line, so that no worker's messages wait behind another's.
        self._workers[worker] = self._workers.pop(worker)
        return worker, message

    def stop(self, worker: int) -> None:
        """Kill a worker and free its environment."""
        process = self._workers[worker][0]
        process.kill()
        process.join()
        self._release(worker)

    def close(self) -> None:
        """Kill all workers; a worker holds nothing that could be lost."""
        for process, _, _ in self._workers.values():
            process.kill()
        for worker in list(self._workers):
            self.stop(worker)

    def _release(self, worker: int) -> None:
        process, channel, environment = self._workers.pop(worker)
        channel.close()
        process.close()
        self._free_environments.append(environment)

    @staticmethod
    def _send(to: Connection, what: object) -> None:
        try:
            to.send(what)
        except OSError:
            # The worker is gone; `next_message` will report it.
            return


def _run_worker(channel: Connection, environment: Mapping[str, str]) -> None:
    """Main function of a worker process: load the teacher, encode the probe texts, then do tasks."""
    # Ctrl-C goes to all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # Before torch is imported, which reads these once. Values that the user has set are kept.
    for name, value in environment.items():
        if name == GPU_VARIABLE:
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)
    try:
        teacher: LoadedTeacher = channel.recv()()
    except TeachonceError as error:
        channel.send(error)
        return
    # If the other end of the channel is gone, nobody is left to be told.
    with suppress(ConnectionError):
        channel.send(ready_or_error(teacher))
        started: SimpleQueue[tuple[int, Finish] | None] = SimpleQueue()
        threading.Thread(target=_begin_tasks, args=(channel, teacher, started), daemon=True).start()
        for shard, finish in iter(started.get, None):
            # Any other error ends this process with its traceback: its device may have become unusable.
            channel.send(ShardDone(shard, finish()))


def _begin_tasks(
    channel: Connection, teacher: LoadedTeacher, started: SimpleQueue[tuple[int, Finish] | None]
) -> None:
    """Begin each task as it arrives, also while another one is encoded."""
    try:
        while True:
            task: Task = channel.recv()
            started.put((task.shard, teacher.begin(task)))
    except (EOFError, ConnectionError):
        return
    finally:
        started.put(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _how_it_ended(code: int | None) -> str:
    """Describe the exit code of a process."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with code {code}, see what it printed"


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus(device: str) -> Sequence[str]:
    """Returns a value of `CUDA_VISIBLE_DEVICES` for each GPU; empty if `device` means no GPU."""
    if device not in {"auto", "cuda"}:
        return []
    import torch

    visible = os.environ.get(GPU_VARIABLE)
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]
