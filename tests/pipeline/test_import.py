"""Vectors that somebody has already: taken by text, never by luck, and honest about what nobody knows."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from stages import embed
from stages.params import IMPORTED
from stages.teaching import vector_files
from storage.corpus import Corpus
from storage.embeddings import Embeddings
from storage.errors import MissingError, TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.store import Store
from tests.conftest import HashTeacher, embed_params, sentences, shipped_settings

ROOT = Path(__file__).parents[2]
PARAMS = embed_params(teacher="imported:abroad")
FIELD = "text"
FILES = {"imported": "abroad", "dim": "16"}


def write(folder, texts, vectors, *, name="texts.txt"):
    lines = texts if name.endswith(".txt") else [json.dumps({FIELD: text}) for text in texts]
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    np.save(folder / "vectors.npy", vectors)
    return folder / "vectors.npy", folder / name


def vectors_for(texts):
    teacher = HashTeacher()
    return np.stack([teacher.vector(text) for text in texts])


def import_into(place, corpus, vectors, texts, *, params=PARAMS):
    given = vector_files.read(vectors, texts, field=FIELD)
    teacher = fingerprint(embed.recipe(params, FILES))
    vector_files.put(
        given, corpus=corpus, store=place.store, teacher=teacher, storage=params.storage
    )
    return given


def embedded(place, corpus, *, params=PARAMS):
    """What `embed` finds without a teacher."""
    place.embed(corpus, None, files=FILES, params=params)
    return Embeddings(place.store, place.embeddings, corpus).rows_of(np.arange(corpus.rows))


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_each_text_gets_its_own_vector(place, name):
    """The corpus is in another order; the file has more, a blank line and texts to be stripped."""
    texts = sentences(300)
    corpus = place.corpus(texts[200::-1])
    lines = [*texts[:50], "", *(f"  {text}\t" for text in texts[50:])]
    vectors = vectors_for([line.strip() for line in lines])
    import_into(place, corpus, *write(place.root, lines, vectors, name=name))
    assert np.array_equal(embedded(place, corpus), vectors_for(texts[200::-1]))


def test_a_text_may_stand_twice_with_one_vector_but_not_with_two(place):
    texts = sentences(40)
    corpus = place.corpus(texts)
    vectors = vectors_for(texts)
    rounded = vectors.astype(np.float16).astype(np.float32)
    import_into(
        place, corpus, *write(place.root, [*texts, *texts], np.concatenate([vectors, rounded]))
    )
    assert np.array_equal(embedded(place, corpus), vectors)
    for other in (np.roll(rounded, 1, axis=1), 1.01 * rounded):
        rounded[3] = other[3]
        files = write(place.root, [*texts, *texts], np.concatenate([vectors, rounded]))
        with pytest.raises(TeachonceError, match="rows 3 and 43, counted from 0, are two vectors"):
            vector_files.read(*files, field=FIELD)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_of_any_width_are_taken(place, dtype):
    texts = sentences(40)
    corpus = place.corpus(texts)
    vectors = np.asfortranarray(vectors_for(texts).astype(dtype))
    import_into(place, corpus, *write(place.root, texts, vectors))
    assert np.array_equal(embedded(place, corpus), vectors.astype(np.float32))


def test_the_recipe_says_what_is_not_known(place):
    texts = sentences(40)
    corpus = place.corpus(texts)
    import_into(place, corpus, *write(place.root, texts, vectors_for(texts)))
    embedded(place, corpus)
    assert place.embeddings.recipe == {
        "version": embed.VERSION,
        "teacher": FILES,
        "storage": "float32",
        **dict.fromkeys(["model", "prompt", "pooling", "max_tokens", "precision"], "unknown"),
    }
    facts = json.loads((place.root / "embed-facts.json").read_bytes())
    assert facts == {"texts": 40, "tokens": 0, "truncated": 0, "uncounted": 40}


def test_a_smaller_corpus_later_needs_neither_file(place):
    texts = sentences(200)
    corpus = place.corpus(texts)
    import_into(place, corpus, *write(place.root, texts, vectors_for(texts)))
    smaller = place.corpus(texts[150:20:-1])
    assert np.array_equal(embedded(place, smaller), vectors_for(texts[150:20:-1]))
    larger = place.corpus([*texts, "This text has no vector yet."])
    with pytest.raises(MissingError, match=r"its vectors were imported\n.*teachonce import"):
        embedded(place, larger)


def test_a_text_without_a_vector_is_named_and_all_others_are_kept(place):
    texts = sentences(100)
    corpus = place.corpus(texts)
    some = [text for row, text in enumerate(texts) if row not in (7, 70)]
    files = write(place.root, some, vectors_for(some))
    with pytest.raises(MissingError) as error:
        import_into(place, corpus, *files)
    assert str(error.value) == (
        f"{files[1]}: 2 of 100 texts of the corpus are not in it, and were not imported before under this "
        f"name: rows 7, 70 of the corpus, the first is {texts[7]!r}\n"
        "  cure: import these texts and their vectors, too (those of this file are kept), or take them out "
        "of `shard.sources` and run `teachonce shard`"
    )
    rest = [texts[70], texts[7]]
    import_into(place, corpus, *write(place.root, rest, vectors_for(rest)))
    assert np.array_equal(embedded(place, corpus), vectors_for(texts))


# Parts of 200 texts, in the order in which they are imported; the last of them completes the corpus.
ALL, FIRST, LAST, MIDDLE, FEW = (
    slice(0, 200), slice(0, 100), slice(100, 200), slice(50, 150), slice(160, 170),
)  # fmt: skip


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize(
    "parts",
    [
        [ALL, FEW, ALL],
        [FIRST, LAST],
        [LAST, FIRST],
        [FEW, MIDDLE, LAST, FIRST],
        [MIDDLE, FEW, MIDDLE, ALL],
    ],
)
def test_imports_of_one_name_add_up_in_any_order(place, tmp_path, parts, storage):
    texts = sentences(200)
    params = embed_params(teacher="imported:abroad", storage=storage)
    vectors = vectors_for(texts)
    once = type(place)(tmp_path / "once")
    once.root.mkdir()
    import_into(once, once.corpus(texts), *write(once.root, texts, vectors), params=params)
    once.embed(once.corpus(texts), None, files=FILES, params=params)

    corpus, seen = place.corpus(texts), set()
    for part in parts:
        seen |= set(texts[part])
        files = write(place.root, texts[part][::-1], vectors[part][::-1])
        if len(seen) < 200:
            with pytest.raises(MissingError, match=f"{200 - len(seen)} of 200 texts of the corpus"):
                import_into(place, corpus, *files, params=params)
        else:
            import_into(place, corpus, *files, params=params)
    place.embed(corpus, None, files=FILES, params=params)
    assert (place.root / "embeddings.json").read_bytes() == (
        once.root / "embeddings.json"
    ).read_bytes()


def test_another_vector_of_a_text_that_was_imported_is_refused_with_its_row(place):
    texts = sentences(200)
    corpus = place.corpus(texts)
    vectors = vectors_for(texts)
    import_into(place, corpus, *write(place.root, texts, vectors))
    before = {path: path.read_bytes() for path in place.root.glob("store/vectors/*/*")}
    some = vectors[40:60].astype(np.float16)
    import_into(place, corpus, *write(place.root, texts[40:60], some))
    some[7] = some[8]
    files = write(place.root, texts[40:60], some)
    with pytest.raises(TeachonceError) as error:
        import_into(place, corpus, *files)
    assert str(error.value) == (
        f"{files[0]}: row 7, counted from 0, is another vector than its text had when it was imported "
        "before under this name\n"
        "  cure: write another name into embed.teacher (imported:NAME) and import all texts under it, or "
        "take this text out of the file"
    )
    assert {path: path.read_bytes() for path in place.root.glob("store/vectors/*/*")} == before


def test_a_corpus_that_grew_needs_the_vectors_of_its_new_texts_alone(place):
    texts = sentences(200)
    import_into(
        place, place.corpus(texts[:120]), *write(place.root, texts[:120], vectors_for(texts[:120]))
    )
    grown = place.corpus(texts[::-1])
    import_into(place, grown, *write(place.root, texts[120:], vectors_for(texts[120:])))
    assert np.array_equal(embedded(place, grown), vectors_for(texts[::-1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda vectors: vectors[:-1], "40 texts, but 39 vectors"),
        (lambda vectors: vectors[0], r"shape \(16,\), not"),
        (lambda vectors: vectors[None], r"shape \(1, 40, 16\), not"),
        (lambda vectors: vectors[:, :0], r"shape \(40, 0\), not"),
        (lambda vectors: (vectors * 99).astype(np.int8), "an array of int8"),
        (lambda vectors: vectors.astype(np.complex64), "an array of complex64"),
        (lambda vectors: vectors.astype(np.longdouble), "an array of float128"),
        (lambda vectors: vectors.astype(object), "no .npy file"),
        (lambda vectors: spoilt(vectors, np.nan), "NaN or Inf: rows 5, 9 of the file"),
        (lambda vectors: spoilt(vectors, 0), "zero: rows 5, 9 of the file"),
        (lambda vectors: spoilt(vectors.astype(float), 1e300), "NaN or Inf: rows 5, 9 of the"),
    ],
)
def test_what_is_no_vector_is_refused_with_its_place(place, change, said):
    texts = sentences(40)
    # Another order than the file's: rows are named as they stand in the file.
    corpus = place.corpus(texts[::-1], rows_per_shard=400)
    files = write(place.root, texts, change(vectors_for(texts)))
    with pytest.raises(TeachonceError, match=said):
        import_into(place, corpus, *files)
    assert not (place.root / "store/vectors").exists()


def archive():
    content = io.BytesIO()
    np.savez(content, np.eye(4))
    return content.getvalue()


def spoilt(vectors, value):
    vectors[[5, 9]] = value
    return vectors


def test_too_large_for_the_storage_names_the_setting(place):
    texts = sentences(40)
    corpus = place.corpus(texts)
    files = write(place.root, texts, vectors_for(texts) * 1e6)
    params = embed_params(teacher="imported:x", storage="float16")
    with pytest.raises(TeachonceError, match=r"too large for float16.*\n.*embed.storage: float32"):
        import_into(place, corpus, *files, params=params)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "no .npy file"),
        (lambda path: path.write_bytes(b""), "no .npy file"),
        (lambda path: path.write_text("not numbers\n"), "no .npy file"),
        (lambda path: path.write_bytes(archive()), "an archive"),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_a_file_that_is_no_array_is_refused(place, spoil, said):
    texts = sentences(40)
    vectors, lines = write(place.root, texts, vectors_for(texts))
    spoil(vectors)
    with pytest.raises(TeachonceError, match=said):
        vector_files.read(vectors, lines, field=FIELD)


def npy(description, body=bytes(40 * 16 * 4), version=(1, 0)):
    header = description.encode() + b"\n"
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + header + body


def described(shape, dtype="'<f4'", order=False):
    return f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy(described("(10**29, 16)")), "no .npy file"),
        (
            npy(described(f"({10**29}, 16)")),
            f"says {10**29:,} vectors of 16 numbers, which are 6,4",
        ),
        (npy(described(f"(40, {10**29})")), "and it has 2,560"),
        (npy(described("(41, 16)")), "are 2,624 bytes, and it has 2,560"),
        (npy(described("(39, 16)")), "are 2,496 bytes, and it has 2,560"),
        (npy(described("(-40, -16)")), r"shape \(-40, -16\), not"),
        (npy(described("(True, 16)")), r"shape \(True, 16\), not"),
        (npy(described("(40, 16, 1)")), r"shape \(40, 16, 1\), not"),
        (npy(described("()")), r"shape \(\), not"),
        (npy(described("(40.0, 16)")), "no .npy file"),
        (npy(described("(40, 16)", "'|b1'")), "an array of bool"),
        (npy(described("(40, 16)", "'<c8'")), "an array of complex64"),
        (npy(described("(40, 16)", "'|O'")), "an array of Python objects"),
        (npy(described("(40, 16)", "'<V4'")), "an array of |V4"),
        (npy(described("(40, 16)", "[('a', '<f4')]")), r"an array of \[\('a', '<f4'\)\]"),
        (npy(described("(40, 16)", "'|O,<f4'")), "no .npy file"),
        (npy(described("(40, 16)"), version=(9, 9)), "no .npy file: .*version"),
        (npy("{"), "no .npy file"),
        (npy("(" * 5000), "no .npy file"),
        (npy("exit()"), "no .npy file"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "no .npy file"),
    ],
)
def test_no_header_is_believed(place, content, said):
    texts = sentences(40)
    vectors, lines = write(place.root, texts, vectors_for(texts))
    vectors.write_bytes(content)
    with pytest.raises(TeachonceError, match=said):
        vector_files.read(vectors, lines, field=FIELD)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_vectors_are_read_in_either_order_of_values_and_of_bytes(place, dtype, order):
    texts = sentences(40)
    given = np.asarray(vectors_for(texts), dtype=dtype, order=order)
    found = vector_files.read(*write(place.root, texts, given), field=FIELD)
    assert found.vectors.dtype == given.dtype
    assert np.array_equal(found.vectors, given)


def test_a_file_of_texts_that_nobody_reads_is_refused(place):
    texts = sentences(40)
    vectors, lines = write(place.root, texts, vectors_for(texts))
    lines.rename(lines.with_suffix(".doc"))
    with pytest.raises(TeachonceError, match="nothing reads that ending"):
        vector_files.read(vectors, lines.with_suffix(".doc"), field=FIELD)
    with pytest.raises(MissingError, match="no such file"):
        vector_files.read(vectors, lines, field=FIELD)


# --- by commands


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    params = shipped_settings()
    params |= {"store": "../store", "starts": {"half": {"from": "./small", "layers": None}}}
    params["docs"]["packages"] = []
    params["shard"] |= {"sources": ["texts.txt"], "rows_per_shard": 64}
    params["embed"]["teacher"] = f"{IMPORTED}abroad"
    params["evaluate"] |= {"sts": {}, "retrieval": {}, "speed_texts": 16}
    params["finetune"] |= {"students": [], "triplets": []}
    params["export"]["model"] = "kd"
    save(folder, params)
    texts = sentences(300)
    vectors, _ = write(folder, texts, vectors_for(texts))
    # A source with what `shard` takes out: a repeated text, one that is too short, blanks.
    (folder / "texts.txt").write_text(
        "\n".join([texts[0], "short", *texts, f" {texts[5]} "]) + "\n"
    )
    write(folder, texts, np.load(vectors), name="given.txt")
    return folder


def save(folder, params):
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def teachonce(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words], cwd=folder, capture_output=True, text=True
    )


def done(folder, *words):
    run = teachonce(folder, *words)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_from_texts_and_vectors_to_negatives_without_a_teacher(project, tiny_model):
    shutil.copytree(tiny_model, project / "small")
    done(project, "shard")
    run = teachonce(project, "check")
    assert run.returncode == 1
    assert "embed.teacher: nothing was imported as imported:abroad\n" in run.stderr
    assert "teachonce import VECTORS.npy TEXTS" in run.stderr
    said = done(project, "import", "vectors.npy", "given.txt")
    assert said.startswith(
        "import: 300 of 300 vectors of 16 numbers, for all texts of the corpus\n"
    )
    manifest = (project / "data/embeddings.json").read_bytes()
    for path in ("vectors.npy", "given.txt"):
        (project / path).unlink()
    done(project, "check")
    done(project, "split")
    assert "0 embedded (0 texts)" in done(project, "embed")
    assert (project / "data/embeddings.json").read_bytes() == manifest
    store = Store(project.parent / "store")
    corpus = Corpus(store, Manifest.load(project / "data/corpus.json", "corpus"))
    found = Embeddings(store, Manifest.load(project / "data/embeddings.json", "embeddings"), corpus)
    wanted = vectors_for(corpus.take(np.arange(300))).astype(np.float16)
    assert np.array_equal(found.rows_of(np.arange(300)), wanted)
    done(project, "mine")

    assert "imported vectors cannot read texts" in done(project, "evaluate", "teacher")
    assert json.loads((project / "reports/metrics/teacher.json").read_bytes()) == {}
    for words in (
        ["search", "amber", "--model", "teacher"],
        ["evaluate", "teacher", "--mteb", "X"],
    ):
        run = teachonce(project, *words)
        assert run.returncode == 3
        assert (
            "imported:abroad stands for imported vectors, and these cannot read texts" in run.stderr
        )


def test_another_name_is_another_import(project):
    done(project, "shard")
    done(project, "import", "vectors.npy", "given.txt")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["embed"]["teacher"] = "imported:elsewhere"
    save(project, params)
    run = teachonce(project, "embed")
    assert run.returncode == 1
    assert "nothing was imported as imported:elsewhere" in run.stderr


def test_a_cache_that_was_imported_under_the_hashes_of_its_files_keeps_its_name(project):
    """So it was before imports added up: data/sources.json has both hashes, and the store their vectors."""
    done(project, "shard")
    done(project, "import", "vectors.npy", "given.txt")
    sources = json.loads((project / "data/sources.json").read_bytes())
    assert sources["teacher"]["files"] == {"imported": "abroad", "dim": "16"}
    manifest = Manifest.load(project / "data/embeddings.json", "embeddings")
    new = fingerprint(manifest.recipe)
    sources["teacher"]["files"] = {"vectors": "1" * 64, "texts": "2" * 64}
    (project / "data/sources.json").write_text(json.dumps(sources))
    old = fingerprint(manifest.recipe | {"teacher": sources["teacher"]["files"]})
    store = Store(project.parent / "store")
    corpus = Corpus(store, Manifest.load(project / "data/corpus.json", "corpus"))
    for shard, key in enumerate(store.keys(f"vectors/{new}")):
        batch = store.glance(key).replace_schema_metadata(None)
        if shard:
            store.put(key.replace(new, old), batch, {"uncounted": len(batch)})
    texts = corpus.take(np.arange(300))
    vectors, given = write(project, texts[250:], vectors_for(texts[250:]), name="some.txt")
    run = teachonce(project, "import", vectors.name, given.name)
    assert run.returncode == 3
    write(project, texts, vectors_for(texts), name="some.txt")
    done(project, "import", vectors.name, given.name)
    assert Manifest.load(project / "data/embeddings.json", "embeddings").recipe["teacher"] == {
        "vectors": "1" * 64,
        "texts": "2" * 64,
    }


def test_a_retried_import_of_less_finds_the_rest_in_the_store(project):
    done(project, "shard")
    done(project, "import", "vectors.npy", "given.txt")
    before = (project / "data/embeddings.json").read_bytes()
    texts = (project / "given.txt").read_text().splitlines()
    write(project, texts[:50], np.load(project / "vectors.npy")[:50], name="some.txt")
    said = done(project, "import", "vectors.npy", "some.txt")
    assert said.startswith(
        "import: 50 of 50 vectors of 16 numbers; 250 texts of the corpus were imported before\n"
    )
    assert (project / "data/embeddings.json").read_bytes() == before
    assert "imported as 'abroad'" in done(project, "ls")


def test_what_is_lost_is_imported_again(project):
    done(project, "shard")
    done(project, "import", "vectors.npy", "given.txt")
    manifest = project / "data/embeddings.json"
    before = manifest.read_bytes()
    lost = project.parent / "store" / json.loads(before)["objects"][1]["key"]
    content = lost.read_bytes()
    lost.unlink()
    run = teachonce(project, "repair")
    assert run.returncode == 3
    assert "its vectors were imported\n  cure: run `teachonce import" in run.stderr
    done(project, "import", "vectors.npy", "given.txt")
    assert manifest.read_bytes() == before
    assert lost.read_bytes() == content


def test_layers_of_imported_vectors_are_a_wrong_setting(project):
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["starts"]["half"] = {"from": "teacher", "layers": [0]}
    save(project, params)
    run = teachonce(project, "check")
    assert run.returncode == 1
    assert "starts.half.from: teacher, but embed.teacher stands for imported vectors" in run.stderr


def test_import_wants_a_name_for_its_teacher(project):
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["embed"]["teacher"] = "a/model"
    save(project, params)
    run = teachonce(project, "import", "vectors.npy", "given.txt")
    assert run.returncode == 1
    assert "embed.teacher: a/model is a model; write imported:NAME" in run.stderr


# --- several teachers


def slowly_joined(*vectors):
    """One value at a time: each teacher's unit vector, over the root of their number."""
    found = []
    for vector in vectors:
        length = sum(float(x) ** 2 for x in vector) ** 0.5
        found += [float(x) / length / len(vectors) ** 0.5 for x in vector]
    return found


