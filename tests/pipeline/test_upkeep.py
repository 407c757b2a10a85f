"""Looking after the store: what is wrong is found, exactly that is made again, nobody's work is deleted."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.commands import diff, gc, ls, repair, transfer, verify
from pipeline.workspace import Workspace
from stages import embed, mine, shard, split
from storage import durable
from storage.column import text_keys_of
from storage.errors import DamagedError, MissingError, StorageError, TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.remote import Remote
from storage.store import Store
from storage.tokens import put_tokens
from storage.upkeep.examination import quarantine
from storage.upkeep.inventory import orphans, read_refs, take_inventory
from tests.conftest import HashTeacher, probe_of, prompts, sentences, shipped_settings

ROOT = Path(__file__).parents[2]
FILES = {"model.safetensors": "0" * 64}
TOKENIZER = "b" * 40
DAY = 86_400


class Tree(Workspace):
    """A work tree whose teacher is a function of the text, or not on this machine (None)."""

    def __init__(self, root, teacher=None):
        super().__init__(root)
        self.fake = teacher

    def teacher(self):
        return FILES, (None if self.fake is None else lambda: self.fake)

    def manifest(self, kind):
        return Manifest.load(self.at.root / f"data/{kind}.json", kind)

    def keys(self, kind):
        return [entry.key for entry in self.manifest(kind).objects]

    def path(self, kind, place=0):
        return self.store.path(self.keys(kind)[place])

    def files(self):
        """Name -> content of every object; refs and what is in quarantine not."""
        return {
            path.relative_to(self.store.root): path.read_bytes()
            for path in self.store.root.rglob("*.arrow")
        }

    def manifests(self):
        return {path.name: path.read_bytes() for path in (self.at.root / "data").glob("*.json")}

    def shard(self):
        at = self.at
        shard.run(
            self.params.shard,
            root=at.root,
            store=self.store,
            out=at.corpus,
            facts=at.stage_facts("shard"),
        )
        split.run(
            self.params.split,
            corpus=self.corpus(),
            evaluation=(),
            out=at.split,
            facts=at.stage_facts("split"),
        )

    def embed(self):
        at = self.at
        embed.run(
            self.params.embed,
            files=FILES,
            corpus=self.corpus(),
            store=self.store,
            load_teacher=None if self.fake is None else lambda: self.fake,
            remote=None,
            out=at.embeddings,
            facts=at.stage_facts("embed"),
            mixes=at.mixes,
        )

    def mine(self):
        mine.run(
            self.params.mine,
            corpus=self.corpus(),
            embeddings=self.embeddings(),
            split=self.split(),
            store=self.store,
            device=torch.device("cpu"),
            out=self.at.negatives,
            facts=self.at.stage_facts("mine"),
        )


def write_params(root, **changes):
    content = shipped_settings()
    content |= {"store": "store", "device": "cpu"}
    content["docs"]["packages"] = []
    content["shard"] |= {"sources": ["texts.txt"], "rows_per_shard": 32}
    content["embed"] |= {"teacher": "a-teacher", "storage": "float32"}
    content["mine"] |= {"neighbours": 8, "range_max": 20, "memory_mb": 64}
    for address, value in changes.items():
        section, name = address.split("__")
        content[section][name] = value
    (root / "params.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A work tree after shard, split, embed and mine, with token ids of all its texts."""
    root = tmp_path_factory.mktemp("finished")
    write_params(root)
    (root / "texts.txt").write_text("\n".join(sentences(240)))
    tree = Tree(root, HashTeacher())
    tree.shard()
    tree.embed()
    tree.mine()
    corpus = tree.corpus()
    for number, key in enumerate(tree.keys("corpus")):
        put_tokens(
            tree.store,
            f"tokens/{TOKENIZER}/{key.rpartition('/')[2]}",
            ids=[[[1, 2, 3]] * corpus.objects[number].rows],
            text_keys=text_keys_of(corpus.batch(number)),
        )
    assert len(corpus.objects) >= 5
    return root


@pytest.fixture
def tree(finished, tmp_path):
    """A copy of `finished`, with the teacher at hand."""
    root = shutil.copytree(finished, tmp_path / "tree")
    return Tree(root, HashTeacher())


def again(tree, teacher=None):
    """The same work tree for another process: nothing is remembered as checked."""
    return Tree(tree.at.root, teacher)


def cut_in_half(path):
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[: len(content) // 2])


def flip_a_value(tree, kind, place=0):
    """Flip one bit of the values, where neither Arrow nor a header notices it."""
    path = tree.path(kind, place)
    content = path.read_bytes()
    batch = tree.store.open(tree.manifest(kind).objects[place])
    column = batch.column(batch.num_columns - 1)
    column = column if kind in {"corpus", "readings"} else column.flatten()
    values = column.buffers()[-1].to_pybytes()[:64]
    at = content.index(values) + 3
    damaged = bytearray(content)
    damaged[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(damaged)
    return path


def make_older(root, days):
    """Let every file of a store be so many days old."""
    then = time.time() - days * DAY
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (then, then))


def scratch_of(path):
    """What a writer of `path` that was killed leaves."""
    return path.with_name(f".{path.name}.4711.0123abcd.tmp")


def teachonce(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words], cwd=folder, capture_output=True, text=True
    )


def collect(root, **options):
    return gc.run(root, **{"grace_days": 1.0, **options})


def repaired(tree):
    outcome, failure = repair.run(tree)
    if failure is not None:
        raise failure
    return outcome


def states(outcome):
    return sorted((p["state"], Path(p["where"]).name) for p in outcome.facts["problems"])


# -------------------------------------------------------------------------------------------- verify


def test_a_sound_store_is_said_to_be_sound(tree):
    count = 4 * len(tree.keys("corpus")) + 1  # the probe texts' vectors
    outcome = verify.run(tree, read_data=False)
    assert outcome.summary == (
        f"{count} objects of 3 manifests: all well; headers only, `--read-data` reads the values too"
    )
    verify.check_sound(outcome)
    outcome = verify.run(again(tree), read_data=True)
    assert (len(outcome.facts["read"]), outcome.facts["problems"]) == (count, [])
    assert outcome.summary.endswith(": all well; every value read")


def test_a_flipped_value_is_found_by_reading_only(tree):
    """What the default does not promise, and --read-data does."""
    for kind in ("corpus", "embeddings", "negatives"):
        flip_a_value(tree, kind, 1)
    assert verify.run(again(tree), read_data=False).facts["problems"] == []
    outcome = verify.run(again(tree), read_data=True)
    assert states(outcome) == sorted(
        ("damaged", tree.path(kind, 1).name) for kind in ("corpus", "embeddings", "negatives")
    )
    assert {p["said"] for p in outcome.facts["problems"]} == {
        "its values are not those that were written (sha256 differs)"
    }
    with pytest.raises(DamagedError, match=r"3 damaged\n  cure: run `teachonce repair`") as error:
        verify.check_sound(outcome)
    assert error.value.exit_code == 3


