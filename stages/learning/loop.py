"""The training loop of `distill` and `finetune`, which pass batches, loss and score as a `TrainingSetup`.

A step is a function of (seed, step) and the weights before it: these determine order, queue and dropout. A
run killed anywhere and started again ends with the same weights (on a CPU, bit by bit). With several ranks
each takes every step, and the first one writes the checkpoints.

This file is long because a step stands beside what can end it: too little memory, NaN, a worse score.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.learning import ranks
from stages.learning.ahead import ahead
from stages.learning.batches import Batches
from stages.learning.checkpoints import (
    Checkpoints,
    State,
    optimizer_tensors,
    restore_optimizer,
)
from stages.learning.objectives import Temperature
from stages.learning.trackers import Track
from stages.outcome import Progress, log
from stages.params import TrainingParams
from storage.errors import TeachonceError

CHECKPOINT_SECONDS = 60.0
"""Seconds between two checkpoints; a killed run loses this much work at most."""

STEPS_IN_MEMORY = 16  # between two looks whether caches that were in memory still are

BETAS = (0.9, 0.98)  # DisCo's

CURE = (
    "lower learning_rate, set clip: 1.0 or precision: fp32, lower the weights of objectives that are very "
    "large; with other settings the training begins anew"
)
"""The cure in errors of a run that diverged."""


MEMORY_CURE = "set gradient_caching: true, or lower batch_size, max_tokens or the objectives' queue"


@dataclass(frozen=True)
class TrainingSetup:
    """Batches, loss and score of a training run.

    Args:
        batches: Epoch -> row ids of each step's batch.
        loss: Row ids, step -> scalar loss to minimise, and each objective's unweighted part of it; None for
            an objective that had none in this step.
        score: Returns the score of the current weights; higher is better.
        score_name: Column of the score in the curve.
        initial_may_win: Whether the initial weights may be kept as the best. False where training may lower
            the score before it rises above the initial one: early stopping would end the run before that.
        parts: Column names of the objectives' parts.
        notes: Returns extra scalars to log at each evaluation, e.g. the learned temperature; None for one
            that has no value yet.
        evaluated: Receives each score, the same on all ranks, before the notes are asked for.
        read_ahead: Row ids, step -> whether anything had to be read from the disk. Asks the system to read
            what the loss of that step needs; a thread calls it during the step before.
        halve_pieces: Lets the loss take less memory, after a step for which the device had too little;
            returns False if it cannot.
    """

    batches: Callable[[int], Batches]
    loss: Callable[[NDArray[np.int64], int], tuple[Tensor, Sequence[float | None]]]
    score: Callable[[], float]
    score_name: str
    initial_may_win: bool
    parts: list[str]
    notes: Callable[[], Mapping[str, float | None]]
    evaluated: Callable[[float], None] = lambda score: None
    read_ahead: Callable[[NDArray[np.int64], int], bool] = lambda rows, step: False
    halve_pieces: Callable[[], bool] = lambda: False


def train(
    model: nn.Module,
    setup: TrainingSetup,
    params: TrainingParams,
    *,
    name: str,
    checkpoints: Checkpoints,
    track: Track,
) -> State:
    """Train until the last step, or until the score has not risen for `patience` evaluations.

    Afterwards the model has the weights with the best score.

    Args:
        model: The student with everything else that is trained, such as temperatures.
        setup: Batches, loss and score.
        params: The settings of the run.
        name: Name of the student, for the log.
        checkpoints: The checkpoints of this run.
        track: Receives each row of the curve; in a resumed run the earlier ones first.

    Raises:
        TeachonceError: the loss, its gradient, a weight or the score is NaN or infinite (names the step and
            the rows; the step is not saved), or the ranks are not in the same run.
    """
    total = params.epochs * len(setup.batches(0))
    optimizer = make_optimizer(model, params)
    state, best = _resume(model, optimizer, checkpoints, name)
    ranks.check_same(f"step {state.step} of run {checkpoints.folder.name}")
    for row in state.curve:
        track(row)
    progress = Progress(name, total=total, unit="steps", done=state.step)
    started = saved = time.monotonic()
    seconds_before = state.seconds
    if not state.curve:
        best = _evaluate(model, optimizer, setup, state, best, params, total)
        track(state.curve[-1])
    with closing(_rows_of_steps(setup, range(state.step, total))) as rows_of_steps:
        while state.stale < params.patience and (rows := next(rows_of_steps, None)) is not None:
            parts = take_step(model, optimizer, setup, rows, state.step, total, params)
            state.step += 1
            _add(state, parts)
            if state.step % params.evaluate_every == 0 or state.step == total:
                best = _evaluate(model, optimizer, setup, state, best, params, total)
                track(state.curve[-1])
            progress.advance(1, f"loss {sum(filter(None, parts)):.4f}")
            state.seconds = seconds_before + time.monotonic() - started
            if ranks.is_first() and time.monotonic() - saved > CHECKPOINT_SECONDS:
                _check_weights(model, optimizer, state.step)
                checkpoints.save(state, _tensors(model, optimizer, best))
                saved = time.monotonic()
    model.load_state_dict(best)
    return state


def _rows_of_steps(setup: TrainingSetup, steps: range) -> Generator[NDArray[np.int64]]:
    """Yield the row ids of each step's batch, after the system was asked to read what the step needs.

    Where all of that was in memory, it is asked less often: a call takes a tenth of the shortest steps.
    """
    batches_of = lru_cache(maxsize=1)(setup.batches)
    steps_of_epoch = len(batches_of(0))
    on_disk = True

    def rows_of(step: int) -> NDArray[np.int64]:
        nonlocal on_disk
        epoch, place = divmod(step, steps_of_epoch)
        rows = batches_of(epoch)[place]
        if on_disk or step % STEPS_IN_MEMORY == 0:
            on_disk = setup.read_ahead(rows, step)
        return rows

    yield from ahead(rows_of, steps)


def make_optimizer(model: nn.Module, params: TrainingParams) -> torch.optim.Optimizer:
    """AdamW; biases, norms and temperatures are not decayed."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in learned if w.ndim > 1], "weight_decay": params.weight_decay},
        {"params": [w for w in learned if w.ndim <= 1], "weight_decay": 0.0},
    ]
    # fused: one pass over the weights, ten times faster on a CPU than the default.
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=BETAS, fused=True)


