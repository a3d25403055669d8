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
    """Documents that landed together. Equal documents in equal splits mean an equal key."""

    key: str
    documents: dict[str, int]
    """Number per split; splits without documents are left out."""

    characters: dict[str, int]
    conversations: dict[str, int] = field(default_factory=dict)
    """Of the documents those that are conversations, per split that has some."""


@dataclass(frozen=True)
class Corpus:
    name: str
    version: int
    digest: str
    """Of all shards together: what the corpus holds, whatever its name and history."""

    shards: tuple[Shard, ...]
    chat: str = TEMPLATE
    """How its conversations are read: `template`, as the model's own template renders them, or `text`."""

    def documents(self, split: str) -> int:
        return sum(shard.documents.get(split, 0) for shard in self.shards)

    @property
    def conversations(self) -> int:
        return sum(sum(shard.conversations.values()) for shard in self.shards)


def load_corpus(store: Store, name: str, version: int | None = None) -> Corpus:
    """The newest or the given version. Raises `CorpusError` when there is none."""
    version, record = store.refs.read(ref_name(name), version)
    if record is None:
        raise CorpusError("no such corpus in the store", where=name, do=f"`crosscal ingest PATH --corpus {name}`.")
    return corpus_of(name, version, record)


def documents(store: Store, shard: Shard, split: str, order: Sequence[int] | None = None) -> Iterator[str]:
    """The texts of one split: all, by digest, or those at the positions in `order`. A conversation's text is what its
    turns say."""
    return map(_text, readings(store, shard, split, TEMPLATE, order))


def readings(
    store: Store, shard: Shard, split: str, chat: str, order: Sequence[int] | None = None
) -> Iterator[str | Conversation]:
    """The same documents; with `chat` "template" conversations as they are, for the model's template to render."""
    if not shard.documents.get(split):
        return iter(())
    found = read_documents(store.path(store.get("corpora", shard.key), f"{split}.arrow"), order)
    return map(_text, found) if chat == PLAIN else found


def _text(document: str | Conversation) -> str:
    return document.plain if isinstance(document, Conversation) else document


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


def record_of(shards: Sequence[Shard], said: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What the store keeps of one version; `said` as well, of what was taken out (see `removing`)."""
    return {
        **{name: value for name, value in said.items() if value},
        "shards": [_shard_record(shard) for shard in shards],
        "digest": digest_of(sorted(shard.key for shard in shards)),
    }


def _shard_record(shard: Shard) -> dict[str, Any]:
    """Without conversations as it was before there were any."""
    return {name: value for name, value in asdict(shard).items() if name != "conversations" or value}
