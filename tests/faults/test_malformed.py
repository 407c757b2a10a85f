"""Malformed files: every reader says what is wrong with them, whatever they are, and nothing else happens.

Objects are mutated by their structure and sealed again (their sha256 is right), so that what stands
behind the first check is reached as well.
"""

import gzip
import io
import json
import random
import struct
import tempfile
from copy import deepcopy
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from pipeline.settings import examine
from stages.reading.corpus_files import Rejected, read
from storage.column import matrix_of, text_keys_of
from storage.corpus import Corpus
from storage.errors import TeachonceError
from storage.manifest import Manifest
from storage.split import Split
from storage.store import HEADER, Store, canonical_json, payload_sha256
from tests.conftest import sentences
from tests.faults.children import SECONDS, watched
from tests.faults.samples import KINDS, finished, sample, values

NEVER = "ended the process, hung, took 256 MB or had a traceback"
CHUNKS = 4

ODD_NUMBERS = [
    0,
    1,
    7,
    8,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**62,
    2**63 - 1,
    2**64 - 1,
]


def mutate(draw, content):
    """Bytes changed in one to four places: bits, numbers, pieces cut, doubled, moved or filled."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4])):
        size = len(content)
        start = draw.randrange(size + 1) & draw.choice([-1, -1, -4, -8])
        end = start + draw.choice([1, 2, 4, 8, 16, 64, size // 4])
        elsewhere = draw.randrange(size + 1)
        piece, other = content[start:end], content[elsewhere : elsewhere + end - start]
        number = draw.choice(ODD_NUMBERS)
        ways = [
            (start, start + 1, bytes(byte ^ 1 << draw.randrange(8) for byte in piece[:1])),
            (start, start + 4, struct.pack("<I", number % 2**32)),
            (start, start + 8, struct.pack("<Q", number)),
            (start, end, b""),
            (start, start, piece),
            (start, end, other),
            (start, end, bytes([draw.choice([0, 0xFF, draw.randrange(256)])]) * len(piece)),
            (start, size, b""),
        ]
        first, last, instead = draw.choice(ways)
        content[first:last] = instead
    return bytes(content)


# --------------------------------------------------------------------------------------------- objects


def use(store, key, batch):
    """What the code above the store does with a batch of its kind."""
    keys = text_keys_of(batch)
    assert len(keys) == len(batch)
    kind = key.split("/", 1)[0]
    if kind == "text":
        assert all(isinstance(text, str) for text in batch.column("text").to_pylist())
    elif kind == "vectors":
        assert matrix_of(batch, "vector").shape[0] == len(batch)
    elif kind == "tokens":
        batch.column("token_ids").to_pylist()
    else:
        assert matrix_of(batch, "neighbours").shape == matrix_of(batch, "scores").shape


def bytes_of_objects(kind, seed, number):
    """Random changes of the bytes of a whole object."""
    with tempfile.TemporaryDirectory() as root:
        whole = sample(Path(root), kind)
        draw = random.Random(f"{kind} {seed}")
        yield "object: none"
        for case in range(number):
            yield f"object: {kind} {seed} {case}"
            whole.path.write_bytes(mutate(draw, whole.content))
            try:
                batch = Store(Path(root) / "store").open(whole.entry)
            except TeachonceError as error:
                assert str(whole.path) in str(error), error
            else:
                assert batch.equals(whole.batch)


@pytest.mark.parametrize("chunk", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_objects_with_changed_bytes(kind, chunk, times, count):
    cases = watched(bytes_of_objects, kind, chunk, 3_400 * times, timeout=SECONDS * times)
    count("malformed objects", cases["object"] - 1, NEVER)


def sealed_objects(kind, seed, number):
    """Objects of any columns, types, nulls, counts and files, with a header that fits them."""
    with tempfile.TemporaryDirectory() as root:
        whole = sample(Path(root), kind)
        store, key = Path(root) / "store", whole.entry.key
        draw = random.Random(f"{kind} {seed}")
        yield "object: none"
        for case in range(number):
            yield f"object: {kind} {seed} sealed {case}"
            whole.path.write_bytes(sealed(draw, key, whole.batch))
            try:
                found = Store(store).find(key)
                assert found is not None
                use(store, key, Store(store).open(found))
            except TeachonceError as error:
                assert str(whole.path) in str(error), error


def odd_column(draw, array, rows):
    """A column of another type, or as it was."""
    odd = [
        lambda: array,
        lambda: array,
        lambda: pa.nulls(rows),
        lambda: pa.nulls(rows, array.type),
        lambda: pa.array([i % 2 == 0 for i in range(rows)]),
        lambda: pa.array([f"t{i}" for i in range(rows)]),
        lambda: pa.array([f"t{i % 2}" for i in range(rows)]).dictionary_encode(),
        lambda: pa.array([f"t{i}" for i in range(rows)], pa.string_view()),
        lambda: pa.array([b"x" * (i % 5) for i in range(rows)], pa.large_binary()),
        lambda: pa.array([b"x" * 16] * rows, pa.binary(16)),
        lambda: pa.array([[i, None] for i in range(rows)], pa.large_list(pa.int32())),
        lambda: pa.array([[[1], [2]]] * rows),
        lambda: pa.array([[1.0] * 3] * rows, pa.list_(pa.float32(), 3)),
        lambda: pa.array([[]] * rows, pa.list_(pa.float32(), 0)),
        lambda: pa.array([{"a": i} for i in range(rows)]),
        lambda: pa.array([float("nan")] * rows, pa.float16()),
        lambda: pa.array([[float("inf")] * 4] * rows, pa.list_(pa.float32(), 4)),
        lambda: pa.RunEndEncodedArray.from_arrays([rows], ["x"]) if rows else pa.nulls(0),
        lambda: pa.ExtensionArray.from_storage(
            pa.uuid(), pa.array([b"x" * 16] * rows, pa.binary(16))
        ),
    ]
    return draw.choice(odd[:1] * 20 + odd)()


def sealed(draw, key, batch):
    rows = draw.choice([len(batch), len(batch), 0, 1])
    batch = batch.slice(0, rows)
    columns = [odd_column(draw, column, rows) for column in batch.columns]
    names = [
        draw.choice([name] * 6 + ["", "text", "vector", "x\x1b[1m"]) for name in batch.schema.names
    ]
    if draw.random() < 0.2:
        columns.append(odd_column(draw, columns[0], rows))
        names.append(draw.choice(["extra", "text_key", "text"]))
    changed = pa.RecordBatch.from_arrays(columns, names=names)
    facts = draw.choice([{"tokens": 1}, {}, {"tokens": 2**70}, {"x\n": -1}])
    try:
        sha256 = payload_sha256(key, changed, facts)
    except Exception:  # no code of ours makes such a batch; then the seal is any
        sha256 = "0" * 64
    header = {
        "format": draw.choice([1] * 9 + [2, "1", None]),
        "key": draw.choice([key] * 9 + ["text/../x", f"text/{'0' * 40}.arrow"]),
        "rows": draw.choice([rows] * 9 + [rows + 1, -1, 2**62, 2**70, 1.5]),
        "facts": facts,
        "sha256": sha256,
    }
    encoded = json.dumps(header).encode()
    if draw.random() < 0.15:
        encoded = mutate(draw, encoded)
    sink = pa.BufferOutputStream()
    codec = draw.choice([None, None, None, None, "zstd", "lz4"])
    schema = changed.schema.with_metadata({HEADER: encoded, b"pandas": b"{}"})
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        for _ in range(draw.choice([1] * 9 + [0, 2])):
            writer.write_batch(changed)
    content = sink.getvalue().to_pybytes()
    return mutate(draw, content) if draw.random() < 0.3 else content


@pytest.mark.parametrize("chunk", range(1))
@pytest.mark.parametrize("kind", KINDS)
def test_objects_of_other_columns_with_a_true_header(kind, chunk, times, count):
    cases = watched(sealed_objects, kind, chunk, 3_400 * times, timeout=SECONDS * times)
    count("malformed objects", cases["object"] - 1, NEVER)


def test_the_sealed_objects_are_sometimes_right():
    """Else the test above would see only the first check."""
    with tempfile.TemporaryDirectory() as root:
        whole = sample(Path(root), "text")
        draw = random.Random(3)
        right = 0
        for _ in range(400):
            whole.path.write_bytes(sealed(draw, whole.entry.key, whole.batch))
            try:
                Store(Path(root) / "store").find(whole.entry.key)
            except TeachonceError:
                continue
            right += 1
        assert right >= 4


# ------------------------------------------------------------------------------------------- manifests

ODD_VALUES = [
    None, True, 0, -1, 1.5, 1e308, "", "x", [], {}, [[]], "\x1b[31m", "\n", "../../etc/passwd", "é" * 200,
    *ODD_NUMBERS, 10**400,
]  # fmt: skip
ODD_JSON = [
    "NaN",
    "-Infinity",
    "1e999",
    "[" * 3000,
    '{"a":' * 500,
    '"\\ud800"',
    "9" * 5000,
    "\ufeff",
    "//",
]


def mutate_json(draw, value):
    """A value with one to three of its parts changed, as text; sometimes no JSON at all."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 2, 3])):
        if parts := list(places(value)):
            change_part(draw, *draw.choice(parts))
    text = canonical_json(value)
    place = draw.randrange(len(text))
    return draw.choice(
        [
            lambda: mutate(draw, text),
            lambda: text[:place] + draw.choice(ODD_JSON).encode() + text[place:],
            lambda: text.replace(b'  "kind"', b'  "kind": "corpus",\n  "kind"', 1),  # a key twice
            lambda: json.dumps(value).encode(),
            *[lambda: text] * 4,
        ]
    )()


