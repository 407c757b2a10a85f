"""Model -> metrics: sentence similarity, retrieval, likeness to the teacher, speed and size.

One file: the shell, then what it measures as pure functions, then how a model is led through them. The
teacher is not needed: likeness is measured against its cached vectors of held-out rows. "Cosine" is the
dot product of unit vectors; a zero vector has cosine 0 with everything.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.measuring.details import likeness_details, neighbour_details, search_details
from stages.measuring.documents import read_documents, write_documents
from stages.models.config import Role
from stages.outcome import Fact, Outcome, Progress, log, write_json
from stages.params import TEACHER, EvaluateParams
from stages.reading.evaluation_sets import (
    RetrievalSet,
    StsSet,
    beir_folder,
    read_beir,
    read_sts,
    sts_files,
)
from stages.vectors import (
    MOST_ROWS,
    NO_DOCUMENT,
    bootstrap_agreement,
    bootstrap_mean,
    bootstrap_spearman,
    cosine_shift,
    evenly,
    interval,
    nearest,
    pair_cosines,
    rank_agreement,
    sts_correlation,
    top_overlaps,
)
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.errors import TeachonceError, shown
from storage.manifest import fingerprint
from storage.split import Split

if TYPE_CHECKING:
    from stages.models.speed import Speed

VERSION = 6  # raise it when a code change alters the metrics of the same model

OVERLAP = 10
LEAST_ROWS = OVERLAP + 2  # with 11 rows everybody is among everybody's 10 nearest
CUT = 10  # of nDCG and MRR
DEPTH = 100  # of recall
IGNORED = "identical_ids_ignored"  # queries of a set whose own document was no result
TEXTS_AT_ONCE = 2048  # between two looks at the clock

Cuts = Mapping[str, int | None]
"""Prefix of metrics' keys -> width to which vectors are cut for them; None for the whole width."""

NOTHING_TO_SHOW: dict[str, Any] = {"similarities": None, "scatter": [], "disagreements": []}


class VectorsWithCounts(Protocol):
    """Vectors of n texts, with the number of truncated ones."""

    @property
    def vectors(self) -> NDArray[np.float32]:
        """(n, dim) float32."""

    @property
    def truncated(self) -> int:
        """Number of texts longer than the model's limit."""


class EvaluatedModel(Protocol):
    """A model that can be evaluated."""

    @property
    def parameters(self) -> int:
        """Number of weights."""

    @property
    def megabytes(self) -> float:
        """Size of the weights on the disk, in 10^6 bytes."""

    def speed(self, texts: Sequence[str]) -> Speed:
        """Measure the speed of encoding texts of the role `text`."""

    @property
    def in_windows(self) -> bool:
        """Whether a text longer than the limit is read in windows; else it is cut."""

    def encode_counted(self, texts: Sequence[str], *, role: Role) -> VectorsWithCounts:
        """Returns vectors of n texts, in their order, of any length."""


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
) -> Outcome:
    """Measure the model `name` and write its metrics to `out`: flat keys, the same for all models.

    Paths in `params` are relative to `root`. The held-out rows of `corpus` (of at least one row in all)
    show likeness to the teacher and speed. What the report page shows beside the metrics (pictures of
    likeness, a handful of searches) goes to `details`. The teacher leaves its vectors of documents in
    `documents`; a model `in_teachers_space` is measured on them, too.

    Of a model whose first values are to serve alone, STS, retrieval and likeness are also measured at each
    of these `widths`, as `widths.128.sts.average` and so on: the same vectors, cut. Queries that are cut
    cannot be asked of the teacher's documents.

    Raises:
        TeachonceError: a wrong evaluation file (found before the model is used), documents of the
            teacher that are not these, or a model whose vectors have NaN or Inf.
    """
    sts = {
        key: read_sts(sts_files(glob, root, f"evaluate.sts.{key}"))
        for key, glob in params.sts.items()
    }
    retrieval = {
        key: read_beir(beir_folder(folder, root, key), key)
        for key, folder in params.retrieval.items()
    }
    heldout = split.heldout_rows(corpus)
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
    )
    # Cut vectors need no scaling: all metrics are of cosines.
    cuts = {"": None, **{f"widths.{width}.": width for width in widths}}
    set_metrics: dict[str, Fact] = {}
    searches: list[dict[str, Any]] = []
    indexed: dict[str, tuple[list[str], NDArray[np.float32]]] = {}
    if sts or retrieval:
        # Deleted before the next is loaded: a device may not have the memory for two.
        encoder = load(for_sets=True)
        set_metrics, searches, indexed = _measure_retrieval(
            name, encoder, retrieval, of_teacher, cuts, params.ignore_identical_ids
        )
        set_metrics = {**_measure_sts(name, encoder, sts, cuts), **set_metrics}
        del encoder
    encoder = load(for_sets=False)
    likeness, shown_details = _measure_fidelity(name, encoder, corpus, embeddings, heldout, cuts)
    metrics: dict[str, Fact] = {
        **set_metrics,
        **likeness,
        **_measure_speed(name, encoder, corpus, heldout, params.speed_texts),
        "parameters": encoder.parameters,
        "megabytes": round(encoder.megabytes, 3),
    }
    if name == TEACHER:
        write_documents(documents, indexed, teacher=teacher, as_read=as_read)
    write_json(details, {**shown_details, "searches": searches or shown_details["searches"]})
    write_json(out, metrics)
    return Outcome("evaluate", out, _summary(name, metrics, left_out), metrics)


