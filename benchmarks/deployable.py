"""The whole range of students from one cache: what each keeps, how fast and how large it is.

    python benchmarks/deployable.py --data DATA --work WORK [--rows 60000] [--only static one]

DATA is as for quality_sts.py, and has `retrieval/xquad_en_wiki10k/` in BEIR form. The teacher is
all-MiniLM-L6-v2 from the extra `demo`. Each student is distilled by `kd` (or `static`), finetuned on NLI
triplets, and exported before and after that; a form's quality is the mean of STS12, STS-B dev (Spearman)
and xquad (nDCG@10; the judged documents and every fourth of the others), each as a share of the teacher's.
The weights of a finetune are picked on triplets that were held out, so on none of these sets. WORK is a
folder for the run; started again it goes on where it was. The table is printed and written to
benchmarks/results/deployable.md after each student.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import yaml
from harness import ROOT, commit
from quality_sts import prepare, run

RESULT = ROOT / "benchmarks/results/deployable.md"
SETS = ("sts.STS12", "sts.STSB-dev", "retrieval.xquad.ndcg@10")
TOKENS = 20_000
"""As many as the megabytes of the goals allow."""

# The learning rates are those of 2e-4, 5e-4, 1e-3, 2e-3 (`two`) and 1e-3, 3e-3 (`one`) with the lowest loss
# after 152 steps on 20,000 of the sentences.
DEEP = {"epochs": 1, "learning_rate": 1e-3}
NARROW = {"hidden": 192, "intermediate": 768, "heads": 6}

# Student -> its start, its recipe and what is otherwise there. `hidden`: fitted to the whole teacher.
STUDENTS = {
    "three": ({"layers": [0, 4, 5], "hidden": 384}, "kd", DEEP),
    "three_cut": ({"layers": [0, 4, 5], "hidden": 384, "vocabulary": TOKENS}, "kd", DEEP),
    "two": ({"layers": [0, 5], "hidden": 384, "vocabulary": TOKENS}, "kd", DEEP),
    "one": (
        {"layers": [5], **NARROW, "vocabulary": TOKENS},
        "kd",
        {"epochs": 3, "learning_rate": 3e-3},
    ),
    "static": (
        {"layers": None, "kind": "static", "hidden": 256, "vocabulary": TOKENS},
        "static",
        {"epochs": 5},
    ),
}


def main():
    """Run the stages for one student after the other, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--only", nargs="*", default=list(STUDENTS), choices=list(STUDENTS))
    args = parser.parse_args()
    configure(args.data.resolve(), args.work, args.rows)
    for stage in (["check"], ["shard"], ["split"], ["embed"]):
        run(args.work, *stage)
    evaluate(args.work, "teacher")
    for name in args.only:
        run(args.work, "start", name)
        for command, model in (("distill", "trained"), ("finetune", "trained-finetuned")):
            model = model.replace("trained", f"{name}_trained")
            if not (args.work / "models" / model / "modules.json").exists():
                run(args.work, command, f"{name}_trained")
            evaluate(args.work, model)
            if not (args.work / f"reports/exports/{model}.json").exists():
                run(args.work, "export", model)
        RESULT.write_text(table(args.work, args.rows))
    sys.stdout.write(table(args.work, args.rows))


def configure(data, work, rows):
    """The folder with its settings: those of quality_sts.py, with these students and the retrieval set."""
    params = prepare(data, work, rows, only=["kd"])
    params["starts"], params["students"] = {}, {}
    for name, (start, recipe, otherwise) in STUDENTS.items():
        params["starts"][name] = {"from": "teacher", **start}
        params["recipes"][f"{name}_recipe"] = params["recipes"][recipe] | otherwise
        params["students"][f"{name}_trained"] = {"recipe": f"{name}_recipe", "start": name}
    params["evaluate"]["retrieval"] = {"xquad": "xquad"}
    some_documents(data / "retrieval/xquad_en_wiki10k", work / "xquad")
    params["finetune"] |= {"students": list(params["students"]), "dev": None}
    forms = ["safetensors-fp16", "onnx-int8", "static-int8"]
    params["export"] |= {"model": "three_trained", "formats": forms, "max_loss": 0.1}
    (work / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def some_documents(whole, part):
    """The judged documents of a BEIR folder, and every fourth of the others."""
    part.mkdir(exist_ok=True)
    for name in ("queries.jsonl", "qrels.tsv"):
        (part / name).write_bytes((whole / name).read_bytes())
    judged = {line.split("\t")[1] for line in (whole / "qrels.tsv").read_text().splitlines()}
    lines = (whole / "corpus.jsonl").read_text().splitlines(keepends=True)
    kept = [
        line
        for place, line in enumerate(lines)
        if place % 4 == 0 or json.loads(line)["_id"] in judged
    ]
    (part / "corpus.jsonl").write_text("".join(kept))


def evaluate(work, model):
    """Measure a model, if that was not done before."""
    if not (work / f"reports/metrics/{model}.json").exists():
        run(work, "evaluate", model)


def table(work, rows):
    """The results as Markdown: a row for each exported form of each student."""
    teacher = measured(work, "teacher")
    lines = [
        f"# Students worth deploying ({rows:,} sentences)",
        "",
        f"`python benchmarks/deployable.py`, commit {commit()}, Python {platform.python_version()}, "
        f"{teacher['device']}.",
        "Quality: the mean of STS12, STS-B dev and xquad nDCG@10, each as a share of the teacher's. Speed:",
        "texts in a CPU second of one thread, as a multiple of the teacher's.",
        "",
        "| student | form | MB | speed | STS12 | STS-B dev | xquad | quality |",
        "|---|---|---|---|---|---|---|---|",
        row("teacher", "safetensors", teacher, teacher),
    ]
    for name in STUDENTS:
        for model in (f"{name}_trained", f"{name}_trained-finetuned"):
            export = work / f"reports/exports/{model}.json"
            forms = json.loads(export.read_text())["formats"] if export.exists() else {}
            shown = model.replace("_trained", "")
            lines += [row(shown, form, found, teacher) for form, found in forms.items()]
    return "\n".join([*lines, ""])


def measured(work, model):
    """The metrics of a model."""
    return json.loads((work / f"reports/metrics/{model}.json").read_text())


def row(name, form, found, teacher):
    """A row of the table."""
    quality = statistics.mean(found[key] / teacher[key] for key in SETS)
    speed = found["texts_per_reference"] / teacher["texts_per_reference"]
    figures = " | ".join(f"{found[key]:.2f}" for key in SETS[:2])
    return (
        f"| {name} | {form} | {found['megabytes']:.1f} | {speed:.1f}x | {figures} "
        f"| {found[SETS[2]]:.4f} | {100 * quality:.1f} % |"
    )


if __name__ == "__main__":
    main()
