"""One training loop. It knows steps, weights and a score; what is learned comes from outside.

A step is a function of (seed, step) and the weights before it: order, queue and dropout all have that
address. A run killed anywhere and started again ends with the same weights (on a CPU, bit by bit). With
several ranks each takes every step, and the first one keeps the checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.learning import ranks
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
"""Least time between two checkpoints: what a killed run loses at most."""

BETAS = (0.9, 0.98)  # DisCo's

CURE = (
    "lower learning_rate, set clip: 1.0 or precision: fp32, lower the weights of objectives that are very "
    "large; with other settings the training begins anew"
)
"""Of a training that diverged."""


@dataclass(frozen=True)
class Work:
    """What is learned.

    Args:
        batches: Epoch -> the rows of each step.
        loss: Rows, step -> loss to minimise, and each objective's part of it before weighting.
        score: How good the weights are now; more is better.
        score_name: What it is called in the curve.
        start_counts: Whether the weights before the first step may be the best. Not where learning may
            first lead away from a good start: the run would end before it comes back.
        parts: A name for each part.
        notes: What else is worth a column in the curve, such as a temperature.
    """

    batches: Callable[[int], list[NDArray[np.int64]]]
    loss: Callable[[NDArray[np.int64], int], tuple[Tensor, list[float]]]
    score: Callable[[], float]
    score_name: str
    start_counts: bool
    parts: list[str]
    notes: Callable[[], dict[str, float]]


def train(
    model: nn.Module,
    work: Work,
    params: TrainingParams,
    *,
    name: str,
    checkpoints: Checkpoints,
    track: Track,
) -> State:
    """Train until the last step, or until the score has not risen for `patience` evaluations.

    Afterwards the model has the weights with the best score.

    Args:
        model: All that learns.
        work: What is learned.
        params: Recipe.
        name: Of the student, for the log.
        checkpoints: Where the run's state is kept.
        track: Takes the rows of the curve; after a resumption those of before, too.

    Raises:
        TeachonceError: the loss, its gradient, a weight or the score is NaN or infinite; names the step and
            the rows, and keeps nothing of it. Or the ranks do not see the same run.
    """
    batches = work.batches(0)
    total = params.epochs * len(batches)
    optimizer = make_optimizer(model, params)
    state, best = _resume(model, optimizer, checkpoints, name)
    ranks.check_same(f"step {state.step} of run {checkpoints.folder.name}")
    for row in state.curve:
        track(row)
    progress = Progress(name, total=total, unit="steps", done=state.step)
    started = saved = time.monotonic()
    seconds_before = state.seconds
    if not state.curve:
        best = _evaluate(model, optimizer, work, state, best, params, total)
        track(state.curve[-1])
    epoch_of_batches = 0
    while state.step < total and state.stale < params.patience:
        epoch, place = divmod(state.step, len(batches))
        if epoch != epoch_of_batches:
            batches, epoch_of_batches = work.batches(epoch), epoch
        parts = take_step(model, optimizer, work, batches[place], state.step, total, params)
        state.step += 1
        _add(state, parts)
        if state.step % params.evaluate_every == 0 or state.step == total:
            best = _evaluate(model, optimizer, work, state, best, params, total)
            track(state.curve[-1])
        progress.advance(1, f"loss {sum(parts):.4f}")
        state.seconds = seconds_before + time.monotonic() - started
        if ranks.is_first() and time.monotonic() - saved > CHECKPOINT_SECONDS:
            _check_weights(model, optimizer, state.step)
            checkpoints.save(state, _tensors(model, optimizer, best))
            saved = time.monotonic()
    model.load_state_dict(best)
    return state


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
    work: Work,
    rows: NDArray[np.int64],
    step: int,
    total: int,
    params: TrainingParams,
) -> list[float]:
    """One step; returns each objective's part of the loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total, params)
    # Dropout has an address, too: (seed, step), and the rank, whose texts are others.
    address = np.random.SeedSequence([params.seed, step, ranks.rank()])
    torch.manual_seed(int(address.generate_state(1)[0]))
    model.train()
    loss, parts = work.loss(rows, step)
    if not bool(torch.isfinite(loss)):
        raise _diverged(step, f"the loss is {float(loss.detach())}", rows)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
    ranks.average_gradients(model)
    weights = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
    # Its square, too: Adam keeps squares of gradients, and what is infinite there never learns again. All
    # ranks have the same gradients here, so all of them stop.
    if not bool(torch.isfinite(norm.square())):
        raise _diverged(
            step, f"the loss is {float(loss.detach()):.4g}, its gradient {norm:.4g}", rows
        )
    if params.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(weights, params.clip, norm)
    optimizer.step()
    for part in model.modules():
        if isinstance(part, Temperature):
            part.keep_in_bounds()
    return parts


