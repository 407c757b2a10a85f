"""Training steps on caches that do not fit into memory: time of a step, and megabytes from the disk.

    python benchmarks/cold_steps.py --work WORK [--rows 1000000] [--steps 96]

A million random vectors of 1,024 values in float16 (2 GB), their neighbours and token ids are made in WORK
once. The student is a table of token vectors, whose steps are the shortest that there are, as on a GPU. It
takes steps of the shipped recipes `static` (512 rows) and `ckd` (128 rows, 8 neighbours of each, a queue of
16,384 rows). Start the script once as it is, and once where memory is short, as `systemd-run --scope -p
MemoryMax=1200M` makes it. The first steps, which check each shard as it is opened, do not count.
"""

import argparse
import logging
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, commit
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

from pipeline.settings import load_params
from stages import distill, embed, mine
from stages.learning import loop
from stages.learning.checkpoints import Checkpoints
from stages.models.folder import find_model
from storage.caches import Caches
from storage.corpus import Corpus, cut, put_texts
from storage.embeddings import Embeddings, put_vectors
from storage.manifest import Manifest, fingerprint
from storage.negatives import Negatives, put_negatives
from storage.split import Split
from storage.store import Store

CPU = torch.device("cpu")
DIM, NEIGHBOURS, ROWS_PER_SHARD = 1024, 16, 16_384
WARM_STEPS = 32  # all shards are open, and a queue was drawn


def main():
    """Make the caches, if they are not there, and print a line for each recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=96, help="that count")
    parser.add_argument("--recipes", nargs="+", default=["static", "ckd"])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    params = load_params(ROOT / "params.yaml")
    start = args.work / "start"
    if not start.exists():
        teacher = find_model(
            params.embed.teacher, revision=None, root=ROOT, address="embed.teacher"
        )
        tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
        torch.manual_seed(0)
        SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=256)]).save(
            str(start)
        )
    caches = made_caches(args.work, args.rows)
    print(f"{args.rows:,} rows, commit {commit()}")
    print("| recipe | ms a step, median | mean | CPU ms | MB from the disk a step |")
    print("|---|---|---|---|---|")
    for name in args.recipes:
        seconds, cpu, read = steps_of(params.recipes[name], start, caches, args)
        print(
            f"| {name} | {statistics.median(seconds) * 1000:.0f} | "
            f"{statistics.fmean(seconds) * 1000:.0f} | {cpu / args.steps * 1000:.0f} | "
            f"{read / args.steps:.1f} |"
        )


def made_caches(work, rows):
    """Caches of so many made-up texts; found if they are there."""
    store = Store(work / "store")
    path = work / "corpus.json"
    if not path.exists():
        draw = np.random.default_rng(0)
        words = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]
        texts = (
            " ".join(words[i] for i in draw.integers(0, len(words), 12)) + f" {row}"
            for row in range(rows)
        )
        objects = tuple(put_texts(store, shard) for shard in cut(texts, ROWS_PER_SHARD))
        Manifest(kind="corpus", recipe={}, parent=None, objects=objects).save(path, store)
    corpus = Corpus(store, Manifest.load(path, "corpus"))
    split = Split(corpus=corpus.manifest.content, heldout=0.001, evaluation=())
    draw = np.random.default_rng(1)
    shards = range(len(corpus.objects))
    if not (work / "vectors.json").exists():
        keys = embed.keys_of({"text": fingerprint({})}, corpus)
        entries = tuple(put_random(store, keys[n], corpus.text_keys_in([n]), draw) for n in shards)
        parent = corpus.manifest.content
        made = Manifest(kind="embeddings", recipe={}, parent=parent, objects=entries)
        made.save(work / "vectors.json", store)
    embeddings = Embeddings(store, Manifest.load(work / "vectors.json", "embeddings"), corpus)
    parent, recipe = mine.parent_of(embeddings, split), {"neighbours": NEIGHBOURS}
    if not (work / "lists.json").exists():
        name = fingerprint({**recipe, "parent": parent})
        entries = tuple(
            put_negatives(
                store,
                f"negatives/{name}/{shard:06}.arrow",
                neighbours=draw.integers(0, corpus.rows, (corpus.objects[shard].rows, NEIGHBOURS)),
                scores=np.ones((corpus.objects[shard].rows, NEIGHBOURS), np.float32),
                text_keys=corpus.text_keys_in([shard]),
                facts={},
            )
            for shard in shards
        )
        made = Manifest(kind="negatives", recipe=recipe, parent=parent, objects=entries)
        made.save(work / "lists.json", store)
    lists = Manifest.load(work / "lists.json", "negatives")
    negatives = Negatives(store, lists, corpus, mined_from=parent)
    return Caches(corpus, embeddings, negatives, split, store)


def put_random(store, key, text_keys, draw):
    """Vectors of length 1 for the texts of a shard."""
    vectors = draw.standard_normal((len(text_keys), DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return put_vectors(
        store, key, vectors=vectors, text_keys=text_keys, storage="float16", facts={}
    )


def steps_of(recipe, start, caches, args):
    """Seconds of each step that counts; of all, CPU seconds and megabytes read from the disk."""
    task = distill.prepare(
        recipe.model_copy(update={"precision": "bf16", "projection": "always"}),
        start=start,
        caches=caches,
        device=CPU,
    )
    ends, cpu, read = [], [], []

    class Enough(Exception):
        """All steps were taken."""

    def take_step(*args_of_step, **how):
        if len(ends) > WARM_STEPS + args.steps:
            raise Enough
        parts = original(*args_of_step, **how)
        ends.append(time.perf_counter())
        cpu.append(time.process_time())
        read.append(read_bytes())
        return parts

    original, loop.take_step = loop.take_step, take_step
    params = task.params.model_copy(update={"evaluate_every": 10_000})
    try:
        loop.train(
            task,
            task.setup(),
            params,
            name="cold",
            checkpoints=Checkpoints(args.work / params.objectives[0].name),
            track=lambda row: None,
        )
    except Enough:
        pass
    finally:
        loop.take_step = original
    seconds = np.diff(ends[WARM_STEPS:]).tolist()
    return seconds, cpu[-1] - cpu[WARM_STEPS], (read[-1] - read[WARM_STEPS]) / 2**20


def read_bytes():
    """Bytes that this process has read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


if __name__ == "__main__":
    main()
