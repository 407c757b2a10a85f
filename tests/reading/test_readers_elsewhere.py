"""A cache as others read it: the lines of docs/python.md, one after another, with what each gives."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stages.models.devices import pick_device
from stages.models.encoder import Encoder
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.manifest import Manifest
from tests.conftest import Place, embed_params, make_tiny_model, sentences

ROOT = Path(__file__).parents[2]
TITLE = "\n## Readers without teachonce\n"
TEXTS = 400
DIM = 32


def snippets():
    """The Python of that section, in order."""
    section = (ROOT / "docs/python.md").read_text().partition(TITLE)[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)


WITH_PYARROW, WITH_POLARS, WITH_PANDAS, WITH_DATASETS, WITH_TRAINER = snippets()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A home with a store, and a project with manifests and a start, as the section takes for granted."""
    root = tmp_path_factory.mktemp("home")
    teacher = Encoder(make_tiny_model(root / "teacher", layers=2), device=pick_device("cpu"))
    place = Place(root)
    corpus = place.corpus(sentences(TEXTS))
    place.embed(corpus, teacher.encode_counted, params=embed_params(storage="float16"))
    (root / "project/data").mkdir(parents=True)
    for name in ("corpus.json", "embeddings.json"):
        (root / name).rename(root / "project/data" / name)
    (root / ".cache").mkdir()
    (root / "store").rename(root / ".cache/teachonce")
    make_tiny_model(root / "project/models/start/half", layers=2, seed=1)
    return root


@pytest.fixture
def names(cache, monkeypatch, tmp_path):
    """What the first snippet leaves, in the folder and the home that it is meant for."""
    monkeypatch.setenv("HOME", str(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.chdir(cache / "project")
    found = {}
    exec(WITH_PYARROW, found)
    return found


@pytest.fixture
def expected(cache):
    """(texts, dim) vectors by our own reader."""
    place = Place(cache)
    store = type(place.store)(cache / ".cache/teachonce")
    data = cache / "project/data"
    corpus = Corpus(store, Manifest.load(data / "corpus.json", "corpus"))
    manifest = Manifest.load(data / "embeddings.json", "embeddings")
    return Embeddings(store, manifest, corpus).rows_of(np.arange(TEXTS))


def test_pyarrow(names, expected):
    shards = len(names["files"]("data/corpus.json"))
    assert shards >= 3
    both, matrix = names["both"], names["matrix"]
    assert both["text"].to_pylist() == sentences(TEXTS)
    assert np.array_equal(np.array(both["vector"].to_pylist(), np.float16), expected)
    assert (matrix.dtype, matrix.shape[1]) == (np.float16, DIM)
    assert np.array_equal(matrix, expected[: len(matrix)])


def test_nothing_is_copied(names):
    """The table is the mapped files; the matrix of a shard and the `Dataset` are views of them."""
    mapped = {}
    exec(WITH_PYARROW, mapped)
    exec(WITH_DATASETS.replace("stream =", "stream = 0 and"), mapped)
    address = mapped["shard"].flatten().buffers()[1].address
    assert mapped["matrix"].__array_interface__["data"][0] == address
    kept = mapped["dataset"].data.column("vector").chunk(0)
    assert kept.flatten().buffers()[1].address == address
    spans = (line.split()[0].split("-") for line in maps() if line.endswith(".arrow"))
    assert any(int(first, 16) <= address < int(end, 16) for first, end in spans)


def maps():
    """The mapped files of this process, as Linux tells them."""
    found = Path("/proc/self/maps")
    return found.read_text().splitlines() if found.exists() else pytest.skip("no /proc here")


def test_pyarrows_own_join_still_refuses_lists(names):
    """Once it takes them, the page can be shorter."""
    with pytest.raises(pa.ArrowInvalid, match="not supported in join"):
        names["texts"].join(names["vectors"], "text_key")


@pytest.mark.slow  # polars comes with the extras of the slow tests
def test_polars(names, expected):
    exec(WITH_POLARS, names)
    assert names["frame"]["text"].to_list() == sentences(TEXTS)
    assert names["polars_matrix"].dtype == np.float16
    assert np.array_equal(names["polars_matrix"], expected)


def test_pandas(names, expected):
    exec(WITH_PANDAS, names)
    assert names["joined"]["text"].tolist() == sentences(TEXTS)
    assert names["pandas_matrix"].dtype == np.float16
    assert np.array_equal(names["pandas_matrix"], expected)


def test_datasets(names, expected):
    exec(WITH_DATASETS, names)
    rows = list(names["stream"])
    assert np.array_equal(np.array([row["vector"] for row in rows], np.float16), expected)
    assert [row["text_key"] for row in rows] == names["texts"]["text_key"].to_pylist()
    dataset = names["dataset"]
    assert dataset[:]["text"] == sentences(TEXTS)
    as_numpy = dataset.with_format("numpy")[:]
    assert np.array_equal(as_numpy["vector"], expected)
    # What the page says that bites.
    assert (as_numpy["vector"].dtype, as_numpy["text_key"].dtype) == (np.float32, "S16")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
def test_the_trainer_of_sentence_transformers(names, expected):
    pytest.importorskip("accelerate")
    exec(WITH_DATASETS, names)
    *lines, last = WITH_TRAINER.strip().splitlines()
    assert last == "trainer.train()"
    exec("\n".join(lines), names)
    trainer, student = names["trainer"], names["student"]

    def error():
        vectors = student.encode(sentences(TEXTS))
        return float(((vectors - expected.astype(np.float32)) ** 2).mean())

    before = error()
    arguments = trainer.args
    arguments.report_to, arguments.save_strategy, arguments.disable_tqdm = [], "no", True
    arguments.learning_rate, arguments.logging_steps = 1e-3, 10
    exec(last, names)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 3 * TEXTS // 8
    assert losses[-1] < 0.8 * losses[0]
    assert error() < 0.8 * before
