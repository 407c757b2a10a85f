"""Read corpus files: one item for each line or cell, in order, in bounded memory.

Every line of a text file and every cell of a column gives exactly one item: a text, or the rule that
rejects it. Nothing is dropped here, so the items can be counted. A truncated file is an error, never a
shorter corpus.

This file is long because every format is here, each with its own way of hiding that a file was truncated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from stages.params import ShardParams
from stages.reading.files import (
    files_below,
    located,
    matching,
    reading,
    unpacked_name,
    with_compressed,
)
from stages.reading.lines import check_start, converted, is_utf8, lines
from storage import regular
from storage.errors import TeachonceError, shown
from storage.ipc import unpacked_bytes
from storage.roles import Role

Rule = Literal["undecodable", "malformed", "too_long"]


@dataclass(frozen=True)
class Rejected:
    """A line or cell without a valid text."""

    # `undecodable` (not UTF-8, or a lone surrogate in JSON), `malformed` (no JSON object, or the
    # field is absent, null or no string), `too_long` (a line above `lines.MAX_LINE_BYTES`).
    rule: Rule


Item = str | Rejected

UNDECODABLE, MALFORMED, TOO_LONG = (
    Rejected("undecodable"),
    Rejected("malformed"),
    Rejected("too_long"),
)
ONE_A_LINE = (
    "python3 -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]'"
)
NULL = Rejected("malformed")
"""Equal to MALFORMED, but another object: the field is there, only its value is null."""

DATASET = "dataset:"
LINE_ENDINGS = (".txt", ".jsonl")
COLUMN_ENDINGS = (".parquet", ".arrow")
ENDINGS = (*with_compressed(*LINE_ENDINGS), *COLUMN_ENDINGS)

OWN_ENDINGS = (*with_compressed(".jsonl"), *COLUMN_ENDINGS)
"""Of files of a dataset's folder that are read here, not by `datasets`."""

ROWS_AT_ONCE = 4096

# Texts do not shrink to a hundredth; what says so is a few bytes that unpack to gigabytes.
MOST_EXPANSION = 100
ALWAYS_ALLOWED_BYTES = 64 << 20

# What an Arrow stream ends with. Without it, one cut between two batches reads like a whole one.
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"

CURE = "fetch or make the file again, or take it out of `shard.sources` in params.yaml"


@dataclass(frozen=True)
class DatasetName:
    """The parts of `dataset:<name>[[:<config>]:<split>]`."""

    name: str  # A hub name, or the path of a folder
    # The folder of that name, made by `save_to_disk` or readable by `load_dataset`; None for a hub
    # name.
    folder: Path | None
    split: str | None  # name of the split; None only if there is a single one
    config: str | None = None  # name of the dataset's configuration; None for its default

    def __str__(self) -> str:
        return DATASET + ":".join(filter(None, (self.name, self.config, self.split)))


def sources(patterns: Sequence[str], root: Path) -> list[Path | DatasetName]:
    """Returns the files and datasets of `shard.sources`, in order; files of one pattern sorted by path.

    Args:
        patterns: Globs (`**` too), relative to `root` or absolute or with `~`; or `dataset:...`.
        root: The work tree.

    Returns:
        Each file or dataset once, at its first place.

    Raises:
        TeachonceError: a pattern matches no file, or a file with an unsupported ending.
    """
    named_sources: dict[Path | DatasetName, Path | DatasetName] = {}
    for pattern in patterns:
        if pattern.startswith(DATASET):
            named = _dataset_name(pattern.removeprefix(DATASET), root)
            named_sources.setdefault(named, named)
        else:
            for path in matching(pattern, root, address="shard.sources", endings=ENDINGS):
                named_sources.setdefault(path.resolve(), path)
    return list(named_sources.values())


def sources_with_fields(
    params: ShardParams, role: Role, root: Path
) -> list[tuple[Path | DatasetName, str]]:
    """Returns the sources of one role, each once, with the field that holds the text.

    Raises:
        TeachonceError: as `sources`.
    """
    by_place: dict[Path | DatasetName, tuple[Path | DatasetName, str]] = {}
    for named in params.sources_of(role):
        for source in sources([named.files], root):
            place = source.resolve() if isinstance(source, Path) else source
            by_place.setdefault(place, (source, named.field or params.field))
    return list(by_place.values())


