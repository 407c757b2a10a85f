"""A model's metrics on evaluation sets: sentence similarity and retrieval, each with its interval."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.measuring.details import search_details
from stages.measuring.index import index_of_set, set_to_index
from stages.models.speed import Speed
from stages.outcome import Fact, Progress, log
from stages.reading.evaluation_sets import RetrievalSet, StsSet
from stages.vectors import (
    NO_DOCUMENT,
    bootstrap_mean,
    bootstrap_spearman,
    interval,
    nearest,
    pair_cosines,
    sts_correlation,
)
from storage.errors import TeachonceError, shown
from storage.roles import Role

CUT = 10  # of nDCG and MRR


DEPTH = 100  # of recall


IGNORED = "identical_ids_ignored"  # queries of a set whose own document was no result


TEXTS_AT_ONCE = 2048  # between two looks at the clock


Cuts = Mapping[str, int | None]
"""Prefix of metrics' keys -> width to which vectors are cut for them; None for the whole width."""


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
    def parameters(self) -> int | None:
        """Number of weights; one that several layers share counts once. None if unknown."""

    @property
    def copied_parameters(self) -> int:
        """How many more numbers its file has: copies of weights that layers share."""

    @property
    def megabytes(self) -> float | None:
        """Size of the weights on the disk, in 10^6 bytes; None if unknown."""

    def speed(self, texts: Sequence[str]) -> Speed | None:
        """Measure the speed of encoding texts of the role `text`; None if it would not be the model's."""

    @property
    def in_windows(self) -> bool:
        """Whether a text longer than the limit is read in windows; else it is cut."""

    def encode_counted(self, texts: Sequence[str], *, role: Role) -> VectorsWithCounts:
        """Returns vectors of n texts, in their order, of any length."""


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


def measure_sts(
    name: str, encoder: EvaluatedModel, sets: dict[str, StsSet], cuts: Cuts
) -> dict[str, Fact]:
    """Spearman correlation x 100 of each set and their mean, at each width, with 95 % intervals.

    Args:
        name: Name of the model.
        encoder: The model.
        sets: The sets of pairs, by name.
        cuts: Prefix of a metric -> the width to which vectors are cut for it; None for all values.

    Returns:
        Flat metrics, such as `sts.B`, `sts.average.low` and `widths.128.sts.average`.
    """
    scores: dict[str, float] = {}
    shares: dict[str, Fact] = {}
    resampled: dict[str, NDArray[np.float64]] = {}
    for key, pairs in sets.items():
        log.info("evaluate: %s, sts.%s, %s pairs", name, key, f"{len(pairs.scores):,}")
        vectors, longer = encoded_in_steps(name, encoder, pairs.texts, "text")
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
    with_intervals = [with_interval(key, value, resampled[key]) for key, value in scores.items()]
    return {**{key: value for part in with_intervals for key, value in part.items()}, **shares}


def measure_retrieval(
    name: str,
    encoder: EvaluatedModel,
    sets: dict[str, RetrievalSet],
    of_teacher: dict[str, NDArray[np.float32]],
    cuts: Cuts,
    ignore_identical_ids: bool,
) -> tuple[dict[str, Fact], list[dict[str, Any]], dict[str, tuple[list[str], NDArray[np.float32]]]]:
    """Metrics of all sets, a handful of searches in the first, and the documents' vectors.

    Of the largest set also what an index of its documents costs and finds.

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
    indexed, largest = {}, set_to_index(sets)
    for key, asked in sets.items():
        log.info(
            "evaluate: %s, retrieval.%s, %s documents, %s queries",
            name,
            key,
            f"{len(asked.documents):,}",
            f"{len(asked.queries):,}",
        )
        documents, longer = encoded_in_steps(name, encoder, asked.documents, "document")
        queries, longer_queries = encoded_in_steps(name, encoder, asked.queries, "query")
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
                metrics |= with_interval(
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
        if key == largest:
            metrics |= index_of_set(key, queries, documents, cuts)
        searches = searches or search_details(key, asked, queries, documents, ignored)
        indexed[key] = asked.documents, documents
    return metrics, searches, indexed


def with_interval(key: str, value: float, resampled: NDArray[np.float64]) -> dict[str, Fact]:
    """A metric and the ends of its 95 % confidence interval."""
    low, high = interval(resampled, value)
    return {key: round(value, 6), f"{key}.low": round(low, 6), f"{key}.high": round(high, 6)}


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


def encoded_in_steps(
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
    check_finite(name, vectors, texts)
    return vectors, cut


def check_finite(name: str, vectors: NDArray[np.float32], texts: Sequence[str]) -> None:
    """Raise TeachonceError if a model's (n, dim) vectors of n texts have NaN or Inf."""
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise TeachonceError(
            name,
            f"{len(wrong)} of {len(vectors)} vectors have NaN or Inf, the first that of "
            f"{shown(repr(texts[wrong[0]]))}",
            "train it again with a smaller learning_rate or with precision: fp32",
        )
