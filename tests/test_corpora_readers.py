"""Readers: from any bytes, usable documents are kept and the rest is counted with a reason."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.readers import READERS
from crosscal.corpora.records import Document, Reject, excerpt
from crosscal.errors import UsageError

GOOD = [f"document number {index} is long enough" for index in range(6)]
SMALL = DocumentLimits(max_line_bytes=1000, max_characters=500)


def read(path: Path, limits: DocumentLimits = SMALL) -> tuple[list[str], list[tuple[int, str]]]:
    suffix = next(suffix for suffix in READERS if suffix in path.suffixes)
    candidates = list(READERS[suffix](path, "name", "text", limits))
    texts = [candidate.text for candidate in candidates if isinstance(candidate, Document)]
    return texts, [(candidate.line, candidate.reason) for candidate in candidates if isinstance(candidate, Reject)]


def line(text: object) -> bytes:
    return json.dumps({"text": text}).encode()


BAD_LINES = {
    "invalid UTF-8": b'{"text": "\xff\xfe not UTF-8, long enough"}',
    "invalid JSON": b'{"text": "cut off in the midd',
    "lone surrogate": b'{"text": "a lone surrogate \\ud800 in the text"}',
    "empty": line("   \n "),
    "too short": line("short"),
    "too long": line("long " * 150),
    "text is not a string": line(12.5),
    "not a JSON object": b'["a", "list"]',
    "no column 'text'": b'{"body": "the text is under another name"}',
    "line longer than 1000 bytes": line("x" * 2000),
}


@pytest.mark.parametrize("reason", BAD_LINES)
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_bad_line_costs_only_itself(tmp_path, reason, place):
    rows = [line(text) for text in GOOD]
    rows.insert(place, BAD_LINES[reason])
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    assert read(tmp_path / "a.jsonl") == (GOOD, [(place + 1, reason)])


@pytest.mark.parametrize(
    "hostile",
    [b'{"text": null}', b'{"text": {"text": "nested text that is long"}}', b"1" * 900, b"[" * 900, b"null", b"NaN"],
)
def test_odd_json_is_rejected_not_raised(tmp_path, hostile):
    (tmp_path / "a.jsonl").write_bytes(hostile + b"\n" + line(GOOD[0]))
    texts, rejects = read(tmp_path / "a.jsonl")
    assert texts == GOOD[:1]
    assert len(rejects) == 1


@pytest.mark.parametrize("hostile", [b"9" * 5000, b"[" * 200_000])
def test_numbers_and_nesting_beyond_python_are_invalid_json(tmp_path, hostile):
    (tmp_path / "a.jsonl").write_bytes(hostile + b"\n" + line(GOOD[0]))
    assert read(tmp_path / "a.jsonl", DocumentLimits()) == (GOOD[:1], [(1, "invalid JSON")])


def test_byte_order_mark_and_line_ends_are_no_content(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line(GOOD[0]) + b"\r\n\r\n" + line(GOOD[1]) + b"\r\n")
    assert read(tmp_path / "a.jsonl") == (GOOD[:2], [])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.GZ"])
def test_compression_changes_nothing(tmp_path, suffix):
    content = b"\n".join(line(text) for text in GOOD)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(content, suffix))
    assert read(path) == (GOOD, [])


def compress(content: bytes, suffix: str) -> bytes:
    match suffix.lower().rpartition(".")[2]:
        case "gz":
            return gzip.compress(content)
        case "zst":
            return zstandard.compress(content)
        case _:
            return content


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_streams_of_several_frames_are_read_to_the_end(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(compress(line(text) + b"\n", suffix) for text in GOOD))
    assert read(path) == (GOOD, [])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_off_stream_keeps_what_came_before(tmp_path, suffix):
    noise = random.Random(0)
    texts = [f"{index} {noise.randbytes(100).hex()}" for index in range(10_000)]
    complete = compress(b"\n".join(line(text) for text in texts), suffix)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(complete[: len(complete) // 2])
    found, rejects = read(path)
    assert len(found) > 3000
    assert found == texts[: len(found)]
    assert rejects == [(len(found) + 1, "compressed stream is cut off, rest not read")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("garbage", [b"", b"not compressed at all", bytes(range(256)) * 8])
def test_garbage_for_a_compressed_file_is_one_reject(tmp_path, suffix, garbage):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(garbage)
    texts, rejects = read(path)
    assert texts == []
    assert len(rejects) == bool(garbage)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_flipped_bytes_never_raise(tmp_path, suffix):
    content = bytearray(compress(b"\n".join(line(text) for text in GOOD), suffix))
    path = tmp_path / f"a.jsonl{suffix}"
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        path.write_bytes(bytes(flipped))
        texts, rejects = read(path)
        assert texts == GOOD or rejects


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_neither_held_nor_read_to_its_end(tmp_path, suffix):
    path = tmp_path / f"bomb.jsonl{suffix}"
    path.write_bytes(compress(line(GOOD[0]) + b"\n" + b"x" * 100_000_000, suffix))
    limits = DocumentLimits(max_file_bytes=80_000_000, max_line_bytes=1_000_000)
    tracemalloc.start()
    try:
        assert read(path, limits) == (GOOD[:1], [(2, "file longer than 80000000 bytes, rest not read")])
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size < 200_000
    assert peak_bytes < 30_000_000  # Zstandard returns up to 8 MiB at once


def test_a_line_that_never_ends_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 3_000_000 + b"\n" + line(GOOD[0]))
    assert read(path) == (GOOD[:1], [(1, "line longer than 1000 bytes")])


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("One paragraph of text.\n\n\nAnother one, further down.\n", encoding="utf-8")
    assert read(tmp_path / "a.txt") == (["One paragraph of text.\n\n\nAnother one, further down."], [])


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_long_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, ending):
    paragraphs = [f"Paragraph {index}: {'word ' * (index % 30)}end." for index in range(200)]
    (tmp_path / "a.txt").write_bytes((ending * 2).join(paragraphs).encode())
    texts, rejects = read(tmp_path / "a.txt", DocumentLimits(text_file_characters=400, min_characters=1))
    assert rejects == []
    assert len(texts) > 10
    assert all(len(text) <= 400 for text in texts)
    assert "\n\n".join(texts) == "\n\n".join(paragraphs)


def test_text_without_blank_lines_is_cut_at_line_ends(tmp_path):
    rows = [f"Line number {index} of a long list." for index in range(500)]
    (tmp_path / "a.txt").write_text("\n".join(rows), encoding="utf-8")
    texts, _ = read(tmp_path / "a.txt", DocumentLimits(text_file_characters=1000))
    assert all(len(text) < 2100 for text in texts)
    assert "\n".join(texts) == "\n".join(rows)


def test_bad_bytes_cost_a_text_file_one_paragraph(tmp_path):
    (tmp_path / "a.txt").write_bytes(f"{GOOD[0]}\n\n".encode() + b"caf\xe9 in Latin-1\n\n" + GOOD[1].encode())
    assert read(tmp_path / "a.txt") == ([f"{GOOD[0]}\n\n{GOOD[1]}"], [(3, "invalid UTF-8")])


def test_csv_fields_may_hold_quotes_and_line_ends(tmp_path):
    texts = ['He said "no", and left.\nThen he came back.', "plain text without anything", '"quoted" from the start']
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["id", "text"], *enumerate(texts)])
    assert read(tmp_path / "a.csv") == (texts, [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"7,caf\xe9 in Latin-1, long enough", "invalid UTF-8"),
        (b'7,"a quote that is never closed', "unclosed quote"),
        (b"7", "wrong number of fields"),
        (b"7,a,b", "wrong number of fields"),
        (b"7,", "empty"),
        (b"7," + b"x" * 2000, "line longer than 1000 bytes"),
    ],
)
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_bad_csv_row_costs_only_itself(tmp_path, row, reason, place):
    rows = [f"{index},{text}".encode() for index, text in enumerate(GOOD)]
    rows.insert(place, row)
    (tmp_path / "a.csv").write_bytes(b"\n".join([b"id,text", *rows]))
    assert read(tmp_path / "a.csv") == (GOOD, [(place + 2, reason)])


@pytest.mark.parametrize(
    ("header", "reasons"),
    [(b"id,te\xffxt", ["invalid UTF-8"]), (b'id,"text', ["unclosed quote"]), (b"id,body", ["no column 'text'"])],
)
def test_a_csv_file_without_its_header_is_one_reject(tmp_path, header, reasons):
    (tmp_path / "a.csv").write_bytes(header + b"\n7,a text that is long enough\n8,another one\n")
    texts, rejects = read(tmp_path / "a.csv")
    assert texts == []
    assert [reason for _, reason in rejects] == reasons


def test_blank_csv_lines_are_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text(f"\n\nid,text\n\n1,{GOOD[0]}\n\n", encoding="utf-8")
    assert read(tmp_path / "a.csv") == (GOOD[:1], [])


def test_long_csv_fields_are_read(tmp_path):
    (tmp_path / "a.csv").write_text(f'text\n"{"word " * 100_000}"\n', encoding="utf-8")
    texts, rejects = read(tmp_path / "a.csv", DocumentLimits())
    assert [len(text) for text in texts] == [499_999]
    assert rejects == []


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_columns_of_text(tmp_path, kind):
    pq.write_table(pa.table({"id": range(6), "text": pa.array(GOOD).cast(kind)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (GOOD, [])


def test_bad_parquet_cells_cost_only_themselves(tmp_path):
    cells = [GOOD[0].encode(), b"\xff\xfe not UTF-8, long enough", None, GOOD[1].encode()]
    column = pa.Array.from_buffers(pa.string(), 4, pa.array(cells, pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (GOOD[:2], [(2, "invalid UTF-8"), (3, "text is not a string")])


def test_parquet_numbers_are_not_text(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([], [(0, "text column does not hold strings")])


def test_parquet_dictionaries_are_judged_cell_by_cell(tmp_path):
    cells = pa.array([GOOD[0].encode(), b"\xff\xfe not UTF-8, long enough"], pa.binary())
    words = pa.Array.from_buffers(pa.string(), 2, cells.buffers())
    column = pa.DictionaryArray.from_arrays(pa.array([1, 0, 0], pa.int32()), words)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([GOOD[0], GOOD[0]], [(1, "invalid UTF-8")])


def test_a_parquet_column_name_that_is_not_utf8_is_damage(tmp_path):
    pq.write_table(pa.table({"text": GOOD, "marker": GOOD}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"marker", b"m\xffrker"))
    assert read(tmp_path / "a.parquet") == ([], [(0, "Parquet file is damaged, rest not read")])


def test_damaged_parquet_never_raises(tmp_path):
    pq.write_table(pa.table({"text": GOOD}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", content[:-20], content[: len(content) // 2], b"PAR1" + bytes(100)):
        (tmp_path / "b.parquet").write_bytes(damaged)
        assert read(tmp_path / "b.parquet") == ([], [(0, "Parquet file is damaged, rest not read")])
    (tmp_path / "b.parquet").write_bytes(content[:4] + bytes(60) + content[64:])
    assert read(tmp_path / "b.parquet") == ([], [(1, "Parquet row group is damaged")])


@pytest.mark.parametrize(
    "data", ["\ud800" * 1000, b"\xff" * 1000, "a\x00b" * 500, "é" * 1000, "\U0001f600" * 1000, b"\xf0\x9f\x98" * 300]
)
def test_excerpts_are_short_and_can_be_stored(data):
    assert 0 < len(excerpt(data)) <= 200
    assert excerpt(data).encode("utf-8")


@pytest.mark.parametrize("value", [0, -1, 1.5, "20"])
def test_limits_are_whole_numbers(value):
    with pytest.raises(UsageError, match="max_characters"):
        DocumentLimits(max_characters=value)
