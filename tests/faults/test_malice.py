"""Hostile artefacts: each refused by a message, in a second and 256 MB, and nothing of theirs is run.

An audit hook counts what code of a stranger would have to do: unpickle a class, start a process, open a
socket, run code of a file that is neither ours nor an installed package's.
"""

import gzip
import json
import os
import pickle
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.commands import diff, ls
from pipeline.settings import load_params
from stages.models.folder import model_files
from stages.reading.corpus_files import TOO_LONG, read
from storage.corpus import text_key
from storage.errors import TeachonceError
from storage.manifest import Manifest
from storage.store import HEADER, Object, Store
from storage.upkeep.examination import examine
from storage.upkeep.inventory import plan_sweep, read_refs, take_inventory
from tests.conftest import make_tiny_model, sentences
from tests.faults.children import ROOT, watched
from tests.faults.samples import finished, sample

NEVER = "unpickled, ran, connected, read outside, took more than a second or 256 MB"
EVENTS = {
    "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "socket.bind", "webbrowser.open",
    "ctypes.dlopen",
}  # fmt: skip
SECRET = "a secret outside of the store"


class Guard:
    """Counts the events above while it is on; a hook cannot be taken away again."""

    def __init__(self):
        self.on, self.seen = False, []
        self.installed = (sys.prefix, sys.base_prefix, str(ROOT), "<frozen", "<string>", "<attrs")
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if not self.on:
            return
        if event in EVENTS:
            self.seen.append((event, str(arguments)[:200]))
        if event == "exec" and hasattr(arguments[0], "co_filename"):
            name = arguments[0].co_filename
            if not name.startswith(self.installed):
                self.seen.append((event, name))

    def refuses(self, use, *arguments, unless=False):
        """Fails if `use` does not refuse, `unless` that is right, or if there were events."""
        message = "\n  cure: "
        self.on = True
        try:
            use(*arguments)
            assert unless, "believed"
        except TeachonceError as error:
            message = str(error)
        finally:
            self.on = False
        assert not self.seen, self.seen
        assert SECRET not in message
        assert all(c.isprintable() or c == "\n" for c in message), message
        assert "\n  cure: " in message


class Payload:
    """What a pickle runs."""

    def __reduce__(self):
        return os.system, ("touch taken",)


def test_the_guard_sees_what_it_is_to_see(count):
    watched(guarded)


def guarded():
    guard = Guard()
    yield "guard: none"
    for event in (
        lambda: pickle.loads(pickle.dumps(Payload())),
        lambda: exec(compile("1", "/tmp/evil.py", "exec")),
        lambda: os.system("true"),
        lambda: socket.socket().connect_ex(("127.0.0.1", 9)),
    ):
        yield "guard: event"
        guard.seen.clear()
        guard.on = True
        event()
        guard.on = False
        assert guard.seen
    Path("taken").unlink()


# ---------------------------------------------------------------------------------------------- names

DIGEST = "0" * 40
NAMES = [
    "../../etc/passwd", "/etc/passwd", "~/x.arrow", f"text/../{DIGEST}.arrow", f"text/{DIGEST}.arrow/..",
    f"text//{DIGEST}.arrow", f"./text/{DIGEST}.arrow", f"text/{DIGEST}.arrow\n", f"text/{DIGEST}.arrow\0",
    f"text\\{DIGEST}.arrow", f"TEXT/{DIGEST}.arrow", f"text/{'G' * 40}.arrow", f"text/{DIGEST}",
    f"text/{DIGEST}.ARROW", f"file:///text/{DIGEST}.arrow", "s3://bucket/x.arrow", "C:/x.arrow",
    f"text/{DIGEST}.arrow?x=1", f"text/{DIGEST}.arrow#", f"text/%2e%2e/{DIGEST}.arrow", "", " ", ".",
    f"vectors/{DIGEST}.arrow", f"vectors/../{DIGEST}/{DIGEST}.arrow", f"negatives/{DIGEST}/1.arrow",
    f"refs/{DIGEST}.json", f"quarantine/{DIGEST}.arrow", "text/\u0660.arrow", "\x1b]0;x\x07",
    f"text/{DIGEST}.arrow ", f"text/{DIGEST}.arrow;id", "|id", "$(id)", "-rf",
]  # fmt: skip


