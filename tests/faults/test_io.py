"""The operating system refuses: the command says so, hurts nothing, and can be run again.

Errors are put in by strace at single system calls; then come real ones: a full disk, a limit on the size
of a file, a folder that may not be written.
"""

import json
import random
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults import worktree
from tests.faults.processes import needs_strace, run, traced

STAGES = ["shard", "embed", "mine"]
ERRORS_OF_EACH = 105

ERRORS = {
    "new file": "ENOSPC EDQUOT EIO EROFS EACCES EMFILE ESTALE",
    "openat": "EIO EACCES EMFILE ESTALE",
    "read": "EIO ESTALE",
    "stat": "EIO EACCES ESTALE",
    "getdents64": "EIO EACCES ESTALE",
    "mmap": "ENOMEM EACCES",
    "write": "ENOSPC EDQUOT EIO ESTALE",
    "fsync": "ENOSPC EDQUOT EIO ESTALE",
    "fchmod": "EIO EROFS EACCES ESTALE",
    "link": "ENOSPC EDQUOT EIO EROFS EACCES ESTALE",
    "mkdir": "ENOSPC EDQUOT EIO EROFS EACCES ESTALE",
    "unlink": "EIO EROFS EACCES ESTALE",
    "close": "ENOSPC EDQUOT EIO",
}
LIKE = {
    "pread64": "read",
    "lstat": "stat",
    "fstat": "stat",
    "newfstatat": "stat",
    "statx": "stat",
    "linkat": "link",
    "rename": "link",
    "renameat": "link",
    "renameat2": "link",
    "unlinkat": "unlink",
    "mkdirat": "mkdir",
}
SCRATCH = re.compile(r"\.(.+)\.\d+\.[0-9a-f]{8}\.tmp")


def chosen(calls, number):
    """(call, error) pairs: each kind of call with each of its errors once, the others by chance."""
    pairs = [(call, error) for call in calls for error in errors_of(call)]
    random.Random(0).shuffle(pairs)
    kinds = {(call.name, call.changes, error): (call, error) for call, error in pairs}
    once = list(kinds.values())
    return [*once, *(pair for pair in pairs if pair not in once)][:number]


def errors_of(call):
    """What such a call may answer."""
    kind = "new file" if call.name == "openat" and call.changes else call.name
    return ERRORS[LIKE.get(kind, kind)].split()


def path_of(call, work):
    """The file that a call was about, by the name that it is to have in the end."""
    last = re.findall(rf"{re.escape(str(work))}/[^\">]+", call.line)[-1]
    path = Path(last.removesuffix(" (deleted)"))
    scratch = SCRATCH.fullmatch(path.name)
    return path.with_name(scratch[1]) if scratch else path


def check_message(said, path, work):
    """What a person needs: where, what, and what to do; no traceback."""
    assert "Traceback" not in said, said
    found = re.search(r"^error: (.+?): .+\n  cure: .+", said, re.MULTILINE)
    assert found, said
    place = work / found[1]
    scratch = SCRATCH.fullmatch(place.name)
    place = place.with_name(scratch[1]) if scratch else place
    assert place == path or place in path.parents or path in place.parents, (place, path)


