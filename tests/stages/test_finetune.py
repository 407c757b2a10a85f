"""Labelled rows: what is read and what is refused, what the loss is, and what a student makes of them."""

import gzip
import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard
from pyarrow import parquet

from stages import finetune
from stages.finetune import FinetuneTask, Rehearsal, positives_mask
from stages.learning.batches import some_rows
from stages.learning.judges import (
    MOST_TEXTS,
    Labels,
    StsJudge,
    TripletJudge,
    judging_rows,
    positives_by_anchor,
)
from stages.learning.student import PIECE_TOKENS, Student, encode_ids
from stages.models.encoder import Encoder
from stages.models.loading import load_model
from stages.params import FinetuneParams
from stages.reading.evaluation_sets import StsSet
from stages.reading.triplets import RULES, Triplet, read_triplets, triplet_files
from storage.caches import Caches
from storage.corpus import text_key
from storage.embeddings import Embeddings
from storage.errors import MissingError, TeachonceError
from storage.split import Split
from tests.conftest import HashTeacher, make_tiny_model, sentences
from tests.stages.test_distill import power_cut

CPU = torch.device("cpu")
torch.set_num_threads(1)
PLAIN = {"pad_id": 0, "precision": "fp32", "gradient_caching": False}
FIELDS = ("anchor", "positive", "negative")


def settings(**changes):
    return FinetuneParams.model_validate(
        {
            "students": ["kd"],
            "triplets": ["rows.jsonl"],
            "fields": FIELDS,
            "temperature": 0.05,
            "learnable_temperature": True,
            "dev": None,
            "heldout": 0.1,
            "distill_weight": 0.0,
            "distill_rows": 8,
            "epochs": 3,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "warmup": 0.1,
            "weight_decay": 0.0,
            "clip": 1.0,
            "dropout": False,
            "max_tokens": 16,
            "precision": "fp32",
            "gradient_caching": False,
            "evaluate_every": 10,
            "patience": 50,
            "seed": 0,
        }
        | changes
    )


# ----------------------------------------------------------------------------------------------- reading


ROWS = [
    Triplet("a cat", "a kitten", ("a dog",)),
    Triplet("two boats", "some ships"),
    Triplet("Zürich\u2028by night", "a city", ("a village",)),
]


def as_record(row):
    """Of a row with one negative or none."""
    return dict(zip(FIELDS, (*row.texts, None), strict=False))


def json_lines(rows):
    return "".join(json.dumps(as_record(row)) + "\n" for row in rows).encode()


def tab_lines(rows):
    return "".join("\t".join(row.texts) + "\r\n" for row in rows).encode()


def write_parquet(path, rows):
    parquet.write_table(pa.Table.from_pylist([as_record(row) for row in rows]), path)


def test_every_format_gives_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(ROWS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS)))
    (tmp_path / "c.tsv").write_bytes(tab_lines(ROWS))
    (tmp_path / "d.tsv.zst").write_bytes(zstandard.compress(tab_lines(ROWS)))
    write_parquet(tmp_path / "e.parquet", ROWS)
    files = triplet_files(["*.jsonl", "*.gz", "c.tsv", "*.zst", "e.parquet"], tmp_path)
    assert [file.name[0] for file in files] == list("abcde")
    for file in files:
        assert read_triplets([file], FIELDS, ()) == (ROWS, dict.fromkeys(RULES, 0)), file


