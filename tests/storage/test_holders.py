"""One ref for each holder of a manifest: who needs what, who made it, and what forgetting one frees."""

import errno
import getpass
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.commands import gc, ls, transfer
from storage import durable, holders, trash
from storage import manifest as manifest_module
from storage.errors import (
    AnotherCopyError,
    DamagedError,
    MissingError,
    StorageError,
    TeachonceError,
)
from storage.manifest import Manifest
from storage.remote import Remote
from storage.store import Store, canonical_json, digest
from storage.upkeep.inventory import find_ref, read_refs
from tests.conftest import HashTeacher, Place, sentences

DAY = 86_400


class Work(Place):
    """A work tree beside others, on one store."""

    @property
    def store(self):
        return Store(self.root.parent / "store")

    def paths(self):
        return {
            path: Manifest.load(path, None)
            for path in (self.root / "corpus.json", self.root / "embeddings.json")
        }


@pytest.fixture
def works(tmp_path):
    """Two work trees with equal manifests; the first one made them."""
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        work = Work(tmp_path / name)
        work.embed(work.corpus(sentences(60)), HashTeacher())
        found.append(work)
    return found


def refs_of(root):
    """(kind, folder of the holder) -> ref."""
    refs, unreadable = read_refs(root)
    assert unreadable == []
    return {(ref.manifest.kind, Path(ref.made["in"]).name): ref for ref in refs}


def keys_of(work):
    return {entry.key for manifest in work.paths().values() for entry in manifest.objects}


def collect(root, **options):
    return gc.run(root, **{"delete": True, "grace_days": 0.0, **options})


def test_equal_manifests_of_two_work_trees_have_a_ref_each(works):
    a, b = works
    refs = refs_of(a.store.root)
    assert set(refs) == {(kind, name) for kind in ("corpus", "embeddings") for name in "ab"}
    first, second = refs["corpus", "a"], refs["corpus", "b"]
    assert first.manifest == second.manifest
    # What programs before this read and write.
    assert first.name == digest(first.manifest.encoded)
    content = json.loads((a.store.root / f"refs/{first.name}.json").read_bytes())
    assert set(content["made"]) == {"by", "on", "at", "in"}
    assert content["made"]["in"] == str(a.root)
    me = {"by": getpass.getuser(), "on": platform.node(), "in": str(b.root)}
    assert second.name == f"{first.name}.{digest(*(me[w].encode() for w in ('by', 'on', 'in')))}"
    assert {word: second.made[word] for word in me} == me
    # Its maker is another one.
    assert second.maker == first.holder == first.maker
    assert second.holder != second.maker


def test_forgetting_a_dead_work_tree_takes_nothing_from_a_living_one(works):
    a, b = works
    root = a.store.root
    shutil.rmtree(a.root)
    needed = keys_of(b)
    for kind in ("corpus", "embeddings"):
        ref = refs_of(root)[kind, "a"]
        outcome = collect(root, forget=[ref.full_name[:50]])
        assert outcome.facts["forgotten"] == [ref.name]
        assert outcome.facts["orphans"] == {}
        # It is said who needs it still.
        (other,) = outcome.facts["still_needed"][ref.name].values()
        assert (other["in"], other["objects"]) == (str(b.root), len(ref.manifest.objects))
        said = "\n".join(gc.lines(outcome.facts))
        count = len(ref.manifest.objects)
        assert f"{count} of its {count} objects are needed by {getpass.getuser()} on " in said
        assert f"in {b.root} (ref " in said
    assert all(b.store.has(key) for key in needed)
    assert set(refs_of(root)) == {("corpus", "b"), ("embeddings", "b")}
    # The maker is known still.
    assert str(a.root) in refs_of(root)["corpus", "b"].maker
    # Now the last one.
    names = [ref.full_name for ref in refs_of(root).values()]
    assert len(collect(root, forget=names).facts["orphans"]) >= len(needed)


def test_two_that_begin_alike_are_told_apart_by_their_holders(works):
    a, _ = works
    root = a.store.root
    refs = refs_of(root)
    first, second = refs["corpus", "a"], refs["corpus", "b"]
    with pytest.raises(TeachonceError, match="2 refs begin like that") as error:
        find_ref(root, first.name[:8])
    for ref in (first, second):
        assert f"{ref.full_name[:8]}.{ref.full_name[41:49]} of {getpass.getuser()} on " in str(
            error.value
        )
        assert find_ref(root, f"{ref.full_name[:8]}.{ref.full_name[41:49]}").stem == ref.name
        # The whole name of a file is that file.
        assert find_ref(root, ref.name).stem == ref.name
    listed = "\n".join(ls.lines(ls.run(root).facts))
    assert f"ref {second.full_name[:8]}.{second.full_name[41:49]} corpus: " in listed


