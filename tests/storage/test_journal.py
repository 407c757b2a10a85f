"""What was paid for is found again, whole or not at all, and deleted when it stands in a shard."""

import os
import threading

import numpy as np
import pytest

from storage import durable
from storage.column import TEXT_KEY_BYTES
from storage.errors import StorageError
from storage.journal import FILE_BYTES, HEAD, Journal, Ledger
from storage.upkeep.inventory import DAY, plan_sweep, take_inventory

ONE, OTHER = "1" * 40, "2" * 40


def keys(*numbers):
    return [bytes([number]) * TEXT_KEY_BYTES for number in numbers]


def as_column(*numbers):
    return np.frombuffer(b"".join(keys(*numbers)), f"V{TEXT_KEY_BYTES}")


def vectors(*numbers, dim=4):
    return np.array(
        [[number + place / 8 for place in range(dim)] for number in numbers], np.float32
    )


def keep(journal, *numbers, teacher=ONE):
    journal.keep(teacher, keys(*numbers), vectors(*numbers), [10 * number for number in numbers])


def files(root):
    return sorted(path for path in (root / "journal").rglob("*") if path.is_file())


def found(root, *numbers, teacher=ONE):
    """What a new process finds."""
    journal = Journal(root)
    answers = [journal.find(teacher, key) for key in keys(*numbers)]
    return [None if one is None else (one.vector.tolist(), one.tokens) for one in answers]


def expected(*numbers):
    return [(vectors(number)[0].tolist(), 10 * number) for number in numbers]


def test_an_answer_is_found_by_teacher_and_text_alone(tmp_path):
    keep(Journal(tmp_path), 1, 2)
    keep(Journal(tmp_path), 3)
    assert found(tmp_path, 3, 1, 2) == expected(3, 1, 2)
    assert found(tmp_path, 4) == [None]
    assert found(tmp_path, 1, teacher=OTHER) == [None]
    assert Journal(tmp_path / "nowhere").is_empty(ONE)


def test_the_first_bytes_of_a_record_are_no_answer_wherever_it_was_cut(tmp_path, caplog):
    keep(Journal(tmp_path), 1, 2)
    (file,) = files(tmp_path)
    first = file.read_bytes()
    file.unlink()
    keep(Journal(tmp_path), 3, 4)
    (file,) = files(tmp_path)
    second = file.read_bytes()
    for cut in (0, 1, HEAD.size - 1, HEAD.size, HEAD.size + 5, len(second) - 1):
        caplog.clear()
        file.write_bytes(first + second[:cut])
        assert found(tmp_path, 1, 2, 3, 4) == [*expected(1, 2), None, None]
        assert ("was not written whole" in caplog.text) == bool(cut)
    file.write_bytes(first + second)
    assert found(tmp_path, 1, 2, 3, 4) == expected(1, 2, 3, 4)


@pytest.mark.parametrize("place", range(0, 96, 7))
def test_a_flipped_bit_is_no_answer(tmp_path, place):
    keep(Journal(tmp_path), 1)
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1
    file.write_bytes(content)
    assert found(tmp_path, 1) == [None]


def test_a_file_without_a_byte_and_foreign_files_are_passed_over(tmp_path):
    keep(Journal(tmp_path), 1)
    folder = tmp_path / "journal" / ONE
    (folder / ("a" * 16)).touch()
    (folder / "notes.txt").write_text("mine")
    assert found(tmp_path, 1) == expected(1)


def test_a_file_goes_when_all_its_answers_are_in_shards(tmp_path):
    journal = Journal(tmp_path)
    journal.forget(ONE, as_column(9))
    keep(journal, 1, 2)
    journal.forget(ONE, as_column(1))
    assert found(tmp_path, 1, 2) == expected(1, 2)
    assert not journal.is_empty(ONE)
    journal.forget(ONE, as_column(2, 3))
    assert (files(tmp_path), journal.is_empty(ONE)) == ([], True)
    keep(journal, 4)
    assert found(tmp_path, 4) == expected(4)


