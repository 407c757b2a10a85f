"""A small object of every kind, made by the code that makes real ones, and what stands in it."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from stages import embed, mine
from storage.column import text_keys_of
from storage.corpus import Corpus
from storage.embeddings import Embeddings, put_vectors
from storage.manifest import Manifest, fingerprint
from storage.negatives import Negatives, parent_of, put_negatives
from storage.split import Split
from storage.store import Object, Store
from storage.tokens import Tokens, put_tokens
from tests.conftest import HashTeacher, Place, embed_params, sentences

KINDS = ["text", "float16", "float32", "int8", "tokens", "negatives"]
FILES = {"model.safetensors": "0" * 64, "config.json": "1" * 64}


@dataclass(frozen=True)
class Sample:
    """An object in a store: how the store names it, where it lies, its bytes and its values."""

    entry: Object
    path: object
    content: bytes
    batch: pa.RecordBatch


def sample(root, kind, *, rows=12, seed=0):
    """One object of `kind` in the store `root`, of one text shard with `rows` rows."""
    place = Place(root)
    corpus = place.corpus(sentences(rows, seed=seed), rows_per_shard=4 * rows)
    (entry,) = put(place.store, kind, corpus)
    path = place.store.path(entry.key)
    path.chmod(0o644)
    content = path.read_bytes()
    # From a copy in memory: what is compared with must not change with the file.
    with pa.ipc.open_file(content) as reader:
        return Sample(entry, path, content, reader.get_batch(0))


def put(store, kind, corpus):
    """Objects of `kind` for every shard of a corpus."""
    if kind == "text":
        return list(corpus.objects)
    made = []
    for shard, keys in enumerate(map(text_keys_of, map(corpus.batch, range(len(corpus.objects))))):
        last = f"{corpus.shard_digest(shard)}.arrow"
        draw = np.random.default_rng(shard)
        rows = len(keys)
        if kind == "tokens":
            ids = [draw.integers(1, 99, draw.integers(1, 9)).tolist() for _ in range(rows)]
            made.append(put_tokens(store, f"tokens/{'b' * 40}/{last}", ids=[ids], text_keys=keys))
        elif kind == "negatives":
            made.append(
                put_negatives(
                    store,
                    f"negatives/{'c' * 40}/{shard:06}.arrow",
                    neighbours=draw.integers(0, corpus.rows, (rows, 3)),
                    scores=-np.sort(-draw.random((rows, 3), np.float32), axis=1),
                    text_keys=keys,
                    facts={"negatives": 3 * rows},
                )
            )
        else:
            name = fingerprint(embed.recipe(embed_params(storage=kind), FILES))
            made.append(
                put_vectors(
                    store,
                    f"vectors/{name}/{last}",
                    vectors=HashTeacher(8)(corpus.texts(shard)).vectors,
                    text_keys=keys,
                    storage=kind,
                    facts={"tokens": 5, "truncated": 0},
                )
            )
    return made


def finished(root, texts=None):
    """A place where a corpus was embedded and mined, with its three manifests."""
    place = Place(root)
    corpus = place.corpus(texts or sentences(40), rows_per_shard=16)
    place.embed(corpus, HashTeacher(8), files=FILES)
    mined(place, corpus, mine_params(), split_of(corpus))
    return place


def mined(place, corpus, params, split):
    """The manifest of the negatives of a place whose corpus was embedded."""
    import torch  # here: most children need none

    mine.run(
        params,
        corpus=corpus,
        embeddings=Embeddings(place.store, place.embeddings, corpus),
        split=split,
        store=place.store,
        device=torch.device("cpu"),
        out=place.root / "negatives.json",
        facts=place.root / "mine-facts.json",
    )
    return Manifest.load(place.root / "negatives.json", "negatives")


def mine_params(**changes):
    return mine.MineParams.model_validate(
        {
            "neighbours": 3,
            "range_min": 0,
            "range_max": 8,
            "max_score": 0.95,
            "min_score": None,
            "index": "flat",
            "min_recall": 0.9,
            "among": {"text": "text", "query": "document", "document": "document"},
            "memory_mb": 64,
            "pool": None,
            "most_hours": 12,
        }
        | changes
    )


def split_of(corpus):
    return Split(corpus=corpus.manifest.content, heldout=0.1, evaluation=())


def values(root):
    """Everything that training reads below `root`, through manifests and store, as bytes.

    A store of its own each time: it remembers nothing, as in a new process.
    """
    store = Store(root / "store")
    corpus = Corpus(store, Manifest.load(root / "corpus.json", "corpus"))
    embeddings = Embeddings(store, Manifest.load(root / "embeddings.json", "embeddings"), corpus)
    negatives = Negatives(
        store,
        Manifest.load(root / "negatives.json", "negatives"),
        corpus,
        mined_from=parent_of(embeddings.manifest, split_of(corpus)),
    )
    ids = np.arange(corpus.rows)
    neighbours, scores = negatives.rows_of(ids)
    return [
        corpus.take(ids),
        corpus.text_keys.tobytes(),
        embeddings.rows_of(ids).tobytes(),
        neighbours.tobytes(),
        scores.tobytes(),
    ]


def tokens_of(store, objects, corpus):
    return [row.tolist() for row in Tokens(store, objects, corpus).rows_of(np.arange(corpus.rows))]
