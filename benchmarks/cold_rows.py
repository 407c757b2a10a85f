"""Scattered rows of a file of vectors that is not in memory: bytes read from the disk, and seconds.

    python benchmarks/cold_rows.py [--megabytes 128 256 512] [--rows 512]

One object of random float16 vectors of 384 values. Its pages are given up (`posix_fadvise`) before each
variant: rows as a training reads them, the same without advice to the system, the same after the system was
asked for all of them at once, and all vectors in their order. The folder for temporary files must be on a
disk (TMPDIR).
"""

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from storage import column
from storage.corpus import Corpus, put_texts, text_key
from storage.embeddings import Embeddings, put_vectors
from storage.manifest import Manifest, fingerprint
from storage.store import Store

DIM = 384
AHEAD = "read ahead"


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rows", type=int, default=512)
    args = parser.parse_args()
    whole = column.READ_WHOLE_BYTES
    print("| MB of the file | read | MB from the disk | s |")
    print("|---|---|---|---|")
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            corpus, manifest = furnish(Path(folder), megabytes * 2**20 // (DIM * 2 + 16))
            ids = np.random.default_rng(1).choice(corpus.rows, args.rows, replace=False)
            for name, least, ours in (
                (f"{args.rows} rows, no advice", 1 << 60, ids),
                (f"{args.rows} rows", whole, ids),
                (f"{args.rows} rows, {AHEAD}", whole, ids),
                ("two rows, then all in order", whole, None),
            ):
                column.READ_WHOLE_BYTES = least
                cache = Embeddings(corpus.store, manifest, corpus)
                assert cache.dim == DIM  # mapped; checked before
                give_up(corpus.store.path(manifest.objects[0].key))
                before, began = read_bytes(), time.perf_counter()
                if ours is None:
                    cache.rows_of(ids[:2])
                    cache.shard(0).view(np.int16).max()
                else:
                    if name.endswith(AHEAD):
                        cache.read_ahead(ours)
                    cache.rows_of(ours)
                taken, read = time.perf_counter() - began, (read_bytes() - before) / 2**20
                print(f"| {megabytes} | {name} | {read:.1f} | {taken:.2f} |")
                del cache
                gc.collect()  # what is mapped stays in memory


def furnish(folder, rows):
    """A corpus of that many texts in one shard, and the manifest of its vectors, checked once."""
    store = Store(folder / "store")
    texts = [f"text {row}" for row in range(rows)]
    entry = put_texts(store, [(text, text_key(text)) for text in texts])
    corpus = Corpus(store, Manifest(kind="corpus", recipe={}, parent=None, objects=(entry,)))
    recipe = {"kind": "random"}
    vectors = np.random.default_rng(0).standard_normal((rows, DIM), dtype=np.float32)
    key = f"vectors/{fingerprint(recipe)}/{corpus.shard_digest(0)}.arrow"
    how = {"text_keys": corpus.text_keys, "storage": "float16", "facts": {}}
    made = put_vectors(store, key, vectors=vectors, **how)
    content = corpus.manifest.content
    return corpus, Manifest(kind="embeddings", recipe=recipe, parent=content, objects=(made,))


def give_up(path):
    """Drop a file's pages from memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes():
    """Bytes that this process has had read from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


if __name__ == "__main__":
    main()
