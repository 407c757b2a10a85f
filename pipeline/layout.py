"""Every path of a work tree, in one place. A test compares it with dvc.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.params import FINETUNED
from stages.reading.files import kind_of
from storage import durable
from storage.errors import TeachonceError, shown

if TYPE_CHECKING:
    from storage.manifest import Kind

MOVE_IT = "move it away, or delete it"


@dataclass(frozen=True)
class Layout:
    """The paths below the folder that has params.yaml.

    Raises:
        TeachonceError: the folder in which something is to be written leads out of the work tree, or it is
            no folder, or a folder is where a file is to be. A link in the very place of an output is all
            right: it is replaced, as DVC replaces the links that it makes there.
    """

    root: Path

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
    def sources(self) -> Path:
        """`check`: hashes of everything that comes from outside, one key for each stage that reads it."""
        return self._file("data/sources.json")

    @property
    def versions(self) -> Path:
        """`check`: the VERSION of each stage."""
        return self._file("data/versions.yaml")

    @property
    def raw(self) -> Path:
        """`docs`: texts, pairs and the retrieval test of the embedded default."""
        return self._folder("data/raw")

    @property
    def corpus(self) -> Path:
        """`shard`: manifest of text shards."""
        return self._file("data/corpus.json")

    @property
    def readings(self) -> Path:
        """`shard`: manifest of the readings of texts."""
        return self._file("data/readings.json")

    @property
    def split(self) -> Path:
        """`split`: which rows are for what."""
        return self._file("data/split.json")

    @property
    def embeddings(self) -> Path:
        """`embed`: manifest of vectors."""
        return self._file("data/embeddings.json")

    @property
    def mixes(self) -> Path:
        """`embed`: manifest of vectors of mixes."""
        return self._file("data/mixes.json")

    @property
    def negatives(self) -> Path:
        """`mine`: manifest of mined negatives."""
        return self._file("data/negatives.json")

    @property
    def neighbours(self) -> Path:
        """`neighbours`: for each recipe, which mined negatives it reads."""
        return self._folder("data/neighbours")

    @property
    def documents(self) -> Path:
        """`evaluate teacher`: its vectors of the documents that retrieval is measured on."""
        return self._folder("data/documents")

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

    def start(self, name: str) -> Path:
        """`start`: a student before training."""
        return self._folder(f"models/start/{name}")

    def model(self, name: str) -> Path:
        """`distill`: a student after training."""
        return self._folder(f"models/{name}")

    def finetuned(self, student: str) -> Path:
        """`finetune`: a student after labelled triplets."""
        return self.model(f"{student}{FINETUNED}")

    @property
    def export(self) -> Path:
        """`export`: the model that is served, for anyone who has sentence-transformers."""
        return self._folder("export")

    def exported(self, model: str) -> Path:
        """`export NAME`: a further model that is served."""
        return self._folder(f"exports/{model}")

    def formats(self, model: str) -> Path:
        """`export`: the metrics of one model's formats."""
        return self._file(f"reports/exports/{model}.json")

    def stage_facts(self, stage: str) -> Path:
        """Counts a stage leaves for `dvc metrics`."""
        return self._file(f"reports/stages/{stage}.json")

    def start_facts(self, name: str) -> Path:
        """`start`: what a start keeps of its model, and how far it agrees with the teacher."""
        return self._file(f"reports/starts/{name}.json")

    def training(self, student: str) -> Path:
        """`distill`: how a run ended, for `dvc metrics`."""
        return self._file(f"reports/training/{student}.json")

    def curve(self, student: str) -> Path:
        """`distill`: loss and agreement by step, for `dvc plots`."""
        return self._file(f"reports/curves/{student}.csv")

    def metrics(self, model: str) -> Path:
        """`evaluate`: one model's metrics."""
        return self._file(f"reports/metrics/{model}.json")

    def details(self, model: str) -> Path:
        """`evaluate`: what the report page shows of one model beside its metrics."""
        return self._file(f"reports/details/{model}.json")

    def mteb(self, model: str) -> Path:
        """`evaluate --mteb`: one model's scores on tasks of mteb."""
        return self._file(f"reports/mteb/{model}.json")

    @property
    def page(self) -> Path:
        """`report`: everything about all models, on one page."""
        return self._file("reports/index.html")

    @property
    def report(self) -> Path:
        """`report`: the metrics of all models that params.yaml names."""
        return self._file("reports/metrics.json")

    @property
    def work(self) -> Path:
        """The one mutable place: training checkpoints and remembered hashes. Safe to delete."""
        self._check_place(self.root / "work")
        return self.root / "work"

    @property
    def tracking(self) -> Path:
        """`distill`, `finetune`: files of a `tracker`."""
        return self._folder("work/tracking")

    @property
    def hashes(self) -> Path:
        """Hashes of files, remembered by path and identity."""
        return self._file("work/hashes.json")

    def _file(self, name: str) -> Path:
        """A file that is written, by its path from the root."""
        path = self._folder(name)
        with durable.named(path, "looking for the file"):
            if path.is_dir() and not path.is_symlink():
                raise TeachonceError(path, "a folder, where a file is needed", MOVE_IT)
        return path

    def _folder(self, name: str) -> Path:
        """A folder that is replaced as a whole."""
        path = self.root / name
        for above in reversed(path.relative_to(self.root).parents[:-1]):
            self._check_place(self.root / above)
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
