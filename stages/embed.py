"""Run the teacher over the corpus and cache its vectors. The one expensive stage, so nothing is done twice.

Each shard is published when it is finished, under the teacher's fingerprint and the digest of its texts. A
shard that is in the store is a cache hit, whoever made it, and a text in an older shard of the same teacher
has its vector copied from there. If no text is missing, no teacher is loaded. With `embed.mixes` each text
shard has a second object, of mixes; to the run both are parts to be made (teaching/parts.py).

This file is long because the order of its steps (copy, fetch, encode, check, publish, hand over) is what
keeps finished work from being lost; it is read as a whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.outcome import Outcome, Progress, log, write_json
from stages.params import EmbedParams
from stages.teaching.drift import check_teacher
from stages.teaching.interface import (
    NO_OUTPUT,
    Encode,
    Engine,
    LoadedTeacher,
    RefusedTextsError,
    Results,
    Task,
    TeacherOutput,
    this_process,
)
from stages.teaching.parts import MixesPart, ShardPart, TextsPart, mixes_recipe
from stages.teaching.reuse import ReusableVectors
from stages.teaching.rounding import Rounding, rounding_summary
from stages.teaching.sharing import WIDEST_ROW_BYTES, Sharing
from storage.corpus import Corpus, ShardSlice
from storage.embeddings import BadVectorsError, check_received, fingerprints, put_vectors
from storage.errors import MissingError, StorageError, TeachonceError, shown
from storage.journal import Journal
from storage.manifest import Kind, Manifest, fingerprint
from storage.probe import PROBE_TEXTS
from storage.remote import Remote
from storage.roles import Role
from storage.store import Accept, Header, Object, Store

# Raise it only if a change of code moves the vectors of the probe texts out of tolerance (drift.py): a new
# version makes every existing cache stale.
VERSION = 1

MAX_CONSECUTIVE_FAILURES = 8
"""Stop after this many consecutive failures: the cause is then the machine or the model, not some texts."""

SHOWN_ROWS, SHOWN_CHARACTERS = 5, 40
"""Refused rows that an error names, and how much of each text it shows."""

DISK_MARGIN = 1.1
"""Free space demanded, as a multiple of the vectors' size: other programs and stages write there, too."""


class FailedShardsError(TeachonceError):
    """Some shards could not be embedded; the others are published."""


def recipe(
    params: EmbedParams, files: Mapping[str, str], roles: Sequence[Role] = ("text",)
) -> dict[str, Any]:
    """Returns the settings that change the vectors; `fingerprints` says what is made of them.

    The teacher is identified by the hashes of its files (weights, tokenizer, pooling, normalisation),
    not by its name: a mirror or a moved folder is the same teacher. `batch_tokens` changes only the speed,
    `reuse` only last bits, so both are left out.

    Imported vectors are identified by the name that the user gave them; every other setting is "unknown". A
    model behind an API is identified by its name, by what it is asked for, and by the tokenizer that cuts
    its texts, if one is named; never by its server.

    Args:
        params: The settings `embed`, with the model's own prompts in them.
        files: File name -> sha256 of the teacher's files.
        roles: The roles of the corpus.
    """
    if params.is_imported:
        unknown = ("model", "prompt", "pooling", "max_tokens", "precision")
        return {
            "version": VERSION,
            "teacher": dict(files),
            **dict.fromkeys(unknown, "unknown"),
            "storage": params.storage,
        }
    if params.api_model is not None:
        dimensions = params.api.dimensions
        return {
            "version": VERSION,
            "teacher": dict(files),
            **_by_role(params, roles),
            "pooling": "unknown",
            "precision": "unknown",
            "storage": params.storage,
            **({} if dimensions is None else {"dimensions": dimensions}),
            **({} if params.api.tokenizer is None else {"max_tokens": params.max_tokens}),
        }
    return {
        "version": VERSION,
        "teacher": dict(files),
        **_by_role(params, roles),
        "max_tokens": params.max_tokens,
        "precision": params.precision,
        "storage": params.storage,
        "trust_remote_code": params.trust_remote_code,
        # Only if set, so that caches older than these settings keep their fingerprints.
        **({} if params.pooling is None else {"pooling": params.pooling}),
        **({} if params.dim is None else {"dim": params.dim}),
        **({} if params.long_texts == "cut" else {"long_texts": params.long_texts}),
    }


