"""Rot: no changed bit, cut, hole or exchange of an object, manifest or ref passes for the real thing."""

import os
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest

from stages import shard
from stages.params import ShardParams
from storage.corpus import Corpus
from storage.errors import DamagedError, TeachonceError
from storage.manifest import Manifest
from storage.store import Store
from storage.upkeep.inventory import read_refs
from tests.conftest import HashTeacher, Place, sentences
from tests.faults.samples import FILES, KINDS, finished, sample, values

FLIPS = 4_200
CHUNKS = 4
NEVER = "read with other values, ended the process, or not named"

# Where a file has offsets and sizes, and where a wrong one could end a process: its two ends.
ENDS = 1024


def outcome_of(damaged, whole):
    """True if an object is refused by its name; False if its values are still those of `whole`.

    A store of its own: it has checked nothing before.
    """
    try:
        batch = Store(damaged.path.parents[whole.entry.key.count("/")]).open(whole.entry)
    except TeachonceError as error:
        assert str(damaged.path) in str(error), error
        assert "cure: " in str(error), error
        return True
    assert batch.equals(whole.batch), "other values were returned"
    # A second reader, by another way through the file, sees the same.
    with pa.ipc.open_stream(pa.py_buffer(damaged.path.read_bytes())[8:]) as reader:
        other = reader.read_next_batch()
    other.validate(full=True)
    assert other.equals(whole.batch), "a reader of streams sees other values"
    return False


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_refused_or_harmless(tmp_path, kind, chunk, times, count):
    whole = sample(tmp_path, kind, rows=40)
    size = len(whole.content)
    draw = random.Random(f"{kind} {chunk}")
    refused = 0
    with whole.path.open("r+b", buffering=0) as file:
        for number in range(FLIPS * times):
            place = draw.randrange(size)
            if number % 2 and size > 2 * ENDS:
                place = draw.randrange(ENDS) - (ENDS if number % 4 == 1 else 0)
            byte = whole.content[place]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << draw.randrange(8)]), place % size)
            refused += outcome_of(whole, whole)
            os.pwrite(file.fileno(), bytes([byte]), place % size)
    assert refused > FLIPS * times * 0.6  # the rest fell into padding
    assert Store(tmp_path / "store").open(whole.entry).equals(whole.batch)
    count("flipped bits in objects of every kind", FLIPS * times, NEVER)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused(tmp_path, kind, count):
    whole = sample(tmp_path, kind)
    with whole.path.open("r+b") as file:
        for size in range(len(whole.content) - 1, -1, -1):
            file.truncate(size)
            assert outcome_of(whole, whole), size
    count("truncations of objects, at every offset", len(whole.content), NEVER)


@pytest.mark.parametrize("kind", KINDS)
def test_junk_holes_and_exchanges_are_refused_or_harmless(tmp_path, kind, count):
    whole = sample(tmp_path, kind)
    other = sample(tmp_path / "other", kind, seed=1)
    draw = random.Random(kind)
    content = whole.content
    damages = [
        *(content + draw.randbytes(n) for n in (1, 7, 8, 64, 4096)),
        *(content + content[:n] for n in (8, 64, len(content))),
        content + other.content,
        other.content,
        other.content[: len(content)].ljust(len(content), b"\0"),
        bytes(len(content)),
        b"",
        content[::-1],
        content.replace(b"\n", b"\r\n"),
        *(content[:n] + bytes(64) + content[n + 64 :] for n in range(0, len(content), 64)),
        *(content[:n] + b"\xff" * 64 + content[n + 64 :] for n in range(0, len(content), 64)),
        *(content[:n] + content[n + 8 :] for n in range(0, len(content), 8)),
        *(content[:n] + bytes(8) + content[n:] for n in range(0, len(content), 8)),
    ]
    for damage in damages:
        whole.path.write_bytes(damage)
        # Of two whole lists of negatives under one name, both would be right.
        if outcome_of(whole, whole) and kind != "negatives":
            with pytest.raises(DamagedError):  # as embed finds it, without a manifest
                Store(tmp_path / "store").find(whole.entry.key)
    count("objects with junk, holes, shifts or another's content", len(damages), NEVER)


# ------------------------------------------------------------------------------- manifests and refs


@pytest.mark.parametrize("kind", ["corpus", "embeddings", "negatives"])
def test_every_bit_of_a_manifest(tmp_path, kind, count):
    """Refused when it is loaded or used, or what training reads is the same."""
    finished(tmp_path)
    expected = values(tmp_path)
    path = tmp_path / f"{kind}.json"
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            Manifest.load(path, kind)
            found = values(tmp_path)
        except TeachonceError as error:
            assert "cure: " in str(error)
            refused += 1
        else:
            assert found == expected, (bit // 8, bytes(damaged))
    assert refused > 0.85 * 8 * len(whole), refused / len(whole) / 8
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedError):
            Manifest.load(path, kind)
    never = "believed though what is read would be something else"
    count("every bit and every truncation of the manifests", 9 * len(whole), never)


