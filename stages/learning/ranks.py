"""Several processes that train one student, started by `torchrun` or `accelerate launch`.

Each rank reads its share of a batch's texts; then the vectors of all texts are gathered, so that every
rank has the loss of the whole batch, also of objectives that compare a row with the others. Without
dropout the steps are those of one process with the same batch, up to last bits; with it the masks are
others. The teacher's vectors come from the store, on every rank.

In a process that was not started so there is one rank, and nothing here communicates.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from stages.models.devices import pick_device
from stages.outcome import log
from storage.errors import TeachonceError

PATIENCE = timedelta(days=1)
"""How long ranks wait for the first one, which may have a big corpus to tokenize. The launcher ends the
others of a rank that died."""


@contextmanager
def joined(setting: str) -> Iterator[torch.device]:
    """Join the other ranks, if there are any, and leave them on the way out.

    Args:
        setting: `device` of params.yaml: auto, cpu, cuda; with one rank also cuda:1 and mps.

    Yields:
        Where this rank computes: CUDA devices are dealt out by the rank on its machine.

    Raises:
        TeachonceError: the device cannot be used, or not by several ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield pick_device(setting)
        return
    device = _device_of_rank(setting, int(os.environ["LOCAL_RANK"]))
    # gloo beside NCCL: what ranks tell each other besides vectors and gradients lies on the CPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE
    )
    try:
        if is_first():
            log.info("training on %d ranks", count())
        else:
            log.setLevel(logging.WARNING)  # what all would say, the first one says
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Which rank this process is, 0 to `count() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this rank is the one that writes files and talks."""
    return rank() == 0


@contextmanager
def first_alone() -> Iterator[None]:
    """The first rank goes through the body before the others, who find there what it left."""
    if not is_first():
        _wait()
    try:
        yield
    finally:
        if is_first():
            _wait()


def together(sizes: NDArray[np.int64], work: Callable[[NDArray[np.int64]], Tensor]) -> Tensor:
    """Make rows on all ranks, and give all of them to every rank.

    Args:
        sizes: (B,) how much work each row is; ranks get long and short ones alike.
        work: (n,) places of rows -> (n, D) these rows; n may be 1, and a place may come twice.

    Returns:
        (B, D) in the order of `sizes`. `average_gradients` makes the gradient right.
    """
    if count() == 1:
        return work(np.arange(len(sizes)))
    order = np.argsort(-sizes, kind="stable")
    # As many for each rank: where that does not come out even, the first rows are made twice.
    dealt = np.resize(order, math.ceil(len(order) / count()) * count())
    own = work(dealt[rank() :: count()])
    # Every rank computes the one loss from all vectors. Backward adds up the gradients of all ranks, which
    # are equal, and `average_gradients` takes the mean: the sum of the parts that the ranks' own rows have.
    gathered = all_gather(own.contiguous())  # type: ignore[no-untyped-call]
    rows = torch.stack(gathered, dim=1).flatten(0, 1)[: len(order)]
    return rows[torch.from_numpy(np.argsort(order)).to(rows.device)]


def average_gradients(model: nn.Module) -> None:
    """Give each rank the mean of all ranks' gradients."""
    if count() == 1:
        return
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat / count(), [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def of_first(value: float) -> float:
    """The first rank's value: a last bit must not make one rank stop and another go on."""
    if count() == 1:
        return value
    told = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(told, src=0)
    return float(told)


def check_same(what: str) -> None:
    """Ranks that would train different things must not begin.

    Args:
        what: What this rank is about to do.

    Raises:
        TeachonceError: another rank is about to do something else.
    """
    told: list[Any] = [what] * count()
    if count() > 1:
        dist.all_gather_object(told, what)
    for number, other in enumerate(told):
        if other != told[0]:
            raise TeachonceError(
                f"rank {number}",
                f"is at {other}, rank 0 at {told[0]}",
                "let all ranks see the same work tree and store, then start them again",
            )


def _device_of_rank(setting: str, local_rank: int) -> torch.device:
    if setting not in {"auto", "cpu", "cuda"}:
        raise TeachonceError(
            "device", f"{setting}, for several ranks", "set auto, cpu or cuda (one GPU for each)"
        )
    device = pick_device("cpu" if setting == "auto" and not torch.cuda.is_available() else setting)
    if device.type != "cuda":
        return device
    if local_rank >= torch.cuda.device_count():
        raise TeachonceError(
            "device",
            f"rank {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
            "start as many ranks as there are GPUs, or set device: cpu",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _wait() -> None:
    """Until all ranks are here."""
    if count() > 1:
        dist.all_reduce(torch.zeros(1))
