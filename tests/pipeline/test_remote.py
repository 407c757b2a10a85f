"""The remote: nothing half, foreign or nameless, whatever fails and whoever is killed."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import TypeAdapter, ValidationError

from pipeline.commands import transfer
from stages.params import RemotePlace
from stages.teaching import sharing
from storage import durable
from storage.corpus import Corpus
from storage.embeddings import Embeddings, check_received
from storage.errors import AnotherCopyError, DamagedError, MissingError, StorageError
from storage.manifest import Manifest
from storage.remote import ATTEMPTS, Remote, RemoteError
from storage.store import Object, Store
from tests.conftest import (
    HashTeacher,
    Place,
    embed_params,
    is_probe,
    probe_of,
    sentences,
    shipped_settings,
)

ROOT = Path(__file__).parents[2]
URL = "shaky://bucket/store"


class Shaky(MemoryFileSystem):
    """An object store that counts what it is asked, and fails or lies as it is told."""

    protocol = ("shaky", "memory")
    store: dict = {}  # noqa: RUF012 - shared by all instances, as a server's content is
    pseudo_dirs = [""]  # noqa: RUF012

    asked: list = []  # noqa: RUF012 - (operation, path), in order
    asking = threading.Lock()  # two threads that ask at once have a number each
    fails = staticmethod(lambda number: None)  # number of the operation -> an error, or None
    lost = staticmethod(lambda number: None)  # the same, but the operation has been done
    lie = staticmethod(lambda path, start, content: content)  # what is read instead

    @classmethod
    def reset(cls, *, emptied=True):
        if emptied:
            cls.store.clear()
        cls.asked.clear()
        cls.fails = cls.lost = staticmethod(lambda number: None)
        cls.lie = staticmethod(lambda path, start, content: content)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.rpartition("://")[2])

    def do(self, operation, path, call):
        with self.asking:
            self.asked.append((operation, path))
            number = len(self.asked)
        if error := self.fails(number):
            raise error
        result = call()
        if error := self.lost(number):
            raise error
        return result

    def info(self, path, **kwargs):
        return self.do("info", path, lambda: super(Shaky, self).info(path, **kwargs))

    def cat_file(self, path, start=None, end=None, **kwargs):
        content = self.do("read", path, lambda: super(Shaky, self).cat_file(path, start, end))
        return self.lie(path, start, content)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        def put():
            if mode == "create" and path in self.store:
                raise FileExistsError(path)
            super(Shaky, self).pipe_file(path, value, mode="overwrite")

        self.do("put", path, put)

    @classmethod
    def puts(cls):
        return [path.removeprefix("/bucket/store/") for what, path in cls.asked if what == "put"]


class Stubborn(Shaky):
    """One that tries again itself, as s3fs does and under the same name."""

    protocol = ("stubborn", "memory")
    retries = 5

    def do(self, operation, path, call):
        for _ in range(self.retries - 1):
            with suppress(OSError):
                return super().do(operation, path, call)
        return super().do(operation, path, call)


for kind in (Shaky, Stubborn):
    fsspec.register_implementation(kind.protocol[0], kind, clobber=True)


@pytest.fixture
def shaky():
    """Its URL; it is empty and in order."""
    Shaky.reset()
    yield URL
    Shaky.reset()


def remote_at(url, *, first_pause=0.0):
    return Remote(url, first_pause=first_pause)


def furnished(root, texts=None):
    """A place with a corpus and its vectors, and the manifests as `push` wants them."""
    place = Place(root)
    corpus = place.corpus(sentences(300) if texts is None else texts)
    place.embed(corpus, HashTeacher())
    return place, manifests_of(place)


def manifests_of(place):
    return {
        place.root / "corpus.json": Manifest.load(place.root / "corpus.json", "corpus"),
        place.root / "embeddings.json": place.embeddings,
    }


def objects_of(manifests):
    return [entry for manifest in manifests.values() for entry in manifest.objects]


def contents(store, keys):
    return {key: store.path(key).read_bytes() for key in keys}


def names_without_objects(files):
    """Objects that notes on a remote (path -> content) name and that are not there, whole."""
    wrong = []
    for path, content in files.items():
        if path.startswith("refs/"):
            for entry in json.loads(content)["manifest"]["objects"]:
                found = files.get(entry["key"])
                if found is None or len(found) != entry["bytes"]:
                    wrong.append(entry["key"])
    return wrong


def files_of_shaky():
    return {
        path.removeprefix("/bucket/store/"): file.getvalue() for path, file in Shaky.store.items()
    }


@pytest.fixture(params=["folder", "file", "memory"])
def url(request, tmp_path):
    if request.param == "memory":
        yield f"memory://{tmp_path.name}/remote"
        MemoryFileSystem.store.clear()
        return
    (tmp_path / "remote").mkdir()
    yield ("file://" if request.param == "file" else "") + str(tmp_path / "remote")


# -------------------------------------------------------------------------------------- push and pull


def test_what_is_pushed_is_pulled_byte_by_byte(url, tmp_path):
    here, manifests = furnished(tmp_path / "here")
    pushed = transfer.push(manifests, store=here.store, remote=remote_at(url))
    objects = objects_of(manifests)
    assert (pushed.facts["objects_moved"], pushed.facts["objects_there"]) == (len(objects), 0)
    assert pushed.facts["bytes_moved"] == sum(entry.bytes for entry in objects)

    there = Place(tmp_path / "there")
    pulled = transfer.pull(manifests, store=there.store, remote=remote_at(url))
    assert pulled.facts["objects_moved"] == len(objects)
    keys = [entry.key for entry in objects]
    assert contents(there.store, keys) == contents(here.store, keys)
    assert {path.name for path in (there.root / "store/refs").iterdir()} == {
        path.name for path in (here.root / "store/refs").iterdir()
    }
    assert not list((there.root / "store").rglob("*.tmp"))


def test_a_second_time_nothing_is_moved(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here")
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    count = len(objects_of(manifests))
    assert len(Shaky.puts()) == count + 1 + 2  # the probe texts' vectors, two notes
    Shaky.reset(emptied=False)
    again = transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    assert Shaky.puts() == []
    assert (again.facts["objects_moved"], again.facts["objects_there"]) == (0, count)

    there = Place(tmp_path / "there")
    transfer.pull(manifests, store=there.store, remote=remote_at(shaky))
    Shaky.reset(emptied=False)
    again = transfer.pull(manifests, store=there.store, remote=remote_at(shaky))
    assert Shaky.asked == []
    assert (again.facts["objects_moved"], again.facts["objects_there"]) == (0, count)


def test_names_go_after_all_bytes(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here")
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    puts = Shaky.puts()
    assert sorted(puts[:-2]) == sorted(
        [*(entry.key for entry in objects_of(manifests)), probe_of(here.embeddings)]
    )
    assert puts[-2:] == [manifest.ref for manifest in manifests.values()]
    assert names_without_objects(files_of_shaky()) == []


def test_several_are_moved_at_a_time(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(600))
    together = threading.Barrier(4, timeout=60)
    waiting = threading.Semaphore(4)

    def wait_for_others(number):
        # The first four to ask go on only when all four have asked.
        if waiting.acquire(blocking=False):
            together.wait()

    Shaky.fails = staticmethod(wait_for_others)
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    assert not together.broken


def test_large_objects_are_moved_by_fewer_threads():
    def of(size):
        return [Object(key=f"text/{'0' * 40}.arrow", rows=1, bytes=size, sha256="0" * 64)]

    assert [transfer.threads(of(size)) for size in (1, 128 << 20, 256 << 20, 5 << 30)] == [
        8,
        8,
        4,
        1,
    ]
    assert transfer.threads([]) == 8


# ------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("way", ["refused", "answer lost"])
def test_a_push_that_fails_at_any_operation_leaves_no_name_without_its_bytes(
    shaky, tmp_path, monkeypatch, way
):
    """The remote goes down for good at the k-th operation, for every k; a second push completes."""
    here, manifests = furnished(tmp_path / "here", sentences(100))
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    whole = {path: content for path, content in files_of_shaky().items() if "refs" not in path}
    operations = len(Shaky.asked)
    assert operations >= len(whole) * 2
    for k in range(1, operations + 1):
        Shaky.reset()

        def down(number, k=k):
            return OSError(errno.EIO, "connection reset") if number >= k else None

        setattr(Shaky, "fails" if way == "refused" else "lost", staticmethod(down))
        with pytest.raises(RemoteError):
            transfer.push(manifests, store=here.store, remote=remote_at(shaky))
        files = files_of_shaky()
        assert names_without_objects(files) == [], k
        assert all(files[path] == whole[path] for path in files if "refs" not in path), k
        Shaky.reset(emptied=False)
        transfer.push(manifests, store=here.store, remote=remote_at(shaky))
        files = files_of_shaky()
        assert {path: files[path] for path in files if "refs" not in path} == whole, k
        assert len(files) == len(whole) + 2


def test_a_pull_that_fails_at_any_operation_leaves_nothing_half(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(100))
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    Shaky.reset(emptied=False)
    transfer.pull(manifests, store=Store(tmp_path / "probe"), remote=remote_at(shaky))
    operations = len(Shaky.asked)
    keys = [entry.key for entry in objects_of(manifests)]
    for k in range(1, operations + 1):
        Shaky.reset(emptied=False)
        Shaky.fails = staticmethod(
            lambda number, k=k: OSError(errno.EIO, "connection reset") if number >= k else None
        )
        store = Store(tmp_path / f"there-{k}")
        with pytest.raises(RemoteError):
            transfer.pull(manifests, store=store, remote=remote_at(shaky))
        assert not list(store.root.rglob("*.tmp")), k
        assert not list(store.root.glob("refs/*")), k
        for entry in objects_of(manifests):
            assert store.find(entry.key) in (None, entry), k
        Shaky.reset(emptied=False)
        transfer.pull(manifests, store=store, remote=remote_at(shaky))
        assert contents(store, keys) == contents(here.store, keys), k


@pytest.mark.parametrize("kind", [OSError, TimeoutError, ConnectionResetError, BlockingIOError])
def test_what_fails_now_and_then_is_tried_again(shaky, tmp_path, kind):
    here, manifests = furnished(tmp_path / "here")

    def fails(number):
        asked = Shaky.asked[number - 1]
        # Of each request the first time and the fourth, so that threads change nothing.
        return kind("now and then") if Shaky.asked[:number].count(asked) % 3 == 1 else None

    Shaky.fails = staticmethod(fails)
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    there = Store(tmp_path / "there")
    transfer.pull(manifests, store=there, remote=remote_at(shaky))
    keys = [entry.key for entry in objects_of(manifests)]
    assert contents(there, keys) == contents(here.store, keys)


def test_an_answer_that_is_cut_short_is_asked_for_again(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here")
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    seen = Counter()

    def cut_the_first(path, start, content):
        seen[path, start] += 1
        return content[:-1] if seen[path, start] == 1 else content

    Shaky.lie = staticmethod(cut_the_first)
    there = Store(tmp_path / "there")
    transfer.pull(manifests, store=there, remote=remote_at(shaky))
    for entry in objects_of(manifests):
        there.open(entry)


def test_pauses_grow_and_end(shaky, monkeypatch, tmp_path):
    """Seven pauses between eight attempts, each between half and all of twice the last."""
    here, manifests = furnished(tmp_path / "here", sentences(20))
    Shaky.fails = staticmethod(lambda number: OSError(errno.EIO, "down"))
    began = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        remote_at(shaky, first_pause=0.005).push(objects_of(manifests)[0], here.store)
    assert time.monotonic() - began >= 0.005 * 127 / 2
    assert len(Shaky.asked) == ATTEMPTS
    assert str(caught.value) == (
        f"{URL}/{objects_of(manifests)[0].key}: failed 8 times: [Errno 5] down\n"
        "  cure: check the network, the credentials and `remote`, then run the same command again: "
        "what was moved is kept"
    )


def test_a_client_that_tries_again_itself_makes_one_attempt_of_each_of_ours(shaky, tmp_path):
    _, entry = pushed_object(tmp_path / "here")
    Shaky.asked.clear()
    Shaky.fails = staticmethod(lambda number: OSError(errno.EIO, "down"))
    with pytest.raises(RemoteError, match=r"failed 8 times: \[Errno 5\] down\n"):
        remote_at(shaky.replace("shaky", "stubborn")).pull(entry, Store(tmp_path / "there"))
    assert len(Shaky.asked) == ATTEMPTS


def test_a_put_whose_answer_was_lost_is_found_done(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(100))

    def lost_once(number):
        operation, path = Shaky.asked[number - 1]
        tries = Shaky.asked[:number].count((operation, path))
        return TimeoutError("no answer") if (operation, tries) == ("put", 1) else None

    Shaky.lost = staticmethod(lost_once)
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    assert len(Shaky.puts()) == len(objects_of(manifests)) + 1 + 2
    assert names_without_objects(files_of_shaky()) == []


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_who_is_first_between_a_look_and_a_put_is_kept(shaky, tmp_path, scale):
    here, manifests = furnished(tmp_path / "here", sentences(20))
    other = Place(tmp_path / "other")
    other.embed(other.corpus(sentences(20)), HashTeacher(scale=scale))
    (entry,) = manifests[here.root / "embeddings.json"].objects
    theirs = other.store.path(entry.key).read_bytes()

    def overtaken(number):
        operation, path = Shaky.asked[number - 1]
        if operation == "put":
            MemoryFileSystem.pipe_file(Shaky(), path, theirs)

    Shaky.fails = staticmethod(overtaken)
    if scale == 1.0:
        assert not remote_at(shaky).push(entry, here.store)
    else:
        with pytest.raises(AnotherCopyError, match="the first to be pushed stays"):
            remote_at(shaky).push(entry, here.store)
    assert files_of_shaky() == {entry.key: theirs}


def test_a_dead_remote_is_not_asked_for_every_object(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(3000))
    Shaky.fails = staticmethod(lambda number: OSError(errno.EIO, "down"))
    with pytest.raises(RemoteError, match="failed 8 times"):
        transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    assert len(Shaky.asked) < len(objects_of(manifests)) * ATTEMPTS / 2


def test_a_dead_remote_is_told_in_whatever_order_results_are_read(shaky, tmp_path, monkeypatch):
    """A busy machine may read last what failed first: then nothing was moved, and no ref may be sent."""

    def cancelled_first(futures):
        done = wait(futures).done
        return sorted(done, key=lambda future: isinstance(future.exception(), RemoteError))

    monkeypatch.setattr(transfer, "as_completed", cancelled_first)
    here, manifests = furnished(tmp_path / "here", sentences(3000))
    Shaky.fails = staticmethod(lambda number: OSError(errno.EIO, "down"))
    with pytest.raises(RemoteError, match=r"failed 8 times.*; 86 of 86 objects were not moved"):
        transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    assert files_of_shaky() == {}


@pytest.mark.parametrize("error", [PermissionError("no"), NotADirectoryError("no")])
def test_what_would_fail_again_is_not_tried_again(shaky, tmp_path, error):
    here, manifests = furnished(tmp_path / "here", sentences(20))
    Shaky.fails = staticmethod(lambda number: error)
    with pytest.raises(RemoteError, match="failed: no"):
        remote_at(shaky).push(objects_of(manifests)[0], here.store)
    assert len(Shaky.asked) == 1


def test_a_mistake_of_this_program_keeps_its_traceback(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(20))
    Shaky.fails = staticmethod(lambda number: TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        transfer.push(manifests, store=here.store, remote=remote_at(shaky))


# --------------------------------------------------------------------------------------- what is refused


def test_no_flipped_byte_is_accepted(shaky, tmp_path):
    """One flip in each 40 bytes of an object, on the way: refused, or the same values arrive."""
    here, manifests = furnished(tmp_path / "here", sentences(20))
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    entry = manifests[here.root / "embeddings.json"].objects[0]
    vectors = here.store.open(entry).column("vector").to_pylist()
    refused = 0
    for place in range(0, entry.bytes, 40):

        def flip(path, start, content, place=place):
            if not start <= place < start + len(content):
                return content
            changed = bytearray(content)
            changed[place - start] ^= 1
            return bytes(changed)

        Shaky.lie = staticmethod(flip)
        store = Store(tmp_path / f"there-{place}")
        try:
            assert remote_at(shaky).pull(entry, store)
        except (DamagedError, AnotherCopyError):
            refused += 1
            assert not list(store.root.rglob("*.arrow")), place
        else:
            assert store.open(entry).column("vector").to_pylist() == vectors, place
        assert not list(store.root.rglob("*.tmp")), place
    assert refused > entry.bytes / 40 * 0.5


def test_a_flip_behind_a_right_header_is_told_with_its_place(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here")
    entry = manifests[here.root / "embeddings.json"].objects[0]
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    file = Shaky.store[f"/bucket/store/{entry.key}"]
    file.getbuffer()[entry.bytes // 2] ^= 1
    with pytest.raises(DamagedError) as caught:
        transfer.pull(manifests, store=Store(tmp_path / "there"), remote=remote_at(shaky))
    assert str(caught.value) == (
        f"{URL}/{entry.key}: damaged on the remote: its values are not those that were written "
        "(sha256 differs)\n"
        "  cure: delete it there, then run `teachonce push` where the store has it whole"
    )
    # All others were brought.
    found = {path.name for path in (tmp_path / "there/vectors").rglob("*.arrow")}
    assert len(found) == len(manifests[here.root / "embeddings.json"].objects) - 1


@pytest.mark.parametrize("damage", ["cut", "swapped", "text", "junk"])
def test_what_is_not_the_object_is_refused_and_not_taken_for_it(shaky, tmp_path, damage):
    here, manifests = furnished(tmp_path / "here")
    one, other = manifests[here.root / "embeddings.json"].objects[:2]
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    content = here.store.path(one.key).read_bytes()
    there = {
        "cut": content[:-100],
        "swapped": here.store.path(other.key).read_bytes(),
        "text": b"<html>404</html>",
        "junk": b"ARROW1\0\0" + b"\xff" * 200,
    }[damage]
    MemoryFileSystem.pipe_file(Shaky(), f"/bucket/store/{one.key}", there)
    Shaky.reset(emptied=False)
    said = {"cut": "its end is missing", "swapped": "under a foreign name"}
    with pytest.raises(DamagedError, match=f"damaged on the remote: .*{said.get(damage, '')}"):
        remote_at(shaky).pull(one, Store(tmp_path / "there"))
    assert not (tmp_path / "there").exists()
    with pytest.raises(DamagedError, match="damaged on the remote"):
        transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    assert Shaky.puts() == []


def test_another_copy_behind_a_right_header_is_refused(shaky, tmp_path):
    """Whole, of the right name, and what came first said it was the manifest's copy."""
    here, manifests = furnished(tmp_path / "here")
    other = Place(tmp_path / "other")
    other.embed(other.corpus(sentences(300)), HashTeacher(scale=0.5))
    entry = manifests[here.root / "embeddings.json"].objects[0]
    theirs = other.store.path(entry.key).read_bytes()
    assert len(theirs) == entry.bytes
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    seen = Counter()

    def change(path, start, content):
        seen[start] += 1
        return content if seen[start] == 1 else theirs[start : start + len(content)]

    Shaky.lie = staticmethod(change)
    with pytest.raises(DamagedError, match="another copy than it said before"):
        remote_at(shaky).pull(entry, Store(tmp_path / "there"))
    assert not list((tmp_path / "there").rglob("*.arrow"))