def run_imported(*, out: Path, details: Path, documents: Path) -> Outcome:
    """Leave empty metrics of a teacher whose vectors were imported, so that the report has a row for it."""
    write_documents(documents, {}, teacher="", as_read="")
    write_json(details, {"texts": 0, "searches": [], **NOTHING_TO_SHOW})
    write_json(out, {})
    return Outcome(
        "evaluate",
        out,
        f"{TEACHER}: imported vectors cannot read texts, so nothing is measured of it; students are "
        "compared with its vectors of held-out texts",
    )


def retrieval_metrics(found: NDArray[np.int64], asked: RetrievalSet) -> dict[str, float]:
    """Means over the queries of `retrieval_scores`."""
    return {what: float(of.mean()) for what, of in retrieval_scores(found, asked).items()}


def retrieval_scores(
    results: NDArray[np.int64], asked: RetrievalSet
) -> dict[str, NDArray[np.float64]]:
    """nDCG@10, MRR@10 and recall@100 of each query; each 0 to 1.

    Definitions of trec_eval: a document's gain is its score, divided by log2(rank + 1), and nDCG is the
    sum over the first 10, as a share of the best sum that any order gives.

    Args:
        results: (queries, depth) int64 places of documents, best first; NO_DOCUMENT for none.
        asked: The retrieval set, with the relevant documents of each query.
    """
    places = {document: place for place, document in enumerate(asked.document_ids)}
    discounts = 1 / np.log2(np.arange(2, CUT + 2))
    ndcg, reciprocal, recall = np.zeros((3, len(results)))
    for row, query in enumerate(asked.query_ids):
        gain_of = {places[key]: score for key, score in asked.relevant[query].items()}
        gains = np.array([gain_of.get(int(place), 0) for place in results[row, :DEPTH]])
        best = np.sort(list(gain_of.values()))[::-1][:CUT]
        top = gains[:CUT]
        ndcg[row] = (top @ discounts[: len(top)]) / (best @ discounts[: len(best)])
        reciprocal[row] = 1 / (np.argmax(top > 0) + 1) if top.any() else 0
        recall[row] = np.count_nonzero(gains) / len(gain_of)
    return {f"ndcg@{CUT}": ndcg, f"mrr@{CUT}": reciprocal, f"recall@{DEPTH}": recall}


