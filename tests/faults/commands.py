"""What runs in a child process: the real command line, with a teacher that needs no torch.

Imported once by the server that children are forked from, so everything that a command imports on its
way is imported here.
"""

import getpass  # noqa: F401
import os
import resource
import signal
import sys
import time
from pathlib import Path

import faiss  # noqa: F401
import numpy.random  # noqa: F401
import pandas  # noqa: F401 - by Arrow, for its first array of Python objects

import stages.embed
import stages.mine
import stages.mining.faiss_search
import stages.mining.self_join
import stages.models.encoder
import stages.shard
import stages.split  # noqa: F401
from pipeline import cli
from pipeline.workspace import Workspace
from tests.conftest import HashTeacher

NOBODY = 65534


def run(
    folder, output, words, as_user=False, file_bytes=None, seconds_a_shard=0.0, most_shards=None
):
    """Stop; when continued, do what `teachonce WORDS` does in `folder`, as a user that modes bind."""
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(folder)
    if as_user and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    teacher = SlowTeacher(seconds_a_shard, most_shards)
    Workspace.teacher = lambda self: ({"model.safetensors": "0" * 64}, lambda: teacher)
    sys.argv = ["teachonce", *words]
    os.kill(os.getpid(), signal.SIGSTOP)
    cli.main()


class SlowTeacher(HashTeacher):
    """Says "asked" once for each shard that it is asked for.

    Args:
        seconds: That it takes for each.
        most_shards: From so many in the store on it waits until the file `go on` is there; None for never.
    """

    def __init__(self, seconds, most_shards):
        super().__init__()
        self.seconds, self.most_shards = seconds, most_shards

    def __call__(self, texts, role="text"):
        os.write(1, b"asked\n")
        time.sleep(self.seconds)
        while self.must_wait():
            time.sleep(0.01)
        return super().__call__(texts, role)

    def must_wait(self):
        if self.most_shards is None or Path("go on").exists():
            return False
        return len(list(Path("store/vectors").glob("*/*.arrow"))) >= self.most_shards


HashTeacher()(["warm"])
