"""Power lost at any moment: what was reported done is there, and no manifest names what is not there whole.

A run is recorded on a disk that forgets (`disk.py`). Then each state that a power cut may have left is
laid out as a folder, and everything is asked of it, also that the run continues to the same end.
"""

import random
import re
import shutil

import pytest

from pipeline.commands import transfer
from stages import embed, shard
from stages.params import ShardParams
from storage.corpus import Corpus
from storage.manifest import Manifest
from storage.remote import Remote
from storage.store import KEY_PATTERN, Store
from storage.upkeep.inventory import read_refs
from tests.conftest import HashTeacher, embed_params, sentences
from tests.faults import worktree
from tests.faults.disk import Flushed, Named, Recorder, Told, Written, lay_out, states

FILES = {"model.safetensors": "0" * 64}
DRAWS = 8
"""Power cuts that are tried after each step of a run; many leave the same."""


def shard_it(root, told):
    """A corpus from its file."""
    params = ShardParams(
        sources=["texts.txt"], field="text", rows_per_shard=16, min_chars=1, max_chars=2000
    )
    shard.run(
        params,
        root=root,
        store=Store(root / "store"),
        out=root / "data/corpus.json",
        facts=root / "reports/shard.json",
    )
    told()


def embed_it(root, told):
    """Vectors; that the teacher is asked for the next shard tells that the last one is done."""
    store = Store(root / "store")
    corpus = Corpus(store, Manifest.load(root / "data/corpus.json", "corpus"))

    class Teacher(HashTeacher):
        def __call__(self, texts, role="text"):
            told()
            return super().__call__(texts, role)

    embed.run(
        embed_params(),
        files=FILES,
        corpus=corpus,
        store=store,
        remote=None,
        load_teacher=Teacher,
        out=root / "data/embeddings.json",
        facts=root / "reports/embed.json",
    )
    told()


def grow_it(root, told):
    """More texts: both stages, over the manifests of a smaller corpus."""
    shard_it(root, told)
    embed_it(root, told)


def push_it(root, told):
    """All objects and notes to a remote folder."""
    transfer.push(manifests(root), store=Store(root / "store"), remote=Remote(str(root / "remote")))
    told()


def pull_it(root, told):
    """All of it into the store of another box."""
    transfer.pull(manifests(root), store=Store(root / "other"), remote=Remote(str(root / "remote")))
    told()


def manifests(root):
    """By their files."""
    paths = (root / "data/corpus.json", root / "data/embeddings.json")
    return {path: Manifest.load(path, None) for path in paths}


RUNS = {"shard": shard_it, "embed": embed_it, "grow": grow_it, "push": push_it, "pull": pull_it}
BEFORE = {
    "shard": [],
    "embed": [shard_it],
    "grow": [shard_it, embed_it],
    "push": [shard_it, embed_it],
    "pull": [shard_it, embed_it, push_it],
}


def prepared(room, name):
    """A folder in which the run `name` is next."""
    root = room / "run"
    root.mkdir()
    (root / "remote").mkdir()
    (root / "texts.txt").write_text("\n".join(sentences(120)))
    for step in BEFORE[name]:
        step(root, lambda: None)
    if name == "grow":
        (root / "texts.txt").write_text("\n".join(sentences(200)))
    return root


def recorded(root, name, patch):
    """The record of a run."""
    with Recorder(root, patch) as recorder:
        RUNS[name](root, lambda: recorder.told(everything(root)))
    return recorder


def is_final(name):
    """Whether a file has its last name: an object, a manifest, a note."""
    return not name.endswith(".tmp") and "." in name


def everything(root):
    """All files by name; notes hold a time and a place, so only of which manifests there are some."""
    return {
        worktree.name_of(path, root): b"" if path.parent.name == "refs" else path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and is_final(path.name)
    }


def objects_of(name, content):
    """The files that a manifest or a note of this name and content names; none of another file."""
    if not re.search(r"data/(corpus|embeddings).json|refs/", name):
        return set()
    store = name.partition("/")[0].replace("data", "store")
    return {f"{store}/{found[1]}" for found in re.finditer(f'"({KEY_PATTERN})"', content.decode())}


def check_names(root):
    """No manifest, and no note in a store or on the remote, names what is not there whole."""
    manifests = {"store": [Manifest.load(path, None) for path in root.glob("data/*.json")]}
    for place in ("store", "remote", "other"):
        named = manifests.get(place, [])
        if (root / place / "refs").is_dir():
            refs, unreadable = read_refs(root / place)
            assert unreadable == []
            named += [ref.manifest for ref in refs]
        for manifest in named:
            for entry in manifest.objects:
                Store(root / place).open(entry)


@pytest.mark.parametrize("name", RUNS)
def test_power_lost_at_any_moment(name, room, count, times, monkeypatch):
    root = prepared(room, name)
    recorder = recorded(root, name, monkeypatch)
    whole = everything(root)
    # What comes after a power cut need not be durable for these tests.
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    laid_out = set()
    for disk, left in states(recorder, random.Random(0), per_step=DRAWS * times):
        again = lay_out(left, room / "again")
        found = everything(again)
        for done, content in disk.told.items():
            # A manifest that is just being replaced may be the next one already.
            assert found.get(done) in (content, whole[done]), f"{done}: reported done and lost"
        check_names(again)
        RUNS[name](again, lambda: None)
        assert everything(again) == whole
        shutil.rmtree(again)
        laid_out.add(frozenset(left.items()))
    count(
        "states of the disk that a power cut may leave, in shard, embed, growth, push and pull",
        len(laid_out),
        "lost after it was reported done, named without being there whole, other bytes at the end",
    )


@pytest.mark.parametrize("name", RUNS)
def test_content_then_name_then_folder_then_report(name, room, monkeypatch):
    """The order of each run, without any state: a second oracle that no recovery can satisfy."""
    root = prepared(room, name)
    recorder = recorded(root, name, monkeypatch)
    disk = recorder.start.copy()
    for event in recorder.events:
        if isinstance(event, Named):
            for path, inode in event.names.items():
                if inode in disk.latest and is_final(path):
                    assert disk.flushed.get(inode) == disk.latest[inode], (
                        f"{path}: named before flushed"
                    )
                    missing = objects_of(path, disk.latest[inode]) - disk.names.keys()
                    assert not missing, f"{path}: names {missing} before their folder is flushed"
        if isinstance(event, Written):
            finals = [path for path, inode in disk.current_names().items() if inode == event.inode]
            assert not any(map(is_final, finals)), f"{finals}: written in place"
        if isinstance(event, Told):
            for path in event.contents:
                assert path in disk.names, f"{path}: reported before its folder was flushed"
        disk.happens(event)
    assert any(isinstance(event, Flushed) for event in recorder.events)
    assert disk.names.keys() >= everything(root).keys()
