"""Run directories on disk: detection, size, and which of them are no longer needed.

A folder is a run directory of crosscal if it contains the two files that every run writes first. Nothing else in the
folder of runs is ever touched, nor is a link.
"""

from __future__ import annotations

import json
import shutil
import stat
import time
from collections.abc import Iterator, Set
from contextlib import suppress
from pathlib import Path

DAY_SECONDS = 86400
IDENTITY, PLAN = "identity.json", "plan.yaml"


def is_run_folder(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir() or not (folder / PLAN).is_file():
        return False
    try:
        return "identity" in json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def bytes_of(folder: Path) -> int:
    return sum(size for _, size in _files(folder))


def old_runs(runs: Path, named: Set[Path], days: float) -> Iterator[Path]:
    """Yield run directories, except `named`, in which nothing was written for `days` days. An active run writes."""
    before = time.time() - days * DAY_SECONDS
    for folder in sorted(runs.iterdir()) if runs.is_dir() else ():
        if is_run_folder(folder) and folder.resolve() not in named and last_written(folder) < before:
            yield folder


def last_written(folder: Path) -> float:
    """Return the newest modification time of anything in the folder, in seconds since 1970; 0 if it is empty."""
    return max((at for at, _ in _files(folder)), default=0.0)


def remove_run(folder: Path) -> None:
    """Remove a run directory. It is renamed first, so that a half-removed one is never seen under its name."""
    aside = folder.with_name(f".{folder.name}.removed")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _files(folder: Path) -> Iterator[tuple[float, int]]:
    """Yield (modification time, bytes) of everything in a folder. Links are not followed."""
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            found = path.lstat()
            yield found.st_mtime, found.st_size if stat.S_ISREG(found.st_mode) else 0
