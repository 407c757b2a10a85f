"""Ctrl-C and SIGTERM: out within seconds, with what is finished and a word about how to go on.

SIGKILL: nothing but what a checkpoint kept, and the same end.
"""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from storage.upkeep.inventory import take_inventory
from tests.conftest import HashTeacher, sentences
from tests.pipeline.test_upkeep import Tree, write_params
from tests.processes import ADAPTER, HALF, SPECULATIVE, environment, furnish
from tests.processes import COMMAND as TRAINING

ROOT = Path(__file__).parents[2]

# The commands themselves, with a teacher that stays at one shard and a remote that never answers.
COMMAND = """
import sys, time
from pipeline import cli
from pipeline.workspace import Workspace
from storage.probe import probe_key
from storage.remote import Remote
from tests.conftest import HashTeacher

class Waits(HashTeacher):
    calls = 0  # the first is for the probe texts
    def __call__(self, texts, role="text"):
        self.calls += 1
        if self.calls == 6:
            time.sleep(600)
        return super().__call__(texts, role)

class Hangs(Remote):
    def __init__(self):
        self.url = "nowhere"
    def try_pull(self, *_, **__):
        return False
    def push(self, named, store):
        if named.key != probe_key(named.key.split("/")[1]):  # that one goes before all shards
            time.sleep(600)

Workspace.teacher = lambda self: ({"model.safetensors": "0" * 64}, Waits)
Workspace.remote = lambda self: Hangs() if self.params.remote else None
cli.main()
"""


def embedding(root):
    """`teachonce embed` as a process of its own, which has finished four shards and is at the next one."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "embed"],
        cwd=root,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list((root / "store/vectors").rglob("*.arrow"))) < 5:  # one holds the probe texts
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("remote", [None, "s3://hangs"])
@pytest.mark.parametrize(
    ("number", "word", "code"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)],
)
def test_a_signal_ends_embed_soon_and_says_how_to_go_on(tmp_path, number, word, code, remote):
    write_params(tmp_path)
    if remote:
        settings = (tmp_path / "params.yaml").read_text()
        (tmp_path / "params.yaml").write_text(re.sub("remote: null", f"remote: {remote}", settings))
    (tmp_path / "texts.txt").write_text("\n".join(sentences(1500)))
    tree = Tree(tmp_path, HashTeacher())
    tree.shard()
    process = embedding(tmp_path)
    process.send_signal(number)
    try:
        output, errors = process.communicate(timeout=60)  # seconds, on a machine that is not busy
    finally:
        process.kill()
    assert (process.returncode, output) == (code, "")
    assert errors.splitlines()[-1] == (
        f"{word}: what is finished is kept; `teachonce embed` goes on from there"
    )
    assert "Traceback" not in errors
    finished = {file.name for file in take_inventory(tmp_path / "store").objects}
    assert take_inventory(tmp_path / "store").scratch == ()
    assert not tree.at.embeddings.exists()

    teacher = HashTeacher()
    Tree(tmp_path, teacher).embed()
    texts = json.loads((tmp_path / "reports/stages/shard.json").read_bytes())["kept"]
    kept = [e for e in tree.manifest("embeddings").objects if e.key in finished]
    assert len(kept) >= 4
    assert teacher.texts_seen == texts - sum(entry.rows for entry in kept)


RECIPE = {
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "dropout": True,
    "precision": "fp32",
    "evaluate_every": 7,
    "patience": 50,
}
KD_MIXES_AND_CKD = [
    {"name": "kd", "weight": 32.0, "centred": False},
    {"name": "mixes", "weight": 32.0, "centred": True, "rows": 16},
    {
        "name": "ckd",
        "weight": 1.0,
        "temperature": 0.3,
        "learnable_temperature": True,
        "queue": 64,
        "neighbours": 0,
    },
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("recipe", "changes", "start", "kills"),
    [
        ("both", {"objectives": KD_MIXES_AND_CKD}, HALF, 20),
        ("both", {"objectives": KD_MIXES_AND_CKD}, HALF | {"passes": 2}, 10),
        (
            "both",
            {"objectives": KD_MIXES_AND_CKD, "pretrain": {"share": 0.3, "triplets": "mined"}},
            HALF,
            10,
        ),
        ("speculative", {"objectives": [SPECULATIVE]}, HALF, 10),
        ("adapter", {"objectives": [ADAPTER]}, HALF, 10),
    ],
)
def test_a_training_that_is_killed_many_times_ends_with_the_same_weights(
    tmp_path, tiny_model, recipe, changes, start, kills
):
    """Anywhere: before a step, some steps after a checkpoint, or while a checkpoint is written."""
    root = tmp_path / "tree"
    root.mkdir()
    furnish(root, tiny_model, recipes={recipe: RECIPE | changes}, finetune={}, start=start)

    def train(**how):
        return subprocess.run(
            [sys.executable, "-c", TRAINING, "distill", recipe],
            cwd=root,
            env=environment(log=tmp_path, **how),
            capture_output=True,
            text=True,
            timeout=120,
        )

    def made():
        files = (f"models/{recipe}/model.safetensors", f"reports/curves/{recipe}.csv")
        return [hashlib.sha256((root / file).read_bytes()).hexdigest() for file in files]

    ended = train(checkpoint_seconds=60.0)
    assert ended.returncode == 0, ended.stderr
    whole = made()
    steps = json.loads((root / f"reports/training/{recipe}.json").read_text())["steps"]
    draw = np.random.default_rng(6)
    resumed = []
    for step in sorted(draw.choice(np.arange(1, steps), size=kills, replace=False)):
        when, seconds = ("step", 0.1) if draw.random() < 0.5 else ("checkpoint", 0.0)
        ended = train(checkpoint_seconds=seconds, die_at=f"{step} {when}")
        assert ended.returncode == -signal.SIGKILL, (step, when, ended.stderr)
        resumed += map(int, re.findall("going on at step ([0-9]+)", ended.stderr))
    assert made() == whole  # still those of the whole run
    (root / f"models/{recipe}/model.safetensors").unlink()
    ended = train(checkpoint_seconds=0.1)
    assert ended.returncode == 0, ended.stderr
    assert made() == whole
    assert len(resumed) >= kills // 2
    assert [*(root / "work").glob("*/step-*")] == []