def change_part(draw, holder, name):
    """Another value, none, one more or one that is nested too deep, in the place `name` of `holder`."""
    way = draw.randrange(6)
    if way < 3:
        holder[name] = deepcopy(draw.choice(ODD_VALUES))
    elif way == 3:
        del holder[name]
    elif way == 4 and isinstance(holder, dict):
        holder[draw.choice(["x", "", "key", "format", "\x1b"])] = deepcopy(holder[name])
    else:
        for _ in range(draw.choice([1, 3, 250])):
            holder[name] = [holder[name]]


def places(value):
    """Every (list or mapping, index or key) in a JSON value."""
    left = [value]
    while left:
        holder = left.pop()
        names = holder.keys() if isinstance(holder, dict) else range(len(holder))
        for name in list(names):
            yield holder, name
            if isinstance(holder[name], dict | list):
                left.append(holder[name])


def manifests(kind, seed, number):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        finished(root, sentences(24))
        expected = values(root)
        path = root / f"{kind}.json"
        whole = path.read_bytes()
        right = json.loads(whole)
        draw = random.Random(f"{kind} {seed}")
        yield "manifest: none"
        for case in range(number):
            yield f"manifest: {kind} {seed} {case}"
            content = mutate_json(draw, right)
            path.write_bytes(content)
            try:
                Manifest.load(path, kind)
                assert values(root) == expected, content
            except TeachonceError as error:
                check_message(error)


