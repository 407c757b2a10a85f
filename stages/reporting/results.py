"""What stages leave about a model, read back and checked.

Its metrics and details, the curve of its training, and what was measured of its exports.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator

from stages.outcome import log
from stages.params import FINETUNED
from storage import regular
from storage.errors import DamagedError, MissingError, shown

Metrics = Mapping[str, str | int | float]
"""One model's metrics: flat keys, as `evaluate` writes them."""

Formats = Mapping[str, Metrics]
"""A model's exports: format -> its metrics, and beside them `published` and, if it is not, the `reason`."""

SPEED_KEYS = {"sentences_per_second", "texts_per_reference", "device"}
"""Keys of metrics whose values are others each time that the same model is measured."""

SCORES = ("agreement", "dev")  # a curve has one of them


class Part(BaseModel):
    """A mapping in a details file: unknown keys and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Similarities(Part):
    """How many pairs of held-out texts have a cosine between edge i and edge i + 1."""

    edges: tuple[float, ...]
    teacher: tuple[NonNegativeInt, ...]
    model: tuple[NonNegativeInt, ...]

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if not len(self.edges) - 1 == len(self.teacher) == len(self.model) > 0:
            raise ValueError("n + 1 edges take n counts")
        if any(a >= b for a, b in pairwise(self.edges)):
            raise ValueError("edges must rise")
        return self


class Disagreement(Part):
    """Two texts, and the cosine that each side gives them."""

    first: str
    second: str
    teacher: float
    model: float


class Result(Part):
    """A text that a search found; `relevant` is None if that was not judged."""

    text: str
    score: float
    relevant: bool | None


class Search(Part):
    """A query of an evaluation set and what the model found, best first."""

    set: str
    query: str
    results: tuple[Result, ...]


class Details(Part):
    """What `evaluate` leaves for a person to look at."""

    texts: NonNegativeInt
    similarities: Similarities | None
    scatter: tuple[tuple[float, float], ...]  # the teacher's cosine, the model's
    disagreements: tuple[Disagreement, ...]
    searches: tuple[Search, ...]


class Training(BaseModel):
    """How a training run ended."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    minutes: float
    steps: NonNegativeInt
    best_step: NonNegativeInt