def test_headers_alone_tell_missing_truncated_swapped_and_foreign_objects(tree):
    names = {}
    paths = [tree.path("embeddings", place) for place in range(5)]
    paths[0].unlink()
    names["missing"] = "not in the store"
    content = paths[1].read_bytes()
    paths[1].chmod(0o644)
    paths[1].write_bytes(content[:-100])
    first, second = paths[2].read_bytes(), paths[3].read_bytes()
    for path, other in ((paths[2], second), (paths[3], first)):
        path.unlink()
        path.write_bytes(other)
    moved = paths[4].with_name("elsewhere")
    paths[4].rename(moved)
    paths[4].symlink_to(moved)
    outcome = verify.run(tree, read_data=False)
    found = {p["where"]: (p["state"], p["said"]) for p in outcome.facts["problems"]}
    keys = tree.keys("embeddings")
    assert found == {
        str(paths[0]): ("missing", "not in the store"),
        str(paths[1]): ("damaged", "Not an Arrow file"),
        str(paths[2]): ("damaged", f"it is {keys[3]} under a foreign name"),
        str(paths[3]): ("damaged", f"it is {keys[2]} under a foreign name"),
        str(paths[4]): ("damaged", "cannot be opened (Too many levels of symbolic links)"),
    }


def test_a_hole_in_the_middle_is_found_by_the_size(tree):
    path = tree.path("embeddings")
    content = path.read_bytes()
    path.chmod(0o644)
    middle = len(content) // 16 * 8
    path.write_bytes(content[:middle] + content[middle + 64 :])
    assert [state for state, _ in states(verify.run(tree, read_data=False))] == ["damaged"]


def test_damaged_token_ids_are_found_and_missing_ones_are_not_missed(tree):
    first, second = sorted((tree.store.root / "tokens" / TOKENIZER).iterdir())[:2]
    cut_in_half(first)
    second.unlink()
    outcome = verify.run(tree, read_data=False)
    assert states(outcome) == [("damaged", first.name)]


def test_a_swap_of_equal_sizes_is_found_in_the_header(tree):
    """The token ids of one text by two tokenizers."""
    text = tree.path("corpus").name
    keys = [f"tokens/{name * 40}/{text}" for name in "bc"]
    batch = tree.corpus().batch(0)
    put_tokens(tree.store, keys[1], ids=[[[7, 8, 9]] * len(batch)], text_keys=text_keys_of(batch))
    one, other = (tree.store.path(key) for key in keys)
    assert one.stat().st_size == other.stat().st_size
    one.rename(other.with_name("kept"))
    other.rename(one)
    outcome = verify.run(tree, read_data=False)
    assert [(p["where"], p["said"]) for p in outcome.facts["problems"]] == [
        (str(one), f"it is {keys[1]} under a foreign name")
    ]


def test_another_copy_is_a_warning_and_nothing_is_moved(tree):
    path = tree.path("embeddings")
    path.unlink()
    manifests = tree.manifests()
    Tree(tree.at.root, HashTeacher(scale=1.0 + 1e-6)).embed()
    tree.at.embeddings.write_bytes(manifests["embeddings.json"])
    before = tree.files()
    for read in (False, True):
        outcome = verify.run(again(tree), read_data=read)
        assert states(outcome) == [("another copy", path.name)]
        verify.check_sound(outcome)
        (line, cure) = verify.lines(outcome.facts)
        assert line.startswith(f"warning: another copy: {path}: sha256 ")
        assert cure == (
            "  cure: run `teachonce embed` to adopt the copy that is there, then `dvc repro`"
        )
    repaired(again(tree))
    assert tree.files() == before


def test_a_sample_can_be_drawn_again(tree):
    outcome = verify.run(tree, read_data=False, sample=3)
    chosen = outcome.facts["read"]
    assert len(chosen) == 3
    assert outcome.summary.endswith(
        f"3 read, of the others the headers (seed {outcome.facts['seed']} chose them)"
    )
    seed = outcome.facts["seed"]
    assert verify.run(tree, read_data=False, sample=3, seed=seed).facts["read"] == chosen
    others = [verify.run(tree, read_data=False, sample=3, seed=n).facts["read"] for n in range(5)]
    assert any(other != chosen for other in others)
    count = outcome.facts["objects"]
    assert len(verify.run(tree, read_data=True, sample=10**6).facts["read"]) == count


def test_a_sample_finds_what_it_reads_and_no_more(tree):
    path = flip_a_value(tree, "embeddings")
    key = tree.keys("embeddings")[0]
    for seed in range(8):
        outcome = verify.run(again(tree), read_data=False, sample=6, seed=seed)
        expected = [("damaged", path.name)] if key in outcome.facts["read"] else []
        assert states(outcome) == expected


def test_a_damaged_manifest_is_one_problem_among_others(tree):
    tree.at.negatives.write_text("{}")
    path = tree.path("corpus")
    path.unlink()
    outcome = verify.run(tree, read_data=False)
    assert states(outcome) == [("manifest", "negatives.json"), ("missing", path.name)]
    with pytest.raises(DamagedError, match="1 damaged manifests, 1 missing"):
        verify.check_sound(outcome)
    with pytest.raises(DamagedError, match=r"negatives.json: no manifest.*\n  cure: restore it"):
        repaired(again(tree))
    assert not path.exists()


def test_what_exists_of_the_manifests_is_enough(tree):
    tree.at.negatives.unlink()
    tree.at.embeddings.unlink()
    assert " 1 manifests" in verify.run(tree, read_data=True).summary
    tree.at.corpus.unlink()
    with pytest.raises(MissingError, match="no manifest there"):
        verify.run(tree, read_data=True)


def test_a_store_that_is_not_mounted_is_said_so_and_starts_no_teacher(tree):
    tree.store.root.rename(tree.at.root / "unmounted")
    for command in (lambda: verify.run(tree, read_data=False), lambda: repaired(tree)):
        with pytest.raises(MissingError, match="no store there\n  cure: mount it"):
            command()
    assert tree.fake.texts_seen == 0


