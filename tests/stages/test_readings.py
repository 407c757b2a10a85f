"""Readings from their files to a student that reads them: added, held out, drawn, resumed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages import distill, shard, split, start
from stages.learning.reading_rows import ReadingRows
from stages.learning.token_rows import token_rows
from stages.models.encoder import Encoder
from stages.models.loading import load_model
from stages.params import DistillParams, ShardParams, SplitParams, StartParams
from storage.caches import Caches
from storage.corpus import Corpus, text_key
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.manifest import Manifest
from storage.readings import Readings
from storage.split import Split
from tests.conftest import WORDS, HashTeacher, Place, sentences
from tests.stages.test_distill import CPU, recipe

SETTINGS = {
    "sources": ["*.txt"],
    "field": "text",
    "rows_per_shard": 32,
    "min_chars": 8,
    "max_chars": 200,
}


class Tree:
    """A work tree whose texts and readings are cut into shards."""

    def __init__(self, place, texts, pairs, **changes):
        self.place, self.root = place, place.root
        self.params = ShardParams(**SETTINGS | changes)
        self.distill = DistillParams(readings="*.tsv")
        (self.root / "a.txt").write_text("".join(f"{text}\n" for text in texts))
        (self.root / "pairs.tsv").write_text("".join("\t".join(pair) + "\n" for pair in pairs))

    def run(self, **changes):
        return shard.run(
            self.params,
            root=self.root,
            store=self.place.store,
            out=self.root / "corpus.json",
            facts=self.root / "facts.json",
            **{"distill": self.distill, "readings": self.root / "readings.json"} | changes,
        )

    @property
    def corpus(self):
        return Corpus(self.place.store, Manifest.load(self.root / "corpus.json", "corpus"))

    @property
    def readings(self):
        manifest = Manifest.load(self.root / "readings.json", "readings")
        return Readings(self.place.store, manifest, self.corpus)

    def texts(self):
        return self.corpus.take(np.arange(self.corpus.rows))

    def pairs(self):
        readings = self.readings
        texts = self.corpus.take(readings.rows_read())
        return list(zip(texts, readings.take(np.arange(readings.rows)), strict=True))


ENGLISH, FOREIGN = WORDS[:25], WORDS[25:50]
"""Two halves of what the tiny model's tokenizer knows; to its random weights both are foreign."""


def english(count):
    """`count` distinct texts of 4 to 9 words of the first half."""
    draw, found = np.random.default_rng(0), {}
    while len(found) < count:
        found.setdefault(" ".join(draw.choice(ENGLISH, size=draw.integers(4, 10))))
    return list(found)


def translated(text):
    """Word by word into a word of the second half, the last word first."""
    return " ".join(FOREIGN[ENGLISH.index(word)] for word in reversed(text.split()))


def test_texts_that_the_corpus_lacks_are_added_behind_its_own(place):
    texts = sentences(80)
    pairs = [(text, f"ein {text}") for text in texts[20:]]
    tree = Tree(place, texts[:50], [*pairs, *pairs[:5], (texts[60], "noch einer")])
    outcome = tree.run()
    assert tree.texts() == texts
    assert tree.pairs() == [*pairs, (texts[60], "noch einer")]
    rules = dict.fromkeys(shard.RULES_OF_READINGS, 0)
    ledger = json.loads((tree.root / "facts.json").read_bytes())
    assert ledger["read"] == 50
    assert (ledger["kept"], ledger["added"]) == (80, 30)
    assert ledger["readings"] == {"read": 66, "kept": 61, "rejected": rules | {"duplicate": 5}}
    assert "80 texts in" in outcome.summary
    assert "50 read; 30 added by readings" in outcome.summary
    assert outcome.summary.endswith("; 61 readings (66 read; rejected: 5 duplicate)")


def test_readings_leave_the_shards_of_a_corpus_that_has_their_texts(place):
    texts = sentences(80)
    tree = Tree(place, texts, [(text, f"ein {text}") for text in texts])
    tree.run(distill=DistillParams(readings=None))
    alone = (tree.root / "corpus.json").read_bytes()
    assert Manifest.load(tree.root / "readings.json", "readings").objects == ()
    assert json.loads((tree.root / "facts.json").read_bytes()).keys() == {
        *("read", "kept", "rejected")
    }
    tree.run()
    assert (tree.root / "corpus.json").read_bytes() == alone


