"""Check that a loaded teacher still returns the vectors of its cache.

A fingerprint covers settings and files, not drivers, kernels and library versions. So each process that
loads the teacher embeds a few probe texts first: the first process records their vectors, all others
compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.outcome import log
from stages.teaching.sharing import WIDEST_ROW_BYTES, Sharing
from stages.vectors import row_cosines, row_stretches
from storage.embeddings import (
    BadVectorsError,
    as_read,
    check_received,
    check_vectors,
    put_vectors,
    vectors_of,
)
from storage.errors import DamagedError, TeachonceError, shown
from storage.probe import PROBE_TEXTS, probe_key, probe_text_keys
from storage.store import Header, Object, Store, remake_command

LEAST_COSINE: Mapping[str, float] = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999}
"""Precision -> lowest cosine of a probe text's vector with the recorded one.

Measured (EXPERIMENTS.md), as 1 - cosine of the worst text: float32 with other threads, batches and
instruction sets 1e-12, bf16 with other batches 7e-5; one token fewer read of a long text 9e-4. The faults
to be detected move vectors farther: another pooling, a lost prompt, a wrong mask.
"""

MOST_STRETCH: Mapping[str, float] = {"fp32": 0.001, "fp16": 0.01, "bf16": 0.01}
"""Precision -> largest relative difference in length: a cosine does not show a lost normalisation."""

SHOWN_CHARACTERS = 40

OTHER_MACHINE_CURE = (
    "likely another version of torch or transformers, another driver, kernel or device: run it as the "
    "cache was made (`teachonce ls` says by whom and where), or point `store` and `remote` elsewhere to "
    "begin a new cache"
)
NEW_MODEL_CURE = (
    "likely another model behind the same name: if the server has a name for the old version, write that "
    "one into embed.teacher, or point `store` and `remote` elsewhere to begin a new cache"
)


class DriftedTeacherError(TeachonceError):
    """The teacher returns other vectors than those of its cache."""


def check_teacher(
    encode: Callable[[Sequence[str]], NDArray[np.float32]],
    *,
    teacher: str,
    precision: str,
    storage: str,
    store: Store,
    shared: Sharing,
    behind_api: bool = False,
) -> None:
    """Compare the teacher's vectors of the probe texts with the recorded ones, or record them.

    A record is looked for in the store, then on the remote, and a new one is uploaded at once, so that
    machines without a common disk are compared with each other.

    Args:
        encode: The teacher: n texts -> (n, dim) float32.
        teacher: The teacher's fingerprint.
        precision: "fp32", "bf16" or "fp16": sets the tolerance.
        storage: The setting `embed.storage`; vectors are compared after this rounding.
        store: The store of the record.
        shared: The connection to the remote.
        behind_api: Whether it is behind an API, so that no other machine or version explains the change.

    Raises:
        DriftedTeacherError: a probe text's vector is out of tolerance.
        DamagedError: the record has the wrong columns, text keys or width.
    """
    key = probe_key(teacher)

    def accept(batch: pa.RecordBatch, _: Header | None) -> None:
        check_received(batch, text_keys=probe_text_keys(), storage=storage)

    if store.find(key) is None:
        shared.try_fetch(key, accept, max_bytes=len(PROBE_TEXTS) * WIDEST_ROW_BYTES)
    vectors = encode(PROBE_TEXTS)
    entry = store.find(key) or _record(vectors, key, storage=storage, store=store)
    if entry is None:
        return
    shared.push_probe_record(entry)
    path, batch = store.path(key), store.open(entry)
    try:
        accept(batch, None)
    except ValueError as error:
        raise DamagedError(
            path, str(error), f"rm -f '{path}', then {remake_command(key)}"
        ) from error
    try:
        check_vectors(vectors, rows=np.arange(len(vectors)), key=key, storage=storage)
        drift = describe_drift(vectors_of(batch), as_read(vectors, storage), precision=precision)
    except BadVectorsError as error:
        drift = error.problem
    if drift is not None and behind_api:
        raise DriftedTeacherError(
            path,
            f"the server gives other vectors than those recorded there when the cache was begun: {drift}; "
            "nothing was stored",
            NEW_MODEL_CURE,
        )
    if drift is not None:
        raise DriftedTeacherError(
            path,
            "the teacher gives other vectors than those recorded there when its cache was begun: "
            f"{drift}; nothing was stored",
            OTHER_MACHINE_CURE,
        )


def describe_drift(
    recorded: NDArray[np.floating], vectors: NDArray[np.floating], *, precision: str
) -> str | None:
    """Describe how the probe texts' vectors differ from the expected ones; None within tolerance.

    Args:
        recorded: (16, dim) expected vectors: of this cache, or of plain transformers in float32.
        vectors: (16, dim) actual vectors.
        precision: The lower of the two precisions.
    """
    if recorded.shape != vectors.shape:
        return f"they have {vectors.shape[1]} values, not {recorded.shape[1]}"
    cosines, stretches = row_cosines(recorded, vectors), row_stretches(recorded, vectors)
    least, most = LEAST_COSINE[precision], MOST_STRETCH[precision]
    # Not `cosines < least`, which is False for NaN.
    outside = ~((cosines >= least) & (stretches <= most))
    if not outside.any():
        return None
    worst = int(np.argmin(np.where(outside, np.nan_to_num(cosines, nan=-1.0), np.inf)))
    text = shown(repr(PROBE_TEXTS[worst][:SHOWN_CHARACTERS]))
    return (
        f"{outside.sum()} of {len(PROBE_TEXTS)} probe texts are out of tolerance, the worst is number "
        f"{worst + 1} ({text}): cosine {cosines[worst]:.6f} ({precision} allows {least:g}), length off by "
        f"{100 * stretches[worst]:.2f} % (it allows {100 * most:g} %)"
    )


def _record(vectors: NDArray[np.float32], key: str, *, storage: str, store: Store) -> Object | None:
    """Record the probe texts' vectors; None if the teacher has none for some of them."""
    try:
        return put_vectors(
            store, key, vectors=vectors, text_keys=probe_text_keys(), storage=storage, facts={}
        )
    except BadVectorsError as error:
        # A static model of English words has no vector for the Hindi probe text, and is a valid teacher.
        log.warning("embed: no guard against another driver or version: %s", error.problem)
        return None
