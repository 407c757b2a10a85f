"""Many workers on one store, some of them killed or stopped for a while: no harm, and little work twice."""

import random
import signal
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from storage.column import matrix_of, text_keys_of
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.manifest import Manifest
from storage.store import Store
from tests.conftest import HashTeacher
from tests.faults import worktree
from tests.faults.processes import Child

WORKERS, SHARDS, FAULTS = 8, 60, 25
SECONDS_A_SHARD = 0.3


class Reader(threading.Thread):
    """Reads every vector in the store, over and over, until it is told to stop."""

    def __init__(self, work):
        super().__init__()
        self.corpus = Corpus(
            Store(work / "store"), Manifest.load(work / "data/corpus.json", "corpus")
        )
        self.truth = np.stack(
            [
                HashTeacher().vector(text)
                for s in range(len(self.corpus.objects))
                for text in self.corpus.texts(s)
            ]
        ).astype(np.float16)
        self.work, self.stopped, self.objects_read, self.wrong = work, threading.Event(), 0, []

    def run(self):
        try:
            while not self.stopped.is_set():
                self.read()
            self.read()  # once more, of all there is
        except Exception as error:  # told by the test
            self.wrong.append(error)

    def read(self):
        """One pass, as a process that remembers nothing."""
        store = Store(self.work / "store")
        for shard in range(len(self.corpus.objects)):
            for path in (self.work / "store/vectors").glob(
                f"*/{self.corpus.shard_digest(shard)}.arrow"
            ):
                batch = store.open(store.find(str(path.relative_to(store.root))))
                rows = slice(self.corpus.starts[shard], self.corpus.starts[shard + 1])
                assert np.array_equal(matrix_of(batch, "vector"), self.truth[rows])
                assert text_keys_of(batch).tobytes() == self.corpus.text_keys[rows].tobytes()
                self.objects_read += 1
        manifest = self.work / "data/embeddings.json"
        if manifest.exists():
            cache = Embeddings(store, Manifest.load(manifest, "embeddings"), self.corpus)
            assert np.array_equal(cache.rows_of(np.arange(len(self.truth))), self.truth)


@pytest.fixture
def two(room):
    """A work tree with about 60 shards to embed, and what one worker makes of it."""
    return worktree.before_and_after(room / "swarm", "embed", texts=16 * SHARDS, seed=7)


def test_workers_on_one_store(two, room, count, times):
    before, after = two
    for seed in range(times):
        work = worktree.copied(before, room / "work")
        shards = len(worktree.finished(work))
        assert shards >= SHARDS
        reader = Reader(work)
        reader.start()
        said = torment(work, random.Random(seed))
        reader.stopped.set()
        reader.join()
        assert reader.wrong == []
        assert reader.objects_read > shards
        assert worktree.results(work) == worktree.results(after)
        assert worktree.swept(work) == []
        # Nobody hands out work. A worker that draws one of n shards draws another worker's with a chance
        # of at most (WORKERS - 1) / n, so about that many are made twice, summed over all n, give or take
        # the root of it; in one order for all it would be (WORKERS - 1) * shards.
        made_twice = (WORKERS - 1) * sum(1 / n for n in range(1, shards + 1))
        in_vain = sum(text.count("asked\n") for text in said) - shards
        assert in_vain <= FAULTS + made_twice + 3 * made_twice**0.5
        count(
            f"SIGKILL or SIGSTOP among {WORKERS} workers that embed {SHARDS} shards or more in one store",
            FAULTS,
            "lost, wrong, or not whole for a reader that ran all along; more shards made in vain than one "
            "a fault and what chance makes of it",
        )


def test_a_run_beside_an_orphaned_one(two, room, count):
    """A killed `dvc repro` leaves its command running; the next one starts the same."""
    before, after = two
    work = worktree.copied(before, room / "work")
    orphan = start(work)
    time.sleep(4 * SECONDS_A_SHARD)
    ends = [start(work).end(), orphan.end()]
    assert [ended.code for ended in ends] == [0, 0]
    assert worktree.results(work) == worktree.results(after)
    shards = len(worktree.finished(before))
    assert sum(ended.said.count("asked\n") for ended in ends) < 1.4 * shards
    count("runs beside an orphaned one", 1, "harm, or most of the work made twice")


def start(work, most_shards=None):
    """A worker that has begun."""
    return Child(work, "embed", seconds_a_shard=SECONDS_A_SHARD, most_shards=most_shards).go()


def wake(worker):
    """Continue one that was stopped, unless it was killed meanwhile."""
    with suppress(ProcessLookupError):
        worker.go()


def torment(work, draw):
    """Kill or stop workers, put others in their place, and wait for all; what they printed.

    None can end before the last fault, however slow this process is: half of the shards are left till then.
    """
    workers, said = [start(work, SHARDS // 2) for _ in range(WORKERS)], []
    for _ in range(FAULTS):
        time.sleep(draw.uniform(0, SECONDS_A_SHARD / 3))
        place = draw.randrange(WORKERS)
        if draw.random() < 0.6:
            workers[place].send(signal.SIGKILL)
            ended = workers[place].end()
            assert ended.code == -signal.SIGKILL
            said.append(ended.said)
            workers[place] = start(work, SHARDS // 2)
        else:
            workers[place].send(signal.SIGSTOP)
            threading.Timer(2 * SECONDS_A_SHARD, wake, [workers[place]]).start()
    (work / "go on").touch()
    for worker in workers:
        ended = worker.end()
        assert ended.code == 0, ended.said
        said.append(ended.said)
    return said