def learning_rate(step: int, total: int, params: TrainingParams) -> float:
    """Rise linearly over the warm-up, then fall to zero along a cosine."""
    warmup = round(params.warmup * total)
    if step < warmup:
        return params.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return params.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setup: TrainingSetup,
    rows: NDArray[np.int64],
    step: int,
    total: int,
    params: TrainingParams,
) -> Sequence[float | None]:
    """One step; returns each objective's part of the loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total, params)
    loss, parts = _loss_and_gradients(model, setup, rows, step, seed=params.seed)
    ranks.average_gradients(model)
    weights = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
    # The square must be finite, too: Adam averages squares of gradients, and an infinite average never
    # recovers. All ranks have the same gradients here, so all of them stop.
    if not bool(torch.isfinite(norm.square())):
        raise _diverged(
            step, f"the loss is {float(loss.detach()):.4g}, its gradient {norm:.4g}", rows
        )
    if params.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(weights, params.clip, norm)
    optimizer.step()
    for module in model.modules():
        if isinstance(module, Temperature):
            module.keep_in_bounds()
    return parts


def _loss_and_gradients(
    model: nn.Module, setup: TrainingSetup, rows: NDArray[np.int64], step: int, *, seed: int
) -> tuple[Tensor, Sequence[float | None]]:
    """The loss of a step and its objectives' parts; where memory is short, in smaller pieces."""
    model.train()
    while True:
        model.zero_grad(set_to_none=True)
        # Dropout is determined by (seed, step) and the rank, since each rank has other texts.
        address = np.random.SeedSequence([seed, step, ranks.rank()])
        torch.manual_seed(int(address.generate_state(1)[0]))
        try:
            loss, parts = setup.loss(rows, step)
            if not bool(torch.isfinite(loss)):
                raise _diverged(step, f"the loss is {float(loss.detach())}", rows)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            return loss, parts
        except torch.OutOfMemoryError as error:
            # Other ranks wait for this one's vectors, so it cannot begin the step again alone.
            if ranks.count() > 1 or not setup.halve_pieces():
                raise TeachonceError(f"step {step}", str(error), MEMORY_CURE) from error
        # Here, since until now the error held what the step had made.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _diverged(step: int, problem: str, rows: NDArray[np.int64]) -> TeachonceError:
    """Returns the error of a step whose loss or gradient is NaN or Inf; the step changed no weight."""
    named = f"{', '.join(map(str, rows[:16]))}{' …' if len(rows) > 16 else ''}"
    return TeachonceError(f"step {step}", f"{problem}; rows {named}", CURE)


