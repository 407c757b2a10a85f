"""A training step beside its peers: CPU seconds of one thread for the same batches of 64 texts.

    python benchmarks/train.py --texts corpus.jsonl [--rows 200000] [--steps 6] [--rounds 3]

The student is layers 0, 2, 5 of all-MiniLM-L6-v2, texts are cut at 64 tokens, the optimiser is AdamW.
Peers, as they come:

- the official step of DistilCSE's `kd`: the teacher reads each batch, both models read it padded to 64
  tokens, mean squared error, torch's default AdamW. Beside it the same with a teacher of BERT-base's size
  (random weights; its forward is timed and stands in for MiniLM's);
- `SentenceTransformerTrainer` with the teacher's vectors as labels, `MSELoss` and `EmbedDistillLoss`
  (needs `pip install accelerate datasets`).

Ours is the pipeline's own step (`stages.distill.prepare`, `stages.learning.loop.take_step`) with recipes
of params.yaml, on caches of all `--rows` texts with random vectors. Peers train with the dropout that the
model's settings say, our recipes without; one row has it, too.

The variants take turns in rounds, each round has batches of its own, and a ratio is that of two times in
one round: the median, and the lowest and highest. The table is printed and written to
benchmarks/results/train_cpu.md.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from datasets import Dataset
from harness import ROOT, ratio, some_texts
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, TrainerCallback

from pipeline.settings import load_params
from stages import distill, embed
from stages.learning.loop import make_optimizer, take_step
from stages.models.devices import device_name
from stages.models.folder import find_model
from stages.models.layers import keep_layers
from stages.models.loading import load_model, save_model
from storage.caches import Caches
from storage.corpus import Corpus, cut, put_texts
from storage.embeddings import Embeddings, put_vectors
from storage.manifest import Manifest, fingerprint
from storage.split import Split
from storage.store import Store

RESULT = ROOT / "benchmarks/results/train_cpu.md"
CPU = torch.device("cpu")
BATCH, MAX_TOKENS, QUEUE, LAYERS, DIM = 64, 64, 65_536, (0, 2, 5), 384
WARM_STEPS = 2
OFFICIAL, BERT_BASE = "official step", "official step, teacher of BERT-base's size"
KD32, KD16, CKD16 = "teachonce, kd, fp32", "teachonce, kd, bf16", "teachonce, ckd, bf16"
DROPOUT32 = "teachonce, kd, fp32, with dropout"
GATHERED, LARGE_SHARD = 512, 50_000


def main():
    """Time all variants in turns and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", required=True, help="a corpus file, as shard.sources takes them")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=6, help="of each variant in a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    params = load_params(ROOT / "params.yaml")
    teacher = find_model(params.embed.teacher, revision=None, root=ROOT, address="embed.teacher")
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "start"
        model = load_model(teacher, device=CPU)
        keep_layers(model, LAYERS, address="LAYERS")
        save_model(model, start, address="the start")
        texts = list(dict.fromkeys(some_texts(args.texts, args.rows)))
        caches, large_shards = (
            made_caches(Store(Path(scratch) / str(rows)), texts, params, rows)
            for rows in (params.shard.rows_per_shard, LARGE_SHARD)
        )
        lessons = ours(params, start, caches)
        peers = {
            OFFICIAL: official(teacher, start, caches),
            **{
                f"SentenceTransformerTrainer, {loss}, {precision}": trainer(
                    start, caches, loss, precision, Path(scratch) / "trainer"
                )
                for loss in ("MSELoss", "EmbedDistillLoss")
                for precision in ("fp32", "bf16")
            },
        }
        seconds = timed(peers | lessons, args)
        lines = [*steps_table(seconds), "", *gather_table([caches, large_shards], args.rounds)]
    head = f"batches of {BATCH}, {device_name(CPU)}, {args.rounds} rounds of {args.steps} steps"
    report = "\n".join([f"# A training step, {head}", "", *lines])
    print(report)
    RESULT.write_text(report + "\n")