# -------------------------------------------------------------------------------------------- repair


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_exactly_what_is_damaged_or_missing_is_made_again(tree, count):
    before, manifests = tree.files(), tree.manifests()
    rows = [entry.rows for entry in tree.manifest("embeddings").objects]
    for place in range(count):
        if place % 2:
            tree.path("embeddings", place).unlink()
        else:
            flip_a_value(tree, "embeddings", place)
    inodes = {path: path.stat().st_ino for path in tree.store.root.rglob("*.arrow")}
    teacher = HashTeacher()
    outcome = repaired(again(tree, teacher))
    assert teacher.texts_seen == sum(rows[:count])
    assert tree.files() == before
    assert tree.manifests() == manifests
    made_again = {tree.path("embeddings", place) for place in range(count)}
    assert all(path.stat().st_ino == inodes[path] for path in set(inodes) - made_again)
    damaged = tree.keys("embeddings")[:count:2]
    assert sorted(outcome.facts["moved"]) == sorted(damaged)
    assert outcome.facts["made"]["embeddings"] == tree.keys("embeddings")[:count]
    assert outcome.facts["changed"] == []
    verify.check_sound(verify.run(again(tree), read_data=True))


def test_each_kind_is_made_again_in_order(tree):
    """Texts, vectors and negatives of one shard, all damaged; the sources and the teacher are here."""
    before, manifests = tree.files(), tree.manifests()
    for kind in ("corpus", "embeddings", "negatives"):
        flip_a_value(tree, kind, 2)
    outcome = repaired(again(tree, HashTeacher()))
    assert tree.files() == before
    assert tree.manifests() == manifests
    assert outcome.summary.endswith(
        "3 damaged and moved to quarantine; made again: 1 of texts, 1 of vectors, 1 of negatives"
    )


def test_what_was_damaged_can_be_looked_at_in_quarantine(tree):
    path = flip_a_value(tree, "negatives")
    content = path.read_bytes()
    key = tree.keys("negatives")[0]
    where = Path(repaired(again(tree)).facts["moved"][key])
    assert where.read_bytes() == content
    assert where.parent == tree.store.root / "quarantine"
    assert where.name.startswith(key.replace("/", "_") + "-20")


def test_what_is_no_file_at_all_is_moved_too(tree):
    link, folder = tree.path("negatives", 0), tree.path("negatives", 1)
    link.unlink()
    link.symlink_to("nowhere")
    folder.unlink()
    folder.mkdir()
    (folder / "inner").write_text("somebody's")
    assert len(repaired(again(tree)).facts["moved"]) == 2
    verify.check_sound(verify.run(again(tree), read_data=True))
    make_older(tree.store.root, days=9)
    assert collect(tree.store.root, delete=True, grace_days=0).facts["bytes"] == 0
    assert len(list((tree.store.root / "quarantine").iterdir())) == 2
    freed = collect(tree.store.root, delete=True, quarantine=True).facts["emptied"]
    assert len(freed) == 2
    assert list((tree.store.root / "quarantine").iterdir()) == []


def test_damaged_token_ids_are_moved_and_left_to_whoever_needs_them(tree):
    path = next((tree.store.root / "tokens" / TOKENIZER).iterdir())
    cut_in_half(path)
    outcome = repaired(again(tree))
    assert list(outcome.facts["moved"]) == [f"tokens/{TOKENIZER}/{path.name}"]
    assert not path.exists()
    verify.check_sound(verify.run(again(tree), read_data=True))


def test_without_the_teacher_it_says_where_that_can_be_done(tree):
    path = flip_a_value(tree, "embeddings")
    tree.path("embeddings", 1).unlink()
    ref = read_refs(tree.store.root)[0][0]
    with pytest.raises(MissingError) as error:
        repaired(again(tree, None))
    assert error.value.exit_code == 3
    assert "2 shards of vectors are lost, and the teacher is not on this machine" in str(
        error.value
    )
    assert "run `teachonce repair` on this store where it is" in str(error.value)
    assert f"such vectors were made by {ref.made['by']} on {ref.made['on']}, " in str(error.value)
    # What is damaged is out of the way already, so that a worker elsewhere makes it again.
    assert not path.exists()
    repaired(again(tree, HashTeacher()))
    verify.check_sound(verify.run(again(tree), read_data=True))


def test_what_the_remote_has_is_brought_and_not_made(tree):
    """Neither the sources nor the teacher are here."""
    (tree.at.root / "remote").mkdir()
    remote = Remote(str(tree.at.root / "remote"))
    transfer.push(Workspace.manifests(tree), store=tree.store, remote=remote)
    manifests, files = tree.manifests(), tree.files()
    settings = yaml.safe_load(tree.at.params.read_text()) | {"remote": "remote"}
    tree.at.params.write_text(yaml.safe_dump(settings))
    (tree.at.root / "texts.txt").unlink()
    tree.path("corpus", 1).unlink()
    tree.path("negatives", 2).unlink()
    damaged = flip_a_value(tree, "embeddings")
    outcome = repaired(again(tree))
    assert (tree.manifests(), tree.files()) == (manifests, files)
    assert outcome.facts["brought"] == sorted(
        [tree.keys("corpus")[1], tree.keys("embeddings")[0], tree.keys("negatives")[2]]
    )
    assert outcome.summary.endswith("made again: none; brought from the remote: 3")
    # What is not there either is made.
    shutil.rmtree(tree.at.root / "remote/negatives")
    for kind in ("embeddings", "negatives"):
        tree.path(kind, 1).unlink()
    facts = repaired(again(tree)).facts
    assert (facts["brought"], facts["made"]["negatives"]) == (
        [tree.keys("embeddings")[1]],
        [tree.keys("negatives")[1]],
    )
    assert damaged.exists()


def test_changed_sources_do_not_become_a_new_corpus_by_repair(tree):
    manifests = tree.manifests()
    tree.path("corpus", 1).unlink()
    tree.path("corpus", 3).unlink()
    texts = (tree.at.root / "texts.txt").read_text().splitlines()
    lost = tree.manifest("corpus").objects
    row = lost[0].rows + 1  # in shard 1
    (tree.at.root / "texts.txt").write_text("\n".join([*texts[:row], *texts[row + 1 :]]))
    with pytest.raises(MissingError, match="1 of its shards of texts or readings are lost"):
        repaired(tree)
    assert tree.manifests() == manifests
    assert tree.path("corpus", 3).exists()
    assert len({ref.manifest_digest for ref in read_refs(tree.store.root)[0]}) == 3


def test_sources_are_read_only_as_far_as_a_lost_text_shard(tree):
    tree.path("corpus").unlink()
    (tree.at.root / "unreadable.txt.gz").write_bytes(b"no gzip")
    write_params(tree.at.root, shard__sources=["texts.txt", "unreadable.txt.gz"])
    repaired(again(tree))
    assert tree.path("corpus").exists()
    tree.path("corpus", -1).unlink()  # it may go on in the next file
    with pytest.raises(TeachonceError, match=r"unreadable.txt.gz: cannot be read"):
        repaired(again(tree))


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (
            "embeddings",
            {"embed__prompts": prompts("query: ")},
            r"\(prompt\), so its 1 lost objects",
        ),
        ("negatives", {"mine__max_score": 0.5}, r"\(max_score\), so its 1 lost objects"),
    ],
)
def test_other_settings_do_not_become_a_new_cache_by_repair(tree, kind, change, said):
    tree.path(kind).unlink()
    write_params(tree.at.root, **change)
    before = tree.files()
    with pytest.raises(MissingError, match=said):
        repaired(again(tree, HashTeacher()))
    assert tree.files() == before


