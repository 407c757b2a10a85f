"""What a worker and who hands out tell each other, and what both kinds of workers have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from stages.teaching.interface import Encoded, Task, Teacher, encoded
from storage.errors import TeachonceError
from storage.probe import PROBE_TEXTS


@dataclass(frozen=True)
class Lost:
    """A worker is no more."""

    why: str


@dataclass(frozen=True)
class Loaded:
    """A worker has a teacher.

    Args:
        said: Of the probe texts.
        ahead: How many more tasks it may have in hand than the one that it encodes.
    """

    said: Encoded
    ahead: int


@dataclass(frozen=True)
class Done:
    """What came of a shard."""

    shard: int
    made: Encoded | TeachonceError


Word = Loaded | TeachonceError | Done | Lost
"""What comes from a worker: first that it has a teacher or why it has none, then what it did."""


def introduced(teacher: Teacher) -> Loaded | TeachonceError:
    """A worker's first word."""
    said = encoded(teacher.encode, PROBE_TEXTS)
    return said if isinstance(said, TeachonceError) else Loaded(said, teacher.ahead)


class Crew(Protocol):
    """Workers, by number."""

    size: int

    def start(self) -> int:
        """A new worker; it loads the teacher."""

    def give(self, worker: int, task: Task) -> None:
        """A task for a worker that has a teacher."""

    def next_word(self) -> tuple[int, Word]:
        """Wait for any worker; one that is lost is not heard of again."""

    def dismiss(self, worker: int) -> None:
        """End a worker that has nothing in hand."""

    def close(self) -> None:
        """End all, whatever they are at."""
