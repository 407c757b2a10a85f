"""Corpus files to texts: one item a line, in every format, and no file that ends before it should."""

import gzip
import json
import os
import re
import socket
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stages.reading import corpus_files, lines
from stages.reading.corpus_files import (
    MALFORMED,
    TOO_LONG,
    UNDECODABLE,
    DatasetName,
    read,
    source_files,
    sources,
)
from storage.errors import TeachonceError


def items(path, content=None, field="text"):
    if content is not None:
        path.write_bytes(content)
    return list(read(path, field))


def refusal(call, *arguments, **keywords):
    with pytest.raises(TeachonceError) as caught:
        list(call(*arguments, **keywords))
    return str(caught.value)


# --- lines


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path):
    content = "a\u2028b\x0bc\x85d\n\ncarriage\rreturn\r\nNUL \0 inside\n last ".encode()
    assert items(tmp_path / "a.txt", content) == [
        "a\u2028b\x0bc\x85d",
        "",
        "carriage\rreturn",
        "NUL \0 inside",
        " last ",
    ]


def test_an_empty_file_has_no_lines_and_a_final_line_feed_starts_none(tmp_path):
    assert items(tmp_path / "a.txt", b"") == []
    assert items(tmp_path / "a.txt", b"one\n") == ["one"]
    assert items(tmp_path / "a.txt", b"\n") == [""]


def test_one_carriage_return_is_dropped_not_two(tmp_path):
    assert items(tmp_path / "a.txt", b"a\r\r\n\r\nb\r") == ["a\r", "", "b"]


def test_the_first_byte_order_mark_is_dropped_and_no_other(tmp_path):
    mark = b"\xef\xbb\xbf"
    assert items(tmp_path / "a.txt", mark + mark + b"a\n" + mark + b"b") == ["\ufeffa", "\ufeffb"]


def test_bytes_that_are_no_utf8_are_named_and_shift_nothing(tmp_path):
    for wrong in (
        b"\xff",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xe2\x82",
        b"\xf4\x90\x80\x80",
        b"a\x80",
    ):
        assert items(tmp_path / "a.txt", b"a\n" + wrong + b"\nb") == ["a", UNDECODABLE, "b"]


WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("encoding", WIDE)
def test_utf16_and_utf32_are_refused_with_a_cure_that_works(tmp_path, encoding, packed):
    path = tmp_path / f"somebody's file.txt{packed}"
    content = "Grüße an alle.\nÇa va? Здравствуй.\n".encode(encoding)
    path.write_bytes(gzip.compress(content) if packed else content)
    name = {"utf-16": "UTF-16", "utf-32": "UTF-32"}.get(
        encoding, encoding.upper().replace("-L", "L").replace("-B", "B")
    )
    said = refusal(read, path, "text")
    assert said.startswith(f"{path}: is {name}, not UTF-8\n  cure: ")
    # `check` says it, too, before anything is computed.
    assert refusal(source_files, [path.name], tmp_path) == said
    subprocess.run(said.partition("cure: ")[2], shell=True, check=True)
    assert items(path) == ["Grüße an alle.", "Ça va? Здравствуй."]


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_a_mark_of_utf16_is_enough(tmp_path, mark):
    text = "漢字仮名" * 3
    content = mark + text.encode("utf-16-le" if mark[0] == 0xFF else "utf-16-be")
    (tmp_path / "a.jsonl.zst").write_bytes(compressed(content))
    assert "is UTF-16, not UTF-8" in refusal(read, tmp_path / "a.jsonl.zst", "text")


