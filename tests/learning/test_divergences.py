"""Objectives of the related methods: each formula beside its slow definition, in double precision."""

import math
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

from stages.learning.adapter import Adapter
from stages.learning.batches import without_some
from stages.learning.objectives import (
    DISCO_TEMPERATURE,
    Candidates,
    MixedBatch,
    Objectives,
    adapter,
    ckd,
    comparative,
    decoupled,
    gram,
    kd,
    narrow,
    relational,
    skew,
)
from stages.models.lineage import SIMILARITIES_ONLY
from stages.params import (
    AdapterObjective,
    CkdObjective,
    ComparativeObjective,
    DecoupledObjective,
    DiscoCkdObjective,
    DiscoKdObjective,
    GramObjective,
    KdObjective,
    MixesObjective,
    Objective,
    RelationalObjective,
    SkewObjective,
    SpeculativeObjective,
)

# An odd number of rows: the easy half is not as large as the hard one.
ROWS, OTHERS, WIDTH = 7, 9, 8
TAU, TAU_T = 0.2, 0.3


def drawn(seed=0, scale=1.0):
    return scale * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def some_candidates(copies=True):
    """Vectors of 7 rows and 9 others; candidates 7 and 8 have the text of rows 0 and 3, row 1 that of 2."""
    generator = torch.Generator().manual_seed(5)
    vectors = torch.nn.functional.normalize(
        torch.randn(ROWS + OTHERS, WIDTH, generator=generator), dim=1
    )
    text = list(range(ROWS + OTHERS))
    if copies:
        text[7], text[8], text[1] = 0, 3, 2
    same = torch.tensor([[text[i] == text[j] for j in range(len(text))] for i in range(ROWS)])
    return Candidates(vectors, positives=torch.arange(ROWS), not_negative=same)


def of_batch(candidates):
    """The candidates of an objective that looks at the batch alone."""
    return Candidates(
        candidates.vectors[:ROWS],
        positives=candidates.positives,
        not_negative=candidates.not_negative[:, :ROWS],
    )


def cosine(a, b):
    a, b = [float(x) for x in a], [float(x) for x in b]
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def shares(vector, candidates, row, temperature):
    """Candidate -> its share, by the definition of a softmax; copies of the row's own text have none."""
    width = len(vector)
    counted = {
        j: math.exp(cosine(vector, candidates.vectors[j][:width]) / temperature)
        for j in range(len(candidates.vectors))
        if j == row or not candidates.not_negative[row, j]
    }
    return {j: value / sum(counted.values()) for j, value in counted.items()}


def both(student, candidates, row):
    p = shares(candidates.vectors[row], candidates, row, TAU_T)
    return p, shares(student[row], candidates, row, TAU)


def kl(p, q):
    return sum(p[j] * math.log(p[j] / q[j]) for j in p)