def source_files(patterns: Sequence[str], root: Path) -> list[Path]:
    """Returns the files of `sources`, those of datasets in folders included; none for datasets on the hub.

    Raises:
        TeachonceError: as `sources`; or the start of a file of lines is not UTF-8 with line feeds.
    """
    files: list[Path] = []
    for source in sources(patterns, root):
        if isinstance(source, Path):
            if unpacked_name(source).endswith(LINE_ENDINGS):
                with reading(source, CURE):
                    check_start(source)
            files.append(source)
        elif source.folder is not None:
            if not _is_saved(source.folder):
                _check_card(source.folder)
            files += files_below(source.folder, "shard.sources")
    return files


def read(source: Path | DatasetName, field: str) -> Iterator[Item]:
    """Yield one item for each line of a text file or each cell of a column, in order.

    Args:
        source: One of `sources`.
        field: The JSON key or the column that holds the text; ignored for `.txt`.

    Raises:
        TeachonceError: the source is damaged or truncated, has no such column, or no line has the field.
    """
    items = (
        _dataset_items(source, field)
        if isinstance(source, DatasetName)
        else _items_of(source, field)
    )
    return _some_with_field(items, source, field)


def _items_of(path: Path, field: str) -> Iterator[Item]:
    """Returns the items of a file with one of `ENDINGS`; the ending says who reads it."""
    match Path(unpacked_name(path)).suffix:
        case ".parquet":
            return _parquet_items(path, field)
        case ".arrow":
            return _arrow_items(path, field)
        case ".jsonl":
            return _line_items(path, _json_text(field))
        case ".txt":
            return _line_items(path, _decoded)
        case other:
            raise ValueError(f"{path}: {other} is in ENDINGS, but no function reads it")


def _some_with_field(
    items: Iterator[Item], source: Path | DatasetName, field: str
) -> Iterator[Item]:
    """Yield the items; raises at the end if all of them were malformed (blank lines aside)."""
    malformed = others = 0
    for item in items:
        if item is MALFORMED:
            malformed += 1
        elif isinstance(item, Rejected) or item.strip():
            others += 1
        yield item
    if malformed and not others:
        raise TeachonceError(
            str(source),
            f"none of its {malformed:,} rows has a text in the field {shown(repr(field))}",
            "set `shard.field` in params.yaml to the field or column that holds the text",
        )


# --- names


def _dataset_name(name: str, root: Path) -> DatasetName:
    """Parse a dataset's name; a folder of the whole name goes first, since folders may have colons."""
    folder = located(name, root, "shard.sources")
    if folder.is_dir():
        return DatasetName(name, folder, None)
    before, colon, split = name.rpartition(":")
    if not colon:
        return DatasetName(name, None, None)
    folder = located(before, root, "shard.sources")
    if folder.is_dir() or ":" not in before:
        return DatasetName(before, folder if folder.is_dir() else None, split or None)
    before, _, config = before.rpartition(":")
    folder = located(before, root, "shard.sources")
    return DatasetName(before, folder if folder.is_dir() else None, split or None, config or None)


# --- lines


def _line_items(path: Path, parse: Callable[[bytes], Item]) -> Iterator[Item]:
    with reading(path, CURE):
        for number, line in enumerate(lines(path)):
            if number == 0 and parse is not _decoded and line and begins_array_of_records(line):
                raise TeachonceError(
                    path, "a JSON array, where each line is an object", converted(path, ONE_A_LINE)
                )
            yield TOO_LONG if line is None else parse(line)


def begins_array_of_records(line: bytes) -> bool:
    """Whether the first line of a file of JSON is, or begins, an array of all its records."""
    if not line.lstrip().startswith(b"["):
        return False
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return all(isinstance(element, dict | list) for element in value)


def _decoded(line: bytes) -> Item:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return UNDECODABLE


def _json_text(field: str) -> Callable[[bytes], Item]:
    """Returns a parser of JSON lines to texts. A blank line is an empty text, not a malformed line."""

    def parse(line: bytes) -> Item:
        text = _decoded(line)
        if isinstance(text, Rejected) or not text.strip():
            return text
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):  # brackets nested deeper than the parser goes
            return MALFORMED
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            is_null = isinstance(record, dict) and field in record and value is None
            return NULL if is_null else MALFORMED
        return value if is_utf8(value) else UNDECODABLE

    return parse


# --- columns


