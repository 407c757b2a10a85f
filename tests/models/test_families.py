"""Each family goes all the way: a start, ten steps, an export, ONNX, and libraries of two years ago.

What came of it must be what the table of families on the page says.
"""

import json
import subprocess
import sys
import venv
from functools import cache

import numpy as np
import pytest
import torch

from stages import export, start
from stages.models.encoder import Encoder
from stages.models.loading import load_model
from stages.models.onnx import run_onnx
from stages.params import StartParams
from stages.vectors import row_cosines
from storage.errors import TeachonceError
from tests.conftest import Place, exporting, sentences
from tests.models.families import FAMILIES, make_family, make_tokenizer, table
from tests.stages.test_distill import World, recipe
from tests.stages.test_export import load_with

CPU = torch.device("cpu")
TEXTS = [*sentences(8, seed=5), "x", " ".join(sentences(20))]


def test_the_table_has_each_family_once():
    assert list(table()) == list(FAMILIES)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Family -> the World that it was taught in: its own first layers, after ten steps."""
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")

    @cache
    def teach(family):
        root = tmp_path_factory.mktemp("family")
        teacher = make_family(root / "teacher", tokenizer, family)
        params = StartParams.model_validate({"from": "teacher", "layers": [0, 1]})
        made = root / "start"
        start.run(params, name="half", folder=teacher, trust_remote_code=False, out=made)
        world = World(Place(root), teacher, made)
        world.train(recipe(epochs=1, batch_size=35))
        return world

    return teach


@cache
def exported(world, onnx):
    out = world.place.root / f"export-{onnx}"
    folder = world.place.root / "student"
    export.run(
        folder=folder,
        lineage=json.loads((folder / "teachonce.json").read_bytes()),
        metrics={},
        facts={},
        **exporting(out, "safetensors", *(["onnx"] if onnx else [])),
    )
    return out


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_distilled(family, student):
    world = student(family)
    folders = [world.place.root / name for name in ("teacher", "start", "student")]
    teacher, before, after = (Encoder(folder, device=CPU).encode(TEXTS) for folder in folders)
    facts = json.loads((world.place.root / "student.json").read_bytes())
    assert facts["steps"] == 10
    nearer = row_cosines(after, teacher).mean() > row_cosines(before, teacher).mean() + 0.01
    assert table()[family]["distilled"] == ("yes" if nearer else "no")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exported(family, student):
    from sentence_transformers import SentenceTransformer

    world = student(family)
    own = load_model(world.place.root / "student", device=CPU)
    vectors = np.concatenate([own.encode([text]) for text in TEXTS])
    loaded = SentenceTransformer(str(exported(world, onnx=False)), device="cpu")
    assert np.allclose(loaded.encode(TEXTS), vectors, atol=1e-5)
    assert table()[family]["exported"] == "yes"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_as_onnx(family, student):
    world = student(family)
    try:
        out = exported(world, onnx=True)
    except TeachonceError as error:
        assert table()[family]["ONNX"] == "no", error
        return
    own = load_model(world.place.root / "student", device=CPU)
    made = run_onnx(out / "onnx" / "model.onnx", own, TEXTS)
    assert np.allclose(made, own.encode(TEXTS), atol=1e-5)
    assert table()[family]["ONNX"] == "yes"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_families_with_libraries_of_two_years_ago(student, tmp_path):
    """What the card of an export says of them is so."""
    folders = {family: exported(student(family), onnx=False) for family in FAMILIES}
    read = {
        family: "Needs sentence-transformers 3.4 or newer" in (folder / "README.md").read_text()
        for family, folder in folders.items()
    }
    assert {family: row["older"] == "yes" for family, row in table().items()} == read
    venv.create(tmp_path / "old", with_pip=True)
    pip = (tmp_path / "old/bin/python", "-m", "pip", "install", "-q")
    pins = ("sentence-transformers==3.4.1", "transformers==4.57.6", "torch==2.13.0")
    subprocess.run([*pip, "--disable-pip-version-check", *pins], check=True)
    those = [folder for family, folder in folders.items() if read[family]]
    now = load_with(sys.executable, those, tmp_path / "now")
    old = load_with(tmp_path / "old/bin/python", those, tmp_path / "then")
    for folder, ours, theirs in zip(those, now, old, strict=True):
        assert row_cosines(ours, theirs).min() >= 0.99999, folder