def test_ls_shows_holders_makers_and_folders_that_are_gone(works):
    a, b = works
    root = a.store.root
    facts = ls.run(root).facts
    refs = refs_of(root)
    told = facts["refs"][refs["corpus", "b"].name]
    assert (told["in"], told["maker"]["in"], told["gone"]) == (str(b.root), str(a.root), False)
    shutil.rmtree(b.root)
    facts = ls.run(root).facts
    assert facts["refs"][refs["corpus", "b"].name]["gone"]
    assert not facts["refs"][refs["corpus", "a"].name]["gone"]
    text = "\n".join(ls.lines(facts))
    assert f"in {b.root} (GONE), last used " in text
    assert f"; made by {getpass.getuser()} on " in text
    # Nothing is dropped by itself.
    assert collect(root).facts["orphans"] == {}
    assert set(refs_of(root)) == set(refs)
    # What another machine's folders are is not known here.
    ref = root / f"refs/{refs['corpus', 'a'].name}.json"
    content = json.loads(ref.read_bytes())
    content["made"] |= {"on": "elsewhere", "in": "/no/such/folder"}
    ref.unlink()
    ref.write_bytes(canonical_json(content))
    assert not ls.run(root).facts["refs"][refs["corpus", "a"].name]["gone"]


def test_gc_forgets_holders_whose_folder_is_gone(works):
    """As every `dvc exp run --temp` leaves one."""
    a, b = works
    root = a.store.root
    refs = refs_of(root)
    assert collect(root, forget_gone=True).facts["forgotten"] == []
    shutil.rmtree(b.root)
    gone = sorted(ref.name for key, ref in refs.items() if key[1] == "b")
    dry = collect(root, delete=False, forget_gone=True, forget=[gone[0]])
    assert (dry.facts["forgotten"], set(refs_of(root))) == (gone, set(refs))
    done = collect(root, forget_gone=True)
    assert done.facts["forgotten"] == gone and done.facts["orphans"] == {}
    assert set(refs_of(root)) == {key for key in refs if key[1] == "a"}


def test_a_store_of_before_is_read_and_its_last_writer_stays_a_holder(works):
    """One ref for a manifest, written over by whoever came last."""
    a, b = works
    root = a.store.root
    shutil.rmtree(root / "refs")
    (root / "refs").mkdir()
    for path, manifest in a.paths().items():
        made = {
            "by": "ann",
            "on": "elsewhere",
            "at": "2026-01-01T00:00:00Z",
            "in": "/home/ann/data",
        }
        note = {"manifest": manifest.model_dump(mode="json"), "made": made}
        (root / manifest.ref).write_bytes(canonical_json(note))
        assert path.exists()
    assert collect(root).facts["orphans"] == {}
    b.paths()[b.root / "corpus.json"].renew(b.root / "corpus.json", b.store)
    refs = refs_of(root)
    assert set(refs) == {("corpus", "data"), ("embeddings", "data"), ("corpus", "b")}
    assert refs["corpus", "b"].maker == "ann on elsewhere, 2026-01-01T00:00:00Z, in /home/ann/data"
    # A program of before writes over the one that it knows; who comes again has his own then.
    manifest = a.paths()[a.root / "corpus.json"]
    first = root / manifest.ref
    first.unlink()
    first.write_bytes(manifest.note(b.root / "corpus.json"))
    manifest.renew(a.root / "corpus.json", a.store)
    assert ("corpus", "a") in refs_of(root)


def test_a_ref_is_renewed_by_its_time_only_when_it_is_a_day_old(works):
    a, _ = works
    path = a.root / "corpus.json"
    manifest = Manifest.load(path, "corpus")
    ref = a.store.root / manifest.ref
    before = ref.stat()
    manifest.renew(path, a.store)
    assert ref.stat() == before
    then = before.st_mtime - 2 * DAY
    os.utime(ref, (then, then))
    manifest.renew(path, a.store)
    now = ref.stat()
    assert now.st_mtime > then + DAY
    assert (now.st_ino, ref.read_bytes()) == (before.st_ino, ref.read_bytes())
    assert ls.run(a.store.root).facts["refs"][ref.stem]["seen"] > "2026"