def test_pairs_are_rejected_by_the_rules_of_texts(place):
    texts = sentences(20)
    wrong = [
        (texts[0], ""),
        (texts[1], "a\x07b c"),
        ("short", "kurz und gut"),
        (texts[2], "x" * 300),
        ("y" * 300, "lang"),
        (texts[3], texts[3]),
        ("", "ohne Text"),
    ]
    tree = Tree(place, texts, [*wrong, (texts[4], "kurz")])
    tree.run()
    assert tree.pairs() == [(texts[4], "kurz")]
    assert tree.texts() == texts
    ledger = json.loads((tree.root / "facts.json").read_bytes())["readings"]
    assert {rule: count for rule, count in ledger["rejected"].items() if count} == {
        "control_characters": 1,
        "empty": 2,
        "too_short": 1,
        "too_long": 2,
        "unchanged": 1,
    }


def test_no_reading_left_is_said(place):
    texts = sentences(20)
    with pytest.raises(TeachonceError, match="no reading is left: 20 read; rejected: 20 unchanged"):
        Tree(place, texts, [(text, text) for text in texts]).run()


def test_lost_shards_of_both_kinds_are_made_again(place):
    texts = sentences(200)
    tree = Tree(place, texts[:100], [(text, f"ein {text}") for text in texts])
    tree.run()
    lost = [tree.corpus.objects[-1].key, tree.readings.objects[1].key]
    content = [tree.place.store.path(key).read_bytes() for key in lost]
    for key in lost:
        tree.place.store.path(key).unlink()
    again = shard.make_again(
        tree.params, root=tree.root, store=place.store, keys=lost, distill=tree.distill
    )
    assert again == []
    assert [tree.place.store.path(key).read_bytes() for key in lost] == content
    for source in tree.root.glob("*.txt"):
        source.unlink()  # they are not read for readings alone
    gone = [f"readings/{'0' * 40}.arrow"]
    assert gone == shard.make_again(
        tree.params, root=tree.root, store=place.store, keys=gone, distill=tree.distill
    )


def test_texts_of_a_role_are_added_to_it(place):
    texts = sentences(60)
    tree = Tree(place, [], [(text, f"wort {n}") for n, text in enumerate(texts[40:])])
    (tree.root / "a.txt").write_text("".join(f"{text}\n" for text in texts[:50]))
    tree.params = tree.params.model_copy(
        update={
            "sources": ShardParams(
                **SETTINGS | {"sources": [{"files": "a.txt", "role": "document"}]}
            ).sources
        }
    )
    tree.distill = DistillParams(readings=[{"files": "*.tsv", "role": "document"}])
    tree.run()
    assert tree.corpus.roles == ("document",)
    assert tree.texts() == texts
    assert [tree.readings.role_of(s) for s in range(len(tree.readings.objects))] == [
        "document"
    ] * len(tree.readings.objects)
    tree.distill = DistillParams(readings="*.tsv")
    tree.run()
    assert tree.corpus.roles == ("text", "document")
    assert tree.texts() == [*texts[40:], *texts[:50]]


def test_a_text_with_a_reading_in_an_evaluation_set_is_found_there(place):
    texts = sentences(60)
    tree = Tree(place, texts, [(texts[n], f"ein {texts[n]}") for n in (3, 9, 12)])
    tree.run()

    def found(readings):
        split.run(
            SplitParams(heldout=0.1),
            corpus=tree.corpus,
            readings=readings,
            evaluation=[texts[5], f"ein {texts[9]}"],
            out=tree.root / "split.json",
            facts=tree.root / "split-facts.json",
        )
        return Split.load(tree.root / "split.json", tree.corpus).evaluation

    assert found(None) == (5,)
    assert found(tree.readings) == (5, 9)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    """A corpus with a reading or two of three texts in four, embedded by a tiny transformer."""
    place = Place(tmp_path_factory.mktemp("world"))
    texts = english(400)
    pairs = [(text, translated(text)) for n, text in enumerate(texts) if n % 4]
    pairs += [(text, f"{translated(text)} again") for n, text in enumerate(texts) if n % 4 == 2]
    tree = Tree(place, texts, pairs)
    tree.run()
    teacher = Encoder(tiny_model, device=CPU, max_tokens=16)
    place.embed(tree.corpus, teacher.encode_counted)
    start.run(
        StartParams(**{"from": "teacher"}, layers=(0, 2)),
        name="half",
        folder=tiny_model,
        out=place.root / "half",
        trust_remote_code=False,
    )
    corpus = tree.corpus
    embeddings = Embeddings(place.store, place.embeddings, corpus)
    of = Split(corpus=corpus.manifest.content, heldout=0.1, evaluation=())
    tree.caches = Caches(corpus, embeddings, None, of, place.store, readings=tree.readings)
    return tree


