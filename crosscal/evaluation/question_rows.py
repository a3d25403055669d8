"""Records of a question file in any supported format; an unreadable record is an error and is never skipped."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscal.errors import EvaluationError
from crosscal.files import COMPRESSIONS, JSON_FORMATS, Broken, JsonRecord, Line, excerpt, format_of, json_records, lines

TABLES = {".csv": ",", ".tsv": "\t"}
FORMATS = (*JSON_FORMATS, *TABLES, ".parquet")
FORMS = f"{', '.join((*JSON_FORMATS, *TABLES))}, each also with {', '.join(COMPRESSIONS)}, and .parquet"
FORM = 'Each line is {"question": "…", "choices": ["…", "…"], "answer": index of the right choice}.'
MOST_CELL_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Row:
    value: dict[str, Any]
    where: str
    """ "exams.csv, line 3"."""


@dataclass(frozen=True)
class CsvTable:
    """The lines of a CSV or TSV, all of one length. The caller decides whether the first one is a header."""

    lines: tuple[tuple[tuple[str, ...], str], ...]
    """(cells, where)."""

    @property
    def with_header(self) -> tuple[Row, ...]:
        """Rows with columns named by the first line; a column without a unique name is named by its number."""
        names: list[str] = []
        for number, cell in enumerate(self.lines[0][0], start=1):
            name = cell.strip()
            names.append(name if name and name not in names else f"{name} column {number}".strip())
        return self._rows(names, 1)

    @property
    def without_header(self) -> tuple[Row, ...]:
        """Rows with columns named by their number: `column 1`, `column 2`, …"""
        return self._rows([f"column {number}" for number in range(1, len(self.lines[0][0]) + 1)], 0)

    def _rows(self, names: Sequence[str], begin: int) -> tuple[Row, ...]:
        return tuple(Row(dict(zip(names, cells, strict=True)), where) for cells, where in self.lines[begin:])


def read_rows(path: Path) -> tuple[Row, ...] | CsvTable:
    """Return every record of a file, which may be none. Raises `EvaluationError` naming file and line."""
    if not path.is_file():
        raise EvaluationError("the questions cannot be read", where=str(path), got="no such file", do="Check the path.")
    form = format_of(path)
    if form in TABLES:
        found = tuple(_of_table(path, TABLES[form]))
        return CsvTable(found) if found else ()
    return tuple(_of_parquet(path) if form == ".parquet" else _of_json(path))


def _of_json(path: Path) -> Iterator[Row]:
    """The file's objects; if it is a single object that maps keys to objects, those."""
    found = [_checked(record, f"{path}, line {record.number}") for record in json_records(path)]
    if len(found) == 1 and len(found[0].value) > 1 and all(isinstance(one, dict) for one in found[0].value.values()):
        found = [Row(one, f"{path}, record {key}") for key, one in found[0].value.items()]
    yield from found


def _checked(record: JsonRecord | Broken, where: str) -> Row:
    if isinstance(record, Broken):
        raise _broken(record, where)
    try:
        json.dumps(record.value, ensure_ascii=False).encode()  # json accepts half a surrogate pair, tokenizers do not
    except (ValueError, RecursionError) as error:
        raise EvaluationError("not a line of JSON in UTF-8", where=where, got=excerpt(str(error))) from error
    if not isinstance(record.value, dict):
        raise EvaluationError("a row that is not an object", where=where, do=FORM)
    return Row(record.value, where)


def _broken(record: Broken, where: str) -> EvaluationError:
    what = "not a line of JSON in UTF-8" if record.reason.startswith("invalid") else "the questions cannot be read"
    return EvaluationError(what, where=where, got=record.reason, do=FORM)


def _of_table(path: Path, delimiter: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (cells, where) of each line, quoted as in RFC 4180."""
    csv.field_size_limit(max(csv.field_size_limit(), MOST_CELL_BYTES))  # process-wide; the default is 128 KiB
    reader = csv.reader(_text_lines(path), delimiter=delimiter, strict=True)
    width, begins = 0, 1
    try:
        for cells in reader:
            where, begins = f"{path}, line {begins}", reader.line_num + 1
            width = width or len(cells)
            if len(cells) not in (0, width):  # an empty line has no cells
                got = f"{len(cells)} cells, and {width} in the first line"
                raise EvaluationError("a row of another length", where=where, got=got, do="Quote cells with commas.")
            if cells:
                yield tuple(cells), where
    except csv.Error as error:
        where = f"{path}, line {begins}"
        raise EvaluationError("not a row of a table", where=where, got=str(error), do="Fix its quotes.") from error


def _text_lines(path: Path) -> Iterator[str]:
    for line in lines(path, universal=True):
        where = f"{path}, line {line.number}"
        if isinstance(line, Broken):
            raise EvaluationError("the questions cannot be read", where=where, got=line.reason)
        yield _decoded(line, where)


def _decoded(line: Line, where: str) -> str:
    try:
        return line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError("not a line of UTF-8", where=where, got=excerpt(line.data)) from error


def _of_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{path}, row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        where, got = f"{path}, behind row {number}", excerpt(str(error))
        raise EvaluationError("the questions cannot be read", where=where, got=got) from error
