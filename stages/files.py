"""Files that settings name by globs, and errors that say which of them is damaged."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import pyarrow as pa
import zstandard

from storage import durable
from storage.errors import MissingError, TeachonceError, shown

COMPRESSED_ENDINGS = (".gz", ".zst")


def with_compressed(*endings: str) -> tuple[str, ...]:
    """Each ending of a file of lines, plain and compressed: `.txt`, `.txt.gz`, `.txt.zst`."""
    return (*endings, *(ending + packed for ending in endings for packed in COMPRESSED_ENDINGS))


def unpacked_name(path: Path) -> str:
    """The name in lower case without `.gz` or `.zst`: its ending says what the lines are."""
    return path.name.lower().removesuffix(".gz").removesuffix(".zst")


def matching(pattern: str, root: Path, *, address: str, endings: Sequence[str]) -> list[Path]:
    """Files that one glob names, sorted; a file of exactly that name wins over what a glob would mean.

    Args:
        pattern: A glob (`**` too), relative to `root` or absolute or with `~`.
        root: The work tree.
        address: The setting to name in an error.
        endings: Those that somebody reads.

    Raises:
        MissingError: it matches no file.
        TeachonceError: it matches one with another ending.
        StorageError: the operating system refused to look.
    """
    wanted = root / Path(pattern).expanduser()
    with durable.named(wanted, "looking for the file"):
        if wanted.is_file():
            files = [wanted]
        else:
            # Not Path.glob: it refuses absolute patterns and walks into hidden folders.
            matches = glob(str(Path(pattern).expanduser()), root_dir=root, recursive=True)  # noqa: PTH207
            files = [root / match for match in sorted(matches) if (root / match).is_file()]
    if not files:
        raise MissingError(
            address,
            f"{shown(repr(pattern))} matches no file below {root}",
            "mend the pattern in params.yaml, or put the files there",
        )
    for path in files:
        if not path.name.lower().endswith(tuple(endings)):
            raise TeachonceError(
                address,
                f"{shown(repr(pattern))} matches {shown(path)}, and nothing reads that ending",
                f"narrow the pattern to files that end in one of {' '.join(endings)}",
            )
    return files


@contextmanager
def reading(path: Path, cure: str) -> Iterator[None]:
    """Turn what a damaged or unreadable file raises inside into an error that names the file."""
    try:
        yield
    except TeachonceError:
        raise
    except EOFError as error:
        raise TeachonceError(path, "truncated: it ends before its content does", cure) from error
    except (
        OSError,
        ValueError,
        zlib.error,
        zstandard.ZstdError,
        pa.ArrowException,
    ) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TeachonceError(path, f"cannot be read: {shown(cause)}", cure) from error
