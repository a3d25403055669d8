"""Streams: a truncated file is never taken for complete, in any compression; encodings with a BOM read like UTF-8."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from crosscal.errors import EvaluationError
from crosscal.evaluation.question_files import read_questions
from crosscal.files import COMPRESSIONS, FORMATS, Broken, Line, format_of, json_records, lines, stem_of, streams

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
QUESTIONS = [
    json.dumps({"question": f"Is it {index}?", "choices": ["yes", "no"], "answer": index % 2}).encode() + b"\n"
    for index in range(20)
]


def flushed(suffix: str, rows: list[bytes]) -> bytes:
    """Return one compressed stream that is flushed after each row, as a log is."""
    match suffix:
        case ".gz":
            packer = zlib.compressobj(wbits=31)
            parts = [packer.compress(row) + packer.flush(zlib.Z_SYNC_FLUSH) for row in rows]
        case ".zst":
            packer = zstandard.ZstdCompressor().compressobj()
            parts = [packer.compress(row) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for row in rows]
        case _:
            return COMPRESS[suffix](b"".join(rows))  # these have no flush
    return b"".join(parts) + packer.flush()


def test_every_compression_has_its_test() -> None:
    assert set(COMPRESS) == set(COMPRESSIONS)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_question_file_cut_anywhere_is_an_error(tmp_path: Path, suffix: str) -> None:
    whole = flushed(suffix, QUESTIONS)
    path = tmp_path / f"facts.jsonl{suffix}"
    path.write_bytes(whole)
    assert len(read_questions(path)) == len(QUESTIONS)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(EvaluationError, match=r"facts\.jsonl"):
            read_questions(path)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_cut_is_told_and_what_came_before_it_is_kept(tmp_path: Path, suffix: str, kind: str) -> None:
    whole = flushed(suffix, QUESTIONS)
    path = tmp_path / f"facts{kind}{suffix}"
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        *before, last = json_records(path)
        assert [each.value for each in before] == [json.loads(row) for row in QUESTIONS[: len(before)]]
        assert isinstance(last, Broken)
        assert "rest not read" in last.reason


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_streams_behind_one_another_are_all_read_and_none_is_left_out(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    parts = [COMPRESS[suffix](row) for row in QUESTIONS[:3]]
    path.write_bytes((b"\0" * 4 if suffix in (".xz", ".gz") else b"").join(parts))
    assert [line.data for line in lines(path) if isinstance(line, Line)] == QUESTIONS[:3]
    for garbage in (b"trailing garbage, long enough", parts[1][:-3], b"\xff" + parts[1][1:]):
        path.write_bytes(parts[0] + garbage)
        first, *_, last = lines(path)
        assert first == Line(1, QUESTIONS[0])
        assert isinstance(last, Broken)


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_bombs_are_handed_over_in_small_pieces(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"x" * 50_000_000))
    sizes = [len(chunk) for chunk in streams.chunks(path)]
    assert sum(sizes) == 50_000_000
    assert max(sizes) <= streams.CHUNK_BYTES
    assert sum(len(line.data) for line in lines(path, most_line_bytes=1000) if isinstance(line, Line)) == 0


def windowed(window_log: int, content: bytes) -> bytes:
    """Return a Zstandard frame of one raw block that declares a window of 2^window_log bytes (RFC 8878, 3.1.1)."""
    header = 0xFD2FB528.to_bytes(4, "little") + bytes([0, (window_log - 10) << 3])
    return header + (1 | len(content) << 3).to_bytes(3, "little") + content


@pytest.mark.parametrize("window_log", [20, 27, 28, 30, 31])
def test_windows_up_to_the_largest_that_zstd_makes_are_read(tmp_path: Path, window_log: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(windowed(window_log, QUESTIONS[0]))
    script = f"""
import resource
from pathlib import Path
from crosscal.files import lines
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert [line.data for line in lines(Path({str(path)!r}))] == [{QUESTIONS[0]!r}]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 64e6, "a window is only held as far as it is filled"


def test_a_window_beyond_that_is_no_damage_but_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(windowed(32, QUESTIONS[0]))
    (found,) = lines(path)
    assert isinstance(found, Broken)
    assert "2147483648 bytes of memory" in found.reason
    assert "damaged" not in found.reason


ENCODINGS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_a_byte_order_mark_says_the_encoding(
    tmp_path: Path, encoding: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"{number} é 漢字 \U0001f600 Ċ\n" for number in range(100))
    content = ENCODINGS[encoding] + text.encode(encoding)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](content) if suffix else content)
    for chunk_bytes in (1, 3, 2**18):
        monkeypatch.setattr(streams, "CHUNK_BYTES", chunk_bytes)
        assert b"".join(line.data for line in lines(path) if isinstance(line, Line)).decode() == text


def test_half_a_character_costs_its_line_or_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF16_LE + b"a\0\n\0" + b"\x00\xd8" + b"\n\0" + b"b\0\n\0" + b"c")
    found = list(lines(path))
    assert [line.data for line in found if isinstance(line, Line)] == [b"a\n", b"\xed\xa0\x80\n", b"b\n"]
    assert found[-1] == Broken(4, "invalid UTF-16, rest not read")


@pytest.mark.parametrize("universal", [False, True])
def test_lines_are_pythons_whatever_the_size_of_a_chunk(
    tmp_path: Path, universal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, path = random.Random(0), tmp_path / "a.txt"
    for _ in range(150):
        content = "".join(chance.choices(["a", "bc", "\n", "\r", "\r\n"], k=chance.randint(0, 20))).encode()
        path.write_bytes(content)
        expected = content.splitlines(keepends=True) if universal else list(io.BytesIO(content))
        for chunk_bytes in (1, 2, 5, 2**18):
            monkeypatch.setattr(streams, "CHUNK_BYTES", chunk_bytes)
            found = list(lines(path, universal=universal))
            assert found == [Line(number, data) for number, data in enumerate(expected, 1)]


@pytest.mark.parametrize(
    ("name", "form", "stem"),
    [
        ("a.jsonl", ".jsonl", "a"),
        ("x/b.v2.JSONL.ZST", ".jsonl", "b.v2"),
        ("a.parquet.gz", None, "a"),
        ("a.gz", None, "a"),
        ("a.tar.gz", None, "a"),
        ("jsonl", None, "jsonl"),
        ("arc_easy", None, "arc_easy"),
        *((f"a{form}{pack}", form, "a") for form in FORMATS[:-1] for pack in ("", *COMPRESSIONS)),
    ],
)
def test_names(name: str, form: str | None, stem: str) -> None:
    assert (format_of(name), stem_of(name)) == (form, stem)
