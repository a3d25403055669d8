"""A corpus: the documents of one domain, as a growing list of immutable shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from crosscal.corpora.conversation import Conversation
from crosscal.corpora.shards import read_digests, read_documents
from crosscal.errors import CorpusError, UsageError
from crosscal.store import Store, digest_of

TEMPLATE, PLAIN = "template", "text"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Shard:
    """Documents that landed together. Shards with the same documents in the same splits have the same key."""

    key: str
    documents: dict[str, int]
    """Number of documents per split; splits without documents are left out."""

    characters: dict[str, int]
    conversations: dict[str, int] = field(default_factory=dict)
    """Number of conversations among the documents, per split that has any."""


@dataclass(frozen=True)
class Corpus:
    """One version of a corpus: its name, its shards in the order they landed, and how conversations are read."""

    name: str
    version: int
    digest: str
    """Digest of the keys of all shards: identifies the content, independent of name and history."""

    shards: tuple[Shard, ...]
    chat: str = TEMPLATE
    """How its conversations are read: `template` (rendered by the model's chat template) or `text` (plain text)."""

    def documents(self, split: str) -> int:
        return sum(shard.documents.get(split, 0) for shard in self.shards)

    @property
    def conversations(self) -> int:
        return sum(sum(shard.conversations.values()) for shard in self.shards)


def load_corpus(store: Store, name: str, version: int | None = None) -> Corpus:
    """Return the newest or the given version. Raises `CorpusError` if it does not exist."""
    version, record = store.refs.read(ref_name(name), version)
    if record is None:
        raise CorpusError("no such corpus in the store", where=name, do=f"`crosscal ingest PATH --corpus {name}`.")
    return corpus_of(name, version, record)


def documents(store: Store, shard: Shard, split: str, order: Sequence[int] | None = None) -> Iterator[str]:
    """Return the texts of one split: all, ordered by digest, or those at the positions in `order`.

    The text of a conversation is the plain text of its turns.
    """
    return map(_text, readings(store, shard, split, TEMPLATE, order))


def readings(
    store: Store, shard: Shard, split: str, chat: str, order: Sequence[int] | None = None
) -> Iterator[str | Conversation]:
    """Return the same documents as `documents`; with `chat` "template", conversations as objects, to be rendered."""
    if not shard.documents.get(split):
        return iter(())
    found = read_documents(store.path(store.get("corpora", shard.key), f"{split}.arrow"), order)
    return map(_text, found) if chat == PLAIN else found


def _text(document: str | Conversation) -> str:
    return document.plain if isinstance(document, Conversation) else document


def digests(store: Store, shard: Shard) -> dict[bytes, str]:
    """Return digest → split for every document of the shard."""
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


def record_of(shards: Sequence[Shard], said: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return the stored record of one version; `said` adds entries about removed documents (see `removing`)."""
    return {
        **{name: value for name, value in said.items() if value},
        "shards": [_shard_record(shard) for shard in shards],
        "digest": digest_of(sorted(shard.key for shard in shards)),
    }


def _shard_record(shard: Shard) -> dict[str, Any]:
    """Without conversations, the record equals that of versions of crosscal that did not know them."""
    return {name: value for name, value in asdict(shard).items() if name != "conversations" or value}