def made_caches(store, texts, params, rows_per_shard):
    """Caches of texts, with random vectors of length 1."""
    objects = tuple(put_texts(store, shard) for shard in cut(texts, rows_per_shard))
    corpus = Corpus(store, Manifest(kind="corpus", recipe={}, parent=None, objects=objects))
    draw = np.random.default_rng(0)
    entries = []
    for shard, key in enumerate(embed.keys_of({"text": fingerprint({})}, corpus)):
        keys = corpus.text_keys[slice(*corpus.starts[shard : shard + 2])]
        vectors = draw.standard_normal((len(keys), DIM), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        entries.append(
            put_vectors(store, key, vectors=vectors, text_keys=keys, storage="float16", facts={})
        )
    parent = corpus.manifest.content
    manifest = Manifest(kind="embeddings", recipe={}, parent=parent, objects=tuple(entries))
    split = Split(corpus=parent, heldout=params.split.heldout, evaluation=())
    return Caches(corpus, Embeddings(store, manifest, corpus), None, split, store)


def official(teacher_folder, start, caches):
    """(seconds of the teacher, of all else) of steps that let both models read each batch."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    teacher = AutoModel.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    student = AutoModel.from_pretrained(start, dtype=torch.float32).train()
    large = BertModel(BertConfig()).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-4)

    def run(batches):
        taken = {"teacher": 0.0, "large": 0.0, "student": 0.0}
        for number, rows in enumerate(batches):
            texts = caches.corpus.take(rows)
            started = time.process_time()
            batch = tokenizer(
                texts,
                padding="max_length",
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            reading = time.process_time()
            with torch.no_grad():
                wanted = pooled(teacher, batch)
            read = time.process_time()
            loss = torch.nn.functional.mse_loss(pooled(student, batch), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            taken["teacher"] += read - reading
            taken["student"] += time.process_time() - started - (read - reading)
            if number == 0:
                with torch.no_grad():
                    reading = time.process_time()
                    pooled(large, batch)
                    taken["large"] = len(batches) * (time.process_time() - reading)
        rest = taken["student"]
        return {OFFICIAL: rest + taken["teacher"], BERT_BASE: rest + taken["large"]}

    return run


def pooled(model, batch):
    """The mean over a text's tokens."""
    mask = batch["attention_mask"][..., None]
    return (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)


class Clock(TrainerCallback):
    """CPU seconds between the ends of the first step that counts and of the last."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        """Note the time."""
        self.ends.append(time.process_time())


def trainer(start, caches, loss, precision, folder):
    """The trainer of sentence-transformers, with the vectors of the cache as labels."""
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    def run(batches):
        warm = np.concatenate([batches[:WARM_STEPS].reshape(-1), batches.reshape(-1)])
        labels = caches.embeddings.rows_of(warm).astype(np.float32)
        model = load_model(start, device=CPU)
        model.max_seq_length = MAX_TOKENS
        clock = Clock()
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                learning_rate=2e-4,
                bf16=precision == "bf16",
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(
                {"text": caches.corpus.take(warm), "label": list(labels)}
            ),
            loss=getattr(losses, loss)(model),
            callbacks=[clock],
        ).train()
        return clock.ends[-1] - clock.ends[WARM_STEPS - 1]

    return run


def ours(params, start, caches):
    """Our steps: name -> what takes them."""
    changes = {
        KD32: ("kd", {"precision": "fp32"}),
        DROPOUT32: ("kd", {"precision": "fp32", "dropout": True}),
        KD16: ("kd", {"precision": "bf16"}),
        CKD16: ("ckd", {"precision": "bf16"}),
    }
    return {
        name: our_steps(recipe_of(params, recipe, change), start, caches)
        for name, (recipe, change) in changes.items()
    }


def recipe_of(params, name, changes):
    """A recipe of params.yaml for batches of this size; a queue is as large as DisCo's."""
    found = params.recipes[name]
    among = [
        objective.model_copy(update={"queue": QUEUE, "neighbours": 0})
        if hasattr(objective, "queue")
        else objective
        for objective in found.objectives
    ]
    changes = changes | {"batch_size": BATCH, "max_tokens": MAX_TOKENS, "objectives": tuple(among)}
    return found.model_copy(update=changes)


def our_steps(recipe, start, caches):
    """CPU seconds of the pipeline's own steps."""
    task = distill.prepare(recipe, start=start, caches=caches, device=CPU)
    work, optimizer = task.setup(), make_optimizer(task, recipe)
    total = len(work.batches(0))
    steps = iter(range(total))

    def run(batches):
        started = time.process_time()
        for rows in batches:
            take_step(task, optimizer, work, rows, next(steps), total, recipe)
        return time.process_time() - started

    run.batches = work.batches(0)
    return run


def timed(variants, args):
    """Variant -> seconds of each round."""
    batches = np.stack(variants[KD32].batches)
    for name, run in variants.items():
        if not name.startswith("Sentence"):  # its first steps do not count
            run(batches[-WARM_STEPS:])
    seconds = {}
    for number in range(args.rounds):
        some = batches[number * args.steps : (number + 1) * args.steps]
        for name, run in variants.items():
            taken = run(some)
            for variant, value in (taken if isinstance(taken, dict) else {name: taken}).items():
                seconds.setdefault(variant, []).append(value / args.steps)
                print(f"{variant}: {1000 * value / args.steps:,.0f} ms", flush=True)
    return seconds


def steps_table(seconds):
    """Lines of Markdown."""
    against = [KD32, DROPOUT32, KD16, CKD16]
    lines = [
        "| | ms a step | "
        + " | ".join(f"times {name.removeprefix('teachonce, ')}" for name in against)
        + " |",
        "|---|---|" + "---|" * len(against),
    ]
    for name, taken in seconds.items():
        ratios = " | ".join(ratio(taken, seconds[ours]) for ours in against)
        lines.append(f"| {name} | {1000 * statistics.median(taken):,.0f} | {ratios} |")
    return lines


def gather_table(caches, rounds):
    """What it takes to fetch random rows of caches of one corpus, beside peers."""
    rows = caches[0].corpus.rows
    ids = np.random.default_rng(1).integers(rows, size=(50, GATHERED))
    array = caches[0].embeddings.rows_of(np.arange(rows))
    listed = Dataset.from_dict({"vector": list(array[: 20 * GATHERED].astype(np.float32))})
    listed = listed.with_format("torch")
    fetches = [
        *(
            (
                f"`Embeddings.rows_of`, {len(some.embeddings.objects)} shards",
                some.embeddings.rows_of,
            )
            for some in caches
        ),
        ("numpy, an array in memory", lambda some: array[some]),
        ("datasets, with_format('torch')", lambda some: listed[some % len(listed)]["vector"]),
    ]
    seconds = {name: [] for name, _ in fetches}
    for number in range(rounds + 1):
        for name, fetch in fetches:
            started = time.process_time()
            for some in ids:
                fetch(some)
            if number:  # the first round opens files
                seconds[name].append((time.process_time() - started) / len(ids))
    names = list(seconds)
    lines = [
        f"{GATHERED} random rows of {rows:,}:",
        "",
        "| | ms | times the first | times the second |",
        "|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        ratios = " | ".join(ratio(taken, seconds[mine]) for mine in names[: len(caches)])
        lines.append(f"| {name} | {1000 * statistics.median(taken):.3f} | {ratios} |")
    return lines


if __name__ == "__main__":
    main()