def check_flushed_once(calls, failed):
    """A flush that failed is not tried again, and what it was for gets no name."""
    later = calls[calls.index(failed) + 1 :]
    name = re.search(r"<([^>]+)>", failed.line)[1]
    assert not [call for call in later if call.name == "fsync" and f"<{name}>" in call.line]
    assert not [
        call for call in later if call.name in ("link", "linkat", "rename") and name in call.line
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_at_any_call(stage, room, count, times):
    needs_strace()
    before, after = worktree.before_and_after(room / "io", stage, texts=100)
    work = worktree.copied(before, room / "work")
    _, calls = traced(work, stage)
    whole, injected = worktree.results(after), 0
    for call, error in chosen(calls, ERRORS_OF_EACH * times):
        work = worktree.copied(before, room / "work")
        was_there = worktree.results(work)
        ended, again = traced(work, stage, inject=call.inject(f"error={error}"))
        (failed,) = [call for call in again if call.line.endswith("(INJECTED)")]
        found = worktree.results(work)
        if ended.code == 0:
            # Not each answer matters, such as that of the last close of a file that was only read.
            assert not failed.changes, (failed, ended)
            assert found == whole
        else:
            assert ended.code == 1, ended
            check_message(ended.said, path_of(failed, work), work)
            assert all(
                found.get(name) in (content, whole[name]) for name, content in was_there.items()
            )
            assert all(
                content == whole[name] for name, content in found.items() if name not in was_there
            )
        ended = run(work, stage)
        assert ended.code == 0, ended.said
        assert worktree.results(work) == whole
        injected += 1
    count(
        "errors at a system call (ENOSPC, EDQUOT, EIO, EROFS, EACCES, EMFILE, ESTALE, ENOMEM)",
        injected,
        "taken for success, without path and cure, anything hurt, not resumed",
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_flush_that_failed_is_not_tried_again(stage, room, count):
    """Linux reports a lost page once, then calls it clean: a second fsync would be a lie."""
    needs_strace()
    before, _ = worktree.before_and_after(room / "flush", stage, texts=40)
    work = worktree.copied(before, room / "work")
    _, calls = traced(work, stage)
    for call in (call for call in calls if call.name == "fsync"):
        work = worktree.copied(before, room / "work")
        ended, again = traced(work, stage, inject=call.inject("error=EIO"))
        assert ended.code == 1, ended
        (failed,) = [call for call in again if call.line.endswith("(INJECTED)")]
        check_flushed_once(again, failed)
        count("fsync calls that fail", 1, "tried again, or what they were for gets a name")


# ---------------------------------------------------------------------------------------- real ones


@contextmanager
def full_disk(folder, kilobytes):
    """A disk of its own size; skips where it may not be made."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def read_only(folder):
    """The folder mounted on itself, so that nobody may write in it; skips where that may not be done."""
    bound = subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False)
    if bound.returncode:
        pytest.skip(f"no folder can be mounted here: {bound.stderr.decode().strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kilobytes", [4, 12, 20])
def test_a_disk_that_is_full(stage, kilobytes, room, count):
    before, after = worktree.before_and_after(room / "full", stage, texts=100)
    used = sum(
        4 * (1 + path.stat().st_size // 4096) for path in before.rglob("*") if path.is_file()
    )
    with full_disk(room / "disk", used + kilobytes) as disk:
        work = worktree.copied(before, disk / "work")
        ended = run(work, stage)
        assert ended.code == 1, ended
        # The second is embed's, which looks ahead when its first shard is done.
        assert re.search(
            r"(No space left on device|are free there)\n  cure: free some space", ended.said
        )
        assert worktree.scratch(work) == []
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        ended = run(work, stage)
        assert ended.code == 0, ended.said
        assert worktree.results(work) == worktree.results(after)
    count(
        "runs on a disk that is full", 1, "without path and cure, a scratch file left, not resumed"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_store_that_may_only_be_read(stage, room, count):
    """It serves a stage when all is there; if an object is missing, the command says so."""
    _, after = worktree.before_and_after(room / "read", stage, texts=100)
    work = worktree.copied(after, room / "work")
    store = work / worktree.STORE
    for ref in (store / "refs").iterdir():
        ref.unlink()  # those of others may name all of it; this tree has none yet
    there = worktree.results(work)
    with read_only(store):
        ended = run(work, stage)
        assert (ended.code, "may only be read here" in ended.said) == (0, True), ended.said
    assert worktree.results(work) == there
    manifest = {"shard": "corpus", "embed": "embeddings", "mine": "negatives"}[stage]
    first = json.loads((work / f"data/{manifest}.json").read_bytes())["objects"][0]
    (store / first["key"]).unlink()
    with read_only(store):
        ended = run(work, stage)
        assert ended.code == 1, ended
        assert "Read-only file system\n  cure: mount it writable" in ended.said
    assert run(work, stage).code == 0
    count("stores that may only be read", 2, "of no use though all is there, without path and cure")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("file_bytes", [500, 900, 1500])
def test_a_limit_on_the_size_of_a_file_cuts_a_write_short(stage, file_bytes, room, count):
    """The kernel takes the bytes up to the limit and says so; the next write is refused."""
    before, after = worktree.before_and_after(room / "limit", stage, texts=100)
    work = worktree.copied(before, room / "work")
    ended = run(work, stage, file_bytes=file_bytes)
    assert ended.code == 1, ended
    assert "File too large\n  cure: raise the file size limit (ulimit -f)" in ended.said
    assert worktree.scratch(work) == []
    assert run(work, stage).code == 0
    assert worktree.results(work) == worktree.results(after)
    count(
        "writes cut short by a limit", 1, "without path and cure, a scratch file left, not resumed"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_write_that_lies(stage, room, count):
    """A write that claims ten bytes more than it wrote: no object of it is believed."""
    needs_strace()
    before, after = worktree.before_and_after(room / "lie", stage, texts=100)
    work = worktree.copied(before, room / "work")
    _, calls = traced(work, stage)
    for call in (call for call in calls if call.name == "write" and ".arrow" in call.line):
        work = worktree.copied(before, room / "work")
        ended, again = traced(work, stage, inject=call.inject("retval=10"))
        (failed,) = [call for call in again if call.line.endswith("(INJECTED)")]
        assert ended.code == 3, ended
        path = path_of(failed, work)
        assert f"error: {path}: damaged: " in ended.said
        assert f"rm -f '{path}', then run `teachonce {stage}`" in ended.said
        path.unlink()
        assert run(work, stage).code == 0
        assert worktree.results(work) == worktree.results(after)
        count(
            "writes that claim more than they wrote", 1, "an object believed, without path and cure"
        )


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_may_not_be_written(stage, room, count):
    before, after = worktree.before_and_after(room / "closed", stage, texts=100)
    folders = [path for path in after.rglob("*") if path.is_dir() and path.name != "raw"]
    for folder in [folder.relative_to(after) for folder in folders]:
        work = worktree.copied(before, room / "work")
        (work / folder).mkdir(parents=True, exist_ok=True)
        for path in (work, *work.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o644)
        (work / folder).chmod(0o555)
        was_there = worktree.results(work)
        ended = run(work, stage, as_user=True)
        if ended.code == 0:  # nothing was to be written there
            assert not any(
                Path(name).parent == folder and name not in was_there
                for name in worktree.results(after)
            )
            continue
        assert ended.code == 1, ended
        check_message(ended.said, work / folder, work)
        assert "give yourself write permission there" in ended.said
        (work / folder).chmod(0o777)
        assert run(work, stage, as_user=True).code == 0
        assert worktree.results(work) == worktree.results(after)
        count("folders that may not be written", 1, "without path and cure, not resumed")