def test_vectors_older_than_the_corpus_are_for_embed_to_make(tree):
    path = tree.path("embeddings")
    path.unlink()
    texts = (tree.at.root / "texts.txt").read_text()
    (tree.at.root / "texts.txt").write_text(f"One more text for a start.\n{texts}")
    tree.shard()
    teacher = HashTeacher()
    with pytest.raises(
        MissingError, match=r"older than corpus.json.*\n  cure: run `teachonce embed`"
    ):
        repaired(again(tree, teacher))
    assert teacher.texts_seen == 0


def test_vectors_of_another_machine_are_adopted_and_said_to_be_others(tree):
    tree.path("embeddings").unlink()
    outcome = repaired(again(tree, HashTeacher(scale=1.0 + 1e-6)))
    assert outcome.facts["changed"] == ["data/embeddings.json"]
    assert "data/embeddings.json changed (equal settings, other last bits): `dvc repro`" in (
        outcome.summary
    )
    tree.path("negatives").unlink()
    with pytest.raises(MissingError, match=r"mined from other vectors.*\n  cure: run `dvc repro`"):
        repaired(again(tree, HashTeacher()))


def test_damage_found_before_there_is_a_manifest_has_a_cure_too(tree):
    """The first run was killed, its text shard rotted, and it is run again."""
    path = tree.path("corpus")
    tree.at.corpus.unlink()
    cut_in_half(path)
    with pytest.raises(DamagedError) as error:
        again(tree).shard()
    cure = (
        "run `teachonce repair`; if it finds nothing, no manifest here names it yet: "
        f"rm -f '{path}', then run `teachonce shard`"
    )
    assert error.value.cure == cure
    outcome = repaired(again(tree))
    assert outcome.facts["moved"] == {}
    path.unlink()
    again(tree).shard()
    # Now one does, and that is what the same message says first.
    cut_in_half(path)
    with pytest.raises(DamagedError, match="cure: run `teachonce repair`"):
        again(tree).shard()
    assert list(repaired(again(tree)).facts["moved"]) == [tree.keys("corpus")[0]]
    again(tree).shard()


def test_an_object_mended_meanwhile_is_put_back(tree):
    """Two people repair at once; the slower one reads the damaged file while the faster mends it."""
    key = tree.keys("negatives")[0]
    path = tree.path("negatives")
    whole = path.read_bytes()
    flip_a_value(tree, "negatives")

    class Slow(Store):
        def find(self, key):
            try:
                return super().find(key)
            finally:
                path.rename(path.with_name("moved by the other"))
                path.write_bytes(whole)

    assert quarantine(Slow(tree.store.root), key) is None
    assert path.read_bytes() == whole
    assert list((tree.store.root / "quarantine").iterdir()) == []


