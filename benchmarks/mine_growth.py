"""What mining costs when a corpus has grown by 1 %, beside mining it anew, at three sizes.

    python benchmarks/mine_growth.py --vectors REAL.npy [--rows 25000 50000 100000] [--rounds 3] [--pool N]

REAL.npy holds (n, dim) float16 vectors of real sentences. Rows beyond n are rows of it with noise of 0.6 of
their length. Both ways run the stage itself, with the shipped settings but `index: flat`, in one store.
They take turns, and only the lists of the grown corpus are deleted between them. "anew" is the faster of
FAISS and a self-join, as the stage chooses. CPU seconds of one thread: the median; shares are medians of
those within a round, with the lowest and the highest. The objects of both ways are compared. The table is
printed and written to benchmarks/results/mine_growth.md.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from harness import ROOT, commit

from stages import mine
from stages.mining.faiss_search import load_faiss
from stages.models.devices import device_name
from stages.params import MineParams
from storage.column import text_keys_of
from storage.corpus import Corpus, cut, put_texts
from storage.embeddings import Embeddings, put_vectors
from storage.manifest import Manifest, fingerprint
from storage.split import Split
from storage.store import Store

CPU = torch.device("cpu")
NOISE = 0.6


def main():
    """Time both ways in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool", type=int, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load_faiss().omp_set_num_threads(1)
    settings = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))["mine"]
    params = MineParams.model_validate(settings | {"index": "flat", "pool": args.pool})
    lines = [
        "| rows | anew | grown | of anew | lists kept, merged, searched |",
        "| --- | --- | --- | --- | --- |",
    ]
    grown = []
    for rows in args.rows:
        line, seconds = compared(rows, rows_like(np.load(args.vectors), rows), params, args.rounds)
        lines.append(line)
        grown.append(seconds)
        print(line, flush=True)
    spread = math.log(args.rows[-1] / args.rows[0])
    exponent = math.log(grown[-1] / grown[0]) / spread if spread else math.nan
    pool = "" if args.pool is None else f", a pool of {args.pool:,}"
    report = "\n".join(
        [
            f"# Mining after growth by 1 %{pool}, {device_name(CPU)}, {args.rounds} rounds, {commit()}",
            "",
            *lines,
            "",
            f"CPU seconds. Those of growth grow with the rows to the power of {exponent:.2f}. "
            "Both ways left equal objects.",
        ]
    )
    print(report)
    name = "mine_growth.md" if args.pool is None else "mine_growth_pool.md"
    (ROOT / "benchmarks/results" / name).write_text(report + "\n")


def rows_like(real, rows):
    """(rows, dim) float32 vectors: real ones, then real ones with noise."""
    draw = np.random.default_rng(0)
    found = real[draw.permutation(len(real))[:rows]].astype(np.float32)
    more = real[draw.integers(0, len(real), rows - len(found))].astype(np.float32)
    noise = draw.standard_normal(more.shape, np.float32) * NOISE / more.shape[1] ** 0.5
    found = np.concatenate([found, more + noise])[draw.permutation(rows)]
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def compared(rows, vectors, params, rounds):
    """The line of a table for so many rows, and the median seconds of growth."""
    taken = {"anew": [], "grown": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = Store(root / "store")
        before = round(rows / 1.01)
        mined(root, store, stages_before(store, root, vectors[:before]), params)
        grown = stages_before(store, root, vectors)
        made = {}
        for _ in range(rounds):
            for way, seconds in taken.items():
                took, made[way], summary = mined(root, store, grown, params, way=way)
                seconds.append(took)
                account = summary if way == "grown" else None
                for entry in made[way].objects:
                    store.path(entry.key).unlink()
        assert made["anew"].objects == made["grown"].objects
    shares = [100 * a / b for a, b in zip(taken["grown"], taken["anew"], strict=True)]
    medians = {way: statistics.median(seconds) for way, seconds in taken.items()}
    cells = [f"{rows:,}", *(f"{medians[way]:.2f}" for way in taken)]
    cells.append(f"{statistics.median(shares):.1f} % ({min(shares):.1f}-{max(shares):.1f})")
    return f"| {' | '.join(cells)} | {account} |", medians["grown"]


def stages_before(store, root, vectors):
    """What shard, embed and split leave of so many rows."""
    texts = {f"text {number}": number for number in range(len(vectors))}
    corpus, objects, cached = [], {}, []
    recipe = {"made": "for a benchmark"}
    for shard in cut(texts, 1024):
        entry = put_texts(store, shard)
        corpus.append(entry)
        objects[entry.key] = [texts[text] for text, _ in shard]
    manifest = Manifest(kind="corpus", recipe={}, parent=None, objects=tuple(corpus))
    manifest.save(root / "corpus.json", store)
    opened = Corpus(store, manifest)
    for number, entry in enumerate(corpus):
        key = entry.key.replace("text/", f"vectors/{fingerprint(recipe)}/")
        keys = text_keys_of(opened.batch(number))
        own = vectors[objects[entry.key]]
        cached.append(
            put_vectors(store, key, vectors=own, text_keys=keys, storage="float16", facts={})
        )
    known = Manifest(
        kind="embeddings", recipe=recipe, parent=manifest.content, objects=tuple(cached)
    )
    known.save(root / "embeddings.json", store)
    split = Split(corpus=manifest.content, heldout=0.02, evaluation=())
    return opened, Embeddings(store, known, opened), split


def mined(root, store, left, params, way="grown"):
    """CPU seconds of the stage, what it left, and what it says of earlier lists."""
    corpus, embeddings, split = left
    earlier = mine._earlier
    if way != "grown":
        mine._earlier = lambda *_: None
    out = root / "negatives.json"
    started = time.process_time()
    outcome = mine.run(
        params,
        corpus=corpus,
        embeddings=embeddings,
        split=split,
        store=store,
        device=CPU,
        out=out,
        facts=root / "facts.json",
    )
    took = time.process_time() - started
    mine._earlier = earlier
    return (
        took,
        Manifest.load(out, "negatives"),
        outcome.summary.partition("lists ")[2].rpartition("lists ")[2],
    )


if __name__ == "__main__":
    main()
