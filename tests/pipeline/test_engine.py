"""More than one worker: the same bytes at the end, whoever dies; and nobody outlives the command."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.workers.engine import ATTEMPTS, pool_engine
from pipeline.workers.processes import ProcessPool
from stages.embed import MAX_CONSECUTIVE_FAILURES, FailedShardsError, ShardSlice
from stages.teaching.drift import DriftedTeacherError
from storage.errors import MissingError, TeachonceError
from storage.upkeep.inventory import take_inventory
from tests.conftest import HashTeacher, is_probe, sentences
from tests.pipeline.test_upkeep import Tree, write_params

ROOT = Path(__file__).parents[2]
POISON, DEADLY, ERROR = "Poison is this text.", "Deadly is this text.", "No memory for this text."


class Witness(HashTeacher):
    """A teacher that leaves a note of each process that loads it, and of each shard it is given."""

    def __init__(self, folder, seconds=0.02):
        super().__init__()
        self.folder, self.seconds = folder, seconds
        self.note("loaded")

    def note(self, what):
        (self.folder / f"{what}-{os.getpid()}-{time.monotonic_ns()}").touch()

    def __call__(self, texts, role="text"):
        made = super().__call__(texts, role)
        if is_probe(texts):
            return made
        self.note("asked")
        time.sleep(self.seconds)
        if POISON in texts:
            made.vectors[texts.index(POISON)] = np.nan
        if ERROR in texts:
            raise TeachonceError("cpu", "no memory for one text of 7 tokens", "set it lower")
        return made


class Mortal(Witness):
    """Killed in the middle of the text DEADLY, so many times."""

    def __init__(self, folder, times):
        super().__init__(folder)
        self.times = times

    def __call__(self, texts, role="text"):
        if DEADLY in texts and len(list(self.folder.glob("died-*"))) < self.times:
            self.note("died")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(texts, role)


class Other(HashTeacher):
    """Says something else of all texts."""

    def vector(self, text):
        return super().vector(f"{text}!")


class Waits(Witness):
    """Stays at its third shard until somebody ends the process."""

    def __call__(self, texts, role="text"):
        if notes(self.folder, "asked").count(str(os.getpid())) == 2:
            self.note("waits")
            time.sleep(600)
        return super().__call__(texts, role)


class Threads(Witness):
    """Leaves a note of the threads that torch would take."""

    def __init__(self, folder):
        super().__init__(folder)
        self.note(f"threads={os.environ['OMP_NUM_THREADS']}")


def not_here():
    raise MissingError("embed.teacher", "not on this machine", "install it")


def dies_while_loading():
    os._exit(7)


@dataclass
class Load:
    """Loads a teacher of the class in the worker, as `Workspace.load_teacher` does."""

    kind: type
    arguments: tuple

    def __call__(self):
        return self.kind(*self.arguments)


def local(workers):
    return pool_engine(lambda load: ProcessPool(load, workers=workers, device="cpu"))


def notes(folder, what):
    return [path.name.split("-")[1] for path in folder.glob(f"{what}-*")]


@pytest.fixture
def seen(tmp_path):
    folder = tmp_path / "seen"
    folder.mkdir()
    return folder


@pytest.fixture
def whole(place, tmp_path):
    """Texts, and the manifest and counts that one process makes of them."""
    # In three shards: one has 128 texts at most.
    texts = [ERROR, *sentences(700), POISON, *sentences(300, seed=1), DEADLY]
    texts = list(dict.fromkeys(texts))
    alone = type(place)(tmp_path / "alone")
    alone.embed(alone.corpus(texts, rows_per_shard=32), HashTeacher())
    return texts, results(alone)


def results(place):
    return [(place.root / name).read_bytes() for name in ("embeddings.json", "embed-facts.json")]


def test_shares_are_all_shards_once_and_each_spread_over_the_corpus():
    for count in (1, 2, 3, 7, 20):
        shares = [list(ShardSlice(number + 1, count).of(13)) for number in range(count)]
        assert sorted(shard for share in shares for shard in share) == list(range(13))
    assert list(ShardSlice(2, 3).of(8)) == [1, 4, 7]


def test_shares_in_any_order_and_a_last_embed_end_like_one_run(place, whole):
    texts, alone = whole
    corpus = place.corpus(texts, rows_per_shard=32)
    teachers = [HashTeacher() for _ in range(3)]
    for number in (3, 1, 2):
        outcome = place.embed(corpus, teachers[number - 1], share=ShardSlice(number, 3))
        mine = ShardSlice(number, 3).of(len(corpus.objects))
        rows = sum(corpus.objects[shard].rows for shard in mine)
        assert teachers[number - 1].texts_seen == rows == outcome.facts["texts_embedded"]
        assert outcome.facts["share"] == f"{number}/3"
        assert f"{rows:,} vectors in {len(mine)} shards: {len(mine)} embedded" in outcome.summary
        assert "`teachonce embed` writes it when all 3 shares are done" in outcome.summary
        assert not (place.root / "embeddings.json").exists()
        assert not (place.root / "embed-facts.json").exists()
    again = place.embed(corpus, None, share=ShardSlice(2, 3))
    assert again.facts["shards_embedded"] == 0
    place.embed(corpus, None)
    assert results(place) == alone


def test_a_share_of_a_grown_corpus_takes_from_older_shards_what_a_whole_run_would(place, tmp_path):
    """Vectors are copied from older shards; which, does not depend on what another share made just now."""
    texts = sentences(900)
    for root in (place, type(place)(tmp_path / "alone")):
        root.embed(root.corpus(texts[:500]), HashTeacher())
        corpus = root.corpus([*texts[500:], *texts[:500]], rows_per_shard=32)
        if root is place:
            for number in (2, 1):
                root.embed(corpus, HashTeacher(), share=ShardSlice(number, 2))
        root.embed(corpus, None if root is place else HashTeacher())
    assert results(place) == results(root)


@pytest.mark.parametrize(
    ("stage", "shards"),
    [
        *(
            ("embed", one)
            for one in ("0/3", "4/3", "1", "1/0", "-1/3", "a/b", "1/2/3", "1.0/2", "")
        ),
        ("mine", "0/3"),
    ],
)
def test_what_is_no_share_is_a_wrong_command_line(stage, shards):
    run = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", stage, f"--shards={shards}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "I/N is wanted, with I from 1 to N" in run.stderr


def test_a_share_of_the_command_line_says_what_comes_last(tmp_path):
    write_params(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(sentences(300)))
    Tree(tmp_path, HashTeacher()).shard()
    for words, said in [
        (["--shards", "1/2"], "no manifest yet: `teachonce embed` writes it when all 2 shares"),
        (["--shards", "2/2"], "embed --shards 2/2: "),
        ([], "0 embedded (0 texts)"),
    ]:
        code = COMMAND.format(load="HashTeacher")
        run = subprocess.run(
            [sys.executable, "-c", code, "embed", *words],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        assert said in run.stdout
        assert ("next: " in run.stdout) == (not words)
        assert (tmp_path / "data/embeddings.json").exists() == (not words)


# -------------------------------------------------------------------------------------- reading ahead


class TwoSteps(HashTeacher):
    """Reads in one step and encodes in another; knows in which threads, and what was read by then."""

    def __init__(self, last=None):
        super().__init__()
        self.last, self.lock, self.threads = last, threading.Condition(), set()
        self.begun, self.behind = 0, []

    def read(self, texts, role):
        with self.lock:
            self.begun += 1
            self.lock.notify_all()
        self.threads.add(threading.current_thread().name)
        if ERROR in texts:
            raise TeachonceError("embed.max_tokens", "7, but a prompt takes 9", "set it higher")
        return self.begun, texts

    def encode_read(self, read):
        number, texts = read
        with self.lock:  # of all but the last, the next ones are being read by now
            self.lock.wait_for(lambda: self.begun > number or number == self.last, timeout=60)
            self.behind.append(self.begun - number)
        made = HashTeacher.__call__(self, texts)
        if POISON in texts:
            made.vectors[texts.index(POISON)] = np.nan
        return made


def test_the_texts_of_the_next_shard_are_read_while_this_one_is_encoded(place, tmp_path):
    corpus = place.corpus(sentences(300), rows_per_shard=32)
    place.embed(corpus, HashTeacher())
    alone = results(place)
    twin = type(place)(tmp_path / "twin")
    shards = len(corpus.objects)
    teacher = TwoSteps(last=shards)
    twin.embed(twin.corpus(sentences(300), rows_per_shard=32), teacher)
    assert results(twin) == alone
    assert shards > 3
    # One shard ahead and no more: what is drawn is not made by anyone else.
    assert teacher.behind == [1] * (shards - 1) + [0]
    assert teacher.threads == {"read_0"}
    assert not [t for t in threading.enumerate() if t.name.startswith("read")]


def test_a_shard_that_cannot_be_read_or_has_poison_is_named_and_all_others_are_kept(place, whole):
    texts, _ = whole
    corpus = place.corpus(texts, rows_per_shard=32)
    with pytest.raises(FailedShardsError) as failed:
        place.embed(corpus, TwoSteps(last=len(corpus.objects)))
    assert "2 of" in str(failed.value)
    assert "a prompt takes 9" in str(failed.value)
    assert "NaN" in str(failed.value)
    made = {path.name for path in (place.root / "store/vectors").rglob("*.arrow")}
    asked = [f"{corpus.shard_digest(shard)}.arrow" for shard in range(len(corpus.objects))]
    assert sum(name not in made for name in asked) == 2


def test_a_bug_in_reading_ends_the_pass_and_leaves_no_thread(place):
    class Broken(TwoSteps):
        def read(self, texts, role):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        place.embed(place.corpus(sentences(200)), Broken())
    assert not [t for t in threading.enumerate() if t.name.startswith("read")]


def test_processes_make_what_one_makes(place, whole, seen):
    texts, alone = whole
    corpus = place.corpus(texts, rows_per_shard=32)
    outcome = place.embed(corpus, Load(Plainly, (seen,)), engine=local(2))
    assert results(place) == alone
    assert len(notes(seen, "loaded")) == 2
    asked = notes(seen, "asked")
    assert len(asked) == len(corpus.objects) == outcome.facts["shards_embedded"]
    # Handed out as they finish: both had some, and neither is this process.
    assert set(asked) == set(notes(seen, "loaded"))
    assert str(os.getpid()) not in asked


class Plainly(Witness):
    """Reads all texts of `whole` without harm."""

    def __call__(self, texts, role="text"):
        if not is_probe(texts):
            self.note("asked")
            time.sleep(self.seconds)
        return HashTeacher.__call__(self, texts)


def test_no_more_processes_than_shards_and_none_if_all_is_known(place, seen):
    corpus = place.corpus(sentences(40), rows_per_shard=400)
    place.embed(corpus, Load(Plainly, (seen,)), engine=local(3))
    assert len(corpus.objects) == len(notes(seen, "loaded")) == 1
    place.embed(corpus, Load(Plainly, (seen,)), engine=local(3))
    assert len(notes(seen, "loaded")) == 1


def test_workers_share_the_cores(place, seen, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    for workers in (1, 2):
        place.embed(
            place.corpus(sentences(200, seed=workers), rows_per_shard=16),
            Load(Threads, (seen,)),
            engine=local(workers),
        )
        assert len(notes(seen, f"threads={cores // workers or 1}")) >= workers
    before = len(notes(seen, "threads=7"))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    place.embed(place.corpus(sentences(20, seed=5)), Load(Threads, (seen,)), engine=local(2))
    assert len(notes(seen, "threads=7")) > before


class ReadsAhead(Plainly):
    """In two steps, with a note of each and of how many were read ahead of the one that is encoded."""

    def __init__(self, folder, shards, patient):
        super().__init__(folder)
        self.shards, self.encoded = shards, 0
        # The first workers wait until the next shard is read; one that replaces them has shards alone.
        self.patience = 60.0 if len(notes(folder, "loaded")) <= patient else 0.0

    def read(self, texts, role):
        if DEADLY in texts:
            self.note("died")
            os.kill(os.getpid(), signal.SIGKILL)
        self.note("read")
        return texts

    def encode_read(self, texts):
        self.encoded += 1
        until = time.monotonic() + self.patience
        while time.monotonic() < until and len(notes(self.folder, "read")) < self.shards:
            if self.ahead() > 0:
                break
            time.sleep(0.01)
        self.note(f"ahead={self.ahead()}")
        return HashTeacher.__call__(self, texts)

    def ahead(self):
        return notes(self.folder, "read").count(str(os.getpid())) - self.encoded


def test_processes_read_the_next_shard_while_they_encode_one(place, whole, seen):
    texts = [text for text in whole[0] if text != DEADLY]
    corpus = place.corpus(texts, rows_per_shard=32)
    shards = len(corpus.objects)
    place.embed(corpus, Load(ReadsAhead, (seen, shards, 2)), engine=local(2))
    assert len(notes(seen, "read")) == shards > 6
    # One and no more: what a worker has in hand is lost to one that is faster.
    assert len(notes(seen, "ahead=0")) + len(notes(seen, "ahead=1")) == shards
    # Each worker's last.
    assert 1 <= len(notes(seen, "ahead=0")) <= 2
    one = type(place)(place.root / "one")
    one.embed(one.corpus(texts, rows_per_shard=32), HashTeacher())
    assert results(one) == results(place)


def test_a_shard_that_kills_while_it_is_read_is_found_and_the_one_before_it_is_not_blamed(
    place, whole, seen
):
    texts = [text for text in whole[0] if text != DEADLY]
    # Another one is encoded when it is read.
    texts = [*texts[:400], DEADLY, *texts[400:]]
    corpus = place.corpus(texts, rows_per_shard=32)
    deadly = shard_of(corpus, DEADLY)
    assert 2 < deadly < len(corpus.objects) - 2
    with pytest.raises(FailedShardsError) as caught:
        place.embed(corpus, Load(ReadsAhead, (seen, 99, 1)), engine=local(1))
    assert f"failed at 1 of {len(corpus.objects)} shards" in caught.value.problem
    assert f"\n  shard {deadly} (" in caught.value.problem
    assert f"{ATTEMPTS} workers were lost at it: killed by SIGKILL" in caught.value.problem
    # The first time it could have been either.
    assert len(notes(seen, "died")) == ATTEMPTS + 1


@pytest.mark.parametrize("times", [1, ATTEMPTS - 1])
def test_a_killed_worker_is_replaced_and_its_shard_done_again(place, seen, times, caplog):
    texts = [*sentences(600), DEADLY]
    corpus = place.corpus(texts, rows_per_shard=32)
    place.embed(corpus, Load(Mortal, (seen, times)), engine=local(2))
    assert len(notes(seen, "died")) == times
    assert len(notes(seen, "loaded")) == 2 + times
    lines = [line for line in caplog.messages if "a worker was lost at shard" in line]
    assert len(lines) == times
    last = len(corpus.objects) - 1
    assert f"at shard {last}, which is requeued: killed by SIGKILL" in lines[0]
    manifest = (place.root / "embeddings.json").read_bytes()
    (place.root / "embeddings.json").unlink()
    alone = type(place)(place.root / "alone")
    alone.embed(alone.corpus(texts, rows_per_shard=32), HashTeacher())
    assert (alone.root / "embeddings.json").read_bytes() == manifest


def shard_of(corpus, text):
    (found,) = [s for s in range(len(corpus.objects)) if text in corpus.texts(s)]
    return found


def test_shards_that_fail_are_named_when_all_others_are_done(place, whole, seen):
    texts, alone = whole
    corpus = place.corpus(texts, rows_per_shard=32)
    poisoned, deadly, refused = (shard_of(corpus, text) for text in (POISON, DEADLY, ERROR))
    row = corpus.texts(poisoned).index(POISON)
    with pytest.raises(FailedShardsError) as caught:
        place.embed(corpus, Load(Mortal, (seen, 99)), engine=local(2))
    error = caught.value
    assert error.exit_code == 1
    failed = {poisoned, deadly, refused}
    assert f"failed at {len(failed)} of {len(corpus.objects)} shards" in error.problem
    for shard in failed:
        assert f"\n  shard {shard} ({corpus.objects[shard].key}): " in error.problem
    assert len(failed) == 3
    assert f"rows {row} of the shard" in error.problem
    assert f"{ATTEMPTS} workers were lost at it: killed by SIGKILL" in error.problem
    assert "no memory for one text of 7 tokens" in error.problem
    assert len(notes(seen, "died")) == ATTEMPTS
    assert not (place.root / "embeddings.json").exists()
    later = HashTeacher()
    place.embed(corpus, later)
    assert later.texts_seen == sum(corpus.objects[shard].rows for shard in failed)
    assert results(place) == alone


def test_a_teacher_that_fails_at_everything_is_stopped(place):
    class Broken(HashTeacher):
        def __call__(self, texts, role="text"):
            made = super().__call__(texts, role)
            made.vectors[0] *= 1 if is_probe(texts) else np.nan
            return made

    corpus = place.corpus(sentences(2000), rows_per_shard=16)
    assert len(corpus.objects) > 2 * MAX_CONSECUTIVE_FAILURES
    teacher = Broken()
    with pytest.raises(FailedShardsError, match=f"failed at {MAX_CONSECUTIVE_FAILURES} of"):
        place.embed(corpus, teacher)
    assert teacher.texts_seen < 1000


def test_many_failed_shards_among_others_are_all_named(place):
    class Moody(HashTeacher):
        calls = 0

        def __call__(self, texts, role="text"):
            made = super().__call__(texts, role)
            self.calls += 1
            made.vectors[0] *= np.nan if self.calls % 3 == 0 else 1
            return made

    corpus = place.corpus(sentences(1000), rows_per_shard=16)
    teacher = Moody()
    with pytest.raises(FailedShardsError) as caught:
        place.embed(corpus, teacher)
    assert teacher.texts_seen == 1000
    failed = (len(corpus.objects) + 1) // 3  # the probe texts were the first call
    assert failed > MAX_CONSECUTIVE_FAILURES
    assert f"failed at {failed} of {len(corpus.objects)} shards" in caught.value.problem
    assert caught.value.problem.count("\n  shard ") == failed


def test_what_a_worker_cannot_load_is_told_as_it_is(place):
    with pytest.raises(MissingError, match="not on this machine") as caught:
        place.embed(place.corpus(sentences(50)), Load(call, (not_here,)), engine=local(2))
    assert (caught.value.exit_code, caught.value.cure) == (3, "install it")


def call(function):
    return function()


def test_workers_that_die_while_they_load_end_the_pass(place):
    with pytest.raises(TeachonceError, match=f"{ATTEMPTS} workers .*before.*ended with code 7"):
        place.embed(
            place.corpus(sentences(300)), Load(call, (dies_while_loading,)), engine=local(2)
        )


def test_each_worker_is_compared_with_what_the_cache_was_begun_with(place):
    corpus = place.corpus(sentences(300))
    place.embed(corpus, HashTeacher(), share=ShardSlice(1, 8))
    before = len(take_inventory(place.root / "store").objects)
    with pytest.raises(DriftedTeacherError):
        place.embed(corpus, Load(Other, ()), engine=local(2))
    assert len(take_inventory(place.root / "store").objects) == before
    assert multiprocessing.active_children() == []


def test_an_error_arrives_from_a_worker_as_it_was():
    error = MissingError("a/file", "not there", "make it")
    error.exit_code = 5
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.__dict__) == (MissingError, str(error), error.__dict__)


# The command itself with two workers, each with a teacher that waits at its third shard.
COMMAND = """
import sys
from pathlib import Path
from pipeline import cli
from pipeline.workspace import Workspace
from tests.conftest import HashTeacher
from tests.pipeline.test_engine import Load, Waits