def test_several_teachers_are_joined_into_one(project, tiny_model):
    shutil.copytree(tiny_model, project / "small")
    done(project, "shard")
    store = Store(project.parent / "store")
    names, widths = ["first", "second"], [16, 24]
    for name, width in zip(names, widths, strict=True):
        teacher = HashTeacher(dim=width)
        texts = (project / "given.txt").read_text().splitlines()
        # Lengths that a join must not let decide who is heard.
        vectors = np.stack([width * teacher.vector(text) for text in texts])
        np.save(project / "vectors.npy", vectors)
        done(project, "import", "vectors.npy", "given.txt")
        (project / "data/embeddings.json").rename(project / f"data/{name}.json")
    said = done(project, "join", "data/first.json", "data/second.json")
    assert said.startswith("join: 300 vectors of 16 + 24 numbers, of 2 teachers\n")

    corpus = Corpus(store, Manifest.load(project / "data/corpus.json", "corpus"))

    def vectors_of(name):
        manifest = Manifest.load(project / f"data/{name}.json", "embeddings")
        return Embeddings(store, manifest, corpus).rows_of(np.arange(300)).astype(np.float64)

    first, second, both = (vectors_of(name) for name in (*names, "embeddings"))
    for row in (0, 7, 299):
        assert both[row] == pytest.approx(slowly_joined(first[row], second[row]), abs=1e-3)

    def cosine(vectors, a, b):
        return vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b])

    mean = (cosine(first, 1, 2) + cosine(second, 1, 2)) / 2
    assert cosine(both, 1, 2) == pytest.approx(mean, abs=1e-3)
    recipe = Manifest.load(project / "data/embeddings.json", "embeddings").recipe
    done(project, "join", "data/second.json", "data/first.json")
    assert Manifest.load(project / "data/embeddings.json", "embeddings").recipe != recipe
    done(project, "check")
    done(project, "split")
    done(project, "mine")


def test_a_join_of_one_or_of_another_corpus_is_refused(project):
    done(project, "shard")
    done(project, "import", "vectors.npy", "given.txt")
    run = teachonce(project, "join", "data/embeddings.json")
    assert run.returncode != 0
    assert "name two or more" in run.stderr
    (project / "data/embeddings.json").rename(project / "data/old.json")
    (project / "texts.txt").write_text("\n".join(sentences(200)) + "\n")
    done(project, "shard")
    run = teachonce(project, "join", "data/old.json", "data/old.json")
    assert run.returncode != 0
    assert not (project / "data/embeddings.json").exists()
