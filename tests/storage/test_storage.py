"""The store: objects that prove themselves, manifests, columns."""

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import re
import resource
import socket
import stat
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import column, durable, regular, trash
from storage.column import fixed_lists, matrix_of, text_key_array, text_keys_of
from storage.corpus import Corpus, cut, ends_shard, put_texts, text_digest, text_key
from storage.embeddings import BadVectorsError, Embeddings, put_vectors
from storage.errors import (
    AnotherCopyError,
    DamagedError,
    MissingError,
    StorageError,
    TeachonceError,
    shown,
)
from storage.holders import MAX_BYTES
from storage.ipc import first_batch, unpacked_bytes
from storage.manifest import MAX_OBJECTS, Manifest, fingerprint
from storage.negatives import NONE, Negatives, put_negatives
from storage.regular import IrregularError
from storage.split import Split, drawn
from storage.store import HEADER, Object, Store, digest, payload_sha256
from storage.tokens import Tokens, put_tokens
from storage.upkeep import examination, inventory
from tests.conftest import HashTeacher, put_foreign, sentences

RECIPE = {"prompt": ""}
FINGERPRINT = fingerprint(RECIPE)


def vectors_of(corpus, store, *, dim=4, seed=0, storage="float32"):
    """An embeddings manifest with vectors drawn from a generator."""
    draw = np.random.default_rng(seed)
    objects, everything = [], []
    for shard in range(len(corpus.objects)):
        vectors = draw.normal(size=(corpus.objects[shard].rows, dim)).astype(np.float32)
        everything.append(vectors)
        objects.append(
            put_vectors(
                store,
                f"vectors/{FINGERPRINT}/{corpus.shard_digest(shard)}.arrow",
                vectors=vectors,
                text_keys=text_keys_of(corpus.batch(shard)),
                storage=storage,
                facts={"tokens": 1},
            )
        )
    manifest = Manifest(
        kind="embeddings", recipe=RECIPE, parent=corpus.manifest.content, objects=tuple(objects)
    )
    return manifest, np.concatenate(everything)


# ------------------------------------------------------------------------------------------- objects


def test_an_object_comes_back_as_it_was_put(place):
    texts = ["first", "zweiter — ünïcödé", "third\nwith a line break", "\x00 a NUL"]
    entry = put_texts(place.store, [(text, text_key(text)) for text in texts])
    batch = place.store.open(entry)
    assert batch.column("text").to_pylist() == texts
    assert [key.tobytes() for key in text_keys_of(batch)] == [text_key(text) for text in texts]
    assert entry.key == f"text/{text_digest(texts)}.arrow"
    assert entry.bytes == place.store.path(entry.key).stat().st_size


def test_a_published_object_cannot_be_written_and_is_read_by_the_group(place):
    entry = put_texts(place.store, [("a text", text_key("a text"))])
    mode = stat.S_IMODE(place.store.path(entry.key).stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o444 & ~umask


def test_the_second_to_put_a_key_gets_the_copy_of_the_first(place):
    corpus = place.corpus(sentences(20))
    first, _ = vectors_of(corpus, place.store, seed=0)
    second, _ = vectors_of(corpus, place.store, seed=1)
    assert second == first
    assert not list((place.root / "store").rglob("*.tmp"))


def test_a_process_sees_other_bytes_of_the_same_size_and_time(place):
    store = place.store
    entry = put_texts(store, [("a text", text_key("a text"))])
    path = store.path(entry.key)
    path.chmod(0o644)
    store.open(entry)
    before, content = path.stat(), path.read_bytes()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # a clock may tick too slowly to tell
        path.write_bytes(content.replace(b"a text", b"A text"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DamagedError, match="sha256 differs"):
        store.open(entry)


def test_every_flipped_bit_is_found_or_harmless(place):
    """Each bit of a small object, flipped: refused, or the same values come back."""
    corpus = place.corpus(["one text", "another text"])
    manifest, vectors = vectors_of(corpus, place.store, dim=2)
    entry = manifest.objects[0]
    path = place.store.path(entry.key)
    whole = path.read_bytes()
    path.chmod(0o644)
    refused = 0
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            batch = place.store.open(entry)
        except TeachonceError:
            refused += 1
        else:
            assert np.array_equal(batch.column("vector").flatten().to_numpy(), vectors.reshape(-1))
            assert text_keys_of(batch).tobytes() == corpus.text_keys.tobytes()
    assert refused > len(whole) * 8 * 0.4  # most of so small a file is padding and offsets


def written(schema, batch, **options):
    """An Arrow file as somebody else might write it."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(**options)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def test_the_two_schemas_of_a_file_must_agree(place):
    """Who reads it as a stream, such as `datasets`, sees the one at the front only."""
    corpus = place.corpus(sentences(20))
    manifest, _ = vectors_of(corpus, place.store)
    path = place.store.path(manifest.objects[0].key)
    whole = path.read_bytes()
    path.chmod(0o644)
    front = whole.index(b"vector\0")
    assert whole.rindex(b"vector\0") > front
    for damaged in (
        whole[:front] + b"vectoz" + whole[front + 6 :],
        whole[:12]
        + (int.from_bytes(whole[12:16], "little") + 8).to_bytes(4, "little")
        + whole[16:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match="its front and its end do not say the same"):
            place.store.open(manifest.objects[0])


def test_a_compressed_object_is_refused_before_it_is_unpacked(place):
    """A stranger's kilobyte of zstd may be gigabytes; ours are never compressed."""
    entry = put_texts(place.store, [("a" * (64 << 20), text_key("a" * (64 << 20)))])
    path = place.store.path(entry.key)
    batch = place.store.open(entry)
    content = written(batch.schema, batch, compression="zstd")
    assert len(content) < 16 << 10
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="compressed, which no object is"):
        place.store.open(entry)


@pytest.mark.parametrize(
    "columns",
    [
        {"text_key": pa.array([b"a" * 16], pa.binary(16))},
        {"text": pa.array(["a"], pa.large_string())},
        {
            "text_key": pa.array([b"a" * 15], pa.binary(15)),
            "text": pa.array(["a"], pa.large_string()),
        },
        {"text_key": pa.array([b"a" * 16], pa.binary(16)), "text": pa.array([1], pa.int64())},
        {
            "text_key": pa.array([b"a" * 16], pa.binary(16)),
            "text": pa.array(["a"]).dictionary_encode(),
        },
        {
            "text_key": pa.array([b"a" * 16], pa.binary(16)),
            "text": pa.array(["a"], pa.large_string()),
            "\x1b[31m": pa.array(["a"], pa.large_string()),
        },
    ],
)
def test_other_columns_than_those_of_its_kind_are_refused(place, columns):
    """True to its own sha256, but nothing below the store could read it."""
    key = f"text/{'0' * 40}.arrow"
    with pytest.raises(ValueError, match="other columns than those of text: "):
        place.store.put(key, pa.record_batch(columns))
    assert not (place.root / "store/text").exists()
    put_foreign(place.store, key, pa.record_batch(columns))
    with pytest.raises(DamagedError, match="other columns than those of text: ") as caught:
        place.store.find(key)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_object_is_refused(place, kept):
    entry = put_texts(place.store, [(text, text_key(text)) for text in sentences(50)])
    path = place.store.path(entry.key)
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:kept])
    with pytest.raises(DamagedError, match="damaged"):
        place.store.open(entry)