def _parquet_items(path: Path, field: str) -> Iterator[Item]:
    from pyarrow import parquet

    with reading(path, CURE), for_arrow(path) as source:
        schema = parquet.read_schema(source)
        name = schema.names[_column_number(schema, path, field)]
        # Dictionaries stay dictionaries: a long text that stands in every row is held once.
        with parquet.ParquetFile(
            source, page_checksum_verification=True, read_dictionary=[name]
        ) as file:
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            # Of whole groups: pyarrow dies of what a damaged column says of itself.
            _check_expansion(path.stat().st_size, sum(group.total_byte_size for group in groups))
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[name]):
                yield from cells(batch.column(0))


def for_arrow(path: Path) -> pa.OSFile:
    """Open a regular file for pyarrow, which opens no name that is not UTF-8."""
    regular.check(path)
    return pa.OSFile(os.fsencode(path))


def _check_expansion(packed: int, unpacked: int) -> None:
    if unpacked > max(ALWAYS_ALLOWED_BYTES, MOST_EXPANSION * packed):
        raise ValueError(f"{packed:,} bytes in it say that they unpack to {unpacked:,}")


def _arrow_items(path: Path, field: str) -> Iterator[Item]:
    """Yield the cells of an Arrow file, or of an Arrow stream as `datasets` writes it."""
    with reading(path, CURE), _mapped(path) as source:
        if source.read(6) == b"ARROW1":
            _check_arrow_sizes(source, 8)
            reader = pa.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            _check_arrow_sizes(source, 0)
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            batches = iter(reader)
        column = _column_number(reader.schema, path, field)
        for batch in batches:
            yield from cells(batch.column(column))
        if isinstance(reader, pa.ipc.RecordBatchStreamReader):
            _check_stream_end(source)


def _mapped(path: Path) -> pa.MemoryMappedFile:
    regular.check(path)
    return pa.memory_map(os.fsencode(path))


def _check_arrow_sizes(source: pa.MemoryMappedFile, start: int) -> None:
    """Check the sizes in the header of each message, from `start` on, without unpacking a body."""
    source.seek(start)
    for message in pa.ipc.MessageReader.open_stream(source):
        if message.type in {"record batch", "dictionary"}:
            unpacked = unpacked_bytes(
                message.metadata, message.body, is_dictionary=message.type == "dictionary"
            )
            _check_expansion(message.body.size, unpacked)


def _check_stream_end(source: pa.MemoryMappedFile) -> None:
    """Raise unless the stream has an end mark and nothing after it."""
    read_to, size = source.tell(), source.size()
    if read_to != size:
        raise ValueError(f"{size - read_to} bytes follow the end of the Arrow stream")
    source.seek(size - len(END_OF_STREAM))
    if source.read() != END_OF_STREAM:
        raise EOFError


def _column_number(schema: pa.Schema, source: Path | DatasetName, field: str) -> int:
    """Returns the number of the column `field`; raises unless there is one such column, of texts."""
    places = schema.get_all_field_indices(field)
    cure = "set `shard.field` in params.yaml to the column that holds the text"
    if len(places) != 1:
        problem = f"{len(places) or 'no'} columns named {shown(repr(field))} among {schema.names}"
        raise TeachonceError(str(source), shown(problem), cure)
    kind = schema.field(places[0]).type
    if not (holds_text(kind) or pa.types.is_null(kind)):
        if "binary" in str(kind):
            cure = (
                "cast it to text (`column.cast(pyarrow.string())`), or name another in shard.field"
            )
        raise TeachonceError(
            str(source), f"column {shown(repr(field))} holds {shown(kind)}, not text", cure
        )
    return int(places[0])


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts, be it as a dictionary of them."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def cells(column: pa.Array) -> Iterator[Item]:
    """Yield one item a cell. Checks offsets and UTF-8, since Arrow does not when it reads."""
    if pa.types.is_null(column.type):
        yield from repeat(NULL, len(column))
        return
    if pa.types.is_dictionary(column.type):
        values = _as_bytes(column.dictionary)
        pa.DictionaryArray.from_arrays(column.indices, values).validate(full=True)
        for start in range(0, len(column), ROWS_AT_ONCE):
            places = column.indices.slice(start, ROWS_AT_ONCE)
            used = places.unique()
            # A long text that stands in many cells is made once.
            items = dict(zip(used.to_pylist(), _items(values.take(used)), strict=True))
            yield from map(items.__getitem__, places.to_pylist())
        return
    for start in range(0, len(column), ROWS_AT_ONCE):
        yield from _items(_as_bytes(column.slice(start, ROWS_AT_ONCE)))


def _items(column: pa.Array) -> Iterator[Item]:
    for cell in column.to_pylist():
        yield NULL if cell is None else _decoded(cell)


