"""What settings name by globs: nothing that matches is left out in silence, and nothing hangs."""

import contextlib
import os
import socket

import numpy as np
import pytest

from stages import imported, models
from stages.benchmarks import beir_files, sts_files
from stages.readers import source_files
from stages.triplets import triplet_files
from storage.errors import MissingError, TeachonceError
from tests.test_settings import make_model

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
    return models.model_files(folder, address="embed.teacher")


def read_imported(vectors, texts):
    return imported.read(vectors, texts, field="text")


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
