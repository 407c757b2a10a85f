"""The model card of an export: a function of what is known about it; no date, no host, no path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.models.lineage import left_the_teacher
from stages.params import TEACHER
from stages.reporting.markdown import escaped, fenced, table
from stages.reporting.measures import ends, of, shift_of_cosines, short, times_as_fast, told

Metrics = Mapping[str, Any]
"""One model's metrics: flat keys, as `evaluate` writes them."""

FILL_IN = "FILL IN"
"""Stands wherever only a person knows."""

MEASURES: tuple[tuple[str, str, str], ...] = (
    (r"sts\.average", "STS, average (Spearman x 100)", ".2f"),
    (r"sts\.([^.]+)", "STS, {} (Spearman x 100)", ".2f"),
    (r"retrieval\.(.+)\.ndcg@10", "Retrieval, {} (nDCG@10)", ".3f"),
    (r"retrieval\.(.+)\.mrr@10", "Retrieval, {} (MRR@10)", ".3f"),
    (r"retrieval\.(.+)\.recall@100", "Retrieval, {} (recall@100)", ".3f"),
    (r"sts\.([^.]+)\.truncated", "STS, {} (share of texts cut)", ".3f"),
    (r"retrieval\.([^.]+)\.truncated", "Retrieval, {} (share of texts cut)", ".3f"),
    (r"fidelity\.spearman", "Order of pairs as the teacher has it (Spearman)", ".3f"),
    (r"fidelity\.top10_overlap", "Nearest ten shared with the teacher", ".3f"),
    (r"sentences_per_second", "Texts per second", ",.0f"),
    (r"parameters", "Parameters", ",.0f"),
    (r"megabytes", "Megabytes of weights", ",.1f"),
)
"""Key of a metric -> how a card names it and how it is printed, in the order of the table."""


BLOCKS = {
    "recipe": "Recipe",
    "finetuned": "Then finetuned on labelled pairs or triplets",
}
"""Key of a lineage -> what stands over its block of YAML."""


@dataclass(frozen=True)
class Card:
    """What a card says of the model itself.

    Args:
        name: Of the model.
        dim: Width of its vectors.
        unit_length: Whether they have length 1.
        max_tokens: It reads no more of a text; None: no limit.
        dropped: Whether the projection was left out.
        old_ones_read: Whether sentence-transformers 3.4 with transformers 4 gives the same vectors.
        onnx: Whether there is an ONNX file.
        has_code: Whether it needs the code that lies in its folder.
    """

    name: str
    dim: int
    unit_length: bool
    max_tokens: int | None
    dropped: bool
    old_ones_read: bool
    onnx: bool
    has_code: bool = False