def _by_role(params: EmbedParams, roles: Sequence[Role]) -> dict[str, Any]:
    """Returns what a text's role decides for a teacher: the prompt, and the input type of an API."""
    prompts = {role: params.prompts.of(role) for role in roles}
    input_types = {} if params.api_model is None else params.api.input_type.of(roles)
    if tuple(roles) != ("text",):
        return {"prompts": prompts, **({"input_types": input_types} if input_types else {})}
    return {
        "prompt": prompts["text"],
        **({"input_type": input_types["text"]} if input_types else {}),
    }


def recipes(
    params: EmbedParams, files: Mapping[str, str], roles: Sequence[Role] = ("text",)
) -> dict[Kind, dict[str, Any]]:
    """Returns the recipe of the vectors and that of the mixes, which is empty if there are to be none."""
    of_vectors = recipe(params, files, roles)
    mixes = mixes_recipe(of_vectors, params.mixes) if params.mixes else {}
    return {"embeddings": of_vectors, "mixes": mixes}


def keys_of(teachers: Mapping[Role, str], corpus: Corpus) -> list[str]:
    """Returns the key of each shard's vectors, for the `fingerprints` of a teacher."""
    return [
        f"vectors/{teachers[corpus.role_of(shard)]}/{corpus.shard_digest(shard)}.arrow"
        for shard in range(len(corpus.objects))
    ]


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
    mixes: Path | None = None,
    engine: Engine = this_process,
    share: ShardSlice | None = None,
    journal: Journal | None = None,
) -> Outcome:
    """Embed the shards that neither the store nor the remote has, then write the manifests of all shards.

    With a remote, missing shards are fetched first, and all shards are uploaded in the background. A failed
    upload is reported but does not fail the run: `teachonce push` uploads it later.

    Args:
        params: The settings `embed`.
        files: File name -> sha256 of the teacher's files.
        corpus: The texts.
        store: The store for the vectors.
        remote: The remote shared with other machines; None if there is none.
        load_teacher: Called once by each worker, and only if a text has no vector; None if the teacher is
            not on this machine.
        out: Path of the manifest of vectors to write.
        facts: Path of the counts to write, for `dvc metrics`.
        mixes: Path of the manifest of mixes to write, without objects if `embed.mixes` is 0; None to write
            none.
        engine: Runs the teacher: in this process, in a pool of processes, or on Ray.
        share: Embed only these shards, and write neither manifests nor counts; None for all.
        journal: Where a teacher behind an API keeps answers that are in no published shard yet.

    Raises:
        MissingError: texts have no vectors and there is no teacher.
        FailedShardsError: the teacher failed at a shard or returned unusable vectors; raised after all
            other shards are published.
        RemoteError: shards are missing and the remote cannot be reached.
        StorageError: the vectors do not fit on the disk; raised before the teacher is loaded if the store
            has one of its shards, else after the first.
    """
    teacher_recipe, recipe_of_mixes = recipes(params, files, corpus.roles).values()
    teachers = fingerprints(teacher_recipe, corpus.roles)
    teacher = fingerprint(teacher_recipe)
    of_slice = (share or ShardSlice(1, 1)).of(len(corpus.objects))
    parts: list[ShardPart] = [
        TextsPart(teachers[corpus.role_of(shard)], corpus, shard) for shard in of_slice
    ]
    if params.mixes:
        parts += [MixesPart(recipe_of_mixes, corpus, shard) for shard in of_slice]
    with Sharing(remote, store) as shared:
        embed_run = _EmbedRun(params, corpus, store, shared, teachers, parts, journal)
        embed_run.fetch_from_remote()
        if embed_run.todo:
            embed_run.embed_missing(load_teacher, engine)
        embed_run.forget_answers()
    if share is not None:
        return Outcome(
            stage=f"embed --shards {share}",
            made=store.root / "vectors" / teachers[corpus.roles[0]],
            summary=f"{embed_run.summary()}; no manifest yet: `teachonce embed` writes it when all "
            f"{share.count} shares are done",
            facts={**embed_run.facts(), "share": str(share), "fingerprint": teacher},
        )
    objects = tuple(_published(store, part.key) for part in parts)
    of_texts, parent = len(corpus.objects), corpus.manifest.content
    manifest = Manifest(
        kind="embeddings", recipe=teacher_recipe, parent=parent, objects=objects[:of_texts]
    )
    mixed = Manifest(
        kind="mixes", recipe=recipe_of_mixes, parent=parent, objects=objects[of_texts:]
    )
    counts = _counts(store, manifest)
    write_json(facts, counts)
    manifest.save(out, store)
    if mixes is not None:
        mixed.save(mixes, store)
    return Outcome(
        stage="embed",
        made=out,
        summary=f"{embed_run.summary()}; {_truncation_note(counts, params)}; {manifest.size / 1e6:,.1f} MB"
        f"{rounding_summary(embed_run.rounding.measure())}",
        facts={**counts, **embed_run.facts(), "bytes": manifest.size, "fingerprint": teacher},
    )


