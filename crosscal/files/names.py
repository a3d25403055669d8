"""The type of a file by its name: a format, then optionally a compression, as in `facts.jsonl.zst`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

JSON_FORMATS = (".jsonl", ".ndjson", ".json")
FORMATS = (".txt", ".md", *JSON_FORMATS, ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
UNPACKED = (".parquet",)
"""Formats with internal compression, which are not read from a compressed stream."""


def format_of(name: str | PurePath) -> str | None:
    """Return the file's format, one of `FORMATS`, ignoring case; None for an unsupported file type."""
    form, compression = _suffixes(PurePath(name))
    if form.lower() not in FORMATS or (compression and form.lower() in UNPACKED):
        return None
    return form.lower()


def stem_of(name: str | PurePath) -> str:
    """Return the name without folders, format and compression."""
    path = PurePath(name)
    return path.name.removesuffix("".join(_suffixes(path)))


def distinct_stems(names: Sequence[str]) -> list[str]:
    """Return a name for each file: its stem, with the parent folder in front if two files share a stem."""
    stems = [stem_of(name) for name in names]
    return [
        stem if stems.count(stem) == 1 else f"{Path(name).resolve().parent.name}_{stem}"
        for name, stem in zip(names, stems, strict=True)
    ]


def _suffixes(path: PurePath) -> tuple[str, str]:
    """Return (format, compression), as written; empty strings where there is none."""
    *earlier, last = ("", "", *path.suffixes)
    return (earlier[-1], last) if last.lower() in COMPRESSIONS else (last, "")
