"""The documents of several shards and splits as one sequence of texts, read in batches or individually."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from crosscal.corpora import Corpus, Shard
from crosscal.corpora.conversation import Conversation
from crosscal.corpora.shards import BATCH_DOCUMENTS, read_digests
from crosscal.store import Store

Part = tuple[Shard, str]
"""A shard and one of its splits."""


class DocumentTexts:
    """Sequence of the texts of some parts. At most one batch is in memory, and no file of another split is opened."""

    def __init__(self, store: Store, parts: Sequence[Part]) -> None:
        parts = [(shard, split) for shard, split in parts if shard.documents.get(split)]
        self._files = [store.path(store.get("corpora", shard.key), f"{split}.arrow") for shard, split in parts]
        counts = [shard.documents[split] for shard, split in parts]
        self._starts = list(itertools.accumulate(counts, initial=0))
        files = zip(self._files, counts, strict=True)
        self.batches = [(file, number) for file, count in files for number in range(-(-count // BATCH_DOCUMENTS))]
        """(file, batch number in the file) of every batch, in the order of the documents."""

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[str]:
        for batch in range(len(self.batches)):
            yield from self.batch(batch)

    def batch(self, number: int) -> list[str]:
        return [_text(document) for document in _documents(*self.batches[number])]

    def text(self, position: int) -> str:
        return _text(self.document(position))

    def document(self, position: int) -> str | Conversation:
        file, batch, row = self._at(position)
        return _documents(file, batch)[row]

    def digest(self, position: int) -> bytes:
        file, batch, row = self._at(position)
        return _column(file, batch, "digest")[row]

    def digests(self) -> Iterator[bytes]:
        for file in self._files:
            yield from read_digests(file)

    def place(self, position: int) -> tuple[Path, int]:
        """Return the file and row of a document."""
        number = bisect.bisect_right(self._starts, position) - 1
        return self._files[number], position - self._starts[number]

    def _at(self, position: int) -> tuple[Path, int, int]:
        file, row = self.place(position)
        return file, *divmod(row, BATCH_DOCUMENTS)


def parts_of(corpora: Sequence[Corpus], *splits: str) -> list[Part]:
    """Return (shard, split) for each distinct shard of these corpora and each of the splits."""
    shards = {shard.key: shard for corpus in corpora for shard in corpus.shards}
    return [(shard, split) for shard in shards.values() for split in splits]


def _text(document: str | Conversation) -> str:
    """Return the document's text; for a conversation, the plain text of its turns without roles."""
    return document if isinstance(document, str) else document.plain


def _documents(file: Path, batch: int) -> list[str | Conversation]:
    texts = _column(file, batch, "text")
    flags = _column(file, batch, "is_conversation") or [None] * len(texts)
    return [Conversation.of_stored(text) if flag else text for text, flag in zip(texts, flags, strict=True)]


def _column(file: Path, batch: int, name: str) -> list[Any]:
    """Return one column of a batch; empty if the file has no such column."""
    with pa.memory_map(str(file)) as source:
        place = pa.ipc.open_file(source).schema.get_field_index(name)
        if place < 0:
            return []
        options = pa.ipc.IpcReadOptions(included_fields=[place])
        return pa.ipc.open_file(source, options=options).get_batch(batch).column(0).to_pylist()
