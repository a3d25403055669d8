"""Documents from an Arrow stream: a data file of a folder saved by `datasets`."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.records import Candidates, Reject
from crosscal.corpora.table_records import candidates, columns_of
from crosscal.files import excerpt

DAMAGED = "Arrow file is damaged, rest not read"
_BYTES_OF = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError, ValueError)


def read_arrow(path: Path, source: str, text: str, limits: DocumentLimits) -> Candidates:
    """Yield one candidate per row. The lengths and offsets that a batch states are validated before it is read."""
    row = read_bytes = 0
    try:
        with path.open("rb") as raw, pa.ipc.open_stream(raw) as stream:
            columns = columns_of(stream.schema, source, text, rows=1)
            if isinstance(columns, Reject):
                yield columns
                return
            for batch in stream:
                read_bytes += batch.nbytes
                if read_bytes > limits.max_file_bytes:
                    yield Reject(source, row, f"file longer than {limits.max_file_bytes} bytes, rest not read")
                    return
                wanted = batch.select(columns)
                _verify(wanted)
                yield from candidates(wanted, text, source, row, limits)
                row += len(batch)
    except _DAMAGE as error:
        yield Reject(source, row, DAMAGED, excerpt(str(error)))


def _verify(batch: pa.RecordBatch) -> None:
    """Raise if lengths or offsets point outside the buffers. UTF-8 is not checked here but later, cell by cell."""
    for column in batch.columns:
        kind = _BYTES_OF.get(column.type)
        (column if kind is None else column.view(kind)).validate(full=True)
