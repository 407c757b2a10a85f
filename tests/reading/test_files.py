"""What settings name by globs: nothing that matches is left out in silence, and nothing hangs."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from glob import glob
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyarrow import ipc, parquet

from pipeline.commands import diff
from pipeline.settings import load_params
from stages.check import RememberedHashes
from stages.measuring.documents import read_documents
from stages.models import folder as model_folder
from stages.models.config import read_object
from stages.models.lineage import read_lineage
from stages.reading.corpus_files import read, source_files
from stages.reading.evaluation_sets import beir_files, read_sts, sts_files
from stages.reading.records import LabelledFile
from stages.reading.triplets import triplet_files
from stages.reporting.results import (
    read_curve,
    read_details,
    read_exports,
    read_metrics,
    read_training,
)
from stages.teaching import vector_files
from storage.errors import MissingError, TeachonceError
from storage.manifest import Manifest
from tests.conftest import shipped_settings
from tests.pipeline.test_settings import make_model

ROOT = Path(__file__).parents[2]

# Each setting that takes a glob: how its files are found, its address, an ending that it reads.
SETTINGS = {
    "shard.sources": (lambda pattern, root: source_files([pattern], root), ".txt"),
    "finetune.triplets": (lambda pattern, root: triplet_files([pattern], root), ".tsv"),
    "evaluate.sts.A": (lambda pattern, root: sts_files(pattern, root, "evaluate.sts.A"), ".tsv"),
    "finetune.dev": (lambda pattern, root: sts_files(pattern, root, "finetune.dev"), ".tsv"),
}


@pytest.fixture(params=SETTINGS)
def setting(request, tmp_path):
    """The address of a setting, how its files are found below tmp_path, the ending of its files."""
    look, ending = SETTINGS[request.param]
    (tmp_path / f"a{ending}").write_text("x")
    return request.param, lambda pattern: look(pattern, tmp_path), ending


def model_files(folder):
    return model_folder.model_files(folder, address="embed.teacher")


def read_imported(vectors, texts):
    return vector_files.read(vectors, texts, field="text")


def refused(call, *arguments):
    with pytest.raises(TeachonceError) as caught:
        call(*arguments)
    return caught.value


def put_socket(path):
    # A path of a socket may have 107 bytes; a temporary folder's is longer on some machines.
    with contextlib.chdir(path.parent):
        socket.socket(socket.AF_UNIX).bind(path.name)


IRREGULAR = {
    "a folder": lambda path: path.mkdir(),
    "a named pipe": os.mkfifo,
    "a link to nothing (gone)": lambda path: path.symlink_to("gone"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": put_socket,
}


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize("what", IRREGULAR)
def test_what_is_no_file_is_named_beside_files_that_are_right(setting, tmp_path, what):
    address, look, ending = setting
    wrong = tmp_path / f"b{ending}"
    IRREGULAR[what](wrong)
    cure = {
        "a folder": f"name the files in it, such as '{wrong}/*', or move the folder away",
        "a link to nothing (gone)": "bring back what the link points to, or remove the link",
    }.get(what, "put a file in its place, or remove it")
    said = f"{address}: {{!r}} matches {wrong}, which is {what}\n  cure: {cure}"
    for pattern in (f"*{ending}", f"**/*{ending}"):
        error = refused(look, pattern)
        assert str(error) == said.format(pattern)
        # `check` lets what is committed stand for files that are on another machine only.
        assert not isinstance(error, MissingError)


def test_the_name_itself_may_not_be_a_folder_either(setting, tmp_path):
    address, look, _ = setting
    (tmp_path / "sub").mkdir()
    assert str(refused(look, "sub")).startswith(
        f"{address}: 'sub' matches {tmp_path / 'sub'}, which is a folder\n"
    )


def test_links_to_nothing_alone_are_files_of_another_machine(setting, tmp_path):
    _, look, ending = setting
    (tmp_path / f"b{ending}").symlink_to("/mnt/elsewhere")
    assert isinstance(refused(look, f"b*{ending}"), MissingError)


def test_a_folder_is_passed_over_if_nothing_in_it_is_lost(setting, tmp_path):
    _, look, ending = setting
    kept = [tmp_path / f"a{ending}"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / f"hidden/.b{ending}").write_text("x")
    assert look("*") == kept
    assert look("**") == kept
    for name in (f"sub/b{ending}", f"sub/x{ending}/part{ending}"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    # `**` reads what is in the folders that it matches, whatever their names are.
    kept += [tmp_path / f"sub/b{ending}", tmp_path / f"sub/x{ending}/part{ending}"]
    assert look("**") == kept
    assert look("**/*") == kept
    assert look(f"**/*{ending}") == kept
    # `*` does not.
    assert "matches" in str(refused(look, "*"))
    assert f"{tmp_path / 'sub'}, which is a folder" in str(refused(look, "*"))


def test_a_link_to_a_file_is_a_file(setting, tmp_path):
    _, look, ending = setting
    (tmp_path / f"b{ending}").symlink_to(f"a{ending}")
    (tmp_path / "sub").symlink_to(".")
    assert look(f"b{ending}") == [tmp_path / f"b{ending}"]


@pytest.mark.parametrize("what", sorted(IRREGULAR.keys() - {"a folder"}))
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_dataset_folder_has_files_and_folders_only(tmp_path, what):
    (tmp_path / "data/deep").mkdir(parents=True)
    (tmp_path / "data/deep/a.parquet").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.parquet").write_text("x")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    assert source_files(["dataset:data"], tmp_path) == [
        tmp_path / "data/deep/a.parquet",
        tmp_path / "data/linked/b.parquet",
    ]
    IRREGULAR[what](tmp_path / "data/deep/b.parquet")
    assert str(refused(source_files, ["dataset:data"], tmp_path)).startswith(
        f"shard.sources: {tmp_path}/data/deep/b.parquet is {what}\n"
    )


@pytest.mark.parametrize("what", IRREGULAR)
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_judgements_that_are_no_file_do_not_give_way_to_others(tmp_path, what):
    (tmp_path / "qrels").mkdir()
    for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"):
        (tmp_path / name).write_text("x")
    assert beir_files(tmp_path, "A")[2] == tmp_path / "qrels.tsv"
    IRREGULAR[what](tmp_path / "qrels/test.tsv")
    assert str(refused(beir_files, tmp_path, "A")).startswith(
        f"evaluate.retrieval.A: {tmp_path}/qrels/test.tsv is {what}\n"
    )


@pytest.mark.parametrize("what", sorted(IRREGULAR.keys() - {"a folder"}))
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_model_has_files_only(tmp_path, what):
    """A link to nothing, as in a hub cache that was pruned, changes what a loader reads."""
    make_model(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").unlink()
    IRREGULAR[what](tmp_path / "model/tokenizer.json")
    assert str(refused(model_files, tmp_path / "model")).startswith(
        f"embed.teacher: {tmp_path}/model/tokenizer.json is {what}\n"
    )


@pytest.mark.parametrize("what", IRREGULAR)
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_vectors_and_texts_that_are_imported_are_files(tmp_path, what):
    vectors, texts = tmp_path / "v.npy", tmp_path / "t.txt"
    IRREGULAR[what](vectors)
    assert f"v.npy is {what}\n" in str(refused(read_imported, vectors, texts))
    vectors.rmdir() if what == "a folder" else vectors.unlink()
    np.save(vectors, np.ones((2, 4), np.float32))
    IRREGULAR[what](texts)
    assert f"t.txt is {what}\n" in str(refused(read_imported, vectors, texts))


READERS = {
    "settings": load_params,
    "a manifest": lambda path: Manifest.load(path, None),
    "a lineage": lambda path: read_lineage(path.parent),
    "metrics": lambda path: read_metrics(path, "kd"),
    "details": lambda path: read_details(path, "kd"),
    "a training": lambda path: read_training(path, "kd"),
    "exports": lambda path: read_exports(path, "kd", {}),
    "a curve": lambda path: read_curve(path, "kd"),
    "a model's file": lambda path: read_object(path, "embed.teacher"),
    "modules": lambda path: model_folder.modules_of(path.parent, "embed.teacher"),
    "a hash": RememberedHashes(Path("nowhere")),
    "lines": lambda path: list(read(path.rename(path.with_suffix(".txt")), "text")),
    "parquet": lambda path: list(read(path.rename(path.with_suffix(".parquet")), "text")),
    "arrow": lambda path: list(read(path.rename(path.with_suffix(".arrow")), "text")),
    "pairs": lambda path: read_sts([path]),
    "triplets": lambda path: list(LabelledFile(path, ["a", "b", "c"]).records()),
    "columns of triplets": lambda path: list(
        LabelledFile(path.rename(path.with_suffix(".parquet")), ["a", "b", "c"]).records()
    ),
    "documents": lambda path: read_documents(
        path.rename(path.with_suffix(".safetensors")).parent, "file", [], teacher="", as_read=""
    ),
}
NAMES = {"a lineage": "teachonce.json", "modules": "modules.json"}


@pytest.mark.parametrize("kind", sorted(READERS))
@pytest.mark.parametrize("what", ["a named pipe", "a device", "0 bytes"])
def test_no_reader_waits_for_what_is_no_file_or_reads_it_for_ever(tmp_path, kind, what):
    path = tmp_path / NAMES.get(kind, "file.json")
    if what == "0 bytes":
        path.symlink_to("/proc/cpuinfo")
    else:
        IRREGULAR[what](path)
    if kind == "modules" and what != "0 bytes":
        return  # it looks for a file first; `model_files` refuses the model
    said = (
        f"is {what}, not a file" if what != "0 bytes" else "says that it has 0 bytes and has more"
    )
    assert said in str(refused(READERS[kind], path))


@pytest.mark.parametrize("name", ["config.json", "modules.json", "1_Pooling/config.json"])
def test_a_configuration_of_gigabytes_is_refused_unread(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    os.close(os.open(path, os.O_CREAT))
    os.truncate(path, 8 << 30)
    call = (
        model_folder.modules_of if name == "modules.json" else lambda _, at: read_object(path, at)
    )
    assert "has 8,589,934,592 bytes, where 10,000,000 are the most" in str(
        refused(call, folder, "embed.teacher")
    )


def test_diff_of_a_pipe_says_so(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert str(refused(diff.run, tmp_path / "pipe", tmp_path / "pipe")).startswith(
        f"{tmp_path}/pipe: no manifest: it is a named pipe, not a file\n  cure: restore it from Git"
    )


@pytest.mark.parametrize("pattern", ["**", "**/*.txt", "*/*.txt", "sub/closed/*.txt"])
def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch, pattern):
    (tmp_path / "sub/closed").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "sub/a.txt").write_text("x")
    listed = Path.iterdir
    closed = tmp_path / ("sub" if pattern == "*/*.txt" else "sub/closed")

    def iterdir(path):  # tests often run as root, who may list all
        if path == closed:
            raise PermissionError(errno.EACCES, "no")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert str(refused(source_files, [pattern], tmp_path)) == (
        f"{closed}: reading failed: Permission denied\n"
        "  cure: give yourself permission to read it, then run the same command again"
    )


def test_globs_find_what_the_module_glob_finds(tmp_path):
    for name in ("a.txt", "x/a.txt", "x/y/b.txt", "x/.h/c.txt", ".k/d.txt", "[z]/e.txt", ".f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for pattern in ("**", "**/*.txt", "*/*.txt", "x/**/b.txt", ".*/*.txt", "[[]z]/*", "x/../a.*"):
        found = sorted(glob(pattern, root_dir=tmp_path, recursive=True))  # noqa: PTH207
        files = [tmp_path / name for name in found if (tmp_path / name).is_file()]
        assert sts_files(pattern, tmp_path, "evaluate.sts.A") == files, pattern
        absolute = f"{tmp_path}/{pattern}"
        assert sts_files(absolute, Path("/"), "evaluate.sts.A") == files, pattern


def test_many_stars_and_links_to_folders_around_them_are_walked_once(tmp_path):
    for name in "abcdefghijkl":
        (tmp_path / name).mkdir()
    (tmp_path / "a/x.txt").write_text("x")
    for name in ("b/up", "b/up2", "c/up"):
        (tmp_path / name).symlink_to(tmp_path)
    assert source_files(["**/" * 12 + "x.txt"], tmp_path) == [tmp_path / "a/x.txt"]


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems hold UTF-8 names only")
@pytest.mark.parametrize("locale", [{}, ASCII], ids=["UTF-8", "ASCII"])
def test_names_that_are_no_utf8_are_read_in_any_locale(tmp_path, locale):
    tree = tmp_path / os.fsdecode(b"tr\xe9e")
    texts = tree / "données"
    texts.mkdir(parents=True)
    names = ["a", "œ", os.fsdecode(b"z\xff")]
    for name in names:
        (texts / f"{name}.txt").write_text(f"A text of {len(name)} œ.\n", encoding="utf-8")
        table = pa.table({"text": [f"A text of the table {names.index(name)} é."]})
        with (texts / f"{name}.parquet").open("wb") as sink:
            parquet.write_table(table, sink)
        with (texts / f"{name}.arrow").open("wb") as sink, ipc.new_file(sink, table.schema) as out:
            out.write_table(table)
    content = shipped_settings()
    content["shard"]["sources"] = ["données/*", "données/œ.txt"]
    content["store"] = "étore"
    (tree / "params.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    for words in (["shard"], ["ls"], ["gc"], ["shard", "--json"]):
        run = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *words],
            cwd=tree,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **locale},
            capture_output=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr.decode()
        assert b"Traceback" not in run.stderr
        assert b"GONE" not in run.stdout
    assert Manifest.load(tree / "data/corpus.json", "corpus").rows == 5
    (ref,) = (tree / "étore/refs").iterdir()
    assert json.loads(ref.read_bytes())["made"]["in"] == f"{tmp_path}/tr\\xe9e/data"