def names():
    guard = Guard()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        entry = {"key": "", "rows": 1, "bytes": 1, "sha256": "0" * 64}
        manifest = {"format": 1, "kind": "corpus", "recipe": {}, "parent": None}
        refs = root / "store/refs"
        refs.mkdir(parents=True)
        yield "artefact: none"
        for name in NAMES:
            content = json.dumps({**manifest, "objects": [{**entry, "key": name}]})
            yield f"artefact: manifest with {name!r}"
            (root / "corpus.json").write_text(content)
            guard.refuses(Manifest.load, root / "corpus.json", "corpus")
            guard.refuses(Store(root / "store").path, name)
            yield f"artefact: ref with {name!r}"
            (refs / f"{DIGEST}.json").write_text(f'{{"manifest": {content}, "made": {{}}}}')
            found, unreadable = read_refs(root / "store")
            assert (len(found), len(unreadable)) == (0, 1)


def test_names_that_are_paths(count):
    count("hostile artefacts", watched(names, seconds=1.0)["artefact"] - 1, NEVER)


# ---------------------------------------------------------------------------------------------- files


def no_plain_files(path, outside):
    """Ways to put something else in the place of a file: name -> how."""
    ways = {
        "link to a file outside": lambda: path.symlink_to(outside),
        "link to a device": lambda: path.symlink_to("/dev/zero"),
        "link to itself": lambda: path.symlink_to(path),
        "link to nothing": lambda: path.symlink_to("/nowhere/at/all"),
        "link to a folder": lambda: path.symlink_to("/etc"),
        "link to a process": lambda: path.symlink_to("/proc/self/mem"),
        "hard link to a file outside": lambda: os.link(outside, path),
        "folder": path.mkdir,
        "FIFO": lambda: os.mkfifo(path),
        "socket": lambda: bind(path),
        "1 GB of nothing": lambda: sparse(path, 1 << 30),
        "1 GB with an Arrow file's ends": lambda: sparse(path, 1 << 30, b"ARROW1\0\0", b"ARROW1"),
        "1 GB with a footer of 1 GB": lambda: sparse(
            path, 1 << 30, b"ARROW1\0\0", ((1 << 30) - 18).to_bytes(4, "little") + b"ARROW1"
        ),
        "empty": path.touch,
        "pickle": lambda: path.write_bytes(pickle.dumps(Payload())),
        "numpy array of objects": lambda: write_npy(path),
        "script": lambda: path.write_text("#!/bin/sh\ntouch taken\n"),
    }
    if os.geteuid() == 0:
        ways["device"] = lambda: device(path)
    return ways


