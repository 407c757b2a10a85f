"""What a person gets who installs the wheel: the whole package, nothing else, and quick help."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.pipeline.test_house import COMMANDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "stages", "storage", "teachonce")
# Enough for the help and for a message about a missing params.yaml; torch and its kind are not.
LIGHT = ("numpy", "pyarrow", "pydantic", "pyyaml", "rich", "typer", "zstandard")


def run(*words, folder=None):
    """The command, with nothing of this process's Python around it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        list(map(str, words)), cwd=folder, env=clean, capture_output=True, text=True
    )


def done(*words, folder=None):
    ended = run(*words, folder=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def copy_sources(folder):
    """What a wheel is built from, and the tests, which must not get into it."""
    for name in (*PACKAGES, "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "params.yaml", "dvc.yaml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves a build folder in the one it builds from.

    Without isolation, which would fetch setuptools: torch has brought one.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy_sources(source)
    quick = ("--no-deps", "--no-build-isolation")
    done(sys.executable, "-m", "pip", "wheel", "-q", *quick, "-w", folder, source)
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of commands of a new environment that has the wheel and what its help needs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    pip = (folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check")
    done(*pip, "-c", ROOT / "constraints.txt", *LIGHT)
    done(*pip, "--no-deps", wheel)
    return folder / "bin"


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    data = {"pipeline/template/params.yaml", "pipeline/template/dvc.yaml"}
    data |= {f"{package}/py.typed" for package in PACKAGES}
    data |= {f"stages/reporting/templates/{name}" for name in ("card.md", "page.html", "style.css")}
    assert names == modules | data


def test_help_needs_nothing_heavy(installed, tmp_path):
    """Neither torch nor transformers is there, so nobody waits for them."""
    ended = done(installed / "teachonce", "--help", folder=tmp_path)
    found = [word for word in re.findall(r"│ (\w+) ", ended.stdout) if word in COMMANDS]
    assert found == COMMANDS


def test_the_door_for_python_opens(installed, tmp_path):
    code = (
        "import teachonce\ntry: teachonce.open('.')\nexcept teachonce.MissingError as e: print(e)"
    )
    ended = done(installed / "python", "-c", code, folder=tmp_path)
    assert ended.stdout.startswith(f"{tmp_path}: no project: there is no params.yaml\n  cure: ")


@pytest.mark.parametrize("command", ["check", "embed"])
def test_a_folder_without_settings_is_told_so(installed, tmp_path, command):
    ended = run(installed / "teachonce", command, folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        f"error: {tmp_path / 'params.yaml'}: not there\n"
        "  cure: run this in a folder that has a params.yaml\n"
    )


def test_init_writes_the_repositorys_settings_and_stages(installed, tmp_path):
    ended = done(installed / "teachonce", "init", "project", folder=tmp_path)
    for name in ("params.yaml", "dvc.yaml"):
        assert (tmp_path / "project" / name).read_bytes() == (ROOT / name).read_bytes()
    assert ended.stdout.startswith(
        "init: a new project of 5 files\n  -> project\n  next: go there, "
    )