def test_a_swapped_object_is_refused_by_its_name(place):
    first = put_texts(place.store, [("a text", text_key("a text"))])
    second = put_texts(place.store, [("b text", text_key("b text"))])
    one, other = place.store.path(first.key), place.store.path(second.key)
    content = other.read_bytes()
    one.unlink()
    one.write_bytes(content)
    with pytest.raises(DamagedError) as caught:
        place.store.open(first)
    assert str(caught.value) == (
        f"{one}: damaged: it is {second.key} under a foreign name\n"
        "  cure: run `teachonce repair`; if it finds nothing, no manifest here names it yet: "
        f"rm -f '{one}', then run `teachonce shard`"
    )


def test_another_copy_is_told_apart_from_damage(place):
    corpus = place.corpus(sentences(20))
    manifest, _ = vectors_of(corpus, place.store, seed=0)
    entry = manifest.objects[0]
    place.store.path(entry.key).unlink()
    vectors_of(corpus, place.store, seed=1)
    with pytest.raises(AnotherCopyError, match="another copy than the manifest's"):
        place.store.open(entry)
    assert place.store.find(entry.key) is not None


def test_a_missing_object_names_its_path_and_the_cure(place):
    key = f"text/{'0' * 40}.arrow"
    entry = Object(key=key, rows=1, bytes=1, sha256="0" * 64)
    with pytest.raises(MissingError) as caught:
        place.store.open(entry)
    assert str(place.store.path(key)) in str(caught.value)
    assert "run `teachonce shard`" in str(caught.value)
    assert caught.value.exit_code == 3
    assert place.store.find(key) is None


@pytest.mark.parametrize("make", ["folder", "link", "fifo"])
def test_what_is_no_plain_file_is_refused(place, make, tmp_path):
    entry = put_texts(place.store, [("a text", text_key("a text"))])
    path = place.store.path(entry.key)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    if make == "folder":
        path.mkdir()
    elif make == "link":
        path.symlink_to(elsewhere)
    else:
        os.mkfifo(path)
    with pytest.raises(DamagedError):
        place.store.open(entry)


@pytest.mark.parametrize(
    "key",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "text/../../x.arrow",
        f"text/{'0' * 40}.arrow\n",
        f"text/{'0' * 40}.arrow/..",
        f"text/{'0' * 39}.arrow",
        f"text/{'A' * 40}.arrow",
        f"text\\{'0' * 40}.arrow",
        f"vectors/{'0' * 40}.arrow",
        f"negatives/{'0' * 40}/1.arrow",
        "~/x",
        "",
        "text/\x00.arrow",
    ],
)
def test_only_keys_become_paths(place, key):
    with pytest.raises(DamagedError):
        place.store.path(key)
    with pytest.raises(ValueError, match="key"):
        Object(key=key, rows=1, bytes=1, sha256="0" * 64)


def test_a_null_is_not_stored(place):
    keys = text_key_array(np.zeros(2, "V16"))
    texts = pa.array(["a", None], pa.large_string())
    batch = pa.record_batch([keys, texts], names=["text_key", "text"])
    with pytest.raises(ValueError, match="1 nulls"):
        place.store.put(f"text/{'0' * 40}.arrow", batch)
    assert not (place.root / "store/text").exists()


@pytest.mark.parametrize("offset", [8_388_608, 4])
def test_an_offset_of_no_lists_is_not_followed(offset):
    """Arrow holds such an array for valid, and ends the process when it is flattened."""
    start = pa.py_buffer(np.array([offset], np.int64))
    lists = pa.Array.from_buffers(
        pa.large_list(pa.int32()), 0, [None, start], children=[pa.array([1, 2, 3], pa.int32())]
    )
    lists.validate(full=True)
    batch = pa.record_batch(
        [text_key_array(np.zeros(0, "V16")), lists], names=["text_key", "token_ids"]
    )
    with pytest.raises(ValueError, match=f"lists that begin at value {offset} of 3"):
        payload_sha256("tokens/x", batch, {})


def test_the_payload_digest_is_that_of_the_values():
    """A pinned digest: if this fails on purpose, FORMAT must rise, and every store is made again."""
    batch = pa.record_batch(
        [
            text_key_array(np.frombuffer(b"0123456789abcdef" * 2, "V16")),
            pa.array(["a", "bc"], pa.large_string()),
            pa.array([[1], [2, 3]], pa.large_list(pa.int32())),
        ],
        names=["text_key", "text", "token_ids"],
    )
    expected = "bae448dc3cfefb91"
    whole = payload_sha256(f"text/{'0' * 40}.arrow", batch, {"tokens": 3})
    assert whole.startswith(expected)
    joined = pa.Table.from_batches([batch, batch]).combine_chunks().to_batches()[0]
    assert payload_sha256(f"text/{'0' * 40}.arrow", joined.slice(2, 2), {"tokens": 3}) == whole
    assert payload_sha256(f"text/{'1' * 40}.arrow", batch, {"tokens": 3}) != whole
    assert payload_sha256(f"text/{'0' * 40}.arrow", batch, {"tokens": 4}) != whole


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int64, np.int8])
def test_lists_of_a_fixed_size_are_read_and_proved_where_they_lie(kind):
    values = np.arange(28, dtype=kind).reshape(7, 4)
    whole = pa.record_batch([fixed_lists(values)], names=["vector"])
    part = whole.slice(2, 3)
    assert matrix_of(whole, "vector").tolist() == values.tolist()
    assert matrix_of(whole, "vector").dtype == kind
    assert matrix_of(part, "vector").tolist() == values[2:5].tolist()
    same = pa.record_batch([fixed_lists(values[2:5])], names=["vector"])
    key = f"vectors/{'0' * 40}/{'0' * 40}.arrow"
    assert payload_sha256(key, part, {}) == payload_sha256(key, same, {})
    assert payload_sha256(key, part, {}) != payload_sha256(key, whole.slice(3, 3), {})
    assert matrix_of(whole.slice(7), "vector").shape == (0, 4)


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_digests_of_different_sequences_differ(first, second):
    assert (digest(*first) == digest(*second)) == (first == second)