def test_a_few_nuls_make_no_utf16(tmp_path):
    content = b"a\0b\n" + b"\0\0\0\n" + "漢字 \0 仮名\n".encode() + b"\0x\0y"
    assert items(tmp_path / "a.txt", content) == ["a\0b", "\0\0\0", "漢字 \0 仮名", "\0x\0y"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl"])
def test_a_file_that_ends_its_lines_in_carriage_returns_is_refused(tmp_path, name):
    path = tmp_path / name
    content = b"".join(b'{"text": "line %d"}\r' % number for number in range(20))
    packed = {".gz": gzip.compress, ".zst": compressed}.get(path.suffix, bytes)
    path.write_bytes(packed(content))
    said = refusal(read, path, "text")
    assert said.startswith(
        f"{path}: its lines end in carriage returns, and only a line feed ends a line here\n  cure: "
    )
    assert refusal(source_files, [name], tmp_path) == said
    if name != "a.txt.zst":  # not every machine has the command zstd
        subprocess.run(said.partition("cure: ")[2], shell=True, check=True)
        assert len(items(path)) == 20


def test_a_long_file_of_carriage_returns_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 5)
    (tmp_path / "a.txt").write_bytes(b"line\r" * 600_000)
    assert "its lines end in carriage returns" in refusal(read, tmp_path / "a.txt", "text")


def test_a_line_too_long_is_counted_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 5)
    content = b"12345\n123456\nab\n" + b"x" * (3 << 20) + b"\nc\n" + b"y" * (3 << 20)
    assert items(tmp_path / "a.txt", content) == ["12345", TOO_LONG, "ab", TOO_LONG, "c", TOO_LONG]


def test_a_line_over_many_pieces_is_one_line(tmp_path):
    long = "é" * (1 << 20) + "x"
    assert items(tmp_path / "a.txt", f"a\n{long}\r\nb".encode()) == ["a", long, "b"]


# --- JSON


def test_a_line_of_json_gives_its_field_or_says_why_not(tmp_path):
    lines = {
        '{"text": "a\\u00e9\\ud83d\\ude00 b"}': "aé😀 b",
        '{"text": "first", "text": "last"}': "last",
        '{"x": NaN, "text": "beside NaN"}': "beside NaN",
        '{"text": "half \\ud800"}': UNDECODABLE,
        "": "",
        "  ": "  ",
        '{"text": null}': MALFORMED,
        '{"text": NaN}': MALFORMED,
        '{"text": 3}': MALFORMED,
        '{"text": ["a"]}': MALFORMED,
        '{"other": "a"}': MALFORMED,
        '"text"': MALFORMED,
        '["text"]': MALFORMED,
        '{"text": "cut': MALFORMED,
        "[" * 100_000: MALFORMED,
        '{"text": ' + "9" * 5000 + "}": MALFORMED,
        '{"text": "after all of them"}': "after all of them",
    }
    found = items(tmp_path / "a.jsonl", "\n".join(lines).encode())
    assert found == list(lines.values())


def test_json_that_is_no_utf8_is_undecodable(tmp_path):
    assert items(tmp_path / "a.jsonl", b'{"text": "\xff"}\n{"text": "b"}') == [UNDECODABLE, "b"]


