"""What safety costs: the share of a teacher pass that goes to hashing, flushing and checking.

    python benchmarks/cost_of_safety.py [--texts FILE] [--rows 4000] [--rounds 5] [--threads 2]

Each round cuts the texts into shards and embeds them into an empty store, with all-MiniLM-L6-v2 from
the extra `demo`, as `teachonce shard` and `teachonce embed` do, while the functions that keep the store
safe are timed. Their time is set against that of the embed stage: CPU seconds of all threads, and wall
seconds. FILE is a corpus file (.txt, .jsonl, .zst ...); without it the texts are the documentation
strings of installed packages, as in the demo. The table is printed and written to
benchmarks/results/cost_of_safety.md.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from harness import ROOT, commit

RESULT = ROOT / "benchmarks/results/cost_of_safety.md"
GOAL = 1.0


class Meter:
    """CPU and wall seconds spent in functions, each second counted under the innermost of them."""

    def __init__(self):
        self.spent, self._within = {}, []

    def wrap(self, owner, name, label):
        """Time `owner.name` under `label`."""
        call = getattr(owner, name)
        self.spent.setdefault(label, np.zeros(2))

        def timed(*arguments, **options):
            began, inner = clocks(), np.zeros(2)
            self._within.append(inner)
            try:
                return call(*arguments, **options)
            finally:
                self._within.pop()
                whole = clocks() - began
                self.spent[label] += whole - inner
                if self._within:
                    self._within[-1] += whole

        setattr(owner, name, timed)

    def reset(self):
        """Begin anew."""
        for spent in self.spent.values():
            spent[:] = 0


def clocks():
    """CPU seconds of this process, all threads; wall seconds."""
    return np.array([time.process_time(), time.perf_counter()])


def meter():
    """A meter on everything that the store does for safety."""
    from storage import column, corpus, embeddings, store

    found = Meter()
    found.wrap(
        store, "payload_sha256", "sha256 of the values, before the write and of what is read back"
    )
    found.wrap(store, "_read", "opening and validating what is read back")
    found.wrap(os, "fsync", "fsync of files and folders")
    found.wrap(os, "link", "names by link")
    found.wrap(corpus, "text_key", "text keys")
    found.wrap(corpus, "text_digest", "digests of shards")
    found.wrap(column.Column, "_compare", "comparing text keys")
    found.wrap(embeddings, "check_vectors", "looking for NaN, zero, overflow")
    return found


def main():
    """Time some rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    texts = read_texts(args.texts, args.rows)
    watched = meter()
    encode, params = teacher()
    encode(texts[:256])  # the first calls are slower
    rounds = [one_round(texts, encode, params, watched) for _ in range(args.rounds)]
    text = table(rounds, texts, args)
    sys.stdout.write(text)
    RESULT.write_text(text)


def read_texts(file, rows):
    """The first texts of a corpus file, or of the demo's corpus."""
    from stages.docs import run
    from stages.params import DocsParams
    from stages.reading.corpus_files import read

    with tempfile.TemporaryDirectory() as folder:
        if file is None:
            settings = yaml.safe_load((ROOT / "params.yaml").read_text())["docs"]
            settings["max_texts"] = rows
            run(DocsParams.model_validate(settings), out=Path(folder), facts=Path(folder) / "facts")
            file = Path(folder) / "texts.jsonl"
        found = (text for text in read(file, "text") if isinstance(text, str) and text.strip())
        return list(dict.fromkeys(text for _, text in zip(range(rows), found, strict=False)))


def teacher():
    """The demo's teacher as params.yaml says: its encode function, its settings."""
    from stages.models.devices import pick_device
    from stages.models.encoder import Encoder
    from stages.models.folder import find_model
    from stages.params import EmbedParams

    params = EmbedParams.model_validate(yaml.safe_load((ROOT / "params.yaml").read_text())["embed"])
    folder = find_model(params.teacher, revision=None, root=ROOT, address="embed.teacher")
    encoder = Encoder(
        folder,
        device=pick_device("cpu"),
        precision=params.precision,
        max_tokens=params.max_tokens,
        prompts={"text": params.prompts.of("text")},
        trust_remote_code=False,
    )
    return encoder.encode_counted, params


def one_round(texts, encode, params, watched):
    """Seconds (CPU, wall) of the embed stage, and of each safety measure in shard and embed."""
    from stages import embed
    from storage import corpus as texts_of
    from storage.corpus import Corpus, put_texts
    from storage.manifest import Manifest
    from storage.store import Store

    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        watched.reset()
        store = Store(root / "store")
        objects = [put_texts(store, shard) for shard in texts_of.cut(texts, 1024)]
        manifest = Manifest(kind="corpus", recipe={}, parent=None, objects=tuple(objects))
        manifest.save(root / "corpus.json", store)
        began = clocks()
        embed.run(
            params,
            files={"model.safetensors": "0" * 64},
            corpus=Corpus(store, manifest),
            store=store,
            remote=None,
            load_teacher=lambda: encode,
            out=root / "embeddings.json",
            facts=root / "facts.json",
        )
        whole = clocks() - began
        return whole, {label: spent.copy() for label, spent in watched.spent.items()}


def table(rounds, texts, args):
    """The results as Markdown."""
    source = f"sentences of {args.texts.name}" if args.texts else "sentences of the demo's corpus"
    seconds = statistics.median(whole[1] for whole, _ in rounds)
    lines = [
        "# What safety costs",
        "",
        f"`python benchmarks/cost_of_safety.py`, commit {commit()}, Python {platform.python_version()}, "
        f"{args.threads} threads.",
        f"{len(texts):,} {source}, all-MiniLM-L6-v2, float16 vectors; {len(rounds)} rounds, "
        f"{len(texts) / seconds:,.0f} texts/s.",
        "Share of the embed stage in percent: median (least to most). Text keys, digests and the writing",
        "of texts are done by `shard`; they are counted too, against the time of embed.",
        "",
        "| measure | CPU % | wall % |",
        "|---|---|---|",
    ]
    shares = {
        label: np.array([100 * parts[label] / whole for whole, parts in rounds])
        for label in rounds[0][1]
    }
    shares[f"**all together** (goal: {GOAL:g} %)"] = sum(shares.values())
    for label, found in shares.items():
        lines.append(f"| {label} | {spread(found[:, 0])} | {spread(found[:, 1])} |")
    return "\n".join([*lines, ""])


def spread(values):
    """Median (least to most)."""
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


if __name__ == "__main__":
    main()