# ------------------------------------------------------------------------------------------- writing


def test_one_of_many_writers_wins_and_all_see_its_file(tmp_path):
    path, wins = tmp_path / "deep" / "er" / "object", []

    def write(number):
        wins.append(durable.publish(path, lambda sink: sink.write(b"%d" % number) and None))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [False] * 15 + [True]
    assert [file.name for file in path.parent.iterdir()] == ["object"]


@pytest.fixture(
    params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV], ids=errno.errorcode.get
)
def no_links(request, monkeypatch):
    """A disk without hard links, modes and flushes of folders, as FAT and many of FUSE."""
    fsync = os.fsync

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    def flush(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(file)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(os, "fsync", flush)


def test_without_links_one_of_many_writers_wins_and_keeps_its_file(tmp_path, no_links):
    path, wins = tmp_path / "deep" / "er" / "object", []

    def write(number):
        if durable.publish(path, lambda sink: sink.write(b"%d" % number) and None):
            wins.append((number, path.read_bytes()))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((number, seen),) = wins
    assert path.read_bytes() == seen == b"%d" % number
    assert [file.name for file in path.parent.iterdir()] == ["object"]


def test_without_links_a_second_writer_waits_while_the_first_looks_and_renames(
    tmp_path, no_links, monkeypatch
):
    """The first finds the name free; before it renames, the second comes."""
    path, rename, wins = tmp_path / "object", Path.rename, []

    def publish(content):
        wins.append((content, durable.publish(path, lambda sink: sink.write(content) and None)))

    second = threading.Thread(target=publish, args=(b"second",))

    def slowly(scratch, target):
        if not second.ident:
            second.start()
            second.join(0.3)
            assert second.is_alive(), "it did not wait"
        return rename(scratch, target)

    monkeypatch.setattr(Path, "rename", slowly)
    publish(b"first")
    second.join()
    assert sorted(wins) == [(b"first", True), (b"second", False)]
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["object"]


def test_without_links_and_locks_the_store_serves_one_at_a_time(tmp_path, no_links, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "object"
    assert durable.publish(path, lambda sink: sink.write(b"first") and None)
    assert not durable.publish(path, lambda sink: sink.write(b"second") and None)
    assert path.read_bytes() == b"first"


def test_without_links_what_a_gc_took_away_comes_back(place, no_links):
    entries = place.corpus(sentences(200)).objects
    store = place.store
    gc = trash.begin(store.root)
    path = store.path(entries[0].key)
    trash.take_away(path, gc)
    (aside,) = path.parent.glob(".*.trash")
    assert store.find(entries[0].key) == entries[0]
    trash.put_back(aside)
    assert store.find(entries[0].key) == entries[0]
    assert [file.name for file in path.parent.glob(".*")] == []


@pytest.mark.parametrize("refused", [errno.EPERM, errno.EACCES])
def test_where_links_and_renames_are_refused_it_is_the_permission(tmp_path, monkeypatch, refused):
    def refuse(*_):
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="cure: give yourself write permission there"):
        durable.publish(tmp_path / "object", lambda sink: None)
    assert list(tmp_path.iterdir()) == []


def test_a_flush_that_fails_is_told_of_a_folder_too(tmp_path, monkeypatch):
    fsync = os.fsync

    def fail(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(file)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="cure: the device reports errors"):
        durable.publish(tmp_path / "object", lambda sink: None)


def test_a_failed_write_leaves_nothing_and_names_the_file(tmp_path):
    path = tmp_path / "object"

    def write(sink):
        sink.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError) as caught:
        durable.publish(path, write)
    assert str(caught.value) == (
        f"{path}: writing failed: No space left on device\n"
        "  cure: free some space there, then run the same command again: what is finished is kept"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["unlink", "stat"])
def test_a_refusal_before_or_after_the_write_names_its_file(tmp_path, monkeypatch, call):
    """Also what is done around a write is done by name: no error of Python's own comes out."""

    def refuse(path, *_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(StorageError) as caught:
        patch.setattr(Path, call, refuse)
        durable.publish(tmp_path / "object", lambda sink: None)
    assert str(tmp_path) in str(caught.value)
    assert "cure: the device reports errors" in str(caught.value)


@pytest.mark.parametrize("call", ["os.fstat", "pyarrow.memory_map", "os.close"])
def test_a_refusal_to_read_an_object_is_no_damage(place, monkeypatch, call):
    entry = put_texts(place.store, [("a text", text_key("a text"))])

    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch, pytest.raises(StorageError) as caught:
        patch.setattr(call, refuse)
        place.store.find(entry.key)
    assert "reading failed: Cannot allocate memory" in str(caught.value)
    assert str(place.store.path(entry.key)) in str(caught.value)


def test_a_split_that_cannot_be_read_is_named(place):
    corpus = place.corpus(sentences(50))
    (place.root / "split.json").mkdir()
    with pytest.raises(DamagedError, match=r"split.json: no split: it is a folder, not a file"):
        Split.load(place.root / "split.json", corpus)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StorageError, match="making the folder failed"):
        durable.replace(tmp_path / "store" / "x", b"")


def test_replacing_a_folder_keeps_the_old_one_if_it_fails(tmp_path):
    path = tmp_path / "model"
    with durable.replace_folder(path) as scratch:
        (scratch / "weights").write_bytes(b"old")
    with pytest.raises(RuntimeError), durable.replace_folder(path) as scratch:
        (scratch / "weights").write_bytes(b"new")
        raise RuntimeError
    assert (path / "weights").read_bytes() == b"old"
    with durable.replace_folder(path) as scratch:
        (scratch / "weights").write_bytes(b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (path / "weights").read_bytes() == b"new"


def write_plainly(path):
    path.write_bytes(bytes(9_000))


def write_safetensors(path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(9_000)}, path)


def write_torch(path):
    import torch

    torch.save({"weight": torch.zeros(9_000)}, path)


def write_tokenizer(path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"word {number}": number for number in range(900)}
    Tokenizer(WordLevel(words, unk_token="word 0")).save(str(path))


def write_by_the_door(path):
    durable.replace(path, bytes(9_000))


def write_and_wrap(path):
    try:
        write_plainly(path)
    except OSError as error:
        raise ValueError("the model cannot be saved") from error


