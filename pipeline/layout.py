"""Every path of a work tree, in one place. A test compares it with dvc.yaml."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.reading.files import kind_of
from storage import durable
from storage.errors import TeachonceError, shown

if TYPE_CHECKING:
    from storage.manifest import Kind

MOVE_IT = "move it away, or delete it"


class Output:
    """The path of a file that is written, or of a folder, which ends in /; checked when it is asked for."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __get__(self, at: Layout, _: type[Layout]) -> Path:
        return at._output(self.path)


class NamedOutput:
    """A function: name -> the path of its file or folder, checked. {} stands for the name."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __get__(self, at: Layout, _: type[Layout]) -> Callable[[str], Path]:
        return lambda name: at._output(self.path.format(name))


@dataclass(frozen=True)
class Layout:
    """The paths below the folder that has params.yaml.

    Raises:
        TeachonceError: the folder in which something is to be written leads out of the work tree, or it is
            no folder, or a folder is where a file is to be. A link in the very place of an output is all
            right: it is replaced, as DVC replaces the links that it makes there.
    """

    root: Path

    # check: hashes of everything that comes from outside, one key for each stage that reads it
    sources = Output("data/sources.json")
    versions = Output("data/versions.yaml")  # check: the VERSION of each stage
    raw = Output("data/raw/")  # docs: texts, pairs and the retrieval test of the embedded default
    corpus = Output("data/corpus.json")  # shard: manifest of text shards
    readings = Output("data/readings.json")  # shard: manifest of the readings of texts
    split = Output("data/split.json")  # split: which rows are for what
    embeddings = Output("data/embeddings.json")  # embed: manifest of vectors
    mixes = Output("data/mixes.json")  # embed: manifest of vectors of mixes
    negatives = Output("data/negatives.json")  # mine: manifest of mined negatives
    neighbours = Output("data/neighbours/")  # neighbours: for each recipe, what it reads of these
    # evaluate teacher: its vectors of the documents that retrieval is measured on
    documents = Output("data/documents/")
    start = NamedOutput("models/start/{}/")  # start: a student before training
    model = NamedOutput("models/{}/")  # distill, finetune: a student after training
    export = Output("export/")  # export: the model that is served, for sentence-transformers
    exported = NamedOutput("exports/{}/")  # export NAME: a further model that is served
    formats = NamedOutput("reports/exports/{}.json")  # export: the metrics of one model's formats
    stage_facts = NamedOutput("reports/stages/{}.json")  # each stage: counts for `dvc metrics`
    # start: what a start keeps of its model, and how far it agrees with the teacher
    start_facts = NamedOutput("reports/starts/{}.json")
    training = NamedOutput("reports/training/{}.json")  # distill: how it ended, for `dvc metrics`
    curve = NamedOutput("reports/curves/{}.csv")  # distill: loss and agreement, for `dvc plots`
    metrics = NamedOutput("reports/metrics/{}.json")  # evaluate: one model's metrics
    details = NamedOutput("reports/details/{}.json")  # evaluate: what the page shows beside these
    mteb = NamedOutput("reports/mteb/{}.json")  # evaluate --mteb: one model's scores
    page = Output("reports/index.html")  # report: everything about all models, on one page
    report = Output("reports/metrics.json")  # report: the metrics of models that params.yaml names
    tracking = Output("work/tracking/")  # distill, finetune: files of a `tracker`
    hashes = Output("work/hashes.json")  # hashes of files, remembered by path and identity

    @property
    def project(self) -> str:
        """What people call the work tree: its folder; that of the project in `dvc exp run --temp`."""
        parts = self.root.resolve().parts
        return parts[parts.index(".dvc") - 1] if ".dvc" in parts[1:] else parts[-1]

    @property
    def params(self) -> Path:
        """All settings."""
        return self.root / "params.yaml"

    @property
    def work(self) -> Path:
        """The one mutable place: training checkpoints and remembered hashes. Safe to delete."""
        self._check_place(self.root / "work")
        return self.root / "work"

    @property
    def manifests(self) -> dict[Kind, Path]:
        """Where manifests are, in the order in which they are made."""
        return {
            "corpus": self.corpus,
            "readings": self.readings,
            "embeddings": self.embeddings,
            "mixes": self.mixes,
            "negatives": self.negatives,
        }

    def _output(self, name: str) -> Path:
        """The place of what is replaced as a whole; a name that ends in / is a folder's."""
        path = self.root / name
        for above in reversed(path.relative_to(self.root).parents[:-1]):
            self._check_place(self.root / above)
        if not name.endswith("/"):
            with durable.named(path, "looking for the file"):
                if path.is_dir() and not path.is_symlink():
                    raise TeachonceError(path, "a folder, where a file is needed", MOVE_IT)
        return path

    def _check_place(self, folder: Path) -> None:
        """Raise if outputs below `folder` would not be in the work tree."""
        with durable.named(folder, "looking for the folder"):
            if folder.is_dir():
                target = folder.resolve()
                if not target.is_relative_to(self.root.resolve()):
                    raise TeachonceError(
                        folder,
                        f"leads to {shown(target)}, out of the work tree: what is there would be replaced",
                        "put a folder in its place, or move the whole work tree there",
                    )
            elif folder.is_symlink() or folder.exists():
                raise TeachonceError(
                    folder, f"{kind_of(folder)}, where a folder is needed", MOVE_IT
                )