def test_a_file_without_the_field_names_file_field_and_cure(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\n{"body": "two"}\n\n')
    assert refusal(read, path, "text") == (
        f"{path}: none of its 2 rows has a text in the field 'text'\n"
        "  cure: set `shard.field` in params.yaml to the field or column that holds the text"
    )
    assert items(path, field="body") == ["one", "two", ""]


# --- compressed


def compressed(text, **settings):
    return zstandard.ZstdCompressor(**settings).compress(text)


def test_every_frame_of_a_zstd_file_is_read(tmp_path):
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    content = (
        compressed(b"one\ntw") + skippable + compressed(b"") + compressed(b"o\nthree\n") + skippable
    )
    assert items(tmp_path / "a.txt.zst", content) == ["one", "two", "three"]


def test_a_zstd_file_larger_than_a_piece_is_read_whole(tmp_path):
    texts = [os.urandom(500).hex() for _ in range(100)]
    content = compressed("\n".join(texts[:60]).encode() + b"\n") + compressed(
        "\n".join(texts[60:]).encode()
    )
    assert len(content) > 10 * lines.CHUNK_BYTES
    assert items(tmp_path / "a.TXT.ZST", content) == texts


def test_gzip_members_are_read_one_after_the_other(tmp_path):
    content = gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n')
    assert items(tmp_path / "a.jsonl.gz", content) == ["one", "two"]


@pytest.mark.parametrize("ending", ["zst", "gz"])
def test_a_truncated_file_is_an_error_wherever_it_is_cut(tmp_path, ending):
    text = b"".join(os.urandom(30).hex().encode() + b"\n" for _ in range(400))
    whole = compressed(text, write_checksum=True) if ending == "zst" else gzip.compress(text)
    path = tmp_path / f"a.txt.{ending}"
    assert len(items(path, whole)) == 400
    for size in (0, 3, 9, 100, len(whole) // 2, len(whole) - 8, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = refusal(read, path, "text")
        assert (
            message
            == f"{path}: truncated: it ends before its content does\n  cure: {corpus_files.CURE}"
        ), size


def test_a_second_frame_cut_short_is_an_error(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(compressed(b"one\n") + compressed(b"two\n")[:-2])
    assert "truncated" in refusal(read, path, "text")


def test_damage_and_foreign_bytes_name_the_file(tmp_path):
    for name, content in {
        "a.txt.zst": compressed(b"one\n") + b"garbage!",
        "b.txt.gz": gzip.compress(b"one\n") + b"garbage!",
        "c.txt.gz": gzip.compress(b"one\n")[:-8] + bytes(8),
        "d.parquet": b"PAR1 nothing PAR1",
        "e.arrow": b"ARROW1\0\0 nothing",
        "f.arrow": b"",
        "g.arrow": b"neither",
    }.items():
        (tmp_path / name).write_bytes(content)
        message = refusal(read, tmp_path / name, "text")
        assert message.startswith(f"{tmp_path / name}: "), message
        assert message.endswith(f"cure: {corpus_files.CURE}"), message


def test_a_frame_that_wants_too_large_a_window_is_refused(tmp_path):
    settings = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "a.txt.zst"
    path.write_bytes(packer.compress(b"a\n") + packer.flush())
    assert "requires too much memory" in refusal(read, path, "text")


def test_a_small_file_of_zeros_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(compressed(bytes(1 << 28), level=19))
    with path.open("rb") as file:
        assert max(map(len, lines._unzstd(file))) <= 66 << 20
    assert items(path) == [TOO_LONG]


# --- columns

TEXTS = ["a", None, "\u2028 \0 é", "", "b" * 30]
FOUND = ["a", MALFORMED, "\u2028 \0 é", "", "b" * 30]
KINDS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
]


def table(kind):
    texts = pa.array(TEXTS, pa.string())
    texts = (
        texts.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else texts.cast(kind)
    )
    return pa.table({"n": range(len(TEXTS)), "text": texts})


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_text_column_of_an_arrow_file_or_stream(tmp_path, kind):
    for make in (pa.ipc.new_file, pa.ipc.new_stream):
        path = tmp_path / "a.arrow"
        with make(path, table(kind).schema) as writer:
            for start in (0, 2):
                writer.write_table(table(kind).slice(start, 2 if start == 0 else None))
        assert items(path) == FOUND


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_row_group_of_a_parquet_file(tmp_path, kind):
    pq.write_table(table(kind), tmp_path / "a.parquet", row_group_size=2)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    assert items(tmp_path / "a.parquet") == FOUND


def test_a_slice_longer_than_what_is_read_at_once_loses_no_row(tmp_path):
    rows = 2 * corpus_files.ROWS_AT_ONCE + 3
    texts = pa.table({"text": [f"text {n}" for n in range(rows)]})
    with pa.ipc.new_file(tmp_path / "a.arrow", texts.schema) as writer:
        writer.write_batch(texts.combine_chunks().to_batches()[0])
    assert items(tmp_path / "a.arrow") == [f"text {n}" for n in range(rows)]


def test_one_cell_that_is_no_utf8_does_not_fail_its_column(tmp_path):
    cells = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": cells}), tmp_path / "a.parquet")
    assert items(tmp_path / "a.parquet") == ["a", UNDECODABLE, "c"]


def test_a_parquet_file_without_rows_gives_none(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert items(tmp_path / "a.parquet") == []


@pytest.mark.parametrize("kind", [pa.string(), pa.null(), pa.dictionary(pa.int8(), pa.string())])
def test_a_file_of_nulls_only_is_counted_and_does_not_refuse_the_others(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.nulls(2, kind)}), tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema({"text": kind})) as sink:
        sink.write_batch(pa.record_batch({"text": pa.nulls(2, kind)}))
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 2)
    for name in ("a.parquet", "a.arrow", "a.jsonl"):
        assert items(tmp_path / name) == [MALFORMED, MALFORMED]
    # Where the field is not there at all, the setting names another one.
    (tmp_path / "b.jsonl").write_text('{"body": null}\n' * 2)
    assert "none of its 2 rows has a text in the field 'text'" in refusal(
        read, tmp_path / "b.jsonl", "text"
    )