def model_card(
    card: Card,
    *,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Metrics],
    facts: Mapping[str, str],
) -> str:
    """The README.md of an export.

    Args:
        card: The model.
        lineage: What distill and finetune left in the model's folder.
        metrics: By model; the teacher's and this one's are shown.
        facts: Label -> text, shown in this order.
    """
    parts = [
        _front_matter(),
        f"# {escaped(card.name)}",
        _what(card, lineage),
        "## Use",
        _use(card),
        "## Results",
        _results(card, metrics),
        "## Where it comes from",
        _origin(lineage, facts),
        "## Limits",
        _limits(card, lineage, metrics.get(card.name, {})),
        f"## {FILL_IN} before you publish this",
        _to_fill_in(),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter() -> str:
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- distillation
license:  # {FILL_IN}: what the licences of the teacher's weights and of the corpus allow
---"""


def _what(card: Card, lineage: Mapping[str, Any]) -> str:
    length = " of length 1" if card.unit_length else ""
    if card.dropped:
        space = "in a space of its own, not comparable with the teacher's"
    elif left_the_teacher(lineage):
        space = "but not held near the teacher's: do not mix the two in one index"
    else:
        space = "in the teacher's space, so they can search an index that the teacher built"
    return (
        f"Turns texts into vectors of {card.dim} numbers{length}; distilled by teachonce from a "
        f"teacher's cached vectors, {space}."
    )


def _use(card: Card) -> str:
    needed = (
        "sentence-transformers 3.4 or newer."
        if card.old_ones_read
        else "sentence-transformers 6 with transformers 5 or newer: older ones read the settings of its "
        "rotary positions wrongly, without a word."
    )
    trust = ", trust_remote_code=True" if card.has_code else ""
    code = f"""```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("path/to/this/folder"{trust})
vectors = model.encode(["One text.", "And another one."])
```

It reads texts as they are, queries and documents alike: there is no prompt, and `encode_query` is `encode`.
Vectors are compared by their cosine.

{needed}"""
    if not card.onnx:
        return code
    return f"""{code}

`onnx/model.onnx` is the same model for ONNX Runtime: `input_ids` and `attention_mask` in (int64, batch x
length), `last_hidden_state` and `sentence_embedding` out. The vector is `sentence_embedding`: pooling and
all that follows are inside."""


def _results(card: Card, metrics: Mapping[str, Metrics]) -> str:
    models = {name: metrics[name] for name in (TEACHER, card.name) if metrics.get(name)}
    if not models:
        return f"{FILL_IN}: nothing was measured."
    parts = [table(["", *map(escaped, models)], _rows(models))]
    if card.dropped:
        parts.append(
            "Measured with the projection into the teacher's space, which this folder leaves out."
        )
    if any(key.endswith(".low") for found in models.values() for key in found):
        parts.append("±: half of a 95 % confidence interval (bootstrap).")
    return "\n\n".join(parts + _devices(models))


def _rows(models: Mapping[str, Metrics]) -> list[list[str]]:
    """Label and cells of each metric that a card knows, in the order of `MEASURES`."""
    found = []
    for key in {key for metrics in models.values() for key in metrics}:
        for place, (pattern, label, form) in enumerate(MEASURES):
            if match := re.fullmatch(pattern, key):
                named = label.format(*map(escaped, match.groups()))
                found.append((place, key, named, form))
                break
    return [
        [label, *(_cell(metrics, key, form) for metrics in models.values())]
        for _, key, label, form in sorted(found)
    ]


def _devices(models: Mapping[str, Metrics]) -> list[str]:
    found = {name: model["device"] for name, model in models.items() if "device" in model}
    if not found:
        return []
    if len(set(found.values())) == 1:
        return [f"Speed on {escaped(next(iter(found.values())))}{_speedup(models)}."]
    said = ", ".join(f"{escaped(name)} on {escaped(device)}" for name, device in found.items())
    return [f"Speeds are not comparable: {said}."]


def _speedup(models: Mapping[str, Metrics]) -> str:
    """How fast the model is beside its teacher, where both were measured."""
    *_, student = models.values()
    times = times_as_fast(student, models.get(TEACHER, {}))
    if TEACHER not in models or len(models) == 1 or times is None:
        return ""
    return (
        f": {short(times)} times as fast as the teacher, each timed in turns with a fixed workload"
    )


def _cell(metrics: Metrics, key: str, form: str) -> str:
    value, found = metrics.get(key), ends(metrics, of(key))
    if not isinstance(value, int | float):
        return "-"
    return format(value, form) if found is None else told(value, found, int(form[1]))


def _origin(lineage: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    teacher = lineage.get("teacher", {})
    known: dict[str, object] = {
        **facts,
        "Teacher's fingerprint": teacher.get("fingerprint"),
        "Width of the teacher's vectors": teacher.get("dim"),
        "Student": lineage.get("student"),
        "Start": lineage.get("start"),
        "Texts trained on": lineage.get("rows"),
        "Steps": lineage.get("steps"),
        "Agreement with the teacher on held-out texts": lineage.get("agreement"),
    }
    lines = [
        f"- {escaped(label)}: {escaped(_short(value))}"
        for label, value in known.items()
        if value is not None
    ]
    blocks = ["\n".join(lines)]
    for key, title in BLOCKS.items():
        if lineage.get(key):
            blocks += [f"{title}:", fenced(lineage[key])]
    return "\n\n".join([*blocks, "`teachonce.json` has the same for programs."])


def _short(value: object) -> object:
    return f"{value:.3f}" if isinstance(value, float) else value


def _limits(card: Card, lineage: Mapping[str, Any], metrics: Metrics) -> str:
    said = (
        f"It reads the first {card.max_tokens} tokens of a text and ignores the rest."
        if card.max_tokens is not None
        else "It reads texts of any length."
    )
    recipe: Mapping[str, Any] = lineage.get("recipe", {})
    if "max_tokens" in recipe:
        said += f" In training, texts were cut at {escaped(recipe['max_tokens'])} tokens."
    # A folder without its projection has another scale, which nobody measured.
    if not card.dropped and (shift := shift_of_cosines(metrics)):
        said += (
            f" Over pairs of held-out texts, its {shift} on average: a threshold that was made for the "
            "teacher must be made anew."
        )
    return f"{said} It does badly what the teacher does badly, and what the corpus had no texts of."


def _to_fill_in() -> str:
    return """- [ ] Licence: of the teacher's weights, and what it says about models trained on its output.
- [ ] Licence: of the corpus.
- [ ] `license:` at the top of this file.
- [ ] What the model is meant for, and what it must not be used for."""
