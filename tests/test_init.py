"""`teachonce init`, and what runs again when the code changes: in a folder of one's own and in a clone."""

import re
import shutil
import subprocess
import sys

import pytest

from pipeline.init import run, template
from storage.errors import TeachonceError
from tests.conftest import make_tiny_model
from tests.test_dvc import ALL, ROOT, Project, furnish
from tests.test_install import copy_sources


def test_init_makes_a_new_folder(tmp_path):
    outcome = run(tmp_path / "a/project")
    names = sorted(path.name for path in (tmp_path / "a/project").iterdir())
    assert names == [".dvcignore", ".gitignore", "README.md", "dvc.yaml", "params.yaml"]
    assert sorted(outcome.facts["files"]) == names
    for name in ("params.yaml", "dvc.yaml"):
        assert (tmp_path / "a/project" / name).read_bytes() == (ROOT / name).read_bytes()
        assert template(name) == (ROOT / name).read_bytes()
    # People commit their manifests, metrics and curves: only what can be made again is ignored.
    assert (tmp_path / "a/project/.gitignore").read_text() == "/work/\n.venv/\n.*.tmp\n"


def test_init_overwrites_nothing(tmp_path):
    (tmp_path / "params.yaml").write_text("mine")
    with pytest.raises(TeachonceError) as error:
        run(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: has params.yaml already\n"
        "  cure: name a new folder, or move the files away: nothing here is overwritten"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
    assert (tmp_path / "params.yaml").read_text() == "mine"


def installed_from_a_wheel(folder):
    """A folder with the packages as pip lays them; their dependencies come from this environment."""
    source = folder / "source"
    source.mkdir()
    copy_sources(source)
    code = folder / "installed"
    quick = ("--no-deps", "--no-build-isolation", "--target", str(code))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *quick, str(source)], check=True)
    shutil.rmtree(source)
    return code


def own_folder(folder):
    """What somebody has who installed the package: `teachonce init`, `git init`, `dvc init`."""
    code = installed_from_a_wheel(folder)
    project = Project(folder / "project", folder / "store", code)
    project.root.mkdir()
    project.run("teachonce", "init", ".")
    project.run("git", "init", "-q", "-b", "main")
    project.run("dvc", "init", "-q")
    return project


def clone(folder):
    """What somebody has who cloned the repository, whose top folder is a project itself."""
    root = folder / "project"
    root.mkdir()
    copy_sources(root)
    for name in (".dvc", ".dvcignore", ".gitignore"):
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("cache", "tmp", "config.local")
            shutil.copytree(path, root / name, ignore=ignored)
        else:
            shutil.copy(path, root / name)
    project = Project(root, folder / "store", root)
    project.run("git", "init", "-q", "-b", "main")
    return project


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("made", [own_folder, clone])
def test_a_comment_runs_nothing_again_and_a_version_its_stage_and_what_follows(made, tmp_path):
    project = made(tmp_path)
    furnish(project, tmp_path, make_tiny_model(tmp_path / "tiny"), texts=600)
    assert project.repro().ran == ALL
    imported = project.run(
        sys.executable, "-c", "import stages.evaluate; print(stages.evaluate.__file__)"
    )
    module = project.code / "stages/evaluate.py"
    assert imported.output.strip() == str(module)

    source = module.read_text()
    module.write_text(f"# A remark.\n{source}")
    ended = project.repro()
    assert ended.ran == {"check"}
    assert ended.skipped == ALL - {"check"}

    raised, count = re.subn(
        r"^VERSION = (\d+)", lambda m: f"VERSION = {int(m[1]) + 1}", source, flags=re.MULTILINE
    )
    assert count == 1
    module.write_text(raised)
    ended = project.repro()
    evaluated = {stage for stage in ALL if stage.startswith("evaluate")}
    assert len(evaluated) == 5
    # The speeds are measured again, so what reads the metrics runs, too.
    assert ended.ran == {"check", *evaluated, "export", "report"}