def bind(path):
    """A socket's file; its own path may be too long for one."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{folder}/s")
        Path(folder, "s").rename(path)


def sparse(path, size, start=b"", end=b""):
    with path.open("wb") as file:
        file.write(start)
        file.seek(size - len(end))
        file.write(end)
        file.truncate(size)


def write_npy(path):
    with path.open("wb") as file:
        np.save(file, np.array([Payload()], object), allow_pickle=True)


def device(path):
    try:
        os.mknod(path, 0o020666, os.makedev(1, 5))  # as /dev/zero
    except PermissionError:
        path.symlink_to("/dev/zero")


def clear(path):
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def files(kind):
    guard = Guard()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder).resolve()
        whole = sample(root / "a", kind)
        outside = root / "secret"
        store = Store(root / "a/store")
        yield "artefact: none"
        for name, make in no_plain_files(whole.path, outside).items():
            clear(whole.path)
            outside.write_text(SECRET)
            make()
            yield f"artefact: {kind} {name}"
            guard.refuses(Store(store.root).open, whole.entry)
            guard.refuses(Store(store.root).find, whole.entry.key)
            found = examine(Store(store.root), whole.entry.key, whole.entry, read=False)
            assert found.state == "damaged", found
            assert SECRET not in found.said
            take_inventory(store.root)
            assert outside.read_text() == SECRET
        clear(whole.path)


@pytest.mark.parametrize("kind", ["text", "float16"])
def test_what_is_no_object_in_the_place_of_one(kind, count):
    count("hostile artefacts", watched(files, kind, seconds=1.0)["artefact"] - 1, NEVER)


def refs():
    guard = Guard()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder).resolve()
        place = finished(root / "a", sentences(20))
        store = place.store.root
        outside = root / "secret"
        path = store / f"refs/{DIGEST}.json"
        ways = no_plain_files(path, outside) | {
            "deep": lambda: path.write_text("[" * 100_000),
            "deep in a recipe": lambda: path.write_text(
                '{"manifest": {"recipe": ' + '{"a":' * 50_000
            ),
            "of many small parts": lambda: path.write_text(f"[{'[],' * 300_000}[]]"),
        }
        yield "artefact: none"
        for name, make in ways.items():
            clear(path)
            outside.write_text(SECRET)
            make()
            yield f"artefact: ref {name}"
            guard.on = True
            found, unreadable = read_refs(store)
            inventory = take_inventory(store)
            plan_sweep(inventory, found, now=2e9, grace=0)
            guard.on = False
            assert not guard.seen
            assert (len(found), len(unreadable)) == (3, 1)
            assert SECRET not in str(unreadable[0])
        clear(path)


def test_what_is_no_ref_in_the_place_of_one(count):
    count("hostile artefacts", watched(refs, seconds=1.0)["artefact"] - 1, NEVER)


# --------------------------------------------------------------------------------------------- objects


def bombs():
    guard = Guard()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        text = "a" * (300 << 20)
        key = f"text/{DIGEST}.arrow"
        path = root / "store" / key
        path.parent.mkdir(parents=True)
        columns = pa.record_batch(
            {
                "text_key": pa.array([text_key("a")], pa.binary(16)),
                "text": pa.array([text], pa.large_string()),
            }
        )
        header = {"format": 1, "key": key, "rows": 1, "facts": {}, "sha256": "0" * 64}
        schema = columns.schema.with_metadata({HEADER: json.dumps(header).encode()})
        packed = {}
        for codec in ("zstd", "lz4"):
            sink = pa.BufferOutputStream()
            options = pa.ipc.IpcWriteOptions(compression=codec)
            with pa.ipc.new_file(sink, schema, options=options) as writer:
                writer.write_batch(columns)
            packed[codec] = sink.getvalue().to_pybytes()
        # The class that Arrow 14 and older unpickled from a schema (CVE-2023-47248).
        small = columns.slice(0, 0)
        field = small.schema.field("text").with_metadata(
            {
                b"ARROW:extension:name": b"arrow.py_extension_type",
                b"ARROW:extension:metadata": pickle.dumps(Payload()),
            }
        )
        odd = pa.schema([small.schema.field(0), field], metadata=schema.metadata)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, odd) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(small.columns, schema=odd))
        packed["extension with a pickle"] = sink.getvalue().to_pybytes()
        del columns, text, sink
        entry = Object(key=key, rows=1, bytes=1, sha256="0" * 64)
        yield "artefact: none"
        for name, content in packed.items():
            path.write_bytes(content)
            yield f"artefact: object {name}"
            before = pa.total_allocated_bytes()
            guard.refuses(Store(root / "store").open, entry)
            assert pa.total_allocated_bytes() - before < 1 << 20


def test_objects_that_are_bombs(count):
    count("hostile artefacts", watched(bombs, seconds=1.0)["artefact"] - 1, NEVER)


def corpora():
    """Files of a corpus that unpack to much more than they are."""
    guard = Guard()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        zeros = bytes(300 << 20)
        (root / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(zeros))
        (root / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(zeros))
        (root / "c.txt.gz").write_bytes(gzip.compress(zeros[: 50 << 20]))
        table = pa.table({"text": pa.array(["a" * len(zeros)], pa.large_string())})
        for name, make in {"d.arrow": pa.ipc.new_file, "e.arrow": pa.ipc.new_stream}.items():
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with make(root / name, table.schema, options=options) as writer:
                writer.write_table(table)
        pq.write_table(table, root / "f.parquet", compression="zstd", use_dictionary=False)
        (root / "g.parquet").write_bytes(pickle.dumps(Payload()))
        (root / "h.arrow").write_bytes(pickle.dumps(Payload()))
        del zeros, table
        yield "artefact: none"
        for path in sorted(root.iterdir()):
            yield f"artefact: corpus {path.name}"
            if path.name[0] in "abc":
                assert list(read(path, "text")) == [TOO_LONG]
                assert path.stat().st_size < 300_000
            else:
                guard.refuses(lambda path: list(read(path, "text")), path)
        assert not guard.seen


def test_corpus_files_that_are_bombs(count):
    count("hostile artefacts", watched(corpora, seconds=1.5)["artefact"] - 1, NEVER)


# -------------------------------------------------------------------------------------------- settings

YAML = [
    "!!python/object/apply:os.system [touch taken]",
    "!!python/object/new:os.system [touch taken]",
    "!!python/object:tests.faults.test_malice.Payload {}",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "store: !!python/object/apply:subprocess.Popen [[touch, taken]]",
    "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [{', '.join(['*a'] * 9)}]\n" for n in range(9)),
    "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)),
    "&a [*a]",
    "[" * 60_000,
    "{a: " * 15_000,
    "x" * (1 << 20),
    "\x1b]0;taken\x07: 1",
]


def yamls():
    guard = Guard()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        yield "artefact: none"
        for number, content in enumerate(YAML):
            yield f"artefact: params.yaml {number}"
            path.write_text(content)
            guard.refuses(load_params, path)


def test_settings_that_run_or_grow(count):
    count("hostile artefacts", watched(yamls, seconds=1.5)["artefact"] - 1, NEVER)


# ---------------------------------------------------------------------------------------------- models

CODE = """
import os
os.system("touch taken")
class Evil:
    load = classmethod(lambda *_, **__: os.system("id"))
