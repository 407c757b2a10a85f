"""The plan: what it counts is exact, what it measures comes from the work itself, nothing is left."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.commands import plan, plan_table
from pipeline.workspace import Workspace
from stages import embed, start
from stages.learning.rehearsal import MOST_STEPS
from stages.mining import self_join
from stages.models.encoder import Encoder
from stages.models.speed import rate_of
from stages.params import StartParams
from storage import negatives
from storage.corpus import text_key
from storage.embeddings import row_bytes
from storage.errors import MissingError
from storage.manifest import fingerprint
from storage.remote import Remote
from storage.split import Split
from storage.store import Store
from tests.conftest import (
    HashTeacher,
    Made,
    embed_params,
    probe_of,
    prompts,
    sentences,
    shipped_settings,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FILES = {"model.safetensors": "0" * 64}
TEACHER = fingerprint(embed.recipe(embed_params(), FILES))


class SlowTeacher(HashTeacher):
    """A teacher that needs a known time for each token, and tells how large its calls were."""

    device, max_tokens = "a desk", 8

    def __init__(self, *, token_seconds, dim=16):
        super().__init__(dim)
        self.token_seconds, self.calls, self.slept = token_seconds, [], []
        self.roles_asked = {}

    def encode_counted(self, texts, *, role):
        self.calls.append(len(texts))
        self.roles_asked.update(dict.fromkeys(texts, role))
        words = np.array([len(text.split()) for text in texts])
        tokens = int(np.minimum(words, self.max_tokens).sum())
        self.slept.append(tokens * self.token_seconds)
        time.sleep(self.slept[-1])
        longer = int((words > self.max_tokens).sum())
        return Made(self(texts, role).vectors, tokens=tokens, truncated=longer)


class Tree(Workspace):
    """A work tree around a corpus, whose teacher is at hand, or is not on this machine."""

    def __init__(self, place, corpus, teacher=None, *, remote=None, half=None, **sections):
        content = shipped_settings()
        content |= {"store": "store", "device": "cpu"}
        content["embed"] = embed_params().model_dump()
        content["starts"]["other"] = {"from": "teacher", "layers": [0]}
        content["students"]["ckd"]["start"] = "other"
        content["evaluate"]["retrieval"] = {}
        for section, changes in sections.items():
            content[section] |= changes
        (place.root / "params.yaml").write_text(yaml.safe_dump(content))
        super().__init__(place.root)
        self.given, self.fake, self.shared = corpus, teacher, remote
        if half is not None:
            shutil.copytree(half, self.at.start("half"), dirs_exist_ok=True)

    def corpus(self):
        return self.given

    def remote(self):
        return self.shared

    def teacher(self):
        return FILES, None if self.fake is None else self.load_teacher

    def encoder(self, name, *, for_sets=False):
        return self.fake if name == "teacher" else super().encoder(name, for_sets=for_sets)


def planned(place, corpus, teacher=None, *, seconds=0.2, **settings):
    return plan.run(Tree(place, corpus, teacher, **settings), seconds=seconds, seed=0).facts


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_counts_are_exact_and_rates_are_the_teachers(place):
    texts = sentences(1000)
    here = Tree(place, place.corpus(texts), SlowTeacher(token_seconds=1e-4))
    corpus, before = here.corpus(), snapshot(place.root)
    outcome = plan.run(here, seconds=600, seed=0)
    assert snapshot(place.root) == before
    assert outcome.summary.endswith("nothing was written")
    facts = outcome.facts
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
    assert at["tokens_per_second"] <= 10_000  # nothing can be faster than its sleep
    assert said["seconds"] == pytest.approx(at["load_seconds"] + 1000 / at["texts_per_second"])
    assert at["texts_per_second"] == 1000 / at["seconds"]
    assert facts["extrapolated"]["mine"]["seconds"] > 0


def test_calls_grow_to_a_shard_and_only_then_the_clock_runs():
    texts = sentences(300)
    sample = [(text, "text") for text in texts]
    teacher = SlowTeacher(token_seconds=0)
    at, vectors = rate_of(lambda: teacher, sample, 64, 600)
    assert teacher.calls == [4, 8, 16, 32, 64, 64, 64, 64, 64, 44]
    assert at["texts"] == len(vectors) == 300
    assert np.array_equal(vectors, teacher(texts).vectors)
    # Time that is short makes calls smaller, and the last one may go beyond.
    teacher = SlowTeacher(token_seconds=1e-3)
    at, _ = rate_of(lambda: teacher, sample, 64, 0.4)
    assert set(teacher.calls[:2]) <= {4, 8}
    assert max(teacher.calls) <= 16
    assert at["texts"] < 300
    # The call that passed the time was the last one.
    measured = teacher.slept[-(at["texts"] // teacher.calls[-1]) :]
    assert sum(measured[:-1]) < 0.4 <= at["seconds"]


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
    without = {"embed": embed_params(reuse=False).model_dump()}
    counted = planned(place, grown, teacher, **without)["counted"]
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
    # What embed does not take is not there: a shard of the remote that is cut off.
    damaged = next(
        entry
        for entry in place.embeddings.objects
        if entry.key.split("/")[-1] in {one.key.split("/")[-1] for one in grown.objects}
    )
    (tmp_path / "remote" / damaged.key).chmod(0o644)
    (tmp_path / "remote" / damaged.key).write_bytes(b"ARROW1 but no more")
    counted = planned(place, grown, teacher, remote=remote)["counted"]
    assert counted["texts_to_embed"] == 600 - shared + damaged.rows


def test_any_vectors_of_the_teacher_that_are_here_serve_where_none_are_to_embed(place, tmp_path):
    texts = sentences(600)
    corpus = place.corpus(texts)
    place.embed(corpus, HashTeacher(), files=FILES)
    entries = place.embeddings.objects
    # Every text is in an older shard, and the first shard of this corpus is in no store.
    later = place.corpus(texts[1:])
    assert later.objects[0].key.split("/")[-1] not in {e.key.split("/")[-1] for e in entries}
    counted = planned(place, later)["counted"]
    assert (counted["texts_to_embed"], counted["texts_to_reuse"]) == (0, later.objects[0].rows)
    # One shard of several here, the others on the remote; then all of them there.
    (tmp_path / "remote").mkdir()
    remote = Remote(str(tmp_path / "remote"))
    for entry in entries:
        remote.push(entry, place.store)
    for entry in entries[:-1]:
        place.store.path(entry.key).unlink()
    assert planned(place, corpus, remote=remote)["counted"]["shards_to_embed"] == 0
    place.store.path(entries[-1].key).unlink()
    place.store.path(probe_of(place.embeddings)).unlink()
    with pytest.raises(
        MissingError, match=r"all vectors are on the remote\n  cure: run `teachonce embed`"
    ):
        planned(place, corpus, remote=remote)


def test_where_all_is_embedded_no_teacher_is_loaded(place):
    corpus = place.corpus(sentences(300))
    with pytest.raises(MissingError, match="run `teachonce plan` where the teacher is"):
        planned(place, corpus)
    place.embed(corpus, HashTeacher(dim=24), files=FILES)
    facts = planned(place, corpus)
    assert facts["counted"]["texts_to_embed"] == 0
    assert facts["extrapolated"]["embed"] == {"seconds": 0.0, "bytes": 0}
    assert not {"teacher", "evaluate teacher"} & set(facts["measured"] | facts["extrapolated"])
    assert facts["not_planned"]["evaluate teacher"].startswith(
        "not measured, since there is nothing"
    )


@pytest.mark.parametrize("storage", ["float16", "float32", "int8"])
def test_bytes_are_those_of_the_files(place, storage):
    corpus = place.corpus(sentences(500), rows_per_shard=128)
    params = embed_params(storage=storage)
    teacher = SlowTeacher(token_seconds=0, dim=48)
    said = planned(place, corpus, teacher, embed=params.model_dump())
    place.embed(corpus, HashTeacher(48), files=FILES, params=params)
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
        rejected=np.zeros((2000, negatives.COUNTED_RULES), np.uint16),
    )
    assert entry.bytes == pytest.approx(2000 * negatives.row_bytes(16), rel=0.01)


def test_a_sample_is_drawn_from_all_rows_without_repeats(place, monkeypatch):
    texts = sentences(1000)
    here = Tree(place, place.corpus(texts))

    def drawn(seed):
        return [texts.index(text) for text in plan.Plan(here, here.corpus(), 1, seed).texts]

    assert sorted(drawn(3)) == list(range(1000))
    monkeypatch.setattr(plan, "SAMPLE", 200)
    rows = drawn(3)
    assert len(set(rows)) == 200
    assert abs(np.mean(rows) - 499.5) < 100  # five standard errors
    assert drawn(3) == rows != drawn(4)


@pytest.fixture(scope="module")
def half(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("starts") / "half"
    params = StartParams.model_validate({"from": "teacher", "layers": [0, 3]})
    start.run(params, name="half", folder=tiny_model, trust_remote_code=False, out=out)
    return out


def test_students_take_real_steps_before_there_is_a_vector(place, half):
    corpus = place.corpus(sentences(600))
    here = Tree(place, corpus, SlowTeacher(token_seconds=0), half=half, mine={"neighbours": 8})
    before = snapshot(place.root)
    facts = plan.run(here, seconds=0.2, seed=0).facts
    assert snapshot(place.root) == before
    at, said = facts["measured"]["distill kd"], facts["extrapolated"]["distill kd"]
    assert "distill ckd" not in facts["measured"] | facts["extrapolated"]
    assert facts["not_planned"]["distill ckd"] == "run `teachonce start other` first"
    heldout = len(heldout_of(here))
    train = 600 - heldout
    assert said["steps"] == train // 128 == 4
    # 4 steps, evaluations before the first and after the last, the ids of all 600 texts.
    a_text = sum(map(len, sentences(600))) / 600
    assert said["seconds"] == pytest.approx(
        at["load_seconds"]
        + at["token_seconds"]
        + 4 * 3600 / at["steps_per_hour"]
        + 2 * heldout * a_text / at["judged_per_second"]
    )
    assert 0 < at["steps"] <= MOST_STEPS
    shown = "\n".join(plan_table.lines(facts))
    assert (
        "distill ckd                                  ?  run `teachonce start other` first" in shown
    )
    assert "extrapolated, 4 steps if it is not stopped early" in shown


def test_a_finetuning_and_evaluations_are_planned_by_what_they_read(place, half):
    texts = sentences(600)
    pairs, pool = sentences(1200, seed=5), sentences(300, seed=6)
    rows = [{"anchor": a, "positive": b} for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    (place.root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = [f"{i}\t{pool[i]}\t{pool[150 + i]}\n" for i in range(150)]
    (place.root / "dev.tsv").write_text("".join(scored))
    tune = {"students": ["kd"], "distill_rows": 64, "epochs": 2, "evaluate_every": 3}
    tune |= {"triplets": ["pairs.jsonl"], "dev": "dev.tsv", "max_tokens": 8}
    here = Tree(
        place,
        place.corpus(texts),
        SlowTeacher(token_seconds=1e-4),
        half=half,
        mine={"neighbours": 8},
        finetune=tune,
        evaluate={"sts": {"some": "dev.tsv"}},
    )
    facts = plan.run(here, seconds=0.2, seed=0).facts
    said, at = facts["extrapolated"], facts["measured"]["distill kd"]
    # 2 epochs of 4 steps of 128 pairs beside 64 cached texts, none read beyond 8 tokens; 300 texts judge.
    a_pair = sum(min(len(text), 32) for text in pairs) / 600
    a_text = sum(min(len(text), 32) for text in texts) / 600
    judged = sum(min(len(text), 32) for text in pool)
    found = said["finetune kd"]
    assert found["steps"] == 8
    assert found["seconds"] == pytest.approx(
        at["load_seconds"]
        + 8 * (128 * a_pair + 64 * a_text) / at["learned_per_second"]
        + (1 + 3) * judged / at["judged_per_second"]
    )
    models = ["teacher", "half", "kd", "kd-finetuned"]
    assert [what for what in said if what.startswith("evaluate")] == [
        f"evaluate {m}" for m in models
    ]
    assert not any(what.startswith("finetune") for what in facts["not_planned"])
    turns = []  # of the fixed workload, 49 times: as long for every model
    for model in models:
        rate = facts["measured"]["evaluate teacher" if model == "teacher" else "evaluate half"]
        read = 300 + len(heldout_of(here)) + 4 * 256
        wanted = 2 * rate["load_seconds"] + read / rate["texts_per_second"]
        turns.append(said[f"evaluate {model}"]["seconds"] - wanted)
    assert 0 < turns[0] == pytest.approx(turns[1]) == pytest.approx(turns[2])
    assert facts["measured"]["evaluate teacher"]["tokens_per_second"] <= 10_000
    shown = "\n".join(plan_table.lines(facts))
    assert "finetune kd " in shown and "8 steps if it is not stopped early" in shown
    (place.root / "dev.tsv").write_text("no score\n")
    missing = plan.run(here, seconds=0.2, seed=0).facts["not_planned"]
    assert missing["finetune"].endswith(
        "dev.tsv:1: 1 of 3 columns; " + missing["evaluate"].split("; ")[1]
    )


def test_texts_of_each_role_are_read_behind_their_own_prompt(place, half):
    queries, documents = sentences(150, seed=1), sentences(450, seed=2)
    documents[:50] = queries[:50]  # the same text in two roles is two rows
    corpus = place.corpus({"query": queries, "document": documents})
    teacher = SlowTeacher(token_seconds=0)
    read = embed_params(prompts=prompts("", "clue amber: ", "river basin cedar: ")).model_dump()
    here = Tree(place, corpus, teacher, half=half, mine={"neighbours": 8}, embed=read)
    content = yaml.safe_load((place.root / "params.yaml").read_text())
    content["recipes"]["kd"]["prompts"] = "teacher"
    (place.root / "params.yaml").write_text(yaml.safe_dump(content))
    here.params = Workspace(place.root).params
    made = plan.Plan(here, corpus, 600, 0)
    assert len(made.sample) == len(set(made.sample)) == 600
    vectors = made.embed()
    assert made.measured["teacher"]["texts"] == len(vectors) == 600
    assert {teacher.roles_asked[text] for text in queries[50:]} == {"query"}
    assert {teacher.roles_asked[text] for text in documents[50:]} == {"document"}
    scratch = Store(place.root / "scratch")
    caches = made.mine(vectors, scratch)
    assert caches.corpus.roles == ("query", "document")
    assert sorted(caches.corpus.texts(1)) == sorted(documents)
    made.seconds = 0.2
    made.distill(caches)
    assert made.extrapolated["distill kd"]["steps"] > 0
    files = sorted((scratch.root / "tokens").rglob("*.arrow"))
    ids = [scratch.find(path.relative_to(scratch.root).as_posix()) for path in files]
    assert len(ids) == 2  # each role behind its prompt
    lengths = {
        role: np.mean([len(row) for row in table.column("token_ids").to_pylist()])
        for role, table in (
            ("query" if entry.rows == 150 else "document", scratch.open(entry)) for entry in ids
        )
    }
    own = np.mean([len(text.split()) + 3 for text in documents])
    assert lengths["document"] - own == pytest.approx(4, abs=0.01)


def heldout_of(here):
    corpus = here.corpus()
    split = Split(corpus=corpus.manifest.content, heldout=0.03, evaluation=())
    return split.heldout_rows(corpus)


def test_the_sample_has_neighbours_and_as_many_held_out_as_judge(place, tmp_path):
    texts = sentences(3000)
    here = Tree(place, place.corpus(texts), mine={"neighbours": 8}, split={"heldout": 0.03})
    made = plan.Plan(here, here.corpus(), 1, 0)
    made.device = CPU
    assert made.judged == len(heldout_of(here))
    made.sample, made.texts = made.sample[:300], made.texts[:300]
    caches = made.mine(np.ones((9, 32), np.float32), Store(tmp_path / "scratch"))
    assert caches.corpus.texts(0) == made.texts
    assert np.allclose(np.linalg.norm(caches.embeddings.shard(0), axis=1), 1)
    # As many of these 300 as of all 3,000: chance decides which.
    assert abs(len(caches.split.heldout_rows(caches.corpus)) - made.judged) < 40
    ids, cosines = caches.negatives.rows_of(caches.split.train_rows(caches.corpus))
    assert ids.shape == (len(ids), 8) and (ids >= 0).all()
    assert (np.diff(cosines, axis=1) <= 0).all()


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_mining_grows_with_its_rows(place, tmp_path, index, monkeypatch):
    """How exact search grows: test_self_join. How it agrees with the clock: benchmarks/plan.py."""

    def second(call):
        call()
        return 1.0

    # Whatever is measured takes a second, however busy the machine is.
    monkeypatch.setattr(plan, "seconds_of", second)
    monkeypatch.setattr(self_join, "seconds_of", second)
    here = Tree(place, place.corpus(sentences(600)), mine={"index": index})
    made = plan.Plan(here, here.corpus(), 1, 0)
    made.device = CPU
    vectors, seconds = np.ones((9, 64), np.float32), []
    for made.train in (600, 300_000):
        made.mine(vectors, Store(tmp_path / f"scratch-{made.train}"))
        seconds.append(made.extrapolated["mine"]["seconds"])
    assert seconds[1] > 100 * seconds[0] > 0


def test_the_share_that_is_cut_is_embeds(place, tiny_model):
    """The same tokenizer, the same limit, the prompt in front: all of a small corpus is counted."""
    texts = sentences(300)
    corpus = place.corpus(texts)
    params = embed_params(max_tokens=9, prompts=prompts("amber basin "))
    encoder = Encoder(tiny_model, device=CPU, max_tokens=9, prompts={"text": "amber basin "})
    facts = planned(place, corpus, encoder, seconds=600, embed=params.model_dump())
    at = facts["measured"]["teacher"]
    facts = place.embed(corpus, encoder.encode_counted, files=FILES, params=params).facts
    assert 0.1 < at["truncated"] < 1
    assert at["truncated"] == facts["truncated"] / facts["texts"]
    assert at["tokens_per_text"] == facts["tokens"] / facts["texts"]


def teachonce(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def work_tree(root, teacher, texts):
    content = shipped_settings()
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
        "mine",
        "evaluate teacher",
        "distill ckd",
        "distill kd",
        "finetune",
    ]
    known = [line[46:].split(",")[0].strip() for line in table]
    *known, no_ckd, no_kd, lacking = known
    assert known == [*2 * ["counted"], *5 * ["measured"], *3 * ["extrapolated"]]
    assert lacking.startswith("finetune.triplets")  # the docs were not written
    assert no_ckd == no_kd == "run `teachonce start half` first"
    assert last.endswith("nothing was written")
    facts = json.loads(teachonce(tmp_path, "plan", "--seconds", "0.2", "--json").stdout)["facts"]
    assert facts["counted"]["texts_to_embed"] == 500
    assert set(facts) == {
        "counted",
        "measured",
        "extrapolated",
        "not_planned",
    }