@pytest.fixture
def small_files():
    """The operating system writes no file of more than 4 KB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "write",
    [
        write_plainly,
        write_safetensors,
        write_torch,
        write_tokenizer,
        write_by_the_door,
        write_and_wrap,
    ],
)
def test_a_write_that_is_refused_to_a_library_is_told_like_any_other(tmp_path, small_files, write):
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_bytes(b"old")
    with pytest.raises(StorageError) as caught, durable.replace_folder(path) as scratch:
        write(scratch / "weights")
    said = str(caught.value)
    assert said.startswith(str(path if write is not write_by_the_door else tmp_path))
    assert "writing failed: " in said and "run the same command again" in said
    if write is not write_torch:  # which does not say why
        assert "File too large" in said and "ulimit -f" in said
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (path / "weights").read_bytes() == b"old"


def test_a_file_elsewhere_that_a_library_could_not_open_is_named_itself(tmp_path):
    def read(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    said = r"^/elsewhere/vocab.txt: opening failed: Input/output error"
    with pytest.raises(StorageError, match=said), durable.replace_folder(tmp_path / "model"):
        read(Path("/elsewhere/vocab.txt"))
    with pytest.raises(FileNotFoundError), durable.replace_folder(tmp_path / "model"):
        (tmp_path / "vocab.txt").read_bytes()


@pytest.mark.parametrize("kind", ["file", "link to a folder", "link to a file", "link to nothing"])
def test_what_stands_in_the_place_of_a_folder_is_replaced_and_what_it_leads_to_is_not(
    tmp_path, kind
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_bytes(b"mine")
    path = tmp_path / "here" / "kd"
    path.parent.mkdir()
    if kind == "file":
        path.write_bytes(b"a file")
    else:
        targets = {"link to a folder": ".", "link to a file": "mine", "link to nothing": "none"}
        path.symlink_to(elsewhere / targets[kind])
    with durable.replace_folder(path) as scratch:
        (scratch / "weights").write_bytes(b"new")
    assert not path.is_symlink() and (path / "weights").read_bytes() == b"new"
    assert [file.name for file in path.parent.iterdir()] == ["kd"]
    assert {file.name: file.read_bytes() for file in elsewhere.iterdir()} == {"mine": b"mine"}


def test_messages_show_no_control_characters():
    assert shown("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert len(shown("x" * 1000)) == 300
    error = TeachonceError("a\nb", "c \x1b]0;title\x07\n  d", "e \x9b\u202e")
    assert str(error) == "a\\nb: c \\x1b]0;title\\x07\n  d\n  cure: e \\x9b\\u202e"


# ----------------------------------------------------------------------------------------- manifests


def test_a_manifest_comes_back_and_leaves_a_note_in_the_store(place):
    corpus = place.corpus(sentences(200))
    path = place.root / "corpus.json"
    assert Manifest.load(path, "corpus") == corpus.manifest
    (note,) = (place.root / "store/refs").iterdir()
    content = json.loads(note.read_bytes())
    assert content["manifest"] == json.loads(path.read_bytes())
    assert set(content["made"]) == {"by", "on", "at", "in"}
    assert str(place.root) not in path.read_text()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-20], "no manifest"),
        (lambda text: text.replace('"rows": ', '"rows": -'), "no manifest"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "no manifest: format"),
        (
            lambda text: text.replace('"kind": "corpus"', '"kind": "embeddings"'),
            "of embeddings, not",
        ),
        (lambda text: text.replace('"parent"', '"x": 1, "parent"'), "no manifest: x"),
        (lambda text: text.replace('"parent"', '"parent": null, "parent"'), "canonical"),
        (lambda text: text.replace("text/", "../"), "no manifest: objects.0.key"),
        (lambda text: "[" * 100_000, "no manifest"),
        (lambda text: "", "no manifest"),
    ],
)
def test_a_wrong_manifest_is_refused(place, damage, said):
    place.corpus(sentences(5))
    path = place.root / "corpus.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DamagedError, match=said):
        Manifest.load(path, "corpus")


def test_a_missing_manifest_names_the_command(tmp_path):
    with pytest.raises(MissingError, match="run `teachonce embed`"):
        Manifest.load(tmp_path / "embeddings.json", "embeddings")


def test_a_fingerprint_is_stable_and_sees_every_value():
    recipe = {"a": 1, "b": [0.05, None, "ü"], "c": {"d": True}}
    assert fingerprint(recipe) == fingerprint(dict(reversed(recipe.items())))
    assert (
        fingerprint(recipe) == "0a7ca10c83ba06f39c6839c5e940b11e06fa0440"
    )  # pinned: names in every store
    others = [
        {**recipe, "a": 2},
        {**recipe, "b": [0.05, None, "u"]},
        {**recipe, "c": {"d": 1.0}},
        {k: v for k, v in recipe.items() if k != "a"},
    ]
    assert len({fingerprint(other) for other in [recipe, *others]}) == 5


# ------------------------------------------------------------------------------------------- columns


def test_shards_end_where_the_text_says_so():
    keys = [text_key(text) for text in sentences(4000)]
    shards = [len(shard) for shard in cut(sentences(4000), 64)]
    assert sum(shards) == 4000
    assert min(shards[:-1]) >= 16
    assert max(shards) <= 256
    assert 40 < np.mean(shards) < 100
    assert not any(ends_shard(key, rows=15, rows_per_shard=64) for key in keys)
    assert all(ends_shard(key, rows=256, rows_per_shard=64) for key in keys)


def test_texts_added_or_removed_move_few_shards(place):
    texts = sentences(8000)
    before = {entry.key for entry in place.corpus(texts).objects}

    def rows_moved(changed):
        return sum(e.rows for e in place.corpus(changed).objects if e.key not in before)

    new = [f"{text} And more." for text in sentences(800, seed=5)]
    assert rows_moved([*new, *texts]) < 800 + 400
    assert rows_moved([*texts, *new]) < 800 + 400
    assert rows_moved(texts[:4000] + texts[4001:]) < 400


def test_rows_are_found_in_any_order_across_shards(place):
    texts = sentences(500)
    corpus = place.corpus(texts)
    manifest, vectors = vectors_of(corpus, place.store)
    embeddings = Embeddings(place.store, manifest, corpus)
    ids = np.random.default_rng(1).integers(500, size=700)
    assert corpus.take(ids) == [texts[i] for i in ids]
    assert np.array_equal(embeddings.rows_of(ids), vectors[ids])
    assert embeddings.rows_of(np.empty(0, np.int64)).shape == (0, 4)
    for wrong in (-1, 500):
        with pytest.raises(IndexError):
            embeddings.rows_of(np.array([0, wrong]))


def test_a_manifest_with_other_counts_of_rows_is_refused(place):
    """Believed, it would shift every row behind the wrong count."""
    corpus = place.corpus(sentences(100))
    first, *rest = corpus.objects
    assert rest
    for rows in (first.rows - 1, first.rows + 1, 0):
        changed = first.model_copy(update={"rows": rows})
        wrong = Corpus(
            place.store, corpus.manifest.model_copy(update={"objects": (changed, *rest)})
        )
        with pytest.raises(DamagedError, match=f"{rows} rows there, {first.rows} in the object"):
            wrong.texts(0)
    with pytest.raises(ValueError, match="rows"):
        Object(key=first.key, rows=1 << 40, bytes=1, sha256=first.sha256)


def test_a_manifest_with_vectors_of_another_teacher_is_refused(place):
    corpus = place.corpus(sentences(100))
    manifest, _ = vectors_of(corpus, place.store)
    other = manifest.model_copy(update={"recipe": {"prompt": "query: "}})
    with pytest.raises(DamagedError, match=f"it names vectors/{FINGERPRINT}"):
        Embeddings(place.store, other, corpus)


def test_float16_is_what_is_stored_and_read(place):
    corpus = place.corpus(sentences(30))
    manifest, vectors = vectors_of(corpus, place.store, storage="float16")
    rows = Embeddings(place.store, manifest, corpus).rows_of(np.arange(30))
    assert rows.dtype == np.float16
    assert np.array_equal(rows, vectors.astype(np.float16))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.nan, "1 of 5 vectors are NaN or Inf: rows 3 of the shard"),
        (np.inf, "1 of 5 vectors are NaN or Inf: rows 3 of the shard"),
        (70_000.0, "1 of 5 vectors are too large for float16: rows 3 of the shard"),
        (0.0, "1 of 5 vectors are zero: rows 3 of the shard"),
    ],
)
def test_poison_is_not_stored(place, value, said):
    vectors = np.ones((5, 4), np.float32)
    vectors[3] = value
    key = f"vectors/{FINGERPRINT}/{'b' * 40}.arrow"
    with pytest.raises(BadVectorsError, match=said):
        put_vectors(
            place.store,
            key,
            vectors=vectors,
            text_keys=np.zeros(5, "V16"),
            storage="float16",
            facts={},
        )
    assert place.store.find(key) is None


def test_vectors_of_another_corpus_are_refused(place):
    corpus = place.corpus(sentences(300))
    manifest, _ = vectors_of(corpus, place.store)
    other = place.corpus([*sentences(300)[:150], *sentences(150, seed=9)])
    with pytest.raises(DamagedError, match=r"made from another corpus: .* at shard"):
        Embeddings(place.store, manifest, other)


def test_vectors_under_a_forged_key_name_the_first_wrong_row(place):
    texts = sentences(10)
    corpus = place.corpus(texts, rows_per_shard=16)
    keys = text_keys_of(corpus.batch(0)).copy()
    keys[[4, 5]] = keys[[5, 4]]
    entry = put_vectors(
        place.store,
        f"vectors/{FINGERPRINT}/{corpus.shard_digest(0)}.arrow",
        vectors=np.ones((10, 2), np.float32),
        text_keys=keys,
        storage="float32",
        facts={},
    )
    manifest = Manifest(kind="embeddings", recipe=RECIPE, parent=None, objects=(entry,))
    with pytest.raises(DamagedError, match="row 4 of shard 0 belongs to another text"):
        Embeddings(place.store, manifest, corpus).rows_of(np.array([0]))


ASKS_LINUX = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux")


def maps_for_scattered_rows(path):
    """Whether a map of a file is one for scattered rows, of each of its maps."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return [
        "rr" in entry.rpartition("VmFlags:")[2].split() for entry in entries if str(path) in entry
    ]


