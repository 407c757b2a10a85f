"""Distill a student from a start and the caches: texts, readings, vectors, neighbours, mixes; no teacher.

This file is long because a run and its task, with all that they are made of, are read in one piece.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.learning import ranks
from stages.learning.batches import Batches, epoch_batches, without_some
from stages.learning.candidates import CandidateSource
from stages.learning.checkpoints import Checkpoints, State
from stages.learning.loop import TrainingSetup, train
from stages.learning.mixed_rows import MixedRows
from stages.learning.objectives import Candidates, MixedBatch, Objectives
from stages.learning.pretraining import LabelledTriples, MinedTriples, Pretraining
from stages.learning.proposals import Proposals
from stages.learning.reading_rows import ReadingRows, some_readings
from stages.learning.student import Rows, Student, encode_ids
from stages.learning.token_rows import prompts_of_teacher, token_rows
from stages.learning.trackers import Track
from stages.models.abilities import check_length
from stages.models.devices import pick_precision
from stages.models.folder import file_hashes, sha256_of
from stages.models.loading import limit_of_positions, load_model
from stages.outcome import Outcome, clock, log, write_csv, write_json
from stages.params import (
    LEAST_HELDOUT,
    DiscoKdObjective,
    MixesObjective,
    RecipeParams,
    SpeculativeObjective,
    check_recipe_widths,
    larger_queues,
)
from stages.vectors import MOST_ROWS, evenly, rank_agreement
from storage import durable
from storage.caches import Caches
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.manifest import fingerprint
from storage.roles import Role
from storage.store import digest
from storage.tokens import Tokens

VERSION = 5  # raise it when a code change gives other weights for the same recipe and caches

UNIT_TOLERANCE = 0.01
"""A teacher normalises its vectors if all their lengths differ from 1 by less than this."""


def recipe(params: RecipeParams) -> dict[str, Any]:
    """Settings that change the student: all of them; `auto` must be resolved before this."""
    # A recipe without them has the fingerprint that it had before there were such settings.
    left_out = {name for name in ("pretrain", "readings") if not getattr(params, name)}
    left_out |= {"prompts"} if params.prompts == "none" else set()
    dumped = params.model_dump(mode="json", exclude=left_out)
    if params.pretrain and params.pretrain.triplets == "mined":
        del dumped["pretrain"]["triplets"]  # likewise
    return {"version": VERSION, **dumped}


def resolved(params: RecipeParams, device: torch.device) -> RecipeParams:
    """Returns a recipe with `precision: auto` replaced by what it means on a device."""
    return params.model_copy(update={"precision": pick_precision(params.precision, device)})


def run(
    params: RecipeParams,
    *,
    name: str,
    start: Path,
    caches: Caches,
    device: torch.device,
    work: Path,
    out: Path,
    curve: Path,
    training: Path,
    track: Track,
    trust_remote_code: bool = False,
) -> Outcome:
    """Train one student. With several ranks, each calls this and the first one writes.

    It is long because it reads in the order in which a run happens: start, task, training, what is left.

    Args:
        params: The recipe.
        name: Name of the student.
        start: Folder of the start.
        caches: Corpus, vectors, neighbours and split to learn from.
        device: The device for training.
        work: Folder for checkpoints.
        out: Folder of the student, created or replaced atomically.
        curve: CSV file to write, with a row for each evaluation.
        training: JSON file to write, with the facts of the run.
        track: Receives each row of the curve during training.
        trust_remote_code: Whether code in the folder of the start may run.

    Raises:
        TeachonceError: too few rows, or a loss that is NaN or infinite.
    """
    params, labelled = resolved(params, device), caches.labelled
    run_name = fingerprint(
        {
            **recipe(params),
            "start": file_hashes(
                start,
                address=f"start of {name}",
                sha256=sha256_of,
                trust_remote_code=trust_remote_code,
            ),
            "embeddings": caches.embeddings.manifest.content,
            "negatives": caches.negatives.manifest.content if caches.negatives else None,
            **({"mixes": caches.mixes.manifest.content} if caches.mixes else {}),
            **({"readings": caches.readings.manifest.content} if caches.readings else {}),
            **({"labelled": digest(labelled.tobytes())} if labelled is not None else {}),
            "split": caches.split.content,
            "device": device.type,
        }
    )
    checkpoints = Checkpoints(work / run_name)
    task = prepare(
        params, start=start, caches=caches, device=device, trust_remote_code=trust_remote_code
    )
    student = task.student
    for note in larger_queues(params, len(task.rows)):
        log.info("%s: %s", name, note)
    state = train(task, task.setup(), params, name=name, checkpoints=checkpoints, track=track)
    facts = _facts(state, params, task)
    lineage = {
        "student": name,
        "start": start.name,
        "recipe": recipe(params),
        "projection": student.projection is not None,
        "teacher": {
            "fingerprint": fingerprint(caches.embeddings.manifest.recipe),
            "dim": caches.embeddings.dim,
        },
        "corpus": caches.corpus.manifest.content,
        **({"prompts": dict(student.prompts)} if student.prompts else {}),
        **facts,
    }
    if ranks.is_first():
        with durable.replace_folder(out) as scratch:
            student.save(scratch, lineage)
        write_csv(curve, state.curve)
        write_json(training, {**facts, "minutes": round(state.seconds / 60, 2)})
        checkpoints.delete()
    return Outcome(
        stage="distill",
        made=out,
        summary=(
            f"{name}: {state.step:,} steps of {params.batch_size} rows in {clock(state.seconds)}; "
            f"agreement with the teacher {state.best_score or 0:.4f} at step {state.best_step:,}"
        ),
        facts={**facts, "seconds": round(state.seconds, 1)},
    )


def prepare(
    params: RecipeParams,
    *,
    start: Path,
    caches: Caches,
    device: torch.device,
    trust_remote_code: bool = False,
) -> DistillTask:
    """Returns the task of a recipe, with `auto` resolved, before its first step.

    Computes the token ids that the store lacks.

    Raises:
        TeachonceError: too few rows, a start that cannot be trained, or a width above the teacher's.
    """
    dim = caches.embeddings.dim
    check_recipe_widths(params.widths, dim, recipe="*")
    torch.manual_seed(params.seed)
    model = load_model(start, device=device, trust_remote_code=trust_remote_code)
    check_length(
        params.max_tokens,
        limit_of_positions(model),
        address="recipes.*.max_tokens",
        who=f"the start in {start}",
    )
    prompts = prompts_of_student(params, caches.embeddings)
    student = Student(
        model,
        teacher_dim=dim,
        unit_length=has_unit_length(caches.embeddings) and not _is_raw(params),
        project=params.projection == "always",
        dropout=params.dropout,
        prompts=prompts,
    ).to(device)
    if params.reads_mixes:
        student.check_mixing(address=str(start))
    tokens_of = partial(
        token_rows,
        model.tokenizer,
        start,
        store=caches.store,
        max_tokens=params.max_tokens,
        prompts=prompts,
    )
    tokens = tokens_of(corpus=caches.corpus)
    # `plan` has none: a reading takes about as long as its text.
    tokens_read = tokens_of(corpus=caches.readings) if caches.readings and params.readings else None
    return DistillTask(
        params,
        student=student,
        tokens=tokens,
        tokens_read=tokens_read,
        pad_id=int(getattr(model.tokenizer, "pad_token_id", None) or 0),
        caches=caches,
        device=device,
    )


def prompts_of_student(params: RecipeParams, embeddings: Embeddings) -> dict[Role, str]:
    """Returns role -> what a student of this recipe reads before texts of that role; empty for none.

    Raises:
        TeachonceError: the recipe says `prompts: teacher`, and the teacher's are not known.
    """
    if params.prompts == "none":
        return {}
    prompts = prompts_of_teacher(embeddings.manifest.recipe)
    if not prompts:
        log.info("the teacher read no prompt, so prompts: teacher is the same as none")
    return prompts


class DistillTask(nn.Module):
    """The distillation of one student: its token ids, the teacher's vectors and the objectives.

    Args:
        params: The recipe, with `auto` resolved.
        student: The student, on `device`.
        tokens: The student's token ids of the corpus.
        tokens_read: Its token ids of the readings; None if it reads the corpus alone.
        pad_id: The id of the padding token.
        caches: Corpus, vectors, neighbours and split to learn from.
        device: The device for training.
    """

    def __init__(
        self,
        params: RecipeParams,
        *,
        student: Student,
        tokens: Tokens,
        tokens_read: Tokens | None = None,
        pad_id: int,
        caches: Caches,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = Objectives(
            params.objectives, params.widths, params.precision, dim=caches.embeddings.dim
        ).to(device)
        self.params, self.tokens, self.caches, self.device = params, tokens, caches, device
        self.pad_id = pad_id
        # Two epochs: a queue of past steps may reach into the epoch before.
        self._batches = lru_cache(maxsize=2)(self._epoch_batches)
        self.rows = caches.split.train_rows(caches.corpus)
        heldout = caches.split.heldout_rows(caches.corpus)
        if len(heldout) < LEAST_HELDOUT or len(self.rows) < 2:
            raise TeachonceError(
                "split.heldout",
                f"{len(self.rows)} rows to train on and {len(heldout)} held out are too few "
                f"(2 and {LEAST_HELDOUT} at least)",
                "give shard.sources more texts, or change split.heldout",
            )
        self.heldout = evenly(heldout, min(MOST_ROWS, len(heldout)))
        self.heldout_vectors = caches.embeddings.rows_of(self.heldout)
        self.read = self.heldout_read = None
        if caches.readings is not None and tokens_read is not None:
            rows_read = partial(
                ReadingRows, caches.readings, tokens_read, share=params.readings, seed=params.seed
            )
            self.read = rows_read(some_readings(caches.readings.learned(caches.split)))
            self.heldout_read = rows_read(caches.readings.heldout(caches.split))
        self.mixed = None
        if params.reads_mixes and caches.mixes is not None:
            self.mixed = MixedRows(caches.mixes, tokens, self.rows, seed=params.seed)
        self._steps_of_epoch = max(len(self.rows) // params.batch_size, 1)
        self.proposals = self._make_proposals()
        self.proposers = nn.ModuleDict(self.proposals).to(device)  # so that a checkpoint has them
        self.source = CandidateSource(
            caches.embeddings,
            caches.negatives,
            train=self.rows,
            rows_of_step=self._rows_of_step,
            seed=params.seed,
            device=device,
            precision=params.precision,
        )
        # Last: it draws no random number that the rest of a run would miss.
        self.pretraining = self._make_pretraining()

    def setup(self) -> TrainingSetup:
        """Returns batches, loss and score for the training loop."""
        return TrainingSetup(
            batches=self._batches,
            loss=self._loss,
            score=self._score,
            score_name="agreement",
            initial_may_win=False,
            parts=[*self.objectives.names, *(["pretraining"] if self.pretraining else [])],
            notes=self._notes,
            evaluated=self._evaluated,
            read_ahead=self._read_ahead,
            halve_pieces=self.student.halve_pieces,
        )

    def encode(
        self,
        rows: NDArray[np.int64],
        *,
        deleted: float = 0.0,
        step: int = 0,
        read: ReadingRows | None = None,
    ) -> Tensor:
        """Returns (B, D) float32 student vectors of rows.

        Args:
            rows: (B,) int64 row ids.
            deleted: Share of each text's tokens to delete, 0 to 1.
            step: The step; with the seed it determines which tokens, and which readings.
            read: Draws the rows that are read as one of their readings; None to read all as they are.
        """
        ids, in_prompt = self.tokens.rows_of(rows), self.tokens.prompt_tokens(rows)
        if read is not None:
            # Behind the same prompt as the text, whose role they have.
            ids = read.put_into(ids, rows, step)
        if deleted:
            draw = np.random.default_rng([self.params.seed, step])
            ids = [
                without_some(row, deleted, draw, count)
                for row, count in zip(ids, in_prompt.tolist(), strict=True)
            ]
        return self._encode_ids(ids, in_prompt)

    def _encode_ids(self, ids: Rows, in_prompt: NDArray[np.int64]) -> Tensor:
        return encode_ids(
            self.student,
            ids,
            pad_id=self.pad_id,
            device=self.device,
            precision=self.params.precision,
            gradient_caching=self.params.gradient_caching,
            prompt_tokens=in_prompt,
        )

    def _epoch_batches(self, epoch: int) -> Batches:
        return epoch_batches(
            self.rows, batch_size=self.params.batch_size, seed=self.params.seed, epoch=epoch
        )

    def _rows_of_step(self, step: int) -> NDArray[np.int64]:
        epoch, place = divmod(step, self._steps_of_epoch)
        return self._batches(epoch)[place]

    def _make_proposals(self) -> dict[str, Proposals]:
        """Returns those of each speculative objective, by its name."""
        objectives = zip(self.objectives.names, self.params.objectives, strict=True)
        return {
            name: Proposals(
                objective,
                embeddings=self.caches.embeddings,
                negatives=self.caches.negatives,
                train=self.rows,
                steps=self.params.epochs * self._steps_of_epoch,
                seed=self.params.seed,
            )
            for name, objective in objectives
            if isinstance(objective, SpeculativeObjective)
        }

    def _make_pretraining(self) -> Pretraining | None:
        if self.params.pretrain is None:
            return None
        triples: MinedTriples | LabelledTriples
        seed, labelled, negatives = self.params.seed, self.caches.labelled, self.caches.negatives
        if self.params.reads_labels:
            assert labelled is not None  # read for a recipe that asks for them
            triples = LabelledTriples(labelled, self.caches.embeddings, seed=seed)
        else:
            assert negatives is not None
            triples = MinedTriples(negatives, seed=seed)
        return Pretraining(
            triples,
            evenly(self.rows, min(MOST_ROWS, len(self.rows))),
            steps=round(self.params.pretrain.share * self.params.epochs * self._steps_of_epoch),
            dim=self.caches.embeddings.dim,
        ).to(self.device)

    def _pretrain(
        self, pretraining: Pretraining, rows: NDArray[np.int64], step: int
    ) -> tuple[Tensor, list[float | None]]:
        # Three texts for each row: as many as a batch of other steps has.
        triples, margins = pretraining.triples.draw(rows[: max(len(rows) // 3, 1)], step)
        others: list[float | None] = [None] * len(self.objectives.names)
        # None of these rows has two neighbours: nothing but the head gets a gradient, which is 0.
        if not len(margins):
            return 0 * pretraining.head.bias.sum(), [*others, None]
        vectors = self.encode(triples.reshape(-1), step=step)
        loss = pretraining(vectors.view(*triples.shape, -1), margins)
        return loss, [*others, float(loss.detach())]

    def _loss(self, rows: NDArray[np.int64], step: int) -> tuple[Tensor, list[float | None]]:
        if self.pretraining is not None and step < self.pretraining.steps:
            return self._pretrain(self.pretraining, rows, step)
        teacher = torch.from_numpy(self.caches.embeddings.rows_of(rows)).to(self.device).float()
        objectives = self.params.objectives
        for proposals in self.proposals.values():
            proposals.refresh(step, self._as_used)
        vectors = {
            deleted: self.encode(rows, deleted=deleted, step=step, read=self.read)
            for deleted in sorted({objective.deleted for objective in objectives})
        }
        candidates: list[Candidates | MixedBatch | None] = []
        for name, objective in zip(self.objectives.names, objectives, strict=True):
            if isinstance(objective, MixesObjective):
                candidates.append(self._mixed(objective, step))
                continue
            proposed = None
            if name in self.proposals:
                own = vectors[objective.deleted]
                proposed = self.proposals[name].propose(rows, own, step=step)
            candidates.append(self.source.draw(objective, rows, step=step, proposed=proposed))
        total, parts = self.objectives(vectors, teacher, candidates)
        return total, [*parts, *([None] if self.pretraining else [])]

    def _read_ahead(self, rows: NDArray[np.int64], step: int) -> bool:
        before = _blocks_read()
        self.tokens.read_ahead(rows)
        # What the student will propose, nobody knows yet.
        known = (one for one in self.params.objectives if not isinstance(one, SpeculativeObjective))
        ids = [self.source.vectors_read(objective, rows, step=step) for objective in known]
        self.caches.embeddings.read_ahead(np.unique(np.concatenate([rows, *ids])))
        return _blocks_read() > before

    def _mixed(self, objective: MixesObjective, step: int) -> MixedBatch:
        assert self.mixed is not None  # opened for a recipe that reads mixes
        ids, in_prompt, teacher = self.mixed.draw(step, objective.rows)
        vectors = self._encode_ids(ids, in_prompt)
        return MixedBatch(vectors, torch.from_numpy(teacher).to(self.device).float())

    @torch.no_grad()
    def _score(self) -> float:
        # Judged as it learns: the best weights for texts alone may be those that read nothing else.
        vectors = self.encode(self.heldout, read=self.heldout_read)
        return rank_agreement(vectors.cpu().numpy(), self.heldout_vectors)

    def _notes(self) -> dict[str, float | None]:
        heldout = torch.from_numpy(self.heldout_vectors).to(self.device)
        notes = {
            f"{note}_{name}": value
            for name, proposals in self.proposals.items()
            for note, value in proposals.notes().items()
        }
        return {**self.objectives.notes(heldout), **notes}

    def _evaluated(self, score: float) -> None:
        for proposals in self.proposals.values():
            proposals.evaluated(score)

    def _as_used(self, rows: NDArray[np.int64]) -> Tensor:
        """(n, D) vectors of rows, without dropout."""
        self.student.eval()
        vectors = self.encode(rows)
        self.student.train()
        return vectors


def _blocks_read() -> int:
    """How many blocks this thread has read from disks; on a system that counts no threads, the process."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_inblock


def _is_raw(params: RecipeParams) -> bool:
    return any(isinstance(objective, DiscoKdObjective) for objective in params.objectives)


def has_unit_length(embeddings: Embeddings) -> bool:
    """Whether the teacher's vectors have length 1, judged by the first shard."""
    lengths = np.linalg.norm(embeddings.shard(0).astype(np.float32), axis=1)
    return bool((np.abs(lengths - 1) < UNIT_TOLERANCE).all())


def _facts(state: State, params: RecipeParams, task: DistillTask) -> Mapping[str, Any]:
    if state.stale >= params.patience:
        log.info("stopped early: no better agreement in %d evaluations", state.stale)
    notes = task.setup().notes()
    return {
        "steps": state.step,
        "best_step": state.best_step,
        "agreement": round(state.best_score or 0.0, 6),
        "rows": len(task.rows),
        **({"readings": len(task.read.ids)} if task.read else {}),
        "precision": params.precision,
        **{name: round(value, 6) for name, value in notes.items() if value is not None},
    }
