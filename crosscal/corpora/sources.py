"""From what the user names (a file, folder, glob or hub dataset) to files and data sets that can be read."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from crosscal.corpora.readers import READERS
from crosscal.errors import CorpusError

_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)([-_.]?\d[\w-]*)?", re.IGNORECASE)
_SPLIT_OF = {"valid": "validation", "val": "validation", "dev": "validation"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_FORMATS = f"{', '.join(READERS)} (all but .parquet also with .gz or .zst)"


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str
    """Relative to what was given; this is what gets stored."""

    split: str | None
    """Named by the file or one of its folders, or None."""

    format: str | None
    """A key of `READERS`; None for a file type that is not read."""


@dataclass(frozen=True)
class HubDataset:
    name: str
    config: str | None


def resolve(sources: Sequence[str]) -> list[SourceFile | HubDataset]:
    """What to read, in a fixed order. Raises `CorpusError` for a source that is nothing of the known kinds."""
    found = [item for source in sources for item in _resolve_one(str(source))]
    if not found:
        raise CorpusError("no source given", do="Name a file, a folder, a glob or a hub dataset.")
    return found


def named_split(name: str) -> str | None:
    """The split that a name stands for: `train`, `train-00000-of-00002`, `valid`, `dev`, `test`, … or None."""
    match = _SPLIT_NAME.fullmatch(name)
    word = match[1].lower() if match else None
    return _SPLIT_OF.get(word, word) if word else None


def _resolve_one(source: str) -> list[SourceFile | HubDataset]:
    path = Path(source).expanduser()
    if path.is_file():
        return [_known(_source_file(path, PurePosixPath(path.name)), source)]
    if path.is_dir():
        files = [_source_file(file, PurePosixPath(file.relative_to(path)), path.name) for file in _walk(path)]
        if not any(file.format for file in files):
            raise CorpusError("no readable file in this folder", where=source, do=f"Formats: {_FORMATS}.")
        return list(files)
    if glob.has_magic(source):
        return list(_matches(str(path), source))
    if _HUB_ID.fullmatch(source) and not _format(PurePosixPath(source)):
        name, _, config = source.partition(":")
        return [HubDataset(name, config or None)]
    raise CorpusError("no such file, folder or hub dataset", where=source, do="Check the path.")


def _matches(pattern: str, source: str) -> Iterator[SourceFile]:
    paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if path.is_file()]
    if not files:
        raise CorpusError("the glob matches no file", where=source, do="Check the pattern.")
    fixed = Path(*(part for part in _fixed_parts(pattern)))
    for path in files:
        yield _known(_source_file(path, PurePosixPath(path.relative_to(fixed))), str(path))


def _fixed_parts(pattern: str) -> Iterator[str]:
    for part in Path(pattern).parent.parts:
        if glob.has_magic(part):
            return
        yield part


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():  # neither sockets nor pipes
                yield path


def _source_file(path: Path, name: PurePosixPath, folder: str = "") -> SourceFile:
    stem = name.name[: -len("".join(_suffixes(name)))] if _format(name) else name.stem
    nearest_first = [stem, *reversed(name.parts[:-1]), folder]
    split = next((split for part in nearest_first if (split := named_split(part))), None)
    return SourceFile(path, str(name), split, _format(name))


def _known(file: SourceFile, source: str) -> SourceFile:
    if file.format is None:
        raise CorpusError("not a file type that can be read", where=source, do=f"Formats: {_FORMATS}.")
    return file


def _suffixes(name: PurePosixPath) -> list[str]:
    """The format and, behind it, the compression: [".jsonl", ".zst"]."""
    suffixes = name.suffixes
    return suffixes[-2:] if suffixes and suffixes[-1].lower() in (".gz", ".zst") else suffixes[-1:]


def _format(name: PurePosixPath) -> str | None:
    suffixes = [suffix.lower() for suffix in _suffixes(name)]
    if not suffixes or suffixes[0] not in READERS or (suffixes[0] == ".parquet" and len(suffixes) > 1):
        return None
    return suffixes[0]