@ASKS_LINUX
def test_the_system_is_told_whether_rows_are_scattered(place, monkeypatch):
    corpus = place.corpus(sentences(400), rows_per_shard=4000)
    place.embed(corpus, HashTeacher(16))
    embeddings = Embeddings(place.store, place.embeddings, corpus)
    path = place.store.path(embeddings.objects[0].key)
    embeddings.rows_of(np.array([399, 5, 77]))
    assert maps_for_scattered_rows(path) == [False]  # small: it may be read as a whole
    monkeypatch.setattr(column, "READ_WHOLE_BYTES", 0)
    scattered = embeddings.rows_of(np.array([399, 5, 77]))
    assert maps_for_scattered_rows(path) == [True]  # one: advice for a part would split the map
    whole = embeddings.shard(0)
    assert maps_for_scattered_rows(path) == [False]
    assert (scattered == whole[[399, 5, 77]]).all()
    embeddings.rows_of(np.array([7]))
    assert maps_for_scattered_rows(path) == [True]
    embeddings.rows_of(np.arange(100, 200))
    assert maps_for_scattered_rows(path) == [False]


@ASKS_LINUX
def test_so_it_is_of_token_ids_and_neighbours(place, monkeypatch):
    monkeypatch.setattr(column, "READ_WHOLE_BYTES", 0)
    corpus = place.corpus(sentences(400), rows_per_shard=4000)
    keys = text_keys_of(corpus.batch(0))
    tokens_key = f"tokens/{FINGERPRINT}/{corpus.shard_digest(0)}.arrow"
    made = put_tokens(place.store, tokens_key, ids=[[[row]] for row in range(400)], text_keys=keys)
    mining = fingerprint({"parent": "parent"})
    lists = put_negatives(
        place.store,
        f"negatives/{mining}/000000.arrow",
        neighbours=np.zeros((400, 1), np.int64),
        scores=np.ones((400, 1), np.float32),
        text_keys=keys,
        facts={},
    )
    named = Manifest(kind="negatives", recipe={}, parent="parent", objects=(lists,))
    for mapped in (
        Tokens(place.store, [made], corpus),
        Negatives(place.store, named, corpus, mined_from="parent"),
    ):
        path = place.store.path(mapped.objects[0].key)
        mapped.rows_of(np.array([399, 5, 77]))
        assert maps_for_scattered_rows(path) == [True]
        mapped.rows_of(np.arange(50))
        assert maps_for_scattered_rows(path) == [False]


def test_tokens_come_back_by_row(place):
    corpus = place.corpus(sentences(200))
    ids = [list(range(row % 7 + 1)) for row in range(200)]

    def parts(of_shard):
        return (of_shard[first : first + 6] for first in range(0, len(of_shard), 6))

    objects = [
        put_tokens(
            place.store,
            f"tokens/{FINGERPRINT}/{corpus.shard_digest(shard)}.arrow",
            ids=parts(ids[corpus.starts[shard] : corpus.starts[shard + 1]]),
            text_keys=text_keys_of(corpus.batch(shard)),
        )
        for shard in range(len(corpus.objects))
    ]
    tokens = Tokens(place.store, objects, corpus)
    rows = np.array([199, 0, 57, 57])
    assert [row.tolist() for row in tokens.rows_of(rows)] == [ids[row] for row in rows]
    assert [row.tolist() for row in tokens.rows_of(np.arange(200))] == [list(row) for row in ids]