@pytest.mark.parametrize("width", [WIDTH, 3])
def test_relational_is_its_definition(width):
    student, candidates = drawn(scale=3.0)[:, :width], some_candidates()
    expected = np.mean([kl(*both(student, candidates, i)) for i in range(ROWS)])
    found = relational(student, candidates, temperature=TAU, teacher_temperature=TAU_T)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_relational_with_a_cold_teacher_is_ckd():
    """At tau_T = 0.005 all of P_T lies on the own key."""
    student, candidates = drawn(), some_candidates()
    cold = relational(student, candidates, temperature=TAU, teacher_temperature=0.005)
    assert float(cold) == pytest.approx(
        float(ckd(student, candidates, torch.tensor(1 / TAU))), rel=1e-5
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_skew_is_its_definition(reverse):
    student, candidates, alpha = drawn(), some_candidates(), 0.1
    expected = []
    for i in range(ROWS):
        p, q = both(student, candidates, i)
        if reverse:
            mixed = {j: (1 - alpha) * p[j] + alpha * q[j] for j in p}
            expected.append(kl(q, mixed))
        else:
            mixed = {j: alpha * p[j] + (1 - alpha) * q[j] for j in p}
            expected.append(kl(p, mixed))
    found = skew(
        student,
        candidates,
        temperature=TAU,
        teacher_temperature=TAU_T,
        alpha=alpha,
        reverse=reverse,
    )
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_skew_is_bounded_where_kl_is_not(reverse):
    """A student that points away from its teacher: KL is above 60, skew has come to log 10."""
    candidates = some_candidates(copies=False)
    student = -candidates.vectors[:ROWS]
    cold = {"temperature": 0.01, "teacher_temperature": 0.01}
    assert float(relational(student, candidates, **cold)) > 60
    assert float(skew(student, candidates, **cold, alpha=0.1, reverse=reverse)) == pytest.approx(
        math.log(10), rel=1e-3
    )


MOST_DRIFT = 0.05


def learned_adapter(scale, seed=2):
    """An adapter that has learned something: the larger, the further it would move."""
    moving = Adapter(WIDTH, rank=3, most_drift=MOST_DRIFT)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        moving.down.copy_(torch.randn(3, WIDTH, generator=generator))
        moving.up.copy_(scale * torch.randn(WIDTH, 3, generator=generator))
    return moving


def slow_adapted(moving, vector):
    """One vector, number by number: its residual less what lies along it, shortened to the cap."""
    length = math.sqrt(sum(x * x for x in vector))
    own = [x / length for x in vector]
    inner = [math.tanh(sum(a * x for a, x in zip(row, own, strict=True))) for row in moving.down]
    residual = [sum(b * y for b, y in zip(row, inner, strict=True)) for row in moving.up]
    along = sum(r * x for r, x in zip(residual, own, strict=True))
    across = [r - along * x for r, x in zip(residual, own, strict=True)]
    size = math.sqrt(sum(x * x for x in across))
    longest = math.tan(math.acos(1 - MOST_DRIFT))
    moved = [x + p * min(1, longest / size) for x, p in zip(own, across, strict=True)]
    total = math.sqrt(sum(x * x for x in moved))
    return [x / total for x in moved]


@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_an_adapted_vector_is_its_definition(scale):
    moving, vectors = learned_adapter(scale), drawn(scale=5.0)
    plain = Adapter(WIDTH, rank=3, most_drift=MOST_DRIFT).double()
    plain.load_state_dict({name: value.double() for name, value in moving.state_dict().items()})
    expected = [
        slow_adapted(
            SimpleNamespace(down=plain.down.tolist(), up=plain.up.tolist()), vector.tolist()
        )
        for vector in vectors.double()
    ]
    assert torch.allclose(moving(vectors), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.1, 1.0, 1e4, 1e15])
def test_no_vector_drifts_further_than_the_cap(scale):
    """Of a thousand vectors of any length; far-reaching adapters push many of them against the cap."""
    vectors = 7 * torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(1))
    moving = learned_adapter(scale).requires_grad_(False)
    drifts = 1 - torch.nn.functional.cosine_similarity(moving(vectors), vectors, dim=1)
    assert float(drifts.max()) <= MOST_DRIFT + 1e-6
    assert float(moving(vectors).norm(dim=1).max()) == pytest.approx(1, abs=1e-6)
    assert moving.drift(vectors) == pytest.approx(float(drifts.mean().clamp(min=0)), abs=1e-6)
    if scale >= 1:
        assert float((drifts > MOST_DRIFT - 1e-5).float().mean()) > 0.8
    elif scale == 0.01:
        assert 0 < moving.drift(vectors) < 0.1 * MOST_DRIFT


@pytest.mark.parametrize("width", [WIDTH, 3])
def test_adapter_is_its_definition(width):
    student, candidates, anchor, beta = drawn()[:, :width], some_candidates(), 0.7, 0.3
    adapted = learned_adapter(0.1)(candidates.vectors[:ROWS]).detach()
    found = adapter(
        student,
        candidates,
        adapted,
        temperature=TAU,
        teacher_temperature=TAU_T,
        anchor=anchor,
        beta=beta,
    )
    expected = []
    for i in range(ROWS):
        p, q = shares(adapted[i], candidates, i, TAU_T), shares(student[i], candidates, i, TAU)
        expected.append(
            (1 + beta) * kl(p, q) + anchor * (1 - cosine(adapted[i], candidates.vectors[i]))
        )
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_student_and_the_adapter_learn_from_their_own_terms():
    """The student's gradient is that of the first term alone, the adapter's that of the others."""
    candidates = some_candidates()
    adapted = learned_adapter(0.1)(candidates.vectors[:ROWS]).detach()
    temperatures = {"temperature": TAU, "teacher_temperature": TAU_T}

    def gradients(anchor, beta):
        student, moved = drawn().requires_grad_(), adapted.clone().requires_grad_()
        adapter(student, candidates, moved, **temperatures, anchor=anchor, beta=beta).backward()
        return student.grad, moved.grad

    alone, nothing = gradients(0.0, 0.0)
    assert nothing is None or float(nothing.abs().max()) == 0
    ours, theirs = gradients(2.0, 0.5)
    assert torch.allclose(ours, alone, atol=1e-7)
    assert float(alone.abs().max()) > 1e-3
    anchored, towards = gradients(2.0, 0.0)[1], gradients(0.0, 0.5)[1]
    assert torch.allclose(theirs, anchored + towards, atol=1e-6)
    assert float(anchored.abs().max()) > 1e-3
    assert float(towards.abs().max()) > 1e-3