def prepared(world, caches=None, **changes):
    return distill.prepare(
        recipe(**{"readings": 0.5} | changes),
        start=world.root / "half",
        caches=caches or world.caches,
        device=CPU,
    )


def slow_draw(readings, learned, rows, *, share, seed, step):
    """The definition: row by row, in dictionaries."""
    of_row = {}
    for reading, row in zip(learned, readings.rows_read()[learned], strict=True):
        of_row.setdefault(int(row), []).append(int(reading))
    having = [place for place, row in enumerate(rows) if int(row) in of_row]
    draw = np.random.default_rng([seed, step, 18])
    exact = share * len(having)
    count = int(exact) + (draw.random() >= 1 - (exact - int(exact)))
    places = sorted(draw.permutation(having)[:count].tolist())
    numbers = draw.integers(0, [len(of_row[int(rows[place])]) for place in places])
    return {
        place: of_row[int(rows[place])][number]
        for place, number in zip(places, numbers, strict=True)
    }


@pytest.mark.parametrize("share", [0.1, 0.5, 0.77, 1.0])
def test_the_draw_is_that_of_the_definition(world, share):
    task = prepared(world, readings=share)
    learned = world.readings.learned(task.caches.split)
    shares = []
    for step, rows in enumerate(task.setup().batches(0)):
        expected = slow_draw(world.readings, learned, rows, share=share, seed=0, step=step)
        places, ids = task.read.draw(rows, step)
        assert dict(zip(places.tolist(), ids.tolist(), strict=True)) == expected
        assert (world.readings.rows_read()[ids] == rows[places]).all()
        shares.append(len(places) / np.isin(rows, world.readings.rows_read()[learned]).sum())
    assert abs(np.mean(shares) - share) < 0.05


def test_the_student_reads_what_was_drawn_against_the_vectors_of_the_texts(world):
    task = prepared(world)
    rows = task.setup().batches(0)[3]
    places, ids = task.read.draw(rows, 3)
    texts = world.corpus.take(rows)
    for place, reading in zip(places, world.readings.take(ids), strict=True):
        texts[place] = reading
    student = Encoder(world.root / "half", device=CPU, max_tokens=16)
    with torch.no_grad():
        task.eval()
        ours = task.encode(rows, step=3, read=task.read).numpy()
        loss, _ = task.setup().loss(rows, 3)
    expected = student.encode_counted(texts).vectors
    assert np.abs(ours - expected).max() < 1e-5
    teacher = world.caches.embeddings.rows_of(rows)
    assert float(loss) == pytest.approx(((expected - teacher) ** 2).mean(), rel=1e-4)
    assert 0 < len(places) < len(rows)


