"""Conversion of NumPy arrays to Arrow, and Arrow IPC files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc


def array_of(values: np.ndarray) -> pa.Array:
    """Return the values as an Arrow array, without a copy if they are contiguous.

    `pyarrow.array` does the same, but first imports pandas in case the values are a series: 0.4 s and 40 MiB in every
    process that stores anything.
    """
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


@contextmanager
def arrow_file(
    path: Path, schema: pa.Schema, options: pa.ipc.IpcWriteOptions | None = None
) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """Open a new Arrow IPC file for writing.

    The file is always closed at the end of the block. A writer that is given a path keeps the file open after an error
    for as long as the exception is referenced, and its disk space is not freed until then.
    """
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        yield writer
