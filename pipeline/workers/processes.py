"""Workers that are processes of this machine: one for each GPU, or several that share its cores."""

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

from pipeline.workers.messages import Done, Lost, Word, introduced
from stages.teaching.interface import Encode, Finish, Task, Teacher
from storage.errors import TeachonceError

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


class Processes:
    """Workers that are processes of this machine.

    They are started anew, not forked: nothing that this process has loaded or locked is in them. They end
    when this one does, however it ends.

    Args:
        load_teacher: Picklable; called in each process.
        workers: How many at once; auto: one for each GPU that `device` means, else one.
        device: As in the settings.
    """

    def __init__(
        self, load_teacher: Callable[[], Encode], *, workers: int | Literal["auto"], device: str
    ) -> None:
        self.load_teacher = load_teacher
        gpus = _gpus(device)
        self.size = (len(gpus) or 1) if workers == "auto" else workers
        threads = str(max(1, _cores() // self.size))
        # The environment of each worker that is not running.
        self._free: deque[Mapping[str, str]] = deque(
            dict.fromkeys(THREAD_VARIABLES, threads)
            | ({GPU_VARIABLE: gpus[number % len(gpus)]} if gpus else {})
            for number in range(self.size)
        )
        self._started = 0
        self._workers: dict[int, tuple[SpawnProcess, Connection, Mapping[str, str]]] = {}

    def start(self) -> int:
        """A process on the place that is free."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        place = self._free.popleft()
        process = context.Process(target=_work, args=(theirs, place), daemon=True)
        process.start()
        # Only the worker has it now, so that its end is heard.
        theirs.close()
        self._started += 1
        self._workers[self._started] = process, ours, place
        self._send(ours, self.load_teacher)
        return self._started

    def give(self, worker: int, task: Task) -> None:
        """Send a task."""
        self._send(self._workers[worker][1], task)

    def next_word(self) -> tuple[int, Word]:
        """Wait for a message or an end."""
        readable = connection.wait([ours for _, ours, _ in self._workers.values()])
        worker = next(w for w, (_, ours, _) in self._workers.items() if ours in readable)
        process, ours, _ = self._workers[worker]
        try:
            word: Word = ours.recv()
        except (EOFError, OSError):  # also in the middle of a message
            process.join()
            why = _end(process.exitcode)
            self._forget(worker)
            return worker, Lost(why)
        # To the end, so that the next who has something to say is another one.
        self._workers[worker] = self._workers.pop(worker)
        return worker, word

    def dismiss(self, worker: int) -> None:
        """End a worker; its place is free."""
        process = self._workers[worker][0]
        process.kill()
        process.join()
        self._forget(worker)

    def close(self) -> None:
        """Kill all: a worker has nothing that could be lost."""
        for process, _, _ in self._workers.values():
            process.kill()
        for worker in list(self._workers):
            self.dismiss(worker)

    def _forget(self, worker: int) -> None:
        process, ours, place = self._workers.pop(worker)
        ours.close()
        process.close()
        self._free.append(place)

    @staticmethod
    def _send(to: Connection, what: object) -> None:
        try:
            to.send(what)
        except OSError:
            # It is gone, and the next word that is waited for says so.
            return


def _work(link: Connection, environment: Mapping[str, str]) -> None:
    """What a worker process does: load the teacher, say what it says of the probe texts, do tasks."""
    # Ctrl-C goes to all processes of a terminal; whoever started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # Before torch is loaded, which reads it once; what a person has set for all stays.
    for name, value in environment.items():
        if name == GPU_VARIABLE:
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)
    try:
        teacher = Teacher(link.recv()())
    except TeachonceError as error:
        link.send(error)
        return
    # Nobody is left to hear of it if the other end of the link is gone.
    with suppress(ConnectionError):
        link.send(introduced(teacher))
        begun: SimpleQueue[tuple[int, Finish] | None] = SimpleQueue()
        threading.Thread(target=_begin_all, args=(link, teacher, begun), daemon=True).start()
        for shard, finish in iter(begun.get, None):
            # Any other error ends this process with its traceback: its device may be of no use any more.
            link.send(Done(shard, finish()))


def _begin_all(
    link: Connection, teacher: Teacher, begun: SimpleQueue[tuple[int, Finish] | None]
) -> None:
    """Begin each task when it comes, also while another is encoded."""
    try:
        while True:
            task: Task = link.recv()
            begun.put((task.shard, teacher.begin(task.texts)))
    except (EOFError, ConnectionError):
        return
    finally:
        begun.put(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with code {code}, see what it printed"


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus(device: str) -> Sequence[str]:
    """What `CUDA_VISIBLE_DEVICES` can be for one worker each; none where `device` means something else."""
    if device not in {"auto", "cuda"}:
        return []
    import torch

    visible = os.environ.get(GPU_VARIABLE)
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]
