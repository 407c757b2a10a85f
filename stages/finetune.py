"""Finetune a student on labelled triplets: DisCo's second stage, supervised InfoNCE.

The training loop is that of `distill`. A kd term on cached rows may be added, so that the student does not
forget its teacher; like everything after `mine`, it needs no teacher.

This file is long because the task, its batches and the rehearsal of cached rows change together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.learning import ranks
from stages.learning.batches import Batches, epoch_batches, some_rows
from stages.learning.checkpoints import Checkpoints
from stages.learning.judges import (
    Labels,
    StsJudge,
    TripletJudge,
    positives_by_anchor,
    rejections_note,
)
from stages.learning.loop import TrainingSetup, train
from stages.learning.objectives import Candidates, Temperature, info_nce, kd
from stages.learning.student import Student, encode_ids
from stages.learning.token_rows import prompt_tokens, token_ids, token_rows
from stages.learning.trackers import Track
from stages.models.abilities import check_length
from stages.models.config import NO_PROMPTS
from stages.models.devices import pick_precision
from stages.models.folder import file_hashes, sha256_of
from stages.models.lineage import prompts_read, read_lineage
from stages.models.loading import ends_in_normalize, limit_of_positions, load_model
from stages.models.token_counts import AnyTokenizer
from stages.outcome import Outcome, Progress, clock, write_csv, write_json
from stages.params import FinetuneParams
from stages.reading.triplets import Triplet
from storage import durable
from storage.caches import Caches
from storage.errors import TeachonceError
from storage.manifest import fingerprint
from storage.roles import Role

VERSION = 4  # raise it when a code change gives other weights for the same settings and triplets

TEXTS_AT_ONCE = 8192


def recipe(params: FinetuneParams) -> dict[str, Any]:
    """Settings that change the student: all but whom to finetune; `auto` must be resolved before this."""
    return {"version": VERSION, **params.model_dump(mode="json", exclude={"students"})}


def run(
    params: FinetuneParams,
    *,
    name: str,
    student: Path,
    root: Path,
    evaluation: Collection[bytes],
    caches: Caches | None,
    device: torch.device,
    work: Path,
    out: Path,
    curve: Path,
    training: Path,
    track: Track,
    trust_remote_code: bool = False,
) -> Outcome:
    """Finetune one student. With several ranks, each calls this and the first one writes.

    It is long because it reads in the order in which a run happens: rows, student, training, what is left.

    Args:
        params: The settings `finetune`.
        name: Name of the finetuned student.
        student: Folder of the student.
        root: Folder that the globs in the settings are relative to.
        evaluation: Text keys of evaluation texts; rows with one are rejected.
        caches: Corpus, vectors and split for the kd term; None if `distill_weight` is 0.
        device: The device for training.
        work: Folder for checkpoints.
        out: Folder of the finetuned student, created or replaced atomically.
        curve: CSV file to write, with a row for each evaluation.
        training: JSON file to write, with the facts of the run.
        track: Receives each row of the curve during training.
        trust_remote_code: Whether code in the folder of the student may run.

    Raises:
        TeachonceError: a file is damaged, too few rows are left, or a loss is NaN or infinite.
    """
    params = params.model_copy(update={"precision": pick_precision(params.precision, device)})
    prompts = prompts_read(read_lineage(student))
    apart = prompts.get("query") != prompts.get("document")
    labels = Labels.read(params, root, evaluation, apart=apart)
    run_name = fingerprint(
        {
            **recipe(params),
            "student": file_hashes(
                student,
                address=f"student of {name}",
                sha256=sha256_of,
                trust_remote_code=trust_remote_code,
            ),
            "labels": labels.digest,
            "embeddings": caches.embeddings.manifest.content if caches else None,
            "split": caches.split.content if caches else None,
            "device": device.type,
        }
    )
    checkpoints = Checkpoints(work / run_name)
    torch.manual_seed(params.seed)
    model = load_model(student, device=device, trust_remote_code=trust_remote_code)
    check_length(
        params.max_tokens,
        limit_of_positions(model),
        address="finetune.max_tokens",
        who=f"the student in {student}",
    )
    student_in_training = Student(
        model,
        teacher_dim=model.get_embedding_dimension() or 0,
        unit_length=ends_in_normalize(model),
        project=False,
        dropout=params.dropout,
        prompts=prompts,
    ).to(device)
    task = FinetuneTask(
        params,
        student=student_in_training,
        tokenizer=model.tokenizer,
        triplets=labels.learned,
        judge=labels.judge,
        memory=(Rehearsal(caches, model.tokenizer, student, params, prompts) if caches else None),
        device=device,
    )
    state = train(task, task.setup(), params, name=name, checkpoints=checkpoints, track=track)
    facts = {
        "steps": state.step,
        "best_step": state.best_step,
        "dev": round(state.best_score or 0.0, 6),
        "rows": len(labels.learned),
        "negatives": sum(len(row.negatives) for row in labels.learned),
        "heldout": labels.heldout,
        "judged": labels.judged,
        "rejected": dict(labels.rejected),
        "precision": params.precision,
        "temperature": round(task.temperature.value(), 6),
    }
    lineage = {
        **read_lineage(student),
        "student": name,
        "finetuned": {"recipe": recipe(params), **facts},
    }
    if ranks.is_first():
        with durable.replace_folder(out) as scratch:
            student_in_training.save(scratch, lineage)
        write_csv(curve, state.curve)
        write_json(training, {**facts, "minutes": round(state.seconds / 60, 2)})
        checkpoints.delete()
    first, best = state.curve[0]["dev"], state.best_score or 0.0
    return Outcome(
        stage="finetune",
        made=out,
        summary=(
            f"{name}: {state.step:,} steps of {params.batch_size} of {len(labels.learned):,} rows"
            f"{rejections_note(labels.rejected)} in {clock(state.seconds)}; dev {first:.4f} -> {best:.4f} "
            f"at step {state.best_step:,}"
        ),
        facts={**facts, "dev_before": first, "seconds": round(state.seconds, 1)},
    )


@dataclass(frozen=True)
class Prompted:
    """Token ids of n texts behind their prompts."""

    ids: list[NDArray[np.int32]]  # token ids of each text, special tokens and prompt included
    prompt_tokens: NDArray[np.int64]  # (n,) int64 how many of the first are the prompt

    def take(self, places: NDArray[np.int64]) -> Prompted:
        """Returns some of the texts, in the order of `places`."""
        return Prompted([self.ids[place] for place in places], self.prompt_tokens[places])

    @classmethod
    def joined(cls, *parts: Prompted) -> Prompted:
        """Returns the texts of several, one after the other."""
        ids = [row for part in parts for row in part.ids]
        return cls(ids, np.concatenate([part.prompt_tokens for part in parts]))


NO_TEXTS = Prompted([], np.empty(0, np.int64))


class Rehearsal:
    """Cached rows for the kd term, which keeps a student near its teacher during finetuning.

    Computes the token ids of the student in `folder` that the store lacks.
    """

    def __init__(
        self,
        caches: Caches,
        tokenizer: AnyTokenizer,
        folder: Path,
        params: FinetuneParams,
        prompts: Mapping[Role, str] = NO_PROMPTS,
    ) -> None:
        self.embeddings, self.seed = caches.embeddings, params.seed
        self.train = caches.split.train_rows(caches.corpus)
        self.tokens = token_rows(
            tokenizer,
            folder,
            corpus=caches.corpus,
            store=caches.store,
            max_tokens=params.max_tokens,
            prompts=prompts,
            address="finetune.max_tokens",
        )

    def draw(self, count: int, step: int) -> tuple[Prompted, NDArray[np.floating]]:
        """Returns token ids and (n, D) teacher vectors of the n <= count distinct rows of `step`."""
        rows = some_rows(self.train, count, seed=self.seed, number=step)
        read = Prompted(self.tokens.rows_of(rows), self.tokens.prompt_tokens(rows))
        return read, self.embeddings.rows_of(rows)


class FinetuneTask(nn.Module):
    """The finetuning of one student: triplets as token ids, a temperature and a judge.

    Args:
        params: The settings `finetune`, with `auto` resolved.
        student: The student, on `device`.
        tokenizer: The student's tokenizer.
        triplets: Two or more triplets to learn from.
        judge: Computes the dev score from the vectors of its texts.
        memory: Rows for the kd term; None for no such term.
        device: The device for training.

    Raises:
        TeachonceError: the student's vectors are not in the space of the cached ones.
    """

    def __init__(
        self,
        params: FinetuneParams,
        *,
        student: Student,
        tokenizer: AnyTokenizer,
        triplets: Sequence[Triplet],
        judge: TripletJudge | StsJudge,
        memory: Rehearsal | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.params, self.student, self.judge, self.memory = params, student, judge, memory
        self.device = device
        self.temperature = Temperature(
            params.temperature, learnable=params.learnable_temperature
        ).to(device)
        self.pad_id = int(getattr(tokenizer, "pad_token_id", None) or 0)
        anchors = dict.fromkeys(row.anchor for row in triplets)
        texts = list(anchors | dict.fromkeys(_texts(triplets)))  # anchors first
        place = {text: number for number, text in enumerate(texts)}
        counts = prompt_tokens(
            tokenizer, student.prompts, max_tokens=params.max_tokens, address="finetune.max_tokens"
        )

        def read(texts: Sequence[str], role: Role) -> Prompted:
            prompted = [student.prompts.get(role, "") + text for text in texts]
            ids = _token_ids(tokenizer, prompted, params.max_tokens)
            return Prompted(ids, np.full(len(ids), counts.get(role, 0)))

        # By text: the same one may be an anchor here and a positive there.
        self.as_documents = self.as_queries = read(texts, "document")
        if student.prompts.get("query") != student.prompts.get("document"):
            self.as_queries = read(list(anchors), "query")
        self.judged = Prompted.joined(
            *(read(texts, role) for role, texts in judge.texts_by_role.items())
        )
        self.anchors = np.array([place[row.anchor] for row in triplets])
        self.positives = np.array([place[row.positive] for row in triplets])
        self.right = positives_by_anchor(self.anchors, self.positives)
        # Row i has negatives[ends[i] : ends[i + 1]].
        self.negatives = np.array(
            [place[text] for row in triplets for text in row.negatives], np.int64
        )
        self.ends = np.cumsum([0, *(len(row.negatives) for row in triplets)])
        if memory is not None and memory.embeddings.dim != student.dim:
            raise TeachonceError(
                "finetune.distill_weight",
                f"the student's vectors have {student.dim} numbers, the teacher's {memory.embeddings.dim}",
                "set it to 0, or finetune a student that was distilled from this teacher",
            )

    def setup(self) -> TrainingSetup:
        """Returns batches, loss and score for the training loop."""
        return TrainingSetup(
            batches=self._batches,
            loss=self._loss,
            score=self._score,
            score_name="dev",
            initial_may_win=True,
            parts=["info_nce", *(["kd"] if self.memory else [])],
            notes=lambda: {"temperature": self.temperature.value()},
            halve_pieces=self.student.halve_pieces,
        )

    def _batches(self, epoch: int) -> Batches:
        return epoch_batches(
            np.arange(len(self.anchors)),
            batch_size=self.params.batch_size,
            seed=self.params.seed,
            epoch=epoch,
        )

    def _loss(self, batch: NDArray[np.int64], step: int) -> tuple[Tensor, list[float]]:
        anchors, positives = self.anchors[batch], self.positives[batch]
        negatives = [self.negatives[self.ends[row] : self.ends[row + 1]] for row in batch]
        keys = np.concatenate([positives, *negatives])
        texts = len(anchors) + len(keys)
        rehearsed, teacher = (
            self.memory.draw(self.params.distill_rows, step) if self.memory else (NO_TEXTS, None)
        )
        vectors = self._encode(
            Prompted.joined(self.as_queries.take(anchors), self.as_documents.take(keys), rehearsed)
        )
        candidates = Candidates(
            vectors=vectors[len(anchors) : texts],
            positives=torch.arange(len(anchors), device=self.device),
            not_negative=torch.from_numpy(positives_mask(anchors, keys, self.right)).to(
                self.device
            ),
        )
        losses = [info_nce(vectors[: len(anchors)], candidates, self.temperature.scale())]
        total = losses[0]
        if teacher is not None:
            target = torch.from_numpy(teacher).to(self.device).float()
            losses.append(kd(vectors[texts:], target))
            total = total + self.params.distill_weight * losses[1]
        return total, [float(loss.detach()) for loss in losses]

    @torch.no_grad()
    def _score(self) -> float:
        return self.judge(self._encode(self.judged).cpu().numpy())

    def _encode(self, texts: Prompted) -> Tensor:
        return encode_ids(
            self.student,
            texts.ids,
            pad_id=self.pad_id,
            device=self.device,
            precision=self.params.precision,
            gradient_caching=self.params.gradient_caching,
            prompt_tokens=texts.prompt_tokens,
        )


def positives_mask(
    anchors: NDArray[np.int64], keys: NDArray[np.int64], right: Mapping[int, NDArray[np.int64]]
) -> NDArray[np.bool_]:
    """Find the keys that are no negatives of an anchor.

    Args:
        anchors: (B,) int64 text ids.
        keys: (C,) int64 text ids of positives and negatives of any rows.
        right: Anchor -> ids of all its positives, in this batch or not.

    Returns:
        (B, C) mask of keys that are a positive of the anchor, or the anchor itself.
    """
    same: NDArray[np.bool_] = keys == anchors[:, None]
    for row, anchor in enumerate(anchors.tolist()):
        same[row] |= np.isin(keys, right[anchor])
    return same


def _token_ids(
    tokenizer: AnyTokenizer, texts: Sequence[str], max_tokens: int
) -> list[NDArray[np.int32]]:
    """Returns the int32 token ids of each text, special tokens included, truncated at `max_tokens`."""
    progress = Progress("tokens", total=len(texts), unit="texts")
    all_ids: list[NDArray[np.int32]] = []
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        batch = list(texts[first : first + TEXTS_AT_ONCE])
        batch_ids = token_ids(tokenizer, batch, max_tokens=max_tokens)
        all_ids += [np.array(ids, np.int32) for ids in batch_ids]
        progress.advance(len(batch))
    return all_ids


def _texts(triplets: Sequence[Triplet]) -> dict[str, None]:
    """Returns the distinct texts in the order of their first occurrence."""
    return dict.fromkeys(text for row in triplets for text in row.texts)
