"""Parquet is read like by pyarrow; damaged data is rejected; every row becomes a document or a counted reject."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.parquet_records import read_parquet
from crosscal.corpora.records import Document, Reject

LIMITS = DocumentLimits()
TEXTS = [f"document number {index}: give {index} mg of it, no more" for index in range(60)]
TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]


def read(path: Path, limits: DocumentLimits = LIMITS) -> tuple[list[str], list[Reject]]:
    candidates = list(read_parquet(path, "name", "text", limits))
    return (
        [each.text for each in candidates if isinstance(each, Document)],
        [each for each in candidates if isinstance(each, Reject)],
    )


@pytest.mark.parametrize(
    ("kind", "is_dictionary"),
    # pyarrow cannot write dictionaries of views
    [
        (kind, is_dictionary)
        for kind in TYPES
        for is_dictionary in (False, True)
        if not (is_dictionary and "view" in str(kind))
    ],
)
def test_columns_of_text_are_read_as_pyarrow_reads_them(tmp_path: Path, kind: pa.DataType, is_dictionary: bool) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array([*TEXTS, None]).cast(kind)
    if is_dictionary:
        words = pa.array([*TEXTS]).cast(kind)
        column = pa.DictionaryArray.from_arrays(pa.array([*range(len(TEXTS)), None], pa.int32()), words)
    pq.write_table(pa.table({"id": range(61), "text": column}), path, row_group_size=7)
    texts, rejects = read(path)
    expected = pq.read_table(path)["text"].to_pylist()
    assert texts == [each if isinstance(each, str) else each.decode() for each in expected if each is not None]
    assert [(each.line, each.reason) for each in rejects] == [(61, "text is not a string")]


def test_a_byte_flipped_anywhere_changes_no_text(tmp_path: Path) -> None:
    """Pages have checksums. Rows that are not read are counted; the footer, which has the counts, is not flipped."""
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": TEXTS}), path, row_group_size=10, write_page_checksum=True, compression="none",
        use_dictionary=False,
    )  # fmt: skip
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    silent = 0
    for position in range(4, footer, 5):
        damaged = bytearray(whole)
        damaged[position] ^= 8
        path.write_bytes(damaged)
        texts, rejects = read(path)
        lost = sum(each.records for each in rejects)
        silent += not rejects
        assert set(texts) <= set(TEXTS), position
        assert rejects or texts == TEXTS, position
        assert len(texts) + lost == len(TEXTS), position
        assert lost in (0, 10), "one row group"
    assert 0 < silent < footer / 5 / 4, "statistics in a page's header are no text"


def test_ten_does_not_become_ninety(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": TEXTS})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"give 10 mg", b"give 90 mg"))
    texts, rejects = read(path)
    assert texts == []
    assert [(each.reason, each.records) for each in rejects] == [("Parquet row group is damaged", 60)]


def test_rows_beyond_the_limit_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS * 100}), path, row_group_size=100)
    texts, rejects = read(path, DocumentLimits(max_file_bytes=100_000))
    assert 0 < len(texts) < 6000
    assert len(texts) + sum(each.records for each in rejects) == 6000
