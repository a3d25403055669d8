"""Documents from a column of a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.records import Candidates, Document, Reject, judge, no_column
from crosscal.files import excerpt

BATCH_ROWS = 128
DAMAGED = "Parquet file is damaged, rest not read"
DAMAGED_ROWS = "Parquet row group is damaged"
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last from column names


def read_parquet(path: Path, source: str, text: str, limits: DocumentLimits) -> Candidates:
    """One document a row, in a column of strings or bytes. Where the file has checksums of its pages they are
    compared; a damaged row group costs its own remaining rows, each counted."""
    try:
        # opened by Python, which takes names that are not UTF-8
        with path.open("rb") as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            if text not in schema.names:
                yield no_column(source, 0, text, schema.names)
                return
            kind = schema.types[schema.names.index(text)]
            if not _is_text(kind):
                yield Reject(source, 0, "text column does not hold strings", excerpt(str(kind)), records=_rows(file))
                return
            yield from _candidates(file, source, text, limits)
    except _DAMAGE as error:
        yield Reject(source, 0, DAMAGED, excerpt(str(error)))


def _rows(file: pq.ParquetFile) -> int:
    return max(1, file.metadata.num_rows)


def _candidates(file: pq.ParquetFile, source: str, text: str, limits: DocumentLimits) -> Candidates:
    row = read_bytes = group_end = 0
    for group in range(file.num_row_groups):
        group_end += file.metadata.row_group(group).num_rows
        problem = "fewer rows than its footer says"  # page headers have no checksum
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=[text]):
                read_bytes += batch.nbytes
                if read_bytes > limits.max_file_bytes:
                    reason = f"file longer than {limits.max_file_bytes} bytes, rest not read"
                    yield Reject(source, row, reason, records=_rows(file) - row)
                    return
                for cell in _cells(batch.column(0)):
                    row += 1
                    yield _candidate(cell, source, row, limits)
        except _DAMAGE as error:
            problem = str(error)
        if row < group_end:
            yield Reject(source, row + 1, DAMAGED_ROWS, excerpt(problem), records=group_end - row)
        row = group_end


def _is_text(kind: pa.DataType) -> bool:
    return str(kind.value_type if pa.types.is_dictionary(kind) else kind) in TEXT_TYPES


def _cells(column: pa.Array) -> Iterator[bytes | None]:
    """As bytes: pyarrow raises for the whole column when one string in it is not UTF-8."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    return iter(column.cast(pa.large_binary()).to_pylist())


def _candidate(cell: bytes | None, source: str, row: int, limits: DocumentLimits) -> Document | Reject:
    try:
        return judge(cell if cell is None else cell.decode("utf-8"), source, row, limits)
    except UnicodeDecodeError:
        return Reject(source, row, "invalid UTF-8", excerpt(cell or b""))
