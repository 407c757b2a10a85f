"""`teachonce init`, and what runs again when the code changes: in a folder of one's own and in a clone."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml

from pipeline.commands.init import run, template
from storage.errors import TeachonceError
from tests.conftest import make_tiny_model
from tests.pipeline.test_dvc import ALL, ROOT, Project, furnish
from tests.pipeline.test_install import copy_sources


def test_init_makes_a_new_folder(tmp_path):
    outcome = run(tmp_path / "a/project")
    names = sorted(path.name for path in (tmp_path / "a/project").iterdir())
    assert names == [".dvcignore", ".gitignore", "README.md", "dvc.yaml", "params.yaml"]
    assert sorted(outcome.facts["files"]) == names
    for name in ("params.yaml", "dvc.yaml"):
        assert (tmp_path / "a/project" / name).read_bytes() == (ROOT / name).read_bytes()
        assert template(name) == (ROOT / name).read_bytes()


def outputs(*, cached):
    """The outputs in dvc.yaml that DVC keeps in its cache, or that are for Git."""
    kinds = ("outs", "metrics", "plots")
    text = re.sub(r"\$\{(item|key)\}", "name", (ROOT / "dvc.yaml").read_text())
    for stage in yaml.safe_load(text)["stages"].values():
        stage = stage.get("do", stage)
        for entry in (entry for kind in kinds for entry in stage.get(kind, [])):
            path, options = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
            if options.get("cache", True) == cached:
                yield path


@pytest.mark.parametrize("made", ["a clone", "a new folder"])
def test_all_outputs_but_those_for_git_are_ignored_before_dvc_does_it(tmp_path, made):
    """DVC takes its own entries in .gitignore back when a run fails, and adds none that are there."""
    if made == "a clone":
        shutil.copy(ROOT / ".gitignore", tmp_path)
    else:
        run(tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)

    def ignored(paths):
        words = ["git", "-C", str(tmp_path), "check-ignore", "--no-index", *paths]
        return subprocess.run(words, capture_output=True, text=True).stdout.split()

    for_dvc, for_git = [*outputs(cached=True)], [*outputs(cached=False)]
    assert {"data/raw", "models/start/name", "models/name", "export"} <= {*for_dvc}
    assert {"data/embeddings.json", "reports/metrics/name.json"} <= {*for_git}
    assert ignored([*for_dvc, "work/hashes.json"]) == [*for_dvc, "work/hashes.json"]
    assert ignored([*for_git, "dvc.lock", "params.yaml", "texts/models/a.txt"]) == []


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


def init(folder):
    """A folder of `teachonce init` with the teachonce of this repository."""
    project = Project(folder / "project", folder / "store")
    project.root.mkdir()
    project.run("teachonce", "init", ".")
    project.run("git", "init", "-q", "-b", "main")
    project.run("dvc", "init", "-q")
    return project


def only_pretend(project):
    """Let every stage but `check` leave its outputs without making them: it is DVC that is looked at."""
    content = yaml.safe_load((project.root / "dvc.yaml").read_text())
    for name, stage in content["stages"].items():
        stage = stage.get("do", stage)
        if name == "check":
            continue
        outputs = [
            next(iter(entry)) for kind in ("metrics", "plots") for entry in stage.get(kind, [])
        ]
        folders = [entry for entry in stage.get("outs", []) if isinstance(entry, str)]
        for entry in stage.get("outs", []):
            if isinstance(entry, dict):
                [(path, how)] = entry.items()
                # What goes into Git is a file; what DVC caches, a folder.
                (outputs if how.get("cache") is False else folders).append(path)
        outputs += [f"{folder}/weights" for folder in folders]
        if name == "neighbours":  # a folder with a file for each recipe
            recipes = yaml.safe_load((project.root / "params.yaml").read_text())["recipes"]
            outputs = [f"data/neighbours/{recipe}.json" for recipe in recipes]
        stage["cmd"] = [f"mkdir -p $(dirname {path}) && echo {{}} > {path}" for path in outputs]
    (project.root / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("made", [init, clone])
def test_dvc_changes_no_ignore_file_and_git_takes_no_bulk_data(made, tmp_path):
    project = made(tmp_path)
    furnish(project, tmp_path, make_tiny_model(tmp_path / "tiny"), texts=600)
    only_pretend(project)
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "before")
    before = {path: path.read_bytes() for path in project.root.rglob(".gitignore")}

    def new():
        """What is not in Git and not ignored; no tracked file may have changed."""
        assert {path: path.read_bytes() for path in project.root.rglob(".gitignore")} == before
        lines = project.run("git", "status", "--porcelain", "-uall").output.splitlines()
        assert {line[:3] for line in lines} == {"?? "}
        return {line[3:] for line in lines}

    # The last stage fails, when all weights are there.
    whole = (project.root / "dvc.yaml").read_text()
    broken = yaml.safe_load(whole)
    broken["stages"]["report"]["cmd"] = "false"
    (project.root / "dvc.yaml").write_text(yaml.safe_dump(broken, sort_keys=False))
    project.run("git", "commit", "-qam", "broken")
    assert project.attempt("dvc", "repro").code != 0
    bulk = ("data/raw", "data/documents", "models/start/half", "models/kd", "export")
    assert all((project.root / folder / "weights").is_file() for folder in bulk)
    assert not [name for name in new() if name.startswith(("models", "export", *bulk))]

    (project.root / "dvc.yaml").write_text(whole)
    project.run("git", "commit", "-qam", "mended")
    project.repro()
    assert "dvc.lock" in new()
    assert {name.partition("/")[0] for name in new()} == {"data", "reports", "dvc.lock"}
    assert not [name for name in new() if name.startswith(bulk)]


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