def test_negatives_come_back_by_row_and_know_their_parent(place):
    corpus = place.corpus(sentences(10), rows_per_shard=16)
    neighbours = np.arange(30).reshape(10, 3) % 10
    neighbours[2, 2] = NONE
    scores = np.linspace(1, 0, 30, dtype=np.float32).reshape(10, 3)
    entry = put_negatives(
        place.store,
        f"negatives/{fingerprint({'parent': 'p'})}/000000.arrow",
        neighbours=neighbours,
        scores=scores,
        text_keys=text_keys_of(corpus.batch(0)),
        facts={},
    )
    manifest = Manifest(kind="negatives", recipe={}, parent="p", objects=(entry,))
    found = Negatives(place.store, manifest, corpus, mined_from="p").rows_of(np.array([2, 9]))
    assert np.array_equal(found[0], neighbours[[2, 9]])
    assert np.array_equal(found[1], scores[[2, 9]])
    with pytest.raises(DamagedError, match="mined from other vectors"):
        Negatives(place.store, manifest, corpus, mined_from="q")
    other = manifest.model_copy(update={"recipe": {"neighbours": 4}})
    with pytest.raises(DamagedError, match="it names negatives/"):
        Negatives(place.store, other, corpus, mined_from="p")


@pytest.mark.parametrize("wrong", [NONE - 1, 10, 1 << 62])
def test_ids_of_no_row_among_negatives_are_refused(place, wrong):
    corpus = place.corpus(sentences(10), rows_per_shard=16)
    neighbours = np.zeros((10, 2), np.int64)
    neighbours[7, 1] = wrong
    entry = put_negatives(
        place.store,
        f"negatives/{fingerprint({'parent': 'p'})}/000000.arrow",
        neighbours=neighbours,
        scores=np.zeros((10, 2), np.float32),
        text_keys=text_keys_of(corpus.batch(0)),
        facts={},
    )
    manifest = Manifest(kind="negatives", recipe={}, parent="p", objects=(entry,))
    with pytest.raises(DamagedError, match="names rows that a corpus of 10 has not"):
        Negatives(place.store, manifest, corpus, mined_from="p").rows_of(np.arange(10))


# --------------------------------------------------------------------------------------------- split


def test_held_out_rows_stay_held_out_when_the_corpus_grows(place):
    texts = sentences(2000)
    small, large = place.corpus(texts[:1000]), place.corpus([*reversed(texts)])

    def heldout(corpus):
        split = Split(corpus=corpus.manifest.content, heldout=0.1, evaluation=())
        return set(corpus.take(split.heldout_rows(corpus)))

    assert heldout(small) == heldout(large) & set(texts[:1000])
    assert 0.07 < len(heldout(large)) / 2000 < 0.13


def test_each_row_is_for_one_thing(place):
    corpus = place.corpus(sentences(500))
    split = Split(corpus=corpus.manifest.content, heldout=0.2, evaluation=(3, 4, 250))
    train, heldout = split.train_rows(corpus), split.heldout_rows(corpus)
    assert sorted([*train, *heldout, 3, 4, 250]) == list(range(500))


def test_a_split_of_another_corpus_is_refused(place, tmp_path):
    corpus = place.corpus(sentences(50))
    Split(corpus="x" * 40, heldout=0.2, evaluation=()).save(tmp_path / "split.json")
    with pytest.raises(DamagedError, match="made for another corpus"):
        Split.load(tmp_path / "split.json", corpus)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluation": [50]}, "names rows that a corpus of 50 has not"),
        ({"evaluation": [-1]}, "no split"),
        ({"evaluation": [10**30]}, "names rows that a corpus of 50 has not"),
        ({"heldout": 1.5}, "no split"),
        ({"heldout": 0}, "no split"),
    ],
)
def test_a_split_of_rows_that_are_not_there_is_refused(place, tmp_path, change, said):
    corpus = place.corpus(sentences(50))
    path = tmp_path / "split.json"
    right = {"format": 1, "corpus": corpus.manifest.content, "heldout": 0.2, "evaluation": [3]}
    path.write_text(json.dumps(right))
    assert Split.load(path, corpus).evaluation == (3,)
    path.write_text(json.dumps(right | change))
    with pytest.raises(DamagedError, match=said):
        Split.load(path, corpus)


def test_the_fake_teacher_is_a_function_of_the_text():
    assert np.array_equal(HashTeacher().vector("a"), HashTeacher()(["b", "a"]).vectors[1])


def test_a_store_reads_a_corpus_another_process_wrote(place):
    corpus = place.corpus(sentences(100))
    again = Corpus(Store(place.root / "store"), Manifest.load(place.root / "corpus.json", "corpus"))
    assert again.texts(0) == corpus.texts(0)


# -------------------------------------------------------------------------------- what seldom happens


def test_a_manifest_that_could_not_be_read_again_is_not_written(place, monkeypatch):
    corpus = place.corpus(sentences(300), rows_per_shard=16)
    path, named = place.root / "again.json", len(corpus.objects)
    monkeypatch.setattr("storage.manifest.MAX_OBJECTS", named)
    corpus.manifest.save(path, place.store)
    path.unlink()
    monkeypatch.setattr("storage.manifest.MAX_OBJECTS", named - 1)
    with pytest.raises(TeachonceError) as caught:
        corpus.manifest.save(path, place.store)
    assert str(caught.value) == (
        f"{path}: {named} shards, and a manifest names {named - 1} at most\n"
        "  cure: raise shard.rows_per_shard, then run `teachonce shard`"
    )
    assert not path.exists()


def test_the_largest_manifest_is_one_that_is_read():
    widest = Object(
        key=f"vectors/{'f' * 40}/{'f' * 40}.arrow", rows=10**7, bytes=10**11, sha256="f" * 64
    )
    one = len(json.dumps(widest.model_dump(mode="json"), separators=(",", ":"))) + 1
    # Besides: the recipe, and who has it.
    assert MAX_OBJECTS * one + (1 << 20) < MAX_BYTES


