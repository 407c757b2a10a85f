"""Bugs put in on purpose: each must be caught by the test that is named beside it.

A bug is a small change to a copy of the source, in which the named tests are run and must fail. If the
text to be changed is not there any more, the bug must be put in anew.

Layers hide each other's bugs: what the disk lost, the digest finds. So there are bugs with the other
layers switched off, and at the end each layer alone.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.processes import needs_strace

ROOT = Path(__file__).parents[2]
SOURCE = (
    "pipeline",
    "stages",
    "storage",
    "teachonce",
    "tests",
    "params.yaml",
    "dvc.yaml",
    "pyproject.toml",
)

STORAGE, REMOTE, UPKEEP = (
    "tests/storage/test_storage.py",
    "tests/pipeline/test_remote.py",
    "tests/pipeline/test_upkeep.py",
)
BESIDE, HOLDERS = "tests/storage/test_beside_gc.py", "tests/storage/test_holders.py"
EMBED, MINE, SHARD = (
    "tests/stages/test_embed.py",
    "tests/stages/test_mine.py",
    "tests/stages/test_shard.py",
)
POWER, ERRORS = "tests/faults/test_power.py", "tests/faults/test_io.py"
ORDER = f"{POWER}::test_content_then_name_then_folder_then_report"
STATES = f"{POWER}::test_power_lost_at_any_moment"


@dataclass(frozen=True)
class Change:
    """`old` becomes `new` in a file of the source."""

    file: str
    old: str
    new: str


NO_FILE_FLUSH = Change(
    "storage/durable.py",
    "        os.fsync(sink.fileno())\n        with _if_supported",
    "        with _if_supported",
)
NO_FOLDER_FLUSH = Change(
    "storage/durable.py", "        _flush(path.parent)\n    return won", "    return won"
)
IN_PLACE = Change(
    "storage/durable.py",
    "        sink.flush()\n        os.fsync(sink.fileno())\n        scratch.replace(path)\n",
    "        path.write_bytes(content)\n",
)

NO_DIGEST = Change(
    "storage/store.py",
    "if payload_sha256(header.key, batch, header.facts, header.role) != header.sha256:",
    "if False:",
)
NO_NAME = Change("storage/store.py", "if header.key != key:", "if False:")
NO_COPY = Change("storage/store.py", "if sha256 != named.sha256:", "if False:")
NO_TEXTS = Change(
    "storage/column.py",
    "if len(ours) == len(theirs) and bool((ours == theirs).all()):",
    "if True:",
)

BUGS = {
    "no fsync of a new object": ([NO_FILE_FLUSH], f"{ORDER}[embed]"),
    "no fsync of the folder after an object got its name": ([NO_FOLDER_FLUSH], f"{ORDER}[embed]"),
    "a manifest is written in place": ([IN_PLACE], f"{ORDER}[grow]"),
    "a manifest gets its name before its content is flushed": (
        [
            Change(
                "storage/durable.py",
                "        os.fsync(sink.fileno())\n        scratch.replace(path)\n",
                "        scratch.replace(path)\n        os.fsync(sink.fileno())\n",
            )
        ],
        f"{ORDER}[embed]",
    ),
    "a new folder is not flushed into the one above": (
        [
            Change(
                "storage/durable.py",
                "        folder.mkdir(exist_ok=True)\n        _flush(folder.parent)\n",
                "        folder.mkdir(exist_ok=True)\n",
            )
        ],
        f"{STATES}[embed]",
    ),
    "an object is put in place by rename, which overwrites": (
        [Change("storage/durable.py", "os.link(file, target)", "os.rename(file, target)")],
        f"{STORAGE}::test_one_of_many_writers_wins_and_all_see_its_file",
    ),
    "nobody waits where a name is looked at and then given by rename": (
        [Change("storage/durable.py", "fcntl.flock(descriptor, fcntl.LOCK_EX)", "pass")],
        f"{STORAGE}::test_without_links_a_second_writer_waits_while_the_first_looks_and_renames[EPERM]",
    ),
    "a flush that failed is tried again": (
        [
            Change(
                "storage/durable.py",
                "        os.fsync(sink.fileno())\n        with _if_supported",
                "        try:\n            os.fsync(sink.fileno())\n        except OSError:\n"
                "            os.fsync(sink.fileno())\n        with _if_supported",
            )
        ],
        f"{ERRORS}::test_a_flush_that_failed_is_not_tried_again[shard]",
    ),
    "push writes names before bytes": (
        [
            Change(
                "pipeline/commands/transfer.py",
                '    result = _each("push", objects, send)\n',
                "    for path, manifest in manifests.items():\n"
                "        remote.push_ref(manifest.ref, manifest.note(path))\n"
                '    result = _each("push", objects, send)\n',
            )
        ],
        f"{ORDER}[push]",
    ),
    "pull writes names before bytes": (
        [
            Change(
                "pipeline/commands/transfer.py",
                '    result = _each("pull", objects, fetch)\n',
                "    for path, manifest in manifests.items():\n"
                "        manifest.write_ref(path, store)\n"
                '    result = _each("pull", objects, fetch)\n',
            )
        ],
        f"{ORDER}[pull]",
    ),
    "what comes from a remote gets its name unproved": (
        [
            Change(
                "storage/store.py", "            accept(*_prove(key, pa.py_buffer(content)))\n", ""
            )
        ],
        f"{REMOTE}::test_no_flipped_byte_is_accepted",
    ),
    "the size is checked, the values are not": (
        [NO_DIGEST],
        f"{EMBED}::test_rot_is_not_carried_into_a_fresh_manifest",
    ),
    "the digest is that of the buffer, not of the file that is there": (
        [
            Change(
                "storage/store.py",
                "        published = self.find(key)\n        if published is None:\n",
                "        size = self.path(key).stat().st_size\n"
                "        published = Object(key=key, rows=len(batch), bytes=size, sha256=sha256)\n"
                "        if published is None:\n",
            )
        ],
        f"{STORAGE}::test_the_second_to_put_a_key_gets_the_copy_of_the_first",
    ),
    "an object is not asked for its name": (
        [NO_NAME],
        f"{STORAGE}::test_a_swapped_object_is_refused_by_its_name",
    ),
    "another copy is taken for the one that the manifest names": (
        [NO_COPY],
        f"{STORAGE}::test_another_copy_is_told_apart_from_damage",
    ),
    "vectors are not compared with the texts they belong to": (
        [NO_TEXTS],
        f"{STORAGE}::test_vectors_under_a_forged_key_name_the_first_wrong_row",
    ),
    "no length before a text in the digest of a shard": (
        [
            Change(
                "storage/store.py",
                '        total.update(len(view).to_bytes(8, "little"))\n        total.update(view)\n'
                "    return total.hexdigest()\n\n\ndef canonical_json",
                "        total.update(view)\n    return total.hexdigest()\n\n\ndef canonical_json",
            )
        ],
        f"{STORAGE}::test_digests_of_different_sequences_differ",
    ),
    "a fingerprint without the prompt": (
        [Change("stages/embed.py", '"prompt": prompts["text"],', '"prompt": "",')],
        f"{EMBED}::test_each_setting_of_the_recipe_changes_the_fingerprint",
    ),
    "the first neighbour is dropped as the row itself": (
        [
            Change(
                "stages/mining/filters.py",
                '"itself": neighbours == own[:, None],',
                '"itself": np.arange(neighbours.shape[1])[None, :] == 0,',
            )
        ],
        f"{MINE}::test_of_two_equal_rows_both_are_kept_from_each_other_by_their_text",
    ),
    "gc deletes the scratch file of a living worker": (
        [
            Change(
                "storage/upkeep/inventory.py",
                "inventory.scratch if now - file.written >= DAY",
                "inventory.scratch if True",
            )
        ],
        f"{UPKEEP}::test_scratch_files_are_deleted_when_they_are_a_day_old",
    ),
    "gc deletes what it took away without reading the refs again": (
        [
            Change(
                "pipeline/commands/gc.py",
                "        if file.name in orphans and (file.name, file.written) in before_gc\n",
                "",
            )
        ],
        f"{BESIDE}::test_some_orders_where_objects_are_somebody_elses[14.0]",
    ),
    "a stage does not look again after it has left its ref": (
        [
            Change(
                "storage/manifest.py",
                "                store.check_present(entry)\n",
                "                pass\n",
            )
        ],
        f"{BESIDE}::test_some_orders_where_objects_are_somebody_elses[14.0]",
    ),
    "who finds an object does not touch it": (
        [Change("storage/store.py", "                    durable.touch(descriptor)\n", "")],
        f"{STORAGE}::test_who_finds_an_object_makes_it_young_and_reads_it_once",
    ),
    "gc takes any scratch file for its own": (
        [
            Change(
                "storage/upkeep/inventory.py",
                '    is_scratch = scratch and re.fullmatch(WRITTEN_PATTERN, f"{folder}/{scratch[1]}")\n',
                "    is_scratch = scratch\n",
            )
        ],
        f"{UPKEEP}::test_what_no_writer_of_ours_leaves_is_nobodys_scratch_file",
    ),
    "the second holder of a manifest writes over the ref of the first": (
        [
            Change(
                "storage/holders.py",
                "        if durable.publish(ref, write):\n            return ref\n",
                "        durable.replace(ref, content)\n        return ref\n",
            )
        ],
        f"{HOLDERS}::test_forgetting_a_dead_work_tree_takes_nothing_from_a_living_one",
    ),
    "poison is stored": (
        [
            Change(
                "storage/embeddings.py",
                "    if faulty_rows := poison(vectors, storage):\n",
                "    if (faulty_rows := poison(vectors, storage)) and False:\n",
            )
        ],
        f"{STORAGE}::test_poison_is_not_stored",
    ),
    # With the digest switched off, so that nobody else finds what the disk has lost.
    "no fsync of a new object, and no digest": ([NO_FILE_FLUSH, NO_DIGEST], f"{STATES}[embed]"),
    "no fsync of the folder, and no digest": ([NO_FOLDER_FLUSH, NO_DIGEST], f"{STATES}[embed]"),
    "a manifest is written in place, and no digest": ([IN_PLACE, NO_DIGEST], f"{STATES}[grow]"),
}

LAYERS = {
    "the digest of the values": (
        NO_DIGEST,
        f"{EMBED}::test_rot_is_not_carried_into_a_fresh_manifest",
    ),
    "the name in the header": (
        NO_NAME,
        f"{STORAGE}::test_a_swapped_object_is_refused_by_its_name",
    ),
    "the copy that the manifest names": (
        NO_COPY,
        f"{STORAGE}::test_another_copy_is_told_apart_from_damage",
    ),
    "the text keys beside the vectors": (
        NO_TEXTS,
        f"{STORAGE}::test_vectors_under_a_forged_key_name_the_first_wrong_row",
    ),
}


@pytest.fixture
def source(tmp_path):
    """A copy of the source that may be spoilt."""
    for name in SOURCE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tmp_path / name)
    return tmp_path


def spoil(source, changes):
    """Make the changes."""
    for change in changes:
        path = source / change.file
        content = path.read_text()
        assert content.count(change.old) == 1, (
            f"{change.old!r} is not in {change.file} once any more"
        )
        path.write_text(content.replace(change.old, change.new))


def outcome(source, test):
    """The exit code of pytest (0 passed, 1 failed, others: it did not run), and what it said."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_caught(bug, source, count):
    changes, test = BUGS[bug]
    if test.startswith(ERRORS):
        needs_strace()
    spoil(source, changes)
    code, said = outcome(source, test)
    assert code == 1, f"not caught by {test}:\n{said}"
    assert f"FAILED {test}" in said, said
    count("bugs put in on purpose", 1, "not caught by the test named for it")


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_holds_alone(layer, source, count):
    """With the other layers switched off it does its part; with itself off as well, nobody does."""
    own, test = LAYERS[layer]
    spoil(source, [off for off, _ in LAYERS.values() if off is not own])
    code, said = outcome(source, test)
    assert code == 0, said
    spoil(source, [own])
    assert outcome(source, test)[0] == 1
    count("layers of checking, each alone", 1, "letting through what is its to stop")
