"""gc beside a stage that takes up old objects: in no order of steps does a manifest name what is gone."""

import os
import shutil
import time
from collections import Counter

import pytest

from pipeline.commands import gc
from stages import shard
from stages.params import ShardParams
from storage.errors import MissingError, TeachonceError
from storage.manifest import Manifest
from storage.store import Store
from storage.upkeep.inventory import read_refs, take_inventory
from tests.conftest import sentences
from tests.interleavings import Turns, drawn_orders, names_of_objects_and_refs

OLD = 20 * 86_400.0


class Scene:
    """A store in which a killed run left old text shards, and a work tree in which it goes on.

    Args:
        folder: Empty.
        there: How many of the shards that run had made; None for all.
        texts: Of the corpus.
    """

    def __init__(self, folder, *, there=None, texts=12):
        self.folder, self.template = folder, folder / "template"
        (self.template / "a").mkdir(parents=True)
        (self.template / "b").mkdir()
        for work in ("a", "b"):
            (self.template / work / "texts.txt").write_text("\n".join(sentences(texts)))
        self.root, self.runs = self.template, 0
        self.shard("a")
        self.keys = sorted(file.name for file in take_inventory(self.root / "store").objects)
        for ref in (self.root / "store/refs").iterdir():
            ref.unlink()
        (self.template / "a/corpus.json").unlink()
        for key in self.keys[there:] if there is not None else ():
            (self.root / "store" / key).unlink()
        self.age()

    def age(self):
        """Let every object be three weeks old."""
        then = time.time() - OLD
        for path in (self.root / "store").rglob("*.arrow"):
            os.utime(path, (then, then))

    def again(self):
        """All as it was; in another folder, which no actor of an earlier run can know."""
        if self.root != self.template:
            shutil.rmtree(self.root)
        self.runs += 1
        self.root = self.folder / f"run-{self.runs}"
        # copytree keeps times.
        shutil.copytree(self.template, self.root)

    def shard(self, work="a"):
        """What `teachonce shard` does in the work tree `work`."""
        at = self.root / work
        params = ShardParams(
            sources=["texts.txt"], field="text", rows_per_shard=16, min_chars=1, max_chars=2000
        )
        return shard.run(
            params,
            root=at,
            store=Store(self.root / "store"),
            out=at / "corpus.json",
            facts=at / "facts.json",
        )

    def gc(self, grace_days=14.0, forget=()):
        """What `teachonce gc --delete` does."""
        return gc.run(self.root / "store", delete=True, grace_days=grace_days, forget=forget)

    def check(self, ended, works):
        """Whatever the order was: what is named is there, or the run failed, loudly, and named nothing."""
        store = Store(self.root / "store")
        refs, unreadable = read_refs(store.root)
        assert unreadable == []
        named = [ref.manifest for ref in refs]
        for work, result in zip(works, ended, strict=False):
            path = self.root / work / "corpus.json"
            if isinstance(result, Exception):
                assert isinstance(result, MissingError), result
                assert "  cure: run `teachonce shard`" in str(result)
                assert not path.exists()
            else:
                named.append(Manifest.load(path, "corpus"))
                assert str(path.parent) in {ref.made["in"] for ref in refs}
        for manifest in named:
            for entry in manifest.objects:
                store.open(entry)
        inventory = take_inventory(store.root)
        assert (inventory.aside, inventory.marks, inventory.scratch) == ((), (), ())


def played(scene, patch, orders, *, works=("a",), gcs=1, grace_days=14.0, forbidden=()):
    """Run stages and gcs in many orders; returns how the runs ended."""
    outcomes = Counter()
    for choose in orders:
        scene.again()
        stages = [lambda work=work: scene.shard(work) for work in works]
        sweeps = [lambda: scene.gc(grace_days)] * gcs
        numbers = range(len(stages), len(stages) + gcs)
        shared = names_of_objects_and_refs(scene.root / "store", gcs=numbers)
        with Turns(patch, shared, forbidden) as turns:
            ended = turns.run([*stages, *sweeps], choose)
        for result in ended[len(works) :]:
            assert not isinstance(result, Exception), result
        scene.check(ended, works)
        swept = [result.facts for result in ended[len(works) :]]
        outcomes["orders"] += 1
        outcomes["failed"] += any(isinstance(result, TeachonceError) for result in ended)
        outcomes["put back"] += any(facts["put_back"] for facts in swept)
        outcomes["deleted"] += any(facts["orphans"] for facts in swept)
        outcomes["made again"] += any(
            result.facts["shards_new"]
            for result in ended[: len(works)]
            if not isinstance(result, Exception)
        )
    return outcomes


def test_some_orders_of_gc_and_a_resumed_stage(tmp_path, monkeypatch):
    found = played(Scene(tmp_path), monkeypatch, drawn_orders(0, 100))
    assert found["orders"] == 100
    assert min(found["put back"], found["deleted"], found["made again"]) > 0


@pytest.mark.parametrize("grace_days", [0.0, 14.0])
def test_some_orders_where_objects_are_somebody_elses(tmp_path, monkeypatch, grace_days):
    """They cannot be touched, so only the second look is left."""
    scene = Scene(tmp_path)
    found = played(
        scene, monkeypatch, drawn_orders(1, 100), grace_days=grace_days, forbidden=("utime",)
    )
    assert min(found["put back"], found["deleted"], found["failed"]) > 0


def test_some_orders_of_two_stages_and_two_gcs(tmp_path, monkeypatch):
    scene = Scene(tmp_path, there=1, texts=40)
    found = played(scene, monkeypatch, drawn_orders(2, 50), works=("a", "b"), gcs=2, grace_days=0.0)
    assert min(found["put back"], found["deleted"]) > 0
