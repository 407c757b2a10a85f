"""`teachonce plan`: what embed, mine, distill, finetune and evaluate will take here, as a table.

Rates times counts. Rates are measured by the stages' own code on some of the texts, in a scratch store.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.commands import api_plan
from pipeline.workspace import Workspace
from stages import embed, mine
from stages.outcome import Outcome, clock, seconds_of
from stages.params import FINETUNED, TEACHER
from stages.reading.evaluation_sets import read_sets
from stages.teaching.reuse import unknown_rows
from stages.teaching.sharing import lacking_shards
from stages.vectors import MOST_ROWS
from storage import embeddings, negatives
from storage.caches import Caches
from storage.corpus import Corpus
from storage.errors import MissingError, TeachonceError
from storage.manifest import Manifest
from storage.roles import Role
from storage.split import Split
from storage.store import Store

SAMPLE = 16_384  # texts of a sample, at most: as many vectors as the queue of most recipes holds
OBJECT_BYTES = 1100  # of an Arrow file beside its rows


def run(here: Workspace, *, seconds: float, seed: int) -> Outcome:
    """Measure on a sample of this work tree's corpus; nothing is written.

    Raises:
        MissingError: there is no corpus yet, or no teacher where one is needed.
    """
    plan = Plan(here, here.corpus(), seconds, seed)
    vectors = plan.embed()
    if vectors is None:
        plan.not_planned["mine, distill"] = "width of vectors unknown: set embed.api.dimensions"
    else:
        with tempfile.TemporaryDirectory(prefix="teachonce-plan-") as scratch:
            plan.distill(plan.mine(vectors, Store(Path(scratch))))
    for stage, do in (("finetune", plan.finetune), ("evaluate", plan.evaluate)):
        try:
            do()
        except TeachonceError as error:  # its files are not there yet
            plan.not_planned[stage] = f"{error.where}: {error.problem}; {error.cure}"
    total = clock(sum(stage["seconds"] for stage in plan.extrapolated.values()))
    summary = f"about {total} in all on this machine as busy as it is now; nothing was written"
    return Outcome("plan", here.store.root, summary, plan.facts)


class Plan:
    """A method for each stage, called in their order; `not_planned` says what the work tree lacks."""

    def __init__(self, here: Workspace, corpus: Corpus, seconds: float, seed: int) -> None:
        self.here, self.params, self.corpus, self.seconds = here, here.params, corpus, seconds
        self.draw = np.random.default_rng(seed).permutation
        drawn = self.draw(corpus.rows)[:SAMPLE]
        self.sample = list(dict.fromkeys(self._texts_of(drawn)))
        self.texts = [text for text, _ in self.sample]
        self.recipe: dict[str, Any] = {}  # of the teacher, once `embed` was planned
        try:
            split = here.split()
        except TeachonceError:  # it will be this one, less the rows that evaluation sets have
            share = self.params.split.heldout
            split = Split(corpus=corpus.manifest.content, heldout=share, evaluation=())
        self.train, heldout = len(split.train_rows(corpus)), len(split.heldout_rows(corpus))
        self.judged = min(heldout, MOST_ROWS)
        kinds = ("counted", "measured", "extrapolated", "not_planned")
        self.facts: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
        self.counted, self.measured, self.extrapolated, self.not_planned = self.facts.values()

    def _texts_of(self, rows: NDArray[np.int64]) -> list[tuple[str, Role]]:
        """Texts of some rows, each with its role."""
        return list(zip(self.corpus.take(rows), self.corpus.roles_of(rows), strict=True))

    def embed(self) -> NDArray[Any] | None:
        """Plan what neither store nor remote has; returns (m, dim) vectors of the teacher.

        Of an API that was never asked they are random, or None if `embed.api.dimensions` is null.
        """
        importing = seconds_of(partial(import_module, "stages.models.encoder"))  # embed does, too
        from stages.models.devices import pick_device
        from stages.models.speed import rate_of

        self.device = pick_device(self.params.device)
        params, corpus, store = self.here.embed_params(self.corpus), self.corpus, self.here.store
        files, load_teacher = self.here.teacher()
        self.recipe = embed.recipe(params, files, corpus.roles)
        teachers = embeddings.fingerprints(self.recipe, corpus.roles)
        keys = embed.keys_of(teachers, corpus)
        shards = lacking_shards(keys, store, self.here.remote())
        folders = sorted({f"vectors/{teacher}" for teacher in teachers.values()})
        stored = [key for folder in folders for key in store.keys(folder)]
        older = sorted(set(stored) - set(keys)) if params.reuse else []
        new = unknown_rows(corpus, shards, store, older, storage=params.storage)
        rows, took = sum(corpus.objects[shard].rows for shard in shards), 0.0
        self.counted |= {"texts": corpus.rows, "shards": len(keys), "shards_to_embed": len(shards)}
        self.counted |= {"texts_to_embed": len(new), "texts_to_reuse": rows - len(new)}
        if len(new) and load_teacher is None:
            why = f"{len(shards)} shards are to embed, and it is not here to be measured"
            raise MissingError("embed.teacher", why, "run `teachonce plan` where the teacher is")
        vectors = None
        if len(new) and params.api_model is not None:
            asked = api_plan.count_tokens(self.here, corpus, teachers, self.draw(new), SAMPLE)
            self.counted["api"], took = asked
        elif len(new):
            load, texts = (
                partial(self.here.encoder, TEACHER),
                self._texts_of(self.draw(new)[:SAMPLE]),
            )
            at, vectors = rate_of(load, texts, rows // len(shards), self.seconds)
            at["load_seconds"] += importing
            self.measured[TEACHER] = at
            mixes = round(params.mixes * corpus.rows)  # read like texts; those there count, too
            took = at["load_seconds"] + (len(new) + mixes) / at["texts_per_second"]
            rows += mixes
        if vectors is None:
            stored = sorted(set(stored) & set(keys)) or stored
            vectors = self._vectors_of(stored, may_be_unknown=len(new) > 0)
        if len(new) and not took:
            self.not_planned["embed"] = "how fast the server answers is not known"
        elif vectors is not None:
            size = rows * embeddings.row_bytes(vectors.shape[1], params.storage)
            size += len(shards) * OBJECT_BYTES
            self.extrapolated["embed"] = {"seconds": took, "bytes": size}
        return vectors

    def _vectors_of(self, stored: Sequence[str], *, may_be_unknown: bool) -> NDArray[Any] | None:
        params = self.params.embed
        if stored:
            return embeddings.vectors_of(self.here.store.glance(stored[0]))
        if params.api_model is not None and (dim := params.api.dimensions):
            return np.random.default_rng(0).standard_normal((MOST_ROWS, dim), np.float32)
        if may_be_unknown:
            return None
        cure = "run `teachonce embed`, which fetches them, first"
        raise MissingError("plan", "all vectors are on the remote", cure)

    def mine(self, vectors: NDArray[Any], store: Store) -> Caches:
        """Plan mining, by the sample's and the teacher's (m, dim) vectors; returns caches of the sample."""
        from stages.learning.rehearsal import random_caches

        dim, embedding = vectors.shape[1], self.params.embed
        caches = random_caches(
            self.sample, dim, heldout=self.judged, params=embedding, recipe=self.recipe, store=store
        )
        params, rows, out = self.params.mine, self.train, store.root / "mined"
        corpus, cached, split = caches.corpus, caches.embeddings, caches.split
        sample = len(split.train_rows(corpus))
        index = mine.resolve(params, rows=rows, dim=cached.dim, device=self.device)
        # Random vectors are not alike: what the filters would say of them is for nobody to mend.
        accepted = {"range_min": 0, "min_score": None, "max_score": 1.0, "min_recall": 0.0}
        here = params.model_copy(update=accepted | {"index": index["name"] if index else "flat"})
        some = cached.shard(0)
        some = vectors.astype(some.dtype) if len(vectors) > MOST_ROWS else some
        costs = mine.ExactCosts(params, lambda places: some[places], len(some), self.device)
        do = partial(mine.run, here, corpus=corpus, embeddings=cached, split=split)
        do = partial(do, store=store, out=out, facts=out.with_name("facts"))
        took = seconds_of(partial(do, device=self.device))
        if index is None:
            others = max(0.0, took - costs.seconds_for(sample))  # filters, files
            took = others * rows / sample + costs.seconds_for(rows)
        else:
            took *= rows * math.log(rows) / (sample * math.log(sample))
        size = self.corpus.rows * negatives.row_bytes(params.neighbours)
        size += len(self.corpus.objects) * OBJECT_BYTES
        self.extrapolated["mine"] = {"seconds": took, "bytes": size}
        lists = Manifest.load(out, "negatives")
        parent = negatives.parent_of(cached.manifest, split)
        mined = negatives.Negatives(store, lists, corpus, mined_from=parent)
        return replace(caches, negatives=mined)

    def distill(self, caches: Caches) -> None:
        """Plan each student whose start is made, by some of its steps and an evaluation."""
        from stages.distill import prepare, prompts_of_student, resolved
        from stages.learning.rehearsal import characters, measure, training
        from stages.learning.token_rows import token_rows
        from stages.models.loading import load_model

        how: dict[str, Any] = {"device": self.device}
        how["trust_remote_code"] = self.params.embed.trust_remote_code
        for name, student in self.params.students.items():
            try:
                start = self.here.model_folder(student.start)
            except MissingError:
                self.not_planned[f"distill {name}"] = f"run `teachonce start {student.start}` first"
                continue
            recipe = resolved(self.params.recipes[student.recipe], self.device)
            ids = partial(token_rows, load_model(start, **how).tokenizer, start)
            ids = partial(ids, corpus=caches.corpus, store=caches.store)  # it keeps them
            ids = partial(ids, prompts=prompts_of_student(recipe, caches.embeddings))
            token_seconds = seconds_of(partial(ids, max_tokens=recipe.max_tokens))
            begun = time.perf_counter()
            task = prepare(recipe, start=start, caches=caches, **how)
            load_seconds = time.perf_counter() - begun
            a_row = characters(self.texts, recipe.max_tokens) / len(self.texts)
            judged = len(task.heldout) * a_row
            at = measure(task, task.setup(), recipe, self.seconds / 2, a_row=a_row, judged=judged)
            at |= {"token_seconds": token_seconds, "load_seconds": load_seconds}
            took = training(recipe, at, self.train, a_row=a_row, judged=self.judged * a_row)
            took["seconds"] += token_seconds * self.corpus.rows / len(self.texts)
            self.measured[f"distill {name}"], self.extrapolated[f"distill {name}"] = at, took

    def finetune(self) -> None:
        """Plan each finetuning: as fast as its student learns, by the characters that it reads."""
        from stages.learning.judges import Labels
        from stages.learning.rehearsal import characters, training

        params, most = self.params.finetune, self.params.finetune.max_tokens
        if not params.students:
            return
        labels = Labels.read(params, self.here.at.root, ())
        rows, judged = len(labels.learned), characters(labels.judge.texts, most)
        a_row = characters((text for row in labels.learned for text in row.texts), most) / rows
        if params.distill_weight:
            a_text = characters(self.texts, most) / len(self.texts)
            a_row += a_text * params.distill_rows / min(params.batch_size, rows)
        for name in params.students:
            if at := self.measured.get(f"distill {name}"):
                took = training(params, at, rows, a_row=a_row, judged=judged)
                self.extrapolated[f"finetune {name}"] = took

    def evaluate(self) -> None:
        """Plan the evaluation of each model; students are as fast as their start."""
        from stages.measuring.metrics import TEXTS_AT_ONCE
        from stages.models.speed import CPU_ROUNDS, rate_of, reference_seconds

        params = self.params
        models = {TEACHER: [TEACHER]} if TEACHER in self.measured else {}
        if not models:
            here = "not measured, since there is nothing to embed"
            why = "the server is asked for these texts, too" if params.embed.api_model else here
            self.not_planned["evaluate teacher"] = why
        for name, student in params.students.items():
            if f"distill {name}" in self.measured:
                finetuned = [f"{name}{FINETUNED}"] if name in params.finetune.students else []
                models.setdefault(student.start, [student.start]).extend([name, *finetuned])
        pool: list[tuple[str, Role]] = []
        sts, retrieval = read_sets(params.evaluate, self.here.at.root)
        for pairs in sts.values():
            pool += [(text, "text") for text in pairs.texts]
        for asked in retrieval.values():
            pool += [(text, "query") for text in asked.queries]
            pool += [(text, "document") for text in asked.documents]
        pool += self.sample[: self.judged]
        timed = self.texts[: params.evaluate.speed_texts]
        pool += (CPU_ROUNDS + 1) * [(text, "text") for text in timed]
        some = [pool[place] for place in self.draw(len(pool))[:SAMPLE]]
        turns = reference_seconds(self.device)
        for name, alike in models.items():
            load = partial(self.here.encoder, name, for_sets=True)
            at, _ = rate_of(load, some, TEXTS_AT_ONCE, self.seconds / 2)
            self.measured[f"evaluate {name}"] = at
            took = turns + 2 * at["load_seconds"] + len(pool) / at["texts_per_second"]
            self.extrapolated |= {f"evaluate {model}": {"seconds": took} for model in alike}