def test_readers_note_nothing_of_what_is_not_there_and_make_no_folder(works, tmp_path):
    a, _ = works
    manifest, path = Manifest.load(a.root / "corpus.json", "corpus"), tmp_path / "c/corpus.json"
    manifest.renew(path, Store(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    shutil.rmtree(a.store.root / "refs")
    manifest.renew(path, a.store)
    # A store that lost its refs must not look as if one was all it had.
    with pytest.raises(MissingError, match="cannot be known which objects are needed"):
        collect(a.store.root)
    (a.store.root / "refs").mkdir()
    a.store.path(manifest.objects[0].key).unlink()
    manifest.renew(path, a.store)
    assert refs_of(a.store.root) == {}


def test_a_damaged_ref_is_written_anew_by_its_holder(works):
    a, b = works
    root = a.store.root
    for work in (a, b):
        ref = root / f"refs/{refs_of(root)['corpus', work.root.name].name}.json"
        content = ref.read_bytes()
        ref.unlink()
        ref.write_bytes(content[: len(content) // 2])
        with pytest.raises(DamagedError, match="1 refs cannot be read"):
            collect(root)
        path = work.root / "corpus.json"
        Manifest.load(path, "corpus").renew(path, work.store)
        assert collect(root).facts["orphans"] == {}
    assert set(refs_of(root)) >= {("corpus", "a"), ("corpus", "b")}


def test_a_ref_under_the_name_of_another_holder_is_not_believed(works):
    a, _ = works
    root = a.store.root
    ref = root / f"refs/{refs_of(root)['corpus', 'b'].name}.json"
    ref.rename(ref.with_name(f"{ref.name[:40]}.{'a' * 40}.json"))
    _, (error,) = read_refs(root)
    assert "its holder is not the one that its name says" in error.problem


def test_a_failed_save_leaves_no_ref_and_no_manifest(works, tmp_path):
    a, _ = works
    manifest = Manifest.load(a.root / "corpus.json", "corpus")
    store = a.store
    store.path(manifest.objects[0].key).unlink()
    before = set(refs_of(store.root))
    (tmp_path / "c").mkdir()
    with pytest.raises(MissingError, match="vanished from the store after it was found or made"):
        manifest.save(tmp_path / "c/corpus.json", store)
    assert not (tmp_path / "c/corpus.json").exists()
    assert set(refs_of(store.root)) == before


def test_makers_and_holders_go_through_a_remote(works, tmp_path):
    a, b = works
    (tmp_path / "remote").mkdir()
    remote = Remote(str(tmp_path / "remote"))
    outcome = transfer.push(b.paths(), store=b.store, remote=remote)
    assert outcome.facts["notes"] == 2
    assert transfer.push(b.paths(), store=b.store, remote=remote).facts["notes"] == 0
    assert transfer.push(a.paths(), store=a.store, remote=remote).facts["notes"] == 2
    assert transfer.push(a.paths(), store=a.store, remote=remote).facts["notes"] == 0
    # Laid out like a store, it is read like one.
    assert set(refs_of(tmp_path / "remote")) == set(refs_of(a.store.root))
    other = Store(tmp_path / "other")
    paths = {tmp_path / "c" / path.name: manifest for path, manifest in a.paths().items()}
    transfer.pull(paths, store=other, remote=remote)
    refs = refs_of(other.root)
    assert set(refs) == {("corpus", "c"), ("embeddings", "c")}
    assert f"in {a.root}" in refs["embeddings", "c"].maker
    transfer.pull(paths, store=other, remote=remote)
    assert set(refs_of(other.root)) == set(refs)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"manifest": 1}', b'{"manifest": {}, "made": {}}', b"\xff"]
)
def test_a_remote_is_not_believed_who_made_something(works, tmp_path, content):
    a, _ = works
    manifest = Manifest.load(a.root / "corpus.json", "corpus")
    assert holders.maker_of(content, manifest.manifested) is None
    wrong = json.loads(manifest.note(a.root / "corpus.json"))
    wrong["made"]["by"] = 7
    assert holders.maker_of(json.dumps(wrong).encode(), manifest.manifested) is None


NAMELESS = """
import os, sys
from pathlib import Path
from storage import holders
for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(4711, 4711, 4711)
    os.setresuid(4711, 4711, 4711)
print(holders.this_holder(Path("corpus.json"))["by"])
"""


def test_a_user_without_a_name_is_called_by_his_number():
    """As in Kubernetes: a uid that no passwd file knows. (Only root can become one.)"""
    ended = subprocess.run(
        [sys.executable, "-c", NAMELESS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    name = "4711" if os.geteuid() == 0 else getpass.getuser()
    assert (ended.stdout, ended.returncode) == (f"{name}\n", 0), ended.stderr


READS = """
import os, sys
from pathlib import Path
from storage.corpus import Corpus
from storage.manifest import Manifest
from storage.store import Store
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(4711, 4711, 4711)
    os.setresuid(4711, 4711, 4711)
path, store = Path(sys.argv[1]), Store(Path(sys.argv[2]))
manifest = Manifest.load(path, "corpus")
manifest.renew(path, store)
print(len(Corpus(store, manifest).texts(0)), store.find(manifest.objects[0].key) is not None)
"""


def test_a_store_that_may_not_be_written_is_read_all_the_same():
    """Nothing is noted there, and nothing touched."""
    with tempfile.TemporaryDirectory() as folder:
        work = Place(Path(folder))
        corpus = work.corpus(sentences(40))
        (ref,) = (work.root / "store/refs").iterdir()
        (work.root / "clone").mkdir()
        shutil.copy(work.root / "corpus.json", work.root / "clone/corpus.json")
        object_ = work.store.path(corpus.objects[0].key)
        os.utime(object_, (0, 0))
        for path in (work.root, *work.root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        places = [str(work.root / "clone/corpus.json"), str(work.root / "store")]
        ended = subprocess.run(
            [sys.executable, "-c", READS, *places],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        rows = corpus.objects[0].rows
        assert (ended.stdout, ended.stderr) == (f"{rows} True\n", "")
        assert [path.name for path in (work.root / "store/refs").iterdir()] == [ref.name]
        for path in (work.root, *work.root.rglob("*")):
            path.chmod(0o755)


# --- what rarely happens


def refused(number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_user_without_a_name_holds_by_number(works, monkeypatch):
    """As in many containers: nobody of this number is known."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    a, _ = works
    for path, manifest in a.paths().items():
        manifest.hold(path, a.store, again="teachonce shard")
    assert {ref.made["by"] for ref in read_refs(a.store.root)[0]} >= {"54321"}


def test_a_name_that_another_holder_took_is_an_error_with_its_place(works, tmp_path):
    a, _ = works
    path, manifest = next(iter(a.paths().items()))
    elsewhere = tmp_path / "c/corpus.json"
    theirs = manifest.note(path)
    for name in holders.names(manifest.manifested, elsewhere):
        (a.store.root / name).write_bytes(theirs)
    with pytest.raises(StorageError, match=r"the ref of another holder under .*\n  cure: rm -f '"):
        holders.write_ref(a.store.root, manifest.manifested, elsewhere)


def test_a_folder_is_no_ref_and_one_that_is_gone_is_not_renewed(works, tmp_path):
    a, _ = works
    manifest = next(iter(a.paths().values()))
    assert holders.read(tmp_path, manifest.manifested) is None
    holders._renew(tmp_path / "gone.json")
    assert not (tmp_path / "gone.json").exists()


def test_a_holder_that_cannot_be_looked_at_is_not_called_gone(works):
    ref = read_refs(works[0].store.root)[0][0]
    assert not ref.is_gone
    assert not replace(ref, made={**ref.made, "in": "a\0b"}).is_gone
    assert replace(ref, made={**ref.made, "in": "/nowhere/at/all"}).is_gone
    assert not replace(ref, made={**ref.made, "on": "elsewhere", "in": "/nowhere/at/all"}).is_gone


def test_no_ref_is_found_where_there_are_none_or_where_it_is_forgotten_meanwhile(
    works, monkeypatch
):
    a, _ = works
    with pytest.raises(TeachonceError, match=r"0 refs begin like that \(none\)"):
        find_ref(a.root, "abcd")
    gone = next(path for path in (a.store.root / "refs").iterdir() if "." in path.stem)
    look = os.stat

    def stat(path, *args, **options):
        if Path(path) == gone:
            raise FileNotFoundError(2, "No such file or directory")
        return look(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(TeachonceError, match="refs begin like that"):
        find_ref(a.store.root, gone.stem)


def test_a_manifest_is_not_held_again_over_what_is_lost_or_another_copy(works):
    a, b = works
    path, manifest = next(iter(a.paths().items()))
    entry = manifest.objects[0]
    other = manifest.model_copy(
        update={"objects": (entry.model_copy(update={"sha256": "0" * 64}), *manifest.objects[1:])}
    )
    before = refs_of(a.store.root).keys()
    with pytest.raises(AnotherCopyError):
        other.hold(b.root / "other.json", a.store, again="teachonce shard")
    durable.remove(a.store.path(entry.key))
    with pytest.raises(MissingError, match="vanished from the store"):
        manifest.hold(path, a.store, again="teachonce shard")
    assert refs_of(a.store.root).keys() == before


def test_what_a_gc_took_away_comes_back_by_another_name_where_links_are_forbidden(
    tmp_path, monkeypatch
):
    """fs.protected_hardlinks: files of others are renamed then, never over one that is there."""
    monkeypatch.setattr(os, "link", refused(errno.EPERM))
    aside, place = tmp_path / "aside", tmp_path / "place"
    assert durable.restore(aside, place) is False
    aside.write_text("one")
    assert durable.restore(aside, place) is True
    assert (place.read_text(), aside.exists()) == ("one", False)
    aside.write_text("another")
    assert durable.restore(aside, place) is True
    assert (place.read_text(), aside.read_text()) == ("one", "another")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
def test_what_may_not_be_put_back_stays_away_and_a_failing_disk_is_told(works, monkeypatch, number):
    a, _ = works
    key = next(iter(a.paths().values())).objects[0].key
    gc_id = trash.begin(a.store.root)
    trash.take_away(a.store.path(key), gc_id)
    monkeypatch.setattr(os, "link", refused(number))
    if number == errno.EIO:
        with pytest.raises(StorageError, match="putting back failed"):
            trash.take_back(a.store.root, a.store.path(key))
    else:
        assert trash.take_back(a.store.root, a.store.path(key)) is False


def test_what_cannot_be_deleted_is_named():
    with pytest.raises(StorageError, match=r"^/proc/version: deleting failed"):
        durable.remove(Path("/proc/version"))
    assert Path("/proc/version").exists()


def test_a_remote_without_a_ref_says_none(works, tmp_path):
    (tmp_path / "there").mkdir()
    remote = Remote(str(tmp_path / "there"))
    assert remote.ref(f"refs/{'0' * 40}.json") is None


def test_two_processes_of_one_holder_leave_one_ref(works, tmp_path, monkeypatch):
    a, _ = works
    manifest, path = next(iter(a.paths().values())), tmp_path / "c/corpus.json"
    link, faster = os.link, []

    def late(source, target, **options):
        if not faster:
            faster.append(Path(target))
            faster[0].write_bytes(manifest.note(path))
        return link(source, target, **options)

    monkeypatch.setattr(os, "link", late)
    (a.store.root / holders.names(manifest.manifested, path)[0]).unlink()
    assert manifest.write_ref(path, a.store) is None
    assert [p.name for p in faster] == [f"{digest(manifest.encoded)}.json"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_who_reads_needs_no_ref_but_hears_of_a_failing_disk(works, tmp_path, monkeypatch, number):
    a, _ = works
    manifest = next(iter(a.paths().values()))
    before = refs_of(a.store.root).keys()
    monkeypatch.setattr(os, "link", refused(number))
    if number == errno.EIO:
        with pytest.raises(StorageError, match="failed: Input/output error"):
            manifest.renew(tmp_path / "c/corpus.json", a.store)
    else:
        manifest.renew(tmp_path / "c/corpus.json", a.store)
    monkeypatch.undo()
    assert refs_of(a.store.root).keys() == before


@pytest.mark.parametrize("whole", [True, False])
def test_a_store_that_may_only_be_read_serves_what_is_all_there(
    works, tmp_path, monkeypatch, caplog, whole
):
    a, _ = works
    manifest = next(iter(a.paths().values()))
    path, before = tmp_path / "c/corpus.json", refs_of(a.store.root).keys()
    if not whole:
        a.store.path(manifest.objects[-1].key).unlink()
    monkeypatch.setattr(os, "link", refused(errno.EROFS))
    with pytest.raises(StorageError, match="failed: Read-only file system"):
        manifest.save(path, a.store)  # one refusal in a store that may be written
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    if whole:
        manifest.save(path, a.store)
        assert path.read_bytes() == manifest.encoded
        assert "may only be read here, so no ref says that corpus.json needs it" in caplog.text
    else:
        with pytest.raises(MissingError, match="vanished from the store"):
            manifest.save(path, a.store)
        assert not path.exists()
    monkeypatch.undo()
    assert refs_of(a.store.root).keys() == before


def test_a_ref_that_is_gone_has_no_inode(tmp_path):
    assert manifest_module._inode(tmp_path / "gone.json") is None
