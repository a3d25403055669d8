"""The documents of one ingest while it runs: texts on disk, one small entry each in memory."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.records import COLUMNS_KEPT, Document, Reject
from crosscal.corpora.splits import preferred


class SpoolEntry(NamedTuple):
    offset: int
    bytes: int
    characters: int
    source: str
    split: str | None
    is_conversation: bool = False


class Spool:
    """Collects documents and rejects; stores each text once, under its digest."""

    def __init__(self, folder: Path, limits: DocumentLimits) -> None:
        self.entries: dict[bytes, SpoolEntry] = {}
        self.duplicates = 0
        self.rejected: Counter[str] = Counter()
        self.columns_found: set[str] = set()
        self.forms: Counter[str] = Counter()
        """Columns that documents were read from → number of documents, duplicates included."""
        self.rejects_path = folder / "rejects.jsonl"
        self._limits = limits
        self._rejects_kept = 0
        self._texts = (folder / "texts").open("w+b")
        self._rejects = self.rejects_path.open("w", encoding="utf-8")

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:  # close both, even if flushing one of them fails
            self._texts.close()
        finally:
            self._rejects.close()

    def add(self, document: Document, split: str | None) -> None:
        self.forms[document.form] += 1
        entry = self.entries.get(document.digest)
        if entry:
            self.duplicates += 1
            self.entries[document.digest] = entry._replace(split=preferred(entry.split, split))
            return
        encoded = document.text.encode("utf-8")
        offset = self._texts.tell()
        self._texts.write(encoded)
        self.entries[document.digest] = SpoolEntry(
            offset, len(encoded), document.characters, document.source, split, document.is_conversation
        )

    def reject(self, reject: Reject) -> None:
        if self._rejects_kept < self._limits.max_rejects_kept:
            self._rejects_kept += 1
            row = {
                key: value for key, value in asdict(reject).items() if value != () and (key, value) != ("records", 1)
            }
            self._rejects.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rejected[reject.reason] += reject.records
        if len(self.columns_found) < COLUMNS_KEPT:
            self.columns_found.update(reject.columns)

    def finish(self) -> None:
        """End writing; `text` may be called from here on."""
        self._rejects.close()
        self._texts.flush()

    def text(self, digest: bytes) -> str:
        entry = self.entries[digest]
        self._texts.seek(entry.offset)
        return self._texts.read(entry.bytes).decode("utf-8")