def test_a_missing_or_foreign_column_names_the_file_and_the_setting(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2], "body": ["a", "b"]}), path)
    cure = "set `shard.field` in params.yaml to the column that holds the text"
    assert refusal(read, path, "text") == (
        f"{path}: no columns named 'text' among ['n', 'body']\n  cure: {cure}"
    )
    assert refusal(read, path, "n") == f"{path}: column 'n' holds int64, not text\n  cure: {cure}"


def test_a_column_of_bytes_says_what_makes_it_text(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": pa.array([b"a", b"b"])})
    pq.write_table(table, path)
    assert "holds binary, not text\n  cure: cast it to text" in refusal(read, path, "text")
    pq.write_table(table.set_column(0, "text", table["text"].cast(pa.string())), path)
    assert items(path) == ["a", "b"]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    "form", ['[{"text": "a"},\n{"text": "b"}]\n', '[\n{"text": "a"}, {"text": "b"}]']
)
def test_an_array_in_a_file_of_json_lines_is_refused_with_a_cure_that_works(tmp_path, packed, form):
    path = tmp_path / f"a b.jsonl{packed}"
    path.write_bytes(gzip.compress(form.encode()) if packed else form.encode())
    said = refusal(read, path, "text")
    assert said.startswith(f"{path}: a JSON array, where each line is an object\n  cure: ")
    subprocess.run(said.partition("cure: ")[2], shell=True, check=True)
    assert items(path) == ["a", "b"]


def test_a_stream_cut_between_two_batches_is_an_error(tmp_path):
    path = tmp_path / "a.arrow"
    batch = pa.record_batch({"text": ["a", "b"]})
    with path.open("wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
        first = sink.tell()
        writer.write_batch(batch)
    whole = path.read_bytes()
    path.write_bytes(whole[:first])
    assert refusal(read, path, "text") == (
        f"{path}: truncated: it ends before its content does\n  cure: {corpus_files.CURE}"
    )
    # Two streams in one file: Arrow stops after the first.
    path.write_bytes(whole + whole)
    assert f"{len(whole)} bytes follow the end of the Arrow stream" in refusal(read, path, "text")
    assert items(path, whole) == ["a", "b", "a", "b"]


def test_a_damaged_offset_is_an_error_and_not_the_end_of_the_process(tmp_path):
    path = tmp_path / "a.arrow"
    batch = pa.record_batch({"text": ["a" * 50, "b" * 50]})
    with pa.ipc.new_file(path, batch.schema) as writer:
        writer.write_batch(batch)
    content = bytearray(path.read_bytes())
    place = content.index((50).to_bytes(4, "little") + (100).to_bytes(4, "little"))
    content[place : place + 4] = (0x7FFFFFF0).to_bytes(4, "little")
    path.write_bytes(content)
    assert refusal(read, path, "text").startswith(f"{path}: cannot be read: ")


BOMB_BYTES = 300 << 20


@pytest.mark.parametrize("name", ["a.arrow", "b.arrow", "a.parquet"])
def test_a_few_bytes_that_unpack_to_gigabytes_are_refused_unread(tmp_path, name):
    path = tmp_path / name
    bomb = pa.table({"text": pa.array(["a" * BOMB_BYTES], pa.large_string())})
    if name == "a.parquet":
        pq.write_table(bomb, path, compression="zstd", use_dictionary=False)
    else:
        if name == "b.arrow":
            bomb = pa.table({"text": bomb.column(0).combine_chunks().dictionary_encode()})
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        make = pa.ipc.new_file if name == "a.arrow" else pa.ipc.new_stream
        with make(path, bomb.schema, options=options) as writer:
            writer.write_table(bomb)
    del bomb
    assert path.stat().st_size < 64 << 10
    before = pa.total_allocated_bytes()
    message = refusal(read, path, "text")
    assert re.search(r"cannot be read: [\d,]+ bytes in it say that they unpack to 314,57", message)
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_long_text_in_every_row_of_a_parquet_file_is_held_once(tmp_path):
    path = tmp_path / "a.parquet"
    indices = pa.array([0] * 2000 + [None, 1], pa.int32())
    texts = pa.DictionaryArray.from_arrays(indices, pa.array(["a" * (1 << 20), "b"]))
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    first, *rest = read(path, "text")
    assert len(first) == 1 << 20
    assert all(text is first for text in rest[:1999])
    assert rest[1999:] == [MALFORMED, "b"]


def test_packed_texts_are_read(tmp_path):
    texts = [f"text {number}" for number in range(1000)]
    for codec in ("zstd", "lz4"):
        table = pa.table({"text": pa.array(texts)})
        options = pa.ipc.IpcWriteOptions(compression=codec)
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema, options=options) as writer:
            writer.write_table(table)
        assert items(tmp_path / "a.arrow") == texts