def _measure_sts(
    name: str, encoder: EvaluatedModel, sets: dict[str, StsSet], cuts: Cuts
) -> dict[str, Fact]:
    scores: dict[str, float] = {}
    shares: dict[str, Fact] = {}
    resampled: dict[str, NDArray[np.float64]] = {}
    for key, pairs in sets.items():
        log.info("evaluate: %s, sts.%s, %s pairs", name, key, f"{len(pairs.scores):,}")
        vectors, longer = _vectors(name, encoder, pairs.texts, "text")
        shares |= _share_cut(name, f"sts.{key}", longer, len(pairs.texts))
        first, second = np.split(vectors, 2)
        for prefix, width in cuts.items():
            ours = first[:, :width], second[:, :width]
            scores[f"{prefix}sts.{key}"] = sts_correlation(*ours, pairs.scores)
            resampled[f"{prefix}sts.{key}"] = 100 * bootstrap_spearman(
                pair_cosines(*ours), pairs.scores
            )
    for prefix in cuts if sets else ():
        keys, average = [f"{prefix}sts.{key}" for key in sets], f"{prefix}sts.average"
        scores[average] = statistics.fmean(scores[key] for key in keys)
        # As many resamples of each set as the largest set has.
        fewest = min(len(resampled[key]) for key in keys)
        resampled[average] = np.mean([resampled[key][:fewest] for key in keys], axis=0)
    with_intervals = [_with_interval(key, value, resampled[key]) for key, value in scores.items()]
    return {**{key: value for part in with_intervals for key, value in part.items()}, **shares}


def _measure_retrieval(
    name: str,
    encoder: EvaluatedModel,
    sets: dict[str, RetrievalSet],
    of_teacher: dict[str, NDArray[np.float32]],
    cuts: Cuts,
    ignore_identical_ids: bool,
) -> tuple[dict[str, Fact], list[dict[str, Any]], dict[str, tuple[list[str], NDArray[np.float32]]]]:
    """Metrics of all sets, a handful of searches in the first, and the documents' vectors.

    Args:
        name: Name of the model.
        encoder: The model.
        sets: The retrieval sets, by name.
        of_teacher: Set -> the teacher's vectors of its documents, if the model is in the teacher's space.
        cuts: Widths to which both sides' vectors are cut; the teacher's documents are never cut.
        ignore_identical_ids: Whether to leave out a document with the query's own id.
    """
    metrics: dict[str, Fact] = {}
    searches: list[dict[str, Any]] = []
    indexed = {}
    for key, asked in sets.items():
        log.info(
            "evaluate: %s, retrieval.%s, %s documents, %s queries",
            name,
            key,
            f"{len(asked.documents):,}",
            f"{len(asked.queries):,}",
        )
        documents, longer = _vectors(name, encoder, asked.documents, "document")
        queries, longer_queries = _vectors(name, encoder, asked.queries, "query")
        metrics |= _share_cut(
            name,
            f"retrieval.{key}",
            longer + longer_queries,
            len(asked.documents) + len(asked.queries),
        )
        sides = {
            f"{prefix}retrieval": (queries[:, :width], documents[:, :width])
            for prefix, width in cuts.items()
        }
        if key in of_teacher:
            sides["teacher_index"] = queries, of_teacher[key]
        ignored = asked.identical_ids if ignore_identical_ids else None
        for kind, (ours, index) in sides.items():
            scores_by_metric = retrieval_scores(nearest(ours, index, DEPTH, ignored), asked)
            for what, scores in scores_by_metric.items():
                metrics |= _with_interval(
                    f"{kind}.{key}.{what}", float(scores.mean()), bootstrap_mean(scores)
                )
        if ignored is not None and (count := int(np.count_nonzero(ignored != NO_DOCUMENT))):
            log.info(
                "evaluate: %s, retrieval.%s, %s of %s queries have a document with their own id, which is "
                "no result of theirs (evaluate.ignore_identical_ids)",
                name,
                key,
                f"{count:,}",
                f"{len(asked.queries):,}",
            )
            metrics[f"retrieval.{key}.{IGNORED}"] = count
        searches = searches or search_details(key, asked, queries, documents, ignored)
        indexed[key] = asked.documents, documents
    return metrics, searches, indexed


