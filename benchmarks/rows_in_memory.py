"""What a training holds of each row of its corpus: which rows it learns from, and the order of two epochs.

    python benchmarks/rows_in_memory.py [--rows 100000 400000 1600000]

Anonymous memory of a process that has opened a corpus and then reads its split and begins two epochs.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import megabytes

from stages.learning.batches import epoch_batches
from storage.corpus import Corpus, cut, put_texts
from storage.manifest import Manifest
from storage.split import Split
from storage.store import Store


def main():
    """Print the table, or one process' bytes a row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 400_000, 1_600_000])
    parser.add_argument("--one", type=Path, help="one process: a folder with a corpus")
    args = parser.parse_args()
    if args.one:
        print(one(args.one))
        return
    print("| rows | bytes a row |")
    print("|---|---|")
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "store")
            shards = cut((f"text {row}" for row in range(rows)), 65_536)
            objects = tuple(put_texts(store, shard) for shard in shards)
            manifest = Manifest(kind="corpus", recipe={}, parent=None, objects=objects)
            manifest.save(Path(folder) / "corpus.json", store)
            alone = [sys.executable, __file__, "--one", folder]
            done = subprocess.run(alone, capture_output=True, text=True, check=True)
        print(f"| {rows:,} | {float(done.stdout):.0f} |")


def one(folder):
    """Bytes a row."""
    manifest = Manifest.load(folder / "corpus.json", "corpus")
    corpus = Corpus(Store(folder / "store"), manifest)
    split = Split(corpus=manifest.content, heldout=0.01, evaluation=())
    for shard in range(len(corpus.objects)):
        corpus.batch(shard)
    before = megabytes("RssAnon")
    rows, heldout = split.train_rows(corpus), split.heldout_rows(corpus)
    epochs = [epoch_batches(rows, batch_size=128, seed=0, epoch=epoch) for epoch in (0, 1)]
    held = megabytes("RssAnon") - before
    assert len(heldout) + len(rows) == corpus.rows
    assert len(epochs[0]) == len(epochs[1])
    return held * 2**20 / corpus.rows


if __name__ == "__main__":
    main()