def test_a_file_that_was_proved_and_cannot_be_read_any_more_is_damaged(place):
    store = place.store
    entry = put_texts(store, [("a text", text_key("a text"))])
    path = store.path(entry.key)
    path.chmod(0o644)
    path.write_bytes(b"ARROW1\0\0" + b"\xff" * 200)
    # Nobody can write without a trace, but for rot: let the process know this one already.
    store._checked[durable.identity(path.stat())] = entry.sha256
    with pytest.raises(DamagedError, match="damaged: "):
        store.open(entry)


def test_a_column_of_other_shards_than_the_texts_is_refused(place):
    corpus = place.corpus(sentences(10), rows_per_shard=64)
    with pytest.raises(DamagedError, match="0 rows in 0 shards beside 10 texts in 1 shards"):
        Tokens(place.store, [], corpus)


def test_no_ids_give_no_rows(place):
    corpus = place.corpus(sentences(10))
    none = np.empty(0, np.int64)
    assert corpus.take(none) == []
    manifest = Manifest(kind="negatives", recipe={"neighbours": 7}, parent="p", objects=())
    ids, scores = Negatives(place.store, manifest, place.corpus([]), mined_from="p").rows_of(none)
    assert ids.shape == scores.shape == (0, 7)
    assert place.corpus([]).text_keys.shape == (0,)


def test_offsets_that_lead_out_of_an_arrow_message_are_refused():
    with pytest.raises(ValueError, match="an offset in it leads out of it"):
        unpacked_bytes(b"\xff" * 16, b"", is_dictionary=False)
    with pytest.raises(ValueError, match="an offset in it leads out of it"):
        first_batch(b"\xff" * 16)


def test_a_place_before_the_start_of_an_arrow_file_is_not_counted_from_its_end(place):
    entry = put_texts(place.store, [("a text", text_key("a text"))])
    content = bytearray(place.store.path(entry.key).read_bytes())
    start, _ = first_batch(content)
    block = content.rindex(struct.pack("<q", start))
    content[block : block + 8] = struct.pack("<q", start - len(content))
    with pytest.raises(ValueError, match="an offset in it leads out of it"):
        first_batch(content)


def test_what_is_no_manifest_file_is_named(tmp_path):
    path = tmp_path / "corpus.json"
    path.mkdir()
    with pytest.raises(DamagedError, match="no manifest: it is a folder, not a file"):
        Manifest.load(path, "corpus")
    path.rmdir()
    with path.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(
        DamagedError, match="no manifest: it has 68,157,440 bytes, where 67,108,864 are"
    ):
        Manifest.load(path, "corpus")
    ref = tmp_path / f"refs/{'0' * 40}.json"
    ref.parent.mkdir()
    path.rename(ref)
    _, (unreadable,) = inventory.read_refs(tmp_path)
    assert "68157440 bytes are too many" in str(unreadable)


def test_an_object_that_vanishes_while_it_is_put_is_named(place, monkeypatch):
    monkeypatch.setattr(durable, "publish", lambda path, write: True)
    with pytest.raises(MissingError, match="not in the store"):
        put_texts(place.store, [("a", text_key("a"))])


def test_a_header_with_another_count_of_rows_is_refused(place):
    entry = put_texts(place.store, [("a", text_key("a"))])
    path = place.store.path(entry.key)
    batch = place.store.open(entry)
    header = json.loads(batch.schema.metadata[HEADER]) | {"rows": 2}
    schema = batch.schema.with_metadata({HEADER: json.dumps(header).encode()})
    content = written(schema, batch)
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="1 rows instead of 2"):
        place.store.find(entry.key)


def test_a_missing_split_names_the_command(place, tmp_path):
    with pytest.raises(MissingError, match="run `teachonce split`"):
        Split.load(tmp_path / "split.json", place.corpus(sentences(5)))


def test_files_that_go_while_a_store_is_listed_are_not_missed(place, monkeypatch):
    place.corpus(sentences(5))
    root = place.store.root
    walk = inventory._walk
    monkeypatch.setattr(inventory, "_walk", lambda at: [*walk(at), at / "text/gone.tmp"])
    assert len(inventory.take_inventory(root).objects) == 1
    names = [path.name for path in (root / "refs").iterdir()]
    gone = root / f"refs/{'0' * 40}.json"
    monkeypatch.setattr(type(root), "iterdir", lambda folder: [*map(folder.joinpath, names), gone])
    refs, unreadable = inventory.read_refs(root)
    assert (len(refs), unreadable) == (1, [])