def check_message(error):
    """One line, then perhaps more with settings, at last a cure; nothing that moves a terminal's cursor."""
    text = str(error)
    assert "\n  cure: " in text, text
    assert all(c.isprintable() or c == "\n" for c in text), text
    assert len(text) < 20_000, len(text)


@pytest.mark.parametrize("chunk", range(2))
@pytest.mark.parametrize("kind", ["corpus", "embeddings", "negatives"])
def test_manifests(kind, chunk, times, count):
    cases = watched(manifests, kind, chunk, 6_000 * times, timeout=SECONDS * times)
    count("malformed manifests and splits", cases["manifest"] - 1, NEVER)


def splits(seed, number):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        place = finished(root, sentences(24))
        corpus = Corpus(place.store, Manifest.load(root / "corpus.json", "corpus"))
        right = {
            "format": 1,
            "corpus": corpus.manifest.content,
            "heldout": 0.25,
            "evaluation": [1, 7],
        }
        draw = random.Random(seed)
        path = root / "split.json"
        yield "split: none"
        for case in range(number):
            yield f"split: {case}"
            path.write_bytes(mutate_json(draw, right))
            try:
                split = Split.load(path, corpus)
                rows = [
                    *split.train_rows(corpus),
                    *split.heldout_rows(corpus),
                    *set(split.evaluation),
                ]
                assert sorted(rows) == list(range(corpus.rows))
            except TeachonceError as error:
                check_message(error)


def test_splits(times, count):
    cases = watched(splits, 0, 6_000 * times, timeout=SECONDS * times)
    count("malformed manifests and splits", cases["split"] - 1, NEVER)


# -------------------------------------------------------------------------------------------- settings

