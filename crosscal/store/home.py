"""The interface between a store and its home, and translation of disk errors.

Both homes, a folder (`local_home`) and an fsspec URL (`remote_home`), offer the same operations. They differ in how an
artifact becomes visible atomically: locally by a rename, remotely by writing its manifest last. An artifact therefore
exists only if its manifest does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from crosscal.errors import StoreError, StoreFull

MANIFEST = "manifest.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class Home(Protocol):
    """Storage of a store. A place is a path relative to the home, with forward slashes."""

    keeps_times: bool
    """Whether it records when an artifact was last used."""

    @property
    def location(self) -> str:
        """Absolute path or URL."""
        ...

    def staging(self) -> Path:
        """Create a local folder to write an artifact's files into."""
        ...

    def publish(self, staged: Path, place: str) -> bool:
        """Make a finished folder, manifest included, appear at `place`; return False if an artifact exists there."""
        ...

    def create(self, place: str, content: bytes) -> bool:
        """Write a new small file atomically; return False if it exists."""
        ...

    def read(self, place: str) -> bytes | None:
        """Return a file's bytes, or None if it does not exist."""
        ...

    def local(self, place: str, name: str, sha256: str) -> Path | None:
        """Return a local path to one file of an artifact, its digest not checked; None if the file is missing."""
        ...

    def forget(self, path: Path) -> bool:
        """Delete a damaged copy that `local` made; return False if the path is the original."""
        ...

    def digest(self, place: str, name: str, sha256: str) -> str | None:
        """Return the SHA-256 of the bytes that the home stores, or None if the file is missing."""
        ...

    def names(self, place: str) -> list[str]:
        """Return the sorted names in a folder; empty if it does not exist."""
        ...

    def touch(self, place: str, *, is_first: bool = False) -> None:
        """Create a small file or update its modification time; `is_first` also creates its folder."""
        ...

    def times(self, place: str) -> dict[str, float]:
        """Return name → modification time, by the home's own clock, of the files in a folder."""
        ...

    def stamps(self, place: str) -> dict[str, str]:
        """Return path below `place` → stamp of each file: the home's own checksum, which changes with the bytes, or
        `time` and the modification time; then the size."""
        ...

    def move(self, place: str, target: str) -> None: ...

    def remove(self, place: str) -> None:
        """Remove an artifact or leftover. It never looks complete while it is being removed."""
        ...

    def use(self, place: str) -> None:
        """Record that an artifact was used now."""
        ...

    def unused_since(self, place: str) -> float:
        """Return the time of last use, in seconds since 1970."""
        ...

    def in_use_since(self) -> float:
        """Return when the first of the other active processes started; infinity if there are none, 0 if unknown."""
        ...

    def leftovers(self) -> Iterable[str]:
        """Return the places that processes which are gone left behind."""
        ...


@contextmanager
def disk_errors(location: str) -> Iterator[None]:
    """Raise `StoreFull` for a full disk and `StoreError` for an unwritable home. Other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(
                "the disk is full, nothing was stored",
                where=location,
                do="Free space (`crosscal store gc`) or move CROSSCAL_HOME, then run again: finished parts are kept.",
            ) from error
        if error.errno in _FORBIDDEN and str(error.filename).startswith(location):
            raise StoreError(
                "the store cannot be written",
                where=location,
                got=os.strerror(error.errno),
                do="Choose another CROSSCAL_HOME.",
            ) from error
        raise