def test_what_cannot_be_opened_is_not_called_damaged(tree):
    """A process that has no descriptors left knows nothing about the object: it stays."""
    key = tree.keys("embeddings")[0]
    code = (
        "import os, resource, sys; from pathlib import Path\n"
        "from storage.store import Store; from storage.upkeep.examination import examine, quarantine\n"
        "store, key = Store(Path(sys.argv[1])), sys.argv[2]\n"
        "examine(store, key, None, read=True)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "found = examine(store, key, None, read=True); print(found.state, found.said)\n"
        "quarantine(store, key)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tree.store.root), key],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.stdout == "unreadable opening failed: Too many open files\n", run.stderr
    assert f"StorageError: {tree.path('embeddings')}: opening failed: Too many" in run.stderr
    assert tree.path("embeddings").exists()


# ------------------------------------------------------------------------------------------------ ls


def test_ls_says_what_is_there_and_who_needs_it(tree):
    put_texts_of_nobody(tree)
    outcome = ls.run(tree.store.root)
    groups = {group["kind"]: group for group in outcome.facts["groups"]}
    shards = len(tree.keys("corpus"))
    assert {kind: group["objects"] for kind, group in groups.items()} == {
        "text": shards + 1,
        "vectors": shards + 1,
        "tokens": shards,
        "negatives": shards,
    }
    vectors = groups["vectors"]
    manifest = tree.manifest("embeddings")
    assert vectors["fingerprint"] == fingerprint(manifest.recipe)
    probe = tree.store.path(probe_of(manifest)).stat().st_size
    assert (vectors["rows"], vectors["bytes"]) == (manifest.rows, manifest.size + probe)
    assert vectors["recipe"] == manifest.recipe
    assert (vectors["orphans"], groups["text"]["orphans"]) == (0, 1)
    assert groups["tokens"]["rows"] == manifest.rows
    assert groups["text"]["rows"] is None  # of a shard that no manifest names, nobody knows
    (name,) = vectors["refs"]
    assert outcome.facts["refs"][name]["kind"] == "embeddings"
    text = "\n".join(ls.lines(outcome.facts))
    made = outcome.facts["refs"][name]
    assert f"ref {name[:8]} embeddings: {made['by']} on {made['on']}, {made['at']}, in " in text
    assert "prompt '', max_tokens 64, precision 'fp32', storage 'float32'" in text
    assert "model.safetensors 00000000" in text
    assert "1 named by no ref" in text
    json.dumps(outcome.facts)


def test_ls_begins_with_vectors_and_names_their_teacher(tree):
    """As `check` noted it beside the manifest; without that the hashes of its files tell it."""
    tree.renew()  # a copy of a work tree becomes a holder by its first command
    groups = ls.run(tree.store.root).facts["groups"]
    assert [group["kind"] for group in groups] == ["vectors", "text", "tokens", "negatives"]
    assert groups[0]["teacher"] is None
    path = tree.at.root / "data/sources.json"
    for files, name in ((FILES, "some/teacher"), ({"model.safetensors": "1" * 64}, None)):
        said = {"teacher": {"declared": {"name": "some/teacher"}, "files": files}}
        path.write_text(json.dumps(said))
        facts = ls.run(tree.store.root).facts
        assert facts["groups"][0]["teacher"] == name
        fingerprinted = facts["groups"][0]["fingerprint"][:8]
        first = next(ls.lines(facts))
        assert first.startswith(f"vectors {fingerprinted} ") and " MB" in first
        assert first.endswith("  some/teacher") == (name is not None)
    path.unlink()
    os.mkfifo(path)  # a holder's folder is anybody's
    assert ls.run(tree.store.root).facts["groups"][0]["teacher"] is None
    assert [ls.bytes_of(size) for size in (0, 1, 123_456, 60e9)] == [
        "0.00 MB",
        "0.01 MB",
        "0.12 MB",
        "60,000.00 MB",
    ]


def test_verify_looks_at_what_all_refs_of_a_store_name(tree):
    root = tree.store.root
    mine, all_of_it = verify.run(tree, read_data=True), verify.run_all(root, read_data=True)
    assert all_of_it.facts["sound"] and all_of_it.facts["read"] == mine.facts["read"]
    for path in tree.at.manifests.values():
        path.unlink(missing_ok=True)  # there are no readings
    lost = next(root.glob("text/*.arrow"))
    lost.unlink()
    (root / "refs/broken.json").write_text("{")
    found = states(verify.run_all(root, read_data=False))
    assert sorted(found) == [("manifest", "broken.json"), ("missing", lost.name)]
    with pytest.raises(MissingError, match=r"^/no/such/store: "):
        verify.run_all(Path("/no/such/store"), read_data=False)


def put_texts_of_nobody(tree, seed=99):
    """A text shard that no manifest names; its path."""
    from storage.corpus import put_texts, text_key

    texts = sentences(5, seed=seed)
    entry = put_texts(tree.store, [(text, text_key(text)) for text in texts])
    return tree.store.path(entry.key)


def test_ls_lists_refs_whose_objects_are_gone_foreign_files_and_what_cannot_be_read(tree):
    shutil.rmtree(tree.store.root / "negatives")
    (tree.store.root / "notes.txt").write_text("mine")
    (tree.store.root / "vectors/link").symlink_to(tree.at.root)
    (tree.store.root / "refs/broken.json").write_text("{")
    text = "\n".join(ls.lines(ls.run(tree.store.root).facts))
    shards = len(tree.keys("corpus"))
    assert f", {shards} of its objects MISSING" in text
    assert "foreign, never deleted: notes.txt" in text
    assert "foreign, never deleted: vectors/link" in text
    assert "refs/broken.json: no ref (1 faults)" in text


# ---------------------------------------------------------------------------------------------- diff


def test_equal_manifests_do_not_differ(tree):
    outcome = diff.run(tree.at.embeddings, tree.at.embeddings)
    shards = len(tree.keys("corpus"))
    assert outcome.facts["equal"]
    assert outcome.summary == (
        f"equal; {shards} shards in both, 0 only in A, 0 only in B, 0 in both as another copy"
    )
    assert list(diff.lines(outcome.facts)) == []


def changed(tree, kind, name, **values):
    """A manifest written like another but for some fields."""
    manifest = Manifest.model_validate(tree.manifest(kind).model_dump() | values)
    path = tree.at.root / name
    path.write_bytes(manifest.encoded)
    return path


def test_differing_settings_are_named_with_both_values(tree):
    recipe = dict(tree.manifest("embeddings").recipe)
    recipe |= {"prompt": "query: ", "teacher": {"model.safetensors": "1" * 64, "new": "2" * 64}}
    del recipe["precision"]
    other = changed(tree, "embeddings", "b.json", recipe=recipe, parent="c" * 40)
    outcome = diff.run(tree.at.embeddings, other)
    assert not outcome.facts["equal"]
    assert outcome.facts["recipe"] == {
        "precision": {"a": "fp32"},
        "prompt": {"a": "", "b": "query: "},
        "teacher.model.safetensors": {"a": "0" * 64, "b": "1" * 64},
        "teacher.new": {"b": "2" * 64},
    }
    parent = tree.manifest("embeddings").parent
    assert list(diff.lines(outcome.facts))[0::4] == [
        'recipe.precision: "fp32" | not there',
        f"parent: {parent[:8]}… | cccccccc…",
    ]


def test_whole_numbers_and_true_are_not_the_same_setting(tree):
    one = changed(tree, "corpus", "a.json", recipe={"x": 1})
    other = changed(tree, "corpus", "b.json", recipe={"x": True})
    assert diff.run(one, other).facts["recipe"] == {"x": {"a": 1, "b": True}}


def test_differing_shards_are_told_apart(tree):
    objects = tree.manifest("embeddings").objects
    copy = objects[2].model_copy(update={"sha256": "f" * 64})
    one = changed(tree, "embeddings", "a.json", objects=objects[:4])
    other = changed(tree, "embeddings", "b.json", objects=(objects[1], copy, *objects[3:]))
    facts = diff.run(one, other).facts
    assert facts["only_a"] == (objects[0].key,)
    assert facts["only_b"] == tuple(entry.key for entry in objects[4:])
    assert facts["copies"] == (copy.key,)
    assert facts["common"] == (objects[1].key, objects[3].key)
    assert f"other copy: {copy.key}" in list(diff.lines(facts))
    turned = changed(tree, "embeddings", "c.json", objects=objects[::-1])
    facts = diff.run(tree.at.embeddings, turned).facts
    assert (facts["moved"], facts["equal"], facts["copies"]) == (True, False, ())
    facts = diff.run(tree.at.corpus, tree.at.embeddings).facts
    assert (facts["kind"], facts["equal"]) == (("corpus", "embeddings"), False)


# ------------------------------------------------------------------------------------------------ gc


def test_a_dry_run_deletes_nothing(tree):
    orphan = put_texts_of_nobody(tree)
    scratch_of(orphan).write_text("left")
    make_older(tree.store.root, days=2)
    before = sorted(tree.store.root.rglob("*"))
    name = read_refs(tree.store.root)[0][0].name
    outcome = collect(tree.store.root, delete=False, quarantine=True, forget=[name[:6]])
    assert sorted(tree.store.root.rglob("*")) == before
    assert f"text/{orphan.name}" in outcome.facts["orphans"]
    assert outcome.summary.endswith("this was a dry run")
    # It says what forgetting that ref would free.
    named = {entry.key for entry in read_refs(tree.store.root)[0][0].manifest.objects}
    assert named <= set(outcome.facts["orphans"])


def test_gc_deletes_what_no_ref_names_and_nothing_else(tree):
    before = tree.files()
    orphan = put_texts_of_nobody(tree)
    tokens = tree.store.root / f"tokens/{TOKENIZER}/{orphan.name}"
    put_tokens(
        tree.store,
        f"tokens/{TOKENIZER}/{orphan.name}",
        ids=[[[1]] * 5],
        text_keys=text_keys_of(tree.store._map(f"text/{orphan.name}")[0]),
    )
    size = orphan.stat().st_size + tokens.stat().st_size
    make_older(tree.store.root, days=2)
    outcome = collect(tree.store.root, delete=True)
    assert set(outcome.facts["orphans"]) == {
        f"text/{orphan.name}",
        f"tokens/{TOKENIZER}/{orphan.name}",
    }
    assert outcome.facts["bytes"] == size
    assert tree.files() == before
    assert collect(tree.store.root, delete=True, grace_days=0).facts["orphans"] == {}


def test_a_worker_in_the_third_week_of_a_teacher_pass_loses_nothing(tree):
    """It has published for weeks and has no manifest yet; only its latest shard is young."""
    (ref,) = (r for r in read_refs(tree.store.root)[0] if r.manifest.kind == "embeddings")
    (tree.store.root / f"refs/{ref.name}.json").unlink()
    tree.at.embeddings.unlink()
    make_older(tree.store.root, days=20)
    latest = tree.store.root / sorted(ref.manifest.objects, key=lambda e: e.key)[-1].key
    before = tree.files()
    os.utime(latest)
    outcome = collect(tree.store.root, delete=True)
    assert tree.files() == before
    keys = {*(entry.key for entry in ref.manifest.objects), probe_of(ref.manifest)}
    assert set(outcome.facts["young"]) == keys
    assert outcome.facts["orphans"] == {}
    assert "kept, younger than 1 days (--grace): vectors/" in "\n".join(gc.lines(outcome.facts))
    # So does the scratch file of the shard at work.
    make_older(tree.store.root, days=20)
    scratch_of(latest).write_text("half of it")
    assert collect(tree.store.root, delete=True).facts["orphans"] == {}
    # Nobody went on: it goes when its time is over, or when somebody insists.
    make_older(tree.store.root, days=20)
    assert set(collect(tree.store.root, delete=False).facts["orphans"]) == keys
    os.utime(latest)
    assert set(collect(tree.store.root, delete=True, grace_days=0).facts["orphans"]) == keys
    assert not latest.exists()


@pytest.mark.parametrize(
    ("days", "grace_days", "stays"),
    [(0.9, 1.0, True), (1.1, 1.0, False), (2.4, 2.5, True), (2.6, 2.5, False), (-1, 1.0, True)],
)
def test_how_long_an_object_without_a_ref_stays(tree, days, grace_days, stays):
    """-1: written by a machine whose clock is ahead."""
    orphan = put_texts_of_nobody(tree)
    make_older(tree.store.root, days)
    collect(tree.store.root, delete=True, grace_days=grace_days)
    assert orphan.exists() == stays
    collect(tree.store.root, delete=True, grace_days=0)
    assert not orphan.exists()


def test_young_objects_that_a_ref_keeps_do_not_spare_old_ones(tree):
    orphan = put_texts_of_nobody(tree)
    os.utime(orphan, (0, 0))
    collect(tree.store.root, delete=True)
    assert not orphan.exists()


def test_scratch_files_are_deleted_when_they_are_a_day_old(tree):
    folder = tree.path("embeddings").parent
    live, dead = (scratch_of(folder / f"{digit * 40}.arrow") for digit in "ab")
    in_refs = [scratch_of(path) for path in (tree.store.root / "refs").iterdir()]
    in_refs.append(scratch_of(tree.store.root / f"refs/{'a' * 40}.{'b' * 40}.json"))
    others = [
        scratch_of(tree.store.root / f"{folder}/{'a' * 40}.arrow")
        for folder in ("text", f"tokens/{TOKENIZER}")
    ]
    others.append(scratch_of(tree.path("negatives")))
    for path in (live, dead, *in_refs, *others):
        path.write_text("half of it")
    then = time.time() - 1.01 * DAY
    for path in (dead, *in_refs, *others):
        os.utime(path, (then, then))
    outcome = collect(tree.store.root, delete=True, grace_days=0)
    assert live.exists()
    assert not [path for path in (dead, *in_refs, *others) if path.exists()]
    assert list(outcome.facts["live"]) == [str(live.relative_to(tree.store.root))]


def test_what_no_writer_of_ours_leaves_is_nobodys_scratch_file(tree):
    """Somebody pointed `store` at his own folder, which has files that end like ours."""
    digest = "d" * 40
    names = [
        *(".git/.x.tmp", ".x.tmp", "text/.x.tmp", f"text/.{digest}.arrow.tmp", "refs/.x.tmp"),
        f"text/.{digest}.arrow.1.aa.tmp",  # no eight digits
        f"text/.{digest}.arrow.x.0123abcd.tmp",  # no process
        f"text/deep/.{digest}.arrow.1.0123abcd.tmp",
        f"vectors/.{digest}.arrow.1.0123abcd.tmp",  # it lies one folder deeper
        f"vectors/x/.{digest}.arrow.1.0123abcd.tmp",
        f"negatives/{digest}/.{digest}.arrow.1.0123abcd.tmp",
        f".git/text/.{digest}.arrow.1.0123abcd.tmp",
        f"data/.{digest}.json.1.0123abcd.tmp",
        "data/.corpus.json.1.0123abcd.tmp",
        "trash/notes",
        f"text/.x.arrow.{'0' * 16}.trash",
        f".git/.{digest}.arrow.{'0' * 16}.trash",
        f"text/.{digest}.arrow.trash",
        "quarantine/x",
        "quarantine/deep/x",
    ]
    root = tree.store.root
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("somebody's")
    linked = scratch_of(root / f"text/{digest}.arrow")
    linked.symlink_to(root / "text/.x.tmp")
    make_older(root, days=30)
    outcome = collect(root, delete=True, quarantine=True, grace_days=0)
    assert all((root / name).read_text() == "somebody's" for name in names)
    assert linked.is_symlink()
    wanted = {name for name in names if not name.startswith("quarantine/deep")}
    linked_name = str(linked.relative_to(root))
    assert set(outcome.facts["foreign"]) == {*wanted, linked_name, "quarantine/deep"}
    assert outcome.facts["bytes"] == 0


def test_foreign_files_are_never_deleted(tree):
    root = tree.store.root
    outside = tree.at.root / "outside.arrow"
    outside.write_text("somebody's")
    key = f"text/{'d' * 40}.arrow"
    (root / key).symlink_to(outside)
    (root / "vectors/elsewhere").symlink_to(tree.at.root)
    for name in ("README", "text/x.arrow", "vectors/x.arrow", f"text/{'e' * 40}.arrow.bak"):
        (root / name).write_text("somebody's")
    make_older(root, days=9)
    outcome = collect(root, delete=True, quarantine=True, grace_days=0)
    assert set(outcome.facts["foreign"]) == {
        key,
        "vectors/elsewhere",
        "README",
        "text/x.arrow",
        "vectors/x.arrow",
        f"text/{'e' * 40}.arrow.bak",
    }
    assert all(os.path.lexists(root / name) for name in outcome.facts["foreign"])
    assert outside.exists()


def test_a_linked_folder_of_a_store_is_foreign(tree):
    """README says so: what lies behind a link is never deleted, and `ls` misses it."""
    vectors, elsewhere = tree.store.root / "vectors", tree.at.root / "elsewhere"
    vectors.rename(elsewhere)
    vectors.symlink_to(elsewhere)
    for path in (tree.store.root / "refs").iterdir():
        path.unlink()
    before = sorted(elsewhere.rglob("*"))
    outcome = collect(tree.store.root, delete=True, grace_days=0)
    assert list(outcome.facts["foreign"]) == ["vectors"]
    assert sorted(elsewhere.rglob("*")) == before
    tree.manifest("embeddings").write_ref(tree.at.embeddings, tree.store)
    count = len(tree.keys("embeddings"))
    assert f", {count} of its objects MISSING" in "\n".join(ls.lines(ls.run(tree.store.root).facts))


@pytest.mark.parametrize("damage", ["garbage", "flip", "other name", "link", "folder", "newer"])
def test_a_ref_that_cannot_be_read_stops_gc(tree, damage):
    ref, *_ = sorted((tree.store.root / "refs").iterdir())
    content = ref.read_text()
    orphan = put_texts_of_nobody(tree)
    if damage == "garbage":
        ref.write_text(content[:-50])
    elif damage == "flip":
        ref.write_text(content.replace('"sha256": "', '"sha256": "0', 1).replace("0", "1", 1))
    elif damage == "other name":
        ref.rename(ref.with_name(f"{'a' * 40}.json"))
    elif damage == "newer":
        ref.write_text(content.replace('"format": 1', '"format": 2'))
    else:
        ref.rename(tree.at.root / "moved")
        ref.symlink_to(tree.at.root / "moved") if damage == "link" else ref.mkdir()
    for delete in (False, True):
        with pytest.raises(DamagedError, match="1 refs cannot be read, so nobody knows what") as e:
            collect(tree.store.root, delete=delete, grace_days=0)
        assert e.value.exit_code == 3
    other = sorted((tree.store.root / "refs").iterdir())[-1].stem
    with pytest.raises(DamagedError):
        collect(tree.store.root, delete=True, grace_days=0, forget=[other])
    assert (tree.store.root / f"refs/{other}.json").exists()
    assert orphan.exists()
    # The cure that the message names, for somebody who knows that nobody needs it.
    assert "cure: restore it, or if nobody needs it: `teachonce gc --forget " in str(e.value)
    name = str(e.value).rpartition("--forget ")[2].rstrip("`")
    collect(tree.store.root, delete=True, grace_days=0, forget=[name])
    assert not orphan.exists()


def test_a_store_without_refs_is_not_taken_for_one_that_nobody_needs(tree):
    shutil.rmtree(tree.store.root / "refs")
    before = tree.files()
    with pytest.raises(MissingError, match="cannot be known which objects are needed"):
        collect(tree.store.root, delete=True, grace_days=0)
    assert tree.files() == before
    with pytest.raises(MissingError, match="no store there"):
        collect(tree.at.root / "nowhere", delete=True)


def test_two_refs_share_shards_and_forgetting_one_frees_the_rest(tree):
    """A corpus grows; the old one is forgotten; what both named stays."""
    old = tree.keys("corpus")
    old_ref = next(r.name for r in read_refs(tree.store.root)[0] if r.manifest.kind == "corpus")
    texts = (tree.at.root / "texts.txt").read_text().splitlines()
    (tree.at.root / "texts.txt").write_text("\n".join(texts[5:]))
    tree.shard()
    new = tree.keys("corpus")
    gone = set(old) - set(new)
    assert gone
    assert set(old) & set(new)
    assert collect(tree.store.root, delete=True, grace_days=0).facts["orphans"] == {}
    outcome = collect(tree.store.root, delete=True, grace_days=0, forget=[old_ref[:8]])
    assert outcome.facts["forgotten"] == [old_ref]
    tokens = {f"tokens/{TOKENIZER}/{key.rpartition('/')[2]}" for key in gone}
    assert set(outcome.facts["orphans"]) == gone | tokens
    assert old_ref not in {ref.name for ref in read_refs(tree.store.root)[0]}
    assert all(tree.store.path(key).exists() for key in new)


def test_forget_refuses_what_is_ambiguous_unknown_or_too_short(tree):
    folder = tree.store.root / "refs"
    name = sorted(folder.iterdir())[0].stem
    (folder / f"{name[:5]}{'f' * 35}.json").write_text("{}")
    (folder / f"abc0{'f' * 36}.json").write_text("{}")
    before = sorted(folder.iterdir())
    for prefix, count in (("abc", 1), ("abc0fe", 0)):
        with pytest.raises(TeachonceError, match=f"{count} refs begin like that"):
            collect(tree.store.root, delete=True, forget=[prefix])
    for prefix, count in ((name[:5], 2), ("zzzz", 0), (name[:3], 2), ("", len(before)), ("../", 0)):
        with pytest.raises(TeachonceError, match=f"{count} refs begin like that"):
            collect(tree.store.root, delete=True, forget=[prefix])
    assert sorted(folder.iterdir()) == before


# -------------------------------------------------------------------------------- gc, for any manifests


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    subsets=st.lists(
        st.tuples(
            st.sampled_from(["corpus", "embeddings", "negatives"]), st.sets(st.integers(0, 4))
        ),
        max_size=4,
    ),
    ages=st.lists(st.integers(0, 3), min_size=20, max_size=20),
    grace=st.sampled_from([0.0, 1.0, 2.5]),
    forget=st.booleans(),
)
def test_gc_never_deletes_what_a_ref_names(
    finished, tmp_path_factory, subsets, ages, grace, forget
):
    root = tmp_path_factory.mktemp("any") / "store"
    shutil.copytree(finished / "store", root)
    shutil.rmtree(root / "refs")
    (root / "refs").mkdir()
    source = Tree(finished)
    for number, (kind, places) in enumerate(subsets):
        whole = source.manifest(kind)
        objects = tuple(whole.objects[place] for place in sorted(places))
        manifest = Manifest.model_validate(whole.model_dump() | {"objects": objects})
        manifest.save(root.parent / f"{number}.json", Store(root))
    refs, _ = read_refs(root)
    forgotten = [refs.pop().name] if refs and forget else []
    now = time.time()
    files = take_inventory(root).objects
    days = dict(zip([file.name for file in files], ages * 2, strict=False))
    for name, age in days.items():
        os.utime(root / name, (now - age * DAY - 60,) * 2)
    # By the words of the issue, not by our functions.
    named = {entry.key for ref in refs for entry in ref.manifest.objects}
    texts = {key.removeprefix("text/") for key in named if key.startswith("text/")}
    kept = named | {f"tokens/{TOKENIZER}/{text}" for text in texts}
    if any(key.startswith("vectors/") for key in named):
        kept |= {probe_of(source.manifest("embeddings"))}
    collect(root, delete=True, grace_days=grace, forget=forgotten)
    left = {file.name for file in take_inventory(root).objects}
    assert kept & {file.name for file in files} <= left
    if not grace:
        assert left == kept & {file.name for file in files}
    assert {name for name, age in days.items() if age < grace} <= left
    assert {file.name for file in orphans(files, refs)} == {file.name for file in files} - kept