def _diverged(step: int, problem: str, rows: NDArray[np.int64]) -> TeachonceError:
    """A step whose loss or gradient is NaN or Inf; no weight was changed by it."""
    named = f"{', '.join(map(str, rows[:16]))}{' …' if len(rows) > 16 else ''}"
    return TeachonceError(f"step {step}", f"{problem}; rows {named}", CURE)


def _poisoned(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """The first weight that is NaN or Inf somewhere, or whose averages in the optimizer are; or None."""
    for name, weight in model.named_parameters():
        kept = optimizer.state.get(weight, {})
        if not all(bool(torch.isfinite(value).all()) for value in (weight, *kept.values())):
            return name
    return None


def _check_weights(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Nothing may be judged or kept whose next step can only fail.

    Raises:
        TeachonceError: a weight is NaN or Inf; names it.
    """
    name = _poisoned(model, optimizer)
    if name is None:
        return
    if step == 0:
        cure = "make the model that training starts from anew: its weights are not whole"
        raise TeachonceError("step 0", f"{name} has NaN or Inf in it", cure)
    raise TeachonceError(f"step {step}", f"{name} has NaN or Inf in it after it", CURE)


def _add(state: State, parts: list[float]) -> None:
    state.loss_sums = [
        a + b for a, b in zip(state.loss_sums or [0.0] * len(parts), parts, strict=True)
    ]
    state.loss_steps += 1


def _evaluate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    work: Work,
    state: State,
    best: dict[str, Tensor],
    params: TrainingParams,
    total: int,
) -> dict[str, Tensor]:
    """Score the weights, add a row to the curve, and return the best weights so far."""
    _check_weights(model, optimizer, state.step)
    model.eval()
    score = ranks.of_first(work.score())
    if not math.isfinite(score):
        raise TeachonceError(
            f"step {state.step}",
            f"{work.score_name} is {score}: vectors have NaN or Inf in them",
            CURE,
        )
    # Before the first step there is a score and no loss yet.
    means = (
        [round(value / state.loss_steps, 8) for value in state.loss_sums]
        if state.loss_steps
        else [None] * len(work.parts)
    )
    state.loss_sums, state.loss_steps = [], 0
    state.curve.append(
        {
            "step": state.step,
            **{f"loss_{part}": mean for part, mean in zip(work.parts, means, strict=True)},
            work.score_name: round(score, 6),
            "learning_rate": learning_rate(max(state.step - 1, 0), total, params),
            **{note: round(value, 6) for note, value in work.notes().items()},
        }
    )
    losses = ", ".join(f"{mean:.5f}" for mean in means if mean is not None)
    log.info(
        "step %d: %s %.4f%s",
        state.step,
        work.score_name,
        score,
        f", loss {losses}" if losses else "",
    )
    if state.step == 0 and not work.start_counts:
        return best
    if state.best_score is None or score > state.best_score:
        state.best_score, state.best_step, state.stale = score, state.step, 0
        return {key: value.detach().clone() for key, value in model.state_dict().items()}
    state.stale += 1
    return best


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoints: Checkpoints, name: str
) -> tuple[State, dict[str, Tensor]]:
    found = checkpoints.load()
    if found is None:
        return State(), {key: value.detach().clone() for key, value in model.state_dict().items()}
    state, tensors = found
    model.load_state_dict(_part(tensors, "model/"))
    restore_optimizer(optimizer, tensors)
    best = _part(tensors, "best/")
    poisoned = _poisoned(model, optimizer) or next(
        (key for key, _ in model.named_parameters() if not bool(torch.isfinite(best[key]).all())),
        None,
    )
    if poisoned is not None:
        raise TeachonceError(
            checkpoints.folder,
            f"the checkpoint of step {state.step} has NaN or Inf in it, first in {poisoned}",
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
