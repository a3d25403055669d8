"""What a store asks of the place it lives in, and how a disk that will not take files is told.

Both homes, a folder (`local_home`) and an fsspec URL (`remote_home`), offer the same few moves. What differs is how an
artifact appears all at once: locally by a rename, remotely by writing its manifest last, which is why an artifact
exists only with its manifest.
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
    """Places are paths relative to the home, with forward slashes."""

    keeps_times: bool
    """Whether it knows when an artifact was last used."""

    def staging(self) -> Path:
        """A fresh local folder to write an artifact's files into."""
        ...

    def publish(self, staged: Path, place: str) -> bool:
        """Make a finished folder, manifest included, appear at `place`; False when one is there already."""
        ...

    def create(self, place: str, content: bytes) -> bool:
        """Write a new small file whole; False when it exists."""
        ...

    def read(self, place: str) -> bytes | None: ...

    def local(self, place: str, name: str, sha256: str) -> Path | None:
        """A local path to one file of an artifact, its digest not checked."""
        ...

    def forget(self, path: Path) -> bool:
        """Drop a copy that `local` made and that is damaged; False when the path was the original."""
        ...

    def digest(self, place: str, name: str, sha256: str) -> str | None:
        """SHA-256 of what really stands in the home."""
        ...

    def names(self, place: str) -> list[str]: ...

    def move(self, place: str, target: str) -> None: ...

    def remove(self, place: str) -> None:
        """Remove an artifact or leftover at once: it never looks complete while it is being removed."""
        ...

    def use(self, place: str) -> None:
        """Note that an artifact was used now."""
        ...

    def unused_since(self, place: str) -> float:
        """Time of last use, in seconds since 1970."""
        ...

    def in_use_since(self) -> float:
        """When the first of the other processes that now use this home began to; infinite when there are none."""
        ...

    def leftovers(self) -> Iterable[str]:
        """Places that processes left behind which are gone."""
        ...


@contextmanager
def disk_errors(location: str) -> Iterator[None]:
    """Say a full disk, or a home that may not be written, plainly. Errors about other files pass unchanged."""
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