ODD_YAML = [
    "!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!!int x", "!!float x", "!!bool x",
    "!!timestamp x", "2001-99-99", "!!binary é", "!!omap [a: 1]", "!!pairs [a: 1]", "!!set {a, b}",
    "&a [*a]", "*x",
    "{a: &b [x, x], c: [*b, *b]}", "? [a]\n: 1", "<<: 1", "[" * 400, "{a: " * 200, "'", '"', "\t", "|",
    ">-\n x", "%YAML 2.0", "---", "...", "0x", "1_000", "190:20:30", ".nan", ".inf", "~", "=", "9" * 5000,
    "\x00", "\x1b[31m", "\u202e", "# " + "x" * 2000, "!<tag:x> y", "!!str {a: b}", "{<<: [{a: 1}, {b: 2}]}",
]  # fmt: skip


def settings(seed, number):
    """One section at a time: PyYAML needs 10 ms for all of them."""
    whole = yaml.safe_load(Path("params.yaml").read_text())
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        yield "settings: none"
        for case in range(number):
            yield f"settings: {seed} {case}"
            name = draw.choice(list(whole))
            part = yaml.safe_dump({name: whole[name]}, sort_keys=False)[:500]
            place = draw.choice([i for i, c in enumerate(part) if c in " \n"] or [0])
            way = draw.randrange(4)
            if way == 0:
                path.write_bytes(mutate(draw, part.encode()))
            elif way == 1:
                path.write_text(f"{name}: {draw.choice(ODD_YAML)}\n")
            elif way == 2:
                end = part.find("\n", place)
                path.write_text(f"{part[:place]} {draw.choice(ODD_YAML)}{part[end:]}")
            else:
                path.write_text(part[:place] + draw.choice(ODD_YAML) + part[place:])
            try:
                _, problems, _ = examine(path)
                assert problems  # most sections are missing
            except TeachonceError as error:
                check_message(error)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_settings(chunk, times, count):
    cases = watched(settings, chunk, 2_500 * times, timeout=SECONDS * times)
    count("malformed settings", cases["settings"] - 1, NEVER)


# ---------------------------------------------------------------------------------------- corpus files

TEXTS = sentences(30)


def corpus_file(ending):
    """A whole corpus file of TEXTS."""
    lines = "\n".join(TEXTS).encode()
    if "jsonl" in ending:
        lines = "\n".join(json.dumps({"n": 1, "text": text}) for text in TEXTS).encode()
    if ending.endswith("gz"):
        return gzip.compress(lines)
    if ending.endswith("zst"):
        return zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    return table_file(ending) if ending.endswith(("arrow", "parquet")) else lines


def table_file(ending):
    column = pa.array(TEXTS)
    kinds = {
        "dictionary.arrow": pa.dictionary(pa.int8(), pa.string()),
        "view.arrow": pa.string_view(),
    }
    if ending in kinds:
        column = column.cast(kinds[ending])
    table = pa.table({"n": range(len(TEXTS)), "text": column})
    sink = io.BytesIO()
    if ending == "parquet":
        pq.write_table(table, sink, row_group_size=12, write_page_checksum=True)
        return sink.getvalue()
    make = pa.ipc.new_stream if ending == "stream.arrow" else pa.ipc.new_file
    codec = "lz4" if ending == "packed.arrow" else None
    with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=12 if ending == "stream.arrow" else None)
    return sink.getvalue()


def corpus_files(ending, seed, number):
    whole = corpus_file(ending)
    draw = random.Random(f"{ending} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{ending}"
        path.write_bytes(whole)
        assert list(read(path, "text")) == TEXTS
        yield "corpus: none"
        for case in range(number):
            yield f"corpus: {ending} {seed} {case}"
            path.write_bytes(mutate(draw, whole))
            try:
                for item in read(path, "text"):
                    if isinstance(item, Rejected):
                        assert item.rule in {"undecodable", "malformed", "too_long"}
                    else:
                        item.encode()
            except TeachonceError as error:
                check_message(error)
                assert str(path) in str(error)


ENDINGS = {
    "txt": 14_000,
    "jsonl": 14_000,
    "txt.gz": 12_000,
    "jsonl.zst": 22_000,
    "arrow": 5_000,
    "stream.arrow": 5_000,
    "dictionary.arrow": 4_000,
    "view.arrow": 4_000,
    "packed.arrow": 4_000,
    "parquet": 6_000,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_corpus_files(ending, times, count):
    cases = watched(corpus_files, ending, 0, ENDINGS[ending] * times, timeout=SECONDS * times)
    count("malformed corpus files", cases["corpus"] - 1, NEVER)