def test_other_names_of_fields(tmp_path):
    rows = [{"sent0": "x y", "sent1": "x z", "hard_neg": "q"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    found, _ = read_triplets([tmp_path / "rows.jsonl"], ("sent0", "sent1", "hard_neg"), ())
    assert found == [Triplet("x y", "x z", ("q",))]


def test_bad_rows_are_counted_by_the_first_rule_that_they_break(tmp_path):
    lines = [
        b'{"anchor": "one", "positive": "two", "negative": "three"}',  # the only right one
        b'{"anchor": "\xff", "positive": "two"}',  # undecodable
        b'{"anchor": "\\ud800", "positive": "two"}',  # undecodable: half a surrogate pair
        b'{"anchor": "one", ',  # malformed
        b'"one"',  # malformed
        b'{"anchor": 1, "positive": "two"}',  # malformed
        b'{"anchor": "one", "positive": "two", "negative": 3}',  # malformed
        b'{"anchor": "one"}',  # missing
        b'{"anchor": null, "positive": "two"}',  # missing
        b'{"anchor": "N\\u0000L", "positive": "two"}',  # control characters
        b'{"anchor": "one", "positive": "two", "negative": "\\u001b[1m"}',  # control characters
        b'{"anchor": "one", "positive": "  "}',  # empty
        b'{"anchor": "one", "positive": "one "}',  # contradictory
        b'{"anchor": "one", "positive": "two", "negative": "two"}',  # contradictory
        b'{"anchor": " one", "positive": "two", "negative": "three"}',  # duplicate
        b'{"anchor": "seen", "positive": "two"}',  # in evaluation
        b'{"anchor": "one", "positive": "two", "negative": "seen"}',  # in evaluation
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    found, rejected = read_triplets([tmp_path / "rows.jsonl"], FIELDS, {text_key("seen")})
    assert found == [Triplet("one", "two", ("three",))]
    assert rejected == {
        "undecodable": 2,
        "malformed": 4,
        "missing": 2,
        "control_characters": 2,
        "empty": 1,
        "contradictory": 2,
        "duplicate": 1,
        "in_evaluation": 2,
    }
    assert len(found) + rejected.total() == len(lines)


def test_nulls_of_a_column_are_missing_and_no_negative(tmp_path):
    table = {"anchor": ["a", None, "c"], "positive": ["b", "b", None], "negative": [None, "x", "x"]}
    parquet.write_table(pa.table(table), tmp_path / "rows.parquet")
    found, rejected = read_triplets([tmp_path / "rows.parquet"], FIELDS, ())
    assert (found, rejected["missing"]) == ([Triplet("a", "b")], 2)


def test_a_file_without_the_fields_is_an_error_that_names_the_setting(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    with pytest.raises(TeachonceError) as error:
        read_triplets([tmp_path / "rows.jsonl"], FIELDS, ())
    assert str(error.value) == (
        f"{tmp_path / 'rows.jsonl'}: no row gives texts under anchor and positive; it has question (text), "
        "answer (text)\n"
        "  cure: set finetune.fields in params.yaml to [question, answer, negative]"
    )
    parquet.write_table(pa.table({"q": ["x"], "positive": ["y"]}), tmp_path / "rows.parquet")
    with pytest.raises(TeachonceError, match=r"it has q \(text\), positive \(text\)\n"):
        read_triplets([tmp_path / "rows.parquet"], FIELDS, ())


def test_a_truncated_file_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS * 100))[:-9])
    with pytest.raises(TeachonceError, match="truncated"):
        read_triplets([tmp_path / "rows.jsonl.gz"], FIELDS, ())
    with pytest.raises(MissingError, match=r"^finetune\.triplets: 'nothing\*' matches no file"):
        triplet_files(["nothing*"], tmp_path)
    (tmp_path / "rows.txt").write_text("a,b")
    with pytest.raises(TeachonceError, match="nothing reads that ending"):
        triplet_files(["*.txt"], tmp_path)


# ---------------------------------------------------------------------------------------------- the loss


def slow_info_nce(rows, vector, scale, labelled=None):
    """Loop by loop: each anchor among all positives and negatives, less what is no wrong answer."""
    keys = [text for row in rows for text in (row.positive, *row.negatives)]
    total = 0.0
    for row in rows:
        positives = [other.positive for other in labelled or rows if other.anchor == row.anchor]
        own = math.exp(scale * (vector(row.anchor) @ vector(row.positive)))
        sum_of_all = own
        for text in keys:
            if text not in (row.anchor, *positives):
                sum_of_all += math.exp(scale * (vector(row.anchor) @ vector(text)))
        total -= math.log(own / sum_of_all)
    return total / len(rows)


def lesson_of(folder, rows, params, memory=None):
    model = load_model(folder, device=CPU)
    student = Student(model, teacher_dim=32, unit_length=True, project=False, dropout=False).eval()
    return FinetuneTask(
        params,
        student=student,
        tokenizer=model.tokenizer,
        triplets=rows,
        judge=TripletJudge(rows),
        memory=memory,
        device=CPU,
    )


@pytest.mark.parametrize("gradient_caching", [False, True])
def test_the_loss_is_supervised_info_nce(tiny_model, gradient_caching):
    texts = sentences(16, seed=5)
    rows = [
        Triplet(texts[0], texts[1], (texts[2], texts[10], texts[11])),
        Triplet(texts[3], texts[4]),
        Triplet(texts[0], texts[5], (texts[4],)),  # the anchor of row 0, the positive of row 1
        Triplet(texts[6], texts[1], (texts[7], texts[5])),  # the positives of rows 0 and 2
        Triplet(texts[8], texts[9], (texts[8], texts[12])),  # its own anchor as a negative
        # Another positive of row 1's anchor among the negatives of row 1's positive's rival.
        Triplet(texts[14], texts[15], (texts[13], texts[2])),
        Triplet(texts[3], texts[13]),
    ]
    task = lesson_of(tiny_model, rows, settings(gradient_caching=gradient_caching))
    encoder = Encoder(tiny_model, device=CPU, max_tokens=16)
    vectors = dict(zip(texts, encoder.encode(texts).astype(np.float64), strict=True))
    for batch in (np.arange(7), np.array([5, 1, 3, 0])):
        with torch.no_grad():
            loss, parts = task.setup().loss(batch, 0)
        slow = slow_info_nce([rows[row] for row in batch], vectors.get, 20, rows)
        assert float(loss) == pytest.approx(slow, rel=1e-4)
        assert parts == [float(loss)]


def test_what_is_no_wrong_answer():
    # Rows: (0 -> 1), (2 -> 3), (0 -> 4), and the negatives 5, 0; in another batch (2 -> 5).
    right = positives_by_anchor(np.array([0, 2, 0, 2]), np.array([1, 3, 4, 5]))
    anchors, keys = np.array([0, 2, 0]), np.array([1, 3, 4, 5, 0])
    assert positives_mask(anchors, keys, right).tolist() == [
        [True, False, True, False, True],
        [False, True, False, True, False],
        [True, False, True, False, True],
    ]


def test_the_judge_of_triplets_is_the_mean_reciprocal_rank():
    rows = [
        Triplet("a", "p", ("n", "m")),
        Triplet("b", "q"),
        Triplet("c", "p", ("n", "b")),
        Triplet("a", "r"),
    ]
    judge = TripletJudge(rows)
    vectors = {
        "a": [1, 0],
        "b": [0, 1],
        "c": [1, 1],
        "p": [0.9, 0.1],
        "q": [0.1, 0.9],
        "n": [1, 0.05],
        "m": [1, 0.01],
        "r": [1, 0.02],
    }
    assert sorted(judge.texts) == sorted(vectors)
    # a -> p: behind n and m; r is its positive, too. a -> r: behind m. b -> q: its own text is no rival.
    # c -> p: q is as near, and a tie counts against the row; n and m, r, b are further away.
    wanted = (1 / 3 + 1 / 1 + 1 / 2 + 1 / 2) / 4
    found = np.array([vectors[text] for text in judge.texts], np.float32)
    assert judge(found) == pytest.approx(wanted)
    assert judge(5 * found) == pytest.approx(wanted)
    assert judge(found) == pytest.approx(slow_mean_reciprocal_rank(rows, vectors))


def test_a_judge_of_triplets_has_a_bounded_number_of_texts_however_many_rows_are_held_out():
    rows = [Triplet(f"a{n}", f"p{n}", (f"n{n}",)) for n in range(30)]
    assert (
        judging_rows(rows, most_texts=90) is rows
    )  # all, in their order: the score is that of all rows
    chosen = judging_rows(rows, most_texts=89)
    assert len(chosen) == 29 and set(chosen) < set(rows)
    # The choice is of the texts, not of their order, and most of it stays as files grow.
    assert judging_rows(rows[::-1], most_texts=30) == judging_rows(rows, most_texts=30)
    more = [*rows, *(Triplet(f"b{n}", f"q{n}", (f"m{n}",)) for n in range(3))]
    assert len(set(judging_rows(more, most_texts=30)) & set(judging_rows(rows, most_texts=30))) >= 7
    # A text counts once, and two rows judge however many negatives they have.
    assert judging_rows([Triplet("a", f"p{n}") for n in range(9)], most_texts=10) == [
        Triplet("a", f"p{n}") for n in range(9)
    ]
    wide = [Triplet(f"a{n}", f"p{n}", tuple(f"n{n}-{m}" for m in range(9))) for n in range(5)]
    assert len(judging_rows(wide, most_texts=3)) == 2


def test_a_finetuning_says_by_how_many_rows_it_is_judged(tmp_path, caplog):
    """Rows of 402 texts each: of those held out, 40 have together no more than 16,384."""
    rows = [[f"one {n}", f"two {n}", *(f"not {n} {m}" for m in range(400))] for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    caplog.set_level("INFO", logger="teachonce")
    labels = Labels.read(settings(heldout=0.5), tmp_path, ())
    assert labels.judged == MOST_TEXTS // 402 == 40 < labels.heldout
    assert len(labels.judge.texts) == 40 * 402
    assert f"judged by 40 of {labels.heldout} rows held out" in caplog.text


def slow_mean_reciprocal_rank(rows, vectors):
    def cosine(first, second):
        a, b = (np.array(vectors[text], np.float64) for text in (first, second))
        return round(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), 6)

    found = []
    for row in rows:
        right = {other.positive for other in rows if other.anchor == row.anchor}
        texts = {text for other in rows for text in (other.positive, *other.negatives)}
        own = cosine(row.anchor, row.positive)
        rivals = texts - right - {row.anchor}
        found.append(1 / (1 + sum(cosine(row.anchor, text) >= own for text in rivals)))
    return sum(found) / len(found)


def test_no_judge_takes_vectors_that_are_no_numbers_for_good_ones():
    triplets = TripletJudge([Triplet("a", "b", ("n",)), Triplet("c", "d")])
    vectors = np.eye(5, 4, dtype=np.float32)
    for wrong in (np.nan, np.inf):
        vectors[3] = wrong
        assert np.isnan(triplets(vectors))


def test_a_finetuning_whose_gradient_is_no_number_stops_before_a_weight_is_touched(world):
    with pytest.raises(
        TeachonceError, match=r"^step 1: the loss is [\d.]+e\+\d+, its gradient inf; rows"
    ):
        world.train(settings(distill_weight=1e38), caches=world.caches())
    assert not list((world.place.root / "work").rglob("*.safetensors"))


def test_the_judge_of_sts_is_spearman():
    pairs = StsSet(np.array([1.0, 3.0, 2.0]), ["a", "b", "c"], ["x", "y", "z"])
    vectors = np.array([[1, 0]] * 3 + [[0, 1], [1, 0], [1, 1]], np.float32)
    assert StsJudge(pairs)(vectors) == pytest.approx(100)


# --------------------------------------------------------------------------------------------- training


class World:
    """Sentences, and labelled rows whose positive has the anchor's words in another order."""

    def __init__(self, place, folder):
        self.place, self.folder = place, folder
        self.texts = sentences(300, seed=1)
        draw = np.random.default_rng(2)
        self.rows = []
        for anchor in self.texts:
            words = anchor.lower().removesuffix(".").split()
            positive = " ".join(draw.permutation(words[: max(3, len(words) // 2)]))
            self.rows.append(Triplet(anchor, positive))
        (place.root / "rows.jsonl").write_bytes(json_lines(self.rows))

    def caches(self):
        corpus = self.place.corpus(sentences(200, seed=9))
        self.place.embed(corpus, Encoder(self.folder, device=CPU, max_tokens=16).encode_counted)
        embeddings = Embeddings(self.place.store, self.place.embeddings, corpus)
        split = Split(corpus=corpus.manifest.content, heldout=0.1, evaluation=())
        return Caches(corpus, embeddings, None, split, self.place.store)

    def train(self, params, name="kd-finetuned", *, caches=None, evaluation=()):
        at = self.place.root
        return finetune.run(
            params,
            name=name,
            student=self.folder,
            root=at,
            evaluation=evaluation,
            caches=caches,
            device=CPU,
            work=at / "work",
            out=at / name,
            curve=at / f"{name}.csv",
            training=at / f"{name}.json",
            track=lambda row: None,
        )

    def weights(self, name):
        content = (self.place.root / name / "model.safetensors").read_bytes()
        return hashlib.sha256(content).hexdigest()


@pytest.fixture
def world(place, tiny_model):
    return World(place, tiny_model)


def test_a_student_learns_from_labels(world):
    outcome = world.train(settings())
    assert outcome.facts["dev"] > outcome.facts["dev_before"] + 0.05
    assert outcome.facts["rows"] + outcome.facts["heldout"] == 300
    assert outcome.facts["judged"] == outcome.facts["heldout"]
    facts = json.loads((world.place.root / "kd-finetuned.json").read_text())
    assert facts["minutes"] >= 0 and facts["dev"] == outcome.facts["dev"]
    lineage = json.loads((world.place.root / "kd-finetuned/teachonce.json").read_text())
    assert lineage["student"] == "kd-finetuned"
    assert lineage["finetuned"]["recipe"]["learning_rate"] == 1e-3
    # The saved folder gives what was judged.
    heldout = [
        r for r in world.rows if int.from_bytes(text_key(r.anchor)[8:], "little") < 2**64 // 10
    ]
    assert len(heldout) == facts["heldout"]
    judge = TripletJudge(heldout)
    encoder = Encoder(world.place.root / "kd-finetuned", device=CPU, max_tokens=16)
    assert judge(encoder.encode(judge.texts)) == pytest.approx(facts["dev"], abs=1e-3)


def test_a_finetuning_that_only_hurts_leaves_the_student_as_it_was(world, tmp_path):
    """The scores of its dev pairs are the start's own cosines, so that nothing can be better than it."""
    first, second = world.texts[:40], world.texts[40:80]
    start = Encoder(world.folder, device=CPU, max_tokens=16)
    cosines = (start.encode(first).astype(float) * start.encode(second)).sum(axis=1)
    lines = [f"{cosine}\t{a}\t{b}" for cosine, a, b in zip(cosines, first, second, strict=True)]
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n")
    outcome = world.train(settings(dev=str(tmp_path / "dev.tsv")))
    assert outcome.facts["dev_before"] > 0.999
    assert outcome.facts["best_step"] == 0
    assert outcome.facts["dev"] == outcome.facts["dev_before"]
    before = Encoder(world.folder, device=CPU, max_tokens=16).encode(world.texts[:9])
    after = Encoder(world.place.root / "kd-finetuned", device=CPU, max_tokens=16)
    assert np.array_equal(after.encode(world.texts[:9]), before)


def test_the_kd_term_keeps_a_student_near_its_teacher(world):
    """The student is its own teacher here: without the term it drifts away, with it hardly."""
    caches = world.caches()
    teacher = caches.embeddings.rows_of(np.arange(200))

    def distance(name):
        encoder = Encoder(world.place.root / name, device=CPU, max_tokens=16)
        vectors = encoder.encode(caches.corpus.take(np.arange(200)))
        return float(np.square(vectors - teacher).sum(axis=1).mean())

    world.train(settings(), "free")
    world.train(settings(distill_weight=400.0), "kept", caches=caches)
    assert distance("kept") < 0.5 * distance("free")
    header = (world.place.root / "kept.csv").read_text().splitlines()[0]
    assert header == "step,loss_info_nce,loss_kd,dev,learning_rate,temperature"


def test_the_kd_term_is_the_mean_squared_error_of_the_rows_of_the_step(world):
    caches = world.caches()
    params = settings(distill_weight=3.0)
    tokenizer = load_model(world.folder, device=CPU).tokenizer
    memory = Rehearsal(caches, tokenizer, world.folder, params)
    task = lesson_of(world.folder, world.rows[:40], params, memory)
    with torch.no_grad():
        task.student.body[0].auto_model.embeddings.word_embeddings.weight.mul_(0.5)
        total, (info_nce, kd) = task.setup().loss(np.arange(16), 7)
        rows = some_rows(memory.train, 8, seed=0, number=7)
        assert len(set(rows.tolist())) == 8
        vectors = encode_ids(task.student, memory.tokens.rows_of(rows), **PLAIN, device=CPU).numpy()
    teacher = caches.embeddings.rows_of(rows)
    assert kd == pytest.approx(float(np.square(vectors - teacher).mean()), rel=1e-4)
    assert float(total) == pytest.approx(info_nce + 3.0 * kd, rel=1e-5)
    assert kd > 1e-4


def test_rows_of_evaluation_sets_are_not_learned_from(world):
    seen = {text_key(row.anchor) for row in world.rows[:50]}
    outcome = world.train(settings(epochs=1), evaluation=seen)
    assert outcome.facts["rejected"]["in_evaluation"] == 50
    assert outcome.facts["rows"] + outcome.facts["heldout"] == 250


def test_an_sts_file_may_pick_the_best_weights(world):
    lines = [
        f"{score}\t{row.anchor}\t{text}\n"
        for row, other in zip(world.rows[:30], world.rows[30:60], strict=True)
        for score, text in ((5, row.positive), (0, other.positive))
    ]
    (world.place.root / "dev.tsv").write_text("".join(lines))
    outcome = world.train(settings(dev="dev.tsv"))
    assert (outcome.facts["rows"], outcome.facts["heldout"]) == (300, 0)
    assert outcome.facts["dev"] > outcome.facts["dev_before"]
    assert 1 < outcome.facts["dev"] <= 100


def test_what_cannot_be_finetuned_is_refused(world, tmp_path):
    (world.place.root / "rows.jsonl").write_bytes(json_lines(world.rows[:1]))
    with pytest.raises(
        TeachonceError, match=r"^finetune.triplets: \d rows to learn from and \d held"
    ):
        world.train(settings())
    (world.place.root / "rows.jsonl").write_bytes(json_lines(world.rows))
    caches = world.caches()
    world.folder = make_tiny_model(tmp_path / "narrow", layers=1, width=16)
    with pytest.raises(
        TeachonceError, match=r"student's vectors have 16 numbers, the teacher's 32"
    ):
        world.train(settings(distill_weight=1.0), caches=caches)


def test_a_killed_finetuning_ends_with_the_same_weights(world):
    params = settings(dropout=True, distill_weight=10.0)
    caches = world.caches()
    world.train(params, "whole", caches=caches)
    with power_cut(after=23):
        world.train(params, "killed", caches=caches)
    world.train(params, "killed", caches=caches)
    assert world.weights("killed") == world.weights("whole")
    assert (world.place.root / "killed.csv").read_bytes() == (
        world.place.root / "whole.csv"
    ).read_bytes()


def test_a_killed_finetuning_is_gone_on_with_by_nobody_who_learns_from_something_else(
    world, tmp_path
):
    """Student, labels, cached vectors, split and settings stand in a run's name; the same again goes on."""
    params = settings(distill_weight=10.0, evaluate_every=100)
    caches = world.caches()
    other_split = caches.split.model_copy(update={"evaluation": (3, 4)})
    world.place.embed(caches.corpus, HashTeacher(32), files={"model.safetensors": "1" * 64})
    others = Embeddings(world.place.store, world.place.embeddings, caches.corpus)

    def runs(params=params, caches=caches):
        with power_cut(after=1):
            world.train(params, caches=caches)
        return sorted(path.name for path in (world.place.root / "work").iterdir())

    found = [
        runs(),
        runs(caches=replace(caches, embeddings=others)),
        runs(caches=replace(caches, split=other_split)),
        runs(settings(distill_weight=10.0, evaluate_every=100, seed=1)),
    ]
    (world.place.root / "rows.jsonl").write_bytes(json_lines(world.rows[:-1]))
    found.append(runs())
    (world.place.root / "rows.jsonl").write_bytes(json_lines(world.rows))
    assert runs() == found[-1]
    world.folder = make_tiny_model(tmp_path / "another", seed=5)
    found.append(runs())
    assert [len(folders) for folders in found] == [1, 2, 3, 4, 5, 6]


def test_a_batch_is_read_in_pieces_that_change_nothing(tiny_model):
    """Texts of 3 to 60 tokens: several pieces, whose vectors come back in the order of the texts."""
    model = load_model(tiny_model, device=CPU)
    student = Student(model, teacher_dim=32, unit_length=True, project=False, dropout=False).eval()
    draw = np.random.default_rng(0)
    rows = [draw.integers(5, 50, size=draw.integers(3, 60)).astype(np.int32) for _ in range(100)]
    assert sum(map(len, rows)) > 2 * PIECE_TOKENS["cpu"]
    with torch.no_grad():
        ours = encode_ids(student, rows, **PLAIN, device=CPU)
        for row, vector in zip(rows, ours, strict=True):
            ids = torch.from_numpy(row.astype(np.int64))[None]
            alone = student(ids, torch.ones_like(ids))[0]
            assert torch.allclose(vector, alone, atol=1e-5)


def peak_bytes(work):
    """The most memory that torch's allocator had given out at once while `work` ran."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(np.cumsum([nbytes for _, nbytes in steps]))


def test_gradient_caching_takes_less_memory_and_changes_no_bit(tiny_model):
    """With dropout: a piece that is read again must drop what it dropped before."""
    model = load_model(tiny_model, device=CPU)
    student = Student(model, teacher_dim=32, unit_length=True, project=False, dropout=True).train()
    student.packed = None  # which reads larger pieces without caching, so dropout would be another
    draw = np.random.default_rng(0)
    rows = [draw.integers(5, 50, size=draw.integers(3, 60)).astype(np.int32) for _ in range(300)]
    found = {}

    def learn():
        torch.manual_seed(3)
        student.zero_grad()
        vectors = encode_ids(student, rows, **PLAIN | {"gradient_caching": cached}, device=CPU)
        loss = (vectors @ vectors.T).square().mean()
        loss.backward()
        gradients = {n: w.grad.clone() for n, w in student.named_parameters() if w.grad is not None}
        found[cached] = (float(loss.detach()), gradients)

    peaks = {}
    for cached in (False, True):
        peaks[cached] = peak_bytes(learn)
    assert found[True][0] == found[False][0]
    assert len(found[True][1]) > 60
    for name, gradient in found[True][1].items():
        assert torch.equal(gradient, found[False][1][name]), name
    pieces = sum(map(len, rows)) // PIECE_TOKENS["cpu"]
    assert pieces >= 8
    assert peaks[True] < peaks[False] / 5


def test_gradient_caching_without_padding_learns_the_same(tiny_model):
    model = load_model(tiny_model, device=CPU)
    student = Student(model, teacher_dim=32, unit_length=True, project=False, dropout=False)
    assert student.packed is not None
    draw = np.random.default_rng(0)
    rows = [draw.integers(5, 50, size=draw.integers(3, 60)).astype(np.int32) for _ in range(100)]
    gradients = []
    for cached in (False, True):
        student.zero_grad()
        vectors = encode_ids(student, rows, **PLAIN | {"gradient_caching": cached}, device=CPU)
        (vectors @ vectors.T).square().mean().backward()
        gradients.append([w.grad.clone() for w in student.parameters() if w.grad is not None])
    for plain, cached in zip(*gradients, strict=True):
        assert torch.allclose(plain, cached, atol=1e-6)