def test_every_bit_of_a_ref(tmp_path, count):
    place = Place(tmp_path)
    corpus = place.corpus(sentences(30), rows_per_shard=16)
    store = tmp_path / "store"
    (path,) = (store / "refs").iterdir()
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refs, unreadable = read_refs(store)
        assert len(refs) + len(unreadable) == 1
        # Who made it and when is for people; what it keeps must not change.
        assert [ref.manifest for ref in refs] == [corpus.manifest] * len(refs), bit
        assert all(str(path) in str(error) for error in unreadable)
    for size in range(len(whole) - 1):  # all but the last line feed
        path.write_bytes(whole[:size])
        assert [len(found) for found in read_refs(store)] == [0, 1], size
    count("every bit and every truncation of a ref", 9 * len(whole), "keeps other objects")


# ----------------------------------------------------------------------------------------- laundering


def test_embed_over_rot_leaves_no_fresh_manifest(tmp_path, times, count):
    corpus = Place(tmp_path).corpus(sentences(40), rows_per_shard=16)
    place = Place(tmp_path)
    place.embed(corpus, HashTeacher(8), files=FILES)
    manifest = tmp_path / "embeddings.json"
    expected = manifest.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(400 * times):
        path = place.store.path(draw.choice(place.embeddings.objects).key)
        whole = path.read_bytes()
        path.chmod(0o644)
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        manifest.unlink()
        teacher = HashTeacher(8)
        try:
            place.embed(corpus, teacher, files=FILES)
        except DamagedError as error:
            refused += 1
            assert str(path) in str(error)
            assert not manifest.exists()
            manifest.write_bytes(expected)
        assert manifest.read_bytes() == expected
        assert teacher.texts_seen == 0
        path.write_bytes(whole)
    assert refused > 200 * times
    count("runs of embed over rot", 400 * times, "names rot in a fresh manifest")


def test_shard_over_rot_leaves_no_fresh_manifest(tmp_path, times, count):
    texts = sentences(60)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    settings = ShardParams(
        sources=("a.txt",), field="text", rows_per_shard=16, min_chars=1, max_chars=999
    )
    out = tmp_path / "corpus.json"

    def run():
        store = Store(tmp_path / "store")
        shard.run(settings, root=tmp_path, store=store, out=out, facts=tmp_path / "facts.json")

    run()
    expected = out.read_bytes()
    draw = random.Random(1)
    refused = 0
    for _ in range(200 * times):
        path = draw.choice(sorted((tmp_path / "store/text").iterdir()))
        whole = path.read_bytes()
        path.chmod(0o644)
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        out.unlink()
        try:
            run()
        except DamagedError as error:
            refused += 1
            assert str(path) in str(error)
            assert not out.exists()
            out.write_bytes(expected)
        assert out.read_bytes() == expected
        path.write_bytes(whole)
    assert refused > 100 * times
    count("runs of shard over rot", 200 * times, "names rot in a fresh manifest")


def test_shards_and_teachers_exchanged_in_manifests_are_refused(tmp_path, count):
    """Whole objects, each true to its own name, but not where the manifest has them."""
    finished(tmp_path)
    expected = values(tmp_path)
    other = shutil.copytree(tmp_path, tmp_path.parent / "other")
    corpus = Corpus(Store(other / "store"), Manifest.load(other / "corpus.json", "corpus"))
    Place(other).embed(corpus, HashTeacher(8, scale=2.0), files=FILES | {"config.json": "2" * 64})
    shutil.copytree(other / "store", tmp_path / "store", dirs_exist_ok=True)
    tried = 0
    for kind in ("embeddings", "negatives"):
        path = tmp_path / f"{kind}.json"
        whole = Manifest.load(path, kind)
        foreign = Manifest.load(other / f"{kind}.json", kind)
        entries = list(whole.objects)
        last = len(entries)
        pairs = [(i, j) for i in range(last) for j in range(i)]
        changed = [
            *(exchanged(entries, i, j) for i, j in pairs),
            *(entries[:i] + entries[i + 1 :] for i in range(last)),
            *(entries[:i] + entries[i:][:1] + entries[i:] for i in range(last)),
            [],
        ]
        if kind == "embeddings":
            changed += [[*entries[:i], foreign.objects[i], *entries[i + 1 :]] for i in range(last)]
        for objects in changed:
            manifest = whole.model_copy(update={"objects": tuple(objects)})
            path.write_bytes(manifest.encoded)
            with pytest.raises(TeachonceError):
                values(tmp_path)
            tried += 1
        path.write_bytes(whole.encoded)
    assert values(tmp_path) == expected
    count("manifests with shards exchanged, lost, doubled or of another teacher", tried, "believed")


def exchanged(entries, i, j):
    entries = list(entries)
    entries[i], entries[j] = entries[j], entries[i]
    return entries


def test_the_second_reader_agrees_on_whole_objects(tmp_path):
    """The tests above compare two readers, so both must be able to read."""
    for kind in KINDS:
        whole = sample(tmp_path / kind, kind)
        assert outcome_of(whole, whole) is False
        assert np.array_equal(
            np.frombuffer(whole.content, "u1")[:6], np.frombuffer(b"ARROW1", "u1")
        )
