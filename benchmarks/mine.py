"""Mining beside its peers: CPU seconds for the nearest rows of each row, and whether they are right.

    python benchmarks/mine.py --work WORK [--rows 100000] [--nearest 33] [--rounds 3] [--device cpu]

WORK is a folder in which shard and embed were run (benchmarks/quality_sts.py makes one). Rows beyond its
own are rows of it with noise of a tenth of their length, and the table says how many are real.

Peers: `faiss.IndexFlatIP`, sentence-transformers' `semantic_search` and `mine_hard_negatives` (its model
replaced by a look-up in the cache), and torch's matrix product with `topk`. Peers take the same time for
each query, so they are asked for 512 and for 2,560 rows, and the rest is extrapolated; ours does the
whole task. "filtered": ours with all that the stage does to make negatives of the lists. One thread; the
variants take turns in rounds, a ratio is that of two times in one round: the median, and the lowest and
highest. On a GPU the time is that of the wall. The table is printed and written to
benchmarks/results/mine_<device>.md.
"""

import argparse
import contextlib
import io
import statistics
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from datasets import Dataset
from harness import ROOT, megabytes, ratio
from sentence_transformers.util import mine_hard_negatives, semantic_search

from stages import mine
from stages.mining import filters
from stages.mining.faiss_search import hits_in
from stages.mining.self_join import SelfJoin, join_cost, tile_on
from stages.models.devices import device_name, pick_device
from stages.params import MineParams
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.manifest import Manifest
from storage.store import Store

RESULTS = ROOT / "benchmarks/results"
FEW, MORE = 512, 2560
FLAT = "faiss.IndexFlatIP"
JOIN, FILTERED = "teachonce, lists", "teachonce, filtered"


