"""Identity: what changes vectors changes their name, what does not leaves it; a changed corpus is seen."""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from stages import embed, mine
from stages.models.folder import file_hashes, sha256_of
from stages.params import EmbedParams
from storage.corpus import Corpus, text_key
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.store import Store
from tests.conftest import HashTeacher, Place, embed_params, prompts, sentences
from tests.faults.samples import FILES, mine_params, mined, split_of

CHANGED = {
    "pooling": ["mean", "cls", "lasttoken"],
    "prompts": [prompts("query: "), prompts(" "), prompts("query:")],
    "max_tokens": [31, 33, 512],
    "precision": ["bf16", "fp16"],
    "storage": ["float16", "int8"],
    "dim": [1, 8],
    "long_texts": ["windows"],
    "trust_remote_code": [True],
}
SPEED = {
    "similarity": ["cosine"],  # how vectors are compared, not what they are
    "batch_tokens": [1, 511, 1 << 20],
    "reuse": [True, False],
    # The teacher stands in a recipe by the hashes of its files, not by its name.
    "teacher": ["b/mirror", "/elsewhere/teacher", "package:x/y"],
    "revision": ["main", "0" * 40],
    # Mixes are objects of their own, beside the vectors.
    "mixes": [0.5, 1.0],
    # Read of a teacher behind an API alone.
    "api": [embed_params().api.model_dump() | {"url": "https://a.server/v1", "dimensions": 8}],
}


def test_every_setting_of_embed_is_judged():
    assert {*CHANGED, *SPEED} == set(EmbedParams.model_fields)
    made_of = embed.recipe(embed_params(dim=8, long_texts="windows", pooling="cls"), FILES)
    assert {*CHANGED, "teacher", "version"} - {"prompts"} | {"prompt"} == set(made_of)


def test_each_setting_that_changes_vectors_changes_their_name(count):
    names = {fingerprint(embed.recipe(embed_params(), FILES))}
    for setting, values in CHANGED.items():
        names |= {fingerprint(embed.recipe(embed_params(**{setting: v}), FILES)) for v in values}
    tried = sum(map(len, CHANGED.values()))
    assert len(names) == 1 + tried
    count("changes of what decides vectors, lists, tokens or weights", tried, "has the old name")


def test_no_setting_of_speed_or_place_changes_a_name(count):
    name = fingerprint(embed.recipe(embed_params(), FILES))
    for setting, values in SPEED.items():
        for value in values:
            assert fingerprint(embed.recipe(embed_params(**{setting: value}), FILES)) == name
    assert fingerprint(embed.recipe(embed_params(), dict(reversed(FILES.items())))) == name
    # "" says of a model without prompts what null says.
    assert fingerprint(embed.recipe(embed_params(prompts=prompts(None)), FILES)) == name
    count("changes of speed and place", 1 + sum(map(len, SPEED.values())), "has a new name")


def test_each_file_of_a_model_by_content(tiny_model, tmp_path, count):
    """Every file that the loader reads: one bit, its loss, another name; but not the folder's place."""

    def name_of(folder):
        files = file_hashes(folder, address="embed.teacher", sha256=sha256_of)
        return fingerprint(embed.recipe(embed_params(), files)), files

    folder = shutil.copytree(tiny_model, tmp_path / "a")
    name, files = name_of(folder)
    assert name_of(shutil.copytree(tiny_model, tmp_path / "b/c"))[0] == name
    read = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert {path.as_posix() for path in read} == set(files)
    names = {name}
    tried = 0
    for file in files:
        path = folder / file
        whole = path.read_bytes()
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        spaced = whole.replace(b" ", b"  ", 1)
        changed = spaced if file == "modules.json" else flipped  # it must stay readable
        assert changed != whole
        path.write_bytes(changed)
        names.add(name_of(folder)[0])
        tried += 1
        path.write_bytes(whole)
    for added in (
        "added_tokens.json",
        "1_Pooling/more.json",
        "merges.txt",
        "x.model",
        "code.py",
        "t.jinja",
    ):
        (folder / added).parent.mkdir(exist_ok=True)
        (folder / added).write_text("{}")
        names.add(name_of(folder)[0])
        (folder / added).unlink()
        tried += 1
    assert len(names) == 1 + tried
    for unread in (
        *("README.md", "training_args.bin", "onnx/config.json", "x.png"),
        *("2_Dense/config.json", "eval/a.json", "trainer_state.json"),  # no module is in 2_Dense
    ):
        (folder / unread).parent.mkdir(exist_ok=True)
        (folder / unread).write_text("{}")
        assert name_of(folder)[0] == name
    os.utime(folder / "config.json", (0, 0))
    assert name_of(folder)[0] == name
    count("changes of what decides vectors, lists, tokens or weights", tried, "has the old name")
    count("changes of speed and place", 6, "has a new name")