class Format(BaseModel):
    """A model in a format: whether it was published, why not, and its flat metrics beside that."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, str | int | float]

    published: bool
    reason: str  # empty for what was published


class ExportedFormats(Part):
    """What `export` leaves of a model in the formats that were asked for."""

    model: str
    # `quality_of` the model when its formats were measured; empty where an older version wrote this.
    quality: str = ""
    formats: dict[str, Format]


Points = Sequence[tuple[float, float]]
"""Steps, each with a value."""


@dataclass(frozen=True)
class Curve:
    """A training run by step."""

    score: str  # what `scores` are: "agreement" or "dev"
    scores: Points  # at each evaluation, the first at step 0
    # Name of each part of the loss -> its mean since the evaluation before; none at step 0.
    losses: Mapping[str, Points]
    notes: Mapping[str, Points]  # name of each further column, e.g. "temperature ckd" -> its values


@dataclass(frozen=True)
class Model:
    """All that stages left about a model."""

    name: str
    metrics: Metrics
    details: Details  # what to look at
    curve: Curve | None = None  # score, losses and notes by step, if it was trained here
    training: Training | None = None  # how that ended, if it was trained here
    # What it is in other formats, if it was exported here.
    formats: Formats = field(default_factory=dict)


def read_metrics(path: Path, name: str) -> Metrics:
    """The metrics of the model `name`.

    Raises:
        MissingError: it was not evaluated.
        DamagedError: not what `evaluate` writes.
    """
    cure = _evaluate(name)
    try:
        metrics = json.loads(_bytes(path, cure))
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, "no JSON", cure) from error
    if not isinstance(metrics, dict) or not all(
        isinstance(value, str | int | float) for value in metrics.values()
    ):
        raise DamagedError(path, "not the flat metrics of a model", cure)
    return metrics


def read_details(path: Path, name: str) -> Details:
    """The details of the model `name`.

    Raises:
        MissingError: it was not evaluated.
        DamagedError: not what `evaluate` writes.
    """
    cure = _evaluate(name)
    try:
        return Details.model_validate_json(_bytes(path, cure))
    except ValidationError as error:
        raise DamagedError(path, f"not the details of a model: {_first(error)}", cure) from error


def read_training(path: Path, name: str) -> Training | None:
    """How the run that made `name` ended; None for a model that no run made.

    Raises:
        DamagedError: not what a training stage writes.
    """
    try:
        return Training.model_validate_json(regular.content(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = f"not the end of a training run: {_first(error)}"
        raise DamagedError(path, problem, _train(name)) from error


def quality_of(metrics: Metrics) -> str:
    """Returns the sha256 of what was measured of a model but for its speed: it says which model it was."""
    quality = {key: value for key, value in metrics.items() if key not in SPEED_KEYS}
    return hashlib.sha256(json.dumps(quality, sort_keys=True).encode()).hexdigest()


def read_exports(path: Path, name: str, metrics: Metrics) -> Formats:
    """What `export` measured of the model `name` in each format; nothing of one that was not exported.

    Nor of one whose `metrics` are others by now: the formats are of the model as it was before, or of other
    evaluation sets. This is said in a warning.

    Raises:
        DamagedError: not what `export` writes of this model.
    """
    cure = f"run `teachonce export {name}`, or `teachonce export` where export.model names it"
    try:
        exports = ExportedFormats.model_validate_json(regular.content(path))
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise DamagedError(path, f"not the exports of a model: {_first(error)}", cure) from error
    if exports.model != name:
        raise DamagedError(path, f"the exports of {shown(exports.model)}, not of {name}", cure)
    if exports.quality != quality_of(metrics):
        log.warning(
            "report: the formats of %s are left out: %s was evaluated anew since they were measured, with "
            "another result; %s",
            name,
            name,
            cure,
        )
        return {}
    return {key: exported.model_dump() for key, exported in exports.formats.items()}


def read_curve(path: Path, name: str) -> Curve | None:
    """The curve of the run that made `name`; None for a model that no run made.

    Raises:
        DamagedError: not what a training stage writes.
    """
    try:
        content = regular.content(path).decode()
        return _curve(csv.DictReader(io.StringIO(content, newline=""), strict=True))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        problem = f"not the curve of a training run: {shown(error)}"
        raise DamagedError(path, problem, _train(name)) from error


def _curve(table: csv.DictReader[str]) -> Curve:
    columns = table.fieldnames or []
    score = next((name for name in SCORES if name in columns), None)
    if score is None:
        raise ValueError(f"no column named {' or '.join(SCORES)}")
    rows = list(table)
    parts = [name for name in columns if name.startswith("loss_")]
    losses = {part.removeprefix("loss_"): _points(rows, part) for part in parts}
    others = [name for name in columns if name not in {*parts, "step", score, "learning_rate"}]
    notes = {other.replace("_", " ", 1): _points(rows, other) for other in others}
    return Curve(score, _points(rows, score), losses, notes)


def _points(rows: Sequence[Mapping[str, str]], column: str) -> list[tuple[float, float]]:
    points = [(float(row["step"]), float(row[column])) for row in rows if row[column] != ""]
    if not all(math.isfinite(number) for point in points for number in point):
        raise ValueError(f"{column} has NaN or Inf")
    return points


def _bytes(path: Path, cure: str) -> bytes:
    try:
        return regular.content(path)
    except FileNotFoundError:
        raise MissingError(path, "not there", cure) from None


def _evaluate(name: str) -> str:
    return f"run `teachonce evaluate {name}`"


def _train(name: str) -> str:
    stage = "finetune" if name.endswith(FINETUNED) else "distill"
    return f"run `teachonce {stage} {name.removesuffix(FINETUNED)}`"


def _first(error: ValidationError) -> str:
    """The first thing that pydantic found: where, and what is wrong there."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return shown(f"{where}: {problem['msg']}" if where else problem["msg"])
