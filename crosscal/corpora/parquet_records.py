"""Documents from the columns of a Parquet file."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.records import Candidates, Reject
from crosscal.corpora.table_records import candidates, columns_of
from crosscal.files import excerpt

BATCH_ROWS = 128
DAMAGED = "Parquet file is damaged, rest not read"
DAMAGED_ROWS = "Parquet row group is damaged"
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)  # UnicodeDecodeError: from column names


def read_parquet(path: Path, source: str, text: str, limits: DocumentLimits) -> Candidates:
    """Yield one candidate per row; texts come from columns of strings or bytes.

    Page checksums are verified if the file has them. A damaged row group loses only its remaining rows, each counted.
    """
    try:
        # opened by Python, which accepts file names that are not UTF-8
        with path.open("rb") as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            columns = columns_of(file.schema_arrow, source, text, _rows(file))
            if isinstance(columns, Reject):
                yield columns
            else:
                yield from _candidates(file, source, text, columns, limits)
    except _DAMAGE as error:
        yield Reject(source, 0, DAMAGED, excerpt(str(error)))


def _rows(file: pq.ParquetFile) -> int:
    return max(1, file.metadata.num_rows)


def _candidates(file: pq.ParquetFile, source: str, text: str, columns: list[str], limits: DocumentLimits) -> Candidates:
    row = read_bytes = group_end = 0
    for group in range(file.num_row_groups):
        group_end += file.metadata.row_group(group).num_rows
        problem = "fewer rows than its footer says"  # page headers have no checksum
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns):
                read_bytes += batch.nbytes
                if read_bytes > limits.max_file_bytes:
                    reason = f"file longer than {limits.max_file_bytes} bytes, rest not read"
                    yield Reject(source, row, reason, records=_rows(file) - row)
                    return
                for found in candidates(batch, text, source, row, limits):
                    row += 1
                    yield found
        except _DAMAGE as error:
            problem = str(error)
        if row < group_end:
            yield Reject(source, row + 1, DAMAGED_ROWS, excerpt(problem), records=group_end - row)
        row = group_end
