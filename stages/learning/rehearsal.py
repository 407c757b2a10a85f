"""A rehearsal of learning, for `plan`: steps with random vectors, and what a whole training will take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import nn

from stages.learning.loop import TrainingSetup, make_optimizer, take_step
from stages.models.config import CHARACTERS
from stages.outcome import seconds_of
from stages.params import EmbedParams, TrainingParams
from stages.vectors import unit
from storage.caches import Caches
from storage.column import text_keys_of
from storage.corpus import Corpus, put_texts, text_key
from storage.embeddings import Embeddings, fingerprints, put_vectors
from storage.manifest import Manifest, fingerprint
from storage.mixes import Mixes, draw_pairs
from storage.roles import ROLES, Role
from storage.split import Split
from storage.store import Object, Store

WARM_STEPS, MOST_STEPS = 2, 50
"""Of a measurement: 2 that are not counted, and at most 50 that are."""


def random_caches(
    texts: Sequence[tuple[str, Role]],
    dim: int,
    *,
    heldout: int,
    params: EmbedParams,
    recipe: Mapping[str, Any],
    store: Store,
) -> Caches:
    """Returns caches of some texts with random vectors of unit length and no neighbours yet.

    Args:
        texts: The texts, each with its role, no two the same.
        dim: Width of the vectors.
        heldout: Number of rows to hold out, about; half of them at most.
        params: The settings `embed`: how vectors are stored, and how many mixes there are.
        recipe: The teacher's recipe, which has its prompts.
        store: A scratch store.
    """
    manifest = partial(Manifest, parent=None)
    of_role = {role: [text for text, its in texts if its == role] for role in ROLES}
    shards = tuple(
        put_texts(store, [(text, text_key(text, role)) for text in of_role[role]], role)
        for role in ROLES
        if of_role[role]
    )
    corpus = Corpus(store, manifest(kind="corpus", recipe={}, objects=shards))
    draw = np.random.default_rng(0)

    def put_random(key: str, keys: NDArray[np.bytes_], more: Mapping[str, pa.Array]) -> Object:
        return put_vectors(
            store,
            key,
            vectors=unit(draw.standard_normal((len(keys), dim), np.float32)),
            text_keys=keys,
            storage=params.storage,
            facts={},
            more=more,
        )

    digests = [corpus.shard_digest(shard) for shard in range(len(shards))]
    keys = [text_keys_of(corpus.batch(shard)) for shard in range(len(shards))]
    teachers = fingerprints(dict(recipe), corpus.roles)
    embedded = tuple(
        put_random(f"vectors/{teachers[role]}/{digest}.arrow", of_shard, {})
        for role, digest, of_shard in zip(corpus.roles, digests, keys, strict=True)
    )
    of_vectors = manifest(kind="embeddings", recipe=dict(recipe), objects=embedded)
    vectors, mixes = Embeddings(store, of_vectors, corpus), None
    if params.mixes:  # of a corpus without roles, so of its one shard
        pairs = draw_pairs(digests[0], corpus.rows, share=params.mixes, alpha=1.0, seed=0)
        key = f"mixes/{fingerprint({})}/{digests[0]}.arrow"
        put = put_random(key, pairs.keys(keys[0]), pairs.columns())
        mixes = Mixes(store, manifest(kind="mixes", recipe={}, objects=(put,)), corpus)
    share = min(0.5, heldout / corpus.rows)
    split = Split(corpus=corpus.manifest.content, heldout=share, evaluation=())
    labelled = draw.integers(0, corpus.rows, (corpus.rows, 3))
    return Caches(corpus, vectors, None, split, store, mixes, labelled=labelled)


def measure(
    model: nn.Module,
    setup: TrainingSetup,
    params: TrainingParams,
    seconds: float,
    *,
    a_row: float,
    judged: float,
) -> dict[str, float]:
    """Take some of the first steps, for `seconds` or `MOST_STEPS`, and score once.

    Args:
        model: The student with everything else that is trained.
        setup: Batches, loss and score.
        params: The settings of the run.
        seconds: For the steps; the last one may go beyond.
        a_row: Characters that are read of a row.
        judged: Characters that a score reads.

    Returns:
        The number of steps after a warm-up, steps an hour, and characters a second of steps and of a score.
    """
    optimizer, batches, taken = make_optimizer(model, params), setup.batches(0), list[float]()
    while len(taken) < WARM_STEPS + MOST_STEPS and sum(taken[WARM_STEPS:]) <= seconds:
        step, rows = len(taken), batches[len(taken) % len(batches)]
        do = partial(take_step, model, optimizer, setup, rows, step, MOST_STEPS, params)
        taken.append(seconds_of(do))
    model.eval()
    counted = taken[WARM_STEPS:]
    a_step = sum(counted) / len(counted)
    return {
        "steps": len(counted),
        "steps_per_hour": 3600 / a_step,
        "learned_per_second": len(batches[0]) * a_row / a_step,
        "judged_per_second": judged / seconds_of(setup.score),
    }


def training(
    params: TrainingParams, at: dict[str, float], rows: int, *, a_row: float, judged: float
) -> dict[str, float]:
    """Returns the steps and seconds of a whole training.

    Args:
        params: The settings of the run.
        at: What `measure` returned, and `load_seconds`.
        rows: Number of rows to learn from.
        a_row: Characters that are read of a row.
        judged: Characters that a score reads.
    """
    batch = min(params.batch_size, rows)
    steps = params.epochs * (rows // batch)
    read, scores = steps * batch * a_row, 1 + math.ceil(steps / params.evaluate_every)
    seconds = read / at["learned_per_second"] + scores * judged / at["judged_per_second"]
    return {"steps": steps, "seconds": at["load_seconds"] + seconds}


def characters(texts: Iterable[str], max_tokens: int) -> int:
    """Returns the characters of all texts together, as far as they are read."""
    return sum(min(len(text), CHARACTERS * max_tokens) for text in texts)
