"""Documents from the rows of an Arrow table (read from a Parquet or Arrow file)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from crosscal.corpora.forms import candidate, columns_wanted
from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.records import Candidates, Document, Reject, no_column
from crosscal.files import excerpt

TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_NESTED = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view),
    *(pa.types.is_large_list_view, pa.types.is_struct, pa.types.is_null),
)


class _Unreadable:
    """Placeholder for a cell whose bytes are not UTF-8."""

    def __init__(self, data: bytes) -> None:
        self.data = data


def columns_of(schema: pa.Schema, source: str, text: str, rows: int) -> list[str] | Reject:
    """Return the columns to read: those of all forms in the table, without columns of unusable types; or a reject."""
    wanted = columns_wanted(schema.names, text)
    if not wanted:
        return no_column(source, 0, text, schema.names)
    types = {name: schema.types[schema.names.index(name)] for name in wanted}
    usable = [name for name, kind in types.items() if _is_text(kind) or any(is_it(kind) for is_it in _NESTED)]
    if not columns_wanted(usable, text):
        kind = next(kind for name, kind in types.items() if name not in usable)
        return Reject(source, 0, "text column does not hold strings", excerpt(str(kind)), records=rows)
    return columns_wanted(usable, text)


def candidates(batch: pa.RecordBatch, text: str, source: str, before: int, limits: DocumentLimits) -> Candidates:
    """Yield one candidate per row; `before` is the number of rows of the file before this batch."""
    names = batch.schema.names
    for row, cells in enumerate(zip(*map(_cells, batch.columns), strict=True), start=before + 1):
        yield _candidate(names, cells, text, source, row, limits)


def _candidate(
    names: Sequence[str], cells: Sequence[Any], text: str, source: str, row: int, limits: DocumentLimits
) -> Document | Reject:
    unreadable = next((cell for cell in cells if isinstance(cell, _Unreadable)), None)
    if unreadable is not None:
        return Reject(source, row, "invalid UTF-8", excerpt(unreadable.data))
    return candidate(dict(zip(names, cells, strict=True)), text, source, row, limits)


def _is_text(kind: pa.DataType) -> bool:
    return str(kind.value_type if pa.types.is_dictionary(kind) else kind) in TEXT_TYPES


def _cells(column: pa.Array) -> Iterator[Any]:
    if not _is_text(column.type):
        return map(_nested, column)
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    return map(_text, column.cast(pa.large_binary()).to_pylist())


def _text(cell: bytes | None) -> str | _Unreadable | None:
    """Decode a single cell: pyarrow raises for the whole column if one string in it is not UTF-8."""
    try:
        return cell if cell is None else cell.decode("utf-8")
    except UnicodeDecodeError:
        return _Unreadable(cell or b"")


def _nested(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return _Unreadable(error.object)
