"""From what the user names (a file, folder, glob or hub dataset) to files and data sets that can be read."""

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
    """Relative to what was given; this is what gets stored. Bytes that are not UTF-8 are escaped."""

    split: str | None
    """Named by the file or the nearest of its folders, or None."""

    format: str | None
    """One of `FORMATS`, or `ARROW`; None for a file type that is not read."""


@dataclass(frozen=True)
class HubDataset:
    name: str
    config: str | None


def resolve(sources: Sequence[str], revision: str | None = None) -> list[SourceFile | HubDataset]:
    """What to read, in a fixed order; `revision` of a data set in the hub's cache, where it is given as a folder.

    Raises `CorpusError` for a source that is nothing of the known kinds.
    """
    found = [item for source in sources for item in _resolve_one(str(source), revision)]
    if not found:
        raise CorpusError("no source given", do="Name a file, a folder, a glob or a hub dataset.")
    return found


def named_split(name: str) -> str | None:
    """The split that a name stands for: `train`, `train-00000-of-00002`, `valid`, `dev`, `test`, … or None."""
    match = _SPLIT_NAME.fullmatch(name)
    word = match[1].lower() if match else None
    return _SPLIT_OF.get(word, word) if word else None


def split_of_file(name: str) -> str | None:
    """The split that a file stands for by its own name, without format and compression."""
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
    """The files below a folder; of folders that the Hugging Face libraries wrote, those that hold data."""
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
    """The folder that all matches share."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parent.parts))


def _source_file(path: Path, folder: Path, folder_name: str = "") -> SourceFile:
    name = PurePosixPath(path.relative_to(folder))
    nearest_first = (stem_of(name), *reversed(name.parts[:-1]), folder_name)
    split = next(filter(None, map(named_split, nearest_first)), None)
    form = ARROW if is_saved(path) else format_of(name)
    return SourceFile(path, os.fsencode(name).decode("utf-8", "backslashreplace"), split, form)
