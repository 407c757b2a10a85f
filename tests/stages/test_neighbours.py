"""A file for each recipe that changes only with what its students read."""

import json

from pipeline.settings import load_params
from stages import neighbours
from stages.params import PretrainParams
from storage.manifest import Manifest
from storage.store import Object
from tests.pipeline.test_house import ROOT


def mined(sha256):
    made = Object(key=f"negatives/{'0' * 40}/000000.arrow", rows=3, bytes=99, sha256=sha256)
    return Manifest(kind="negatives", recipe={}, parent="0" * 40, objects=(made,))


def test_only_files_of_recipes_that_read_neighbours_follow_the_mining(tmp_path):
    recipes = load_params(ROOT / "params.yaml").recipes
    some = {name: recipes[name] for name in ("kd", "ckd", "kd_ckd", "disco_ckd")}

    def files(negatives):
        neighbours.run(some, negatives=negatives, out=tmp_path / "out")
        return {path.stem: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    first, second = mined("0" * 64), mined("1" * 64)
    before, after = files(first), files(second)
    assert before.keys() == some.keys()
    assert {name for name in some if before[name] != after[name]} == {"ckd", "kd_ckd"}
    assert json.loads(before["ckd"]) == {"negatives": first.content}
    assert json.loads(before["kd"]) == {"negatives": None}
    some.pop("kd_ckd")
    assert files(second).keys() == some.keys()


def test_a_recipe_that_reads_mixes_names_those_and_no_other_recipe_changes(tmp_path):
    recipes = {
        name: load_params(ROOT / "params.yaml").recipes[name] for name in ("kd", "ckd", "mixes")
    }

    def files(mixes):
        neighbours.run(recipes, negatives=mined("0" * 64), mixes=mixes, out=tmp_path / "out")
        return {path.stem: json.loads(path.read_bytes()) for path in (tmp_path / "out").iterdir()}

    first, second = mined("1" * 64), mined("2" * 64)
    assert files(first)["mixes"] == {"negatives": None, "mixes": first.content}
    assert files(second)["mixes"] == {"negatives": None, "mixes": second.content}
    assert files(None)["mixes"] == {"negatives": None, "mixes": None}
    assert {name: found for name, found in files(first).items() if name != "mixes"} == {
        name: found for name, found in files(second).items() if name != "mixes"
    }
    assert files(first)["kd"] == {"negatives": None}


def test_a_recipe_that_reads_labels_follows_the_triplets_and_no_other_reads_a_file(tmp_path):
    recipes = dict(load_params(ROOT / "params.yaml").recipes)
    some = {"kd": recipes["kd"], "warmup": recipes["warmup"]}

    def files(recipes, labelled):
        out = tmp_path / "out"
        neighbours.run(recipes, negatives=mined("0" * 64), labelled=labelled, out=out)
        return {path.stem: json.loads(path.read_bytes()) for path in out.iterdir()}

    def unreadable():
        raise AssertionError("nobody reads labels")

    assert files(some, unreadable)["warmup"] == {"negatives": mined("0" * 64).content}
    labelled = PretrainParams(share=0.1, triplets="labelled")
    some["labelled"] = recipes["warmup"].model_copy(update={"pretrain": labelled})
    first = files(some, lambda: [("a", "b", "c"), ("d", "e", "f")])
    second = files(some, lambda: [("a", "b", "c"), ("d", "e", "g")])
    assert first["labelled"].keys() == {"negatives", "labelled"}
    assert first["labelled"]["negatives"] is None
    assert first["labelled"]["labelled"] != second["labelled"]["labelled"]
    assert {**first, "labelled": None} == {**second, "labelled": None}
