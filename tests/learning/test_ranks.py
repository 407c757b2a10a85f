"""Several ranks: the student of one process with the same batches, and one writer.

Real commands under torchrun, on the CPU.
"""

import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.learning import ranks
from stages.learning.loop import make_optimizer, take_step
from storage.errors import TeachonceError
from tests.processes import ADAPTER, COMMAND, HALF, SPECULATIVE, environment, furnish
from tests.stages.test_distill import recipe

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# Batches that two ranks cannot halve; similarities between students; a queue and a learned temperature.
MIXED = {
    "batch_size": 33,
    "learning_rate": 2e-3,
    "precision": "fp32",
    "evaluate_every": 4,
    "objectives": [
        {
            "name": "ckd",
            "weight": 1.0,
            "temperature": 0.3,
            "learnable_temperature": True,
            "queue": 64,
            "neighbours": 0,
        },
        {"name": "gram", "weight": 200.0, "temperature": None},
    ],
}
MIXES = MIXED | {
    "objectives": [
        *MIXED["objectives"],
        {"name": "mixes", "weight": 32.0, "centred": True, "rows": 33},
    ]
}
DROPPED = MIXED | {"dropout": True}
WARM = MIXED | {"pretrain": {"share": 0.5, "triplets": "mined"}}
SPECULATES = MIXED | {"objectives": [SPECULATIVE]}
ADAPTS = MIXED | {"objectives": [ADAPTER]}
STALE = MIXED | {"learning_rate": 1e-12, "patience": 2}
LABELLED = {
    "batch_size": 33,
    "learning_rate": 2e-3,
    "precision": "fp32",
    "evaluate_every": 3,
    "distill_weight": 4.0,
}


@dataclass
class Trained:
    """What a training command left.

    Args:
        printed: On stdout.
        logged: On stderr.
        written: Rank -> files that it gave their names, in order.
        curve: Column -> values.
        facts: Of the run.
        weights: By name.
    """

    printed: str
    logged: str
    written: dict[str, list[str]]
    curve: dict[str, np.ndarray]
    facts: dict[str, object]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("ranks")
    recipes = {
        "mixed": MIXED,
        "mixes": MIXES,
        "warm": WARM,
        "dropped": DROPPED,
        "stale": STALE,
        "speculative": SPECULATES,
        "adapter": ADAPTS,
    }
    furnish(root, tiny_model, recipes=recipes, finetune=LABELLED)
    return root


def launch(root, command, name, *, on, **how):
    """`teachonce COMMAND NAME` on so many ranks."""
    (root / "command.py").write_text(COMMAND)
    return subprocess.run(
        [sys.executable, *(TORCHRUN if on > 1 else []), "command.py", command, name],
        cwd=root,
        env=environment(**how),
        capture_output=True,
        text=True,
        timeout=120,
    )


def train(root, command, name, *, on):
    """The same, to its end."""
    log = root / f"written-{command}-{name}-{on}"
    log.mkdir(exist_ok=True)
    ended = launch(root, command, name, on=on, log=log)
    assert ended.returncode == 0, ended.stderr
    model = f"{name}-finetuned" if command == "finetune" else name
    lines = (root / f"reports/curves/{model}.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines))
    return Trained(
        printed=ended.stdout,
        logged=ended.stderr,
        written={path.name: path.read_text().splitlines() for path in log.iterdir()},
        curve={key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]},
        facts=json.loads((root / f"reports/training/{model}.json").read_text()),
        weights=load_file(root / f"models/{model}/model.safetensors"),
    )


def assert_same(one, two, *, start):
    """Equal up to last bits, which Adam blows up where a gradient is next to nothing.

    Which weights those are depends on the processor, so the distance of two students is compared with
    the way that each came from its start.
    """
    begun = load_file(start / "model.safetensors")
    assert list(one.curve) == list(two.curve)
    for name, values in one.curve.items():
        # Scores are of orders, in which near ties change places. The loss of a warm-up falls from 13.5 to
        # 1.5 in two steps, while last bits grow to 4e-5 of it, as measured.
        tolerance = 2e-3 if name in {"agreement", "dev"} else 1e-5
        share = 1e-4 if name == "loss_pretraining" else 1e-5
        assert np.allclose(values, two.curve[name], rtol=share, atol=tolerance, equal_nan=True), (
            name
        )
    assert list(one.weights) == list(two.weights)
    for name, values in one.weights.items():
        # Attention does not depend on its keys' bias: its gradient is nothing but last bits, which Adam
        # blows up.
        if not name.endswith("key.bias"):
            way = (values - begun[name]).norm()
            assert (values - two.weights[name]).norm() <= 1e-3 * way, (
                name,
                (values - two.weights[name]).norm() / way,
            )


