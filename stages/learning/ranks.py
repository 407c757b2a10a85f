"""Several processes (ranks) that train one student, started by `torchrun` or `accelerate launch`.

Each rank encodes its part of a batch; then the vectors of all texts are gathered, so that every rank
computes the loss of the whole batch, also of objectives that compare a row with the others. Without
dropout the steps equal those of one process with the same batch, up to last bits; with dropout the masks
differ. Every rank reads the teacher's vectors from the store.

A process that was started alone is the only rank, and nothing here communicates.
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

TIMEOUT = timedelta(days=1)
"""Longest time that ranks wait for each other, which may tokenise a large corpus. If a rank dies, the
launcher ends the others."""


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
    # gloo beside NCCL, for small values on the CPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT
    )
    try:
        if is_first():
            log.info("training on %d ranks", count())
        else:
            log.setLevel(logging.WARNING)  # only the first rank logs progress
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Returns the number of this process's rank, 0 to `count() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Returns the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the rank that writes files and logs."""
    return rank() == 0


@contextmanager
def all_arrive() -> Iterator[None]:
    """Run the body, then wait until all ranks have run it, or failed in it."""
    try:
        yield
    finally:
        _barrier()


def gather_rows(sizes: NDArray[np.int64], compute: Callable[[NDArray[np.int64]], Tensor]) -> Tensor:
    """Compute rows on all ranks, and gather all of them on every rank.

    Args:
        sizes: (B,) int64 amount of work of each row, by which rows are dealt evenly.
        compute: (n,) places of rows -> (n, D) rows; n may be 1, and a place may come twice.

    Returns:
        (B, D) rows in the order of `sizes`. `average_gradients` is needed for the right gradient.
    """
    if count() == 1:
        return compute(np.arange(len(sizes)))
    order = np.argsort(-sizes, kind="stable")
    # Equal numbers for all ranks: if B is not divisible, the first rows are computed twice.
    dealt = np.resize(order, math.ceil(len(order) / count()) * count())
    rows_of_rank = compute(dealt[rank() :: count()])
    # Every rank computes the one loss from all vectors. Backward adds up the gradients of all ranks, which
    # are equal, and `average_gradients` takes the mean: the sum of the parts that the ranks' own rows have.
    gathered = all_gather(rows_of_rank.contiguous())  # type: ignore[no-untyped-call]
    rows = torch.stack(gathered, dim=1).flatten(0, 1)[: len(order)]
    return rows[torch.from_numpy(np.argsort(order)).to(rows.device)]


def average_gradients(model: nn.Module) -> None:
    """Replace each rank's gradients by the mean over all ranks."""
    if count() == 1:
        return
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat / count(), [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def broadcast_from_first(value: float) -> float:
    """Returns the first rank's value, so that a last bit does not make one rank stop and another go on."""
    if count() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(tensor, src=0)
    return float(tensor)


def check_same(state: str) -> None:
    """Check that all ranks are about to train the same: each has the same description of step and run.

    Raises:
        TeachonceError: another rank has another description.
    """
    states: list[Any] = [state] * count()
    if count() > 1:
        dist.all_gather_object(states, state)
    for number, state_of_rank in enumerate(states):
        if state_of_rank != states[0]:
            raise TeachonceError(
                f"rank {number}",
                f"is at {state_of_rank}, rank 0 at {states[0]}",
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


def _barrier() -> None:
    """Wait until all ranks have arrived."""
    if count() > 1:
        dist.all_reduce(torch.zeros(1))
