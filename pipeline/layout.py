"""Every path of a work tree, in one place. A test compares it with dvc.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.params import FINETUNED

if TYPE_CHECKING:
    from storage.manifest import Kind


@dataclass(frozen=True)
class Layout:
    """The paths below the folder that has params.yaml."""

    root: Path

    @property
    def params(self) -> Path:
        """All settings."""
        return self.root / "params.yaml"

    @property
    def sources(self) -> Path:
        """`check`: hashes of everything that comes from outside, one key for each stage that reads it."""
        return self.root / "data/sources.json"

    @property
    def versions(self) -> Path:
        """`check`: the VERSION of each stage."""
        return self.root / "data/versions.yaml"

    @property
    def raw(self) -> Path:
        """`docs`: texts, pairs and the retrieval test of the embedded default."""
        return self.root / "data/raw"

    @property
    def corpus(self) -> Path:
        """`shard`: manifest of text shards."""
        return self.root / "data/corpus.json"

    @property
    def split(self) -> Path:
        """`split`: which rows are for what."""
        return self.root / "data/split.json"

    @property
    def embeddings(self) -> Path:
        """`embed`: manifest of vectors."""
        return self.root / "data/embeddings.json"

    @property
    def negatives(self) -> Path:
        """`mine`: manifest of mined negatives."""
        return self.root / "data/negatives.json"

    @property
    def documents(self) -> Path:
        """`evaluate teacher`: its vectors of the documents that retrieval is measured on."""
        return self.root / "data/documents"

    @property
    def manifests(self) -> dict[Kind, Path]:
        """Where manifests are, in the order in which they are made."""
        return {"corpus": self.corpus, "embeddings": self.embeddings, "negatives": self.negatives}

    def start(self, name: str) -> Path:
        """`start`: a student before training."""
        return self.root / "models/start" / name

    def model(self, name: str) -> Path:
        """`distill`: a student after training."""
        return self.root / "models" / name

    def finetuned(self, student: str) -> Path:
        """`finetune`: a student after labelled triplets."""
        return self.model(f"{student}{FINETUNED}")

    @property
    def export(self) -> Path:
        """`export`: the model that is served, for anyone who has sentence-transformers."""
        return self.root / "export"

    def stage_facts(self, stage: str) -> Path:
        """Counts a stage leaves for `dvc metrics`."""
        return self.root / "reports/stages" / f"{stage}.json"

    def training(self, student: str) -> Path:
        """`distill`: how a run ended, for `dvc metrics`."""
        return self.root / "reports/training" / f"{student}.json"

    def curve(self, student: str) -> Path:
        """`distill`: loss and agreement by step, for `dvc plots`."""
        return self.root / "reports/curves" / f"{student}.csv"

    def metrics(self, model: str) -> Path:
        """`evaluate`: one model's metrics."""
        return self.root / "reports/metrics" / f"{model}.json"

    def details(self, model: str) -> Path:
        """`evaluate`: what the report page shows of one model beside its metrics."""
        return self.root / "reports/details" / f"{model}.json"

    def mteb(self, model: str) -> Path:
        """`evaluate --mteb`: one model's scores on tasks of mteb."""
        return self.root / "reports/mteb" / f"{model}.json"

    @property
    def page(self) -> Path:
        """`report`: everything about all models, on one page."""
        return self.root / "reports/index.html"

    @property
    def report(self) -> Path:
        """`report`: the metrics of all models that params.yaml names."""
        return self.root / "reports/metrics.json"

    @property
    def work(self) -> Path:
        """The one mutable place: training checkpoints and remembered hashes. Safe to delete."""
        return self.root / "work"

    @property
    def tracking(self) -> Path:
        """`distill`, `finetune`: files of a `tracker`."""
        return self.work / "tracking"

    @property
    def hashes(self) -> Path:
        """Hashes of files, remembered by path and identity."""
        return self.work / "hashes.json"