def test_more_bytes_than_the_manifest_says_are_refused_unread(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(20))
    entry = objects_of(manifests)[0]
    content = here.store.path(entry.key).read_bytes()
    MemoryFileSystem.pipe_file(
        Shaky(), f"/bucket/store/{entry.key}", content + bytes(64 << 20) + b"ARROW1"
    )
    with pytest.raises(DamagedError, match=r"bytes where .* are expected"):
        remote_at(shaky).pull(entry, Store(tmp_path / "there"))
    assert len(Shaky.asked) == 3


@pytest.mark.parametrize(
    "key",
    ["../../etc/passwd", "/etc/passwd", "refs/../x", f"text/{'0' * 40}.arrow/../x", "", "x\n"],
)
def test_a_strangers_key_reaches_no_path(url, tmp_path, key):
    named = Object.model_construct(key=key, rows=1, bytes=1, sha256="0" * 64)
    store = Store(tmp_path / "store")
    for call in (remote_at(url).pull, remote_at(url).push):
        with pytest.raises(DamagedError, match="not the name of an object"):
            call(named, store)
    with pytest.raises(DamagedError, match="not the name of an object"):
        remote_at(url).push_ref(key, b"")
    assert not store.root.exists()


def test_a_damaged_local_object_is_never_pushed(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here")
    entry = manifests[here.root / "embeddings.json"].objects[1]
    store = here.store
    store.open(entry)
    path = store.path(entry.key)
    path.chmod(0o644)
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(entry.bytes // 2)
        byte = file.read(1)[0]
        file.seek(entry.bytes // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    # Rot leaves no trace, but a test cannot write without one: let the process know this one already.
    store._checked[durable.identity(path.stat())] = entry.sha256
    with pytest.raises(DamagedError, match="sha256 differs"):
        transfer.push(manifests, store=store, remote=remote_at(shaky))
    assert entry.key not in Shaky.puts()
    assert not any(put.startswith("refs/") for put in Shaky.puts())
    assert len(Shaky.puts()) == len(objects_of(manifests)) - 1


def test_another_copy_on_the_remote_stays_and_gets_no_name(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here")
    other = Place(tmp_path / "other")
    other.embed(other.corpus(sentences(300)), HashTeacher(scale=0.5))
    transfer.push(manifests_of(other), store=other.store, remote=remote_at(shaky))
    before = files_of_shaky()
    with pytest.raises(AnotherCopyError, match="the first to be pushed stays"):
        transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    assert files_of_shaky() == before
    with pytest.raises(AnotherCopyError, match="another copy than the manifest's"):
        transfer.pull(manifests, store=Store(tmp_path / "there"), remote=remote_at(shaky))
    assert not list((tmp_path / "there").glob("refs/*"))


def test_the_cure_for_another_copy_on_the_remote_takes_it(tmp_path):
    here, manifests = furnished(tmp_path / "here")
    other = Place(tmp_path / "other")
    other.embed(other.corpus(sentences(300)), HashTeacher(scale=0.5))
    (tmp_path / "remote").mkdir()
    remote = remote_at(str(tmp_path / "remote"))
    transfer.push(manifests_of(other), store=other.store, remote=remote)
    with pytest.raises(AnotherCopyError) as error:
        transfer.push(manifests, store=here.store, remote=remote)
    move, _, then = error.value.cure.partition(", then ")
    assert then == "run `teachonce embed`, which takes the remote's, then `dvc repro`"
    subprocess.run(["bash", "-c", move], check=True)
    corpus = here.corpus(sentences(300))
    outcome = here.embed(corpus, None, remote=remote)
    assert outcome.facts["shards_fetched"] == len(corpus.objects)
    assert here.embeddings == other.embeddings
    transfer.push(manifests_of(here), store=here.store, remote=remote)
    # Somebody who has no copy yet has nothing to move.
    with pytest.raises(AnotherCopyError) as error:
        transfer.pull(manifests, store=Store(tmp_path / "there"), remote=remote)
    assert error.value.cure == then


def test_what_is_nowhere_is_counted_and_the_rest_is_brought(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here")
    entry = objects_of(manifests)[0]
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    del Shaky.store[f"/bucket/store/{entry.key}"]
    count = len(objects_of(manifests))
    store = Store(tmp_path / "there")
    with pytest.raises(MissingError, match=f"1 of {count} objects are neither here nor there") as e:
        transfer.pull(manifests, store=store, remote=remote_at(shaky))
    assert e.value.exit_code == 3
    assert len(list(store.root.rglob("*.arrow"))) == count - 1
    assert not list(store.root.glob("refs/*"))


def pushed_object(root):
    """A store with one text shard on the remote, and that shard."""
    place = Place(root)
    (entry, *_) = place.corpus(sentences(40)).objects
    remote_at(URL).push(entry, place.store)
    return place.store, entry


def test_an_object_that_somebody_else_made_and_deleted_is_told(shaky, tmp_path):
    """The name is taken at the put, and free again at the next look."""
    place = Place(tmp_path)
    (entry, *_) = place.corpus(sentences(40)).objects
    looks = []

    def fails(_):
        what, path = Shaky.asked[-1]
        if what == "put":
            looks.append("put")
            MemoryFileSystem.pipe_file(Shaky(), path, b"theirs")
            return FileExistsError(path)
        if looks:
            looks.append(what)
        if len(looks) > 2:
            Shaky.store.pop(path, None)
            return FileNotFoundError(path)
        return None

    Shaky.fails = staticmethod(fails)
    with pytest.raises(RemoteError, match=r"there and gone again\n  cure: run `teachonce push`"):
        remote_at(shaky).push(entry, place.store)


def test_an_object_that_vanishes_while_it_is_read_is_told_and_not_kept(shaky, tmp_path):
    _, entry = pushed_object(tmp_path / "here")
    there = Store(tmp_path / "there")
    Shaky.asked.clear()
    assert remote_at(shaky).pull(entry, there)
    reads = sum(what == "read" for what, _ in Shaky.asked)
    there.path(entry.key).unlink()
    Shaky.asked.clear()

    def fails(_):
        last = sum(what == "read" for what, _ in Shaky.asked) == reads
        return FileNotFoundError() if last and Shaky.asked[-1][0] == "read" else None

    Shaky.fails = staticmethod(fails)
    with pytest.raises(RemoteError, match="vanished while it was read"):
        remote_at(shaky).pull(entry, there)
    assert not there.path(entry.key).exists()


def test_a_bucket_that_is_not_there_is_told(shaky, tmp_path):
    place = Place(tmp_path)
    (entry, *_) = place.corpus(sentences(40)).objects
    Shaky.fails = staticmethod(
        lambda _: FileNotFoundError("no bucket") if Shaky.asked[-1][0] == "put" else None
    )
    with pytest.raises(RemoteError, match=r"cannot be written: no bucket\n  cure: make the bucket"):
        remote_at(shaky).push(entry, place.store)


def test_another_copy_of_what_no_teacher_made_is_cured_by_its_manifest(shaky, tmp_path):
    store, entry = pushed_object(tmp_path)
    other = entry.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(
        AnotherCopyError, match="cure: `git pull` the manifest of whoever pushed it"
    ):
        remote_at(shaky).push(other, store)


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    """Below a mount point that is not mounted, it would fill the wrong disk."""
    with pytest.raises(RemoteError, match="no such folder"):
        Remote(str(tmp_path / "not mounted"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["data://x/y", "sftp://host/x", "nonsense://x", "zip://a.zip", "http://host/x"]
)
def test_other_kinds_of_url_are_refused(url):
    with pytest.raises(RemoteError, match=r"cure: (use s3://|pip install)"):
        Remote(url)


@pytest.mark.parametrize("make", ["link", "fifo", "folder"])
def test_what_is_no_plain_file_in_a_folder_is_refused(tmp_path, make):
    (tmp_path / "remote").mkdir()
    _, manifests = furnished(tmp_path / "here", sentences(20))
    entry = objects_of(manifests)[0]
    path = tmp_path / "remote" / entry.key
    path.parent.mkdir(parents=True)
    if make == "link":
        path.symlink_to("/dev/zero")
    elif make == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(RemoteError, match="not a file"):
        remote_at(str(tmp_path / "remote")).pull(entry, Store(tmp_path / "there"))


def test_a_full_disk_is_not_tried_five_times(tmp_path):
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote/text").write_text("a file in the place of a folder")
    here, manifests = furnished(tmp_path / "here", sentences(20))
    with pytest.raises((StorageError, RemoteError), match=r"failed: "):
        remote_at(str(tmp_path / "remote"), first_pause=60).push(
            objects_of(manifests)[0], here.store
        )


# ---------------------------------------------------------------------------------------------- embed


def test_a_second_box_embeds_nothing(url, tmp_path):
    one, two = Place(tmp_path / "one"), Place(tmp_path / "two")
    corpora = [place.corpus(sentences(400)) for place in (one, two)]
    first, second = HashTeacher(), HashTeacher()
    outcome = one.embed(corpora[0], first, remote=remote_at(url))
    shards = len(corpora[0].objects)
    assert outcome.facts["shards_handed_over"] == shards
    outcome = two.embed(corpora[1], second, remote=remote_at(url))
    assert (first.texts_seen, second.texts_seen) == (400, 0)
    assert outcome.facts["shards_fetched"] == outcome.facts["shards_found"] == shards
    assert outcome.facts["shards_handed_over"] == 0
    assert (one.root / "embeddings.json").read_bytes() == (
        two.root / "embeddings.json"
    ).read_bytes()
    # Nor does it need the teacher.
    three = Place(tmp_path / "three")
    three.embed(three.corpus(sentences(400)), None, remote=remote_at(url))


def test_two_boxes_at_the_same_time_share_the_work(shaky, tmp_path):
    """Each embeds a shard only if the other has not handed it over meanwhile."""
    one, two = Place(tmp_path / "one"), Place(tmp_path / "two")
    other = HashTeacher()

    class WithTheOther(HashTeacher):
        def __call__(self, texts, role="text"):
            if not other.texts_seen and not is_probe(texts):
                two.embed(two.corpus(sentences(400)), other, remote=remote_at(shaky))
            return super().__call__(texts, role)

    mine = WithTheOther()
    outcome = one.embed(one.corpus(sentences(400)), mine, remote=remote_at(shaky))
    assert other.texts_seen == 400
    assert outcome.facts["shards_embedded"] == 0 or mine.texts_seen < 400
    assert outcome.facts["shards_fetched"] == len(one.embeddings.objects) - 1
    assert (one.root / "embeddings.json").read_bytes() == (
        two.root / "embeddings.json"
    ).read_bytes()


def test_shards_of_a_run_that_was_cut_off_are_handed_over_by_the_next(shaky, tmp_path):
    place, _ = furnished(tmp_path / "place")
    outcome = place.embed(
        Corpus(place.store, manifests_of(place)[place.root / "corpus.json"]),
        None,
        remote=remote_at(shaky),
    )
    assert outcome.facts["shards_handed_over"] == len(place.embeddings.objects)
    assert sorted(Shaky.puts()) == sorted(entry.key for entry in place.embeddings.objects)


def test_a_remote_that_cannot_be_reached_is_told_before_the_teacher_is_loaded(shaky, tmp_path):
    place = Place(tmp_path)
    teacher = HashTeacher()
    Shaky.fails = staticmethod(lambda number: OSError(errno.EIO, "down"))
    with pytest.raises(RemoteError) as caught:
        place.embed(place.corpus(sentences(100)), teacher, remote=remote_at(shaky))
    assert caught.value.exit_code == 1
    assert teacher.texts_seen == 0


def test_one_shard_that_does_not_come_is_embedded_here(shaky, tmp_path, caplog):
    one = Place(tmp_path / "one")
    corpus = one.corpus(sentences(3000))
    one.embed(corpus, HashTeacher(), remote=remote_at(shaky))
    bad = one.embeddings.objects[0]
    Shaky.fails = staticmethod(
        lambda number: (
            OSError(errno.EIO, "down") if Shaky.asked[number - 1][1].endswith(bad.key) else None
        )
    )
    two, teacher = Place(tmp_path / "two"), HashTeacher()
    outcome = two.embed(two.corpus(sentences(3000)), teacher, remote=remote_at(shaky))
    assert outcome.facts["shards_fetched"] == len(corpus.objects) - 1 > 1
    assert teacher.texts_seen == bad.rows
    assert two.embeddings.objects == one.embeddings.objects
    assert f"{bad.key}: failed 8 times" in caplog.text
    assert "this shard is embedded here" in caplog.text


def test_a_remote_that_fails_meanwhile_costs_no_work(shaky, tmp_path):
    place = Place(tmp_path)
    corpus = place.corpus(sentences(3000))
    before = []

    class Meanwhile(HashTeacher):
        def __call__(self, texts, role="text"):
            if not is_probe(texts):
                before.append(len(Shaky.asked))
                Shaky.fails = staticmethod(lambda number: OSError(errno.EIO, "down"))
            return super().__call__(texts, role)

    teacher = Meanwhile()
    outcome = place.embed(corpus, teacher, remote=remote_at(shaky))
    assert teacher.texts_seen == 3000
    late = outcome.facts["shards_not_handed_over"]
    assert late == len(corpus.objects)
    assert f"{late} NOT: run `teachonce push` later" in outcome.summary
    # It is left alone for a while, not asked five times for each shard.
    assert late > 20
    assert len(Shaky.asked) - before[0] <= ATTEMPTS * (sharing.TRANSFERS + 1)
    Shaky.reset(emptied=False)
    pushed = transfer.push(manifests_of(place), store=place.store, remote=remote_at(shaky))
    assert pushed.facts["objects_moved"] == len(objects_of(manifests_of(place)))


@pytest.mark.parametrize("fault", ["flipped", "other texts", "float16", "NaN"])
def test_embed_takes_no_shard_that_is_not_its_own(shaky, tmp_path, fault):
    """Damaged or foreign shards on the remote are made here; they stay where they are and are told."""
    place, other = Place(tmp_path / "place"), Place(tmp_path / "other")
    corpus = place.corpus(sentences(200))
    other.embed(other.corpus(sentences(200)), HashTeacher())
    entry = other.embeddings.objects[1]
    batch = other.store.open(entry)
    keys, vectors = batch.column("text_key"), np.stack(batch.column("vector").to_numpy(False))
    if fault == "flipped":
        content = bytearray(other.store.path(entry.key).read_bytes())
        content[len(content) // 2] ^= 1
    else:
        if fault == "other texts":
            keys = keys.take(np.arange(len(keys))[::-1])
        vectors = vectors.copy()
        if fault == "NaN":
            vectors[3, 3] = np.nan
        content = foreign(
            tmp_path,
            entry.key,
            keys,
            vectors.astype("float16" if fault == "float16" else "float32"),
        )
    MemoryFileSystem.pipe_file(Shaky(), f"/bucket/store/{entry.key}", bytes(content))
    teacher = HashTeacher()
    outcome = place.embed(corpus, teacher, remote=remote_at(shaky))
    assert teacher.texts_seen == 200
    assert outcome.facts["shards_fetched"] == 0
    assert outcome.facts["shards_not_handed_over"] == (0 if fault == "flipped" else 1)
    assert place.embeddings == other.embeddings
    got = Embeddings(place.store, place.embeddings, corpus).rows_of(np.arange(200))
    assert np.array_equal(got, np.stack([teacher.vector(text) for text in sentences(200)]))


def foreign(folder, key, keys, vectors):
    """An object that is whole and has the right name, but not what belongs there."""
    import pyarrow as pa

    from storage.column import fixed_lists

    store = Store(folder / "foreign")
    store.put(key, pa.record_batch([keys, fixed_lists(vectors)], names=["text_key", "vector"]))
    return store.path(key).read_bytes()


def test_received_vectors_need_their_columns(tmp_path):
    import pyarrow as pa

    with pytest.raises(ValueError, match="columns other than"):
        check_received(
            pa.record_batch([pa.array([1])], names=["x"]),
            text_keys=np.zeros(1, "V16"),
            storage="float32",
        )


# Its teacher waits at one call, of which the probe texts are the first, until the file `go on` is there.
WORKER = """
import sys, time
from pathlib import Path
from storage.remote import Remote
from tests.conftest import HashTeacher, Place, embed_params, sentences

class Waits(HashTeacher):
    calls = 0
    def __call__(self, texts, role="text"):
        self.calls += 1
        if self.calls == int(sys.argv[3]):
            Path(sys.argv[1] + " waits").touch()
            while not Path(sys.argv[1]).with_name("go on").exists():
                time.sleep(0.01)
        return super().__call__(texts, role)

place, teacher = Place(Path(sys.argv[1])), Waits()
outcome = place.embed(place.corpus(sentences(1500)), teacher, remote=Remote(sys.argv[2]))
print(teacher.texts_seen, outcome.facts["shards_fetched"], outcome.facts["shards_not_handed_over"])
"""


def test_two_workers_without_a_common_disk_one_killed(tmp_path):
    remote = tmp_path / "remote"
    remote.mkdir()

    def worker(name, waits_at):
        words = [str(tmp_path / name), f"file://{remote}", str(waits_at)]
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def shards(root):
        return {path.name for path in (root / "vectors").rglob("*.arrow")}

    # At their sixth and third shard: both are at work, and neither can take all that there is.
    killed, other = worker("killed", 7), worker("other", 4)
    try:
        deadline = time.monotonic() + 60
        # What it finished is handed over in the background; its store also has the probe texts' record.
        made = tmp_path / "killed/store"
        waiting = [tmp_path / f"{name} waits" for name in ("killed", "other")]
        while not all(map(Path.exists, waiting)) or not shards(made) <= shards(remote):
            assert (killed.poll(), other.poll()) == (None, None)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(shards(made)) >= 6
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        (tmp_path / "go on").touch()
        output, _ = other.communicate(timeout=120)
    finally:
        for process in (killed, other):
            process.kill()
            process.communicate()
    assert other.returncode == 0
    assert not (tmp_path / "killed/embeddings.json").exists()
    texts_seen, fetched, late = map(int, output.split())
    assert (fetched >= 2, late) == (True, 0), output
    assert texts_seen < 1500

    whole = Place(tmp_path / "whole")
    corpus = whole.corpus(sentences(1500))
    whole.embed(corpus, HashTeacher())
    manifest = (whole.root / "embeddings.json").read_bytes()
    assert (tmp_path / "other/embeddings.json").read_bytes() == manifest
    # A remote in a folder is a store: each shard there is whole and the very one.
    for entry in whole.embeddings.objects:
        Store(remote).open(entry)
    # The killed one, started again, embeds at most the shard it was at.
    again = worker("killed", 0)
    output, _ = again.communicate(timeout=120)
    assert int(output.split()[0]) <= max(entry.rows for entry in corpus.objects)
    assert (tmp_path / "killed/embeddings.json").read_bytes() == manifest


# ------------------------------------------------------------------------------------------- commands


def teachonce(folder, *words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def project(root, remote):
    """A work tree with manifests of a furnished place, whose store is `store`."""
    place = Place(root)
    settings = shipped_settings()
    settings |= {"store": "store", "remote": remote}
    root.mkdir(exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    return place


def test_push_and_pull_as_a_person_types_them(tmp_path):
    (tmp_path / "remote").mkdir()
    here, manifests = furnished(tmp_path / "here")
    for folder, remote in (("here", "../remote"), ("there", f"file://{tmp_path}/remote")):
        project(tmp_path / folder, remote)
        (tmp_path / folder / "data").mkdir()
        for name in ("corpus.json", "embeddings.json"):
            (tmp_path / folder / "data" / name).write_bytes((here.root / name).read_bytes())
    count = len(objects_of(manifests))
    run = teachonce(here.root, "push")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == (
        f"push: {count} objects moved (0.1 MB), 0 were there already; named by corpus.json, "
        f"embeddings.json\n"
        f"  -> {tmp_path}/remote\n"
        "  next: `git add -A && git commit && git push`: bytes before names\n"
    )
    run = teachonce(tmp_path / "there", "pull", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["made"] == "store"
    assert found["facts"]["objects_moved"] == count
    run = teachonce(tmp_path / "there", "pull")
    assert f"pull: 0 objects moved (0.0 MB), {count} were there already" in run.stdout
    there = Place(tmp_path / "there")
    for entry in objects_of(manifests):
        there.store.open(entry)


def test_embed_on_a_box_without_the_teacher_takes_all_from_the_remote(tmp_path):
    (tmp_path / "remote").mkdir()
    here, manifests = furnished(tmp_path / "here")
    transfer.push(manifests, store=here.store, remote=Remote(str(tmp_path / "remote")))
    place = project(tmp_path / "there", "../remote")
    settings = yaml.safe_load((place.root / "params.yaml").read_text())
    settings["embed"] = embed_params().model_dump()
    (place.root / "params.yaml").write_text(yaml.safe_dump(settings))
    place.corpus(sentences(300))
    (place.root / "data").mkdir()
    (place.root / "corpus.json").rename(place.root / "data/corpus.json")
    teacher = {
        "declared": {"name": "a/teacher", "revision": None},
        "files": {"model.safetensors": "0" * 64},
    }
    (place.root / "data/sources.json").write_text(json.dumps({"teacher": teacher}))
    run = teachonce(place.root, "embed")
    assert run.returncode == 0, run.stderr
    shards = len(here.embeddings.objects)
    assert f"{shards} found in the store, {shards} of them from the remote" in run.stdout
    made = (place.root / "data/embeddings.json").read_bytes()
    assert made == (here.root / "embeddings.json").read_bytes()


def test_mistakes_of_a_person_end_in_a_cure(tmp_path):
    place = project(tmp_path / "here", None)
    for command in ("push", "pull"):
        run = teachonce(place.root, command)
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr == (
            "error: params.yaml: 1 wrong\n"
            "  remote: null; name s3://bucket/folder, or a folder\n"
            "  cure: edit params.yaml, then run `teachonce check`\n"
        )
    project(place.root, str(tmp_path / "gone"))
    run = teachonce(place.root, "push")
    assert run.returncode == 1
    assert run.stderr == (
        f"error: {tmp_path}/gone: no such folder\n"
        f"  cure: mount it, make it (mkdir -p '{tmp_path}/gone'), or mend `remote`\n"
    )
    (tmp_path / "gone").mkdir()
    run = teachonce(place.root, "pull")
    assert run.returncode == 3
    assert "data/corpus.json: not there\n  cure: run `teachonce shard`, or `git pull`" in run.stderr


# ----------------------------------------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def s3():
    """The environment of a client of a real S3 server on this machine's loopback, with one bucket."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    subprocess.run(
        [sys.executable, "-c", "import s3fs; s3fs.S3FileSystem().mkdir('bucket')"],
        env={**os.environ, **environment},
        check=True,
    )
    yield environment
    server.terminate()
    server.communicate()


SERVER = """
import logging, threading
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
threading.Event().wait()
"""

S3_WORKER = """
import sys
from pathlib import Path
from storage.remote import Remote
from tests.conftest import HashTeacher, Place, embed_params, sentences

place, teacher = Place(Path(sys.argv[1])), HashTeacher()
outcome = place.embed(place.corpus(sentences(600)), teacher, remote=Remote("s3://bucket/shared"))
print(teacher.texts_seen, outcome.facts["shards_fetched"], outcome.facts["shards_handed_over"])
"""

S3_CREATE = """
from storage.remote import Remote
remote = Remote("s3://bucket/create")
key = "text/" + "0" * 40 + ".arrow"
print(remote._put(key, b"first"), remote._put(key, b"second"))
print(remote._files.cat_file("bucket/create/" + key).decode())
try:
    remote._files.pipe_file("bucket/create/" + key, b"third", mode="create")
except OSError as error:
    print(type(error).__name__)
empty = key.replace("0", "1")
remote._files.pipe_file("bucket/create/" + empty, b"")
print(remote.find(empty), remote._put(empty, b"fourth"))
print(remote._files.cat_file("bucket/create/" + empty).decode())
"""


@pytest.mark.slow
def test_push_and_pull_with_a_real_s3_server(s3, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(600))
    for folder in ("here", "there"):
        project(tmp_path / folder, "s3://bucket/store")
        (tmp_path / folder / "data").mkdir()
        for name in ("corpus.json", "embeddings.json"):
            (tmp_path / folder / "data" / name).write_bytes((here.root / name).read_bytes())
    count = len(objects_of(manifests))
    run = teachonce(here.root, "push", **s3)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"push: {count} objects moved")
    run = teachonce(here.root, "push", **s3)
    assert run.stdout.startswith(f"push: 0 objects moved (0.0 MB), {count} were there already")
    run = teachonce(tmp_path / "there", "pull", **s3)
    assert run.returncode == 0, run.stderr
    keys = [entry.key for entry in objects_of(manifests)]
    assert contents(Place(tmp_path / "there").store, keys) == contents(here.store, keys)


@pytest.mark.slow
def test_a_taken_name_is_not_overwritten_on_a_real_s3_server(s3):
    run = subprocess.run(
        [sys.executable, "-c", S3_CREATE],
        env={**os.environ, **s3},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert run.stdout.split() == [
        "True",
        "False",
        "first",
        "FileExistsError",
        "None",
        "True",
        "fourth",
    ]


@pytest.mark.slow
def test_embed_shares_through_a_real_s3_server(s3, tmp_path):
    seen = []
    for name in ("one", "two"):
        run = subprocess.run(
            [sys.executable, "-c", S3_WORKER, str(tmp_path / name)],
            env={**os.environ, **s3},
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
        seen.append(tuple(map(int, run.stdout.split())))
    shards = len(Place(tmp_path / "one").embeddings.objects)
    assert seen == [(600, 0, shards), (0, shards, 0)]
    assert (tmp_path / "one/embeddings.json").read_bytes() == (
        tmp_path / "two/embeddings.json"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cure: check the network, the credentials"),
        ({"remote": "s3://no-such-bucket/x"}, "cure: make the bucket, or mend `remote`"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "cure: check the network, the cred",
        ),
    ],
)
def test_mistakes_with_s3_end_in_a_cure(s3, tmp_path, change, said):
    here, _ = furnished(tmp_path / "here", sentences(40))
    project(here.root, change.get("remote", "s3://bucket/mistakes"))
    (here.root / "data").mkdir()
    (here.root / "data/corpus.json").write_bytes((here.root / "corpus.json").read_bytes())
    alone = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    changed = {name: value for name, value in change.items() if name != "remote"}
    run = teachonce(here.root, "push", **{**s3, **alone, **changed})
    assert run.returncode == 1
    assert said in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "url",
    [
        "ftp://localhost/x",
        "github://owner:name@main/x",
        "reference::http://localhost/x",
        "simplecache::s3://bucket/x",
        "s3://bucket/x::ftp://localhost/y",
        "http://localhost/x",
    ],
)
def test_another_kind_of_url_is_refused_before_anything_is_connected(monkeypatch, url):
    monkeypatch.setattr("fsspec.url_to_fs", None)
    with pytest.raises(RemoteError, match="a kind of URL where half an upload could be seen"):
        Remote(url)
    with pytest.raises(ValidationError, match=r"is no remote known here|one kind within another"):
        TypeAdapter(RemotePlace).validate_python(url)


def test_the_progress_of_a_transfer_asks_the_size_of_each_object_a_bounded_number_of_times():
    class Counted:
        asked = 0

        @property
        def bytes(self):
            Counted.asked += 1
            return 1000

    objects = [Counted() for _ in range(500)]
    result = transfer._each("push", objects, lambda entry, result: result.moved.append(entry))
    assert len(result.moved) == 500
    assert Counted.asked == 2 * 500  # once for the number of threads, once for the progress


def test_a_remote_that_refuses_three_calls_in_ten_gets_all_in_one_run(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(1000))

    def refused(number):
        asked = Shaky.asked[number - 1]
        # Of each request in turn, so that threads change nothing.
        chance = random.Random(f"{asked} {Shaky.asked[:number].count(asked)}")
        return OSError("503") if chance.random() < 0.3 else None

    Shaky.fails = staticmethod(refused)
    pushed = transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    # One whose put was heard only at the second look counts as there.
    assert pushed.facts["objects_moved"] + pushed.facts["objects_there"] == len(
        objects_of(manifests)
    )
    assert files_of_shaky().keys() >= {entry.key for entry in objects_of(manifests)}
    assert names_without_objects(files_of_shaky()) == []


def test_one_object_that_fails_does_not_end_the_others(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(1000))
    objects = objects_of(manifests)
    bad = objects[1].key
    Shaky.fails = staticmethod(
        lambda number: OSError("503") if Shaky.asked[number - 1][1].endswith(bad) else None
    )
    with pytest.raises(
        RemoteError, match=rf"{bad}: .*; 1 of {len(objects)} objects were not moved"
    ):
        transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    assert set(files_of_shaky()) == {entry.key for entry in objects} - {bad}


@pytest.mark.parametrize("part", ["head", "values"])
def test_one_flipped_answer_blames_nothing(shaky, tmp_path, part):
    _, entry = pushed_object(tmp_path / "here")
    flipped = []

    def lie(path, start, content):
        whole = len(content) == entry.bytes
        if flipped or (part == "head" and start) or (part == "values" and len(reads()) < 3):
            return content
        assert whole or part == "head"
        flipped.append(path)
        middle = 0 if part == "head" else len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]

    def reads():
        return [path for what, path in Shaky.asked if what == "read"]

    Shaky.asked.clear()
    Shaky.lie = staticmethod(lie)
    there = Store(tmp_path / "there")
    assert remote_at(shaky).pull(entry, there)
    assert flipped
    there.open(entry)


def test_a_name_without_content_counts_as_not_there_and_is_made_again(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(100))
    transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    whole = files_of_shaky()
    for path in list(Shaky.store):
        MemoryFileSystem.pipe_file(Shaky(), path, b"")
    assert set(files_of_shaky().values()) == {b""}
    again = transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    assert again.facts["objects_moved"] == len(objects_of(manifests))
    assert files_of_shaky().keys() == whole.keys()
    assert all(files_of_shaky().values())


def test_an_error_that_is_none_of_the_way_is_not_taken_for_a_taken_name(shaky, tmp_path):
    _, entry = pushed_object(tmp_path / "here")
    Shaky.store.clear()
    Shaky.asked.clear()
    Shaky.fails = staticmethod(
        lambda number: KeyError("a bug") if Shaky.asked[number - 1][0] == "put" else None
    )
    with pytest.raises(KeyError, match="a bug"):
        remote_at(shaky)._put(entry.key, b"content")


def test_a_name_without_content_is_nothing(url, tmp_path):
    """As an upload that was cut leaves it: of an object, of the probe texts' record, of a ref."""
    here, manifests = furnished(tmp_path / "here")
    assert remote_at(url).ref(here.embeddings.ref) is None
    transfer.push(manifests, store=here.store, remote=remote_at(url))
    one = manifests[here.root / "embeddings.json"].objects[0]
    names = [one.key, probe_of(here.embeddings), here.embeddings.ref]
    files, root = fsspec.url_to_fs(url)
    whole = {name: files.cat_file(f"{root}/{name}") for name in names}
    for name in names:
        files.rm_file(f"{root}/{name}")
        files.pipe_file(f"{root}/{name}", b"")
    there = Store(tmp_path / "there")
    assert not remote_at(url).pull(one, there)
    with pytest.raises(MissingError, match=r"1 of .* objects are neither here nor there"):
        transfer.pull(manifests, store=there, remote=remote_at(url))
    pushed = transfer.push(manifests, store=here.store, remote=remote_at(url))
    assert (pushed.facts["objects_moved"], pushed.facts["notes"]) == (1, 1)
    again = {name: files.cat_file(f"{root}/{name}") for name in names}
    # A ref is written anew with the second at which it was; what it names is the same.
    refs = [json.loads(each.pop(here.embeddings.ref))["manifest"] for each in (whole, again)]
    assert refs[0] == refs[1]
    assert again == whole


@pytest.mark.parametrize("damaged", [lambda whole: whole[:-40], lambda _: b"[" * 100_000])
def test_a_ref_that_was_cut_is_replaced_and_a_whole_one_stays(url, tmp_path, damaged):
    here, manifests = furnished(tmp_path / "here", sentences(20))
    transfer.push(manifests, store=here.store, remote=remote_at(url))
    files, root = fsspec.url_to_fs(url)
    name = f"{root}/{here.embeddings.ref}"
    whole = files.cat_file(name)
    files.rm_file(name)
    files.pipe_file(name, damaged(whole))
    pushed = transfer.push(manifests, store=here.store, remote=remote_at(url))
    assert (pushed.facts["objects_moved"], pushed.facts["notes"]) == (0, 1)
    written = files.cat_file(name)
    assert json.loads(written)["manifest"] == json.loads(whole)["manifest"]
    pushed = transfer.push(manifests, store=here.store, remote=remote_at(url))
    assert (pushed.facts["notes"], files.cat_file(name)) == (0, written)


def test_an_upload_that_arrives_empty_or_cut_is_not_called_done(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(20))
    one = manifests[here.root / "embeddings.json"].objects[0]
    put, cut = MemoryFileSystem.pipe_file, {"times": 2}

    def loses(number):
        operation, path = Shaky.asked[number - 1]
        if operation == "put" and cut["times"]:
            cut["times"] -= 1
            put(Shaky(), path, b"", mode="overwrite")
            return TimeoutError("no answer")
        return None

    Shaky.lost = staticmethod(loses)
    assert remote_at(shaky).push(one, here.store)
    assert files_of_shaky() == {one.key: here.store.path(one.key).read_bytes()}
    # An answer that says done proves nothing, either.
    Shaky.reset()

    def lies(number):
        operation, path = Shaky.asked[number - 1]
        if operation == "put" and Shaky.asked[:number].count((operation, path)) == 1:
            put(Shaky(), path, b"", mode="overwrite")

    Shaky.lost = staticmethod(lies)
    assert remote_at(shaky).push(one, here.store)
    assert files_of_shaky() == {one.key: here.store.path(one.key).read_bytes()}


@pytest.mark.parametrize(
    ("error", "said"),
    [(ImportError("no client"), "no client\n  cure: pip install"), (OSError("no key"), "no key")],
)
def test_a_file_system_that_cannot_be_made_is_told(error, said):
    class Unmade(MemoryFileSystem):
        protocol = ("unmade", "memory")

        def __init__(self, **options):
            raise error

    fsspec.register_implementation("unmade", Unmade, clobber=True)
    with pytest.raises(RemoteError, match=said):
        Remote("unmade://bucket/store")


def test_a_remote_that_refuses_all_is_asked_for_little(shaky, tmp_path):
    here, manifests = furnished(tmp_path / "here", sentences(3000))
    Shaky.fails = staticmethod(lambda number: PermissionError("no"))
    with pytest.raises(RemoteError, match="failed: no"):
        transfer.push(manifests, store=here.store, remote=remote_at(shaky))
    # One request each of those that threads had begun when the first refusal was heard.
    assert len(Shaky.asked) < len(objects_of(manifests)) / 2
