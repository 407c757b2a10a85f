"""A store of more objects than a process may have files open, or mapped, at a time."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from storage.corpus import Corpus, put_texts, text_key
from storage.embeddings import put_vectors
from storage.errors import TeachonceError
from storage.manifest import MAX_OBJECTS, Manifest, fingerprint
from storage.negatives import put_negatives
from storage.store import Object, Store
from storage.tokens import put_tokens

READS_ALL = """
import resource, sys
from pathlib import Path
import numpy as np
from storage import column, embeddings as of_vectors
from stages.teaching import reuse
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.manifest import Manifest
from storage.negatives import Negatives
from storage.store import Store
from storage.tokens import Tokens

root = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
column.MAPS = of_vectors.MAPS = reuse.MAPS = int(sys.argv[3])
store = Store(root / "store")
manifests = {path.stem: Manifest.load(path, path.stem) for path in sorted(root.glob("*.json"))}
corpus = Corpus(store, manifests["corpus"])
vectors = Embeddings(store, manifests["embeddings"], corpus)
mined = Negatives(store, manifests["negatives"], corpus, mined_from=manifests["embeddings"].content)
keys = [entry.key.replace("vectors", "tokens", 1) for entry in manifests["embeddings"].objects]
tokens = Tokens(store, [store.find(key) for key in keys], corpus)
# Any order, and twice: what was let go is opened again.
for ids in (np.arange(corpus.rows)[::-1], np.random.default_rng(0).permutation(corpus.rows)):
    assert (vectors.rows_of(ids)[:, 0] == ids).all()
    assert (mined.rows_of(ids)[0][:, 0] == ids).all()
    assert [int(of_row[0]) for of_row in tokens.rows_of(ids)] == ids.tolist()
    assert corpus.take(ids) == [f"text {row}" for row in ids]
shards = range(len(corpus.objects))
todo = {shard: corpus.text_keys_in([shard]) for shard in shards}
older = [entry.key for entry in manifests["embeddings"].objects]
known = reuse.ReusableVectors(store, older, todo, storage="float32")
for shard in shards:
    there = np.stack(known.reused_rows(shard).batch.column("vector").to_numpy(zero_copy_only=False))
    assert (there == vectors.shard(shard)).all()
maps = Path("/proc/self/maps")
print(maps.read_text().count(str(root)) if maps.exists() else 0)
"""


def furnish(root, shards):
    """Two texts a shard; their vectors, token ids and negatives begin with their row ids."""
    store = Store(root / "store")
    named = {"corpus": [], "embeddings": [], "negatives": []}
    recipe = {"kind": "of rows"}
    teacher = fingerprint(recipe)
    texts = [[f"text {2 * shard}", f"text {2 * shard + 1}"] for shard in range(shards)]
    for shard in texts:
        named["corpus"].append(put_texts(store, [(text, text_key(text)) for text in shard]))
    corpus = Manifest(kind="corpus", recipe={}, parent=None, objects=tuple(named["corpus"]))
    keys = Corpus(store, corpus).text_keys.reshape(shards, 2)
    for shard, entry in enumerate(named["corpus"]):
        name = f"{teacher}/{entry.key.removeprefix('text/')}"
        rows = np.arange(2 * shard, 2 * shard + 2)
        named["embeddings"].append(
            put_vectors(
                store,
                f"vectors/{name}",
                vectors=np.stack([rows, rows + 1], axis=1).astype(np.float32),
                text_keys=keys[shard],
                storage="float32",
                facts={"tokens": 2},
            )
        )
        put_tokens(store, f"tokens/{name}", ids=[rows[:, None].tolist()], text_keys=keys[shard])
    embeddings = Manifest(
        kind="embeddings",
        recipe=recipe,
        parent=corpus.content,
        objects=tuple(named["embeddings"]),
    )
    mining = fingerprint({"parent": embeddings.content})
    for shard in range(shards):
        named["negatives"].append(
            put_negatives(
                store,
                f"negatives/{mining}/{shard:06}.arrow",
                neighbours=np.arange(2 * shard, 2 * shard + 2)[:, None],
                scores=np.ones((2, 1), np.float32),
                text_keys=keys[shard],
                facts={},
            )
        )
    negatives = Manifest(
        kind="negatives",
        recipe={},
        parent=embeddings.content,
        objects=tuple(named["negatives"]),
    )
    for manifest in (corpus, embeddings, negatives):
        manifest.save(root / f"{manifest.kind}.json", store)


def read_all(root, *, descriptors, maps):
    """How many maps a process with so few descriptors has after it has read all columns."""
    done = subprocess.run(
        [sys.executable, "-c", READS_ALL, root, str(descriptors), str(maps)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_maps_hold_no_descriptors_and_are_few(tmp_path):
    furnish(tmp_path, 70)
    # In each of four columns, of the vectors as arrays, and of older vectors: more than 64 in all.
    assert read_all(tmp_path, descriptors=64, maps=30) <= 6 * 30


@pytest.mark.slow
def test_2_000_shards_open_under_256_descriptors(tmp_path):
    # 50,000 take the same descriptors; writing 200,000 files takes a disk too long for a test.
    furnish(tmp_path, 2_000)
    assert read_all(tmp_path, descriptors=256, maps=500) <= 6 * 500


OPENS_THE_LARGEST = r"""
import re, sys, time
from pathlib import Path
import numpy as np
from storage.corpus import Corpus
from storage.manifest import Manifest
from storage.store import Store

began = time.process_time()
corpus = Corpus(Store(Path(sys.argv[1])), Manifest.load(Path(sys.argv[2]), "corpus"))
ids = np.arange(0, corpus.rows, corpus.rows // 1000)
assert (corpus.starts[corpus.shards_of(ids)] <= ids).all()
seconds = time.process_time() - began
# Not ru_maxrss: a process begins with its parent's, which is a test run's with all that it has imported.
peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
print(corpus.rows, seconds, int(peak[1]) // 1024)
"""


@pytest.mark.slow
def test_the_largest_manifest_opens_and_a_larger_one_is_not_written(tmp_path):
    """docs/scale.md: the number of shards is what a corpus meets first. No object is there, or opened."""

    def corpus_of(shards):
        objects = []
        for shard in range(shards):
            sha256 = hashlib.sha256(str(shard).encode()).hexdigest()
            key = f"text/{sha256[:40]}.arrow"
            objects.append(Object(key=key, rows=4096, bytes=600_000, sha256=sha256))
        return Manifest(kind="corpus", recipe={}, parent=None, objects=tuple(objects))

    path = tmp_path / "corpus.json"
    path.write_bytes(corpus_of(MAX_OBJECTS).encoded)
    command = [sys.executable, "-c", OPENS_THE_LARGEST, tmp_path / "store", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, seconds, megabytes = done.stdout.split()
    assert int(rows) == 4096 * MAX_OBJECTS  # 1,024,000,000
    # Measured: 6 CPU seconds, 820 MB. A machine may be slower.
    assert float(seconds) < 60
    assert int(megabytes) < 1500
    path.unlink()
    with pytest.raises(TeachonceError, match=r"250,001 shards.*\n.*raise shard.rows_per_shard"):
        corpus_of(MAX_OBJECTS + 1).save(path, Store(tmp_path / "store"))
    assert not path.exists()
