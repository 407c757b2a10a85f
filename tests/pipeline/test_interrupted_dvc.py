"""SIGKILL while `dvc repro` trains: the next one goes on at the checkpoint and ends with the same bytes.

Real DVC repositories, and the real commands with one addition: where a test says so they stop, so that it
can kill them exactly there.
"""

import re
import shutil
import signal
import sys
from dataclasses import replace
from os import kill
from pathlib import Path
from textwrap import indent

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from tests.conftest import make_tiny_model
from tests.pipeline.test_dvc import new_project, processes, wait_until
from tests.processes import COMMAND

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

READY = ["check", "docs", "shard", "split", "embed", "start half", "mine", "neighbours"]
TRAINED = {"check", "distill@kd", "finetune@kd"}
TOOL = f"""#!{sys.executable}
import sys
if sys.argv[1] in ("distill", "finetune"):
{indent(COMMAND, "    ")}
else:
    from pipeline import cli
    cli.main()
"""


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A project in which nothing is left to do but to train: 21 steps of distill, 8 of finetune."""
    folder = tmp_path_factory.mktemp("untrained")
    project = new_project(folder, make_tiny_model(folder / "tiny"), texts=700)
    often = {"dropout": True, "evaluate_every": 3, "learning_rate": 2e-3}
    for section in ("recipes__kd", "finetune"):
        project.set(**{f"{section}__{name}": value for name, value in often.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        for words in READY:
            ended = CliRunner().invoke(app, words.split())
            assert ended.exit_code == 0, (words, ended.output, ended.exception)
    project.run("dvc", "commit", "--force", *(words.replace(" ", "@") for words in READY))
    project.tools = folder / "bin"
    project.tools.mkdir()
    tool = project.tools / "teachonce"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    return project


@pytest.fixture(scope="module")
def stop(tmp_path_factory):
    """Says where commands stop from now on, as `tests.processes` has it; a checkpoint after each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOG", str(tmp_path_factory.mktemp("log")))
        patch.setenv("CHECKPOINT_SECONDS", "0")
        patch.setenv("ONLY_STOPS", "yes")
        yield lambda where: patch.setenv("DIE_AT", where)


@pytest.fixture(scope="module")
def whole(untrained, stop, tmp_path_factory):
    """The files of both students, of a run that nobody interrupted."""
    project = twin(untrained, tmp_path_factory.mktemp("whole"))
    stop("")
    ended = project.repro("finetune@kd")
    assert ended.ran == TRAINED
    assert resumed(ended.output) == []
    print(f"\nnot interrupted: {ended.seconds:.0f} s")
    return made(project)


def twin(project, folder):
    """The same project in another folder, on the same store."""
    shutil.copytree(project.root, folder / "project", symlinks=True)
    return replace(project, root=folder / "project")


@pytest.fixture
def project(untrained, tmp_path):
    """A twin to kill; nothing that stands still there is left behind."""
    project = twin(untrained, tmp_path)
    yield project
    for pid in (*training(project, "distill"), *training(project, "finetune")):
        kill(pid, signal.SIGKILL)


def made(project):
    """File -> bytes of the students that are there."""
    at = project.root / "models"
    return {
        path.relative_to(at).as_posix(): path.read_bytes()
        for path in sorted(at.glob("kd*/**/*"))
        if path.is_file()
    }


def training(project, stage):
    """Ids of the processes that train."""
    return processes(project.root, "teachonce", stage, "kd")


def stopped(project, stage, but=()):
    """The id of the process that trains, and stands still where it was told to; not one of `but`."""

    def standing():
        return [
            pid
            for pid in set(training(project, stage)) - {*but}
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        ]

    wait_until(standing)
    [pid] = standing()
    return pid


def resumed(output):
    """(student, step) of each training that went on."""
    return [
        (name, int(step)) for name, step in re.findall(r"(\S+): going on at step (\d+)", output)
    ]


def test_kill_9_of_training_under_dvc_goes_on_at_the_checkpoint(project, stop, whole, tmp_path):
    """Twice in distill, the second time while a checkpoint is written, and once in finetune."""
    log = tmp_path / "killed.log"
    kd = {name for name in whole if name.startswith("kd/")}
    said = []
    for stage, where, done in (
        ("distill", "5 step", set()),
        ("distill", "12 checkpoint", set()),
        ("finetune", "4 step", kd),
    ):
        stop(where)
        dvc = project.popen("dvc", "repro", "finetune@kd", log=log)
        child = stopped(project, stage)
        dvc.kill()
        dvc.wait()
        kill(child, signal.SIGKILL)
        wait_until(lambda stage=stage: not training(project, stage))
        said += resumed(log.read_text())
        assert made(project).keys() == done
    stop("")
    ended = project.repro("finetune@kd")
    assert ended.ran == {"check", "finetune@kd"}
    assert [*said, *resumed(ended.output)] == [("kd", 5), ("kd", 11), ("kd-finetuned", 4)]
    assert made(project) == whole
    assert [path.name for path in (project.root / "work").iterdir()] == ["hashes.json"]


@pytest.mark.parametrize("first", ["orphan", "successor"])
def test_kill_9_of_dvc_while_distill_goes_on(project, stop, whole, tmp_path, first):
    """The orphan and its successor train the same student: both end, in either order, with the same bytes.

    Whoever is last finds the checkpoints deleted, and puts the same student where there is one already.
    """
    kd = {name: content for name, content in whole.items() if name.startswith("kd/")}
    stop("8 step")
    dvc = project.popen("dvc", "repro", "distill@kd", log=tmp_path / "orphan.log")
    orphan = stopped(project, "distill")
    dvc.kill()
    dvc.wait()
    stop("12 step")
    second = project.popen("dvc", "repro", "distill@kd", log=tmp_path / "successor.log")
    successor = stopped(project, "distill", but=[orphan])
    for pid in (orphan, successor) if first == "orphan" else (successor, orphan):
        kill(pid, signal.SIGCONT)
        wait_until(lambda pid=pid: pid not in training(project, "distill"))
        if pid == successor:
            assert second.wait(timeout=120) == 0, (tmp_path / "successor.log").read_text()
        assert made(project) == kd
    for log, went_on in (("orphan", []), ("successor", [("kd", 8)])):
        said = (tmp_path / f"{log}.log").read_text()
        assert resumed(said) == went_on
        assert "distill: kd: 21 steps of 32 rows" in said
    stop("")
    assert project.repro("distill@kd").ran == {"check"}
    assert made(project) == kd
