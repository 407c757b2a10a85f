"""A disk that forgets: what may be left of a folder after a power cut, by what was flushed and what not.

POSIX promises nothing of a file's content before its fsync, and nothing of a name before the fsync of
its folder. `Recorder` notes what a run does to a folder and in which order; `states` draws from what may
be found afterwards: content that was not flushed is whole, gone, zeros or cut in half, and each change of
a name that was not flushed has happened or not, in any order.
"""

import os
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

CALLS = ("open", "fsync", "link", "rename", "replace", "unlink", "mkdir", "rmdir")


@dataclass(frozen=True)
class Named:
    """Names below the folder changed in one step: path -> inode, None where a name went."""

    names: dict[str, int | None]


@dataclass(frozen=True)
class Written:
    """The content of a file, as other processes see it."""

    inode: int
    content: bytes


@dataclass(frozen=True)
class Flushed:
    """fsync of a file or folder returned."""

    inode: int


@dataclass(frozen=True)
class Told:
    """The run let it be known that these files are there, with this content."""

    contents: dict[str, bytes]


class Recorder:
    """Notes what is done to a folder while it is entered.

    It looks at the whole folder before and after each call that may change it, so it also sees what is
    written in other ways than through `storage.durable`.
    """

    def __init__(self, folder, patch):
        self.folder, self.patch = folder, patch
        self.events = []
        self._names, self._contents, self._seen = {}, {}, {}
        self._numbers, self._free = {}, count(1)
        self._lock = threading.RLock()  # one call at a time, whatever the number of threads

    def __enter__(self):
        self.look()
        self.start, self.events = Disk.after(self.events, flushed=True), []
        for name in CALLS:
            self.patch.setattr(os, name, self._noting(getattr(os, name), name))
        return self

    def __exit__(self, *exception):
        self.patch.undo()
        self.look()

    def told(self, contents):
        """Note that these files were reported done."""
        self.look()
        self.events.append(Told(contents))

    def look(self):
        """Note what has changed since the last look."""
        names, contents, numbers = {}, {}, {}
        for path in [self.folder, *self.folder.rglob("*")]:
            status = path.lstat()
            inode = self._numbers.get(status.st_ino) or numbers.get(status.st_ino)
            # The file system gives the number of an inode that is gone to the next one; we do not.
            numbers[status.st_ino] = inode = inode or next(self._free)
            names["" if path == self.folder else str(path.relative_to(self.folder))] = inode
            if path.is_file():
                key = (inode, status.st_size, status.st_mtime_ns)
                if key not in self._seen:
                    self._seen[key] = path.read_bytes()
                contents[inode] = self._seen[key]
        self._numbers = numbers
        for inode, content in contents.items():
            if self._contents.get(inode) != content:
                self.events.append(Written(inode, content))
        changed = {name: inode for name, inode in names.items() if self._names.get(name) != inode}
        changed |= dict.fromkeys(self._names.keys() - names.keys())
        if changed:
            self.events.append(Named(changed))
        self._names, self._contents = names, contents

    def _noting(self, call, name):
        def noted(*arguments, **options):
            with self._lock:
                self.look()
                result = call(*arguments, **options)
                self.look()
                if name == "fsync":
                    inode = self._numbers.get(os.fstat(arguments[0]).st_ino)
                    if inode is not None:
                        self.events.append(Flushed(inode))
                return result

        return noted


@dataclass
class Disk:
    """What is flushed, and what only the memory of the machine knows.

    Args:
        names: path -> inode, flushed.
        pending: Changes of names that are not, in their order, each with its folder's path.
        flushed: inode -> content, flushed.
        latest: inode -> content as it was written.
        told: name -> content of what was reported done.
    """

    names: dict = field(default_factory=dict)
    pending: list = field(default_factory=list)
    flushed: dict = field(default_factory=dict)
    latest: dict = field(default_factory=dict)
    told: dict = field(default_factory=dict)

    @classmethod
    def after(cls, events, *, flushed=False):
        """A disk on which `events` have happened and everything was flushed, or nothing was before."""
        disk = cls()
        for event in events:
            disk.happens(event)
        if flushed:
            for _, names in disk.pending:
                disk._rename(disk.names, names)
            disk.pending, disk.flushed = [], dict(disk.latest)
        return disk

    def copy(self):
        """Another one with the same content."""
        return Disk(
            dict(self.names),
            list(self.pending),
            dict(self.flushed),
            dict(self.latest),
            dict(self.told),
        )

    def happens(self, event):
        """Take one step."""
        if isinstance(event, Named):
            groups = defaultdict(dict)
            for name, inode in event.names.items():
                groups[_folder(name)][name] = inode
            self.pending += groups.items()
        elif isinstance(event, Written):
            self.latest[event.inode] = event.content
        elif isinstance(event, Flushed):
            if event.inode in self.latest:
                self.flushed[event.inode] = self.latest[event.inode]
            current = self.current_names()
            still = []
            for folder, names in self.pending:
                if current.get(folder) == event.inode:
                    self._rename(self.names, names)
                else:
                    still.append((folder, names))
            self.pending = still
        else:
            self.told |= event.contents

    def current_names(self):
        """path -> inode, as other processes see it."""
        names = dict(self.names)
        for _, changes in self.pending:
            self._rename(names, changes)
        return names

    def left(self, draw):
        """path -> content (None for a folder) of what one power cut may leave; drawn by chance."""
        names = dict(self.names)
        for _, changes in self.pending:
            if draw.random() < 0.5:
                self._rename(names, changes)
        found = {}
        for name in sorted(names):
            if name and _folder(name) not in found:
                continue  # its folder is gone
            inode = names[name]
            if inode not in self.latest:
                found[name] = None
                continue
            content = self.latest[inode]
            if self.flushed.get(inode) != content:
                content = draw.choice(
                    [
                        content,
                        self.flushed.get(inode, b""),
                        bytes(len(content)),
                        content[: len(content) // 2],
                    ]
                )
            found[name] = content
        return found

    @staticmethod
    def _rename(names, changes):
        for name, inode in changes.items():
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode


def _folder(name):
    return name.rpartition("/")[0]


def states(recorder, draw, *, per_step):
    """What a power cut at any moment may leave, each different: (disk at that moment, what is left)."""
    disk, seen = recorder.start.copy(), set()
    for event in [None, *recorder.events]:
        if event is not None:
            disk.happens(event)
        for _ in range(per_step):
            left = disk.left(draw)
            key = hash((frozenset(left.items()), frozenset(disk.told)))
            if key not in seen:
                seen.add(key)
                yield disk, left


def lay_out(left, folder):
    """Make a folder with what is left."""
    folder.mkdir()
    for name, content in left.items():
        path = folder / name
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)
    return Path(folder)
