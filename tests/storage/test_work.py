"""Files that stages make for themselves: whole or not believed, and known to gc."""

import hashlib
import os
import time

import pytest

from storage import work
from storage.errors import StorageError
from storage.upkeep.inventory import DAY, plan_sweep, take_inventory

NAME = f"work/{'3' * 40}.faiss"
CONTENT = [b"first " * 40, b"", b"last"]


@pytest.fixture
def file(tmp_path):
    def write(take):
        assert [take(part) for part in CONTENT] == [240, 0, 4]

    work.publish(tmp_path / NAME, write)
    return tmp_path / NAME


def test_a_file_ends_with_the_sha256_of_all_before(file):
    content = b"".join(CONTENT)
    assert file.read_bytes() == content + hashlib.sha256(content).digest()
    assert file.stat().st_mode & 0o222 == 0
    assert work.find(file)


def test_the_first_of_two_stays(file):
    before = file.read_bytes()
    work.publish(file, lambda take: take(b"another"))
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c + b"x", lambda c: b"F" + c[1:]])
def test_what_is_not_whole_is_removed(file, damage, monkeypatch):
    monkeypatch.setattr(work, "BYTES_AT_ONCE", 7)
    assert work.find(file)
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(content))
    assert not work.find(file)
    assert not file.exists()


@pytest.mark.parametrize("content", [b"", b"short", b"0" * 32])
def test_what_is_too_short_or_no_file_of_ours_is_removed(file, content):
    file.unlink()
    file.write_bytes(content)
    assert not work.find(file)
    assert not file.exists()


def test_a_link_is_not_followed(file, tmp_path):
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert not work.find(file)
    assert not file.is_symlink()
    assert (tmp_path / "elsewhere").exists()


def test_a_file_that_ends_while_it_is_read_is_not_whole(file):
    assert not work._is_whole(file, file.stat().st_size + 1)


def test_what_may_not_be_read_is_said(file, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(work, "_is_whole", refuse)
    with pytest.raises(StorageError, match="reading failed: Permission denied"):
        work.find(file)


def test_gc_takes_what_nobody_used_for_a_day(file, tmp_path):
    now = time.time()

    def swept(age):
        os.utime(file, (now - age, now - age))
        return [found.name for found in plan_sweep(inventory(), [], now=now, grace=0).scratch]

    def inventory():
        found = take_inventory(tmp_path)
        assert not found.foreign
        return found

    (file.parent / f".{file.name}.77.0123abcd.tmp").write_bytes(b"of a writer")
    assert swept(DAY + 1) == [NAME]
    assert swept(DAY - 60) == []
    os.utime(file, (now - 2 * DAY, now - 2 * DAY))
    assert work.find(file)
    assert file.stat().st_mtime > now - 60
