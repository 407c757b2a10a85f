"""Small work trees with a store inside, and what is in them."""

import os
import shutil
import time

import yaml

from pipeline.commands import gc
from storage.durable import SCRATCH_SUFFIX
from tests.conftest import sentences, shipped_settings
from tests.faults.processes import run

STAGES = ("shard", "split", "embed", "mine")
STORE = "store"


def make(folder, texts):
    """A work tree in which nothing has run yet; about 16 texts make a shard."""
    folder.mkdir()
    params = shipped_settings()
    params["store"] = STORE
    params["shard"] |= {"sources": ["texts.txt"], "rows_per_shard": 16}
    params["evaluate"] |= {"retrieval": {}}
    params["finetune"] |= {"students": []}
    params["export"] |= {"model": "kd"}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "texts.txt").write_text("\n".join(texts))
    return folder


def before_and_after(folder, stage, *, texts, seed=0):
    """A work tree in which `stage` is next, and one in which it has run.

    Both are made where tests lay out their copies, and put aside: a copy elsewhere would be another holder
    of its manifests, and would leave refs of its own first.
    """
    folder.mkdir()
    shutil.rmtree(folder.parent / "work", ignore_errors=True)
    work = make(folder.parent / "work", sentences(texts, seed=seed))
    for earlier in STAGES[: STAGES.index(stage)]:
        assert run(work, earlier).code == 0
    before = copied(work, folder / "before")
    ended = run(work, stage)
    assert ended.code == 0, ended.said
    after = folder / "after"
    work.rename(after)
    return before, after


def copied(folder, target):
    """A copy, in the place of whatever was there."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(folder, target)


def results(folder):
    """All that stages leave, by name: objects, manifests, counts.

    Refs hold a time and a place, and a copied work tree is another holder: of them only whose manifests.
    """
    return {
        name_of(path, folder): b"" if path.parent.name == "refs" else path.read_bytes()
        for top in (STORE, "data", "reports")
        for path in (folder / top).rglob("*")
        if path.is_file() and path.suffix != SCRATCH_SUFFIX
    }


def name_of(path, folder):
    """The name of a file below `folder`; of a ref, that of its manifest's first one."""
    if path.parent.name == "refs":
        path = path.with_name(f"{path.name.partition('.')[0]}.json")
    return str(path.relative_to(folder))


def finished(folder):
    """The objects in the store by name, each with what changes if it is made again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (folder / STORE).rglob("*.arrow")
    }


def scratch(folder):
    """Files that writers have not finished."""
    return [path for path in (folder / STORE).rglob("*") if path.suffix == SCRATCH_SUFFIX]


def swept(folder):
    """What is left of scratch files after `gc --delete`, two days later."""
    old = time.time() - 2 * 86_400
    for path in scratch(folder):
        os.utime(path, (old, old))
    if (folder / STORE / "refs").is_dir():
        gc.run(folder / STORE, delete=True, grace_days=14)
    return scratch(folder)
