"""The documents of some splits as one sequence, read in batches or one by one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from crosscal.corpora import Corpus, Shard
from crosscal.corpora.shards import BATCH_DOCUMENTS, read_digests
from crosscal.store import Store

Part = tuple[Shard, str]
"""A shard and one of its splits."""


class Texts:
    """No more than a batch of documents is in memory; no file of another split is opened."""

    def __init__(self, store: Store, parts: Sequence[Part]) -> None:
        parts = [(shard, split) for shard, split in parts if shard.documents.get(split)]
        self._files = [store.path(store.get("corpora", shard.key), f"{split}.arrow") for shard, split in parts]
        counts = [shard.documents[split] for shard, split in parts]
        self._starts = list(itertools.accumulate(counts, initial=0))
        files = zip(self._files, counts, strict=True)
        self.batches = [(file, number) for file, count in files for number in range(-(-count // BATCH_DOCUMENTS))]
        """(file, number in it) of every batch, in the order of the documents."""

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[str]:
        for batch in range(len(self.batches)):
            yield from self.batch(batch)

    def batch(self, number: int) -> list[str]:
        return _column(*self.batches[number], "text")

    def text(self, position: int) -> str:
        return self._value(position, "text")

    def digest(self, position: int) -> bytes:
        return self._value(position, "digest")

    def digests(self) -> Iterator[bytes]:
        for file in self._files:
            yield from read_digests(file)

    def place(self, position: int) -> tuple[Path, int]:
        """File and row of a document."""
        number = bisect.bisect_right(self._starts, position) - 1
        return self._files[number], position - self._starts[number]

    def _value(self, position: int, column: str) -> Any:
        file, row = self.place(position)
        batch, place = divmod(row, BATCH_DOCUMENTS)
        return _column(file, batch, column)[place]


def parts_of(corpora: Sequence[Corpus], *splits: str) -> list[Part]:
    """Every shard of these corpora once, for each of the splits."""
    shards = {shard.key: shard for corpus in corpora for shard in corpus.shards}
    return [(shard, split) for shard in shards.values() for split in splits]


def _column(file: Path, batch: int, name: str) -> list:
    with pa.memory_map(str(file)) as source:
        schema = pa.ipc.open_file(source).schema
        options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name)])
        return pa.ipc.open_file(source, options=options).get_batch(batch).column(0).to_pylist()