def _measure_fidelity(
    name: str,
    encoder: EvaluatedModel,
    corpus: Corpus,
    embeddings: Embeddings,
    heldout: NDArray[np.int64],
    cuts: Cuts,
) -> tuple[dict[str, Fact], dict[str, Any]]:
    """Metrics of likeness to the teacher's whole vectors, and what the page shows of it."""
    if len(heldout) < LEAST_ROWS:
        return {}, {"texts": len(heldout), "searches": [], **NOTHING_TO_SHOW}
    rows = evenly(heldout, min(MOST_ROWS, len(heldout)))
    log.info("evaluate: %s, likeness to the teacher on %s rows", name, f"{len(rows):,}")
    texts = corpus.take(rows)
    ours, _ = _vectors(name, encoder, texts, "text")
    teacher = embeddings.rows_of(rows)
    metrics: dict[str, Fact] = {}
    for prefix, width in cuts.items():
        cut = ours[:, :width]
        metrics |= _with_interval(
            f"{prefix}fidelity.spearman",
            rank_agreement(cut, teacher),
            bootstrap_agreement(cut, teacher),
        )
        shares = top_overlaps(cut, teacher, OVERLAP)
        metrics |= _with_interval(
            f"{prefix}fidelity.top{OVERLAP}_overlap", float(shares.mean()), bootstrap_mean(shares)
        )
    if name != TEACHER:
        # Plus zero: -0.0 is the same figure in other bytes.
        metrics["fidelity.cosine_shift"] = round(cosine_shift(ours, teacher), 6) + 0.0
    # A teacher beside itself is no picture.
    shown = likeness_details(ours, teacher, texts) if name != TEACHER else NOTHING_TO_SHOW
    return metrics, {"texts": len(rows), "searches": neighbour_details(ours, texts), **shown}


def _with_interval(key: str, value: float, resampled: NDArray[np.float64]) -> dict[str, Fact]:
    """A metric and the ends of its 95 % confidence interval."""
    low, high = interval(resampled, value)
    return {key: round(value, 6), f"{key}.low": round(low, 6), f"{key}.high": round(high, 6)}


def _measure_speed(
    name: str, encoder: EvaluatedModel, corpus: Corpus, heldout: NDArray[np.int64], count: int
) -> dict[str, Fact]:
    log.info("evaluate: %s, speed on %s texts, in turns with a fixed workload", name, f"{count:,}")
    texts = corpus.take(evenly(heldout if len(heldout) >= count else np.arange(corpus.rows), count))
    speed = encoder.speed(texts)
    return {
        "sentences_per_second": float(f"{speed.texts_per_second:.4g}"),
        "texts_per_reference": float(f"{speed.texts_per_reference:.4g}"),
        "device": speed.device,
    }


def _left_out(
    name: str,
    *,
    sets: Collection[str],
    of_teacher: Collection[str],
    in_teachers_space: bool,
    imported: bool,
    heldout: int,
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
    for metrics in reasons:
        log.warning("evaluate: %s, left out: %s", name, metrics)
    if absent and not in_teachers_space and name != TEACHER:
        # Expected, so not in the summary: such a model cannot search the teacher's index.
        log.info("evaluate: %s, no %s: it is not in this teacher's space", name, absent)
    return reasons


def _share_cut(name: str, key: str, cut: int, texts: int) -> dict[str, Fact]:
    """Returns the share of a set's texts that were truncated, and warns if there are any."""
    if cut:
        log.warning(
            "evaluate: %s, %s, %s of %s texts are longer than the model reads here, and were cut "
            "(evaluate.max_tokens)",
            name,
            key,
            f"{cut:,}",
            f"{texts:,}",
        )
    return {f"{key}.truncated": round(cut / texts, 6)}


def _vectors(
    name: str, encoder: EvaluatedModel, texts: Sequence[str], role: Role
) -> tuple[NDArray[np.float32], int]:
    """Returns (n, dim) finite vectors of n >= 1 texts, and the number of truncated texts."""
    progress = Progress(f"evaluate: {name}", total=len(texts), unit="texts")
    parts, cut = [], 0
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        batch = texts[first : first + TEXTS_AT_ONCE]
        encoded = encoder.encode_counted(batch, role=role)
        parts.append(encoded.vectors)
        cut += 0 if encoder.in_windows else encoded.truncated
        progress.advance(len(batch))
    vectors = np.concatenate(parts)
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise TeachonceError(
            name,
            f"{len(wrong)} of {len(vectors)} vectors have NaN or Inf, the first that of "
            f"{shown(repr(texts[wrong[0]]))}",
            "train it again with a smaller learning_rate or with precision: fp32",
        )
    return vectors, cut


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
    parts.append(f"{metrics['sentences_per_second']:,} sentences/s on {metrics['device']}")
    return "; left out: ".join([f"{name}: {', '.join(parts)}", *left_out])
