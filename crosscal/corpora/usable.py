"""Check that sources contain usable documents: from the first records of each file, or after reading everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import islice

from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.readers import READERS
from crosscal.corpora.records import TEXT, Document, Reject, no_column_reason
from crosscal.corpora.sources import SourceFile, resolve
from crosscal.errors import CorpusError, NoColumn

COLUMNS_SHOWN = 20
FILES_LOOKED_AT = 16
RECORDS_LOOKED_AT = 64


def look_at(
    source: str,
    text: str,
    limits: DocumentLimits = DocumentLimits(),  # noqa: B008  a frozen value
    revision: str | None = None,
) -> CorpusError | None:
    """Return what is wrong with a source, judged by the first records of its first files; hub datasets are not loaded.

    Return None if a document is found, or might follow further on. A single file without documents in which the text
    column is missing is an error, whatever the other files contain. Raises `CorpusError` for a source that cannot be
    found.
    """
    files = _files(source, revision)
    rejected: Counter[str] = Counter()
    may_be_usable = not 0 < len(files) <= FILES_LOOKED_AT
    for file in files[:FILES_LOOKED_AT]:
        seen = _first_records(file, text, limits)
        rejects = [candidate for candidate in seen if isinstance(candidate, Reject)]
        columns = {column for reject in rejects for column in reject.columns}
        if columns and len(rejects) == len(seen):
            return nothing_usable(source, Counter([no_column_reason(text)]), columns, text)
        may_be_usable |= len(rejects) < len(seen) or len(seen) == RECORDS_LOOKED_AT
        rejected.update(reject.reason for reject in rejects)
    return None if may_be_usable else nothing_usable(source, rejected, (), text)


def holds_conversations(source: str, text: str, revision: str | None = None) -> bool:
    """Return whether any of these first records is a conversation. Raises like `look_at`."""
    files = _files(source, revision)[:FILES_LOOKED_AT]
    seen = (one for file in files for one in _first_records(file, text, DocumentLimits()))
    return any(isinstance(one, Document) and one.is_conversation for one in seen)


def _files(source: str, revision: str | None) -> list[SourceFile]:
    return [file for file in resolve([source], revision) if isinstance(file, SourceFile) and file.format]


def _first_records(file: SourceFile, text: str, limits: DocumentLimits) -> list[Document | Reject]:
    return list(islice(READERS[str(file.format)](file.path, file.name, text, limits), RECORDS_LOOKED_AT))


def nothing_usable(where: str, rejected: Counter[str], columns: Collection[str], text: str) -> CorpusError:
    if set(rejected) == {no_column_reason(text)}:
        found = ", ".join(sorted(columns)[:COLUMNS_SHOWN]) or "no columns at all"
        also = " Chats are found in `messages` or `conversations`, records in `instruction` and `output`."
        do = f"Name the text's column with `text`.{also if text == TEXT else ''}"
        return NoColumn(f"no column {text!r}", where=where, got=found, do=do)
    counts = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
    return CorpusError("no usable document", where=where, got=counts or "empty files", do="Check the files.")
