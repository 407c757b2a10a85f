"""Real parts for tests: a store, a corpus, a hash-based teacher, a tiny transformer on disk."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# It wins over every `store`: without this, the tests would write into that of whoever runs them.
os.environ.pop("TEACHONCE_STORE", None)

from stages import embed
from stages.params import EmbedParams, ExportParams
from storage.corpus import Corpus, cut, put_texts
from storage.manifest import Manifest, fingerprint
from storage.probe import PROBE_TEXTS, probe_key
from storage.store import FORMAT, HEADER, Header, Store, payload_sha256


def shipped_settings():
    """What params.yaml holds, with the students that begin with half of the teacher's layers alone.

    The starts of the demo's other students need more tokens than a tiny teacher has.
    """
    settings = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text("utf-8"))
    settings["starts"] = {"half": settings["starts"]["half"]}
    settings["students"] = {name: settings["students"][name] for name in ("kd", "ckd")}
    settings["export"] |= {"also": [], "formats": ["safetensors"]}
    return settings


def pytest_configure():
    """Hypothesis measures no time: its 200 ms for an example are over on a machine that is busy."""
    from hypothesis import HealthCheck, settings  # here: children of tests import this module, too

    settings.register_profile(
        "any machine",
        settings(),  # CI's own, where that is set
        deadline=None,
        suppress_health_check=[*settings().suppress_health_check, HealthCheck.too_slow],
    )
    settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _levels_of_logging():
    """What a test sets for the whole process, as `-v` does, ends with the test."""
    loggers = [logging.getLogger(), logging.getLogger("teachonce")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)  # it also forgets which levels were asked for


LEXICON = """
amber basin cedar delta ember fjord glade harbor island jungle kettle lantern meadow nectar orchard
pepper quarry river saddle timber umbrella valley willow yellow zephyr anchor bridge candle desert
engine forest garden hammer insect jacket kitchen ladder mirror needle oyster pencil quiver rocket
silver tunnel uncle violin window yogurt zipper
"""
WORDS = LEXICON.split()


def sentences(count, *, seed=0):
    """`count` distinct sentences of 4 to 12 words."""
    draw = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        words = draw.choice(WORDS, size=draw.integers(4, 13))
        found.setdefault(" ".join(words).capitalize() + ".")
    return list(found)


class HashTeacher:
    """A teacher whose vector of a text is a function of its bytes; counts what it was asked of a corpus."""

    def __init__(self, dim=16, *, scale=1.0):
        self.dim, self.scale, self.texts_seen = dim, scale, 0

    def __call__(self, texts, role="text"):
        self.texts_seen += 0 if is_probe(texts) else len(texts)
        vectors = np.stack([self.vector(text) for text in texts])
        tokens = sum(len(text.split()) for text in texts)
        return Made(vectors, tokens=tokens, truncated=0)

    def vector(self, text):
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        vector = np.random.default_rng(seed).normal(size=self.dim).astype(np.float32)
        return self.scale * vector / np.linalg.norm(vector)


def is_probe(texts):
    """Whether a teacher is asked for the probe texts, which is once when it is loaded."""
    return tuple(texts) == PROBE_TEXTS


def probe_of(embeddings):
    """The key of the probe texts' vectors beside those that a manifest names."""
    return probe_key(fingerprint(embeddings.recipe))


@dataclass
class Made:
    vectors: np.ndarray
    tokens: int
    truncated: int
    whole: np.ndarray | None = None

    def __post_init__(self):
        if self.whole is None:
            self.whole = self.vectors


def put_foreign(store, key, batch):
    """What another program could leave under a key: true to its own sha256, of any columns."""
    sha256 = payload_sha256(key, batch, {})
    header = Header(format=FORMAT, key=key, rows=len(batch), facts={}, sha256=sha256)
    schema = batch.schema.with_metadata({HEADER: header.model_dump_json().encode()})
    store.path(key).parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_file(str(store.path(key)), schema) as writer:
        writer.write_batch(batch)


def prompts(text, query=None, document=None):
    """The setting `embed.prompts`."""
    return {"text": text, "query": query, "document": document}


