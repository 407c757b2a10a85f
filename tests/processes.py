"""Training commands in processes of their own, in a small work tree."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from tests.conftest import sentences, shipped_settings

ROOT = Path(__file__).parent.parent

# The commands themselves. Writes down which files got their names, and may die as in a power cut, or stop.
COMMAND = """
import os, signal, sys
from pathlib import Path
from pipeline import cli
from stages.learning import loop

log = Path(os.environ["LOG"], os.environ.get("RANK", "0")).open("w", buffering=1)
die_at, _, when = os.environ.get("DIE_AT", "").partition(" ")

def die():
    os.kill(os.getpid(), signal.SIGSTOP if os.environ.get("ONLY_STOPS") else signal.SIGKILL)

def note(event, args):
    if event in {"os.rename", "os.link"}:  # about to happen
        name = Path(args[1]).name
        if when == "checkpoint" and name.startswith(f"step-{int(die_at):09}-"):
            die()
        if not name.endswith(".tmp"):
            log.write(f"{args[1]}\\n")

sys.addaudithook(note)
plain_step = loop.take_step

def step(*args):
    if when == "step" and args[4] == int(die_at):
        die()
    return plain_step(*args)

loop.take_step = step
loop.CHECKPOINT_SECONDS = float(os.environ["CHECKPOINT_SECONDS"])
cli.main()
"""


# Objectives with a state of their own, for a small work tree.
SPECULATIVE = {
    "name": "speculative",
    "weight": 1.0,
    "temperature": 0.1,
    "teacher_temperature": 0.1,
    "queue": 64,
    "neighbours": 8,
    "alpha": 0.1,
    "proposals": 4,
    "pool": 200,
    "refresh_every": 3,
    "threshold": 0.5,
}
ADAPTER = {
    "name": "adapter",
    "weight": 1.0,
    "temperature": 0.1,
    "teacher_temperature": 0.1,
    "queue": 64,
    "neighbours": 0,
    "rank": 4,
    "anchor": 1.0,
    "beta": 0.5,
    "most_drift": 0.01,
}


def environment(*, log, checkpoint_seconds=0.0, die_at=""):
    """Variables for such a process.

    Args:
        log: An existing folder: a file for each rank, with a line for each file that got its name.
        checkpoint_seconds: Least time between two checkpoints.
        die_at: `N step`: by SIGKILL, before the N-th step (0-based). `N checkpoint`: when the checkpoint
            after N steps is written, and has no name yet. With $ONLY_STOPS it stops there, to be killed or
            continued by somebody else.
    """
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "LOG": str(log),
        "CHECKPOINT_SECONDS": str(checkpoint_seconds),
        "DIE_AT": die_at,
    }


HALF = {"from": "teacher", "layers": [0, 3]}


def furnish(root, teacher, *, recipes, finetune, start=HALF):
    """Settings, texts, labels, and what the pipeline makes of them before `distill`.

    Args:
        root: An empty folder.
        teacher: A tiny model's.
        recipes: Name -> what differs from the shipped ckd; each has a student of its name.
        finetune: What differs in that section.
        start: What all students start from.
    """
    params = shipped_settings()
    params |= {
        "store": "store",
        "device": "cpu",
        "starts": {"half": start},
    }
    params["docs"]["packages"] = []
    params["shard"] |= {"sources": ["texts.txt"], "rows_per_shard": 64}
    params["split"]["heldout"] = 0.1
    kinds = {
        objective["name"] for one in recipes.values() for objective in one.get("objectives", ())
    }
    mixes = 0.5 if "mixes" in kinds else 0
    params["embed"] |= {"teacher": str(teacher), "max_tokens": 16, "mixes": mixes}
    params["mine"]["max_score"] = 1.0  # the teacher of random weights finds all texts alike
    for name, changes in recipes.items():
        params["recipes"][name] = params["recipes"]["ckd"] | {"max_tokens": 16} | changes
    params["students"] = {name: {"recipe": name, "start": "half"} for name in recipes}
    params["finetune"] |= {
        "students": [*recipes],
        "triplets": ["pairs.tsv"],
        "max_tokens": 16,
    } | finetune
    params["evaluate"]["retrieval"] = {}
    params["export"]["model"] = next(iter(recipes))
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "texts.txt").write_text("\n".join(sentences(700)))
    draw = np.random.default_rng(2)
    lines = []
    for anchor in sentences(400, seed=1):
        words = anchor.lower().removesuffix(".").split()
        lines.append(f"{anchor}\t{' '.join(draw.permutation(words)[: max(3, len(words) // 2)])}\n")
    (root / "pairs.tsv").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for words in (["shard"], ["split"], ["embed"], ["mine"], ["start", "half"]):
            ended = CliRunner().invoke(app, words)
            assert ended.exit_code == 0, (words, ended.output, ended.exception)
