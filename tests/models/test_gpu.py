"""The same on a GPU: what each stage computes there is what it computes on the CPU, within float32.

Run them with `pytest -m gpu`. Where there is no GPU they are skipped, each with a sentence: this is the one
file whose tests may be.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from stages import distill
from stages.learning.student import Student, encode_ids
from stages.mining.self_join import SelfJoin
from stages.models.encoder import Encoder, PaddedReader
from stages.models.loading import load_model
from stages.models.packed import PackedReader
from stages.vectors import row_cosines
from storage.caches import Caches
from storage.embeddings import Embeddings
from tests.conftest import sentences
from tests.learning.test_ranks import TORCHRUN, Toy, step
from tests.mining.test_self_join import check_lists, clustered
from tests.processes import environment
from tests.stages.test_distill import CKD, World, recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU: PyTorch finds no CUDA device here"
    ),
]


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_embed_on_a_gpu_stores_the_vectors_of_the_cpu(place, tiny_model, precision, near):
    texts = sentences(300)
    corpus = place.corpus(texts)
    teacher = Encoder(tiny_model, device=GPU, max_tokens=16, precision=precision)
    place.embed(corpus, teacher.encode_counted)
    stored = Embeddings(place.store, place.embeddings, corpus).rows_of(np.arange(300))
    expected = Encoder(tiny_model, device=CPU, max_tokens=16).encode(texts)
    assert np.abs(stored - expected).max() < near
    assert row_cosines(stored, expected).min() > 1 - near


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_gpu_reads_texts_end_to_end_as_it_reads_them_padded(tiny_model, precision, near):
    texts = sentences(200)
    encoder = Encoder(tiny_model, device=GPU, max_tokens=16, precision=precision)
    assert type(encoder.reader) is PackedReader
    packed = encoder.encode(texts)
    encoder.reader = PaddedReader(encoder.model)
    assert np.abs(encoder.encode(texts) - packed).max() < near


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-4), ("bf16", 5e-2)])
def test_a_student_on_a_gpu_has_the_gradients_of_the_cpu(tiny_model, packs, precision, near):
    rows = [np.array([2, *range(5, 5 + n), 3], np.int32) for n in (9, 1, 8, 4, 14, 0, 7)]
    gradients = []
    for device, kind in ((CPU, "fp32"), (GPU, precision)):
        torch.manual_seed(0)
        model = load_model(tiny_model, device=device)
        student = Student(model, teacher_dim=32, unit_length=True, project=True, dropout=False)
        student.to(device)
        if not packs:
            student.packed = None
        made = encode_ids(
            student, rows, pad_id=0, device=device, precision=kind, gradient_caching=False
        )
        made[:, :3].sum().backward()
        gradients.append(
            torch.cat([w.grad.flatten().cpu() for w in student.parameters() if w.grad is not None])
        )
    assert torch.norm(gradients[0] - gradients[1]) < near * torch.norm(gradients[0])


KD = [{"name": "kd", "weight": 1.0, "centred": False}]


@pytest.mark.parametrize("objectives", [KD, CKD])
def test_distill_on_a_gpu_ends_near_the_student_of_the_cpu(place, tiny_model, objectives, tmp_path):
    world = World(place, tiny_model, tiny_model)
    caches = Caches(world.corpus, world.embeddings, None, world.split, place.store)
    params = recipe(objectives=objectives, epochs=1)
    losses = []
    for device in (CPU, GPU):
        work = distill.prepare(params, start=world.start, caches=caches, device=device).setup()
        losses.append(float(work.loss(world.split.train_rows(world.corpus)[:16], 0)[0].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-6)
    agreements = [
        distill.run(
            params,
            name=device.type,
            start=world.start,
            caches=caches,
            device=device,
            work=tmp_path / "work",
            out=tmp_path / device.type,
            curve=tmp_path / f"{device.type}.csv",
            training=tmp_path / f"{device.type}.json",
            track=lambda row: None,
        ).facts["agreement"]
        for device in (CPU, GPU)
    ]
    assert agreements[0] == pytest.approx(agreements[1], abs=0.02)


@pytest.mark.parametrize("product", [torch.bfloat16, torch.float32])
def test_a_self_join_on_a_gpu_finds_the_lists_of_every_pair(product):
    """1,024 numbers a row: sums that were rounded on their way would leave the margin."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision
    matmul.fp32_precision = "tf32"  # as a program around this one may have set it
    try:
        for count, dim, tile in ((333, 24, 64), (3000, 1024, 1024)):
            vectors = clustered(count, dim)
            join = SelfJoin(
                lambda rows, vectors=vectors: vectors[rows],
                count,
                9,
                device=GPU,
                product=product,
                tile=tile,
            )
            assert sum(1 for _ in join.run()) == join.steps
            check_lists(join, vectors, 9)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before[1]
    assert matmul.allow_bf16_reduced_precision_reduction == before[0]


PROBE = """
import json, sys
from stages.learning import ranks
from tests.learning.test_ranks import Toy, step

with ranks.joined("cuda") as device:
    toy = Toy().to(device)
    step(toy)
    found = {"gradients": [weight.grad.tolist() for weight in toy.parameters()], "on": str(device)}
    found["told"] = ranks.broadcast_from_first(0.1 if ranks.is_first() else 0.2)
    with open(f"{sys.argv[1]}/{ranks.rank()}", "w") as file:
        json.dump(found, file)
"""


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs: each rank of NCCL has one of its own"
)
def test_gradients_of_two_ranks_over_nccl_are_those_of_one_process(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    ended = subprocess.run(
        [sys.executable, *TORCHRUN, "probe.py", str(tmp_path)],
        cwd=tmp_path,
        env=environment(log=tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    toy = Toy()
    step(toy)
    for rank in "01":
        found = json.loads((tmp_path / rank).read_text())
        assert found["on"] == f"cuda:{rank}"
        assert found["told"] == 0.1
        for weight, gradient in zip(toy.parameters(), found["gradients"], strict=True):
            assert torch.allclose(weight.grad, torch.tensor(gradient), rtol=1e-5), rank
