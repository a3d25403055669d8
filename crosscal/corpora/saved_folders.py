"""Folders that the Hugging Face libraries wrote: data sets saved with `save_to_disk`, and the hub's cache.

    name/dataset_dict.json, name/<split>/…           several splits
    name/state.json, name/data-00000-of-00001.arrow  one; state.json names its data files, and no other is one
    datasets--org--name/refs/main                    the revision that `main` stood at
    datasets--org--name/snapshots/<revision>/…       links into datasets--org--name/blobs

What such a folder names must lie in it: a path or a link that leads out of it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from crosscal.errors import CorpusError

ARROW = ".arrow"
"""The format of a saved data set's files. Other Arrow files (caches of what was mapped, above all) are not read."""

STATE = "state.json"
_MOST_BYTES = 2**20
_CACHED = "datasets--"
_NO_DOCUMENTS = {"readme.md", "license.md", "license.txt", "dataset_infos.json", "dataset_info.json"}
"""What stands beside the data in a repository of the hub."""


def saved_dataset(folder: Path) -> list[Path] | None:
    """The data files of a folder that `save_to_disk` wrote, for one split or several; None for any other folder."""
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
    """Whether it is a data file of a saved data set."""
    return file.suffix == ARROW and (file.parent / STATE).is_file()


def cached_snapshot(folder: Path, revision: str | None = None) -> Path | None:
    """The snapshot to read of a data set in the hub's cache, None for any other folder.

    It is that of `revision` (a branch, a tag or a commit), else that of `main`, else the only one.
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
    """Those of the files that hold data; raises `CorpusError` for a link that leads out of the data set's folder."""
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
    """A relative path in the folder, links followed."""
    if isinstance(name, str) and "\0" not in name and not PurePath(name).is_absolute():
        path = folder / name
        if path.resolve().is_relative_to(folder.resolve()) and path != folder:
            return path
    raise CorpusError("a data set's file names a path outside its folder", where=str(folder), got=repr(name)[:200])


def _missing(path: Path) -> CorpusError:
    return CorpusError("a part of a saved data set is missing", where=str(path), do="Save it again.")