"""


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def edit_module(model, place, **changes):
    modules = json.loads((model / "modules.json").read_text())
    modules[place] |= changes
    (model / "modules.json").write_text(json.dumps(modules))


def as_pickle(model, name="pytorch_model.bin"):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Payload()))


def add_dense(model, *, activation="torch.nn.modules.linear.Identity", weights="model.safetensors"):
    modules = json.loads((model / "modules.json").read_text())
    kind = "sentence_transformers.models.Dense"
    modules.append({"idx": 9, "name": "9", "path": "9_Dense", "type": kind})
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "9_Dense").mkdir()
    config = {
        "in_features": 32,
        "out_features": 4,
        "bias": False,
        "activation_function": activation,
    }
    (model / "9_Dense/config.json").write_text(json.dumps(config))
    if weights.endswith("bin"):
        (model / "9_Dense" / weights).write_bytes(pickle.dumps(Payload()))
    else:
        import torch
        from safetensors.torch import save_file

        save_file({"linear.weight": torch.ones(4, 32)}, model / "9_Dense" / weights)


def set_header(model, header, tail=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + tail)


MODELS = {
    "pickled weights": as_pickle,
    "pickled weights named pt": lambda m: as_pickle(m, "model.pt"),
    "pickled weights of a dense layer": lambda m: add_dense(m, weights="pytorch_model.bin"),
    "activation that is a function of os": lambda m: add_dense(m, activation="os.system"),
    "activation that is a module of its own": lambda m: add_dense(m, activation="evil.Evil"),
    "activation that is no layer": lambda m: add_dense(m, activation="torch.hub.load"),
    "module of its own": lambda m: edit_module(m, 0, type="evil.Evil"),
    "module of its own at the end": lambda m: edit_module(m, 2, type="evil.Evil"),
    "module of os": lambda m: edit_module(m, 1, type="os.system"),
    "module of subprocess": lambda m: edit_module(m, 1, type="subprocess.Popen"),
    "module that opens a browser": lambda m: edit_module(m, 1, type="antigravity.x"),
    "module outside": lambda m: edit_module(m, 1, path="../../outside"),
    "module of the root": lambda m: edit_module(m, 1, path="/etc"),
    "no list of modules": lambda m: (m / "modules.json").write_text('{"a": 1}'),
    "deep modules": lambda m: (m / "modules.json").write_text("[" * 100_000),
    "code for a model": lambda m: edit(
        m / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    ),
    "code on the hub": lambda m: edit(
        m / "config.json", model_type="evil", auto_map={"AutoConfig": "evil/repository--evil.Evil"}
    ),
    "kernel of the hub as attention": lambda m: edit(
        m / "config.json", _attn_implementation="kernels-community/evil"
    ),
    "unknown kind of model": lambda m: edit(m / "config.json", model_type="\x1b[31mevil"),
    "deep configuration": lambda m: (m / "config.json").write_text('{"a":' * 100_000),
    "billions of words": lambda m: edit(m / "config.json", vocab_size=10**12),
    "a width that is a text": lambda m: edit(m / "config.json", hidden_size="x"),
    "a million layers": lambda m: edit(m / "config.json", hidden_size=-1),
    "adapter": lambda m: edit(m / "adapter_config.json", base_model_name_or_path="evil/repository"),
    "header longer than the file": lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64),
    "header of 2^62": lambda m: (m / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little")),
    "header of 90 MB": lambda m: set_header(m, b"[" * 90_000_000),
    "header that is deep": lambda m: set_header(m, b'{"a":' * 100_000),
    "header without ends": lambda m: set_header(m, {"a": {"data_offsets": []}}),
    "header with ends beyond all": lambda m: set_header(m, {"a": {"data_offsets": [0, 1 << 62]}}),
    "header that is a list": lambda m: set_header(m, [1, 2]),
    "tensors that overlap": lambda m: set_header(
        m, {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, bytes(8)
    ),
    "1 GB of nothing": lambda m: sparse(m / "model.safetensors", 1 << 30),
    "FIFO for weights": lambda m: ((m / "model.safetensors").unlink(), os.mkfifo(m / "model.safetensors")),
    "FIFO for a configuration": lambda m: (
        (m / "modules.json").unlink(), (m / "config.json").unlink(), os.mkfifo(m / "config.json")
    ),
    "link to a device": lambda m: (
        (m / "model.safetensors").unlink(), (m / "model.safetensors").symlink_to("/dev/zero")
    ),
}  # fmt: skip


# What sentence-transformers leaves out, with a warning, and loads the rest.
LEFT_OUT = {"activation that is a function of os", "activation that is a module of its own"}


def models():
    """Loaded as a teacher would be, by our door; one that is right goes first, so all is imported."""
    import torch

    from stages.models.encoder import Encoder

    guard = Guard()
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder).resolve()
        whole = make_tiny_model(root / "whole")
        Encoder(whole, device=cpu).encode(["a text"])
        add_dense(shutil.copytree(whole, root / "dense"))
        guard.on = True
        assert Encoder(root / "dense", device=cpu).encode(["a text"]).shape == (1, 4)
        guard.on = False
        assert not guard.seen, guard.seen
        for number, (name, spoil) in enumerate(MODELS.items()):
            model = shutil.copytree(whole, root / f"m{number}")
            (model / "evil.py").write_text(CODE)
            spoil(model)
            yield f"artefact: model, {name}"
            guard.refuses(
                lambda model: Encoder(model, device=cpu).encode(["a text"]),
                model,
                unless=name in LEFT_OUT,
            )
            shutil.rmtree(model)
        assert not list(root.rglob("taken"))
        assert not Path("taken").exists()


def test_models_that_run_or_grow(count):
    count("hostile artefacts", watched(models, seconds=1.5)["artefact"], NEVER)


# --------------------------------------------------------------------------------------------- messages


def test_names_that_write_on_terminals(tmp_path, count):
    """Newlines and escape sequences of strangers stand escaped in every line that a person reads."""
    evil = [
        "\x1b[2J\x1b[31m",
        "a\nteachonce: all well",
        "\x1b]0;title\x07",
        "\x9b31m",
        "a\rb",
        "\u202egnp",
    ]
    place = finished(tmp_path, sentences(20))
    store = place.store.root
    lines = []
    for number, name in enumerate(evil):
        folder = tmp_path / f"{number}{name}"
        folder.mkdir()
        for file in ("a.parquet", "b.arrow", "c.txt.zst"):
            (folder / file).write_bytes(b"no such file")
            with pytest.raises(TeachonceError) as caught:
                list(read(folder / file, name))
            lines += str(caught.value).split("\n  cure: ")
        (folder / "config.json").write_text("{}")
        (folder / f"{name}.safetensors").write_bytes(b"x")
        with pytest.raises(TeachonceError) as caught:
            model_files(folder, address="embed.teacher")
        lines += str(caught.value).replace(name, "" if "\n" in name else name).split("\n  cure: ")
        (store / f"foreign{name}").write_text("x")
        changed = place.embeddings.model_copy(update={"recipe": {"prompt": name, name: name}})
        (tmp_path / "b.json").write_bytes(changed.encoded)
        lines += diff.lines(diff.run(tmp_path / "embeddings.json", tmp_path / "b.json").facts)
        note = json.loads(changed.note(tmp_path))
        note["made"] = {"by": name, "on": name, "at": name, "in": name}
        (store / changed.ref).write_text(json.dumps(note))
    lines += ls.lines(ls.run(store).facts)
    assert sum("foreign" in line for line in lines) >= len(evil)
    for line in lines:
        assert all(c.isprintable() for c in line), line
    count("hostile artefacts", 6 * len(evil), NEVER)
