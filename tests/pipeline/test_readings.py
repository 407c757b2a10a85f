"""Readings in a work tree: upkeep treats them as any other column, and every stage knows them."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands import ls, repair, transfer, verify
from pipeline.settings import load_params
from pipeline.workspace import Workspace
from stages import shard
from stages.params import SettingsError
from storage.column import text_keys_of
from storage.errors import MissingError
from storage.remote import Remote
from storage.store import Store
from storage.tokens import put_tokens
from tests.conftest import HashTeacher, sentences
from tests.pipeline.test_settings import change_settings, run_check
from tests.pipeline.test_settings import project as project
from tests.pipeline.test_upkeep import (
    TOKENIZER,
    Tree,
    again,
    collect,
    flip_a_value,
    make_older,
    repaired,
    states,
    write_params,
)
from tests.processes import furnish


class TreeOfReadings(Tree):
    def shard(self):
        super().shard()
        shard.run(
            self.params.shard,
            root=self.at.root,
            store=self.store,
            out=self.at.corpus,
            facts=self.at.stage_facts("shard"),
            distill=self.params.distill,
            readings=self.at.readings,
        )


def write_pairs(root, texts):
    (root / "pairs.tsv").write_text("".join(f"{text}\tein {text}\n" for text in texts))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A work tree after embed, with a reading of every text and its token ids."""
    root = tmp_path_factory.mktemp("finished")
    write_params(root, distill__readings=["pairs.tsv"])
    (root / "texts.txt").write_text("\n".join(sentences(120)))
    write_pairs(root, sentences(120))
    tree = TreeOfReadings(root, HashTeacher())
    tree.shard()
    tree.embed()
    readings = tree.readings(tree.corpus())
    for number in range(len(readings.objects)):
        put_tokens(
            tree.store,
            f"tokens/{TOKENIZER}/{readings.shard_digest(number)}.arrow",
            ids=[[[1, 2, 3]] * readings.objects[number].rows],
            text_keys=text_keys_of(readings.batch(number)),
        )
    return root


@pytest.fixture
def tree(finished, tmp_path):
    return TreeOfReadings(shutil.copytree(finished, tmp_path / "tree"), HashTeacher())


def test_a_flipped_value_is_found_and_made_anew(tree):
    before, manifests = tree.files(), tree.manifests()
    flip_a_value(tree, "readings", 1)
    outcome = verify.run(again(tree), read_data=True)
    assert states(outcome) == [("damaged", tree.path("readings", 1).name)]
    outcome = repaired(again(tree, HashTeacher()))
    assert outcome.facts["made"]["readings"] == [tree.keys("readings")[1]]
    assert "made again: 1 of readings" in outcome.summary
    assert tree.manifests() == manifests
    assert {name: content for name, content in tree.files().items() if name in before} == before


def test_damaged_token_ids_of_readings_are_found(tree):
    path = next((tree.store.root / "tokens").rglob("*.arrow"))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-50])
    assert states(verify.run(again(tree), read_data=True)) == [("damaged", path.name)]


def test_lost_readings_of_changed_files_are_told(tree):
    lost = tree.keys("readings")
    for key in lost:
        tree.store.path(key).unlink()
    write_pairs(tree.at.root, sentences(119))
    _, failure = repair.run(again(tree, HashTeacher()))
    assert isinstance(failure, MissingError)
    assert "of its shards of texts or readings are lost, and the sources have changed" in str(
        failure
    )


def test_a_remote_carries_readings_to_another_store(tree, tmp_path):
    (tmp_path / "remote").mkdir()
    remote = Remote(str(tmp_path / "remote"))
    transfer.push(Workspace.manifests(tree), store=tree.store, remote=remote)
    there = Store(tmp_path / "there")
    transfer.pull(Workspace.manifests(tree), store=there, remote=remote)
    for entry in tree.manifest("readings").objects:
        assert there.open(entry).equals(tree.store.open(entry))


def test_gc_keeps_readings_and_their_token_ids_as_long_as_a_manifest_names_them(tree):
    kinds = {"text", "vectors", "readings", "tokens"}
    make_older(tree.store.root, 30)
    collect(tree.store.root, delete=True)
    assert {key.parts[0] for key in tree.files()} == kinds

    write_params(tree.at.root)
    other = TreeOfReadings(tree.at.root, HashTeacher())
    other.shard()
    assert other.manifest("readings").objects == ()
    refs = (tree.store.root / "refs").glob("*")
    for ref in [path for path in refs if b'"readings"' in path.read_bytes()]:
        ref.unlink()
    make_older(tree.store.root, 30)
    collect(tree.store.root, delete=True)
    assert {key.parts[0] for key in tree.files()} == kinds - {"readings", "tokens"}


def test_ls_counts_readings_and_their_token_ids(tree):
    groups = {group["kind"]: group for group in ls.run(tree.store.root).facts["groups"]}
    for kind in ("readings", "tokens"):
        assert groups[kind]["rows"] == 120
        assert groups[kind]["orphans"] == 0


