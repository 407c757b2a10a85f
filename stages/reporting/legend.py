"""What stands below a table of models: its terms, and how the numbers were measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from stages.reporting.columns import TableColumn, names_of_sets
from stages.reporting.forms import NO_FORMATS
from stages.reporting.measures import SPEED, devices, listed, measured, of, yardstick
from stages.reporting.results import Formats, Metrics

CUT = ".truncated"
"""Suffix of the keys that say which share of the texts of a set was truncated."""

GLOSSARY = {
    "STS": "rank correlation of the model's cosines with people's scores of sentence pairs, times 100",
    "nDCG@10": "how well the first ten results of a search are ranked, from 0 to 1",
    "teacher's index": "the student embeds the queries, the teacher has embedded the documents",
    "fidelity": "rank correlation of the model's cosines with the teacher's, over all pairs of texts",
    "top-10 overlap": "share of a text's ten nearest neighbours that the teacher finds as well",
    "text to reading": "share of held-out texts whose own reading is the nearest of all their readings",
    "reading to text": "share of readings of held-out texts whose own text is the nearest of all",
    "reading fidelity": "as fidelity, but the model reads the readings, and the teacher has read the texts",
}


FORMATS = {
    "safetensors": "the model itself, as exported",
    "fp16": "two bytes a weight instead of four",
    "onnx": "for ONNX Runtime",
    "openvino": "for OpenVINO, a runtime for Intel's processors",
    "static": "a static model's table, in its own module",
    "int8": "one byte a weight",
}
"""A format's name, or a part of it between hyphens -> meaning."""


def glossary(titled: Sequence[TableColumn], shown: Collection[str]) -> dict[str, str]:
    """Term -> meaning, of the terms in the titles of the columns and in the names of the rows."""
    titles = " ".join(column.name for column in titled).lower()
    terms = {term: meaning for term, meaning in GLOSSARY.items() if term.lower() in titles}
    if any(" · first " in row for row in shown):
        terms["first N"] = "the model with nothing but the first N values of its vectors"
    parts = {part for row in shown if " · " in row for part in row.rpartition(" · ")[2].split("-")}
    return terms | {part: meaning for part, meaning in FORMATS.items() if part in parts}


def notes(
    models: Mapping[str, Metrics],
    students: Collection[str],
    rank_by: str | None = None,
    formats: Mapping[str, Formats] = NO_FORMATS,
) -> list[str]:
    """Sentences without which the table cannot be read: which student is best, how things were measured."""
    sentences = [
        _rule(models, students, rank_by),
        _cut(models),
        _ignored(models),
        _shared(models),
        _speed(models),
        _refused(formats),
    ]
    return [note for note in sentences if note]


def _rule(models: Mapping[str, Metrics], students: Collection[str], rank_by: str | None) -> str:
    ranking = yardstick(models, students, rank_by)
    ranked = [name for name in students if ranking and name in models]
    sentence = f"Best: highest {ranking[0]}. " if ranking and len(ranked) > 1 else ""
    if any(key.endswith(".low") for metrics in models.values() for key in metrics):
        sentence += (
            "±: half of a 95 % confidence interval, by bootstrap over queries, pairs or texts. Models are "
            "tied if the number of one lies in the interval of the other."
        )
    return sentence.strip()


def _cut(models: Mapping[str, Metrics]) -> str:
    """Of which sets texts were longer than models read."""
    truncated = []
    for kind in ("sts.", "retrieval."):
        for name in names_of_sets(models, kind, CUT):
            shares = measured(models, of(f"{kind}{name}{CUT}")).values()
            lowest, highest = (f"{100 * share:.2g}" for share in (min(shares), max(shares)))
            if max(shares) > 0:
                share = highest if lowest == highest else f"{lowest} to {highest}"
                truncated.append(f"{share} % of {name}")
    return (
        f"Texts longer than a model reads were truncated: {listed(truncated)}." if truncated else ""
    )


def _ignored(models: Mapping[str, Metrics]) -> str:
    """In which searches a document with the query's own id was no result."""
    names = names_of_sets(models, "retrieval.", ".identical_ids_ignored")
    return f"A document with the query's own id is no result in {listed(names)}." if names else ""


def _shared(models: Mapping[str, Metrics]) -> str:
    """Which models count a weight once that several layers share, and how large their files are."""
    sizes = [
        f"{name} ({count / 1e6:.1f} million in its file)"
        for name, count in measured(models, of("parameters_in_file")).items()
    ]
    return f"Weights that layers share are counted once in {listed(sizes)}." if sizes else ""


def _refused(formats: Mapping[str, Formats]) -> str:
    """Which formats were not published, and why."""
    refusals = [
        f"{name} {key} ({metrics['reason']})"
        for name, of_model in formats.items()
        for key, metrics in of_model.items()
        if not metrics["published"]
    ]
    return f"Not published: {listed(refusals)}." if refusals else ""


def _speed(models: Mapping[str, Metrics]) -> str:
    places = devices(models)
    if not places:
        return ""
    within = " Models on different devices are not compared." if len(places) > 1 else ""
    compared = (
        " Speed-up: each model was timed in turns with a fixed workload."
        if measured(models, of(SPEED))
        else ""
    )
    return f"Speeds were measured on {listed(places)}.{compared}{within}"