def test_a_held_out_text_is_never_learned_under_any_reading(world):
    task = prepared(world, readings=1.0, epochs=3)
    split = world.caches.split
    heldout = set(world.corpus.take(split.heldout_rows(world.corpus)))
    kept = heldout | {reading for text, reading in world.pairs() if text in heldout}
    learned = set()
    for step in range(60):
        rows = task.setup().batches(step // 20)[step % 20]
        _, ids = task.read.draw(rows, step)
        learned |= {*world.corpus.take(rows), *world.readings.take(ids)}
    assert not learned & kept
    assert len(kept) > 50
    judged = set(world.readings.take(task.heldout_read.ids))
    assert judged <= kept
    assert judged


def test_the_score_reads_held_out_readings(world):
    task = prepared(world, readings=1.0)
    task.eval()
    rows = task.heldout
    places, ids = task.heldout_read.draw(rows, 0)
    texts = world.corpus.take(rows)
    for place, reading in zip(places, world.readings.take(ids), strict=True):
        texts[place] = reading
    ours = Encoder(world.root / "half", device=CPU, max_tokens=16).encode_counted(texts).vectors
    assert task.setup().score() == pytest.approx(
        distill.rank_agreement(ours, task.heldout_vectors), abs=1e-4
    )
    assert len(places) > len(rows) / 2


def train(world, params, name, caches=None):
    at = world.root
    return distill.run(
        params,
        name=name,
        start=at / "half",
        caches=caches or world.caches,
        device=CPU,
        work=at / "work",
        out=at / name,
        curve=at / f"{name}.csv",
        training=at / f"{name}.json",
        track=lambda row: None,
    )


def weights(folder):
    return {
        f"{path.relative_to(folder)}/{name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


class Killed(BaseException):
    """As a signal would, it passes every `except Exception`."""


def test_a_killed_run_ends_with_the_same_weights(world, monkeypatch):
    params = recipe(readings=0.5, epochs=2)
    train(world, params, "whole")
    from stages.learning import loop

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    draw, steps = ReadingRows.draw, []

    def dying(self, rows, step):
        if step == 17 and len(steps) < 30:
            raise Killed
        steps.append(step)
        return draw(self, rows, step)

    monkeypatch.setattr(ReadingRows, "draw", dying)
    with pytest.raises(Killed):
        train(world, params, "killed")
    steps.extend([0] * 30)
    train(world, params, "killed")
    assert {name: value.tolist() for name, value in weights(world.root / "killed").items()} == {
        name: value.tolist() for name, value in weights(world.root / "whole").items()
    }
    lineage = json.loads((world.root / "whole.json").read_bytes())
    assert lineage["readings"] == len(world.readings.learned(world.caches.split))


@pytest.mark.slow
def test_it_learns_to_read_a_language_that_its_teacher_never_saw(world):
    params = recipe(readings=0.5, epochs=12, learning_rate=3e-3)
    train(world, params, "student")
    ids = world.readings.heldout(world.caches.split)
    texts = world.corpus.take(world.readings.rows_read()[ids])
    readings = world.readings.take(ids)

    def found(name):
        """How many readings are nearer to their own texts than to all others."""
        encode = Encoder(world.root / name, device=CPU, max_tokens=16).encode_counted
        nearest = (encode(readings).vectors @ encode(texts).vectors.T).argmax(axis=1)
        return sum(texts[place] == text for place, text in zip(nearest, texts, strict=True))

    assert found("student") >= 5 > 2 * found("half")


def test_a_recipe_without_readings_is_what_it_was(world):
    assert "readings" not in distill.recipe(recipe())
    assert "readings" not in distill.recipe(recipe(readings=0.0))
    assert distill.recipe(recipe(readings=0.25))["readings"] == 0.25
    train(world, recipe(epochs=1), "plain", replace(world.caches, readings=None))
    train(world, recipe(epochs=1), "with")
    plain, other = weights(world.root / "plain"), weights(world.root / "with")
    assert all(bool((plain[name] == other[name]).all()) for name in plain)


def test_readings_of_nothing_to_train_on_are_refused(world):
    everything = Split(corpus=world.corpus.manifest.content, heldout=0.1, evaluation=())
    train_rows = everything.train_rows(world.corpus)
    of_readings = np.isin(train_rows, world.readings.rows_read())
    evaluation = tuple(int(row) for row in train_rows[of_readings])
    caches = replace(world.caches, split=everything.model_copy(update={"evaluation": evaluation}))
    with pytest.raises(
        TeachonceError, match=r"distill.readings: no reading is of a text to train on"
    ):
        prepared(world, caches)


def test_token_ids_of_readings_are_kept_in_the_store(world):
    prepared(world)
    model = load_model(world.root / "half", device=CPU, trust_remote_code=False)
    before = {
        path: path.stat().st_mtime_ns for path in (world.root / "store/tokens").rglob("*.arrow")
    }
    tokens = token_rows(
        model.tokenizer,
        world.root / "half",
        corpus=world.readings,
        store=world.place.store,
        max_tokens=16,
    )
    assert {
        path: path.stat().st_mtime_ns for path in (world.root / "store/tokens").rglob("*.arrow")
    } == before
    expected = model.tokenizer(world.pairs()[5][1], truncation=True, max_length=16)["input_ids"]
    assert tokens.rows_of(np.array([5]))[0].tolist() == expected
    assert text_key(world.pairs()[5][0]) == world.readings.text_keys[5].tobytes()


def test_a_teacher_is_asked_for_texts_alone(place):
    texts = sentences(60)
    tree = Tree(place, texts[:30], [(text, f"ein {text}") for text in texts])
    tree.run()
    teacher = HashTeacher()
    place.embed(tree.corpus, teacher)
    assert teacher.texts_seen == 60


def test_a_reading_stands_behind_the_prompt_of_its_text(world):
    folder = world.root / "half"
    tokenizer = load_model(folder, device=CPU, trust_remote_code=False).tokenizer
    settings = {"store": world.place.store, "max_tokens": 24, "prompts": {"text": "amber: "}}
    tokens = token_rows(tokenizer, folder, corpus=world.readings, **settings)
    of_texts = token_rows(tokenizer, folder, corpus=world.corpus, **settings)
    ids = np.arange(world.readings.rows)[::50]
    expected = [tokenizer(f"amber: {reading}")["input_ids"] for reading in world.readings.take(ids)]
    assert [row.tolist() for row in tokens.rows_of(ids)] == expected
    rows = world.readings.rows_read()[ids]
    assert tokens.prompt_tokens(ids).tolist() == of_texts.prompt_tokens(rows).tolist()
    assert tokens.prompt_tokens(ids).min() == 3