Workspace.teacher = lambda self: ({{"model.safetensors": "0" * 64}}, {load})
cli.main()
"""


def environment():
    return {"PYTHONPATH": str(ROOT), "PATH": ""}


def alive(pid):
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    return False


@pytest.mark.parametrize(
    ("number", "code", "whole_group"),
    [
        (signal.SIGINT, 130, True),
        (signal.SIGTERM, 143, False),
        (signal.SIGKILL, -signal.SIGKILL, False),
    ],
)
def test_no_worker_outlives_the_command(tmp_path, seen, number, code, whole_group):
    """Ctrl-C goes to all processes of a terminal, SIGTERM and SIGKILL to the one that was started."""
    write_params(tmp_path)
    settings = (tmp_path / "params.yaml").read_text()
    settings = settings.replace("engine: this_process", "engine: local")
    (tmp_path / "params.yaml").write_text(settings.replace("workers: auto", "workers: 2"))
    (tmp_path / "texts.txt").write_text("\n".join(sentences(1500)))
    tree = Tree(tmp_path, HashTeacher())
    tree.shard()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            COMMAND.format(load=f"Load(Waits, (Path({str(seen)!r}),))"),
            "embed",
        ],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        # Both are at work, and what each did before is finished; one object holds the probe texts.
        vectors = tmp_path / "store/vectors"
        while len(notes(seen, "waits")) < 2 or len(list(vectors.rglob("*.arrow"))) < 5:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if whole_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)  # seconds, on a machine that is not busy
        assert process.returncode == code
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in notes(seen, "loaded")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in errors
    if number != signal.SIGKILL:  # which leaves a scratch file, if it was at one
        assert take_inventory(tmp_path / "store").scratch == ()
        assert errors.splitlines()[-1].endswith("`teachonce embed` goes on from there")
    finished = {file.name for file in take_inventory(tmp_path / "store").objects}
    teacher = HashTeacher()
    Tree(tmp_path, teacher).embed()
    texts = json.loads((tmp_path / "reports/stages/shard.json").read_bytes())["kept"]
    kept = [e for e in tree.manifest("embeddings").objects if e.key in finished]
    assert kept
    assert teacher.texts_seen == texts - sum(entry.rows for entry in kept)