def _as_bytes(column: pa.Array) -> pa.Array:
    views = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    # Viewed before it is validated: as text, one cell that is no UTF-8 would fail the whole column.
    column = column.view(views.get(column.type, pa.binary_view()))
    # A damaged offset read without this ends the process.
    column.validate(full=True)
    return column


# --- datasets


def _dataset_items(source: DatasetName, field: str) -> Iterator[Item]:
    """Yield the cells of a dataset: a saved one is memory-mapped, others are streamed.

    The files of a folder are read one by one: `datasets` would cast all of them to the types of the first,
    which has nulls if it has no text.
    """
    try:
        files = _files_of(source)
        if files and all(file.name.lower().endswith(OWN_ENDINGS) for file in files):
            for file in files:
                yield from _items_of(file, field)
            return
        dataset = _one_split(source, _loaded(source))
        for table in dataset.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            column = _column_number(table.schema, source, field)
            for chunk in table.column(column).chunks:
                yield from cells(chunk)
    except TeachonceError:
        raise
    # Loaders of a hundred formats raise what they like; whatever it is, this source cannot be read.
    except Exception as error:
        raise TeachonceError(
            str(source),
            f"`datasets` cannot read it: {shown(error) or type(error).__name__}",
            "check the name (dataset:<hub name or folder>[[:<config>]:<split>]) and, for a hub name, the "
            "network and HF_HUB_OFFLINE",
        ) from error


def _files_of(source: DatasetName) -> list[Path]:
    """Returns the regular files of a split of a folder; none for a saved dataset or one on the hub."""
    import datasets

    if source.folder is None or _is_saved(source.folder):
        return []
    _check_card(source.folder)
    builder = datasets.load_dataset_builder(str(source.folder), source.config)
    files = _one_split(source, {str(k): v for k, v in (builder.config.data_files or {}).items()})
    paths = [Path(os.path.abspath(file)) for file in files]  # noqa: PTH100 - a link stays one
    for path in paths:
        if not path.is_relative_to(source.folder.resolve()):
            raise _outside(source.folder, str(path))
        regular.check(path)
    return paths


def _check_card(folder: Path) -> None:
    """Raise if the dataset card of a folder names files elsewhere, which would be fetched."""
    values = [
        config.get(key)
        for name in ("README.md", ".huggingface.yaml")
        for config in _configurations(folder / name)
        if isinstance(config, dict)
        for key in ("data_files", "data_dir")
    ]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str) and (
            "::" in value or "://" in value or value[:1] in {"/", "~"} or ".." in Path(value).parts
        ):
            raise _outside(folder, value)


def _configurations(path: Path) -> list[Any]:
    """Returns the `configs` of a README or a YAML file, as `datasets` reads them."""
    import yaml
    from huggingface_hub import DatasetCard

    with reading(path, "mend the YAML in it, or take it out"):
        try:
            text = regular.content(path).decode()
        except FileNotFoundError:
            return []
        card = path.suffix == ".md"
        metadata: Any = DatasetCard(text).data.to_dict() if card else yaml.safe_load(text)  # type: ignore[no-untyped-call]
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    return configs if isinstance(configs, list) else []


def _outside(folder: Path, named: str) -> TeachonceError:
    return TeachonceError(
        folder,
        f"its README names {shown(repr(named))}, which is not in the folder",
        "put the file into the folder and name it by its path in it, or name the files in `shard.sources`",
    )


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _loaded(source: DatasetName) -> Any:  # noqa: ANN401 - one of four classes of `datasets`
    import datasets

    if source.folder is None:
        return datasets.load_dataset(source.name, source.config, split=source.split, streaming=True)
    if _is_saved(source.folder):
        return datasets.load_from_disk(str(source.folder))
    return datasets.load_dataset(
        str(source.folder), source.config, split=source.split, streaming=True
    )


def _one_split(source: DatasetName, loaded: Any) -> Any:  # noqa: ANN401 - as above
    """Returns the dataset or its split; raises if the name does not determine one."""
    if not isinstance(loaded, dict):
        return loaded
    wanted = source.split or (next(iter(loaded)) if len(loaded) == 1 else None)
    if wanted not in loaded:
        problem = f"no split {shown(wanted)}" if wanted else "which split is not said"
        raise TeachonceError(
            str(source),
            f"{problem}; there are {shown(', '.join(loaded))}",
            f"write {DATASET}{source.name}:<split> in `shard.sources`",
        )
    return loaded[wanted]
