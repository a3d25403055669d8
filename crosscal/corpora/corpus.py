"""A corpus: the documents of one domain, as a growing list of immutable shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crosscal.corpora.shards import read_digests, read_texts
from crosscal.errors import CorpusError, UsageError
from crosscal.store import Store, digest_of

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Shard:
    """Documents that landed together. Equal documents in equal splits mean an equal key."""

    key: str
    documents: dict[str, int]
    """Number per split; splits without documents are left out."""

    characters: dict[str, int]


@dataclass(frozen=True)
class Corpus:
    name: str
    version: int
    digest: str
    """Of all shards together: what the corpus holds, whatever its name and history."""

    shards: tuple[Shard, ...]

    def documents(self, split: str) -> int:
        return sum(shard.documents.get(split, 0) for shard in self.shards)


def load_corpus(store: Store, name: str, version: int | None = None) -> Corpus:
    """The newest or the given version. Raises `CorpusError` when there is none."""
    version, record = store.refs.read(ref_name(name), version)
    if record is None:
        raise CorpusError("no such corpus in the store", where=name, do=f"`crosscal ingest PATH --corpus {name}`.")
    return corpus_of(name, version, record)


def documents(store: Store, shard: Shard, split: str, order: Sequence[int] | None = None) -> Iterator[str]:
    """The texts of one split: all, by digest, or those at the positions in `order`."""
    if not shard.documents.get(split):
        return iter(())
    return read_texts(store.path(store.get("corpora", shard.key), f"{split}.arrow"), order)


def digests(store: Store, shard: Shard) -> dict[bytes, str]:
    """digest → split of every document."""
    artifact = store.get("corpora", shard.key)
    return {
        digest: split for split in shard.documents for digest in read_digests(store.path(artifact, f"{split}.arrow"))
    }


def ref_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            "not a valid corpus name",
            got=repr(name),
            do="Use up to 64 lower-case letters, digits, '.', '_' and '-', the first a letter or digit.",
        )
    return f"corpora/{name}"


def corpus_of(name: str, version: int, record: dict[str, Any]) -> Corpus:
    return Corpus(name, version, record["digest"], tuple(Shard(**shard) for shard in record["shards"]))


def record_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """What the store keeps of one version."""
    return {
        "shards": [asdict(shard) for shard in shards],
        "digest": digest_of(sorted(shard.key for shard in shards)),
    }
