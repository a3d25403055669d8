"""Removal of documents: the next version of the corpus is one that never contained them.

Each affected shard is replaced by a shard of its other documents, in their current splits. It is the shard that these
documents alone would have formed, so draws from the corpus equal those from a corpus without the removed documents. The
record of the version lists the digests that were removed and the shards that were replaced, so that artifacts derived
from them can be removed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from crosscal.corpora.conversation import Conversation
from crosscal.corpora.corpus import Corpus, Shard, corpus_of, digests, load_corpus, record_of, ref_name
from crosscal.corpora.ingest import shard_key
from crosscal.corpora.shards import read_rows, write_split
from crosscal.store import Store
from crosscal.store.refs import again_on_conflict

SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class FoundDocument:
    """A document of a corpus, as listed by `search` before removal."""

    digest: str
    """SHA-256, hexadecimal."""
    source: str
    """Name of the file it came from."""
    split: str
    shard: str
    begins: str


def search(
    store: Store,
    corpus: Corpus,
    *,
    files: Collection[str] | None = None,
    beginnings: Collection[str] | None = None,
    containing: str | None = None,
) -> Iterator[FoundDocument]:
    """Yield the documents that satisfy all given conditions: the source file's name (without folders) is in `files`,
    the hex digest starts with one of `beginnings`, the stored text (JSON for conversations) contains `containing`."""
    for shard in corpus.shards:
        artifact = store.get("corpora", shard.key)
        for split in shard.documents:
            for text, source, digest, *_ in read_rows(store.path(artifact, f"{split}.arrow")):
                name = digest.hex()
                if (
                    (files is None or PurePosixPath(source).name in files)
                    and (beginnings is None or name.startswith(tuple(beginnings)))
                    and (containing is None or containing in text)
                ):
                    yield FoundDocument(name, source, split, shard.key, _beginning(text))


def _beginning(text: str) -> str:
    return " ".join(text[: 4 * SHOWN_CHARACTERS].split())[:SHOWN_CHARACTERS]


def take_out(store: Store, name: str, unwanted: Collection[str]) -> Corpus:
    """Append a version of the corpus without the documents with these hex digests; landings do not add them again."""
    return again_on_conflict(lambda: _take_out(store, name, frozenset(map(bytes.fromhex, unwanted))))


def _take_out(store: Store, name: str, unwanted: frozenset[bytes]) -> Corpus:
    version, record = store.refs.read(ref_name(name))
    earlier = load_corpus(store, name, version)
    assert record is not None
    without = {shard.key: _without(store, shard, unwanted) for shard in earlier.shards}
    shards = [kept for shard in earlier.shards if (kept := without[shard.key]) is not None]
    replaced = [key for key, kept in without.items() if kept is None or kept.key != key]
    said = {
        "removed": sorted({*record.get("removed", ()), *(digest.hex() for digest in unwanted)}),
        "replaced": [*record.get("replaced", ()), *replaced],
    }
    record = record_of(shards, said)
    return corpus_of(name, store.refs.append(ref_name(name), version, record), record)


def _without(store: Store, shard: Shard, unwanted: frozenset[bytes]) -> Shard | None:
    """Return a shard of the other documents: the same if none is unwanted, None if no documents are left."""
    held = digests(store, shard)
    if not held.keys() & unwanted:
        return shard
    artifact, rows = store.get("corpora", shard.key), {}
    for split in shard.documents:
        found = read_rows(store.path(artifact, f"{split}.arrow"))
        rows[split] = [row for row in found if row[2] not in unwanted]
    rows = {split: kept for split, kept in rows.items() if kept}
    if not rows:
        return None
    texts = {split: [_text(row) for row in kept] for split, kept in rows.items()}
    chats = {split: sum(not isinstance(text, str) for text in found) for split, found in texts.items()}
    new = Shard(
        key=shard_key({split: [row[2] for row in kept] for split, kept in rows.items()}),
        documents={split: len(kept) for split, kept in rows.items()},
        characters={split: sum(map(_characters, found)) for split, found in texts.items()},
        conversations={split: count for split, count in chats.items() if count},
    )
    with store.publish("corpora", new.key, {"documents": new.documents, "characters": new.characters}) as folder:
        for split, kept in rows.items():
            write_split(folder / f"{split}.arrow", kept, conversations=split in new.conversations)
    return new


def _text(row: tuple[str, str, bytes, bool]) -> str | Conversation:
    return Conversation.of_stored(row[0]) if row[3] else row[0]


def _characters(document: str | Conversation) -> int:
    return document.characters if isinstance(document, Conversation) else len(document)
