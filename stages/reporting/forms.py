"""Each model in the forms in which it can be served, and which of these no other makes superfluous.

A form is a model as it was trained, such as `tiny`, or in a format that `export` published, such as
`tiny onnx-int8`.
"""

from __future__ import annotations

from collections.abc import Mapping

from stages.params import BASE_FORMATS
from stages.reporting.results import Formats, Metrics

NO_FORMATS: Mapping[str, Formats] = {}
"""Of models that were not exported."""


def forms(models: Mapping[str, Metrics], formats: Mapping[str, Formats]) -> dict[str, Metrics]:
    """Name of a form -> metrics: each model, and behind it each other format of it that was published.

    A model that was exported is what was exported of it: as float16 it is half as large.
    """
    by_name: dict[str, Metrics] = {}
    for name, metrics in models.items():
        others = published(formats.get(name, {}))
        base = next((others.pop(key) for key in BASE_FORMATS if key in others), {})
        by_name[name] = {**metrics, **base}
        by_name |= {f"{name} {key}": exported for key, exported in others.items()}
    return by_name


def model_of(form: str) -> str:
    """`tiny onnx-int8` -> `tiny`; a name of a model has no blank."""
    return form.partition(" ")[0]


def published(formats: Formats) -> dict[str, Metrics]:
    """The formats that did not lose too much."""
    return {key: exported for key, exported in formats.items() if exported["published"]}


def front(places: Mapping[str, tuple[float, float]]) -> set[str]:
    """The Pareto front: names of those that no other passes.

    Args:
        places: Name -> two numbers, of which more is better.

    Returns:
        The names for which there is no other that is as good or better by both numbers, and better by one.
    """
    return {
        name
        for name, (x, y) in places.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in places.values())
    }
