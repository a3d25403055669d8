"""A shard's files: one Arrow IPC file a split, texts compressed with Zstandard, ordered by digest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa

from crosscal.store.arrays import arrow_file

BATCH_DOCUMENTS = 64  # read and decompressed together: small, since documents are also picked one by one

SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.string()), ("digest", pa.binary(32))])


def write_split(path: Path, rows: Iterable[tuple[str, str, bytes]]) -> None:
    """Write (text, source, digest) rows, in the order given."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    iterator = iter(rows)
    with arrow_file(path, SCHEMA, options) as writer:
        while batch := list(islice(iterator, BATCH_DOCUMENTS)):
            columns = [pa.array(column, field.type) for column, field in zip(zip(*batch), SCHEMA)]  # noqa: B905
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))


def read_texts(path: Path, order: Sequence[int] | None = None) -> Iterator[str]:
    """Texts as stored, or those at the given positions in that order; no more than a batch is held."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=[0]))
        if order is None:
            for index in range(reader.num_record_batches):
                yield from reader.get_batch(index).column(0).to_pylist()
            return
        for position in order:
            batch, row = divmod(int(position), BATCH_DOCUMENTS)
            yield reader.get_batch(batch).column(0)[row].as_py()


def read_digests(path: Path) -> list[bytes]:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=[2]))
        return reader.read_all().column("digest").to_pylist()
