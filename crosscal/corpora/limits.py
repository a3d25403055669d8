"""Limits on documents and on how much of a file is read."""

from __future__ import annotations

from dataclasses import dataclass, fields

from crosscal.errors import UsageError
from crosscal.files.lines import MOST_LINE_BYTES
from crosscal.files.streams import MOST_FILE_BYTES


@dataclass(frozen=True)
class DocumentLimits:
    """Limits on external input. Input beyond them is rejected and counted, never truncated silently."""

    min_characters: int = 20
    """Shorter documents (after stripping white space) are rejected."""

    max_characters: int = 5_000_000
    """Longer documents are rejected."""

    text_file_characters: int = 20_000
    """A plain text file longer than this is cut at blank lines into documents of about this size."""

    max_line_bytes: int = MOST_LINE_BYTES
    """Longer lines (or CSV or JSON records) are rejected without being held in memory."""

    max_file_bytes: int = MOST_FILE_BYTES
    """Reading of one file stops after this many decompressed bytes."""

    max_rejects_kept: int = 100_000
    """Number of rejects that are written out; further ones are only counted."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise UsageError("a limit is a whole number of at least 1", where=field.name, got=repr(value))
