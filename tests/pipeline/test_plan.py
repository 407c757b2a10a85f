"""The plan: what it counts is exact, what it measures comes from the work itself, nothing is left."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.commands.plan import lines
from stages import embed, plan, start
from stages.models.encoder import Encoder
from stages.params import Params, StartParams
from storage import negatives
from storage.corpus import text_key
from storage.embeddings import row_bytes
from storage.errors import MissingError
from storage.manifest import fingerprint
from storage.remote import Remote
from tests.conftest import HashTeacher, Made, embed_params, sentences

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FILES = {"model.safetensors": "0" * 64}
TEACHER = fingerprint(embed.recipe(embed_params(), FILES))


class SlowTeacher(HashTeacher):
    """A teacher that needs a known time for each token, and tells how large its calls were."""

    device, max_tokens, in_windows = "a desk", 8, False

    def __init__(self, *, token_seconds, dim=16):
        super().__init__(dim)
        self.token_seconds, self.calls, self.slept = token_seconds, [], []

    def lengths(self, texts):
        return np.array([len(text.split()) for text in texts])

    def encode_counted(self, texts):
        self.calls.append(len(texts))
        tokens = int(np.minimum(self.lengths(texts), self.max_tokens).sum())
        self.slept.append(tokens * self.token_seconds)
        time.sleep(self.slept[-1])
        return Made(self(texts).vectors, tokens=tokens, truncated=0)


def settings(**sections):
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["embed"] = embed_params().model_dump()
    content["device"] = "cpu"
    for section, changes in sections.items():
        content[section] |= changes
    del content["x-recipe"]  # there for its anchor
    return Params.model_validate(content)


def planned(
    place, corpus, teacher=None, *, params=None, remote=None, starts=None, seconds=0.2, **texts
):
    outcome = plan.run(
        params or settings(),
        files=FILES,
        corpus=corpus,
        store=place.store,
        remote=remote,
        load_teacher=None if teacher is None else lambda: teacher,
        starts=starts or {},
        labelled=texts.get("labelled"),
        evaluation=texts.get("evaluation"),
        seconds=seconds,
        seed=0,
    )
    return outcome.facts | {"not_planned": {}}


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_counts_are_exact_and_rates_are_the_teachers(place):
    texts = sentences(1000)
    corpus, teacher = place.corpus(texts), SlowTeacher(token_seconds=1e-4)
    before = snapshot(place.root)
    facts = planned(place, corpus, teacher)
    assert snapshot(place.root) == before
    assert facts["counted"] == {
        "texts": 1000,
        "shards": len(corpus.objects),
        "shards_to_embed": len(corpus.objects),
        "texts_to_embed": 1000,
        "texts_to_reuse": 0,
    }
    at, said = facts["measured"]["teacher"], facts["extrapolated"]["embed"]
    words = [len(text.split()) for text in texts]
    assert at["texts"] == 1000
    assert at["tokens_per_text"] == pytest.approx(sum(min(n, 8) for n in words) / 1000)
    assert at["truncated"] == sum(n > 8 for n in words) / 1000 > 0
    assert said["tokens"] == sum(min(n, 8) for n in words)
    assert at["tokens_per_second"] <= 10_000  # nothing can be faster than its sleep
    assert said["seconds"] == pytest.approx(
        at["load_seconds"] + said["tokens"] / at["tokens_per_second"]
    )
    assert at["dim"] == 16
    assert facts["extrapolated"]["mine"]["seconds"] > 0


def test_calls_grow_to_a_shard_and_only_then_the_clock_runs(place):
    texts = sentences(300)
    teacher = SlowTeacher(token_seconds=0)
    at, vectors = plan.teacher_rate(lambda: teacher, texts, most=64, seconds=20)
    assert teacher.calls == [4, 8, 16, 32, 64, 64, 64, 64, 64, 44]
    assert at.encoded == len(vectors) == 300
    assert np.array_equal(vectors, teacher(texts).vectors)
    # Time that is short makes calls smaller, and the last one may go beyond.
    teacher = SlowTeacher(token_seconds=1e-3)
    at, _ = plan.teacher_rate(lambda: teacher, texts, most=64, seconds=0.4)
    assert set(teacher.calls[:2]) <= {4, 8}
    assert max(teacher.calls) <= 16
    assert at.encoded < 300
    # The call that passed the time was the last one.
    measured = teacher.slept[-(at.encoded // teacher.calls[-1]) :]
    assert sum(measured[:-1]) < 0.4 <= at.seconds


def test_what_the_store_or_the_remote_has_is_not_to_embed(place, tmp_path):
    texts = sentences(600)
    grown = place.corpus(texts)
    old = place.corpus([*texts[:400]])
    place.embed(old, HashTeacher(), files=FILES)
    both = {entry.key for entry in old.objects} & {entry.key for entry in grown.objects}
    shared = sum(entry.rows for entry in grown.objects if entry.key in both)
    assert 0 < shared < 400  # the last old shard is another one now, but its texts are known
    teacher = SlowTeacher(token_seconds=0)
    counted = planned(place, grown, teacher)["counted"]
    assert (counted["texts_to_embed"], counted["texts_to_reuse"]) == (200, 400 - shared)
    assert counted["shards_to_embed"] == len(grown.objects) - len(both)
    without = settings(embed={"reuse": False})
    counted = planned(place, grown, teacher, params=without)["counted"]
    assert (counted["texts_to_embed"], counted["texts_to_reuse"]) == (600 - shared, 0)
    # Another store that shares a remote with this one.
    (tmp_path / "remote").mkdir()
    remote = Remote(str(tmp_path / "remote"))
    for entry in place.embeddings.objects:
        remote.push(entry, place.store)
        place.store.path(entry.key).unlink()
    counted = planned(place, grown, teacher, remote=remote)["counted"]
    assert (counted["texts_to_embed"], counted["texts_to_reuse"]) == (600 - shared, 0)
    assert not any(place.store.path(entry.key).exists() for entry in place.embeddings.objects)


def test_where_all_is_embedded_no_teacher_is_loaded(place):
    corpus = place.corpus(sentences(300))
    with pytest.raises(MissingError, match="run `teachonce plan` where the teacher is"):
        planned(place, corpus)
    place.embed(corpus, HashTeacher(dim=24), files=FILES)
    facts = planned(place, corpus)
    assert facts["counted"]["texts_to_embed"] == 0
    assert facts["extrapolated"]["embed"] == {"tokens": 0, "seconds": 0.0, "bytes": 0}
    assert "teacher" not in facts["measured"]


@pytest.mark.parametrize("storage", ["float16", "float32", "int8"])
def test_bytes_are_those_of_the_files(place, storage):
    corpus = place.corpus(sentences(500), rows_per_shard=128)
    params = settings(embed={"storage": storage})
    said = planned(place, corpus, SlowTeacher(token_seconds=0, dim=48), params=params)
    place.embed(corpus, HashTeacher(48), files=FILES, params=params.embed)
    off = said["extrapolated"]["embed"]["bytes"] - place.embeddings.size
    assert abs(off) < 500 * len(corpus.objects)
    assert row_bytes(48, storage) == {"float16": 112, "float32": 208, "int8": 68}[storage]
    keys = np.frombuffer(b"".join(text_key(text) for text in sentences(2000)), "V16")
    entry = negatives.put_negatives(
        place.store,
        f"negatives/{'1' * 40}/000000.arrow",
        neighbours=np.zeros((2000, 16), np.int64),
        scores=np.zeros((2000, 16), np.float32),
        text_keys=keys,
        facts={},
    )
    assert entry.bytes == pytest.approx(2000 * negatives.row_bytes(16), rel=0.01)


def test_a_sample_is_drawn_from_all_rows_without_repeats():
    rows = np.arange(10_000, 20_000)
    chosen = plan.draw(rows, 2000, seed=3, in_order=False)
    assert len(set(chosen)) == 2000
    assert set(chosen) <= set(rows)
    assert abs(chosen.mean() - rows.mean()) < 300  # five standard errors
    assert not (np.diff(chosen) > 0).all()
    ordered = plan.draw(rows, 2000, seed=3, in_order=True)
    assert list(ordered) == sorted(chosen)
    assert list(plan.draw(rows, 2000, seed=4, in_order=True)) != list(ordered)
    assert list(plan.draw(rows, 20_000, seed=0, in_order=True)) == list(rows)


@pytest.fixture(scope="module")
def half(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("starts") / "half"
    params = StartParams.model_validate({"from": "teacher", "layers": [0, 3]})
    start.run(params, name="half", folder=tiny_model, trust_remote_code=False, out=out)
    return out


def test_students_take_real_steps_before_there_is_a_vector(place, half):
    corpus = place.corpus(sentences(600))
    before = snapshot(place.root)
    params = settings(mine={"neighbours": 8})
    facts = planned(
        place,
        corpus,
        SlowTeacher(token_seconds=0),
        params=params,
        starts={"kd": half, "ckd": None},
    )
    assert snapshot(place.root) == before
    assert list(facts["measured"]["students"]) == ["kd"]
    assert facts["starts_missing"] == {"ckd": "half"}
    pace, said = facts["measured"]["students"]["kd"], facts["extrapolated"]["students"]["kd"]
    assert said["steps"] == round(600 * 0.97) // 128
    assert pace["steps_per_hour"] == 3600 / pace["step_seconds"]
    # 4 steps, evaluations before the first and after the last, the ids of all 600 texts.
    assert said["seconds"] == pytest.approx(
        pace["token_seconds"] + 4 * pace["step_seconds"] + 2 * pace["evaluation_seconds"]
    )
    assert 0 < pace["steps"] <= plan.MOST_STEPS
    shown = "\n".join(lines(facts))
    assert (
        "distill ckd                                  ?  run `teachonce start half` first" in shown
    )


def test_a_finetuning_and_evaluations_are_planned_by_what_they_read(place, half):
    texts = sentences(600)
    params = settings(
        mine={"neighbours": 8},
        finetune={"students": ["kd"], "distill_rows": 64, "epochs": 2, "evaluate_every": 3},
    )
    usual = plan.Load.of(texts, 64)
    assert usual == plan.Load(600, sum(map(len, texts)))
    assert plan.Load.of(["a" * 100, "b"], 8) == plan.Load(2, 33)
    # 1,000 rows of two texts, as long as those of the corpus; 50 are judged; 300 are evaluated.
    size = usual.characters / 600
    labelled = plan.Labelled(
        1000, plan.Load(2000, round(2000 * size)), plan.Load(50, round(50 * size))
    )
    facts = planned(
        place,
        place.corpus(texts),
        SlowTeacher(token_seconds=1e-4),
        params=params,
        starts={"kd": half, "ckd": None},
        labelled=labelled,
        evaluation=plan.Load(300, round(300 * size)),
    )
    said, pace = facts["extrapolated"], facts["measured"]["students"]["kd"]
    assert list(said["finetune"]) == ["kd"] and pace["evaluated"] > 10
    a_text = pace["evaluation_seconds"] / pace["evaluated"]
    # 2 epochs of 7 steps, each of 256 labelled texts and 64 cached ones where distill reads 128.
    steps, evaluations = 14, 1 + 5
    found = said["finetune"]["kd"]
    assert found["steps"] == steps
    assert found["seconds"] == pytest.approx(
        steps * pace["step_seconds"] * 320 / 128 + evaluations * 50 * a_text, rel=1e-3
    )
    assert list(said["evaluate"]) == ["teacher", "half", "kd", "kd-finetuned"]
    for model, seconds in (
        ("kd", a_text),
        ("teacher", 1 / facts["measured"]["teacher"]["texts_per_second"]),
    ):
        speed = min(20, 8 * params.evaluate.speed_texts * seconds)
        wanted = (300 + 18) * seconds + speed
        assert said["evaluate"][model]["seconds"] == pytest.approx(wanted, rel=1e-3)
    shown = "\n".join(lines(facts))
    assert "finetune kd " in shown and "14 steps if it is not stopped early" in shown
    assert "extrapolated, 4 models\n" in shown + "\n"
    del said["evaluate"]["teacher"]  # as where all is embedded
    shown = "\n".join(lines(facts))
    assert "extrapolated, 3 models without the teacher, which was not measured" in shown


def test_a_student_of_neighbours_gets_neighbours_and_as_many_held_out(place, half):
    texts = sentences(300)
    params = settings(mine={"neighbours": 8})
    caches = plan.sampled_caches(
        params, texts, rows=3000, dim=32, store=place.store, recipe=params.recipes["ckd"]
    )
    assert caches.negatives.rows_of(np.arange(300))[0].shape == (300, 8)
    assert caches.corpus.texts(0) == texts
    assert np.allclose(np.linalg.norm(caches.embeddings.shard(0), axis=1), 1)
    # 3 % of 3,000 rows are 90 of these 300: chance decides which.
    assert abs(len(caches.split.heldout_rows(caches.corpus)) - 90) < 40
    kd = params.recipes["kd"]
    caches = plan.sampled_caches(params, texts, rows=3000, dim=32, store=place.store, recipe=kd)
    assert caches.negatives is None


def test_mining_is_planned_by_the_parts_of_its_way():
    """What they add up to: test_self_join. How that agrees with the clock: benchmarks/plan.py."""
    params, sample = settings().mine, np.ones((1, 64), np.float32)
    none, few, many = (
        plan.mining_seconds(params, rows=rows, sample=sample, itemsize=2, device=CPU)
        for rows in (0, 1_000, 300_000)
    )
    assert none == 0
    assert many > 10 * few > 0


def test_the_share_that_is_cut_is_embeds(place, tiny_model):
    """The same tokenizer, the same limit, the prompt in front: all of a small corpus is counted."""
    texts = sentences(300)
    corpus = place.corpus(texts)
    params = settings(embed={"max_tokens": 9, "prompt": "amber basin "})
    encoder = Encoder(tiny_model, device=CPU, max_tokens=9, prompt="amber basin ")
    at = planned(place, corpus, encoder, params=params)
    facts = place.embed(corpus, encoder.encode_counted, files=FILES, params=params.embed).facts
    assert 0.1 < at["measured"]["teacher"]["truncated"] < 1
    assert at["measured"]["teacher"]["truncated"] == facts["truncated"] / facts["texts"]
    assert at["extrapolated"]["embed"]["tokens"] == facts["tokens"]


def teachonce(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def work_tree(root, teacher, texts):
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content |= {"store": "store", "device": "cpu"}
    content["docs"]["packages"], content["shard"]["sources"] = [], ["a.txt"]
    content["evaluate"]["retrieval"] = {}
    content["embed"]["teacher"] = str(teacher)
    content["starts"]["half"]["layers"] = [0, 3]
    (root / "params.yaml").write_text(yaml.safe_dump(content))
    (root / "a.txt").write_text("\n".join(texts))


def test_the_command_says_how_each_number_is_known(tmp_path, tiny_model):
    work_tree(tmp_path, tiny_model, sentences(500))
    missing = teachonce(tmp_path, "plan")
    assert missing.returncode == 3
    assert missing.stderr.endswith("data/corpus.json: not there\n  cure: run `teachonce shard`\n")
    assert teachonce(tmp_path, "shard").returncode == 0
    before = snapshot(tmp_path)
    run = teachonce(tmp_path, "plan", "--seconds", "0.2")
    assert run.returncode == 0, run.stderr
    assert {name for name in set(snapshot(tmp_path)) - set(before)} <= {
        tmp_path / "work/hashes.json"
    }
    *table, last = run.stdout.splitlines()
    assert [line[:28].strip() for line in table] == [
        "texts",
        "to embed",
        "tokens of a text",
        "longer than 64 tokens",
        "teacher, tokens/s",
        "teacher, texts/s",
        "teacher, to load",
        "embed",
        "vectors",
        "mine",
        "negatives",
        "evaluate",
        "finetune",
        "distill ckd",
        "distill kd",
    ]
    known = [line[46:].split(",")[0].strip() for line in table]
    *known, lacking, no_ckd, no_kd = known
    assert known == [*2 * ["counted"], *5 * ["measured"], *5 * ["extrapolated"]]
    assert lacking.startswith("finetune.triplets")  # the docs were not written
    assert no_ckd == no_kd == "run `teachonce start half` first"
    assert last.endswith("nothing was written")
    facts = json.loads(teachonce(tmp_path, "plan", "--seconds", "0.2", "--json").stdout)["facts"]
    assert facts["counted"]["texts_to_embed"] == 500
    assert set(facts) == {
        "counted",
        "measured",
        "extrapolated",
        "starts_missing",
        "not_planned",
    }
