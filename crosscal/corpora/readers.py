"""Candidates from a file, whatever its format: one generator per format, none of which stops at a bad line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crosscal.corpora.csv_records import records
from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.records import Document, Reject, excerpt, judge
from crosscal.corpora.streams import Broken, Line, lines

Candidates = Iterator[Document | Reject]
PARQUET_ROWS = 128
COLUMNS_KEPT = 20


def read_jsonl(path: Path, source: str, text: str, limits: DocumentLimits) -> Candidates:
    """One JSON object a line, its document under the key `text`."""
    for line in lines(path, limits):
        if isinstance(line, Broken):
            yield _reject(source, line)
        elif line.data.strip():
            yield _json_candidate(line, source, text, limits)


def _json_candidate(line: Line, source: str, text: str, limits: DocumentLimits) -> Document | Reject:
    try:
        row = json.loads(line.data.decode("utf-8"))
    except UnicodeDecodeError:
        return Reject(source, line.number, "invalid UTF-8", excerpt(line.data))
    except (ValueError, RecursionError):  # also integers of more digits than Python converts, and deep nesting
        return Reject(source, line.number, "invalid JSON", excerpt(line.data))
    if not isinstance(row, dict):
        return Reject(source, line.number, "not a JSON object", excerpt(line.data))
    if text not in row:
        return _no_column(source, line.number, text, row)
    return judge(row[text], source, line.number, limits)


def read_text(path: Path, source: str, text: str, limits: DocumentLimits) -> Candidates:
    """A plain text file is one document, unless it is longer than `limits.text_file_characters`.

    Then it is cut at blank lines into documents of at most about that size (a paragraph longer than that is cut at
    line ends), so that one book can be split by document. A paragraph that is not UTF-8 is rejected on its own.
    """
    parts, characters, first_line = [], 0, 1
    for block in _paragraphs(path, source, limits):
        if isinstance(block, Reject):
            yield block
            continue
        number, paragraph = block
        if parts and characters + len(paragraph) > limits.text_file_characters:
            yield judge("".join(parts), source, first_line, limits)
            parts, characters = [], 0
        if not parts:
            first_line = number
        parts.append(paragraph)
        characters += len(paragraph)
    if parts:
        yield judge("".join(parts), source, first_line, limits)


def _paragraphs(path: Path, source: str, limits: DocumentLimits) -> Iterator[tuple[int, str] | Reject]:
    """(first line, text) of each run of lines up to and with the blank line behind it."""
    number, block, block_bytes = 1, [], 0
    for line in lines(path, limits):
        if isinstance(line, Broken):
            yield _reject(source, line)
            continue
        if not block:
            number = line.number
        block.append(line.data.removesuffix(b"\r") + b"\n")
        block_bytes += len(line.data)
        if not line.data.strip() or block_bytes > limits.text_file_characters:
            yield _paragraph(source, number, block)
            block, block_bytes = [], 0
    if block:
        yield _paragraph(source, number, block)


def _paragraph(source: str, number: int, block: list[bytes]) -> tuple[int, str] | Reject:
    data = b"".join(block)
    try:
        return number, data.decode("utf-8")
    except UnicodeDecodeError:
        return Reject(source, number, "invalid UTF-8", excerpt(data))


def read_csv(path: Path, source: str, text: str, limits: DocumentLimits) -> Candidates:
    """Comma-separated values with a header line; quoted fields may hold line ends."""
    csv.field_size_limit(max(csv.field_size_limit(), limits.max_line_bytes))  # a process-wide 128 KiB otherwise
    header: list[str] = []
    for record in records(lines(path, limits), limits.max_line_bytes):
        row = _csv_row(record, source)
        if isinstance(row, Reject):
            yield row
            if not header:
                return  # without its header the file has no columns
        elif not header:
            header = row
            if header and text not in header:
                yield _no_column(source, record.number, text, header)
                return
        elif row and len(row) != len(header):
            yield Reject(source, record.number, "wrong number of fields", excerpt(",".join(row)))
        elif row:
            yield judge(row[header.index(text)], source, record.number, limits)


def _csv_row(record: Line | Broken, source: str) -> list[str] | Reject:
    if isinstance(record, Broken):
        return _reject(source, record)
    try:
        return next(csv.reader([record.data.decode("utf-8")]), [])
    except UnicodeDecodeError:
        return Reject(source, record.number, "invalid UTF-8", excerpt(record.data))
    except csv.Error:
        return Reject(source, record.number, "invalid CSV", excerpt(record.data))


def read_parquet(path: Path, source: str, text: str, limits: DocumentLimits) -> Candidates:
    """One document a row, in a column of strings."""
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text not in schema.names:
                yield _no_column(source, 0, text, schema.names)
                return
            kind = schema.types[schema.names.index(text)]
            if not _is_text(kind):
                yield Reject(source, 0, "text column does not hold strings", excerpt(str(kind)))
                return
            read_bytes = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text]):
                read_bytes += batch.nbytes
                if read_bytes > limits.max_file_bytes:
                    yield Reject(source, row, f"file longer than {limits.max_file_bytes} bytes, rest not read")
                    return
                for cell in _cells(batch.column(0)):
                    row += 1
                    yield _cell_candidate(cell, source, row, limits)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last from column names
        yield Reject(source, row, "Parquet file is damaged, rest not read", excerpt(str(error)))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def _cells(column: pa.Array) -> list[bytes | None]:
    """As bytes: pyarrow raises for the whole column when one string in it is not UTF-8."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()


def _cell_candidate(cell: bytes | None, source: str, row: int, limits: DocumentLimits) -> Document | Reject:
    try:
        return judge(cell if cell is None else cell.decode("utf-8"), source, row, limits)
    except UnicodeDecodeError:
        return Reject(source, row, "invalid UTF-8", excerpt(cell or b""))


def _reject(source: str, broken: Broken) -> Reject:
    return Reject(source, broken.number, broken.reason, broken.excerpt)


def _no_column(source: str, line: int, text: str, columns: Iterable[str]) -> Reject:
    return Reject(source, line, f"no column {text!r}", columns=tuple(map(excerpt, islice(columns, COLUMNS_KEPT))))


READERS: dict[str, Callable[[Path, str, str, DocumentLimits], Candidates]] = {
    ".txt": read_text,
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
"""Format by file name; all but Parquet may also end in .gz or .zst."""