def besides_tokens(written):
    """Files that are no token ids, of which each rank makes a share."""
    return [path for path in written if "/tokens/" not in path]


def assert_one_voice(two):
    """The first rank alone writes, each file once, and talks; token ids apart."""
    assert set(two.written) == {"0", "1"}
    assert besides_tokens(two.written["1"]) == []
    assert len(besides_tokens(two.written["0"])) > 10
    assert len(set(two.written["0"])) == len(two.written["0"])
    assert two.logged.count("training on 2 ranks") == 1
    assert two.logged.count("step 0: ") == 1
    assert two.printed.count("agreement with the teacher") + two.printed.count("; dev ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "mixes", "warm"])
def test_two_ranks_distil_the_student_of_one(root, name):
    two, one = (train(root, "distill", name, on=on) for on in (2, 1))
    assert_one_voice(two)
    assert len(one.curve["step"]) == 6
    assert abs(one.curve["temperature_ckd"][-1] - 0.3) > 1e-3
    assert_same(one, two, start=root / "models/start/half")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["speculative", "adapter"])
def test_two_ranks_distil_the_student_of_one_from_an_objective_with_a_state(root, recipe):
    two, one = (train(root, "distill", recipe, on=on) for on in (2, 1))
    assert_one_voice(two)
    note = {"speculative": "acceptance_speculative", "adapter": "drift_adapter"}[recipe]
    assert one.curve[note][-1] > 0
    assert_same(one, two, start=root / "models/start/half")


@pytest.mark.slow
def test_two_ranks_finetune_the_student_of_one(root):
    if not (root / "models/mixed").is_dir():
        train(root, "distill", "mixed", on=1)
    two, one = (train(root, "finetune", "mixed", on=on) for on in (2, 1))
    assert_one_voice(two)
    assert len(one.curve["step"]) == 5
    assert one.facts["best_step"] > 0
    assert_same(one, two, start=root / "models/mixed")


@pytest.mark.slow
def test_two_ranks_share_the_token_ids(tmp_path, tiny_model):
    furnish(tmp_path, tiny_model, recipes={"mixed": MIXED}, finetune=LABELLED)
    made = train(tmp_path, "distill", "mixed", on=2).written
    shares = [[path for path in made[rank] if "/tokens/" in path] for rank in "01"]
    assert abs(len(shares[0]) - len(shares[1])) <= 1
    assert not set(shares[0]) & set(shares[1])
    assert len(shares[0]) + len(shares[1]) == len(list(tmp_path.rglob("tokens/*/*.arrow"))) > 1


@pytest.mark.slow
def test_two_ranks_train_layers_that_share_weights_as_one_does(tmp_path, tiny_model):
    start = HALF | {"passes": 2}
    furnish(tmp_path, tiny_model, recipes={"mixed": MIXED}, finetune=LABELLED, start=start)
    for command in ("distill", "finetune"):
        two, one = (train(tmp_path, command, "mixed", on=on) for on in (2, 1))
        assert_one_voice(two)
        before = {"distill": "models/start/half", "finetune": "models/mixed"}[command]
        assert_same(one, two, start=tmp_path / before)
        for trained in (one, two):
            for name in ("query", "key"):
                path = "encoder.layer.{}.attention.self.{}.weight"
                own, other = (
                    path.format(0, name),
                    path.format(2, {"query": "key"}.get(name, "query")),
                )
                assert torch.equal(trained.weights[own], trained.weights[other])


@pytest.mark.slow
def test_two_ranks_stop_early_where_one_does(root):
    two, one = (train(root, "distill", "stale", on=on) for on in (2, 1))
    for trained in (one, two):
        assert (trained.facts["steps"], trained.facts["best_step"]) == (12, 4)
    assert besides_tokens(two.written["1"]) == []