def main():
    """Time all variants in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--nearest", type=int, default=33, help="the row itself is one of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    device = pick_device(args.device)
    stored, real = vectors(args.work, args.rows)
    unit = stored.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    recall, extra = proof(stored, unit, args.nearest, device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    peers = {
        FLAT: flat(unit),
        "torch product and topk": product_and_topk(unit, device),
        "semantic_search": search_semantically(unit, device),
        "mine_hard_negatives": mine_with_stub(unit, device),
    }
    seconds = {name: [] for name in [*peers, JOIN, FILTERED]}
    for _ in range(args.rounds):
        for name, search in peers.items():
            seconds[name].append(extrapolated(search, args.rows, args.nearest, clock))
        for name, taken in zip(
            (JOIN, FILTERED), ours(stored, args.nearest, device, clock), strict=True
        ):
            seconds[name].append(taken)
    lines = table(seconds)
    head = f"{args.rows:,} x {unit.shape[1]}, the {args.nearest} nearest of each row"
    report = "\n".join(
        [
            f"# Mining, {head}, {device_name(device)}, {args.rounds} rounds",
            "",
            f"{real:,} rows are sentences read by the teacher, the others are such rows with noise.",
            "",
            *lines,
            "",
            f"Recall of ours against FAISS, on {MORE:,} rows: {recall:.6f}. Memory beyond the vectors in "
            f"float16 ({stored.nbytes / 2**20:.0f} MB): {extra:.0f} MB at the peak, "
            f"{extra * 2**20 / stored.nbytes:.2f} times as much.",
        ]
    )
    print(report)
    (RESULTS / f"mine_{device.type}.md").write_text(report + "\n")


def vectors(work, rows):
    """(rows, dim) float16 vectors, and how many of them are real."""
    store = Store(work / "store")
    corpus = Corpus(store, Manifest.load(work / "data/corpus.json", "corpus"))
    cache = Embeddings(store, Manifest.load(work / "data/embeddings.json", "embeddings"), corpus)
    real = cache.rows_of(np.arange(min(rows, corpus.rows)))
    draw = np.random.default_rng(0)
    more = real[draw.integers(0, len(real), rows - len(real))].astype(np.float32)
    noise = draw.normal(size=more.shape).astype(np.float32)
    noise *= (
        0.1
        * np.linalg.norm(more, axis=1, keepdims=True)
        / np.linalg.norm(noise, axis=1, keepdims=True)
    )
    return np.concatenate([real, (more + noise).astype(np.float16)]), len(real)


def flat(unit):
    """The exact index of FAISS."""
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    return lambda rows, k: index.search(unit[rows], k)


def product_and_topk(unit, device):
    """What one writes by hand."""
    corpus = torch.from_numpy(unit).to(device)

    def search(rows, k):
        queries = corpus[torch.from_numpy(rows).to(device)]
        return [(part @ corpus.T).topk(k, dim=1).values.cpu() for part in queries.split(256)]

    return search


def search_semantically(unit, device):
    """`sentence_transformers.util.semantic_search`, as it comes."""
    corpus = torch.from_numpy(unit).to(device)
    return lambda rows, k: semantic_search(
        corpus[torch.from_numpy(rows).to(device)], corpus, top_k=k
    )


def mine_with_stub(unit, device):
    """`mine_hard_negatives` with a model that looks its vectors up; a text is the number of its row."""
    corpus = [str(row) for row in range(len(unit))]

    class Stub:
        def __init__(self):
            self.device = device

        def encode_document(self, texts, **_):
            return unit[[int(text.lstrip("q")) for text in texts]]

        encode_query = encode_document

        def similarity(self, a, b):
            return torch.as_tensor(a).to(device) @ torch.as_tensor(b).to(device).T

        def similarity_pairwise(self, a, b):
            return (torch.as_tensor(a).to(device) * torch.as_tensor(b).to(device)).sum(1)

    def search(rows, k):
        pairs = {"anchor": [f"q{row}" for row in rows], "positive": [str(row) for row in rows]}
        with contextlib.redirect_stderr(io.StringIO()):
            mine_hard_negatives(
                Dataset.from_dict(pairs),
                Stub(),
                corpus=corpus,
                range_max=k - 1,
                max_score=0.9,
                num_negatives=16,
                output_format="n-tuple",
                verbose=False,
            )

    return search


def extrapolated(search, rows, k, clock):
    """Seconds for all rows, from those for few and for more."""
    taken = []
    for count in (FEW, MORE):
        asked = np.linspace(0, rows - 1, count).astype(np.int64)
        started = clock()
        search(asked, k)
        taken.append(clock() - started)
    return taken[0] + (taken[1] - taken[0]) / (MORE - FEW) * (rows - FEW)


def ours(stored, k, device, clock):
    """Seconds of the self-join, and with the filters of the stage."""
    rows = np.arange(len(stored))
    params = MineParams(
        neighbours=16,
        range_min=0,
        range_max=k - 1,
        max_score=0.9,
        min_score=None,
        index="flat",
        min_recall=0.95,
        among={"text": "text", "query": "document", "document": "document"},
        memory_mb=1024,
        pool=None,
        most_hours=12,
    )
    keys = np.frombuffer(draw_keys(len(rows)), "V16")
    started = clock()
    join = joined(stored, k, device)
    lists = [join.nearest(part) for part in np.array_split(rows, -(-len(rows) // mine.QUERY_ROWS))]
    taken = clock() - started
    first = 0
    for found, cosines in lists:
        own = rows[first : first + len(found)]
        rejected = filters.reject(params, found, cosines, own=own, text_keys=keys)
        filters.keep_first(found, cosines, ~np.logical_or.reduce([*rejected.values()]), 16)
        first += len(found)
    return taken, clock() - started


def draw_keys(count):
    """Keys of texts that are all different, 16 bytes each."""
    return np.random.default_rng(0).bytes(16 * count)


def joined(stored, k, device):
    """A self-join that has run; the choice of its type is part of its time."""
    cost = join_cost(stored[: tile_on(device)], k, device)
    join = SelfJoin(lambda rows: stored[rows], len(stored), k, device=device, product=cost.product)
    for _ in join.run():
        pass
    return join


def proof(stored, unit, k, device):
    """Recall against FAISS, and megabytes that a self-join needs at its peak (on a CPU)."""
    rows = np.linspace(0, len(stored) - 1, MORE).astype(np.int64)
    exact = flat(unit)(rows, k)[::-1]
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    join = joined(stored, k, device)
    extra = megabytes("VmHWM") - before
    return hits_in(join.nearest(rows), exact).mean() / k, extra


def table(seconds):
    """Lines of Markdown."""
    lines = [
        "| | CPU seconds | times as long as ours | FAISS takes, times |",
        "|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        base = FILTERED if name == "mine_hard_negatives" else JOIN
        lines.append(
            f"| {name} | {statistics.median(taken):,.1f} | {ratio(taken, seconds[base])} "
            f"| {ratio(seconds[FLAT], taken)} |"
        )
    return lines


if __name__ == "__main__":
    main()