def exporting(out, *formats, model="kd", space="teacher", max_loss=0.01, comparison=None):
    """What `export.run` takes beside the student; without a comparison nothing is measured."""
    from stages.measuring.loss import Comparison

    params = ExportParams(
        model=model, also=(), space=space, formats=formats or ("safetensors",), max_loss=max_loss
    )
    return {
        "params": params,
        "out": out,
        "results": out.parent / f"{out.name}-formats.json",
        "comparison": comparison or Comparison(lambda name, form: {}, lambda: []),
    }


def embed_params(**changes):
    return EmbedParams.model_validate(
        {
            "teacher": "a/teacher",
            "revision": None,
            "pooling": None,
            "prompts": prompts(""),
            "similarity": None,
            "max_tokens": 32,
            "long_texts": "cut",
            "precision": "fp32",
            "storage": "float32",
            "dim": None,
            "mixes": 0,
            "trust_remote_code": False,
            "reuse": True,
            "batch_tokens": 512,
            "api": {
                "url": None,
                "key_env": None,
                "dimensions": None,
                "input_type": {"text": None, "query": None, "document": None},
                "tokenizer": None,
                "batch_texts": 64,
                "concurrency": 4,
                "requests_per_minute": None,
                "tokens_per_minute": None,
                "price_per_million_tokens": None,
                "budget": None,
                "timeout": 60,
            },
        }
        | changes
    )


@dataclass
class Place:
    """A folder with a store, and the few steps that most tests begin with."""

    root: Path

    @property
    def store(self):
        """A store that remembers nothing: each use is a new process's."""
        return Store(self.root / "store")

    def corpus(self, texts, *, rows_per_shard=64):
        """Of texts, or of a mapping of a role to its texts."""
        texts_of = texts if isinstance(texts, dict) else {"text": texts}
        objects = [
            put_texts(self.store, shard, role)
            for role, texts in texts_of.items()
            for shard in cut(texts, rows_per_shard, role)
        ]
        manifest = Manifest(kind="corpus", recipe={}, parent=None, objects=tuple(objects))
        manifest.save(self.root / "corpus.json", self.store)
        return Corpus(self.store, manifest)

    def embed(self, corpus, teacher, *, files=None, params=None, remote=None, **where):
        """With an engine, `teacher` is what loads one."""
        return embed.run(
            params or embed_params(),
            files=files or {"model.safetensors": "0" * 64},
            corpus=corpus,
            store=self.store,
            remote=remote,
            load_teacher=teacher if teacher is None or "engine" in where else lambda: teacher,
            out=self.root / "embeddings.json",
            facts=self.root / "embed-facts.json",
            **where,
        )

    @property
    def embeddings(self):
        return Manifest.load(self.root / "embeddings.json", "embeddings")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A BERT of 4 layers and 32 dimensions with random weights, as a sentence-transformers folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_model(folder)


def make_tiny_model(folder, *, layers=4, width=32, seed=0, normalize=True):
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *WORDS, *".,:;!?()'-", *[chr(c) for c in range(97, 123)]]
    pieces += [f"##{chr(c)}" for c in range(97, 123)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(
        zip(
            ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True
        )
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    body = folder.parent / f"{folder.name}-body"
    BertModel(config).save_pretrained(body)
    tokenizer.save_pretrained(body)
    modules = [Transformer(str(body), max_seq_length=64), Pooling(width, pooling_mode="mean")]
    if normalize:
        modules.append(Normalize())
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder


class MixingTeacher(HashTeacher):
    """It reads mixes, too: between the vectors of both texts, and never of length 1."""

    mixes_seen = 0

    def encode_mixed(self, mixed):
        self.mixes_seen += len(mixed.first)
        rows = zip(mixed.first, mixed.second, mixed.ratio, strict=True)
        return Made(
            np.stack([self.mix(*row) for row in rows]), tokens=len(mixed.first), truncated=0
        )

    def mix(self, first, second, ratio):
        return ratio * self.vector(first) + (1 - ratio) * self.vector(second)
