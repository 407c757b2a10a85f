"""What filling batches up to sizes that oneDNN knows saves a training step in bfloat16 on a CPU.

    python benchmarks/filled_batches.py --texts FILE.jsonl [--steps 60]

FILE has {"text": ...}. Three layers of the demo's teacher read batches of 128 texts, forward and backward,
on one thread. In one process the two variants take turns, a step each: CPU time. Then each has a process
of its own: memory. It matters on processors that multiply bfloat16 alone (AVX512-bf16, AMX).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, megabytes

from pipeline.settings import load_params
from stages.models import packed
from stages.models.folder import find_model
from stages.models.layers import keep_layers
from stages.models.loading import load_model
from stages.reading.lines import lines

BATCH, TOKENS, WARM_UP = 128, 64, 10
VARIANTS = {"as they are": 1, f"to {packed.FILLED_TO}": packed.FILLED_TO}


def main():
    """Print both tables, or one process' memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--filled", type=int, help="one process: its megabytes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    step = steps_of(args.texts)
    if args.filled:
        before = megabytes("RssAnon")
        for _ in range(args.steps):
            step(args.filled)
        print(round(megabytes("RssAnon") - before))
        return
    taken = {name: [] for name in VARIANTS}
    for _ in range(args.steps):
        for name, filled in VARIANTS.items():
            taken[name].append(step(filled))
    print("| batches filled | CPU ms a step: median, lowest, highest | more MB after the steps |")
    print("|---|---|---|")
    for name, filled in VARIANTS.items():
        ms = [1000 * seconds for seconds in taken[name][WARM_UP:]]
        alone = [sys.executable, __file__, "--texts", args.texts, "--steps", str(args.steps)]
        grown = subprocess.run(
            [*alone, "--filled", str(filled)], capture_output=True, text=True, check=True
        ).stdout.strip()
        print(f"| {name} | {statistics.median(ms):.0f}, {min(ms):.0f}, {max(ms):.0f} | {grown} |")


def steps_of(path):
    """A function that makes one step and returns its CPU seconds."""
    teacher = load_params(ROOT / "params.yaml").embed.teacher
    folder = find_model(teacher, revision=None, root=ROOT, address="embed.teacher")
    model = load_model(folder, device=torch.device("cpu"))
    keep_layers(model, [0, 2, 5], address="layers")
    core = model.tokenizer.backend_tokenizer
    core.enable_truncation(TOKENS)
    core.no_padding()
    texts = [
        json.loads(line)["text"] for _, line in zip(range(6000), lines(Path(path)), strict=False)
    ]
    ids = [np.array(one.ids, np.int32) for one in core.encode_batch_fast(texts)]
    reader, draw = packed.PackedReader(model), np.random.default_rng(0)

    def step(filled):
        packed.FILLED_TO = filled
        chosen = draw.choice(len(ids), BATCH, replace=False)
        chosen = chosen[np.argsort([len(ids[place]) for place in chosen], kind="stable")]
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            vectors = reader(ids, chosen)
        vectors.float().square().mean().backward()
        return time.process_time() - began

    return step


if __name__ == "__main__":
    main()
