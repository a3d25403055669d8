"""Folders written by the Hugging Face libraries: data sets saved with `save_to_disk`, and the hub's cache.

    name/dataset_dict.json, name/<split>/…           several splits
    name/state.json, name/data-00000-of-00001.arrow  one split; only the files listed in state.json are data files
    datasets--org--name/refs/main                    the revision that `main` pointed to
    datasets--org--name/snapshots/<revision>/…       links into datasets--org--name/blobs

All paths and links in such a folder must stay inside it; one that points outside is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from crosscal.errors import CorpusError

ARROW = ".arrow"
"""The format of a saved data set's files. Other Arrow files (mostly caches of `map` results) are not read."""

STATE = "state.json"
_MOST_BYTES = 2**20
_CACHED = "datasets--"
_NO_DOCUMENTS = {"readme.md", "license.md", "license.txt", "dataset_infos.json", "dataset_info.json"}
"""Files of a hub repository that contain no documents."""


def saved_dataset(folder: Path) -> list[Path] | None:
    """Return the data files of a folder written by `save_to_disk` (one or several splits); None for any other folder.

    Raises `CorpusError` for missing files, unreadable metadata, and paths that point outside the folder.
    """
    if (folder / "dataset_dict.json").is_file():
        return [file for name in _listed(folder / "dataset_dict.json", "splits") for file in _split(folder, name)]
    if not ((folder / STATE).is_file() and (folder / "dataset_info.json").is_file()):
        return None
    named = _listed(folder / STATE, "_data_files")
    files = [_inside(folder, each.get("filename") if isinstance(each, dict) else each) for each in named]
    for file in files:
        if not file.is_file():
            raise _missing(file)
    return files


def is_saved(file: Path) -> bool:
    """Return whether the file is a data file of a saved data set."""
    return file.suffix == ARROW and (file.parent / STATE).is_file()


def cached_snapshot(folder: Path, revision: str | None = None) -> Path | None:
    """Return the snapshot folder of a data set in the hub's cache; None for any other folder.

    It is that of `revision` (a branch, a tag or a commit) if given, else that of `main`, else the only one. Raises
    `CorpusError` if the cache has no such snapshot.
    """
    snapshots = folder / "snapshots"
    if not (folder.absolute().name.startswith(_CACHED) and snapshots.is_dir()):
        return None
    named = revision or "main"
    ref = _inside(folder, f"refs/{named}")
    commit = ref.read_text(encoding="utf-8", errors="replace").strip() if ref.is_file() else named
    there = sorted(each.name for each in snapshots.iterdir() if each.is_dir())
    if commit not in there and (revision or len(there) != 1):
        raise CorpusError(
            "the cache holds no snapshot of this revision" if there else "the cache holds no snapshot of this data set",
            where=str(folder),
            got=f"{named}; there are {', '.join(there)}" if there else named,
            do="Name one with `revision`, or as `…/snapshots/<commit>`.",
        )
    return snapshots / (commit if commit in there else there[0])


def is_snapshot(folder: Path) -> bool:
    whole = folder.absolute()
    return whole.parent.name == "snapshots" and whole.parents[1].name.startswith(_CACHED)


def snapshot_files(snapshot: Path, files: Iterator[Path]) -> Iterator[Path]:
    """Yield the files that contain data. Raises `CorpusError` for a link that points outside the data set's folder."""
    home = snapshot.absolute().parents[1].resolve()
    for file in files:
        if file.name.lower() in _NO_DOCUMENTS:
            continue
        if not file.resolve().is_relative_to(home):
            raise CorpusError("a link leads out of the cached data set", where=str(file), do="Remove it.")
        yield file


def _split(folder: Path, name: object) -> list[Path]:
    files = saved_dataset(inside := _inside(folder, name))
    if files is None:
        raise _missing(inside)
    return files


def _listed(path: Path, name: str) -> list[Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too long")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError("a saved data set's file cannot be read", where=str(path), got=str(error)) from error
    listed = value.get(name) if isinstance(value, dict) else None
    return listed if isinstance(listed, list) else []


def _inside(folder: Path, name: object) -> Path:
    """Return the path `folder / name`. Raises `CorpusError` if it is outside the folder once links are resolved."""
    if isinstance(name, str) and "\0" not in name and not PurePath(name).is_absolute():
        path = folder / name
        if path.resolve().is_relative_to(folder.resolve()) and path != folder:
            return path
    raise CorpusError("a data set's file names a path outside its folder", where=str(folder), got=repr(name)[:200])


def _missing(path: Path) -> CorpusError:
    return CorpusError("a part of a saved data set is missing", where=str(path), do="Save it again.")
