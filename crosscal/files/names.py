"""What a file is, by its name: a format and, behind it, a compression, as in `facts.jsonl.zst`."""

from __future__ import annotations

from pathlib import PurePath

JSON_FORMATS = (".jsonl", ".ndjson", ".json")
FORMATS = (".txt", ".md", *JSON_FORMATS, ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
UNPACKED = (".parquet",)
"""Formats that are compressed inside, and not read from a compressed stream."""


def format_of(name: str | PurePath) -> str | None:
    """One of `FORMATS`, in whatever case it is written; None for a file type that is not read."""
    form, compression = _suffixes(PurePath(name))
    if form.lower() not in FORMATS or (compression and form.lower() in UNPACKED):
        return None
    return form.lower()


def stem_of(name: str | PurePath) -> str:
    """The name without folders, format and compression."""
    path = PurePath(name)
    return path.name.removesuffix("".join(_suffixes(path)))


def _suffixes(path: PurePath) -> tuple[str, str]:
    """(format, compression), as they are written; empty where there is none."""
    *earlier, last = ("", "", *path.suffixes)
    return (earlier[-1], last) if last.lower() in COMPRESSIONS else (last, "")
