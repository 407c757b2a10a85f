"""`engine: ray`, on a real cluster of this machine. Needs the extra `ray`."""

import subprocess
import sys

import numpy as np
import pytest

from pipeline.workers.engine import ATTEMPTS, pool_engine
from stages.embed import FailedShardsError
from stages.params import RayParams
from storage.embeddings import Embeddings
from storage.errors import MissingError, TeachonceError
from storage.remote import Remote
from tests.conftest import HashTeacher, sentences
from tests.pipeline.test_engine import (
    DEADLY,
    POISON,
    Load,
    Mortal,
    Plainly,
    ReadsAhead,
    call,
    not_here,
    notes,
    shard_of,
)

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    # Ray's own, not ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def on_ray(workers=2, address=None):
    from pipeline.workers.actors import RayPool

    params = RayParams(address=address, num_gpus=0)
    return pool_engine(lambda load: RayPool(load, workers=workers, params=params))


@pytest.fixture
def seen(tmp_path):
    folder = tmp_path / "seen"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A cluster that was there before, and its address."""
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    port = 6399
    subprocess.run(
        [
            *command,
            "start",
            "--head",
            f"--port={port}",
            "--num-cpus=2",
            "--include-dashboard=false",
        ],
        check=True,
        capture_output=True,
    )
    yield f"127.0.0.1:{port}"
    subprocess.run([*command, "stop", "--force"], check=True, capture_output=True)


def test_actors_make_what_one_process_makes(place, tmp_path, seen):
    texts = sentences(600)
    alone = type(place)(tmp_path / "alone")
    alone.embed(alone.corpus(texts, rows_per_shard=32), HashTeacher())
    place.embed(place.corpus(texts, rows_per_shard=32), Load(Plainly, (seen,)), engine=on_ray())
    assert place.embeddings == alone.embeddings
    assert len(set(notes(seen, "asked"))) == 2


def test_actors_read_the_next_shard_while_they_encode_one(place, tmp_path, seen):
    texts = sentences(600)
    alone = type(place)(tmp_path / "alone")
    alone.embed(alone.corpus(texts, rows_per_shard=32), HashTeacher())
    corpus = place.corpus(texts, rows_per_shard=32)
    shards = len(corpus.objects)
    place.embed(corpus, Load(ReadsAhead, (seen, shards, 2)), engine=on_ray())
    assert place.embeddings == alone.embeddings
    assert len(notes(seen, "ahead=0")) + len(notes(seen, "ahead=1")) == shards > 6
    assert 1 <= len(notes(seen, "ahead=0")) <= 2


def test_one_actor_killed_and_one_shard_poisoned_on_a_cluster_that_was_there(place, seen, cluster):
    texts = [*sentences(600), POISON, *sentences(900)[600:], DEADLY]
    corpus = place.corpus(texts, rows_per_shard=32)
    poisoned, deadly = shard_of(corpus, POISON), shard_of(corpus, DEADLY)
    with pytest.raises(FailedShardsError, match=f"failed at 1 of {len(corpus.objects)}") as caught:
        place.embed(corpus, Load(Mortal, (seen, 1)), engine=on_ray(address=cluster))
    assert f"shard {poisoned} ({corpus.objects[poisoned].key}): 1 of" in caught.value.problem
    assert len(notes(seen, "died")) == 1
    assert poisoned != deadly
    later = HashTeacher()
    place.embed(corpus, later)
    assert later.texts_seen == corpus.objects[poisoned].rows
    vectors = Embeddings(place.store, place.embeddings, corpus).rows_of(np.arange(corpus.rows))
    assert np.array_equal(vectors, np.stack([HashTeacher().vector(text) for text in texts]))


def test_a_shard_that_kills_every_actor_is_named(place, seen, cluster):
    corpus = place.corpus([*sentences(200), DEADLY], rows_per_shard=32)
    with pytest.raises(FailedShardsError, match=f"{ATTEMPTS} workers were lost at it") as caught:
        place.embed(corpus, Load(Mortal, (seen, 99)), engine=on_ray(address=cluster))
    assert f"shard {shard_of(corpus, DEADLY)} (" in caught.value.problem
    assert len(notes(seen, "died")) == ATTEMPTS


def test_what_an_actor_cannot_load_and_a_cluster_that_is_not_there(place, cluster):
    corpus = place.corpus(sentences(50))
    with pytest.raises(MissingError, match="not on this machine"):
        place.embed(corpus, Load(call, (not_here,)), engine=on_ray(address=cluster))
    with pytest.raises(TeachonceError, match=r"ray.address: 127.0.0.1:1: .*\n  cure: start it"):
        place.embed(corpus, Load(HashTeacher, ()), engine=on_ray(address="127.0.0.1:1"))


def test_with_a_remote_what_actors_made_is_there_too(place, seen, cluster, tmp_path):
    """Two boxes, each with a store of its own, and actors that see neither."""
    (tmp_path / "remote").mkdir()
    remote = Remote(str(tmp_path / "remote"))
    texts = sentences(300)
    place.embed(
        place.corpus(texts),
        Load(Plainly, (seen,)),
        engine=on_ray(address=cluster),
        remote=remote,
    )
    other = type(place)(tmp_path / "other")
    outcome = other.embed(other.corpus(texts), None, remote=remote)
    assert outcome.facts["shards_fetched"] == len(place.embeddings.objects)
    assert other.embeddings == place.embeddings


def test_workers_that_no_machine_has_room_for_are_not_waited_for(place):
    from pipeline.workers.actors import RayPool

    params = RayParams(address=None, num_gpus=1)
    engine = pool_engine(lambda load: RayPool(load, workers=1, params=params))
    with pytest.raises(TeachonceError, match="1 for each worker, but the cluster has 0 GPUs"):
        place.embed(place.corpus(sentences(50)), Load(HashTeacher, ()), engine=engine)
    assert not ray.is_initialized()