@pytest.mark.slow
def test_two_ranks_that_are_killed_go_on_to_the_same_weights(root):
    """Dropout, too: each rank draws by (seed, step, rank)."""
    whole = train(root, "distill", "dropped", on=2)
    ended = launch(root, "distill", "dropped", on=2, log=root, die_at="9 step")
    assert ended.returncode == 1, ended.stderr
    again = train(root, "distill", "dropped", on=2)
    assert again.logged.count("dropped: going on at step 9") == 1
    for name, values in whole.weights.items():
        assert torch.equal(values, again.weights[name]), name


# What only several ranks can show, by a model small enough to look at.
PROBE = """
import json, sys
from stages.learning import ranks
from storage.errors import TeachonceError
from tests.learning.test_ranks import Toy, step

with ranks.joined("cpu"):
    first = ranks.is_first()
    toy = Toy()
    found = {"dropout": step(toy)}
    found["gradients"] = [weight.grad.tolist() for weight in toy.parameters()]
    toy.linear.weight.register_hook(lambda gradient: gradient if first else gradient * float("nan"))
    before = toy.linear.weight.tolist()
    try:
        step(toy)
    except TeachonceError as error:
        found["diverged"] = str(error)
    found["touched"] = toy.linear.weight.tolist() != before
    found["told"] = ranks.broadcast_from_first(0.1 if first else 0.2)
    ranks.check_same("one")
    try:
        ranks.check_same("one" if first else "two")
    except TeachonceError as error:
        found["refused"] = str(error)
    with open(f"{sys.argv[1]}/{ranks.rank()}", "w") as file:
        json.dump(found, file)
"""


class Toy(torch.nn.Module):
    """Three numbers to two, and a temperature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 2)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))


def loss_of(toy):
    """Each of five rows is compared with the others, by place."""
    device = toy.scale.device
    rows = torch.arange(15.0, device=device).reshape(5, 3).sin()
    vectors = ranks.gather_rows(np.array([3, 1, 4, 1, 5]), lambda places: toy.linear(rows[places]))
    similar = toy.scale * vectors @ vectors.T
    return (similar.logsumexp(dim=1) * torch.arange(1.0, 6.0, device=device)).sum()


def step(toy):
    """Take one; returns what a dropout would have drawn."""
    drawn = []

    def loss(rows, step):
        drawn.extend(torch.rand(3).tolist())
        return loss_of(toy), []

    params = recipe(clip=None)
    take_step(toy, make_optimizer(toy, params), SimpleNamespace(loss=loss), [], 0, 9, params)
    return drawn


@pytest.mark.slow
def test_gradients_of_two_ranks_are_those_of_one(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    ended = subprocess.run(
        [sys.executable, *TORCHRUN, "probe.py", str(tmp_path)],
        cwd=tmp_path,
        env=environment(log=tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    toy = Toy()
    drawn = step(toy)
    told = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert told[0]["dropout"] == drawn  # the first one's is that of one process
    assert not set(told[1]["dropout"]) & set(drawn)
    for rank, found in enumerate(told):
        for weight, gradient in zip(toy.parameters(), found["gradients"], strict=True):
            assert torch.allclose(weight.grad, torch.tensor(gradient), rtol=1e-6), rank
        # The gradient of one rank is NaN: both stop before they take the step.
        assert re.match(r"step 0: the loss is [\d.]+, its gradient nan; rows ", found["diverged"])
        assert not found["touched"]
        assert found["told"] == 0.1
        assert found["refused"] == (
            "rank 1: is at two, rank 0 at one\n"
            "  cure: let all ranks see the same work tree and store, then start them again"
        )


@pytest.mark.parametrize("setting", ["cuda:1", "mps"])
def test_a_device_that_ranks_cannot_share_is_refused(monkeypatch, setting):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(TeachonceError, match=f"^device: {setting}, for several ranks"),
        ranks.joined(setting),
    ):
        pass


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(TeachonceError, match=r"^device: rank 2 of this machine has no GPU"),
        ranks.joined("auto"),
    ):
        pass
