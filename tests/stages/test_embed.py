"""The teacher pass: what is done once is never done again, and nothing wrong is stored."""

import os
import re
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress

import numpy as np
import pytest

from stages import embed
from stages.embed import FailedShardsError
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.errors import DamagedError, MissingError, StorageError, TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.store import Store
from tests.conftest import HashTeacher, Made, embed_params, is_probe, prompts, sentences

FILES = {"model.safetensors": "0" * 64, "config.json": "1" * 64}


class DiesAfter(HashTeacher):
    """A teacher whose machine is switched off in the middle of a run."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __call__(self, texts, role="text"):
        self.calls -= not is_probe(texts)
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().__call__(texts, role)


def test_vectors_are_the_teachers_row_by_row(place):
    texts = sentences(300)
    corpus = place.corpus(texts)
    teacher = HashTeacher()
    outcome = place.embed(corpus, teacher)
    vectors = Embeddings(place.store, place.embeddings, corpus).rows_of(np.arange(300))
    assert np.array_equal(vectors, np.stack([teacher.vector(text) for text in texts]))
    assert outcome.facts["texts"] == 300
    assert outcome.facts["tokens"] == sum(len(text.split()) for text in texts)


def test_a_run_that_died_goes_on_and_ends_with_the_same_bytes(place, tmp_path):
    corpus = place.corpus(sentences(400))
    first, rest = DiesAfter(calls=3), HashTeacher()
    with pytest.raises(KeyboardInterrupt):
        place.embed(corpus, first)
    outcome = place.embed(corpus, rest)
    assert outcome.facts["shards_found"] == 3
    assert first.texts_seen + rest.texts_seen == 400
    resumed = (place.root / "embeddings.json").read_bytes()

    whole = type(place)(tmp_path / "whole")
    whole.embed(whole.corpus(sentences(400)), HashTeacher())
    assert (whole.root / "embeddings.json").read_bytes() == resumed
    assert (whole.root / "embed-facts.json").read_bytes() == (
        place.root / "embed-facts.json"
    ).read_bytes()


def test_if_all_is_there_no_teacher_is_needed(place):
    corpus = place.corpus(sentences(100))
    place.embed(corpus, HashTeacher())
    before = (place.root / "embeddings.json").read_bytes()
    outcome = place.embed(corpus, None)
    assert outcome.facts["shards_embedded"] == 0
    assert (place.root / "embeddings.json").read_bytes() == before


def test_a_machine_without_the_teacher_says_which_shards_are_missing(place):
    corpus = place.corpus(sentences(200))
    with pytest.raises(KeyboardInterrupt):
        place.embed(corpus, DiesAfter(calls=1))
    with pytest.raises(
        MissingError, match=r"of \d+ shards are not in the store \(shards \d, \d"
    ) as error:
        place.embed(corpus, None)
    assert error.value.exit_code == 3
    assert not (place.root / "embeddings.json").exists()


def test_going_back_to_a_teacher_embeds_nothing(place):
    corpus = place.corpus(sentences(100))
    place.embed(corpus, HashTeacher(), files=FILES)
    first = (place.root / "embeddings.json").read_bytes()
    place.embed(corpus, HashTeacher(dim=8), files=FILES | {"config.json": "2" * 64})
    back = HashTeacher()
    place.embed(corpus, back, files=FILES)
    assert back.texts_seen == 0
    assert (place.root / "embeddings.json").read_bytes() == first


def test_growth_and_removal_embed_little(place):
    """Since shards are cut by content; texts of a shard that changed are embedded again here."""
    texts = sentences(6000)
    place.embed(place.corpus(texts), HashTeacher())
    new = [f"{text} And then some." for text in sentences(600, seed=3)]
    cases = {
        "at the end": ([*texts, *new], 0.15),
        "at the front": ([*new, *texts], 0.15),
        "one removed": (texts[:3000] + texts[3001:], 0.10),
    }
    for case, (changed, most) in cases.items():
        teacher = HashTeacher()
        place.embed(place.corpus(changed), teacher, params=embed_params(reuse=False))
        assert teacher.texts_seen / len(changed) <= most, case


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": prompts("query: ")},
        {"max_tokens": 33},
        {"precision": "bf16"},
        {"storage": "float16"},
        {"trust_remote_code": True},
    ],
)
def test_each_setting_of_the_recipe_changes_the_fingerprint(change):
    plain = fingerprint(embed.recipe(embed_params(), FILES))
    assert fingerprint(embed.recipe(embed_params(**change), FILES)) != plain


@pytest.mark.parametrize(
    "files",
    [
        FILES | {"config.json": "2" * 64},
        FILES | {"1_Pooling/config.json": "1" * 64},
        {"model.safetensors": "0" * 64},
    ],
)
def test_each_file_of_the_teacher_changes_the_fingerprint(files):
    plain = fingerprint(embed.recipe(embed_params(), FILES))
    assert fingerprint(embed.recipe(embed_params(), files)) != plain


@pytest.mark.parametrize(
    "change", [{"batch_tokens": 64}, {"reuse": False}, {"teacher": "b/mirror"}, {"revision": "v1"}]
)
def test_what_only_says_where_and_how_fast_does_not(change):
    plain = fingerprint(embed.recipe(embed_params(), FILES))
    assert fingerprint(embed.recipe(embed_params(**change), FILES)) == plain


def test_shards_that_another_worker_makes_meanwhile_are_not_made_twice(place):
    """A killed `dvc repro` leaves its embed running; the next one must not do its work again."""
    corpus = place.corpus(sentences(400))
    orphan = HashTeacher()

    class WithOrphan(HashTeacher):
        def __call__(self, texts, role="text"):
            if not orphan.texts_seen and not is_probe(texts):
                place.embed(corpus, orphan)
            return super().__call__(texts, role)

    successor = WithOrphan()
    outcome = place.embed(corpus, successor)
    assert orphan.texts_seen == 400
    assert outcome.facts["shards_embedded"] == 1
    assert outcome.facts["texts_embedded"] == successor.texts_seen < 400
    assert outcome.facts["shards_found"] == len(corpus.objects) - 1


def test_two_workers_on_one_store_seldom_make_the_same_shard(place):
    """Each takes the shards in an order of its own; in the same one they would make all of them twice."""
    corpus = place.corpus(sentences(2000), rows_per_shard=16)
    both = threading.Barrier(2)

    class InStep(HashTeacher):
        def __call__(self, texts, role="text"):
            with suppress(threading.BrokenBarrierError):
                both.wait(2)
            return super().__call__(texts, role)

    teachers = [InStep(), InStep()]
    threads = [threading.Thread(target=place.embed, args=(corpus, teacher)) for teacher in teachers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(corpus.objects) > 100
    assert sum(teacher.texts_seen for teacher in teachers) < 1.3 * 2000


@pytest.mark.parametrize(("poison", "said"), [(np.nan, "NaN"), (0.0, "zero")])
def test_poison_is_told_when_the_other_shards_are_done(place, poison, said):
    class Poisoned(HashTeacher):
        calls = 0

        def __call__(self, texts, role="text"):
            made = super().__call__(texts, role)
            self.calls += not is_probe(texts)
            if self.calls == 2 and not is_probe(texts):
                made.vectors[5] = poison
            return made

    corpus = place.corpus(sentences(300))
    with pytest.raises(
        FailedShardsError, match=f"1 of .* vectors are {said}.*: rows 5 of the shard"
    ):
        place.embed(corpus, Poisoned())
    # All but one, and the probe texts.
    assert len(list((place.root / "store/vectors").rglob("*.arrow"))) == len(corpus.objects)
    assert not (place.root / "embeddings.json").exists()


def test_a_teacher_that_loses_rows_is_refused(place):
    def forgetful(texts, role):
        return Made(np.ones((len(texts) - 1, 4), np.float32), tokens=1, truncated=0)

    with pytest.raises(TeachonceError, match="vectors for"):
        place.embed(place.corpus(sentences(50)), forgetful)


@pytest.mark.parametrize("finished", [1, 0])
def test_a_disk_that_is_too_small_is_told_before_the_pass(place, finished, monkeypatch):
    """The store has one shard of this teacher, or has none until the first is made."""
    # Which would refuse the counts of rows below.
    monkeypatch.setattr(Store, "open", lambda store, named: store.glance(named.key))
    corpus = place.corpus(sentences(300))
    if finished:
        place.embed(Corpus(place.store, manifest_of(corpus.objects[:1])), HashTeacher())
    # As far as the manifest says, what is left is larger than any disk, whichever comes first.
    left = corpus.objects[finished:2]
    vast = [entry.model_copy(update={"rows": 10**13 // len(left)}) for entry in left]
    grown = Corpus(place.store, manifest_of([*corpus.objects[:finished], *vast]))
    teacher = HashTeacher(dim=16)
    with pytest.raises(StorageError, match=r"[\d,]+ texts need about .* GB, and .* GB are") as e:
        place.embed(grown, teacher)
    assert teacher.texts_seen in ([0] if finished else [entry.rows for entry in left])
    assert e.value.where == str(place.root / "store")
    # 16 float32 and a key; the rest of a file is small beside its rows. One of two vast shards is made.
    need = float(re.search(r"about ([\d,.]+) GB", str(e.value))[1].replace(",", ""))
    assert 1.1 * 10**4 * (16 * 4 + 16) / len(left) < need < 2 * 1.1 * 10**4 * (16 * 4 + 16)
    assert len(list((place.root / "store/vectors").rglob("*.arrow"))) == 1 + 1  # the probe texts


def manifest_of(objects):
    return Manifest(kind="corpus", recipe={}, parent=None, objects=tuple(objects))


def test_rot_is_not_carried_into_a_fresh_manifest(place):
    corpus = place.corpus(sentences(200))
    place.embed(corpus, HashTeacher())
    path = place.store.path(place.embeddings.objects[1].key)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    (place.root / "embeddings.json").unlink()
    with pytest.raises(DamagedError, match=r"damaged.*sha256 differs"):
        place.embed(corpus, HashTeacher())
    assert not (place.root / "embeddings.json").exists()


def test_the_way_to_a_fake_teacher_imports_no_torch(tmp_path):
    """Fault tests start hundreds of processes, and `check` must answer in a second."""
    code = """
        import sys
        import stages.check, stages.embed, stages.shard, stages.split, pipeline.cli, pipeline.workspace
        heavy = {"torch", "transformers", "sentence_transformers", "faiss", "datasets"}
        print(sorted(heavy & set(sys.modules)))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert run.stdout.strip() == "[]"
