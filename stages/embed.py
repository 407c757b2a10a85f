"""Corpus -> the teacher's vectors. The one expensive stage, so the one that never does a thing twice.

Each shard is published when it is done and named by the teacher's fingerprint and its own texts. What
is there is not made again, by whoever and whenever it was made; if all is there, no teacher is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.outcome import Outcome, Progress, log, write_json
from stages.params import EmbedParams
from stages.sharing import Sharing
from storage.column import text_keys_of
from storage.corpus import Corpus
from storage.embeddings import check_received, put_vectors
from storage.errors import MissingError, TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.remote import Remote
from storage.store import Accept, Header, Object, Store

# Raise it when a change of code moves the vectors of the same settings out of tolerance, and only
# then: every cache in the world is made again.
VERSION = 1


class Encoded(Protocol):
    """What a teacher returns for n texts: vectors (n, dim) float32, tokens read, texts cut."""

    @property
    def vectors(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def tokens(self) -> int: ...  # noqa: D102
    @property
    def truncated(self) -> int: ...  # noqa: D102


WIDEST_ROW_BYTES = 4 << 16
"""A vector of 65,536 float32 values; a shard from the remote with more a row is refused unread."""

Encode = Callable[[Sequence[str]], Encoded]
"""The whole interface to a teacher: texts -> vectors in the same order, with counts."""


def recipe(params: EmbedParams, files: Mapping[str, str]) -> dict[str, Any]:
    """Settings that change the vectors.

    The teacher stands here by the hashes of its files (weights, tokenizer, pooling, normalisation),
    not by its name: a mirror or a moved folder is the same teacher. `batch_tokens` only changes how
    fast the vectors come.
    """
    return {
        "version": VERSION,
        "teacher": dict(files),
        "prompt": params.prompt,
        "max_tokens": params.max_tokens,
        "precision": params.precision,
        "storage": params.storage,
        "trust_remote_code": params.trust_remote_code,
    }


def run(
    params: EmbedParams,
    *,
    files: Mapping[str, str],
    corpus: Corpus,
    store: Store,
    remote: Remote | None,
    load_teacher: Callable[[], Encode] | None,
    out: Path,
    facts: Path,
) -> Outcome:
    """Embed the shards that the store and the remote lack, then write the manifest of all of them.

    With a remote, missing shards are asked for first, and all shards are handed over in the background.
    A shard that could not be handed over is told, but the run has done its work: `teachonce push` sends
    what is missing there.

    Args:
        params: Settings.
        files: Name -> sha256 of the teacher's files.
        corpus: The texts.
        store: Where vectors go.
        remote: Shared with other boxes; None if there is none.
        load_teacher: Called once, and only if a shard is missing; None if the teacher is not here.
        out: The manifest.
        facts: Counts for `dvc metrics`.

    Raises:
        MissingError: shards are missing and there is no teacher.
        BadVectorsError: the teacher returned poison; earlier shards are kept.
        RemoteError: shards are missing and the remote cannot be asked for them.
    """
    made_of = recipe(params, files)
    teacher = fingerprint(made_of)
    keys = [f"vectors/{teacher}/{corpus.shard_digest(s)}.arrow" for s in range(len(corpus.objects))]
    found = {key: store.find(key) for key in keys}
    todo = [shard for shard, key in enumerate(keys) if found[key] is None]
    log.info("embed: %d of %d shards are in the store", len(keys) - len(todo), len(keys))
    made: list[int] = []
    with Sharing(remote, store) as shared:
        todo = _fetched(todo, keys, shared, params=params, corpus=corpus)
        for entry in found.values():
            if entry is not None:  # the run that made it may have been killed before it was sent
                shared.hand_over(entry)
        if todo:
            encode = _loaded(load_teacher, todo, len(keys))
            made = _embed(todo, keys, encode, shared, params=params, corpus=corpus, store=store)
    objects = [_found(store, key) for key in keys]
    manifest = Manifest(
        kind="embeddings", recipe=made_of, parent=corpus.manifest.content, objects=tuple(objects)
    )
    counts = _counts(store, manifest)
    write_json(facts, counts)
    manifest.save(out, store)
    kept = len(keys) - len(made)
    rows_made = sum(corpus.objects[shard].rows for shard in made)
    return Outcome(
        stage="embed",
        made=out,
        summary=(
            f"{manifest.rows:,} vectors in {len(keys)} shards: {len(made)} embedded ({rows_made:,} "
            f"texts), {kept} found in the store{_shared(shared)}; {_share(counts)} of the texts were cut "
            f"at {params.max_tokens} tokens; {manifest.size / 1e6:,.1f} MB"
        ),
        facts={
            **counts,
            "shards_embedded": len(made),
            "shards_found": kept,
            "shards_fetched": len(shared.fetched),
            "shards_handed_over": shared.sent,
            "shards_not_handed_over": len(shared.problems),
            "texts_embedded": rows_made,
            "bytes": manifest.size,
            "fingerprint": teacher,
        },
    )


def _fetched(
    todo: list[int],
    keys: list[str],
    shared: Sharing,
    *,
    params: EmbedParams,
    corpus: Corpus,
) -> list[int]:
    """Fetch those shards of `todo` that the remote has; the others, in the order they are to be made."""
    shared.fetch(
        {keys[shard]: _wanted(corpus, shard, params) for shard in todo},
        most={keys[shard]: corpus.objects[shard].rows * WIDEST_ROW_BYTES for shard in todo},
    )
    if shared.fetched:
        log.info("embed: %d shards came from the remote", len(shared.fetched))
    return shared.order([shard for shard in todo if keys[shard] not in shared.fetched])


def _wanted(corpus: Corpus, shard: int, params: EmbedParams) -> Accept:
    """What vectors of a shard must be like if another box made them."""

    def accept(batch: pa.RecordBatch, _: Header) -> None:
        text_keys = text_keys_of(corpus.batch(shard))
        check_received(batch, text_keys=text_keys, storage=params.storage)

    return accept


def _loaded(load_teacher: Callable[[], Encode] | None, todo: list[int], shards: int) -> Encode:
    if load_teacher is None:
        named = ", ".join(map(str, todo[:8])) + (" …" if len(todo) > 8 else "")
        raise MissingError(
            "embed.teacher",
            f"{len(todo)} of {shards} shards are not in the store (shards {named}) and the teacher is not "
            "on this machine",
            "run `teachonce embed` where the teacher is, then point `store` to what it made",
        )
    return load_teacher()


def _embed(
    todo: list[int],
    keys: list[str],
    encode: Encode,
    shared: Sharing,
    *,
    params: EmbedParams,
    corpus: Corpus,
    store: Store,
) -> list[int]:
    """Embed and publish the shards of `todo`; returns those that nobody else had made meanwhile."""
    progress = Progress("embed", total=sum(corpus.objects[s].rows for s in todo), unit="texts")
    tokens = 0
    made_here: list[int] = []
    for shard in todo:
        rows = corpus.objects[shard].rows
        if store.find(keys[shard]) is not None or shared.ask(
            keys[shard], _wanted(corpus, shard, params), most=rows * WIDEST_ROW_BYTES
        ):
            # Another worker was faster, such as one that outlived the `dvc repro` that started it.
            progress.skip(rows)
            continue
        texts = corpus.texts(shard)
        made = encode(texts)
        if made.vectors.shape[0] != len(texts):
            raise TeachonceError(
                keys[shard],
                f"the teacher returned {made.vectors.shape[0]} vectors for {len(texts)} texts",
                "report this: the encode function breaks its contract",
            )
        entry = put_vectors(
            store,
            keys[shard],
            vectors=made.vectors,
            text_keys=text_keys_of(corpus.batch(shard)),
            storage=params.storage,
            facts={"tokens": made.tokens, "truncated": made.truncated},
        )
        shared.hand_over(entry)
        made_here.append(shard)
        tokens += made.tokens
        progress.advance(len(texts), f"{tokens / progress.seconds:,.0f} tokens/s")
    log.info(
        "embed: %s texts in %.0f s, %.0f texts/s, %.0f tokens/s",
        f"{sum(corpus.objects[shard].rows for shard in made_here):,}",
        progress.seconds,
        progress.rate,
        tokens / progress.seconds,
    )
    return made_here


def _found(store: Store, key: str) -> Object:
    entry = store.find(key)
    if entry is None:
        raise MissingError(
            store.path(key), "vanished from the store", "run `teachonce embed` again"
        )
    return entry


def _counts(store: Store, manifest: Manifest) -> dict[str, int]:
    """Counts of all shards, from their headers, so that a resumed run reports the same as a whole one."""
    per_shard = [store.facts(entry.key) for entry in manifest.objects]
    return {
        "texts": manifest.rows,
        "tokens": sum(facts.get("tokens", 0) for facts in per_shard),
        "truncated": sum(facts.get("truncated", 0) for facts in per_shard),
    }


def _shared(shared: Sharing) -> str:
    if shared.remote is None:
        return ""
    late = len(shared.problems)
    return f", {len(shared.fetched)} of them from the remote; {shared.sent} handed over" + (
        f", {late} NOT: run `teachonce push` later" if late else ""
    )


def _share(counts: Mapping[str, int]) -> str:
    share = 100 * counts["truncated"] / max(counts["texts"], 1)
    return f"{share:.1f} %"