def test_versions_are_part_of_names(monkeypatch, count):
    names = set()
    for version in (1, 2):
        monkeypatch.setattr(embed, "VERSION", version)
        monkeypatch.setattr(mine, "VERSION", version)
        names.add(fingerprint(embed.recipe(embed_params(), FILES)))
        names.add(fingerprint(mine.recipe(mine_params())))
    assert len(names) == 4
    count("changes of what decides vectors, lists, tokens or weights", 2, "has the old name")


def test_names_of_mined_lists(tmp_path, count):
    place = Place(tmp_path)
    corpus = place.corpus(sentences(60), rows_per_shard=16)
    place.embed(corpus, HashTeacher(8), files=FILES)

    def keys(split=None, **changes):
        params = mine_params().model_copy(update=changes)
        manifest = mined(place, corpus, params, split or split_of(corpus))
        return {entry.key for entry in manifest.objects}

    plain = keys()
    assert keys(memory_mb=128) == keys(min_recall=0.5) == keys(index="auto") == plain
    indexed = [mine.recipe(mine_params(), {"name": name}) for name in ("ivf", "hnsw", "hnsw-sq8")]
    assert len({fingerprint(made_of) for made_of in [mine.recipe(mine_params()), *indexed]}) == 4
    changes = {"neighbours": 4, "range_min": 1, "range_max": 9, "max_score": 0.9, "min_score": 0.1}
    changes |= {"pool": 9}
    unnamed = {"memory_mb", "most_hours", "min_recall", "index", "among"}
    assert {*changes, *unnamed} == set(mine.MineParams.model_fields)
    seen = [plain, *(keys(**{name: value}) for name, value in changes.items())]
    seen.append(keys(split_of(corpus).model_copy(update={"heldout": 0.2})))
    seen.append(keys(split_of(corpus).model_copy(update={"evaluation": (3,)})))
    place.embed(corpus, HashTeacher(8, scale=2.0), files=FILES | {"config.json": "3" * 64})
    seen.append(keys())
    assert sum(map(len, seen)) == len(set().union(*seen))
    count(
        "changes of what decides vectors, lists, tokens or weights",
        len(seen) - 1,
        "has the old name",
    )
    count("changes of speed and place", 1, "has a new name")


def test_names_of_token_ids(tiny_model, tmp_path, count):
    from transformers import AutoTokenizer

    from stages.learning.token_rows import token_rows

    corpus = Place(tmp_path).corpus(sentences(20))

    def name(folder, max_tokens=32):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = token_rows(
            tokenizer, folder, corpus=corpus, store=Store(tmp_path / "store"), max_tokens=max_tokens
        )
        return rows.objects[0].key.split("/")[1]

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    plain = name(folder)
    (folder / "model.safetensors").touch()
    (folder / "teachonce.json").write_text("{}")
    assert name(shutil.copytree(folder, tmp_path / "moved")) == plain
    seen = {plain, name(folder, max_tokens=31)}
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / file
        content = path.read_text()
        path.write_text(content.replace("\n", " \n", 1))
        assert path.read_text() != content
        seen.add(name(folder))
        path.write_text(content)

    class Slow:
        """A tokenizer without tokenizer.json, such as those of Japanese BERTs."""

        vocab_files_names = {"vocab_file": "vocab.txt", "merges_file": "merges.txt"}  # noqa: RUF012

        def __call__(self, texts, **_):
            return {"input_ids": [[1, 2]] * len(texts)}

    def slow(**files):
        for file, content in files.items():
            (folder / f"{file}.txt").write_text(content)
        rows = token_rows(
            Slow(), folder, corpus=corpus, store=Store(tmp_path / "store"), max_tokens=32
        )
        return rows.objects[0].key.split("/")[1]

    seen |= {slow(vocab="a", merges="b"), slow(vocab="c"), slow(merges="c")}
    assert len(seen) == 7
    count("changes of what decides vectors, lists, tokens or weights", 6, "has the old name")
    count("changes of speed and place", 3, "has a new name")


