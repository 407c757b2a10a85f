"""Approximate indexes of mining, and exact search by FAISS: recall, CPU time and memory, at two sizes.

    python benchmarks/mine_indexes.py --vectors REAL.npy [--rows 100000 300000] [--rounds 3]

REAL.npy holds (n, dim) float16 vectors of real sentences. Rows beyond n are rows of it with noise of 0.6 of
their length. Each index is built and searched by the code of the stage, for lists of 65. It looks at twice
as much until it finds 0.95 of the 65 nearest of 1,024 rows, as the stage does. Then all kinds search the
same 2,048 rows in turns: the median of the rounds, with the lowest and the highest. "all" is building and
searching every row. Memory is what the process had more at most while it built the index.

One thread. The table is printed and written to benchmarks/results/mine_indexes.md.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, commit, megabytes
from mine_growth import rows_like

from stages.mining import faiss_search
from stages.mining.cosines import nearest_first
from stages.models.devices import device_name

CPU = torch.device("cpu")
K, RECALL, SAMPLE, TIMED = 65, 0.95, 1024, 2048
KINDS = ["ivf", "hnsw", "hnsw-sq8"]


def main():
    """Compare all kinds at each size and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss_search.load_faiss().omp_set_num_threads(1)
    lines = [
        "| rows | index | build, ms a row | search, ms a row | recall | with | bytes a row | memory, MB "
        "| all, CPU minutes | of exact |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    real = np.load(args.vectors)
    for rows in args.rows:
        lines += compared(rows_like(real, rows).astype(np.float16), args.kinds, args.rounds)
    report = "\n".join(
        [
            f"# Approximate indexes, {real.shape[1]} values, {len(real):,} real rows, {device_name(CPU)}, "
            f"{args.rounds} rounds, {commit()}",
            "",
            *lines,
        ]
    )
    print(report)
    (ROOT / "benchmarks/results/mine_indexes.md").write_text(report + "\n")


def compared(stored, kinds, rounds):
    """Lines of the table for (rows, dim) float16 vectors."""

    def unit_rows(places):
        vectors = stored[places].astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    rows, draw = len(stored), np.random.default_rng(1)
    exact = faiss_search.FlatSearch(unit_rows, rows, K, block_rows=rows, device=CPU)
    sample = np.sort(draw.choice(rows, SAMPLE, replace=False))
    wanted = nearest_first(sample, exact.nearest(sample))
    searches, told = {"flat": exact}, {"flat": (0.0, 1.0, "", 4 * stored.shape[1], 0.0)}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            searches[kind], told[kind] = built(kind, unit_rows, rows, Path(folder), sample, wanted)
            print(rows, kind, *told[kind], flush=True)
        timed = np.sort(draw.choice(rows, TIMED, replace=False))
        taken = {kind: [] for kind in searches}
        for _ in range(rounds):
            for kind, search in searches.items():
                taken[kind].append(seconds_of(lambda search=search: search.nearest(timed)) / TIMED)
        searches.clear()
    lines, of_exact = [], statistics.median(taken["flat"])
    for kind, seconds in taken.items():
        build, recall, effort, size, memory = told[kind]
        search = statistics.median(seconds)
        spread = f"{1000 * search:.2f} ({1000 * min(seconds):.2f}-{1000 * max(seconds):.2f})"
        cells = [f"{rows:,}", kind, f"{1000 * build:.2f}", spread, f"{recall:.4f}", effort]
        cells += [f"{size:,.0f}", f"{memory:,.0f}", f"{rows * (build + search) / 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {(build + search) / of_exact:.2f} |")
    return lines


def built(kind, unit_rows, rows, folder, sample, wanted):
    """A search, and its seconds a row to build, recall, effort, bytes a row, and megabytes to build it."""
    index = faiss_search.index_settings(kind, rows=rows, k=K)
    file = faiss_search.file_of(folder, index, "vectors", np.arange(rows))
    file.parent.mkdir(exist_ok=True)
    before = megabytes("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started, shared = time.process_time(), megabytes("VmRSS") - before
    search = faiss_search.ApproximateSearch(unit_rows, rows, K, index=index, file=file)
    build, memory = (time.process_time() - started) / rows, megabytes("VmHWM") - before - shared
    recall = recall_of(search, sample, wanted)
    while recall < RECALL and search.look_at_more():
        recall = recall_of(search, sample, wanted)
    return search, (build, recall, search.effort, file.stat().st_size / rows, memory)


def recall_of(search, sample, wanted):
    """The share of the nearest rows of a sample that a search finds."""
    return faiss_search.hits_in(search.nearest(sample), wanted).mean() / K


def seconds_of(do):
    """CPU seconds of a call."""
    started = time.process_time()
    do()
    return time.process_time() - started


if __name__ == "__main__":
    main()
