"""Files of conversations, and the documents that a corpus stores of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crosscal.corpora import Corpus
from crosscal.corpora.conversation import Conversation
from crosscal.corpora.corpus import TEMPLATE, readings
from crosscal.store import Store
from tests.helpers.tiny_chats import chats

CHATS = chats(60)
Rows = list[dict[str, Any]]


def stored(store: Store, corpus: Corpus) -> list[str | Conversation]:
    return [
        each for shard in corpus.shards for split in shard.documents for each in readings(store, shard, split, TEMPLATE)
    ]


def turns_of(store: Store, corpus: Corpus) -> list[list[dict[str, Any]]]:
    found = stored(store, corpus)
    return [list(each.turns) for each in found if isinstance(each, Conversation)]


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def write_lines(path: Path, rows: Rows) -> str:
    path.write_bytes(lines(rows))
    return str(path)
