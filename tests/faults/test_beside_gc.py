"""gc beside stages, in thousands of orders, killed at each step, and as real processes."""

import os
import random
import signal
import time

import pytest

from storage.manifest import Manifest
from storage.probe import PROBE_DIGEST
from storage.store import Store
from storage.upkeep.inventory import read_refs, take_inventory
from tests.faults import worktree
from tests.faults.processes import CHANGING, Child, needs_strace, run, traced
from tests.interleavings import drawn_orders, every_order
from tests.storage.test_beside_gc import OLD, Scene, played

DRAWN = 250
ROUNDS = 40
WHAT = "orders of the steps of gc and of stages that take up old objects"
NEVER = "a manifest or ref that names what is gone, anything else left behind"


@pytest.mark.parametrize("owner", ["mine", "somebody else's"])
def test_every_order_of_gc_and_a_resumed_stage(owner, room, count, monkeypatch):
    forbidden = () if owner == "mine" else ("utime",)
    found = played(Scene(room), monkeypatch, every_order(), forbidden=forbidden)
    assert found["put back"] > 0
    assert found["deleted"] > 0
    # One's own objects are touched when they are found. Then a stage has to run again only where gc deletes
    # within the step between opening a file and touching it.
    assert found["failed"] < found["orders"] / (20 if owner == "mine" else 2)
    count(WHAT, found["orders"], NEVER)


@pytest.mark.parametrize("grace_days", [0.0, 14.0])
@pytest.mark.parametrize("gcs", [1, 2])
def test_drawn_orders_of_two_stages_and_gcs(grace_days, gcs, room, count, times, monkeypatch):
    orders = drawn_orders(gcs, DRAWN * times)
    scene = Scene(room, there=1, texts=40)
    found = played(scene, monkeypatch, orders, works=("a", "b"), gcs=gcs, grace_days=grace_days)
    assert min(found["put back"], found["made again"]) > 0
    count(WHAT, found["orders"], NEVER)


def interrupted(room, stage):
    """A work tree in which `stage` was killed before its manifest, weeks ago, and what it would leave."""
    before, after = worktree.before_and_after(room / "old", stage, texts=100)
    manifest = {"shard": "corpus", "embed": "embeddings", "mine": "negatives"}[stage]
    work = worktree.copied(after, room / "interrupted")
    (work / f"data/{manifest}.json").unlink()
    had = {path.name for path in (before / "store").rglob("refs/*.json")}
    for ref in (work / "store/refs").iterdir():
        if ref.name not in had:
            ref.unlink()
    then = time.time() - OLD
    for path in (work / "store").rglob("*.arrow"):
        os.utime(path, (then, then))
    return work, after


def inodes(work):
    return {name: inode for name, (inode, _) in worktree.finished(work).items()}


@pytest.mark.parametrize("stage", ["shard", "embed"])
def test_gc_killed_at_each_change_on_the_disk(stage, room, count):
    needs_strace()
    template, after = interrupted(room, stage)
    _, calls = traced(worktree.copied(template, room / "work"), "gc", "--delete", names=CHANGING)
    killed = came_back = 0
    for call in (call for call in calls if call.changes):
        work = worktree.copied(template, room / "work")
        had = inodes(work)
        inject = call.inject("signal=KILL")
        ended, _ = traced(work, "gc", "--delete", names=CHANGING, inject=inject)
        assert ended.code == -signal.SIGKILL, (call, ended)
        aside = {file.name for file in take_inventory(work / "store").aside}
        deleted = len(had) - len(inodes(work)) - len(aside)
        ended = run(work, stage)
        assert ended.code == 0, ended.said
        # What had been taken away came back and was not made again.
        made = [name for name, inode in inodes(work).items() if had.get(name) != inode]
        assert len(made) <= deleted
        came_back += bool(aside)
        ended = run(work, "gc", "--delete")
        assert ended.code == 0, ended.said
        assert take_inventory(work / "store").aside == ()
        assert run(work, "verify", "--read-data").code == 0
        assert results(work) == results(after)
        killed += 1
    assert came_back > 0
    count(
        "SIGKILL, one at each system call of gc that changes something",
        killed,
        "a named object lost, or one that was not deleted made again by the stage that goes on",
    )


def results(work):
    """What the stage leaves; the record of the probe texts only comes again when a teacher is loaded."""
    return {
        name: content
        for name, content in worktree.results(work).items()
        if PROBE_DIGEST not in name and "/trash/" not in name
    }


@pytest.mark.parametrize("stage", ["shard", "embed"])
def test_real_processes_side_by_side(stage, room, count, times):
    template, after = interrupted(room, stage)
    draw, ends = random.Random(0), []
    for _ in range(ROUNDS * times):
        work = worktree.copied(template, room / "work")
        first, second = Child(work, stage), Child(work, "gc", "--delete")
        if draw.random() < 0.5:
            first, second = second, first
        first.go()
        time.sleep(draw.uniform(0, 0.04))
        second.go()
        by_words = {first: first.end(), second: second.end()}
        for ended in by_words.values():
            assert ended.code in (0, 3), ended.said
            if ended.code:
                assert f"run `teachonce {stage}` again: what is there is kept" in ended.said
        ends += [ended.code for ended in by_words.values()]
        store = Store(work / "store")
        named = [ref.manifest for ref in read_refs(store.root)[0]]
        named += [Manifest.load(path, None) for path in named_files(work)]
        for manifest in named:
            for entry in manifest.objects:
                store.open(entry)
        assert run(work, stage).code == 0
        assert results(work) == results(after)
        assert take_inventory(store.root).aside == ()
    count("runs of a stage beside gc --delete, as processes", ROUNDS * times, NEVER)


def named_files(work):
    return [path for path in (work / "data").glob("*.json") if path.stem in MANIFESTS]


MANIFESTS = {"corpus", "embeddings", "negatives"}