def _first_broken_weight(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Returns the name of the first weight with NaN or Inf in it or in its optimizer averages, or None."""
    for name, weight in model.named_parameters():
        averages = optimizer.state.get(weight, {})
        if not all(bool(torch.isfinite(value).all()) for value in (weight, *averages.values())):
            return name
    return None


def _check_weights(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Check the weights before they are scored or saved.

    Raises:
        TeachonceError: a weight has NaN or Inf in it; names it.
    """
    name = _first_broken_weight(model, optimizer)
    if name is None:
        return
    if step == 0:
        cure = "make the model that training starts from anew: its weights are not whole"
        raise TeachonceError("step 0", f"{name} has NaN or Inf in it", cure)
    raise TeachonceError(f"step {step}", f"{name} has NaN or Inf in it after it", CURE)


def _add(state: State, parts: Sequence[float | None]) -> None:
    sums, absent = state.loss_sums or [0.0] * len(parts), state.loss_absent or [0] * len(parts)
    state.loss_sums = [a + (b or 0.0) for a, b in zip(sums, parts, strict=True)]
    state.loss_absent = [a + (b is None) for a, b in zip(absent, parts, strict=True)]
    state.loss_steps += 1


def _evaluate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setup: TrainingSetup,
    state: State,
    best: dict[str, Tensor],
    params: TrainingParams,
    total: int,
) -> dict[str, Tensor]:
    """Score the weights, add a row to the curve, and return the best weights so far."""
    _check_weights(model, optimizer, state.step)
    model.eval()
    score = ranks.broadcast_from_first(setup.score())
    if not math.isfinite(score):
        raise TeachonceError(
            f"step {state.step}",
            f"{setup.score_name} is {score}: vectors have NaN or Inf in them",
            CURE,
        )
    setup.evaluated(score)
    # Before the first step there is a score and no loss yet.
    counts = [state.loss_steps - absent for absent in state.loss_absent]
    means = [
        round(value / count, 8) if count else None
        for value, count in zip(state.loss_sums, counts, strict=True)
    ] or [None] * len(setup.parts)
    state.loss_sums, state.loss_absent, state.loss_steps = [], [], 0
    state.curve.append(
        {
            "step": state.step,
            **{f"loss_{part}": mean for part, mean in zip(setup.parts, means, strict=True)},
            setup.score_name: round(score, 6),
            "learning_rate": learning_rate(max(state.step - 1, 0), total, params),
            **{
                note: None if value is None else round(value, 6)
                for note, value in setup.notes().items()
            },
        }
    )
    losses = ", ".join(f"{mean:.5f}" for mean in means if mean is not None)
    log.info(
        "step %d: %s %.4f%s",
        state.step,
        setup.score_name,
        score,
        f", loss {losses}" if losses else "",
    )
    if state.step == 0 and not setup.initial_may_win:
        return best
    if state.best_score is None or score > state.best_score:
        state.best_score, state.best_step, state.stale = score, state.step, 0
        return {key: value.detach().clone() for key, value in model.state_dict().items()}
    state.stale += 1
    return best


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoints: Checkpoints, name: str
) -> tuple[State, dict[str, Tensor]]:
    checkpoint = checkpoints.load()
    if checkpoint is None:
        return State(), {key: value.detach().clone() for key, value in model.state_dict().items()}
    state, tensors = checkpoint
    model.load_state_dict(_part(tensors, "model/"))
    restore_optimizer(optimizer, tensors)
    best = _part(tensors, "best/")
    broken = _first_broken_weight(model, optimizer) or next(
        (key for key, _ in model.named_parameters() if not bool(torch.isfinite(best[key]).all())),
        None,
    )
    if broken is not None:
        raise TeachonceError(
            checkpoints.folder,
            f"the checkpoint of step {state.step} has NaN or Inf in it, first in {broken}",
            f"delete its step-{state.step:09}-*.safetensors to go on from the checkpoint before it, or the "
            "folder to begin anew; then start the command again",
        )
    log.info("%s: going on at step %d", name, state.step)
    return state, best


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {
        **{f"model/{key}": value for key, value in model.state_dict().items()},
        **{f"best/{key}": value for key, value in best.items()},
        **optimizer_tensors(optimizer),
    }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