def test_a_work_tree_of_before_there_were_readings_has_none(tree):
    tree.at.readings.unlink()
    tree = again(tree)
    assert tree.readings(tree.corpus()) is None
    with pytest.raises(
        MissingError, match=r"readings\.json: names no readings\n  cure: name files"
    ):
        tree.caches(with_negatives=False, with_readings=True)


# --- settings ---------------------------------------------------------------------------------------


def named(pairs, *, recipe="readings"):
    def change(content):
        content["distill"] = {"readings": pairs}
        content["students"] = {"bilingual": {"recipe": recipe, "start": "half"}}
        content["finetune"]["students"] = []
        content["export"]["model"] = "bilingual"

    return change


@pytest.mark.parametrize(
    ("pairs", "address", "said"),
    [
        ([], "students.bilingual.recipe", "distill.readings names none: name files there"),
        (["s3://a/b"], "distill.readings.0", "a URL"),
        ([{"files": "a.tsv"}], "distill.readings.0.role", "is missing"),
        ([{"files": "a", "role": "text", "field": "x"}], "distill.readings.0.field", "no such"),
        (7, "distill.readings", "must be a list"),
    ],
)
def test_wrong_settings_are_named_by_their_place(project, pairs, address, said):
    change_settings(project, named(pairs))
    with pytest.raises(SettingsError) as failed:
        load_params(project / "params.yaml")
    assert said in dict(failed.value.problems)[address]


@pytest.mark.parametrize("share", [-0.1, 1.5, "half"])
def test_a_share_is_one(project, share):
    change_settings(project, named("pairs.tsv", recipe="kd"))
    change_settings(project, lambda content: content["recipes"]["kd"].update(readings=share))
    with pytest.raises(SettingsError) as failed:
        load_params(project / "params.yaml")
    assert "recipes.kd.readings" in dict(failed.value.problems)


def test_check_reads_the_beginning_of_each_file_and_notes_its_hash(project):
    texts = sentences(300)
    change_settings(project, named("pairs.tsv"))
    with pytest.raises(SettingsError, match=r"distill.readings: 'pairs.tsv' matches no file"):
        run_check(project)
    (project / "pairs.tsv").write_text("source\ttarget\na text\tein Text\n")
    with pytest.raises(SettingsError, match="no row gives texts under text and reading"):
        run_check(project)
    write_pairs(project, texts)
    run_check(project)
    found = json.loads((project / "data/sources.json").read_bytes())
    assert [name for name, _ in found["shard"]["files"]] == ["a.txt", "pairs.tsv"]
    assert found["shard"]["declared"]["readings"] == ["pairs.tsv"]
    assert found["readings"] == {
        name: name == "readings" for name in load_params(project / "params.yaml").recipes
    }
    before = found["shard"]
    write_pairs(project, texts[1:])
    run_check(project)
    assert json.loads((project / "data/sources.json").read_bytes())["shard"] != before


def test_readings_of_queries_have_what_queries_have(project):
    change_settings(project, named([{"files": "pairs.tsv", "role": "query"}]))
    change_settings(project, lambda content: content["embed"].update(mixes=0.5))
    with pytest.raises(SettingsError) as failed:
        load_params(project / "params.yaml")
    said = dict(failed.value.problems)["embed.mixes"]
    assert said == "0.5, but distill.readings has roles (query): set it to 0"


@pytest.mark.slow
def test_from_files_to_the_table(tmp_path, monkeypatch, tiny_model):
    """Every stage as it is typed: `shard` adds texts, `distill` learns, `evaluate` measures."""
    furnish(tmp_path, tiny_model, recipes={"kd": {"epochs": 1}}, finetune={"students": []})
    texts = sentences(900, seed=3)
    write_pairs(tmp_path, texts)
    change_settings(tmp_path, named("pairs.tsv"))
    change_settings(
        tmp_path, lambda content: content["recipes"]["readings"].update(epochs=2, max_tokens=16)
    )
    monkeypatch.chdir(tmp_path)

    def typed(*words):
        ended = CliRunner().invoke(app, [*words, "--json"])
        assert ended.exit_code == 0, (words, ended.output, ended.exception)
        return json.loads(ended.stdout)["facts"]

    assert typed("shard")["added"] > 800
    for words in ("split", "embed", "mine", "neighbours"):
        typed(words)
    read = json.loads((tmp_path / "data/neighbours/readings.json").read_bytes())
    assert read["readings"] == Workspace(tmp_path).manifest("readings").content
    assert typed("distill", "bilingual")["readings"] > 700
    for model in ("teacher", "half", "bilingual"):
        metrics = typed("evaluate", model)
        assert 50 < metrics["readings.pairs"] < 120
        assert ("readings.cosine" in metrics) == (model != "half")
    typed("report")
    page = (tmp_path / "reports/index.html").read_text()
    assert "reading to text" in page.replace("\n", " ")
    assert "readings (" not in page
