"""How the commands that need no model grow with the corpus, and what a billion rows would take.

    python benchmarks/scale.py --work WORK [--rows 10000 40000 160000] [--dim 384] [--rows-per-shard 256]

For each size a project of its own is made in WORK: random sentences with random vectors, imported. Every
command is a process; its CPU seconds are taken, without those of `teachonce --version`. Growth is the
exponent of the seconds between the smallest and the largest size: 1 is linear. Then the arithmetic for a
billion rows, from the constants of the code and the rates below. Both tables are printed and written to
benchmarks/results/scale.md. WORK must be empty.
"""

import argparse
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from harness import ROOT, commit

from pipeline.commands.plan import OBJECT_BYTES
from stages.models.devices import device_name
from storage import embeddings, negatives
from storage.column import TEXT_KEY_BYTES
from storage.manifest import MAX_OBJECTS

RESULT = ROOT / "benchmarks/results/scale.md"
WORDS = [
    "amber",
    "basin",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "glade",
    "harbor",
    "island",
    "jungle",
]

COMMANDS = {
    "shard": ["shard"],
    "split": ["split"],
    "import": ["import", "vectors.npy", "texts.txt"],
    "embed (of imported vectors)": ["embed"],
    "mine, pool of 4,000": ["mine"],
    "ls": ["ls"],
    "verify": ["verify"],
    "gc": ["gc"],
    "push, to a folder": ["push"],
    "pull, all there": ["pull"],
    "shard, 1 % more texts": ["shard"],
    "import, 1 % more texts": ["import", "vectors.npy", "texts.txt"],
    "embed, 1 % more texts": ["embed"],
    "split, 1 % more texts": ["split"],
    "mine, 1 % more texts": ["mine"],
}

# The case of docs/scale.md: a teacher of 1,024 values on 8 GPUs, the rest on 16 boxes of 16 cores.
ROWS, DIM, ROWS_PER_SHARD = 1_000_000_000, 1024, 65_536
GPUS, BOXES, CORES = 8, 16, 16
TEXT_BYTES, TOKENS, NEIGHBOURS, POOL = 120, 30, 16, 100_000

# Assumed: `teachonce plan` measures the first on the GPU at hand, a bill says the other two.
GPU_TEXTS = 5_000  # texts a second that a GPU embeds
GPU_DOLLARS, GB_DOLLARS = 3.0, 0.023  # for an hour of a GPU; for a GB of object storage a month

# Measured with the commit that the results name, of one core.
FLOPS = 66e9  # of exact search in float32, a second
TOKENISED = 8_900  # texts a second: tokens_cpu.md
STUDENT_ROWS = 92  # rows a second that `kd` trains on, three layers: quality_sts.md
DISTILL_BYTES = 20  # a row in memory: tokens_cpu.md


