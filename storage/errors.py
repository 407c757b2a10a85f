"""Errors that a person can act on: where it happened, what is wrong there, what to type next.

Everything raised on purpose in this project derives from `TeachonceError`. The command line prints
it without a traceback and exits with its `exit_code`; anything else is a bug and keeps its traceback.

The whole tree; the exit code is 1 where none is given:

- TeachonceError
  - SettingsError: wrong settings, all of them at once (stages/params.py)
  - RowError: no such row; an `IndexError`, too
  - StorageError: the operating system refused a read or a write
  - MissingError: something that a manifest or a stage names is not there; exit code 3
  - DamagedError: an object or a manifest is not what it says it is; exit code 3
  - AnotherCopyError: a whole object, but not the copy that the manifest names; exit code 3
  - IrregularError: a folder, a pipe or a device where a file belongs (storage/regular.py)
  - RemoteError: the remote could not be reached, or refused (storage/remote.py)
  - BadVectorsError: NaN, Inf or zero, or too large or small to be stored (storage/embeddings.py)
  - DriftedTeacherError: the teacher returns other vectors than its cache has (stages/teaching/drift.py)
  - FailedShardsError: some shards could not be embedded; the others are published (stages/embed.py)
  - StoppedTeacherError: the teacher cannot go on, whatever it is given (stages/teaching/interface.py)
    - BudgetError: the next request could pass the budget (stages/teaching/api_budget.py)
  - RefusedTextsError: the teacher refuses some of its texts (stages/teaching/interface.py)
  - RefusedRequestError: a server refuses a request for its texts (stages/teaching/api_server.py)
"""

from __future__ import annotations

import copyreg
import os
from pathlib import Path
from typing import Any

SHOWN_CHARACTERS = 300


def shown(value: object) -> str:
    """`value` as it may stand in a message: on one line, no control characters, at most 300 long.

    Names and texts come from files of strangers; a newline or an escape sequence in one of them must
    not be able to write lines of its own to somebody's terminal.
    """
    text = harmless(str(value).replace("\n", "\\n"))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class, as it may stand in a message."""
    return shown((str(error).splitlines() or [type(error).__name__])[0])


def as_utf8(path: str | os.PathLike[str]) -> str:
    r"""A path as text that JSON can hold, the same in every locale; a byte that is no UTF-8 as `\xff`."""
    return os.fsencode(path).decode(errors="backslashreplace")


def harmless(text: str) -> str:
    """`text` without control characters, however long; it keeps its lines."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


class TeachonceError(Exception):
    """An error that the user can resolve.

    Args:
        where: File, setting or object key.
        problem: Description of the fault, with the wrong value.
        cure: Instruction that resolves it, usually a command.
    """

    exit_code = 1

    def __init__(self, where: str | Path, problem: str, cure: str) -> None:
        self.where, self.problem, self.cure = str(where), problem, cure
        super().__init__(f"{shown(where)}: {harmless(problem)}\n  cure: {harmless(cure)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle attributes as they are: `__init__` would get the whole message as `where`."""
        return copyreg.__newobj__, (type(self), str(self)), self.__dict__  # type: ignore[attr-defined]


class RowError(TeachonceError, IndexError):
    """A row id that the corpus has not, or an index that is no row id."""


class StorageError(TeachonceError):
    """The operating system refused a read or a write: full disk, no permission, failing device."""


class MissingError(TeachonceError):
    """A file or object that a manifest or a stage names does not exist."""

    exit_code = 3


class DamagedError(TeachonceError):
    """An object or a manifest exists, but its content is not what its name or checksum says."""

    exit_code = 3


class AnotherCopyError(TeachonceError):
    """An object is whole, but not the copy that the manifest names.

    The same teacher on other hardware, threads or library versions gives other last bits, so this is
    no damage; but vectors of two copies must not be mixed unnoticed in one training run.
    """

    exit_code = 3
