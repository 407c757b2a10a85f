"""Killed at any moment: the next run ends as if nothing had happened, and redoes nothing that was done.

A command is run once under strace, which lists its system calls. Then it is run again and again, and
killed (SIGKILL) at each call that changes something on the disk.
"""

import random
import signal

import pytest

from tests.faults import worktree
from tests.faults.processes import CHANGING, NO_LINKS, needs_strace, run, traced

STAGES = ["shard", "embed", "mine"]
TEXTS = 200
PAIRS = 40


def goes_on(work, stage, after):
    """Run `stage` again; all oracles."""
    done = worktree.finished(work)
    ended = run(work, stage)
    assert ended.code == 0, ended.said
    assert worktree.results(work) == worktree.results(after)
    assert done.items() <= worktree.finished(work).items(), "a finished shard was made again"
    assert worktree.swept(work) == []


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_each_change_on_the_disk(stage, room, count, times):
    needs_strace()
    killed = 0
    for seed in range(times):
        before, after = worktree.before_and_after(room / f"{seed}", stage, texts=TEXTS, seed=seed)
        work = worktree.copied(before, room / "work")
        ended, calls = traced(work, stage, names=CHANGING)
        assert ended.code == 0
        for call in (call for call in calls if call.changes):
            work = worktree.copied(before, room / "work")
            ended, _ = traced(work, stage, names=CHANGING, inject=call.inject("signal=KILL"))
            assert ended.code == -signal.SIGKILL, (call, ended)
            goes_on(work, stage, after)
            killed += 1
    count(
        "SIGKILL, one at each system call of shard, embed and mine that changes something",
        killed,
        "lost, other bytes at the end, a finished shard redone, a scratch file left by gc",
    )


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_each_change_on_a_disk_without_links(stage, room, count):
    """FAT, exFAT, many of FUSE: files get their names in another way, which is survived like the first."""
    needs_strace()
    before, after = worktree.before_and_after(room / "no-links", stage, texts=60)
    work = worktree.copied(before, room / "work")
    ended, calls = traced(work, stage, names=CHANGING, links=False)
    assert ended.code == 0, ended
    assert worktree.results(work) == worktree.results(after)
    assert worktree.scratch(work) == []
    asked = [call for call in calls if call.name in NO_LINKS]
    assert asked and all(call.line.endswith("(INJECTED)") for call in asked)
    # A call takes one injection. Killed at a link that is refused is killed before the rename behind it.
    for call in (call for call in calls if call.changes and call not in asked):
        work = worktree.copied(before, room / "work")
        ended, _ = traced(
            work, stage, names=CHANGING, links=False, inject=call.inject("signal=KILL")
        )
        assert ended.code == -signal.SIGKILL, (call, ended)
        done = worktree.finished(work)
        ended, _ = traced(work, stage, names=CHANGING, links=False)
        assert ended.code == 0, ended.said
        assert worktree.results(work) == worktree.results(after)
        assert done.items() <= worktree.finished(work).items(), "a finished shard was made again"
        assert worktree.swept(work) == []
        count(
            "SIGKILL, one at each such call on a disk without hard links",
            1,
            "lost, other bytes at the end, a finished shard redone, a scratch file left by gc",
        )


@pytest.mark.parametrize("stage", STAGES)
def test_killed_again_while_it_recovers(stage, room, count, times):
    needs_strace()
    draw = random.Random(0)
    before, after = worktree.before_and_after(room / "pairs", stage, texts=TEXTS)
    work = worktree.copied(before, room / "work")
    _, calls = traced(work, stage, names=CHANGING)
    calls = [call for call in calls if call.changes]
    pairs = 0
    while pairs < PAIRS * times:
        work = worktree.copied(before, room / "work")
        deaths = 0
        # The second run makes fewer calls, the more the first had done: some draws come too late.
        for call in (draw.choice(calls), draw.choice(calls)):
            ended, _ = traced(work, stage, names=CHANGING, inject=call.inject("signal=KILL"))
            deaths += ended.code == -signal.SIGKILL
        if deaths == 2:
            goes_on(work, stage, after)
            pairs += 1
    count(
        "SIGKILL, and again while the next run recovers",
        pairs,
        "lost, other bytes at the end, a finished shard redone, a scratch file left by gc",
    )