def main():
    """Measure, reckon, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 40_000, 160_000])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rows-per-shard", type=int, default=256)
    args = parser.parse_args()
    found = {rows: measured(args.work / str(rows), rows, args) for rows in args.rows}
    shard_seconds = found[args.rows[-1]]["shard"] / args.rows[-1]
    text = "\n".join([*growth(found, args), "", *billion(shard_seconds), ""])
    sys.stdout.write(text)
    RESULT.write_text(text)


def measured(work, rows, args):
    """Command -> CPU seconds, on a new corpus of so many rows."""
    configure(work, rows, args)
    nothing = spent(work, ["--version"])
    found = {}
    for name, words in COMMANDS.items():
        if name == "shard, 1 % more texts":
            write_corpus(work, rows + rows // 100, args.dim)
        found[name] = max(0.01, spent(work, words) - nothing)
    return found


def configure(work, rows, args):
    """A project whose teacher is imported, and whose remote is a folder."""
    (work / "remote").mkdir(parents=True)
    write_corpus(work, rows, args.dim)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"store": "store", "remote": str(work.resolve() / "remote")}
    params["docs"]["packages"] = []
    params["shard"] |= {"sources": ["texts.txt"], "rows_per_shard": args.rows_per_shard}
    params["embed"]["teacher"] = "imported:random"
    params["mine"] |= {"pool": 4000, "max_score": 1.0, "range_min": 0}
    params["evaluate"]["retrieval"] = {}
    # Not made: no model is needed here.
    params["starts"] = {"half": {"from": "a-model", "layers": None}}
    params["students"] = {"kd": {"recipe": "kd", "start": "half"}}
    params["finetune"]["students"] = []
    params["export"] |= {"model": "kd", "also": []}
    (work / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def write_corpus(work, rows, dim):
    """The first `rows` random sentences and their random vectors: more rows begin with the same."""
    draw = np.random.default_rng(0)
    with (work / "texts.txt").open("w") as file:
        for row in range(rows):
            file.write(f"{' '.join(draw.choice(WORDS, 12))} {row}\n")
    draw = np.random.default_rng(1)
    np.save(work / "vectors.npy", draw.standard_normal((rows, dim), np.float32).astype(np.float16))


def spent(work, words):
    """CPU seconds of one command."""
    command = [sys.executable, "-m", "pipeline.cli", *words]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode} in {work}")
    return usage.ru_utime + usage.ru_stime


def growth(found, args):
    """The table of what was measured, as lines of Markdown."""
    sizes = list(found)
    lines = [
        "# Growth with the corpus",
        "",
        f"`python benchmarks/scale.py`, commit {commit()}, Python {platform.python_version()}, "
        f"{device_name(cpu())}.",
        f"Random vectors of {args.dim} values, {args.rows_per_shard} rows a shard. CPU seconds of each",
        "command; growth: the exponent of the seconds.",
        "",
        f"| command | {' | '.join(f'{rows:,} rows' for rows in sizes)} | growth |",
        "|---|" + "---|" * (len(sizes) + 1),
    ]
    for name in COMMANDS:
        seconds = [found[rows][name] for rows in sizes]
        exponent = math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0])
        cells = [f"{value:.2f}" for value in seconds]
        lines.append(f"| {name} | {' | '.join(cells)} | {exponent:.2f} |")
    return lines


def billion(shard_seconds):
    """The table of a billion rows, as lines of Markdown.

    Args:
        shard_seconds: CPU seconds that `shard` took a row.
    """
    objects = math.ceil(ROWS / ROWS_PER_SHARD)
    keys = TEXT_KEY_BYTES * ROWS  # what `Corpus.text_keys` holds
    table = TEXT_KEY_BYTES * 2 ** math.ceil(math.log2(ROWS / 0.75))  # stages.shard.TextKeySet
    embed_hours = ROWS / GPU_TEXTS / GPUS / 3600
    mine_hours = 2 * ROWS * POOL * DIM / FLOPS / 3600 / (BOXES * CORES)
    vectors = embeddings.row_bytes(DIM, "float16")
    rows = [
        # what; bytes a row it leaves; hours; memory of a process; where
        (
            "shard",
            TEXT_KEY_BYTES + 8 + TEXT_BYTES,
            shard_seconds * ROWS / 3600,
            table,
            "one process",
        ),
        ("split", 0, None, 2 * keys, "one process"),
        ("embed, float16", vectors, embed_hours, vectors * ROWS_PER_SHARD, f"{GPUS} GPUs"),
        (
            "embed, int8",
            embeddings.row_bytes(DIM, "int8"),
            embed_hours,
            vectors * ROWS_PER_SHARD,
            f"{GPUS} GPUs",
        ),
        (
            "mine, pool of 100,000",
            negatives.row_bytes(NEIGHBOURS),
            mine_hours,
            3 * keys,
            f"{BOXES} boxes",
        ),
        (
            "token ids",
            TEXT_KEY_BYTES + 8 + 4 * TOKENS,
            ROWS / TOKENISED / CORES / 3600,
            0,
            "one box",
        ),
        (
            "distill, an epoch",
            0,
            ROWS / STUDENT_ROWS / CORES / 3600,
            DISTILL_BYTES * ROWS,
            "one box, no GPU",
        ),
    ]
    lines = [
        f"# A billion rows of {DIM:,} values",
        "",
        f"{ROWS_PER_SHARD:,} rows a shard: {objects:,} objects a column (a manifest names {MAX_OBJECTS:,}",
        f"at most), {objects * OBJECT_BYTES / 1e6:.0f} MB of headers. A text has {TEXT_BYTES} bytes and",
        f"{TOKENS} tokens. Assumed: a GPU embeds {GPU_TEXTS:,} texts a second and costs ${GPU_DOLLARS:.2f}",
        f"an hour; a GB is kept for ${GB_DOLLARS} a month.",
        "",
        "| stage | leaves | a month | hours | where | memory of a process |",
        "|---|---|---|---|---|---|",
    ]
    for stage, row_bytes, hours, memory, where in rows:
        size = row_bytes * ROWS / 1e9
        cells = [
            stage,
            f"{size:,.0f} GB" if size else "little",
            f"${size * GB_DOLLARS:,.0f}" if size else "",
            f"{hours:,.1f}" if hours is not None else "minutes",
            where,
            f"{memory / 1e9:,.1f} GB" if memory else "little",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    dollars = embed_hours * GPUS * GPU_DOLLARS
    return [*lines, "", f"The teacher's pass costs ${dollars:,.0f}."]


def cpu():
    """The device of these figures."""
    import torch

    return torch.device("cpu")


if __name__ == "__main__":
    main()
