"""An English teacher, and a student that learns a made-up language from its cached vectors.

The texts are those of the shipped demo (documentation of installed packages) whose words are all among
its 1,200 commonest, so that a few minutes are enough. The language is made from them by a rule, so that it
needs no download: each word becomes a made-up one of two to four syllables, which a keyed hash of the word
decides, and of each two words the second comes first. Numbers, signs and capitals stay. To the teacher and
to the start it is noise in pieces, for their tokenizer is an English one.

Measured on held-out texts: how many find their reading, and readings their text, among all of these (the
highest cosine); before (the start) and after the training.

`python benchmarks/readings.py --work DIR` takes a quarter of an hour on half of a core; what is done is not
done again.
"""

import argparse
import hashlib
import json
import platform
import re
import sys
from collections import Counter
from pathlib import Path

import yaml
from harness import ROOT, commit
from quality_sts import run

RESULT = ROOT / "benchmarks/results/readings.md"
COMMON = 1200
KEY = b"a language for teachonce"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
WORD = re.compile(r"[^\W\d_]+")


def made_up(word):
    """The word of the language for a word: always the same, and as a rule another for another."""
    number = int.from_bytes(hashlib.blake2b(word.lower().encode(), key=KEY, digest_size=8).digest())
    syllables = []
    for _ in range(min(4, 2 + len(word) // 6)):
        number, consonant = divmod(number, len(CONSONANTS))
        number, vowel = divmod(number, len(VOWELS))
        syllables.append(CONSONANTS[consonant] + VOWELS[vowel])
    said = "".join(syllables)
    return said.capitalize() if word[0].isupper() else said


def translated(text):
    """A text in the language."""
    words = WORD.sub(lambda found: made_up(found[0]), text).split()
    for place in range(0, len(words) - 1, 2):
        words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)


def prepare(work, epochs):
    """The folder with its settings and files: the shipped ones, with one student."""
    work.mkdir(parents=True, exist_ok=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"store": "store", "device": "cpu"}
    write(work, params)
    if not (work / "data/raw/texts.jsonl").exists():
        run(work, "docs")
    lines = (work / "data/raw/texts.jsonl").read_text().splitlines()
    texts = of_common_words([json.loads(line)["text"] for line in lines])
    for name, records in (
        ("texts.jsonl", [{"text": text} for text in texts]),
        ("pairs.jsonl", [{"text": text, "reading": translated(text)} for text in texts]),
    ):
        (work / name).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    params["docs"]["packages"] = []
    params["shard"]["sources"] = ["texts.jsonl"]
    params["distill"]["readings"] = ["pairs.jsonl"]
    params["split"]["heldout"] = 0.1
    params["recipes"] = {
        "readings": params["recipes"]["readings"]
        | {"epochs": epochs, "learning_rate": 1.0e-3, "batch_size": 32}
    }
    params["students"] = {"bilingual": {"recipe": "readings", "start": "half"}}
    params["finetune"] |= {"students": [], "triplets": []}
    params["evaluate"] |= {"retrieval": {}, "speed_texts": 32}
    params["starts"] = {"half": params["starts"]["half"]}
    params["export"] |= {"model": "bilingual", "also": [], "formats": ["safetensors"]}
    write(work, params)
    return texts


def write(work, params):
    """Leave the settings."""
    (work / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def of_common_words(texts):
    """Those of some texts that have four words or more, all of them common."""
    words = {text: [word.lower() for word in WORD.findall(text)] for text in texts}
    counted = Counter(word for found in words.values() for word in found)
    common = {word for word, _ in counted.most_common(COMMON)}
    return [text for text, found in words.items() if len(found) >= 4 and common.issuperset(found)]


def table(work, models, example, epochs):
    """The results as Markdown."""
    found = {
        name: json.loads((work / f"reports/metrics/{name}.json").read_text()) for name in models
    }
    training = json.loads((work / "reports/training/bilingual.json").read_text())
    lines = [
        "# A language that the teacher never saw",
        "",
        f"`python benchmarks/readings.py`, commit {commit()}, Python {platform.python_version()},",
        "one thread. Teacher: all-MiniLM-L6-v2, which is English. Start: its layers 0, 2 and 5",
        f"(`half`). Student: that after {training['steps']:,} steps of `kd` with 32 rows each:",
        f"{training['rows']:,} texts, {epochs} times. They are texts of the demo whose words are all",
        f"among its {COMMON:,} commonest. Half of the rows are read in a made-up language: each",
        "word is another, by a keyed hash, and every two words are swapped:",
        "",
        f"> {example}",
        ">",
        f"> {translated(example)}",
        "",
        f"{found['bilingual']['readings.pairs']:,} held-out texts and readings, ± half of a 95 % interval:",
        "",
        "| model | text finds reading | reading finds text | reading fidelity "
        "| cosine with the teacher's text | fidelity of texts | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = (
        "readings.text_to_reading",
        "readings.reading_to_text",
        "readings.spearman",
        "readings.cosine",
    )
    for name, metrics in found.items():
        cells = [
            f"{metrics[key]:.3f} ± {(metrics[f'{key}.high'] - metrics[f'{key}.low']) / 2:.3f}"
            if key in metrics
            else ""
            for key in (*keys, "fidelity.spearman")
        ]
        spent = training["minutes"] if name == "bilingual" else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {spent} |")
    lines += [
        "",
        "Minutes are of the clock, on a machine that other work may share. To teacher and start the",
        "language is noise in pieces, since their tokenizer is an English one; the student read no",
        "held-out text in either language.",
    ]
    return "\n".join([*lines, ""])


def main():
    """Prepare, train what is not trained yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    texts = prepare(args.work, args.epochs)
    if not (args.work / "data/embeddings.json").exists():
        for stage in (("shard",), ("split",), ("embed",), ("start", "half")):
            run(args.work, *stage)
    if not (args.work / "models/bilingual/modules.json").exists():
        run(args.work, "distill", "bilingual")
    models = ["teacher", "half", "bilingual"]
    for model in models:
        if not (args.work / f"reports/metrics/{model}.json").exists():
            run(args.work, "evaluate", model)
    example = min((text for text in texts if len(text) > 50), key=len)
    text = table(args.work, models, example, args.epochs)
    sys.stdout.write(text)
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
