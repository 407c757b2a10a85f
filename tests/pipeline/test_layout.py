"""Outputs lie in the work tree; what stands in their own place is replaced, never followed."""

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.layout import Layout, NamedOutput, Output
from pipeline.workspace import Workspace
from storage.errors import TeachonceError
from tests.conftest import shipped_settings

ROOT = Path(__file__).parents[2]
NAMED = (
    "start",
    "model",
    "stage_facts",
    "start_facts",
    "training",
    "curve",
    "metrics",
    "details",
    "mteb",
    "exported",
    "formats",
)
FIXED = (
    "sources",
    "versions",
    "raw",
    "corpus",
    "readings",
    "split",
    "embeddings",
    "mixes",
    "negatives",
    "neighbours",
    "documents",
    "export",
    "page",
    "report",
    "work",
    "tracking",
    "hashes",
)


def outputs(at):
    """Every path that a stage writes: name -> how to ask for it."""
    found = {name: lambda name=name: getattr(at, name) for name in FIXED}
    return found | {name: lambda name=name: getattr(at, name)("kd") for name in NAMED}


def test_every_output_is_known_here():
    of_class = vars(Layout).items()
    properties = {name for name, value in of_class if isinstance(value, property | Output)}
    methods = {
        name
        for name, value in of_class
        if isinstance(value, NamedOutput) or (callable(value) and not name.startswith("_"))
    }
    assert properties - {"params", "project", "manifests"} == set(FIXED)
    assert methods == set(NAMED)


@pytest.mark.parametrize("name", sorted({*FIXED, *NAMED} - {"export"}))
def test_an_output_whose_folder_leads_out_of_the_work_tree_is_refused(tmp_path, name):
    at = Layout(tmp_path / "tree")
    path = outputs(at)[name]()
    folder = path if name == "work" else path.parent
    folder.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to("../" * len(folder.relative_to(tmp_path).parents[:-1]) + "elsewhere")
    with pytest.raises(TeachonceError, match=f"^{folder}: leads to {tmp_path}/elsewhere, out of "):
        outputs(at)[name]()
    folder.unlink()
    folder.write_bytes(b"")
    with pytest.raises(TeachonceError, match=f"^{folder}: a file, where a folder is needed"):
        outputs(at)[name]()
    folder.unlink()
    folder.symlink_to("nothing")
    with pytest.raises(
        TeachonceError, match=f"^{folder}: a link to nothing .*, where a folder is "
    ):
        outputs(at)[name]()


def test_a_folder_that_is_a_link_within_the_work_tree_is_all_right(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "models").symlink_to("big")
    assert Layout(tmp_path).model("kd") == tmp_path / "models/kd"
    (tmp_path / "tree").symlink_to(tmp_path)  # and so is a link to the work tree
    assert Layout(tmp_path / "tree").model("kd") == tmp_path / "tree/models/kd"


def test_a_link_in_the_place_of_an_output_is_all_right_and_a_folder_in_that_of_a_file_is_not(
    tmp_path,
):
    """DVC makes links to its cache there (`cache.type: symlink`)."""
    at = Layout(tmp_path)
    for name, ask in outputs(at).items():
        if name != "work":
            ask().parent.mkdir(parents=True, exist_ok=True)
            ask().symlink_to("/elsewhere")
            assert ask().is_symlink(), name
    at.corpus.unlink()
    (tmp_path / "data/corpus.json").mkdir()
    with pytest.raises(TeachonceError, match=r"corpus.json: a folder, where a file is needed"):
        at.corpus  # noqa: B018 - it is asked for


def test_a_stage_is_refused_before_it_begins(tmp_path, monkeypatch):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "data").symlink_to("/")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEACHONCE_STORE", str(tmp_path / "store"))
    for command in (["check"], ["docs"], ["shard"], ["embed"], ["evaluate", "teacher"]):
        failed = CliRunner().invoke(app, command).exception
        assert isinstance(failed, TeachonceError), command
        assert str(failed).startswith(f"{tmp_path}/data: leads to /, out of the work tree"), command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "params.yaml"]


def test_a_project_is_called_by_its_folder_also_in_an_experiment(tmp_path):
    assert Layout(tmp_path / "sentences").project == "sentences"
    assert Layout(tmp_path / "sentences/.dvc/tmp/exps/tmpk2x").project == "sentences"
    assert Layout(Path("/")).project == "/"


def test_what_models_are_made_of_is_told_in_a_few_words(tmp_path):
    settings = shipped_settings()
    whole = {"from": "some/model", "layers": None, "pooling": None}
    table = {"from": "teacher", "layers": None, "kind": "static", "hidden": 8}
    half = settings["starts"]["half"]
    settings["starts"] = {"half": half, "whole": whole, "table": table}
    settings["starts"]["tiny"] = half | {"vocabulary": 9000}
    settings["starts"]["new"] = {"from": None, "layers": 2, "like": "some/model"}
    settings["students"] = {
        "kd": {"recipe": "kd", "start": "half"},
        "small": {"recipe": "ckd", "start": "whole"},
    }
    settings["finetune"]["students"] = ["kd"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    layers = ", ".join(map(str, settings["starts"]["half"]["layers"]))
    assert Workspace(tmp_path).made_of() == {
        "half": f"layers {layers} of teacher",
        "whole": "all layers of some/model",
        "table": "a table of tokens of teacher",
        "tiny": f"layers {layers} of teacher, fewer tokens",
        "new": "2 layers like some/model, drawn at random",
        "kd": f"recipe kd, start half (layers {layers} of teacher)",
        "small": "recipe ckd, start whole (all layers of some/model)",
        "kd-finetuned": "kd, then labelled rows",
    }
