"""What a student's token ids cost before its first step: seconds, CPU seconds and memory, at three sizes.

    python benchmarks/tokens.py --texts FILE.jsonl [--rows 50000 200000 800000] [--rows-per-shard 65536]

FILE has {"text": ...}. Beyond its own texts, texts are those again with a number at their end. The
tokenizer is that of the demo's teacher. Each figure is of a process of its own, which reads the corpus from
a store and leaves the ids there: the wall, its CPU time, and the anonymous memory it has at most beyond
what it had before. The exponent is that of the CPU time between the smallest and the largest size.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from harness import ROOT, commit, megabytes, some_texts

MAX_TOKENS = 64


def main():
    """Print the table, or one process' figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 200_000, 800_000])
    parser.add_argument("--rows-per-shard", type=int, nargs="+", default=[1024, 65_536])
    parser.add_argument("--one", type=Path, help="one process: a folder with a corpus")
    args = parser.parse_args()
    if args.one:
        print(*one(args.one))
        return
    print(f"commit {commit()}, {os.cpu_count()} threads of a processor\n")
    print("| rows of a shard | texts | wall s | CPU s | more MB at most |")
    print("|---|---|---|---|---|")
    for of_shard in args.rows_per_shard:
        cpu = []
        for rows in args.rows:
            with tempfile.TemporaryDirectory() as folder:
                furnish(Path(folder), args.texts, rows, of_shard)
                alone = [sys.executable, __file__, "--texts", args.texts, "--one", folder]
                env = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}  # as teachonce sets it
                done = subprocess.run(alone, capture_output=True, text=True, check=True, env=env)
            wall, seconds, grown = map(float, done.stdout.split())
            cpu.append(seconds)
            print(f"| {of_shard:,} | {rows:,} | {wall:.1f} | {seconds:.1f} | {grown:.0f} |")
        if len(cpu) > 1:
            exponent = math.log(cpu[-1] / cpu[0]) / math.log(args.rows[-1] / args.rows[0])
            print(f"| {of_shard:,} | exponent | | {exponent:.2f} | |")


def furnish(folder, source, rows, of_shard):
    """A store with a corpus of that many texts, and its manifest."""
    from storage.corpus import cut, put_texts
    from storage.manifest import Manifest
    from storage.store import Store

    real = some_texts(source, rows)
    texts = (
        text if not again else f"{text} {again}"
        for again in range(math.ceil(rows / len(real)))
        for text in real[: rows - again * len(real)]
    )
    store = Store(folder / "store")
    objects = tuple(put_texts(store, shard) for shard in cut(texts, of_shard))
    manifest = Manifest(kind="corpus", recipe={}, parent=None, objects=objects)
    manifest.save(folder / "corpus.json", store)


def one(folder):
    """Wall and CPU seconds of the token ids of a corpus, and the megabytes that were needed for them."""
    from transformers import AutoTokenizer

    from pipeline.settings import load_params
    from stages.learning.token_rows import token_rows
    from stages.models.folder import find_model
    from storage.corpus import Corpus
    from storage.manifest import Manifest
    from storage.store import Store

    teacher = load_params(ROOT / "params.yaml").embed.teacher
    model = find_model(teacher, revision=None, root=ROOT, address="embed.teacher")
    tokenizer = AutoTokenizer.from_pretrained(model)
    store = Store(folder / "store")
    corpus = Corpus(store, Manifest.load(folder / "corpus.json", "corpus"))
    before, seen, done = megabytes("RssAnon"), [], threading.Event()

    def watch():
        while not done.wait(0.02):
            seen.append(megabytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, cpu = time.perf_counter(), time.process_time()
    token_rows(tokenizer, model, corpus=corpus, store=store, max_tokens=MAX_TOKENS)
    taken = time.perf_counter() - began, time.process_time() - cpu
    done.set()
    watcher.join()
    return *taken, max(seen) - before


if __name__ == "__main__":
    main()
