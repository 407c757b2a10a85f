"""Log a training run to a dashboard: one that accelerate supports, or none.

accelerate and the dashboard's own package are imported only where one is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.learning import ranks
from stages.learning.checkpoints import Row
from storage import durable
from storage.errors import TeachonceError, shown

PROJECT = "teachonce"

Track = Callable[[Row], None]
"""Takes a row of a training's curve."""


@contextmanager
def tracking(setting: str, name: str, folder: Path) -> Iterator[Track]:
    """Open the dashboard, and close it at the end.

    Args:
        setting: `tracker` of params.yaml.
        name: Name of the student.
        folder: Folder for tensorboard and wandb; mlflow uses its own.

    Yields:
        A function that logs a row of the curve; it does nothing for `none`, and on all ranks but the first.

    Raises:
        TeachonceError: the dashboard's package or accelerate is not installed, or the dashboard fails to
            start.
    """
    if setting == "none" or not ranks.is_first():
        yield lambda _: None
        return
    tracker = _started(setting, name, folder)

    def track(row: Row) -> None:
        values = {key: value for key, value in row.items() if value is not None}
        with durable.named(folder, "writing"):
            tracker.log(values, step=values.pop("step"))

    try:
        yield track
    finally:
        with durable.named(folder, "writing"):
            tracker.finish()


def _started(setting: str, name: str, folder: Path) -> Any:  # noqa: ANN401 - accelerate has no types
    try:
        from accelerate import PartialState, tracking

        PartialState()  # their log asks it who is first
        match setting:
            case "tensorboard":
                tracker = tracking.TensorBoardTracker(name, logging_dir=folder)
            case "wandb":
                tracker = tracking.WandBTracker(PROJECT, name=name, dir=folder)
            case "mlflow":
                tracker = tracking.MLflowTracker(PROJECT, run_name=name)
        folder.mkdir(parents=True, exist_ok=True)
        tracker.start()
    except ImportError as error:
        raise TeachonceError(
            "tracker",
            f"{setting}: {shown(error)}",
            f"pip install 'teachonce[train]' {setting}, or tracker: none",
        ) from error
    # A dashboard that is not set up raises whatever its makers chose.
    except Exception as error:
        raise TeachonceError(
            "tracker",
            f"{setting} does not start: {shown(error)}",
            f"set {setting} up as its own documentation says, or tracker: none",
        ) from error
    return tracker
