"""Resolve sources named by the user (files, folders, globs, hub datasets) to readable files and hub datasets."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

from crosscal.corpora.saved_folders import ARROW, cached_snapshot, is_saved, is_snapshot, saved_dataset, snapshot_files
from crosscal.errors import CorpusError
from crosscal.files import COMPRESSIONS, FORMATS, format_of, stem_of

_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)([-_.]?\d[\w-]*)?", re.IGNORECASE)
_SPLIT_OF = {"valid": "validation", "val": "validation", "dev": "validation"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_FORMATS = f"{', '.join(FORMATS)}, all but .parquet also with {', '.join(COMPRESSIONS)}"


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str
    """Path relative to the given source; this name is stored. Bytes that are not UTF-8 are escaped."""

    split: str | None
    """The split named by the file, or else by the nearest of its folders, or None."""

    format: str | None
    """One of `FORMATS`, or `ARROW`; None for a unsupported file type."""


@dataclass(frozen=True)
class HubDataset:
    name: str
    config: str | None


def resolve(sources: Sequence[str], revision: str | None = None) -> list[SourceFile | HubDataset]:
    """Return what to read, in a fixed order. `revision` selects the snapshot of a folder of the hub's cache.

    Raises `CorpusError` if there is no source, for a source of no known kind, and for one without a readable file.
    """
    found = [item for source in sources for item in _resolve_one(str(source), revision)]
    if not found:
        raise CorpusError("no source given", do="Name a file, a folder, a glob or a hub dataset.")
    return found


def named_split(name: str) -> str | None:
    """Return the split that a name denotes: `train`, `train-00000-of-00002`, `valid`, `dev`, `test`, … or None."""
    match = _SPLIT_NAME.fullmatch(name)
    word = match[1].lower() if match else None
    return _SPLIT_OF.get(word, word) if word else None


def split_of_file(name: str) -> str | None:
    """Return the split that a file's own name denotes, without format and compression."""
    return named_split(stem_of(name))


def _resolve_one(source: str, revision: str | None) -> list[SourceFile | HubDataset]:
    path = Path(source).expanduser()
    if path.is_file():
        files = [_source_file(path, path.parent)]
    elif path.is_dir():
        path = cached_snapshot(path, revision) or path
        files = [_source_file(file, path, path.name) for file in _walk(path)]
    elif glob.has_magic(source):
        files = [_source_file(file, _fixed_part(path)) for file in _matches(path)]
    elif _HUB_ID.fullmatch(source) and not format_of(source):
        name, _, config = source.partition(":")
        return [HubDataset(name, config or None)]
    else:
        raise CorpusError("no such file, folder or hub dataset", where=source, do="Check the path.")
    if not any(file.format for file in files):
        raise CorpusError(
            "no file that can be read", where=source, got=f"{len(files)} files", do=f"Formats: {_FORMATS}."
        )
    return list(files)


def _walk(top: Path) -> Iterator[Path]:
    """Yield the files below a folder; in folders written by the Hugging Face libraries, only those with data."""
    waiting: list[tuple[Path, Path | None]] = [(top, top if is_snapshot(top) else None)]
    while waiting:
        folder, snapshot = waiting.pop()
        if (saved := saved_dataset(folder)) is not None:
            yield from saved
        elif found := cached_snapshot(folder):
            waiting.append((found, found))
        else:
            children = _children(folder)
            files = (path for path in children if path.is_file())  # neither sockets nor pipes
            yield from files if snapshot is None else snapshot_files(snapshot, files)
            folders = (path for path in children if path.is_dir() and not path.is_symlink())
            waiting += reversed([(path, snapshot) for path in folders])


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise CorpusError("folder cannot be read", where=str(folder), got=str(error.strerror)) from error


def _matches(pattern: Path) -> Iterator[Path]:
    return (path for match in sorted(glob.glob(str(pattern), recursive=True)) if (path := Path(match)).is_file())


def _fixed_part(pattern: Path) -> Path:
    """Return the folder that contains all matches."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parent.parts))


def _source_file(path: Path, folder: Path, folder_name: str = "") -> SourceFile:
    name = PurePosixPath(path.relative_to(folder))
    nearest_first = (stem_of(name), *reversed(name.parts[:-1]), folder_name)
    split = next(filter(None, map(named_split, nearest_first)), None)
    form = ARROW if is_saved(path) else format_of(name)
    return SourceFile(path, os.fsencode(name).decode("utf-8", "backslashreplace"), split, form)