def test_an_adapter_begins_at_the_teacher_and_learns_from_there():
    candidates = some_candidates()
    objectives = Objectives([params_of("adapter")], dim=WIDTH)
    teacher = 2 * candidates.vectors[:ROWS]
    assert objectives.notes(teacher) == {"drift_adapter": pytest.approx(0, abs=1e-6)}
    loss, _ = objectives({0.0: drawn()}, teacher, [candidates])
    plain = relational(drawn(), candidates, temperature=TAU, teacher_temperature=TAU_T)
    assert float(loss.detach()) == pytest.approx(1.5 * float(plain), rel=1e-5)
    loss.backward()
    assert float(objectives.learned["0"].up.grad.abs().max()) > 1e-4


def test_speculative_is_skew_among_its_candidates():
    student, candidates = drawn(), some_candidates()
    objectives, teacher = Objectives([params_of("speculative")]), candidates.vectors[:ROWS]
    loss, _ = objectives({0.0: student}, teacher, [candidates])
    expected = skew(
        student,
        candidates,
        temperature=TAU,
        teacher_temperature=TAU_T,
        alpha=0.1,
        reverse=False,
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def slow_decoupled(student, candidates, alpha):
    """Sums over the shares themselves: own against all others, and the others among themselves."""
    rows = []
    for i in range(ROWS):
        p, q = both(student, candidates, i)
        pt, qt = p.pop(i), q.pop(i)
        target = pt * math.log(pt / qt) + (1 - pt) * math.log((1 - pt) / (1 - qt))
        rest = kl(
            {j: value / (1 - pt) for j, value in p.items()},
            {j: value / (1 - qt) for j, value in q.items()},
        )
        rows.append((1 - pt, target, rest))
    rows.sort()
    easy, hard = rows[: (ROWS + 1) // 2], rows[(ROWS + 1) // 2 :]
    return alpha * np.mean([rest for _, _, rest in easy]) + (1 - alpha) * np.mean(
        [target + rest for _, target, rest in hard]
    )


@pytest.mark.parametrize("alpha", [0.2, 0.0, 1.0])
def test_decoupled_is_its_definition(alpha):
    student, candidates = drawn(), some_candidates()
    found = decoupled(student, candidates, temperature=TAU, teacher_temperature=TAU_T, alpha=alpha)
    assert float(found) == pytest.approx(slow_decoupled(student, candidates, alpha), rel=1e-5)


def test_decoupled_where_all_rows_are_equally_hard_has_no_hard_half():
    candidates = Candidates(
        torch.eye(4), positives=torch.arange(2), not_negative=torch.eye(4, dtype=torch.bool)[:2]
    )
    student = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    found = decoupled(student, candidates, temperature=1.0, teacher_temperature=1.0, alpha=0.5)
    assert torch.isfinite(found)


@pytest.mark.parametrize("width", [WIDTH, 3])
def test_comparative_is_its_definition(width):
    """Pairs of other texts, one at a time; rows 1 and 2 have one text, so they are no pair."""
    student, candidates = drawn(scale=4.0)[:, :width], of_batch(some_candidates())
    teacher = torch.nn.functional.normalize(candidates.vectors[:, :width], dim=1)
    ours = torch.nn.functional.normalize(student, dim=1)
    found = [
        1 - cosine(ours[i] - ours[j], teacher[i] - teacher[j])
        for i in range(ROWS)
        for j in range(ROWS)
        if i != j and {i, j} != {1, 2}
    ]
    assert len(found) == 40
    assert float(comparative(student, candidates)) == pytest.approx(np.mean(found), rel=1e-4)


def test_comparative_does_not_see_an_offset_that_all_differences_lose():
    candidates = of_batch(some_candidates(copies=False))
    assert float(comparative(candidates.vectors, candidates)) == pytest.approx(0, abs=1e-5)
    assert float(comparative(-candidates.vectors, candidates)) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("width", [WIDTH, 3])
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_gram_is_its_definition(width, temperature):
    student, candidates = drawn(scale=0.1)[:, :width], of_batch(some_candidates(copies=False))
    teacher = candidates.vectors
    if temperature is None:
        expected = np.mean(
            [
                (cosine(student[i], student[j]) - cosine(teacher[i], teacher[j])) ** 2
                for i in range(ROWS)
                for j in range(ROWS)
                if i != j
            ]
        )
    else:

        def row(vectors, i):
            counted = {
                j: math.exp(cosine(vectors[i], vectors[j]) / temperature)
                for j in range(ROWS)
                if j != i
            }
            return {j: value / sum(counted.values()) for j, value in counted.items()}

        expected = temperature**2 * np.mean(
            [kl(row(teacher, i), row(student, i)) for i in range(ROWS)]
        )
    found = gram(student, candidates, temperature=temperature)
    assert float(found) == pytest.approx(expected, rel=1e-4)


WITHOUT_CANDIDATES = {"kd", "disco_kd"}
OF_THE_BATCH = {"comparative", "gram"}  # they look at no other rows
PARAMS = [
    KdObjective(name="kd", weight=1.0, centred=False),
    CkdObjective(
        name="ckd", weight=1.0, temperature=TAU, learnable_temperature=True, queue=1, neighbours=0
    ),
    DiscoCkdObjective(name="disco_ckd", weight=1.0, queue=1),
    RelationalObjective(
        name="relational",
        weight=1.0,
        temperature=TAU,
        teacher_temperature=TAU_T,
        queue=1,
        neighbours=0,
        deleted_tokens=0.1,
    ),
    SkewObjective(
        name="skew",
        weight=1.0,
        temperature=TAU,
        teacher_temperature=TAU_T,
        queue=1,
        neighbours=0,
        alpha=0.1,
        reverse=True,
    ),
    DecoupledObjective(
        name="decoupled",
        weight=1.0,
        temperature=TAU,
        teacher_temperature=TAU_T,
        queue=1,
        neighbours=0,
        alpha=0.2,
    ),
    ComparativeObjective(name="comparative", weight=1.0),
    GramObjective(name="gram", weight=1.0, temperature=None),
    DiscoKdObjective(name="disco_kd", weight=1.0),
    MixesObjective(name="mixes", weight=1.0, centred=False, rows=2),
    SpeculativeObjective(
        name="speculative",
        weight=1.0,
        temperature=TAU,
        teacher_temperature=TAU_T,
        queue=1,
        neighbours=1,
        alpha=0.1,
        proposals=1,
        pool=1,
        refresh_every=1,
        threshold=0.0,
    ),
    AdapterObjective(
        name="adapter",
        weight=1.0,
        temperature=TAU,
        teacher_temperature=TAU_T,
        queue=1,
        neighbours=0,
        rank=2,
        anchor=1.0,
        beta=0.5,
        most_drift=0.01,
    ),
]


def params_of(name):
    """The entry of an objective."""
    (params,) = (params for params in PARAMS if params.name == name)
    return params


def test_each_objective_of_the_settings_is_taught_below():
    union = get_args(get_args(Objective)[0])
    assert {type(params) for params in PARAMS} == set(union)


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: params.name)
def test_every_objective_teaches_vectors_to_become_the_teachers(params):
    """Free vectors under each objective alone come to the teacher's."""
    candidates = some_candidates()
    if params.name in OF_THE_BATCH:
        candidates = of_batch(candidates)
    elif params.name not in WITHOUT_CANDIDATES:
        # At equal temperatures the teacher's own vectors are the best there is.
        params = params.model_copy(update={"teacher_temperature": TAU})
    teacher = candidates.vectors[:ROWS]
    given = None if params.name in WITHOUT_CANDIDATES else candidates
    objectives = Objectives([params], dim=WIDTH)
    vectors = drawn(seed=3).requires_grad_()
    if params.name == "mixes":
        given = MixedBatch(vectors, teacher)
    adam = torch.optim.Adam([vectors], lr=0.05)
    before, _ = objectives({params.deleted: vectors}, teacher, [given])
    for _ in range(400):
        adam.zero_grad()
        loss, _ = objectives({params.deleted: vectors}, teacher, [given])
        loss.backward()
        adam.step()
    ours = torch.nn.functional.normalize(vectors.detach(), dim=1)
    assert float(loss.detach()) < 0.6 * float(before.detach())
    if params.name == "gram":  # it knows similarities alone, and any rotation has the same
        pairs = ~candidates.not_negative
        assert torch.allclose((ours @ ours.T)[pairs], (teacher @ teacher.T)[pairs], atol=0.05)
    else:
        # Each row is nearest to its own text: rows 1 and 2 have the same.
        nearest = (ours @ teacher.T).argmax(dim=1)
        assert all(candidates.not_negative[row, found] for row, found in enumerate(nearest))


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: params.name)
def test_those_that_a_rotation_leaves_alone_are_named(params):
    """Their students may leave the teacher's space; of all others it is said that they stay there."""
    candidates = some_candidates()
    if params.name in OF_THE_BATCH:
        candidates = of_batch(candidates)
    teacher = candidates.vectors[:ROWS]
    given = None if params.name in WITHOUT_CANDIDATES else candidates
    objectives = Objectives([params], dim=WIDTH)
    rotation, _ = torch.linalg.qr(drawn(seed=4).T @ drawn(seed=4) + torch.eye(WIDTH))
    ours, rotated = (
        float(
            objectives(
                {params.deleted: vectors},
                teacher,
                [MixedBatch(vectors, teacher) if params.name == "mixes" else given],
            )[0].detach()
        )
        for vectors in (drawn(seed=3), drawn(seed=3) @ rotation)
    )
    assert (ours == pytest.approx(rotated, rel=1e-4)) == (params.name in SIMILARITIES_ONLY)


