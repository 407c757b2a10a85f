"""Where a training's curve goes while it grows."""

import sys

import pytest

from stages.learning.trackers import tracking
from storage.errors import TeachonceError

ROWS = [
    {"step": 0, "loss_kd": None, "agreement": 0.25, "learning_rate": 0.001},
    {"step": 10, "loss_kd": 0.5, "agreement": 0.75, "learning_rate": 0.002},
]


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with (
        pytest.raises(TeachonceError) as error,
        tracking("wandb", "kd", tmp_path / "tracking"),
    ):
        pass
    assert str(error.value) == (
        "tracker: wandb: import of accelerate halted; None in sys.modules\n"
        "  cure: pip install 'teachonce[train]' wandb, or tracker: none"
    )
    assert not (tmp_path / "tracking").exists()
    with tracking("none", "kd", tmp_path / "tracking") as track:
        track(ROWS[0])
    assert not (tmp_path / "tracking").exists()


@pytest.mark.slow  # tensorboard comes with the extras of the slow tests
@pytest.mark.filterwarnings("default")  # other people's
def test_tensorboard_shows_each_column_by_step(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as accumulators

    with tracking("tensorboard", "kd", tmp_path / "tracking") as track:
        for row in ROWS:
            track(row)
    found = accumulators.EventAccumulator(str(tmp_path / "tracking/kd"))
    found.Reload()
    shown = {
        name: [(event.step, round(event.value, 6)) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }
    assert shown == {
        "loss_kd": [(10, 0.5)],
        "agreement": [(0, 0.25), (10, 0.75)],
        "learning_rate": [(0, 0.001), (10, 0.002)],
    }
