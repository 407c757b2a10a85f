"""Corpus -> the teacher's vectors. The one expensive stage, so the one that never does a thing twice.

Each shard is published when it is done and named by the teacher's fingerprint and its own texts. What
is there is not made again, by whoever and whenever it was made, and a text that stands in an older shard
of the same teacher is copied from there. If all is known, no teacher is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.outcome import Outcome, Progress, log, write_json
from stages.params import EmbedParams
from stages.teaching.drift import check_teacher
from stages.teaching.interface import NOTHING, Encode, Encoded, Engine, Results, Task, this_process
from stages.teaching.reuse import Known
from stages.teaching.rounding import Rounding, told
from stages.teaching.sharing import WIDEST_ROW_BYTES, Sharing
from storage.column import text_keys_of
from storage.corpus import Corpus
from storage.embeddings import BadVectorsError, check_received, put_vectors
from storage.errors import MissingError, StorageError, TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.probe import PROBE_TEXTS
from storage.remote import Remote
from storage.store import Accept, Header, Object, Store

# Raise it when a change of code moves the vectors of the probe texts out of tolerance (drift.py), and only
# then: every cache in the world is made again.
VERSION = 1


MOST_FAILURES = 8
"""So many failed shards one after the other, and it is not for their texts that they fail: embed stops."""

SPARE = 1.1
"""What is left free of a disk is not all ours: others write, and so do manifests and models."""


@dataclass(frozen=True)
class Share:
    """The part of a corpus that one of `count` workers embeds: every count-th shard.

    Not a block of shards: a corpus grows at one end, and nobody should get all of that.

    Args:
        number: Which, from 1 to `count`.
        count: Of how many.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, shards: int) -> range:
        """Its shard numbers, of so many shards."""
        return range(self.number - 1, shards, self.count)


class FailedShardsError(TeachonceError):
    """Some shards could not be embedded; all others are kept."""


def recipe(params: EmbedParams, files: Mapping[str, str]) -> dict[str, Any]:
    """Settings that change the vectors.

    The teacher stands here by the hashes of its files (weights, tokenizer, pooling, normalisation),
    not by its name: a mirror or a moved folder is the same teacher. `batch_tokens` only changes how
    fast the vectors come, `reuse` their last bits.

    Imported vectors stand here by the name they were given; all else about them is not known, and the
    settings say nothing about it.
    """
    if params.is_imported:
        unknown = ("model", "prompt", "pooling", "max_tokens", "precision")
        return {
            "version": VERSION,
            "teacher": dict(files),
            **dict.fromkeys(unknown, "unknown"),
            "storage": params.storage,
        }
    return {
        "version": VERSION,
        "teacher": dict(files),
        "prompt": params.prompt or "",
        "max_tokens": params.max_tokens,
        "precision": params.precision,
        "storage": params.storage,
        "trust_remote_code": params.trust_remote_code,
        # Only when they are set: caches that were made before there were such settings keep their names.
        **({} if params.pooling is None else {"pooling": params.pooling}),
        **({} if params.dim is None else {"dim": params.dim}),
        **({} if params.long_texts == "cut" else {"long_texts": params.long_texts}),
    }


