"""Readers of files: one generator of candidates per format. None of them stops at a bad line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from crosscal.corpora import csv_records
from crosscal.corpora.arrow_records import read_arrow
from crosscal.corpora.forms import candidate, columns_wanted
from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.parquet_records import read_parquet
from crosscal.corpora.records import Candidates, Reject, judge, no_column, rejected
from crosscal.corpora.saved_folders import ARROW
from crosscal.files import FORMATS, Broken, excerpt, json_records, lines


def read_json(path: Path, source: str, text: str, limits: DocumentLimits) -> Candidates:
    """Read JSON objects, each with its document in the column `text` or in a known form (see `forms`)."""
    for record in json_records(path, limits.max_line_bytes, limits.max_file_bytes):
        if isinstance(record, Broken):
            yield rejected(source, record)
        elif not isinstance(record.value, dict):
            yield Reject(source, record.number, "not a JSON object", record.excerpt)
        else:
            yield candidate(record.value, text, source, record.number, limits)


def read_text(path: Path, source: str, text: str, limits: DocumentLimits) -> Candidates:
    """Read a plain text file as one document, or as several if it is longer than `limits.text_file_characters`.

    A longer file is cut at blank lines into documents of at most about that size (longer paragraphs are cut at line
    ends), so that one book can be split by document. A paragraph that is not UTF-8 is rejected individually.
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
    """Yield (number of its first line, text) for each paragraph, including the blank line after it."""
    number, block, block_bytes = 1, [], 0
    for line in lines(path, limits.max_line_bytes, limits.max_file_bytes):
        if isinstance(line, Broken):
            yield rejected(source, line)
            continue
        if not block:
            number = line.number
        block.append(line.data.removesuffix(b"\n").removesuffix(b"\r") + b"\n")
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
    """Read comma-separated values with a header line; quoted fields may contain line ends, or the JSON of turns."""
    return _read_separated(path, source, text, limits, ",")


def read_tsv(path: Path, source: str, text: str, limits: DocumentLimits) -> Candidates:
    """Read tab-separated values; otherwise like `read_csv`."""
    return _read_separated(path, source, text, limits, "\t")


def _read_separated(path: Path, source: str, text: str, limits: DocumentLimits, delimiter: str) -> Candidates:
    header: list[str] = []
    wanted: list[tuple[str, int]] = []
    physical = lines(path, limits.max_line_bytes, limits.max_file_bytes, universal=True)
    for row in csv_records.records(physical, delimiter, limits.max_line_bytes):
        if isinstance(row, Broken):
            yield rejected(source, row)
            if not header:
                return  # without its header the file has no columns
        elif not header:
            header = row.fields
            wanted = [(name, header.index(name)) for name in columns_wanted(header, text)]
            if not wanted:
                yield no_column(source, row.number, text, header)
                return
        elif len(row.fields) != len(header):
            yield Reject(source, row.number, "wrong number of fields", excerpt(delimiter.join(row.fields)))
        else:
            yield candidate({name: row.fields[at] for name, at in wanted}, text, source, row.number, limits)


_READERS = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
READERS: dict[str, Callable[[Path, str, str, DocumentLimits], Candidates]] = {
    **{form: _READERS[form] for form in FORMATS},
    ARROW: read_arrow,
}
"""Reader of each format: those of `crosscal.files.names`, and the Arrow files of folders saved by `datasets`."""