class _EmbedRun:
    """One run over a corpus, or over a share of it.

    Below, a shard is a place in the list of `parts`, the objects of this run.
    """

    def __init__(
        self,
        params: EmbedParams,
        corpus: Corpus,
        store: Store,
        shared: Sharing,
        teachers: Mapping[Role, str],
        parts: Sequence[ShardPart],
        journal: Journal | None,
    ) -> None:
        self.params, self.corpus, self.store, self.shared = params, corpus, store, shared
        self.teachers, self.parts, self.journal = teachers, parts, journal
        self.keys = [part.key for part in parts]
        # Listed at the start: shards that others write meanwhile must not change the bytes of this run.
        folders = {f"vectors/{teacher}" for teacher in teachers.values()} if params.reuse else ()
        stored_keys = [key for folder in folders for key in store.keys(folder)]
        self.older_keys = sorted(set(stored_keys) - set(keys_of(teachers, corpus)))
        self.shards = range(len(parts))
        cached = {shard: store.find(self.keys[shard]) for shard in self.shards}
        self.cached = [entry for entry in cached.values() if entry is not None]
        self.todo = [shard for shard, entry in cached.items() if entry is None]
        # Shard published by this run -> number of its texts that the teacher encoded.
        self.embedded: dict[int, int] = {}
        self.failed: dict[int, TeachonceError] = {}
        self.tokens = 0
        log.info("embed: %d of %d shards are in the store", len(self.cached), len(self.shards))

    def fetch_from_remote(self) -> None:
        """Fetch missing shards from the remote, and upload those that the store has."""
        self.shared.fetch(
            {self.keys[shard]: self._acceptance_check(shard) for shard in self.todo},
            max_bytes={self.keys[shard]: self._max_bytes(shard) for shard in self.todo},
        )
        if self.shared.fetched:
            log.info("embed: %d shards came from the remote", len(self.shared.fetched))
        missing = [shard for shard in self.todo if self.keys[shard] not in self.shared.fetched]
        # Texts before mixes: a teacher that cannot read mixes leaves all vectors of texts.
        self.todo = sorted(self.shared.shuffled(missing), key=self._is_of_mixes)
        self.rounding = Rounding(self.params.storage, texts=self._count_texts(self.todo))
        for (
            entry
        ) in self.cached:  # a run killed before its upload leaves shards that the remote lacks
            self.shared.upload(entry)

    def embed_missing(self, load_teacher: Callable[[], Encode] | None, engine: Engine) -> None:
        """Embed and publish the shards `todo`; vectors that older shards have are copied."""
        if self.cached:
            _check_space(self.store, self.cached[0], self._count_texts(self.todo))
        reusable = ReusableVectors(
            self.store,
            self.older_keys,
            {shard: self.parts[shard].text_keys().copy() for shard in self.todo},
            storage=self.params.storage,
        )
        with_new_texts = [shard for shard in self.todo if not reusable.covers(shard)]
        if with_new_texts and load_teacher is None:
            raise self._no_teacher_for(with_new_texts)
        progress = Progress("embed", total=self._count_texts(self.todo), unit="texts")
        for shard in self._still_missing(sorted(set(self.todo) - set(with_new_texts)), progress):
            self._publish(shard, NO_OUTPUT, reusable, progress)
        if with_new_texts and load_teacher is not None:
            tasks = (
                self._task(shard, reusable)
                for shard in self._still_missing(with_new_texts, progress)
            )
            # Closed on every way out, Ctrl-C included, so that no worker outlives the run.
            roles = {self.parts[shard].role for shard in with_new_texts}
            load = partial(LoadedTeacher.load, load_teacher, sorted(roles))
            with closing(engine(load, tasks, self._admit)) as results:
                self._publish_all(results, reusable, progress)
        log.info(
            "embed: %s texts in %.0f s, %.0f texts/s, %.0f tokens/s",
            f"{sum(self.embedded.values()):,}",
            progress.seconds,
            progress.rate,
            self.tokens / progress.seconds,
        )
        if self.failed:
            raise self._failure()

    def forget_answers(self) -> None:
        """Forget what a killed run was answered just before it published a shard."""
        for shard in self.shards:
            if self.journal is None or self.journal.is_empty(self.teachers[self.parts[shard].role]):
                return
            self._forget(shard)

    def summary(self) -> str:
        """Returns a sentence with the numbers of shards and texts."""
        embedded, encoded = len(self.embedded), sum(self.embedded.values())
        reused = self._count_texts(list(self.embedded)) - encoded
        mixes = self._count_texts(list(filter(self._is_of_mixes, self.shards)))
        of_mixes = f", {mixes:,} of them of mixes," if mixes else ""
        return (
            f"{self._count_texts(self.shards):,} vectors{of_mixes} in {len(self.shards)} shards: "
            f"{embedded} embedded ({encoded:,} texts){_reuse_note(reused)}, "
            f"{len(self.shards) - embedded} found in the store"
            f"{_remote_note(self.shared)}"
        )

    def facts(self) -> dict[str, Any]:
        """Returns the numbers of shards and texts, for `--json`."""
        embedded, encoded = len(self.embedded), sum(self.embedded.values())
        return {
            "shards_embedded": embedded,
            "shards_found": len(self.shards) - embedded,
            "shards_fetched": len(self.shared.fetched.intersection(self.keys)),
            "shards_handed_over": self.shared.uploaded,
            "shards_not_handed_over": len(self.shared.problems),
            "texts_embedded": encoded,
            "texts_reused": self._count_texts(list(self.embedded)) - encoded,
            # Depends on which texts this run embedded, so not in the file of counts, which must not.
            "rounding": self.rounding.measure(),
        }

    def _still_missing(self, shards: Sequence[int], progress: Progress) -> Iterator[int]:
        """Yield the shards that no other run has published; each is looked up just before it is yielded.

        Another run may be at work, such as one that outlived the `dvc repro` that started it.
        """
        for shard in shards:
            if self._made_elsewhere(shard):
                progress.skip(self.parts[shard].rows)
            else:
                yield shard

    def _task(self, shard: int, reusable: ReusableVectors) -> Task:
        """Returns the texts of a shard that have no vector yet."""
        part = self.parts[shard]
        return Task(shard, part.inputs(reusable.missing_rows(shard)), part.role)

    def _publish_all(self, results: Results, reusable: ReusableVectors, progress: Progress) -> None:
        """Publish the outputs; errors of failed shards are collected.

        Raises:
            FailedShardsError: MAX_CONSECUTIVE_FAILURES shards failed in a row.
        """
        in_a_row = 0
        for shard, output in results:
            error = output if isinstance(output, TeachonceError) else None
            if isinstance(error, RefusedTextsError):
                error = self._with_rows(shard, error, reusable)
            if not isinstance(output, TeachonceError):
                try:
                    self._publish(shard, output, reusable, progress)
                except BadVectorsError as poison:
                    error = poison
            if error is None:
                in_a_row = 0
                continue
            self.failed[shard] = error
            in_a_row += 1
            log.warning("embed: shard %d failed: %s", shard, error.problem)
            if in_a_row == MAX_CONSECUTIVE_FAILURES:
                raise self._failure()

    def _publish(
        self, shard: int, output: TeacherOutput, reusable: ReusableVectors, progress: Progress
    ) -> None:
        """Publish one shard from the teacher's output for its new texts and the copied vectors."""
        encoded, reused = len(reusable.missing_rows(shard)), reusable.reused_rows(shard)
        copied = 0 if reused is None else len(reused.rows)
        _check_contract(output, encoded)
        if encoded:
            self.rounding.sample(output.vectors, output.whole)
        entry = put_vectors(
            self.store,
            self.keys[shard],
            vectors=output.vectors,
            text_keys=self.parts[shard].text_keys(),
            storage=self.params.storage,
            # Tokens of copied rows are not counted again; `uncounted` is the number of such rows.
            facts={"tokens": output.tokens, "truncated": output.truncated}
            | ({"uncounted": copied} if copied else {}),
            reused=reused,
            more=self.parts[shard].columns(),
        )
        self.shared.upload(entry)
        self._forget(shard)
        self.embedded[shard] = encoded
        self.tokens += self.store.facts(entry.key)["tokens"]
        progress.skip(copied)
        progress.advance(encoded, f"{self.tokens / progress.seconds:,.0f} tokens/s")
        if len(self.embedded) == 1:
            _check_space(self.store, entry, progress.total - progress.done)

    def _forget(self, shard: int) -> None:
        """Forget the answers that a published shard has."""
        if self.journal is not None:
            part = self.parts[shard]
            self.journal.forget(self.teachers[part.role], part.text_keys())

    def _with_rows(
        self, shard: int, error: RefusedTextsError, reusable: ReusableVectors
    ) -> TeachonceError:
        """Returns the error with the row ids of the refused texts."""
        texts_of = [entry.key for entry in self.corpus.objects]
        first = self.corpus.starts[texts_of.index(self.parts[shard].texts)]
        rows = first + reusable.missing_rows(shard)
        texts = self.corpus.take(rows[list(error.problems)])
        refusals = [
            f"row {rows[place]} ({shown(text[:SHOWN_CHARACTERS])}): {why}"
            for (place, why), text in zip(error.problems.items(), texts, strict=True)
        ]
        more = f"; and {len(refusals) - SHOWN_ROWS} more" if len(refusals) > SHOWN_ROWS else ""
        problem = f"{len(refusals)} texts are refused: {'; '.join(refusals[:SHOWN_ROWS])}{more}"
        return TeachonceError(error.where, problem, error.cure)

    def _failure(self) -> FailedShardsError:
        failed = sorted(self.failed.items())
        lines = "".join(
            f"\n  shard {shard} ({self.parts[shard].texts}): {error.problem}"
            for shard, error in failed
        )
        cures = list(dict.fromkeys(error.cure for _, error in failed))
        return FailedShardsError(
            "embed.teacher",
            f"failed at {len(failed)} of {len(self.shards)} shards; the others are kept{lines}",
            f"{'; '.join(cures)}; `teachonce embed` tries these shards again",
        )

    def _made_elsewhere(self, shard: int) -> bool:
        """Whether another run has published a shard, in the store or on the remote."""
        key = self.keys[shard]
        return self.store.find(key) is not None or self.shared.try_fetch(
            key, self._acceptance_check(shard), max_bytes=self._max_bytes(shard)
        )

    def _acceptance_check(self, shard: int) -> Accept:
        """Returns the check that a shard's vectors from another machine must pass."""

        def accept(batch: pa.RecordBatch, _: Header) -> None:
            part = self.parts[shard]
            check_received(batch, text_keys=part.text_keys(), storage=self.params.storage)
            for name, column in part.columns().items():
                if not batch.column(name).equals(column):
                    raise ValueError(f"another {name} than was drawn here")

        return accept

    def _max_bytes(self, shard: int) -> int:
        return self.parts[shard].rows * WIDEST_ROW_BYTES

    def _is_of_mixes(self, shard: int) -> bool:
        return isinstance(self.parts[shard], MixesPart)

    def _count_texts(self, shards: Sequence[int]) -> int:
        return sum(self.parts[shard].rows for shard in shards)

    def _admit(self, probe_outputs: Mapping[Role, TeacherOutput]) -> None:
        """Check a loaded teacher by its output for the probe texts in each role.

        Raises:
            DriftedTeacherError: its vectors differ from those recorded when the cache was begun.
        """
        for role, output in probe_outputs.items():
            self._check_probes(role, output)

    def _check_probes(self, role: Role, output: TeacherOutput) -> None:
        _check_contract(output, len(PROBE_TEXTS))
        check_teacher(
            lambda _: output.vectors,
            teacher=self.teachers[role],
            # Nobody knows in which a server computes, and one that serves many reads batches of all sorts.
            precision=self.params.precision if self.params.api_model is None else "bf16",
            storage=self.params.storage,
            store=self.store,
            shared=self.shared,
            behind_api=self.params.api_model is not None,
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


def _check_contract(output: TeacherOutput, texts: int) -> None:
    """Raise unless there is a vector for each text."""
    if output.vectors.shape[0] != texts:
        raise TeachonceError(
            "embed.teacher",
            f"returned {output.vectors.shape[0]} vectors for {texts} texts",
            "report this: the encode function breaks its contract",
        )


def _check_space(store: Store, like: Object, rows: int) -> None:
    """Raise if the disk has no room for `rows` more vectors, each as large as those of `like`."""
    need = DISK_MARGIN * rows * like.bytes / max(like.rows, 1)
    free = shutil.disk_usage(store.root).free
    if need > free:
        raise StorageError(
            store.root,
            f"the vectors of {rows:,} texts need about {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are "
            "free there",
            "free some space, or move the store to a larger disk and point `store` to it; what is finished "
            "is kept",
        )


def _published(store: Store, key: str) -> Object:
    entry = store.find(key)
    if entry is None:
        raise MissingError(
            store.path(key), "vanished from the store", "run `teachonce embed` again"
        )
    return entry


def _counts(store: Store, manifest: Manifest) -> dict[str, int]:
    """Returns counts over all shards, from their headers, so that a resumed run reports the same numbers.

    `tokens` and `truncated` cover all texts but the `uncounted` ones.
    """
    per_shard = [store.facts(entry.key) for entry in manifest.objects]
    return {
        "texts": manifest.rows,
        "tokens": sum(facts.get("tokens", 0) for facts in per_shard),
        "truncated": sum(facts.get("truncated", 0) for facts in per_shard),
        "uncounted": sum(facts.get("uncounted", 0) for facts in per_shard),
    }


def _remote_note(shared: Sharing) -> str:
    if shared.remote is None:
        return ""
    late = len(shared.problems)
    return f", {len(shared.fetched)} of them from the remote; {shared.uploaded} handed over" + (
        f", {late} NOT: run `teachonce push` later" if late else ""
    )


def _reuse_note(reused: int) -> str:
    return f", {reused:,} texts taken from older shards" if reused else ""


def _truncation_note(counts: Mapping[str, int], params: EmbedParams) -> str:
    counted = counts["texts"] - counts["uncounted"]
    truncation = "read in windows of" if params.long_texts == "windows" else "cut at"
    if not counted:
        return f"how many texts were {truncation.split(' ')[0]} is not known"
    of_texts = f"{counted:,} texts that were counted" if counts["uncounted"] else "texts"
    share = 100 * counts["truncated"] / counted
    return f"{share:.1f} % of the {of_texts} were {truncation} {params.max_tokens} tokens"