def test_disco_ckd_begins_at_a_scale_of_e_and_learns_it():
    objectives = Objectives([DiscoCkdObjective(name="disco_ckd", weight=1.0, queue=1)])
    (log_scale,) = objectives.parameters()
    assert float(log_scale.detach()) == pytest.approx(1.0)
    assert log_scale.requires_grad
    candidates = some_candidates()
    loss, parts = objectives({0.0: drawn()}, candidates.vectors[:ROWS], [candidates])
    assert parts == [pytest.approx(float(ckd(drawn(), candidates, torch.tensor(math.e))))]
    assert objectives.notes(drawn()) == {"temperature_disco_ckd": pytest.approx(DISCO_TEMPERATURE)}
    loss.backward()
    assert float(log_scale.grad) != 0


def test_narrow_keeps_the_first_values_and_the_length_of_the_whole():
    vectors = torch.tensor([[3.0, 4.0, 12.0], [0.0, 5.0, 0.0]])
    assert torch.allclose(narrow(vectors, 2), torch.tensor([[7.8, 10.4], [0.0, 5.0]]))
    assert narrow(vectors, 3) is vectors


def test_the_loss_of_several_widths_is_their_mean_and_the_curve_shows_the_whole_one():
    student, candidates = drawn(scale=2.0), some_candidates()
    teacher = candidates.vectors[:ROWS]
    objectives = Objectives([params_of("kd"), params_of("skew")], widths=[4, 2])
    total, parts = objectives({0.0: student}, teacher, [None, candidates])
    expected = []
    for width in (WIDTH, 4, 2):
        cut = narrow(student, width)
        expected.append(
            float(kd(cut, teacher))
            + float(
                skew(
                    cut,
                    candidates,
                    temperature=TAU,
                    teacher_temperature=TAU_T,
                    alpha=0.1,
                    reverse=True,
                )
            )
        )
    assert float(total) == pytest.approx(np.mean(expected), rel=1e-5)
    assert sum(parts) == pytest.approx(expected[0], rel=1e-5)


def test_each_objective_reads_the_text_that_it_asks_for():
    clean, cut = drawn(1), drawn(2)
    candidates = some_candidates()
    params = [
        params_of("relational").model_copy(update={"deleted_tokens": share}) for share in (0.0, 0.1)
    ]
    _, parts = Objectives(params)(
        {0.0: clean, 0.1: cut}, candidates.vectors[:ROWS], [candidates, candidates]
    )
    assert parts == [
        pytest.approx(
            float(relational(vectors, candidates, temperature=TAU, teacher_temperature=TAU_T))
        )
        for vectors in (clean, cut)
    ]


def test_a_share_of_the_tokens_is_deleted_but_not_the_first_and_the_last():
    tokens = np.arange(10_000, dtype=np.int32)
    left = without_some(tokens, 0.1, np.random.default_rng(0))
    assert 8_800 < len(left) < 9_200
    assert (np.diff(left) > 0).all()
    assert (left[0], left[-1]) == (0, 9_999)
    assert without_some(tokens[:2], 0.99, np.random.default_rng(0)).tolist() == [0, 1]
    again = without_some(tokens, 0.1, np.random.default_rng(0))
    assert np.array_equal(left, again)