# --- datasets


def test_a_dataset_saved_on_disk_is_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["a", None, "c"], "n": [1, 2, 3]})
    two = datasets.Dataset.from_dict({"text": ["d"], "n": [4]})
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=two).save_to_disk(str(tmp_path / "both"))

    def texts(name):
        (source,) = sources([name], tmp_path)
        return list(read(source, "text"))

    assert texts("dataset:one") == ["a", MALFORMED, "c"]
    assert texts("dataset:both:train") == ["a", MALFORMED, "c"]
    assert texts(f"dataset:{tmp_path / 'both'}:test") == ["d"]
    assert refusal(texts, "dataset:both") == (
        "dataset:both: which split is not said; there are train, test\n"
        "  cure: write dataset:both:<split> in `shard.sources`"
    )
    assert "no split dev; there are train, test" in refusal(texts, "dataset:both:dev")
    (source,) = sources(["dataset:one"], tmp_path)
    assert refusal(read, source, "body") == (
        "dataset:one: no columns named 'body' among ['text', 'n']\n"
        "  cure: set `shard.field` in params.yaml to the column that holds the text"
    )


def test_a_folder_of_files_is_streamed_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = [{"text": f"text {n}"} for n in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source,) = sources(["dataset:folder:train"], tmp_path)
    assert list(read(source, "text")) == [f"text {n}" for n in range(5)]
    (source,) = sources(["dataset:folder"], tmp_path)
    assert list(read(source, "text")) == [f"text {n}" for n in range(5)]


def test_files_of_a_folder_may_differ_in_their_types(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    folder.mkdir()
    columns = [
        pa.nulls(1),
        pa.array(["a", None], pa.large_string()),
        pa.array(["b", "b"]).dictionary_encode(),
    ]
    for number, column in enumerate(columns):
        pq.write_table(pa.table({"text": column}), folder / f"train-{number}.parquet")
    (source,) = sources(["dataset:folder"], tmp_path)
    assert list(read(source, "text")) == [MALFORMED, "a", MALFORMED, "b", "b"]
    pq.write_table(pa.table({"text": [{"x": 1}]}), folder / "train-3.parquet")
    assert refusal(read, source, "text").startswith(
        f"{folder}/train-3.parquet: column 'text' holds struct<x: int64>, not text"
    )


CARD = "---\nconfigs:\n- config_name: default\n  {}\n---\n"


@pytest.mark.parametrize(
    "named",
    [
        "https://example.com/x.jsonl",
        "hf://datasets/a/b/x.jsonl",
        "zip://x.jsonl::https://example.com/x.zip",
        "../outside.jsonl",
        "/etc/hostname",
    ],
)
@pytest.mark.parametrize(
    "form", ["data_files: '{}'", "data_files: [{{split: train, path: ['{}']}}]"]
)
def test_a_datasets_card_names_no_file_elsewhere(tmp_path, monkeypatch, named, form):
    pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder / "train.jsonl", tmp_path / "outside.jsonl"):
        path.write_text('{"text": "a"}\n')
    (source,) = sources(["dataset:folder"], tmp_path)
    (folder / "README.md").write_text(CARD.format(form.format("train.jsonl")))
    assert list(read(source, "text")) == ["a"]
    monkeypatch.setattr(socket, "socket", None)
    (folder / "README.md").write_text(CARD.format(form.format(named)))
    said = f"{folder}: its README names '{named}', which is not in the folder\n  cure: "
    assert refusal(read, source, "text").startswith(said)
    assert refusal(source_files, ["dataset:folder"], tmp_path).startswith(said)
    (folder / "README.md").rename(folder / "card")
    (folder / ".huggingface.yaml").write_text(CARD.format(form.format(named)).replace("---", ""))
    assert refusal(read, source, "text").startswith(said)