# --------------------------------------------------------------------------------- the one door, a person


def test_move_and_remove_name_the_file_and_the_cure(tmp_path):
    with pytest.raises(StorageError, match=r"x: moving failed: No such file.*\n  cure: "):
        durable.move(tmp_path / "x", tmp_path / "deep/y")
    (tmp_path / "folder/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    durable.remove(tmp_path / "link")
    assert (tmp_path / "folder/inner").exists()
    durable.remove(tmp_path / "folder")
    durable.remove(tmp_path / "folder")
    with pytest.raises(StorageError, match="deleting failed: Not a directory"):
        (tmp_path / "file").write_text("")
        durable.remove(tmp_path / "file/inner")


def test_a_person_verifies_and_repairs_where_the_teacher_is_not(tree):
    declared = {"name": "a-teacher", "revision": None}
    (tree.at.root / "data/sources.json").write_text(
        json.dumps({"teacher": {"declared": declared, "files": FILES}})
    )
    root = tree.at.root
    run = teachonce(root, "verify")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("verify: ")
    path = tree.path("embeddings")
    path.unlink()
    run = teachonce(root, "verify")
    assert run.returncode == 3
    assert run.stdout.startswith(f"missing: {path}: not in the store\nverify: ")
    assert run.stderr == (f"error: {tree.store.root}: 1 missing\n  cure: run `teachonce repair`\n")
    run = teachonce(root, "verify", "--sample", "2", "--seed", "1", "--json")
    assert run.returncode == 3
    facts = json.loads(run.stdout)["facts"]
    assert (len(facts["read"]), facts["seed"], facts["sound"]) == (2, 1, False)
    run = teachonce(root, "repair")
    assert run.returncode == 3
    assert run.stdout.splitlines()[0].endswith("made again: none; still missing: 1")
    assert "error: embed.teacher: 1 shards of vectors are lost" in run.stderr
    # Where nobody ever checked, not even the hashes of its files are known.
    (tree.at.root / "data/sources.json").unlink()
    second = teachonce(root, "repair")
    assert (second.returncode, second.stderr) == (3, run.stderr.partition("\n")[2])
    # A program is told what was moved all the same.
    damaged = flip_a_value(tree, "negatives")
    run = teachonce(root, "repair", "--json")
    facts = json.loads(run.stdout)["facts"]
    assert (run.returncode, list(facts["moved"])) == (3, [tree.keys("negatives")[0]])
    assert not damaged.exists()
    assert facts["missing"] == {
        "corpus": [],
        "embeddings": [tree.keys("embeddings")[0]],
        "negatives": [tree.keys("negatives")[0]],
    }
    assert facts["made"] == {"corpus": [], "embeddings": [], "negatives": []}
    assert teachonce(root, "verify", "--seed", "1").returncode == 2


def test_a_person_lists_compares_and_cleans(tree):
    root = tree.at.root
    run = teachonce(root, "ls")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[-1].startswith(
        f"ls: {4 * len(tree.keys('corpus')) + 1} objects, "
    )
    assert json.loads(teachonce(root, "ls", "--json").stdout)["stage"] == "ls"
    assert teachonce(root, "diff", "data/corpus.json", "data/corpus.json").returncode == 0
    run = teachonce(root, "diff", "data/corpus.json", "data/negatives.json", "--json")
    assert (run.returncode, json.loads(run.stdout)["facts"]["equal"]) == (1, False)
    for wrong in ("nowhere.json", "data", "params.yaml"):
        run = teachonce(root, "diff", "data/corpus.json", wrong)
        assert (run.returncode, run.stderr.startswith(f"error: {wrong}: ")) == (3, True)
    orphan = put_texts_of_nobody(tree)
    size = orphan.stat().st_size
    make_older(tree.store.root, days=13.9)
    run = teachonce(root, "gc", "--delete")
    assert run.stdout.startswith("kept, younger than 14 days (--grace): text: 1 objects, ")
    assert orphan.exists()
    run = teachonce(root, "gc", "--grace", "0")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("would go: text: 1 objects, ")
    run = teachonce(root, "gc", "--grace", "0", "--delete", "--json")
    assert json.loads(run.stdout)["facts"]["orphans"] == {f"text/{orphan.name}": size}
    assert not orphan.exists()
    flip_a_value(tree, "embeddings")
    moved = quarantine(Store(tree.store.root), tree.keys("embeddings")[0]).name
    assert teachonce(root, "gc").stdout.startswith(f"in quarantine: quarantine/{moved}\n")
    run = teachonce(root, "gc", "--quarantine", "--delete")
    assert run.stdout.startswith(f"deleted: quarantine/{moved}\ngc: ")
    run = teachonce(root, "gc", "--forget", "nope")
    assert (run.returncode, run.stderr.startswith("error: ref nope: 0 refs begin")) == (1, True)


def test_a_clone_on_the_same_store_keeps_what_it_needs(tree):
    """A second work tree has the manifests by Git; the first one is deleted and forgotten."""
    write_params(tree.at.root)
    clone = tree.at.root.parent / "clone"
    shutil.copytree(tree.at.root, clone, ignore=shutil.ignore_patterns("store", "work"))
    (clone / "params.yaml").write_text(
        (clone / "params.yaml").read_text().replace("store: store", f"store: {tree.store.root}")
    )
    count, refs = len(tree.files()), tree.store.root / "refs"
    firsts = sorted(path.stem for path in refs.iterdir())
    # Every command that opens a manifest says that it is held there, too.
    run = teachonce(clone, "verify")
    assert (run.returncode, run.stderr) == (0, "")
    assert len(list(refs.iterdir())) == 2 * len(firsts)
    listed = teachonce(clone, "ls").stdout
    assert f"in {clone}/data, last used " in listed
    options = [word for name in firsts for word in ("--forget", name)]
    run = teachonce(clone, "gc", "--delete", "--grace", "0", *options)
    assert (run.returncode, run.stderr) == (0, "")
    assert (
        f"objects are needed by {listed.partition(': ')[2].partition(' on ')[0]} on " in run.stdout
    )
    assert "gc: 0 objects that no ref names" in run.stdout
    assert len(tree.files()) == count
    # Nor what the folder needs in which it is typed, though nothing was noted yet.
    for path in refs.iterdir():
        path.unlink()
    assert teachonce(clone, "gc", "--delete", "--grace", "0").returncode == 0
    assert len(tree.files()) == count
