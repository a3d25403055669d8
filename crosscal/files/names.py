"""The type of a file by its name: a format, then optionally a compression, as in `facts.jsonl.zst`."""

from __future__ import annotations

from pathlib import PurePath

JSON_FORMATS = (".jsonl", ".ndjson", ".json")
FORMATS = (".txt", ".md", *JSON_FORMATS, ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
UNPACKED = (".parquet",)
"""Formats with internal compression, which are not read from a compressed stream."""


def format_of(name: str | PurePath) -> str | None:
    """Return the file's format, one of `FORMATS`, ignoring case; None for a unsupported file type."""
    form, compression = _suffixes(PurePath(name))
    if form.lower() not in FORMATS or (compression and form.lower() in UNPACKED):
        return None
    return form.lower()


def stem_of(name: str | PurePath) -> str:
    """Return the name without folders, format and compression."""
    path = PurePath(name)
    return path.name.removesuffix("".join(_suffixes(path)))


def _suffixes(path: PurePath) -> tuple[str, str]:
    """Return (format, compression), as written; empty strings where there is none."""
    *earlier, last = ("", "", *path.suffixes)
    return (earlier[-1], last) if last.lower() in COMPRESSIONS else (last, "")
