"""What students keep of their teacher on real text: STS12 and STS-B dev, by the pipeline's own commands.

Then the same students after one epoch on labelled triplets (NLI), the best weights picked on STS-B dev.

    python benchmarks/quality_sts.py --data DATA --work WORK [--rows 60000] [--only kd ckd]
        [--finetune kd] [--pool N]

DATA has `corpus/*.jsonl.zst` ({"text": ...}), `nli/triplets.jsonl.zst` ({"anchor", "positive",
"negative"}), `sts/STS12/*.tsv` and `sts/STSB/dev.tsv` (score, sentence, sentence). The teacher is
all-MiniLM-L6-v2 from the extra `demo`, the start its layers 0, 2 and 5; one epoch of batches of 128 at
2e-4, 64 tokens. WORK is a folder for the run; started again it goes on where it was. The table is
printed and written to benchmarks/results/quality_sts.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import yaml
from harness import ROOT, commit

from stages.reading.corpus_files import read

RESULT = ROOT / "benchmarks/results/quality_sts.md"

# The same protocol in the prototype that the goals come from: STS12.
PROTOTYPE = {
    "teacher": 72.37,
    "half": 63.84,
    "kd": 71.43,
    "ckd": 69.92,
    "kd_ckd": 71.41,
    "kd-finetuned": 74.43,
}

# Students that stand beside the others on a start of their own; most have the name of their recipe.
STARTS = {
    "shared_layers": ("twice", {"from": "teacher", "layers": [0, 2, 5], "passes": 2}),
    "static": ("table", {"from": "teacher", "layers": None, "kind": "static", "hidden": 256}),
    # Not narrower, but fitted to the whole teacher: the recipe kd.
    "kd_fitted": ("fitted", {"from": "teacher", "layers": [0, 2, 5], "hidden": 384}),
}


def main():
    """Prepare the folder, run the stages, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--only", nargs="*", help="students to train; all of them otherwise")
    parser.add_argument("--pool", type=int, help="mine.pool; all rows otherwise")
    parser.add_argument("--finetune", nargs="*", default=["kd", "ckd"], help="students to finetune")
    args = parser.parse_args()
    params = prepare(args.data.resolve(), args.work, args.rows, args.only, args.pool)
    students = args.only or list(params["students"])
    starts = list(dict.fromkeys(["half", *(STARTS[s][0] for s in students if s in STARTS)]))
    stages = [["check"], ["shard"], ["split"], ["embed"], ["mine"]]
    stages += [["start", start] for start in starts]
    for stage in stages:
        run(args.work, *stage)
    models = ["teacher", *starts]
    for student in students:
        runs = [("distill", student)]
        if student in args.finetune:
            runs.append(("finetune", f"{student}-finetuned"))
        for command, model in runs:
            if not (args.work / "models" / model / "modules.json").exists():
                run(args.work, command, student)
            models.append(model)
    for model in models:
        if not (args.work / f"reports/metrics/{model}.json").exists():
            run(args.work, "evaluate", model)
    text = table(args.work, models, args.rows)
    sys.stdout.write(text)
    RESULT.write_text(text)


def prepare(data, work, rows, only=None, pool=None):
    """The folder with its settings: those of the repository, on this corpus and these STS sets.

    One mix for every other text is made where `only` names the recipe `mixes`, or is None.
    """
    work.mkdir(parents=True, exist_ok=True)
    corpus = work / "corpus.jsonl"
    if not corpus.exists():
        source = next(iter(sorted((data / "corpus").glob("*.jsonl.zst"))))
        texts = (text for text in read(source, "text") if isinstance(text, str))
        lines = [json.dumps({"text": text}) for _, text in zip(range(rows), texts, strict=False)]
        corpus.write_text("\n".join(lines) + "\n")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["store"] = "store"
    params["docs"]["packages"] = []
    params["shard"] |= {"sources": ["corpus.jsonl"], "rows_per_shard": 2048}
    params["evaluate"] |= {
        "sts": {"STS12": str(data / "sts/STS12/*.tsv"), "STSB-dev": str(data / "sts/STSB/dev.tsv")},
        "retrieval": {},
    }
    params["mine"]["pool"] = pool
    params["starts"] |= dict(STARTS.values())
    params["students"] = {
        name: {"recipe": name, "start": STARTS.get(name, ("half",))[0]}
        for name in params["recipes"]
        if name != "readings"  # these sentences have none
    }
    params["students"]["kd_fitted"] = {"recipe": "kd", "start": STARTS["kd_fitted"][0]}
    params["export"] |= {"also": [], "formats": ["safetensors"]}
    if only and "mixes" not in only:
        del params["students"]["mixes"]
    else:
        params["embed"]["mixes"] = 0.5
    params["finetune"] |= {
        "students": list(params["students"]),
        "triplets": [str(data / "nli/triplets.jsonl.zst")],
        "dev": str(data / "sts/STSB/dev.tsv"),
    }
    (work / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return params


def run(work, *words):
    """One command of the pipeline."""
    command = [sys.executable, "-m", "pipeline.cli", *words]
    subprocess.run(command, cwd=work, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def table(work, models, rows):
    """The results as Markdown."""
    lines = [
        f"# Quality on real text ({rows:,} sentences, one epoch)",
        "",
        f"`python benchmarks/quality_sts.py`, commit {commit()}, Python {platform.python_version()}.",
        "Spearman x 100; prototype: its STS12, the goal. Agreement: rank correlation of the cosines",
        "of 1,000 held-out texts.",
        "",
        "| model | STS12 | prototype | STS-B dev | agreement | top-10 overlap | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in models:
        found = json.loads((work / f"reports/metrics/{model}.json").read_text())
        training = work / f"reports/training/{model}.json"
        spent = json.loads(training.read_text())["minutes"] if training.exists() else ""
        lines.append(
            f"| {model} | {found['sts.STS12']:.2f} | {PROTOTYPE.get(model, '')} "
            f"| {found['sts.STSB-dev']:.2f} | {found['fidelity.spearman']:.4f} "
            f"| {found['fidelity.top10_overlap']:.3f} | {spent} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
