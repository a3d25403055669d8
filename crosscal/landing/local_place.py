"""A landing place in a local folder. Links are followed only inside it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from crosscal.errors import UsageError
from crosscal.landing.items import LandedFile, LandingItem

CHUNK_BYTES = 2**20


class LocalPlace:
    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        if not self.root.is_dir():
            raise UsageError(
                "the landing place is no folder", where=str(root), do="Make it, with a folder for each domain."
            )

    def items(self, folder: str = "") -> Iterator[LandingItem]:
        try:
            with os.scandir(self.root / folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield LandingItem("", problem=f"the folder cannot be read: {error.strerror}")
            return
        for entry in found:
            item = self._item(entry)
            if item is not None:
                yield item

    def read(self, path: str, most_bytes: int) -> bytes:
        with _opened(self._inside(self.root / path)) as stream:
            return stream.read(most_bytes)

    def fetch(self, file: LandedFile, to: Path) -> str | None:
        """Hashes the bytes as they are copied, so that a concurrent writer cannot change what is used afterwards."""
        with _opened(self._inside(self.root / file.domain / file.name)) as stream, to.open("wb") as copy:
            digest = copy_hashed(stream, copy, file.bytes)
            after = os.fstat(stream.fileno())
        same = (after.st_size, after.st_mtime) == (file.bytes, file.modified)
        return digest if same else None

    def _item(self, entry: os.DirEntry[str]) -> LandingItem | None:
        try:
            found = self._inside(Path(entry.path)).stat() if entry.is_symlink() else entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return (
                LandingItem(entry.name, problem="a link to nothing") if entry.is_symlink() else None
            )  # removed meanwhile
        except PermissionError as error:
            return LandingItem(entry.name, problem=str(error.strerror))
        except (OSError, RuntimeError) as error:  # RuntimeError: circular links
            return LandingItem(entry.name, problem=str(error))
        if stat.S_ISDIR(found.st_mode):
            return LandingItem(entry.name, is_folder=True)
        if not stat.S_ISREG(found.st_mode):
            return LandingItem(entry.name, problem="neither a file nor a folder")
        return LandingItem(entry.name, bytes=found.st_size, modified=found.st_mtime)

    def _inside(self, path: Path) -> Path:
        real = path.resolve(strict=True)
        if not real.is_relative_to(self.root):
            raise OSError("a link that leads out of the landing place")
        return real


def copy_hashed(stream: BinaryIO, copy: BinaryIO, most_bytes: int) -> str | None:
    """Copy a stream of exactly `most_bytes` bytes; return its SHA-256, or None if it has more or fewer."""
    digest, left = hashlib.sha256(), most_bytes
    while chunk := stream.read(min(CHUNK_BYTES, left + 1)):
        left -= len(chunk)
        if left < 0:
            return None
        digest.update(chunk)
        copy.write(chunk)
    return None if left else digest.hexdigest()


def _opened(path: Path) -> BinaryIO:
    """Open a regular file, without following a link created meanwhile and without blocking on a pipe."""
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError("not a file")
    return stream
