"""Whether documents can be had from sources: seen from the first records of each file, or once all were read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import islice

from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.readers import READERS
from crosscal.corpora.records import Reject, no_column_reason
from crosscal.corpora.sources import SourceFile, resolve
from crosscal.errors import CorpusError

COLUMNS_SHOWN = 20
FILES_LOOKED_AT = 16
RECORDS_LOOKED_AT = 64


def look_at(source: str, text: str, limits: DocumentLimits = DocumentLimits()) -> CorpusError | None:  # noqa: B008
    """What would be wrong with a source, told by the first records of its first files; hub datasets are not loaded.

    None where a document is found, and where none is found but there may be one further on. Raises `CorpusError` for
    a source that cannot be found.
    """
    files = [file for file in resolve([source]) if isinstance(file, SourceFile) and file.format]
    rejected: Counter[str] = Counter()
    may_be_usable = not 0 < len(files) <= FILES_LOOKED_AT
    for file in files[:FILES_LOOKED_AT]:
        reader = READERS[str(file.format)]
        seen = list(islice(reader(file.path, file.name, text, limits), RECORDS_LOOKED_AT))
        rejects = [candidate for candidate in seen if isinstance(candidate, Reject)]
        columns = {column for reject in rejects for column in reject.columns}
        if columns and len(rejects) == len(seen):
            return nothing_usable(source, Counter([no_column_reason(text)]), columns, text)
        may_be_usable |= len(rejects) < len(seen) or len(seen) == RECORDS_LOOKED_AT
        rejected.update(reject.reason for reject in rejects)
    return None if may_be_usable else nothing_usable(source, rejected, (), text)


def nothing_usable(where: str, rejected: Counter[str], columns: Collection[str], text: str) -> CorpusError:
    if set(rejected) == {no_column_reason(text)}:
        found = ", ".join(sorted(columns)[:COLUMNS_SHOWN]) or "no columns at all"
        return CorpusError(f"no column {text!r}", where=where, got=found, do="Name the text's column with `text`.")
    counts = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
    return CorpusError("no usable document", where=where, got=counts or "empty files", do="Check the files.")
