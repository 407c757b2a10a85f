"""Child processes that run one command of the pipeline, and what is done to them on the way.

Children are forked from a server that has imported everything, so that one costs a twentieth of a second.
Each stops before its command begins, so that strace can be attached to it: to list its system calls, to
kill it at the n-th call of a kind, or to make that call fail.
"""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.faults.commands"])
NUMBERS = count()

CHANGING = [
    *(
        "openat",
        "creat",
        "write",
        "pwrite64",
        "writev",
        "ftruncate",
        "fallocate",
        "fsync",
        "fdatasync",
    ),
    *(
        "fchmod",
        "fchmodat",
        "link",
        "linkat",
        "rename",
        "renameat",
        "renameat2",
        "unlink",
        "unlinkat",
    ),
    *("rmdir", "mkdir", "mkdirat"),
]
READING = [
    *("read", "pread64", "stat", "lstat", "fstat", "newfstatat", "statx", "mmap", "getdents64"),
    "close",
]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it) and all it printed."""

    code: int
    said: str


@dataclass(frozen=True)
class Call:
    """A system call on something in a work tree: the `turn`-th of that name in its process."""

    name: str
    turn: int
    line: str

    @property
    def changes(self):
        """Whether it changes what is on the disk."""
        return self.name in CHANGING and (self.name != "openat" or "O_CREAT" in self.line)

    def inject(self, fault):
        """What strace is told: `fault` happens at this call and at no other."""
        return f"{self.name}:{fault}:when={self.turn}"


class Child:
    """A command in a process of its own, stopped before its first step.

    Args:
        folder: The work tree that it runs in.
        words: What is typed after `teachonce`.
        options: See `commands.run`.
    """

    def __init__(self, folder, *words, **options):
        from tests.faults.commands import run

        # Not on the disk under test, which may be full.
        self.output = Path(tempfile.gettempdir()) / f"said-{os.getpid()}-{next(NUMBERS)}"
        arguments = (folder, self.output, words)
        self.process = SERVER.Process(target=run, args=arguments, kwargs=options)
        self.process.start()
        self.pid = self.process.pid
        status, deadline = Path(f"/proc/{self.pid}/stat"), time.monotonic() + 60
        while status.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, "does not start"
            time.sleep(0.001)

    def go(self):
        """Let it begin, or go on."""
        self.send(signal.SIGCONT)
        return self

    def send(self, number):
        """Send a signal."""
        os.kill(self.pid, number)

    @property
    def running(self):
        """Whether it has not ended."""
        return self.process.exitcode is None

    def end(self):
        """Wait until it ends."""
        self.process.join(60)
        assert not self.running, f"hangs: {self.output.read_text()}"
        said = self.output.read_text()
        self.output.unlink()
        return Ended(self.process.exitcode, said)


def run(folder, *words, **options):
    """Run one command to its end."""
    return Child(folder, *words, **options).go().end()


NO_LINKS = ("link", "linkat")


def traced(folder, *words, inject=None, names=(*CHANGING, *READING), links=True):
    """Run one command under strace, also as on a disk without hard links.

    Returns:
        How it ended, and the calls it made on things in `folder`.
    """
    log = folder.parent / f"calls-{os.getpid()}"
    # "?": a call that this machine does not have is no mistake.
    kinds = ",".join(f"?{name}" for name in names)
    options = ["-y", "-s", "0", "-e", f"trace={kinds}", *([f"--inject={inject}"] if inject else [])]
    if not links:
        options.append(f"--inject={','.join(f'?{name}' for name in NO_LINKS)}:error=EPERM")
    child = Child(folder, *words)
    strace = subprocess.Popen(
        ["strace", "-p", str(child.pid), "-o", log, *options], stderr=subprocess.PIPE, text=True
    )
    attached = strace.stderr.readline()
    assert "attached" in attached, attached
    ended = child.go().end()
    strace.communicate(timeout=60)
    return ended, list(_calls(log.read_text(), folder))


def _calls(log, folder):
    turns = Counter()
    files = {}
    for line in log.splitlines():
        if opened := re.search(r" = (\d+)<([^>]+)>$", line):
            files[opened[1]] = opened[2]
        # A refused open of /dev/fd/8 does not say which file that is.
        line = re.sub(r"/dev/fd/(\d+)", lambda found: files.get(found[1], found[0]), line)
        if found := re.match(r"(\w+)\(", line):
            turns[found[1]] += 1
            if f"{folder}/" in line:
                yield Call(found[1], turns[found[1]], line)


def needs_strace():
    """Skip where strace is missing; where the suite must run (CI is set) that is a failure."""
    if shutil.which("strace"):
        return
    if os.environ.get("CI"):
        pytest.fail("strace is missing: apt-get install strace")
    pytest.skip("strace is missing")
