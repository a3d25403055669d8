"""A shard's files: one Arrow IPC file per split, compressed with Zstandard, documents ordered by digest.

A file with conversations has a fourth column that flags them. Files without conversations keep the format from before
conversations were supported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa

from crosscal.corpora.conversation import Conversation
from crosscal.store.arrays import arrow_file

BATCH_DOCUMENTS = 64  # read and decompressed together; small because documents are also read individually

SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.string()), ("digest", pa.binary(32))])
IS_CONVERSATION = "is_conversation"
WITH_CONVERSATIONS = SCHEMA.append(pa.field(IS_CONVERSATION, pa.bool_()))


def write_split(path: Path, rows: Iterable[Sequence[object]], *, conversations: bool = False) -> None:
    """Write rows of (text, source, digest, is_conversation) in the given order; without `conversations` the last
    column is not written."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    schema = WITH_CONVERSATIONS if conversations else SCHEMA
    iterator = iter(rows)
    with arrow_file(path, schema, options) as writer:
        while batch := list(islice(iterator, BATCH_DOCUMENTS)):
            columns = [pa.array(column, field.type) for column, field in zip(zip(*batch), schema)]  # noqa: B905
            writer.write_batch(pa.record_batch(columns, schema=schema))


def read_rows(path: Path) -> Iterator[tuple[str, str, bytes, bool]]:
    """Yield (text as stored, source, digest, is_conversation) for every document."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for index in range(reader.num_record_batches):
            for row in reader.get_batch(index).to_pylist():
                yield row["text"], row["source"], row["digest"], row.get(IS_CONVERSATION, False)


def read_documents(path: Path, order: Sequence[int] | None = None) -> Iterator[str | Conversation]:
    """Yield all documents as stored, or those at the positions in `order`; at most one batch is in memory."""
    with pa.memory_map(str(path)) as source:
        columns = [0, 3] if len(pa.ipc.open_file(source).schema) > len(SCHEMA) else [0]
        reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=columns))
        if order is None:
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                yield from (_document(batch, row) for row in range(len(batch)))
            return
        for position in order:
            index, row = divmod(int(position), BATCH_DOCUMENTS)
            yield _document(reader.get_batch(index), row)


def _document(batch: pa.RecordBatch, row: int) -> str | Conversation:
    text: str = batch.column(0)[row].as_py()
    is_conversation = batch.num_columns > 1 and batch.column(1)[row].as_py()
    return Conversation.of_stored(text) if is_conversation else text


def read_digests(path: Path) -> list[bytes]:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=[2]))
        return reader.read_all().column("digest").to_pylist()