def test_a_configuration_of_a_dataset_is_named_before_its_split(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    folder.mkdir()
    card = "---\nconfigs:\n"
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
        card += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
    (folder / "README.md").write_text(card + "---\n")
    for name in ("one", "two"):
        (source,) = sources([f"dataset:folder:{name}:train"], tmp_path)
        assert str(source) == f"dataset:folder:{name}:train"
        assert list(read(source, "text")) == [name]
    (source,) = sources(["dataset:folder:train"], tmp_path)
    assert "among the available configs: ['one', 'two']" in refusal(read, source, "text")
    (source,) = sources(["dataset:org/name:one:train"], tmp_path)
    assert (source.name, source.config, source.split) == ("org/name", "one", "train")


def test_a_dataset_that_cannot_be_had_is_named(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    (source,) = sources(["dataset:empty"], tmp_path)
    message = refusal(read, source, "text")
    assert message.startswith("dataset:empty: `datasets` cannot read it: "), message
    assert message.endswith(
        "cure: check the name (dataset:<hub name or folder>[[:<config>]:<split>]) and, for a hub name, the "
        "network and HF_HUB_OFFLINE"
    )


# --- names


def test_patterns_keep_their_order_files_are_sorted_and_read_once(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.jsonl", "deep/d.jsonl", "z.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    patterns = ["z.parquet", "dataset:org/name:train", "*.txt", f"{tmp_path}/**/*.jsonl", "./a.txt"]
    expected = ["z.parquet", "a.txt", "b.txt", "deep/d.jsonl", "deep/er/c.jsonl"]
    assert source_files(patterns, tmp_path) == [tmp_path / name for name in expected]
    assert sources(patterns, tmp_path)[1] == DatasetName("org/name", None, "train")


def test_home_and_brackets_in_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a[1].txt").write_text("x")
    assert source_files(["~/a[1].txt"], tmp_path / "else") == [tmp_path / "a[1].txt"]
    root = tmp_path / "[root]"
    root.mkdir()
    (root / "b.txt").write_text("x")
    assert source_files(["*.txt"], root) == [root / "b.txt"]


def test_a_pattern_without_files_or_with_foreign_ones_is_named(tmp_path):
    assert refusal(source_files, ["*.txt"], tmp_path) == (
        f"shard.sources: '*.txt' matches no file below {tmp_path}\n"
        "  cure: mend the pattern in params.yaml, or put the files there"
    )
    (tmp_path / "README.md").write_text("x")
    assert refusal(source_files, ["R*"], tmp_path) == (
        f"shard.sources: 'R*' matches {tmp_path / 'README.md'}, and nothing reads that ending\n"
        "  cure: narrow the pattern to files that end in one of .txt .jsonl .txt.gz .txt.zst .jsonl.gz "
        ".jsonl.zst .parquet .arrow"
    )


def test_a_dataset_name_may_have_a_split_and_a_folder_a_colon(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert sources(["dataset:a:b"], tmp_path) == [DatasetName("a:b", tmp_path / "a:b", None)]
    assert sources(["dataset:a:b:c"], tmp_path) == [DatasetName("a:b", tmp_path / "a:b", "c")]
    (hub,) = sources(["dataset:org/name"], tmp_path)
    assert (hub, str(hub)) == (DatasetName("org/name", None, None), "dataset:org/name")
    assert str(sources(["dataset:org/name:dev"], tmp_path)[0]) == "dataset:org/name:dev"
