"""Mixes in a work tree: the commands that look after a store treat them as any other column."""

import shutil

import pytest
import yaml

from pipeline.commands import ls, repair, transfer, verify
from pipeline.settings import examine
from pipeline.workspace import Workspace
from storage.remote import Remote
from storage.store import Store
from tests.conftest import MixingTeacher, sentences
from tests.pipeline.test_upkeep import (
    Tree,
    again,
    collect,
    flip_a_value,
    make_older,
    repaired,
    states,
    teachonce,
    write_params,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A work tree after embed, with a mix for every other text."""
    root = tmp_path_factory.mktemp("finished")
    write_params(root, embed__mixes=0.5)
    (root / "texts.txt").write_text("\n".join(sentences(120)))
    tree = Tree(root, MixingTeacher())
    tree.shard()
    tree.embed()
    return root


@pytest.fixture
def tree(finished, tmp_path):
    return Tree(shutil.copytree(finished, tmp_path / "tree"), MixingTeacher())


def test_a_flipped_value_is_found_and_made_anew(tree):
    before, manifests = tree.files(), tree.manifests()
    flip_a_value(tree, "mixes", 1)
    outcome = verify.run(again(tree), read_data=True)
    assert states(outcome) == [("damaged", tree.path("mixes", 1).name)]
    assert "teachonce repair" in outcome.facts["problems"][0]["cure"]
    outcome = repaired(again(tree, MixingTeacher()))
    assert outcome.facts["made"] == {
        "corpus": [],
        "embeddings": [],
        "mixes": [tree.keys("mixes")[1]],
    }
    assert "made again: 1 of mixes" in outcome.summary
    assert (tree.files(), tree.manifests()) == (
        before | {p: c for p, c in tree.files().items() if p.parts[0] == "quarantine"},
        manifests,
    )


def test_lost_mixes_are_not_made_with_another_share(tree):
    tree.path("mixes").unlink()
    write_params(tree.at.root, embed__mixes=0.25)
    _, failure = repair.run(again(tree, MixingTeacher()))
    assert "made with other settings than those of now (mixes.share)" in str(failure)
    write_params(tree.at.root, embed__mixes=0)
    _, failure = repair.run(again(tree, MixingTeacher()))
    assert "so its 1 lost objects cannot be made again" in str(failure)


def test_a_remote_carries_mixes_to_another_store(tree, tmp_path):
    (tmp_path / "remote").mkdir()
    remote = Remote(str(tmp_path / "remote"))
    count = 3 * len(tree.keys("corpus"))
    outcome = transfer.push(Workspace.manifests(tree), store=tree.store, remote=remote)
    assert outcome.facts["objects_moved"] == count
    there = Store(tmp_path / "there")
    outcome = transfer.pull(Workspace.manifests(tree), store=there, remote=remote)
    assert outcome.facts["objects_moved"] == count
    for entry in tree.manifest("mixes").objects:
        assert there.open(entry).equals(tree.store.open(entry))


def test_gc_keeps_mixes_as_long_as_a_manifest_names_them(tree):
    make_older(tree.store.root, 30)
    tree.manifest("mixes").write_ref(tree.at.mixes, tree.store)
    mixes = [key for key in tree.files() if key.parts[0] == "mixes"]
    collect(tree.store.root, delete=True)
    assert [key for key in tree.files() if key.parts[0] == "mixes"] == mixes

    write_params(tree.at.root, embed__mixes=0)
    other = again(tree, MixingTeacher())
    other.embed()
    assert other.manifest("mixes").objects == ()
    refs = (tree.store.root / "refs").glob("*")
    for ref in [path for path in refs if b'"mixes"' in path.read_bytes()]:
        ref.unlink()
    make_older(tree.store.root, 30)
    collect(tree.store.root, delete=True)
    assert {key.parts[0] for key in tree.files()} == {"text", "vectors"}


def test_ls_shows_mixes_and_their_settings(tree):
    outcome = ls.run(tree.store.root)
    group = next(g for g in outcome.facts["groups"] if g["kind"] == "mixes")
    assert (group["objects"], group["orphans"]) == (len(tree.keys("mixes")), 0)
    assert group["rows"] == tree.manifest("mixes").rows
    shown = "\n".join(ls.lines(outcome.facts))
    assert "'share': 0.5" in shown


def test_a_work_tree_of_before_there_were_mixes_has_none(tree):
    """Its manifests are committed, data/mixes.json is not there: nothing asks for it."""
    root = tree.at.root
    write_params(root, embed__mixes=0)
    tree.at.mixes.unlink()
    shutil.rmtree(tree.store.root / "mixes")
    tree = again(tree)
    assert verify.run(tree, read_data=True).facts["sound"]
    outcome, failure = repair.run(tree)
    assert (failure, outcome.facts["missing"]) == (None, {"corpus": [], "embeddings": []})
    with pytest.raises(Exception, match=r"mixes\.json: not there\n  cure: run `teachonce embed`"):
        tree.caches(with_negatives=False, with_mixes=True)


def problems(root, **changes):
    content = yaml.safe_load((root / "params.yaml").read_text())
    for address, value in changes.items():
        section, name = address.split("__")
        content[section][name] = value
    (root / "params.yaml").write_text(yaml.safe_dump(content))
    return dict(examine(root / "params.yaml")[1])


def test_settings_that_contradict_each_other_are_told_with_a_cure(tree):
    root = tree.at.root
    mixing = {"kd": {"recipe": "mixes", "start": "half"}, "ckd": {"recipe": "ckd", "start": "half"}}
    assert problems(root, students__kd=mixing["kd"]) == {}
    found = problems(root, embed__mixes=0)
    assert found == {
        "students.kd.recipe": "mixes reads mixes, and embed.mixes is 0: set that one to 0.5, say"
    }
    found = problems(root, embed__mixes=0.5, embed__long_texts="windows")
    assert "not in windows" in found["embed.mixes"]
    found = problems(root, embed__teacher="imported:mine", embed__long_texts="cut")
    assert "imported vectors have no teacher that could read mixes" in found["embed.mixes"]
    found = problems(root, embed__mixes=1.5)
    assert found["embed.mixes"] == "must be less than or equal to 1.0, got 1.5"


def test_distill_names_the_cure_where_there_are_no_mixes(tree):
    root = tree.at.root
    write_params(root, embed__mixes=0)
    again(tree, MixingTeacher()).embed()
    with pytest.raises(
        Exception, match=r"(?s)names no mixes.*set embed.mixes to 0.5, say, and run"
    ):
        again(tree).caches(with_negatives=False, with_mixes=True)
    assert teachonce(root, "ls").returncode == 0
