"""Checkpoints of a training run, from which a killed run resumes.

One file holds everything: weights, best weights, optimiser and the state of the run. Its sha256 is in its
name, because safetensors does not detect a flipped bit. The last two checkpoints are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from stages.outcome import log
from storage import durable, regular
from storage.regular import IrregularError

NAME = re.compile(r"step-(\d{9})-([0-9a-f]{64})\.safetensors")
KEPT = 2

Row = dict[str, float | int | None]


@dataclass
class State:
    """The state of a run besides its tensors."""

    step: int = 0  # number of steps done
    best_score: float | None = None  # the highest score so far; None before the first evaluation
    best_step: int = 0  # the step of the highest score
    stale: int = 0  # number of evaluations since then
    curve: list[Row] = field(default_factory=list)  # one row for each evaluation
    # Sum of each objective's loss since the last evaluation.
    loss_sums: list[float] = field(default_factory=list)
    loss_steps: int = 0  # number of steps in these sums
    # For each objective, in how many of these steps it had no loss.
    loss_absent: list[int] = field(default_factory=list)
    seconds: float = 0.0  # seconds of steps and evaluations, over all starts of the run


class Checkpoints:
    """The checkpoints of one run, in a folder named by its fingerprint, so that runs never share one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint and drop all but the last two."""
        content = save(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
            metadata={"state": json.dumps(asdict(state))},
        )
        name = f"step-{state.step:09}-{hashlib.sha256(content).hexdigest()}.safetensors"
        durable.replace(self.folder / name, content)
        for path in self._newest_first()[KEPT:]:
            path.unlink(missing_ok=True)

    def load(self) -> tuple[State, dict[str, Tensor]] | None:
        """Returns the newest intact checkpoint, or None; logs and skips damaged ones.

        One that was deleted meanwhile is skipped, too: a process that outlived `dvc repro` may train the
        same student.
        """
        for path in self._newest_first():
            try:
                with regular.opened(path) as file:
                    content = file.read()
            except FileNotFoundError:
                continue
            except IrregularError as error:
                log.warning("going back to the checkpoint before it: %s", error)
                continue
            match = NAME.fullmatch(path.name)
            if match is None or hashlib.sha256(content).hexdigest() != match[2]:
                log.warning("%s: damaged, going back to the checkpoint before it", path)
                continue
            # The metadata of a safetensors file is JSON behind an eight-byte length.
            length = int.from_bytes(content[:8], "little")
            state = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["state"])
            return State(**state), load(content)
        return None

    def delete(self) -> None:
        """Remove the folder: the run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        """Returns the paths of all checkpoints, the newest first."""
        try:
            files = list(self.folder.iterdir())
        except FileNotFoundError:
            return []
        return sorted((path for path in files if NAME.fullmatch(path.name)), reverse=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors."""
    return {
        f"optimizer/{place}/{name}": value
        for place, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undo `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, place, field_name = name.split("/")
            state.setdefault(int(place), {})[field_name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
