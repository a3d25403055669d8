"""Ingest: read documents from files or the hub and append them as a new version of a corpus."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crosscal.corpora.corpus import Corpus, Shard, corpus_of, digests, record_of, ref_name
from crosscal.corpora.hub import read_hub
from crosscal.corpora.known import known_splits
from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.readers import READERS
from crosscal.corpora.records import Document, Reject
from crosscal.corpora.shards import write_split
from crosscal.corpora.sources import HubDataset, SourceFile, resolve
from crosscal.corpora.splits import SPLITS, assign
from crosscal.corpora.spool import Spool
from crosscal.corpora.usable import nothing_usable
from crosscal.errors import UsageError
from crosscal.progress import Report
from crosscal.store import Store, digest_file, digest_of
from crosscal.store.refs import again_on_conflict

PROGRESS_DOCUMENTS = 1000
ATTEMPTS = 10


@dataclass(frozen=True)
class IngestReport:
    """The resulting version of the corpus, and counts of the documents that were read."""

    corpus: Corpus
    added_documents: int
    duplicates: int
    """Documents not added because they were repeated in the sources or already in the corpus (or removed from it)."""

    rejected: dict[str, int]
    """Reason → number of rejected lines, rows or files."""

    rejects_key: str | None
    """Artifact of kind "rejects" whose `rejects.jsonl` lists them individually; None if there are none."""

    changed: bool

    forms: dict[str, int]
    """Columns of the documents, e.g. `text`, `messages` or `instruction, output` → number of documents."""


def ingest(
    store: Store,
    name: str,
    sources: Sequence[str],
    *,
    text: str = "text",
    revision: str | None = None,
    split: str | None = None,
    replace: bool = False,
    with_removed: bool = True,
    limits: DocumentLimits = DocumentLimits(),  # noqa: B008  a frozen value
    progress: Report | None = None,
) -> IngestReport:
    """Read files, folders, globs or hub datasets into the corpus `name`.

    `text` names the column of the document (a text or a conversation); by default the form is detected from the columns
    (see `crosscal.corpora.forms`). `split` assigns every document to that split. Otherwise documents of files, folders
    and hub splits called validation or test keep that split, and the rest is divided (see `splits.assign`). A document
    already in the corpus keeps its split. Ingesting only known documents changes nothing; new documents form a new
    shard. With `replace` the corpus becomes exactly these documents: by adding a shard if they include all earlier
    ones, otherwise with a new list of shards. Documents removed from the corpus are added again, unless `with_removed`
    is false: then they count as duplicates. `progress` is called with (source, documents, None), and at the end with
    ("read", documents, documents).

    Raises `CorpusError` if a source cannot be found or has no usable document, and `UsageError` for an invalid name
    or split.
    """
    ref_name(name)
    if split not in (None, *SPLITS):
        raise UsageError("not a split", got=repr(split), do=f"Use one of {', '.join(SPLITS)}.")
    found = resolve(sources, revision)
    with (
        tempfile.TemporaryDirectory(prefix="crosscal-ingest-") as folder,
        Spool(Path(folder), limits) as spool,
    ):
        for named, candidate in _candidates(found, text, revision, limits, progress):
            if isinstance(candidate, Document):
                spool.add(candidate, split or named)
            else:
                spool.reject(candidate)
        spool.finish()
        rejects_key = _publish_rejects(store, name, spool)
        if not spool.entries:
            raise nothing_usable(", ".join(map(str, sources)), spool.rejected, spool.columns_found, text)
        corpus, added, changed = _land(store, name, spool, replace, forced=split is not None, with_removed=with_removed)
        duplicates = spool.duplicates + len(spool.entries) - added
        return IngestReport(corpus, added, duplicates, dict(spool.rejected), rejects_key, changed, dict(spool.forms))


def _candidates(
    found: Sequence[SourceFile | HubDataset],
    text: str,
    revision: str | None,
    limits: DocumentLimits,
    progress: Report | None,
) -> Iterator[tuple[str | None, Document | Reject]]:
    count = 0
    for source in found:
        if isinstance(source, HubDataset):
            rows = read_hub(source, text, revision, limits)
        elif source.format is None:
            rows = iter([(None, Reject(source.name, 0, "unsupported file type"))])
        else:
            reader = READERS[source.format]
            rows = ((source.split, row) for row in reader(source.path, source.name, text, limits))
        for row in rows:
            yield row
            count += 1
            if progress and count % PROGRESS_DOCUMENTS == 0:
                progress(source.name, count, None)
    if progress:
        progress("read", count, count)


def _land(
    store: Store, name: str, spool: Spool, replace: bool, *, forced: bool, with_removed: bool
) -> tuple[Corpus, int, bool]:
    """Add new documents; if another process changed the corpus meanwhile, read it again and retry."""
    return again_on_conflict(lambda: _land_once(store, name, spool, replace, forced, with_removed), attempts=ATTEMPTS)


def _land_once(
    store: Store, name: str, spool: Spool, replace: bool, forced: bool, with_removed: bool
) -> tuple[Corpus, int, bool]:
    version, record = store.refs.read(ref_name(name))
    removed = set(record.get("removed", ()) if record else ())
    earlier = corpus_of(name, version, record).shards if record else ()
    if replace:  # all documents are available: ignore shards set aside as damaged, so that they are rebuilt
        earlier = tuple(shard for shard in earlier if store.find("corpora", shard.key))
    if replace:
        known = {digest: split for shard in earlier for digest, split in digests(store, shard).items()}
    else:
        known = known_splits(store, earlier, spool.entries)
    fresh = {digest: entry.split for digest, entry in spool.entries.items() if digest not in known}
    if not with_removed:
        fresh = {digest: split for digest, split in fresh.items() if digest.hex() not in removed}
    staying: dict[bytes, str] = {}
    if replace and not known.keys() <= spool.entries.keys():
        earlier = ()
        staying = {digest: known[digest] for digest in spool.entries if digest in known}
    elif not fresh and record:
        return corpus_of(name, version, record), 0, False
    counts = Counter(staying.values())
    for shard in earlier:
        counts.update(shard.documents)
    splits = {digest: split or "train" for digest, split in fresh.items()} if forced else assign(fresh, counts)
    splits |= staying
    shards = (*earlier, _publish_shard(store, spool, splits))
    left_out = sorted(removed - {digest.hex() for digest in fresh})
    record = record_of(shards, {"removed": left_out, "replaced": record.get("replaced")} if record else {})
    version = store.refs.append(ref_name(name), version, record)
    return corpus_of(name, version, record), len(fresh), True


def _publish_shard(store: Store, spool: Spool, splits: Mapping[bytes, str]) -> Shard:
    ordered = sorted(splits)
    members = {split: [digest for digest in ordered if splits[digest] == split] for split in SPLITS}
    members = {split: chosen for split, chosen in members.items() if chosen}
    shard = Shard(
        key=shard_key(members),
        documents={split: len(chosen) for split, chosen in members.items()},
        characters={split: sum(spool.entries[d].characters for d in chosen) for split, chosen in members.items()},
        conversations={split: count for split, chosen in members.items() if (count := _conversations(spool, chosen))},
    )
    with store.publish("corpora", shard.key, {"documents": shard.documents, "characters": shard.characters}) as folder:
        for split, chosen in members.items():
            entries = ((digest, spool.entries[digest]) for digest in chosen)
            rows = ((spool.text(digest), entry.source, digest, entry.is_conversation) for digest, entry in entries)
            write_split(folder / f"{split}.arrow", rows, conversations=split in shard.conversations)
    return shard


def shard_key(members: Mapping[str, Sequence[bytes]]) -> str:
    """Return the key of a shard with these digests: split → digests in ascending order."""
    return digest_of({split: [digest.hex() for digest in chosen] for split, chosen in members.items()})


def _conversations(spool: Spool, digests: Sequence[bytes]) -> int:
    return sum(spool.entries[digest].is_conversation for digest in digests)


def _publish_rejects(store: Store, name: str, spool: Spool) -> str | None:
    if not spool.rejected:
        return None
    key = digest_file(spool.rejects_path)
    with store.publish("rejects", key, {"corpus": name, "rejected": dict(spool.rejected)}) as folder:
        (folder / "rejects.jsonl").write_bytes(spool.rejects_path.read_bytes())
    return key