def test_a_file_in_which_another_run_has_gone_on_stays(tmp_path):
    other = Journal(tmp_path)
    keep(other, 1)
    journal = Journal(tmp_path)
    assert journal.find(ONE, keys(1)[0]) is not None
    keep(other, 2)
    journal.forget(ONE, as_column(1))
    assert found(tmp_path, 2) == expected(2)
    files(tmp_path)[0].unlink()
    other.forget(ONE, as_column(1, 2))  # somebody else was faster


def test_a_file_that_is_large_gets_no_more_records(tmp_path):
    journal = Journal(tmp_path)
    keep(journal, 1)
    assert FILE_BYTES == 64 << 20
    next(iter(journal._files[ONE].values())).size = FILE_BYTES + 1
    keep(journal, 2)
    assert len(files(tmp_path)) == 2
    assert found(tmp_path, 1, 2) == expected(1, 2)


def test_threads_write_whole_records(tmp_path):
    journal = Journal(tmp_path)
    threads = [threading.Thread(target=keep, args=(journal, number)) for number in range(1, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found(tmp_path, *range(1, 20)) == expected(*range(1, 20))


def test_a_disk_that_refuses_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    journal = Journal(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        keep(journal, 1)


def test_an_answer_after_one_that_was_cut_off_by_an_error_is_found(tmp_path, monkeypatch):
    journal, write = Journal(tmp_path), os.write
    keep(journal, 1)

    def fills(descriptor, content):
        if len(content) < HEAD.size:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[: HEAD.size + 5])

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", fills)
        with pytest.raises(StorageError, match="No space left"):
            keep(journal, 2)
    keep(journal, 3)
    assert found(tmp_path, 1, 2, 3) == [*expected(1), None, *expected(3)]


def test_append_adds_at_the_end_and_writes_all_of_it(tmp_path, monkeypatch):
    write, path = os.write, tmp_path / "a" / "b"
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:3]))
    durable.append(path, b"one and ")
    durable.append(path, b"two")
    assert path.read_bytes() == b"one and two"


def test_a_ledger_adds_up_what_all_runs_have_paid(tmp_path):
    ours, theirs = Ledger(tmp_path, "a-model"), Ledger(tmp_path, "a-model")
    assert ours.total() == 0
    ours.add(5)
    theirs.add(7)
    assert (ours.total(), theirs.total()) == (12, 12)
    ours.add(100)
    assert (ours.total(), theirs.total(), Ledger(tmp_path, "a-model").total()) == (112, 112, 112)
    assert Ledger(tmp_path, "another").total() == 0


@pytest.mark.parametrize("torn", ["1", "12", "12 0", "12 00000000", "12 00000000\n", "-3 \xff\n"])
def test_a_line_that_was_cut_off_counts_nothing_and_costs_no_other(tmp_path, torn):
    ledger = Ledger(tmp_path, "a-model")
    ledger.add(5)
    with ledger.path.open("a", encoding="latin-1") as file:
        file.write(torn)
    assert ledger.total() == 5
    ledger.add(6)
    assert (ledger.total(), Ledger(tmp_path, "a-model").total()) == (11, 11)


def test_gc_spares_answers_as_long_as_orphans_and_the_sum_for_ever(tmp_path):
    keep(Journal(tmp_path), 1)
    Ledger(tmp_path, "a-model").add(5)
    (tmp_path / "journal" / "mine").write_text("x")
    inventory = take_inventory(tmp_path)
    (answers,) = inventory.answers
    assert [file.name for file in inventory.foreign] == ["journal/mine"]
    young = plan_sweep(inventory, [], now=answers.written + DAY, grace=2 * DAY)
    assert (young.young, young.scratch) == ((answers,), ())
    old = plan_sweep(inventory, [], now=answers.written + 3 * DAY, grace=2 * DAY)
    assert (old.young, old.scratch) == ((), (answers,))
