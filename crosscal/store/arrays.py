"""numpy's arrays as Arrow's, and Arrow's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc


def array_of(values: np.ndarray) -> pa.Array:
    """The same numbers, not copied where they lie one behind the other.

    `pyarrow.array` says the same, after importing all of pandas in case that the values are one of its series: 0.4 s
    and 40 MiB of every process that stores anything.
    """
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


@contextmanager
def arrow_file(
    path: Path, schema: pa.Schema, options: pa.ipc.IpcWriteOptions | None = None
) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """A new Arrow IPC file to write to.

    It is closed behind the block in any case. A writer that is told a path keeps the file open after an error, as long
    as anybody holds the error: its space is not free until then.
    """
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        yield writer