def keys_of(teacher: str, corpus: Corpus) -> list[str]:
    """The keys of the vectors of each shard, by the fingerprint of a teacher."""
    shards = range(len(corpus.objects))
    return [f"vectors/{teacher}/{corpus.shard_digest(shard)}.arrow" for shard in shards]


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
    engine: Engine = this_process,
    share: Share | None = None,
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
        load_teacher: Called once by each worker, and only if a text is not known; None if the teacher is
            not here.
        out: The manifest.
        facts: Counts for `dvc metrics`.
        engine: Where the teacher runs.
        share: Embed only these shards, and write neither manifest nor counts; None for all.

    Raises:
        MissingError: texts are not known and there is no teacher.
        FailedShardsError: the teacher returned poison for a shard, or failed at it; told after all others
            are made, and these are kept.
        RemoteError: shards are missing and the remote cannot be asked for them.
        StorageError: they do not fit on the disk; said before the teacher is loaded if the store has one
            of its shards, else after the first.
    """
    made_of = recipe(params, files)
    teacher = fingerprint(made_of)
    with Sharing(remote, store) as shared:
        work = _Pass(params, corpus, store, shared, teacher, share or Share(1, 1))
        work.take_what_is_there()
        if work.todo:
            work.make(load_teacher, engine)
    if share is not None:
        return Outcome(
            stage=f"embed --shards {share}",
            made=store.root / "vectors" / teacher,
            summary=f"{work.told()}; no manifest yet: `teachonce embed` writes it when all {share.count} "
            "shares are done",
            facts={**work.facts(), "share": str(share), "fingerprint": teacher},
        )
    objects = [_found(store, key) for key in work.keys]
    manifest = Manifest(
        kind="embeddings", recipe=made_of, parent=corpus.manifest.content, objects=tuple(objects)
    )
    counts = _counts(store, manifest)
    write_json(facts, counts)
    manifest.save(out, store)
    return Outcome(
        stage="embed",
        made=out,
        summary=f"{work.told()}; {_longer(counts, params)}; {manifest.size / 1e6:,.1f} MB"
        f"{told(work.rounding.measured())}",
        facts={**counts, **work.facts(), "bytes": manifest.size, "fingerprint": teacher},
    )


class _Pass:
    """One run over a corpus, or over a share of it.

    Args:
        params: Settings.
        corpus: The texts.
        store: Where vectors go.
        shared: The remote, if there is one.
        teacher: The fingerprint.
        share: Which shards.
    """

    def __init__(
        self,
        params: EmbedParams,
        corpus: Corpus,
        store: Store,
        shared: Sharing,
        teacher: str,
        share: Share,
    ) -> None:
        self.params, self.corpus, self.store, self.shared = params, corpus, store, shared
        self.teacher = teacher
        self.keys = keys_of(teacher, corpus)
        # Listed before anything is made: what is written meanwhile must not change the bytes of this run.
        older = store.keys(f"vectors/{teacher}") if params.reuse else []
        self.older = sorted(set(older) - set(self.keys))
        self.mine = share.of(len(self.keys))
        found = {shard: store.find(self.keys[shard]) for shard in self.mine}
        self.found = [entry for entry in found.values() if entry is not None]
        self.todo = [shard for shard, entry in found.items() if entry is None]
        # Shards that nobody else had made meanwhile -> how many of their texts the teacher read.
        self.made: dict[int, int] = {}
        self.failed: dict[int, TeachonceError] = {}
        self.tokens = 0
        log.info("embed: %d of %d shards are in the store", len(self.found), len(self.mine))

    def take_what_is_there(self) -> None:
        """Fetch what the remote has, hand over what the store has."""
        self.shared.fetch(
            {self.keys[shard]: self._wanted(shard) for shard in self.todo},
            most={self.keys[shard]: self._most_bytes(shard) for shard in self.todo},
        )
        if self.shared.fetched:
            log.info("embed: %d shards came from the remote", len(self.shared.fetched))
        left = [shard for shard in self.todo if self.keys[shard] not in self.shared.fetched]
        self.todo = self.shared.order(left)
        self.rounding = Rounding(self.params.storage, texts=self._texts(self.todo))
        for entry in self.found:  # the run that made it may have been killed before it was sent
            self.shared.hand_over(entry)

    def make(self, load_teacher: Callable[[], Encode] | None, engine: Engine) -> None:
        """Embed and publish the shards of `todo`; rows that older shards have are copied."""
        if self.found:
            _check_space(self.store, self.found[0], self._texts(self.todo))
        known = Known(
            self.store,
            self.older,
            {shard: self.corpus.text_keys_in([shard]) for shard in self.todo},
            storage=self.params.storage,
        )
        unknown = [shard for shard in self.todo if not known.has_all(shard)]
        if unknown and load_teacher is None:
            raise self._no_teacher_for(unknown)
        progress = Progress("embed", total=self._texts(self.todo), unit="texts")
        for shard in self._not_there(sorted(set(self.todo) - set(unknown)), progress):
            self._publish(shard, NOTHING, known, progress)
        if unknown and load_teacher is not None:
            tasks = (self._task(shard, known) for shard in self._not_there(unknown, progress))
            # Closed at once when this is left, by Ctrl-C too: no worker outlives the pass.
            with closing(engine(load_teacher, tasks, self._admit)) as results:
                self._publish_all(results, known, progress)
        log.info(
            "embed: %s texts in %.0f s, %.0f texts/s, %.0f tokens/s",
            f"{sum(self.made.values()):,}",
            progress.seconds,
            progress.rate,
            self.tokens / progress.seconds,
        )
        if self.failed:
            raise self._failed()

    def told(self) -> str:
        """What was done, in numbers."""
        made, encoded = len(self.made), sum(self.made.values())
        reused = self._texts(list(self.made)) - encoded
        return (
            f"{self._texts(self.mine):,} vectors in {len(self.mine)} shards: {made} embedded ({encoded:,} "
            f"texts){_taken(reused)}, {len(self.mine) - made} found in the store{_shared(self.shared)}"
        )

    def facts(self) -> dict[str, Any]:
        """The same for a program."""
        made, encoded = len(self.made), sum(self.made.values())
        return {
            "shards_embedded": made,
            "shards_found": len(self.mine) - made,
            "shards_fetched": len(self.shared.fetched.intersection(self.keys)),
            "shards_handed_over": self.shared.sent,
            "shards_not_handed_over": len(self.shared.problems),
            "texts_embedded": encoded,
            "texts_reused": self._texts(list(self.made)) - encoded,
            # Of this run's texts, so not in the file of counts: that one is equal for equal inputs.
            "rounding": self.rounding.measured(),
        }

    def _not_there(self, shards: Sequence[int], progress: Progress) -> Iterator[int]:
        """The shards that nobody else has made meanwhile; each is looked for when it is drawn.

        Another worker may be faster, such as one that outlived the `dvc repro` that started it.
        """
        for shard in shards:
            if self._is_there(shard):
                progress.skip(self.corpus.objects[shard].rows)
            else:
                yield shard

    def _task(self, shard: int, known: Known) -> Task:
        """The texts of a shard that are not known."""
        texts = self.corpus.texts(shard)
        return Task(shard, [texts[row] for row in known.unknown_rows(shard)])

    def _publish_all(self, results: Results, known: Known, progress: Progress) -> None:
        """Publish what comes back; a shard that failed is noted, and told of when all others are done.

        Raises:
            FailedShardsError: many failed one after the other.
        """
        in_a_row = 0
        for shard, made in results:
            error = made if isinstance(made, TeachonceError) else None
            if not isinstance(made, TeachonceError):
                try:
                    self._publish(shard, made, known, progress)
                except BadVectorsError as poison:
                    error = poison
            if error is None:
                in_a_row = 0
                continue
            self.failed[shard] = error
            in_a_row += 1
            log.warning("embed: shard %d failed: %s", shard, error.problem)
            if in_a_row == MOST_FAILURES:
                raise self._failed()

    def _publish(self, shard: int, made: Encoded, known: Known, progress: Progress) -> None:
        """Put one shard into the store, of what the teacher made of its unknown texts."""
        encoded, there = len(known.unknown_rows(shard)), known.rows_of(shard)
        copied = 0 if there is None else len(there.rows)
        _check_contract(made, encoded)
        if encoded:
            self.rounding.look_at(made.vectors, made.whole)
        entry = put_vectors(
            self.store,
            self.keys[shard],
            vectors=made.vectors,
            text_keys=text_keys_of(self.corpus.batch(shard)),
            storage=self.params.storage,
            # Nobody counted the tokens of copied rows again, so the header says how many rows that are.
            facts={"tokens": made.tokens, "truncated": made.truncated}
            | ({"uncounted": copied} if copied else {}),
            known=there,
        )
        self.shared.hand_over(entry)
        self.made[shard] = encoded
        self.tokens += self.store.facts(entry.key)["tokens"]
        progress.skip(copied)
        progress.advance(encoded, f"{self.tokens / progress.seconds:,.0f} tokens/s")
        if len(self.made) == 1:
            _check_space(self.store, entry, progress.total - progress.done)

    def _failed(self) -> FailedShardsError:
        failed = sorted(self.failed.items())
        lines = "".join(
            f"\n  shard {shard} ({self.corpus.objects[shard].key}): {error.problem}"
            for shard, error in failed
        )
        cures = list(dict.fromkeys(error.cure for _, error in failed))
        return FailedShardsError(
            "embed.teacher",
            f"failed at {len(failed)} of {len(self.mine)} shards; the others are kept{lines}",
            f"{'; '.join(cures)}; `teachonce embed` tries these shards again",
        )

    def _is_there(self, shard: int) -> bool:
        """Whether somebody else has made a shard meanwhile."""
        key = self.keys[shard]
        return self.store.find(key) is not None or self.shared.ask(
            key, self._wanted(shard), most=self._most_bytes(shard)
        )

    def _wanted(self, shard: int) -> Accept:
        """What vectors of a shard must be like if another box made them."""

        def accept(batch: pa.RecordBatch, _: Header) -> None:
            text_keys = text_keys_of(self.corpus.batch(shard))
            check_received(batch, text_keys=text_keys, storage=self.params.storage)

        return accept

    def _most_bytes(self, shard: int) -> int:
        return self.corpus.objects[shard].rows * WIDEST_ROW_BYTES

    def _texts(self, shards: Sequence[int]) -> int:
        return sum(self.corpus.objects[shard].rows for shard in shards)

    def _admit(self, said: Encoded) -> None:
        """Hold a loaded teacher to its contract and to what it said before, by its probe texts.

        Raises:
            DriftedTeacherError: it says something else of them than when the cache was begun.
        """
        _check_contract(said, len(PROBE_TEXTS))
        check_teacher(
            lambda _: said.vectors,
            teacher=self.teacher,
            precision=self.params.precision,
            storage=self.params.storage,
            store=self.store,
            shared=self.shared,
        )

    def _no_teacher_for(self, shards: list[int]) -> MissingError:
        named = ", ".join(map(str, sorted(shards)[:8])) + (" …" if len(shards) > 8 else "")
        why, cure = (
            (
                "its vectors were imported",
                "run `teachonce import VECTORS.npy TEXTS` with the texts that have none yet, or `teachonce "
                "join` again",
            )
            if self.params.is_imported
            else (
                "the teacher is not on this machine",
                "run `teachonce embed` where the teacher is, then point `store` to what it made",
            )
        )
        return MissingError(
            "embed.teacher",
            f"{len(shards)} of {len(self.keys)} shards are not in the store (shards {named}) and {why}",
            cure,
        )


def _check_contract(made: Encoded, texts: int) -> None:
    """Raise unless there is a vector for each text."""
    if made.vectors.shape[0] != texts:
        raise TeachonceError(
            "embed.teacher",
            f"returned {made.vectors.shape[0]} vectors for {texts} texts",
            "report this: the encode function breaks its contract",
        )


def _check_space(store: Store, like: Object, rows: int) -> None:
    """Raise unless the vectors of `rows` more texts, each as large as in `like`, fit on the disk."""
    need = SPARE * rows * like.bytes / max(like.rows, 1)
    free = shutil.disk_usage(store.root).free
    if need > free:
        raise StorageError(
            store.root,
            f"the vectors of {rows:,} texts need about {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are "
            "free there",
            "free some space, or move the store to a larger disk and point `store` to it; what is finished "
            "is kept",
        )


def _found(store: Store, key: str) -> Object:
    entry = store.find(key)
    if entry is None:
        raise MissingError(
            store.path(key), "vanished from the store", "run `teachonce embed` again"
        )
    return entry


def _counts(store: Store, manifest: Manifest) -> dict[str, int]:
    """Counts of all shards, from their headers, so that a resumed run reports the same as a whole one.

    `tokens` and `truncated` are those of all texts but the `uncounted` ones.
    """
    per_shard = [store.facts(entry.key) for entry in manifest.objects]
    return {
        "texts": manifest.rows,
        "tokens": sum(facts.get("tokens", 0) for facts in per_shard),
        "truncated": sum(facts.get("truncated", 0) for facts in per_shard),
        "uncounted": sum(facts.get("uncounted", 0) for facts in per_shard),
    }


def _shared(shared: Sharing) -> str:
    if shared.remote is None:
        return ""
    late = len(shared.problems)
    return f", {len(shared.fetched)} of them from the remote; {shared.sent} handed over" + (
        f", {late} NOT: run `teachonce push` later" if late else ""
    )


def _taken(reused: int) -> str:
    return f", {reused:,} texts taken from older shards" if reused else ""


def _longer(counts: Mapping[str, int], params: EmbedParams) -> str:
    counted = counts["texts"] - counts["uncounted"]
    what = "read in windows of" if params.long_texts == "windows" else "cut at"
    if not counted:
        return f"how many texts were {what.split(' ')[0]} is not known"
    whose = f"{counted:,} texts that were counted" if counts["uncounted"] else "texts"
    share = 100 * counts["truncated"] / counted
    return f"{share:.1f} % of the {whose} were {what} {params.max_tokens} tokens"
