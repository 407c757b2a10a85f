"""A file for each recipe that changes only with what its students read."""

import json

from pipeline.settings import load_params
from stages import neighbours
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