def test_a_folder_that_cannot_be_listed_is_named(place, monkeypatch):
    place.corpus(sentences(5))

    def refused(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(StorageError, match="listing failed: Permission denied"):
        inventory.take_inventory(place.store.root)


def test_an_object_that_cannot_be_opened_is_not_called_damaged(place, monkeypatch):
    entry = place.corpus(sentences(5)).objects[0]

    def refused(path, flags, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refused)
    assert examination.examine(place.store, entry.key, entry, read=False).state == "unreadable"


# ------------------------------------------------------------------------------- what gc must not take away


def test_who_finds_an_object_makes_it_young_and_reads_it_once(place):
    entry = place.corpus(sentences(40)).objects[0]
    store, path = place.store, place.store.path(entry.key)
    then = time.time() - 20 * 86_400
    os.utime(path, (then, then))
    store.open(entry)
    assert path.stat().st_mtime == then  # a reader relies on nothing
    store = place.store
    store.find(entry.key)
    touched = path.stat().st_mtime
    assert touched > then + 86_400
    # It is remembered as it is since then: a flipped bit is not looked for again.
    assert len(store._checked) == 1
    store.find(entry.key)
    store.open(entry)
    store.check_present(entry)
    assert (len(store._checked), path.stat().st_mtime) == (1, touched)
    # Of an object that is not an hour old nothing has to be said.
    recent = time.time() - 3000
    os.utime(path, (recent, recent))
    store.find(entry.key)
    assert path.stat().st_mtime == recent


def test_who_puts_what_is_there_makes_it_young(place):
    entry = place.corpus(sentences(40)).objects[0]
    store, path = place.store, place.store.path(entry.key)
    os.utime(path, (0, 0))
    batch = store.open(entry)
    assert store.put(entry.key, batch.replace_schema_metadata(None)) == entry
    assert path.stat().st_mtime > 86_400


def test_what_a_killed_gc_took_away_comes_back_to_whoever_asks(place):
    entries = place.corpus(sentences(800)).objects
    store = place.store
    gc = trash.begin(store.root)
    inodes = {}
    for entry in entries:
        inodes[entry] = store.path(entry.key).stat().st_ino
        trash.take_away(store.path(entry.key), gc)
        trash.take_away(store.path(entry.key), gc)  # it is gone already
        assert not store.path(entry.key).exists()
    asked = [
        lambda entry: store.find(entry.key),
        store.open,
        store.check_present,
        lambda entry: store.has(entry.key),
        lambda entry: store.header(entry.key),
    ]
    assert len(entries) >= len(asked)
    for entry, ask in zip(entries, asked, strict=False):
        assert ask(entry) is not False
        assert store.path(entry.key).stat().st_ino == inodes[entry]
    # Nobody else's file comes in its place.
    lost = store.path(f"text/{'e' * 40}.arrow")
    lost.with_name(f".{lost.name}.{'f' * 16}.trash").write_text("of no gc that is known")
    assert not store.has(f"text/{'e' * 40}.arrow")
    assert trash.original(lost.name) is None
    assert trash.original(f".{lost.name}.{'f' * 16}.trash") == lost.name


def test_the_second_look_sees_what_vanished_or_was_exchanged(place):
    first, second, *_ = place.corpus(sentences(300)).objects
    store = place.store
    for entry in (first, second):
        store.find(entry.key)
        store.check_present(entry)
    a, b = store.path(first.key), store.path(second.key)
    a.rename(a.with_name("aside"))
    with pytest.raises(MissingError):
        store.check_present(first)
    b.rename(a)
    with pytest.raises(DamagedError, match="under a foreign name"):
        store.check_present(first)


def test_only_a_file_of_the_size_that_it_says_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert regular.content(path) == b"abc"
    assert regular.content(path, 3) == b"abc"
    regular.check(path)
    with pytest.raises(IrregularError, match="file: has 3 bytes, where 2 are the most"):
        regular.content(path, 2)
    path.write_bytes(b"")
    assert regular.content(path) == b""
    with pytest.raises(FileNotFoundError):
        regular.content(tmp_path / "none")


@pytest.mark.parametrize("what", ["a folder", "a named pipe", "a device", "a socket", "0 bytes"])
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_what_is_no_file_is_not_read(tmp_path, what):
    path = tmp_path / "file"
    if what == "a folder":
        path.mkdir()
    elif what == "a named pipe":
        os.mkfifo(path)
    elif what == "a socket":
        with contextlib.chdir(tmp_path):
            socket.socket(socket.AF_UNIX).bind("file")
    else:
        path.symlink_to("/dev/zero" if what == "a device" else "/proc/self/status")
    said = f"file: (is {what}, not a file|says that it has {what} and has more)"
    with pytest.raises(IrregularError, match=said):
        regular.check(path)


def test_a_file_that_may_not_be_opened_is_named(tmp_path):
    (tmp_path / "file").symlink_to("file")
    with pytest.raises(OSError, match="symbolic links"):
        regular.check(tmp_path / "file")
    with pytest.raises(StorageError, match="file: reading failed: Too many levels"):
        regular.content(tmp_path / "file")


def test_a_holder_whose_folder_is_no_utf8_is_noted_and_not_called_gone(place):
    corpus = place.corpus(sentences(5))
    folder = place.root / os.fsdecode(b"tr\xe9e")
    corpus.manifest.save(folder / "corpus.json", place.store)
    refs, unreadable = inventory.read_refs(place.store.root)
    assert not unreadable
    assert sorted(ref.made["in"] for ref in refs) == [f"{place.root}", f"{place.root}/tr\\xe9e"]
    assert not any(ref.is_gone for ref in refs)
    corpus.manifest.save(folder / "corpus.json", place.store)
    assert len(inventory.read_refs(place.store.root)[0]) == 2


def test_rows_are_drawn_from_among_those_that_are_not_held_out(tmp_path):
    keys = np.frombuffer(b"".join(text_key(text) for text in sentences(600)), "V16")
    places = drawn(keys, 200)
    assert len(places) == 200
    assert places.tolist() == sorted({*places.tolist()})
    # From all over: of each third about a third.
    assert min(np.histogram(places, bins=3, range=(0, 600))[0]) > 40
    split = Split(corpus="", heldout=0.5, evaluation=())
    assert not split.is_heldout(keys)[places].any()
    last = [int.from_bytes(keys[place].tobytes()[8:], "little") for place in range(600)]
    assert {*places.tolist()} == {*sorted(range(600), key=last.__getitem__)[400:]}
    assert drawn(keys, 1000).tolist() == list(range(600))
    assert drawn(keys[:0], 5).tolist() == []


def is_in_memory(address, size):
    """Whether each page of a mapped piece is in memory, by mincore(2)."""
    first = address & -column.PAGE_BYTES
    pages = np.zeros(-(-(address + size - first) // column.PAGE_BYTES), np.uint8)
    column.LIBC.mincore(
        ctypes.c_void_p(first),
        ctypes.c_size_t(address + size - first),
        ctypes.c_void_p(pages.ctypes.data),
    )
    return (pages & 1).astype(bool)


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_rows_that_are_read_ahead_come_into_memory_and_hardly_others(tmp_path, storage):
    store = Store(tmp_path / "store")
    texts = [f"text {row}" for row in range(3000)]
    objects = tuple(put_texts(store, shard) for shard in cut(texts, 100_000))
    corpus = Corpus(store, Manifest(kind="corpus", recipe={}, parent=None, objects=objects))
    manifest, _ = vectors_of(corpus, store, dim=1024, storage=storage)
    vectors = Embeddings(store, manifest, corpus)
    entry = put_tokens(
        store,
        f"tokens/{FINGERPRINT}/{corpus.shard_digest(0)}.arrow",
        ids=[[[row] * 1000 for row in range(3000)]],
        text_keys=corpus.text_keys,
    )
    tokens = Tokens(store, [entry], corpus)
    ids = np.array([2500, 40, 1600])
    stored, *_ = vectors._stored(0)
    places = {
        id(vectors): (stored.ctypes.data, stored[:1].nbytes),
        id(tokens): (tokens.rows_of(np.array([0]))[0].ctypes.data, 4000),
    }
    for cache in (vectors, tokens):
        first, size = places[id(cache)]
        path = store.path(cache.objects[0].key)
        cache.read_ahead(ids)  # mapped, checked, and advised to read no more than what is asked for
        give_up(path, first, 3000 * size)
        if is_in_memory(first, 3000 * size)[1:-1].any():
            pytest.skip("files of this folder cannot be dropped from memory")
        cache.read_ahead(ids)
        for row in ids.tolist():
            while not is_in_memory(first + row * size, size).all():
                time.sleep(0.01)
        assert is_in_memory(first, 3000 * size).sum() <= 3 * 3


def give_up(path, first, size):
    """Drop a mapped file from memory."""
    start = first & -column.PAGE_BYTES
    column.LIBC.madvise(start, size, mmap.MADV_DONTNEED)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
