"""The model card of an export: a function of what is known about it; no date, no host, no path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stages.models.lineage import leaves_teacher_space
from stages.params import TEACHER
from stages.reporting import columns, legend, measures, templating
from stages.reporting.results import Metrics
from storage.roles import ROLES, Role

NAMED_ON_CARD: Mapping[Role, str] = {
    "query": "queries",
    "document": "documents",
    "text": "other texts",
}


@dataclass(frozen=True)
class PublishedFormat:
    """A format that lies in an export."""

    name: str  # such as onnx-int8
    place: str  # its file or folder within the export; empty for the folder itself
    megabytes: float  # size of its weights, in 10^6 bytes
    # Texts in the time of one pass of the fixed workload; None if it was not measured.
    speed: float | None = None
    # Share of the student's quality that it loses; None for the student itself.
    loss: float | None = None

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Its row of the table."""
        return (
            self.name,
            f"`{self.place}`" if self.place else "this folder",
            f"{self.megabytes:.1f}",
            "-" if self.speed is None else f"{self.speed:.1f}",
            "-" if self.loss is None else f"{max(self.loss, 0):.1%}",
        )


@dataclass(frozen=True)
class Card:
    """What a card says of the model itself."""

    name: str
    dim: int  # width of its vectors
    unit_length: bool  # whether they have length 1
    max_tokens: int | None  # read of a text; None: no limit
    dropped: bool  # whether the projection was left out
    # Whether sentence-transformers 3.4 with transformers 4 gives the same vectors.
    old_ones_read: bool
    formats: Sequence[PublishedFormat]  # the base, then the others that are published
    has_code: bool = False  # whether it needs the code that lies in its folder
    padding: int = 0  # id of the token that pads a batch
    cut_at: Literal["right", "left"] = "right"  # the side at which a longer text loses its tokens
    # Role -> what it reads before texts of that role; no empty ones.
    prompts: Mapping[Role, str] = field(default_factory=dict)

    @property
    def graph(self) -> str | None:
        """The file of the last graph, which is the smallest; None if there is none."""
        graphs = [format_.place for format_ in self.formats if format_.place.startswith("onnx/")]
        return graphs[-1] if graphs else None

    @property
    def openvino_graph(self) -> str | None:
        """The file of the graph for OpenVINO; None if there is none."""
        return self._place("openvino-int8")

    @property
    def static_folder(self) -> str | None:
        """The folder of the static model in int8; None if there is none."""
        return self._place("static-int8")

    def _place(self, name: str) -> str | None:
        return next((format_.place for format_ in self.formats if format_.name == name), None)

    @property
    def reads(self) -> dict[str, str]:
        """What texts are for -> what the model reads before them; of one entry if it is one for all."""
        prompts = {
            NAMED_ON_CARD[role]: repr(self.prompts[role]) if role in self.prompts else "nothing"
            for role in ROLES
        }
        return prompts if len(set(prompts.values())) > 1 else {"every text": prompts["other texts"]}


def model_card(
    card: Card,
    *,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Metrics],
    facts: Mapping[str, str],
) -> str:
    """The README.md of an export: the model, its lineage, the teacher's metrics and its own, and facts."""
    models = {name: metrics[name] for name in (TEACHER, card.name) if metrics.get(name)}
    rows = columns.rows(models)
    shown = columns.columns(rows, [card.name])
    blocks = {
        "Recipe": lineage.get("recipe"),
        "Then finetuned on labelled pairs or triplets": lineage.get("finetuned"),
    }
    # A folder without its projection has another scale, which nobody measured.
    shift = None if card.dropped else measures.shift_of_cosines(models.get(card.name, {}))
    return templating.markdown(
        "card.md",
        card=card,
        left_the_teacher=leaves_teacher_space(lineage),
        rows=rows,
        columns=shown,
        glossary=legend.glossary(shown, rows),
        notes=legend.notes(models, [card.name]),
        origin=_origin(lineage, facts),
        blocks={title: block for title, block in blocks.items() if block},
        trained_on=lineage.get("recipe", {}).get("max_tokens"),
        shift=shift,
    )


def _origin(lineage: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, object]:
    """Label -> what is known of it."""
    teacher, agreement = lineage.get("teacher", {}), lineage.get("agreement")
    entries = {
        **facts,
        "Teacher's fingerprint": teacher.get("fingerprint"),
        "Width of the teacher's vectors": teacher.get("dim"),
        "Student": lineage.get("student"),
        "Start": lineage.get("start"),
        "Texts trained on": lineage.get("rows"),
        "Steps": lineage.get("steps"),
        "Agreement with the teacher on held-out texts": (
            None if agreement is None else f"{agreement:.3f}"
        ),
    }
    return {label: value for label, value in entries.items() if value is not None}
