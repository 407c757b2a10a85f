"""Model -> metrics: sentence similarity, retrieval, likeness to the teacher, speed and size.

One file: the shell, then what it measures as pure functions, then how a model is led through them. The
teacher is not needed: likeness is measured against its cached vectors of held-out rows. "Cosine" is the
dot product of unit vectors; a zero vector has cosine 0 with everything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.measuring.details import likeness_details, neighbour_details
from stages.measuring.documents import read_documents, write_documents
from stages.measuring.heldout import HeldOut
from stages.measuring.index import index_of_rows
from stages.measuring.metrics import (
    CUT,
    Cuts,
    EvaluatedModel,
    measure_retrieval,
    measure_sts,
    with_interval,
)
from stages.measuring.readings import LEAST_PAIRS, judged_readings, measure_readings
from stages.outcome import Fact, Outcome, log, write_json
from stages.params import TEACHER, EvaluateParams
from stages.reading.evaluation_sets import read_sets
from stages.teaching.interface import Closes
from stages.vectors import (
    MOST_ROWS,
    bootstrap_agreement,
    bootstrap_mean,
    cosine_shift,
    evenly,
    rank_agreement,
    top_overlaps,
)
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.manifest import fingerprint
from storage.readings import Readings
from storage.split import Split

VERSION = 7  # raise it when a code change alters the metrics of the same model

OVERLAP = 10
LEAST_ROWS = OVERLAP + 2  # with 11 rows everybody is among everybody's 10 nearest


NOTHING_TO_SHOW: dict[str, Any] = {"similarities": None, "scatter": [], "disagreements": []}


class LoadModel(Protocol):
    """Loads the model."""

    def __call__(self, *, for_sets: bool) -> EvaluatedModel:
        """Load it with the truncation of evaluation sets, or of corpus rows (`embed.max_tokens`)."""


def run(
    params: EvaluateParams,
    *,
    name: str,
    load: LoadModel,
    corpus: Corpus,
    embeddings: Embeddings,
    split: Split,
    root: Path,
    out: Path,
    details: Path,
    documents: Path,
    in_teachers_space: bool,
    widths: Sequence[int],
    readings: Readings | None = None,
) -> Outcome:
    """Measure the model `name` and write its metrics to `out`: flat keys, the same for all models.

    It is long because it reads in the order in which a model is measured: sets, rows, speed, results.

    Paths in `params` are relative to `root`. The held-out rows of `corpus` (of at least one row in all)
    show likeness to the teacher and speed. What the report page shows beside the metrics (pictures of
    likeness, a handful of searches) goes to `details`. The teacher leaves its vectors of documents in
    `documents`; a model `in_teachers_space` is measured on them, too.

    With `readings` it is measured how the model reads those of held-out texts.

    Of a model whose first values are to serve alone, STS, retrieval and likeness are also measured at each
    of these `widths`, as `widths.128.sts.average` and so on: the same vectors, cut. Queries that are cut
    cannot be asked of the teacher's documents.

    Raises:
        TeachonceError: a wrong evaluation file (found before the model is used), documents of the
            teacher that are not these, or a model whose vectors have NaN or Inf.
    """
    sts, retrieval = read_sets(params, root)
    heldout = split.heldout_rows(corpus)
    judged = None if readings is None else judged_readings(readings, split)
    teacher = fingerprint(embeddings.manifest.recipe)
    as_read = f"max_tokens {params.max_tokens}"
    of_teacher = {
        key: vectors
        for key, asked in (retrieval if in_teachers_space else {}).items()
        if (
            vectors := read_documents(
                documents, key, asked.documents, teacher=teacher, as_read=as_read
            )
        )
        is not None
    }
    left_out = _left_out(
        name,
        sets=retrieval,
        of_teacher=of_teacher,
        in_teachers_space=in_teachers_space,
        imported=embeddings.manifest.recipe.get("model") == "unknown",
        heldout=len(heldout),
        judged=None if judged is None else len(judged),
    )
    # Cut vectors need no scaling: all metrics are of cosines.
    cuts = {"": None, **{f"widths.{width}.": width for width in widths}}
    set_metrics: dict[str, Fact] = {}
    searches: list[dict[str, Any]] = []
    indexed: dict[str, tuple[list[str], NDArray[np.float32]]] = {}
    if sts or retrieval:
        # Deleted before the next is loaded: a device may not have the memory for two.
        with _ended(load(for_sets=True)) as encoder:
            set_metrics, searches, indexed = measure_retrieval(
                name, encoder, retrieval, of_teacher, cuts, params.ignore_identical_ids
            )
            set_metrics = {**measure_sts(name, encoder, sts, cuts), **set_metrics}
        del encoder
    with _ended(load(for_sets=False)) as encoder:
        likeness, shown_details = _measure_fidelity(
            name,
            encoder,
            corpus,
            embeddings,
            heldout,
            cuts,
            with_index="index.among" not in set_metrics,
        )
        metrics: dict[str, Fact] = {
            **set_metrics,
            **likeness,
            **(
                measure_readings(
                    name,
                    encoder,
                    readings,
                    judged,
                    embeddings,
                    cuts,
                    in_teachers_space=in_teachers_space or name == TEACHER,
                )
                if readings is not None and judged is not None and len(judged) >= LEAST_PAIRS
                else {}
            ),
            **_measure_speed(name, encoder, corpus, heldout, params.speed_texts),
            **_size(encoder),
        }
    if "device" not in metrics:
        left_out.append(
            "speed and size: the model is behind an API, whose speed is not the model's alone"
        )
    if name == TEACHER:
        write_documents(documents, indexed, teacher=teacher, as_read=as_read)
    write_json(details, {**shown_details, "searches": searches or shown_details["searches"]})
    write_json(out, metrics)
    return Outcome("evaluate", out, _summary(name, metrics, left_out), metrics)


def run_imported(*, out: Path, details: Path, documents: Path) -> Outcome:
    """Write empty metrics for a teacher with imported vectors, so that the report has a row for it."""
    write_documents(documents, {}, teacher="", as_read="")
    write_json(details, {"texts": 0, "searches": [], **NOTHING_TO_SHOW})
    write_json(out, {})
    return Outcome(
        "evaluate",
        out,
        f"{TEACHER}: imported vectors cannot read texts, so nothing is measured of it; students are "
        "compared with its vectors of held-out texts",
    )


def _measure_fidelity(
    name: str,
    encoder: EvaluatedModel,
    corpus: Corpus,
    embeddings: Embeddings,
    heldout: NDArray[np.int64],
    cuts: Cuts,
    *,
    with_index: bool,
) -> tuple[dict[str, Fact], dict[str, Any]]:
    """Metrics of likeness to the teacher's whole vectors, and what the page shows of it.

    With those of an index of the held-out rows, where no retrieval set has documents for one.
    """
    if len(heldout) < LEAST_ROWS:
        return {}, {"texts": len(heldout), "searches": [], **NOTHING_TO_SHOW}
    sample = HeldOut.of(corpus, heldout, MOST_ROWS)
    rows = sample.rows
    log.info("evaluate: %s, likeness to the teacher on %s rows", name, f"{len(rows):,}")
    ours = sample.vectors(name, encoder)
    texts, teacher = corpus.take(rows), embeddings.rows_of(rows)
    metrics: dict[str, Fact] = {}
    for prefix, width in cuts.items():
        cut = ours[:, :width]
        metrics |= with_interval(
            f"{prefix}fidelity.spearman",
            rank_agreement(cut, teacher),
            bootstrap_agreement(cut, teacher),
        )
        shares = top_overlaps(cut, teacher, OVERLAP)
        metrics |= with_interval(
            f"{prefix}fidelity.top{OVERLAP}_overlap", float(shares.mean()), bootstrap_mean(shares)
        )
    if name != TEACHER:
        # Plus zero: -0.0 is the same figure in other bytes.
        metrics["fidelity.cosine_shift"] = round(cosine_shift(ours, teacher), 6) + 0.0
    if with_index:
        metrics |= index_of_rows(ours, cuts)
    # A teacher beside itself is no picture.
    shown = likeness_details(ours, teacher, texts) if name != TEACHER else NOTHING_TO_SHOW
    return metrics, {"texts": len(rows), "searches": neighbour_details(ours, texts), **shown}


def _measure_speed(
    name: str, encoder: EvaluatedModel, corpus: Corpus, heldout: NDArray[np.int64], count: int
) -> dict[str, Fact]:
    log.info("evaluate: %s, speed on %s texts, in turns with a fixed workload", name, f"{count:,}")
    texts = corpus.take(evenly(heldout if len(heldout) >= count else np.arange(corpus.rows), count))
    speed = encoder.speed(texts)
    if speed is None:
        return {}
    return {
        "sentences_per_second": float(f"{speed.texts_per_second:.4g}"),
        "texts_per_reference": float(f"{speed.texts_per_reference:.4g}"),
        "device": speed.device,
    }


def _size(encoder: EvaluatedModel) -> dict[str, Fact]:
    if encoder.parameters is None or encoder.megabytes is None:
        return {}
    copies = encoder.copied_parameters
    return {
        "parameters": encoder.parameters,
        **({"parameters_in_file": encoder.parameters + copies} if copies else {}),
        "megabytes": round(encoder.megabytes, 3),
    }


@contextmanager
def _ended(encoder: EvaluatedModel) -> Iterator[EvaluatedModel]:
    """Close a model that `Closes`, also after an error or Ctrl-C: it asks and pays for nothing more."""
    try:
        yield encoder
    finally:
        if isinstance(encoder, Closes):
            encoder.close()


def _left_out(
    name: str,
    *,
    sets: Collection[str],
    of_teacher: Collection[str],
    in_teachers_space: bool,
    imported: bool,
    heldout: int,
    judged: int | None = None,
) -> list[str]:
    """Returns a phrase for each metric that cannot be measured, with the reason; logs them as warnings."""
    reasons = []
    absent = ", ".join(f"teacher_index.{key}" for key in sets if key not in of_teacher)
    if absent and in_teachers_space and imported:
        reasons.append(f"{absent}: the teacher's vectors were imported, and it reads no documents")
    elif absent and in_teachers_space:
        reasons.append(
            f"{absent}: the teacher left no vectors of these documents; run `teachonce evaluate "
            f"teacher`, then `teachonce evaluate {name}` again"
        )
    if heldout < LEAST_ROWS:
        reasons.append(
            f"fidelity: {heldout} rows are held out, and it takes {LEAST_ROWS}; raise split.heldout, or "
            "add texts"
        )
    if judged is not None and judged < LEAST_PAIRS:
        reasons.append(
            f"readings: {judged} texts with different readings are held out, and it takes {LEAST_PAIRS}; "
            "raise split.heldout, or add readings"
        )
    for metrics in reasons:
        log.warning("evaluate: %s, left out: %s", name, metrics)
    if absent and not in_teachers_space and name != TEACHER:
        # Expected, so not in the summary: such a model cannot search the teacher's index.
        log.info("evaluate: %s, no %s: it is not in this teacher's space", name, absent)
    return reasons


def _summary(name: str, metrics: dict[str, Fact], left_out: Sequence[str]) -> str:
    parts = []
    if "sts.average" in metrics:
        parts.append(f"STS {metrics['sts.average']:.2f}")
    parts += [
        f"nDCG@{CUT} {value:.3f} on {key.split('.')[1]}"
        for key, value in metrics.items()
        if key.startswith("retrieval.") and key.endswith(f".ndcg@{CUT}")
    ]
    if "fidelity.spearman" in metrics:
        parts.append(f"{metrics['fidelity.spearman']:.3f} rank correlation with the teacher")
    if "readings.reading_to_text" in metrics:
        parts.append(f"{metrics['readings.reading_to_text']:.3f} of readings find their texts")
    if "device" in metrics:
        parts.append(f"{metrics['sentences_per_second']:,} sentences/s on {metrics['device']}")
    return "; left out: ".join([f"{name}: {', '.join(parts)}", *left_out])