GOLDEN = {
    "embed": "edbc25bfde32101ecab95ed0f1997099c7e1c029",
    "mine": "f7c891b33f72475ba91a538f0b341dfa04b64303",
    "text": "c1a1fe4c090b23aa4753cb525d6d73a52055fe86",
    "key": "706860d9e8c7ee1c65261bc1e5b75631",
}

CODE = """
import json
from stages import embed, mine
from storage.corpus import text_digest, text_key
from storage.manifest import fingerprint
from tests.conftest import embed_params
from tests.faults.samples import FILES, mine_params
print(json.dumps({
    "embed": fingerprint(embed.recipe(embed_params(), FILES)),
    "mine": fingerprint({**mine.recipe(mine_params()), "parent": "p"}),
    "text": text_digest(["a", "\\u00e9 b", ""]),
    "key": text_key("a text").hex(),
}))
"""


def test_names_are_the_same_in_every_process_and_release(count):
    """Golden: if one of these changes, everybody's GPU months are thrown away."""
    seeds = ["0", "1", "4294967295", "random"]
    for seed in seeds:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C", "TZ": "Asia/Tokyo"}
        run = subprocess.run(
            [sys.executable, "-c", CODE],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        assert json.loads(run.stdout) == GOLDEN
    count("golden names in processes of other hash seeds", len(seeds), "differs")


# ------------------------------------------------------------------------------ edits of the corpus


def edit(draw, texts):
    """Another corpus: a word, a row, an order, ends of lines, letters that look alike."""
    texts = list(texts)
    row, other = draw.sample(range(len(texts)), 2)
    ways = [
        lambda: texts.__setitem__(row, texts[row].replace(" ", "  ", 1)),
        lambda: texts.__setitem__(row, f"{texts[row]}\r"),
        lambda: texts.__setitem__(row, texts[row].replace("a", "\u0430", 1) + "!"),
        lambda: texts.__setitem__(row, texts[row].lower()),
        lambda: texts.__setitem__(row, " ".join(reversed(texts[row].split()))),
        lambda: texts.insert(row, f"An inserted row {draw.random()}."),
        lambda: texts.insert(row, texts[other]),
        lambda: texts.pop(row),
        lambda: texts.__setitem__(slice(row, row + 3), []),
        lambda: texts.reverse(),
        lambda: texts.sort(),
        lambda: texts.append(texts.pop(row)),
        lambda: texts.__setitem__(slice(None), exchanged(texts, row, other)),
        lambda: texts.__setitem__(slice(None), [f"{text}\r" for text in texts]),
    ]
    draw.choice(ways)()
    return texts


def exchanged(texts, row, other):
    texts[row], texts[other] = texts[other], texts[row]
    return texts


@pytest.mark.parametrize("chunk", range(4))
def test_edits_of_the_corpus_after_embedding(tmp_path, chunk, times, count):
    """The old vectors are refused; new ones are made for changed shards only, each beside its own text."""
    texts = sentences(50, seed=chunk)
    place = Place(tmp_path)
    place.embed(place.corpus(texts, rows_per_shard=16), HashTeacher(4), files=FILES)
    old = place.embeddings
    draw = random.Random(chunk)
    teacher = HashTeacher(4)
    edits = 250 * times
    for _ in range(edits):
        while (changed := edit(draw, texts)) == texts:
            continue  # the last row was moved to the end
        corpus = place.corpus(changed, rows_per_shard=16)
        with pytest.raises(TeachonceError, match=r"made from another corpus: .* at shard"):
            Embeddings(place.store, old, corpus)
        forced = old.model_copy(update={"parent": corpus.manifest.content})
        with pytest.raises(TeachonceError):
            Embeddings(place.store, forced, corpus).rows_of(np.arange(corpus.rows))
        place.embed(corpus, teacher, files=FILES)
        corpus = Corpus(place.store, Manifest.load(tmp_path / "corpus.json", "corpus"))
        vectors = Embeddings(place.store, place.embeddings, corpus).rows_of(np.arange(corpus.rows))
        row = draw.randrange(corpus.rows)
        assert corpus.take(np.arange(corpus.rows)) == changed
        assert np.array_equal(vectors[row], teacher.vector(changed[row]))
        assert [key.tobytes() for key in corpus.text_keys] == [text_key(text) for text in changed]
    count("edits of the corpus after embedding", edits, "read with vectors of other texts")
