"""Storage of a selection: digests and scores in an artifact, the documents as a corpus."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from crosscal.corpora import Corpus, Shard
from crosscal.corpora.conversation import Conversation
from crosscal.corpora.corpus import corpus_of, record_of, ref_name
from crosscal.corpora.shards import BATCH_DOCUMENTS
from crosscal.selection.texts import DocumentTexts, parts_of
from crosscal.store import Store, digest_of
from crosscal.store.arrays import array_of, arrow_file
from crosscal.store.refs import again_on_conflict

Rows = list[tuple[bytes, DocumentTexts, int]]
"""(digest, texts that contain it, position there) of documents, ordered by digest."""


def publish_chosen(
    store: Store,
    kind: str,
    key: str,
    provenance: dict[str, Any],
    pool: DocumentTexts,
    chosen: Sequence[int],
    scores: np.ndarray | None,
    evaluated_on: Corpus,
    counts: dict[str, int],
) -> None:
    """Store the documents as a shard, then the selection that refers to it.

    `chosen.arrow` has one row per document in order of choice: `digest` and `score` (null if nothing was scored).
    """
    held_out = {split: DocumentTexts(store, parts_of([evaluated_on], split)) for split in ("validation", "test")}
    members = {"train": _rows(pool, chosen)}
    members |= {split: _rows(texts, range(len(texts))) for split, texts in held_out.items() if texts}
    shard = _publish_shard(store, members)
    with store.publish(kind, key, provenance) as folder:
        digests = pa.array([pool.digest(position) for position in chosen], pa.binary(32))
        column = pa.nulls(len(chosen), pa.float64()) if scores is None else array_of(scores)
        table = pa.table({"digest": digests, "score": column})
        with arrow_file(folder / "chosen.arrow", table.schema) as writer:
            writer.write_table(table)
        (folder / "selection.json").write_text(json.dumps({"shard": dataclasses.asdict(shard), "counts": counts}))


def read_chosen(store: Store, kind: str, key: str) -> list[tuple[bytes, float | None]]:
    """Return (digest, score) of every chosen document, in order of choice."""
    with pa.memory_map(str(store.path(store.get(kind, key), "chosen.arrow"))) as source:
        table = pa.ipc.open_file(source).read_all()
    return list(zip(table.column("digest").to_pylist(), table.column("score").to_pylist(), strict=True))


def keep_version(store: Store, name: str, shard: Shard) -> Corpus:
    """Make this shard the newest version of the corpus `name`, unless it is already; return the corpus."""
    return again_on_conflict(lambda: _keep_version(store, name, shard))


def _keep_version(store: Store, name: str, shard: Shard) -> Corpus:
    record = record_of([shard])
    version, newest = store.refs.read(ref_name(name))
    if newest != record:
        version = store.refs.append(ref_name(name), version, record)
    return corpus_of(name, version, record)


def _rows(texts: DocumentTexts, positions: Sequence[int]) -> Rows:
    return sorted(((texts.digest(position), texts, position) for position in positions), key=lambda row: row[0])


def _publish_shard(store: Store, members: dict[str, Rows]) -> Shard:
    """Store a shard like those of ingest; its rows are copied unchanged from the shards they come from."""
    digests = {split: [digest.hex() for digest, _, _ in rows] for split, rows in members.items()}
    documents = {split: len(rows) for split, rows in members.items()}
    characters, conversations = {}, {}
    for split, rows in members.items():
        found = [_measured(texts.document(position)) for _, texts, position in rows]
        characters[split] = sum(size for size, _ in found)
        conversations |= {split: count} if (count := sum(is_one for _, is_one in found)) else {}
    shard = Shard(digest_of(digests), documents, characters, conversations)
    said = {"documents": documents, "characters": characters}
    with store.publish("corpora", shard.key, said) as folder:
        for split, rows in members.items():
            _write(folder / f"{split}.arrow", rows)
    return shard


def _measured(document: str | Conversation) -> tuple[int, bool]:
    """Return (number of characters, is a conversation)."""
    return (len(document), False) if isinstance(document, str) else (document.characters, True)


def _write(path: Path, rows: Rows) -> None:
    """Write the rows with the union of the columns of their files; at most one batch is in memory."""
    files = {texts.place(position)[0] for _, texts, position in rows}
    schema = pa.unify_schemas([_schema(file) for file in sorted(files)])
    writing = _one_by_one(rows)
    with arrow_file(path, schema, pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        while batch := list(itertools.islice(writing, BATCH_DOCUMENTS)):
            table = pa.concat_tables([schema.empty_table(), *batch], promote_options="default")
            writer.write_table(table.combine_chunks())


def _schema(file: Path) -> pa.Schema:
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).schema


def _one_by_one(rows: Rows) -> Iterator[pa.Table]:
    """Yield a one-row table with all columns for each document."""
    for _, texts, position in rows:
        file, row = texts.place(position)
        number, place = divmod(row, BATCH_DOCUMENTS)
        with pa.memory_map(str(file)) as source:
            batch = pa.ipc.open_file(source).get_batch(number)
            yield pa.Table.from_batches([batch.slice(place, 1)])
