"""A store in a folder of a local or shared POSIX disk."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from crosscal.store.home import MANIFEST, disk_errors
from crosscal.store.keys import digest_file
from crosscal.store.processes import is_gone, this_process

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalHome:
    """Folders appear and vanish by a rename, so that every file seen is a file that is whole."""

    keeps_times = True

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def staging(self) -> Path:
        """A folder on the same disk, named after the process that fills it."""
        folder = self.root / "staging" / f"{this_process()}-{secrets.token_hex(6)}"
        with disk_errors(str(self.root)):
            folder.mkdir(parents=True)
        return folder

    def publish(self, staged: Path, place: str) -> bool:
        target = self.root / place
        with disk_errors(str(self.root)):
            for file in staged.iterdir():
                _sync(file)
            _sync(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            while not _renamed(staged, target):
                if (target / MANIFEST).exists():
                    return False
                self.remove(place)  # a folder without a manifest is nothing, and must not stand in the way
            _sync(target.parent)
        return True

    def create(self, place: str, content: bytes) -> bool:
        target = self.root / place
        aside = self.staging() / target.name
        try:
            with disk_errors(str(self.root)):
                target.parent.mkdir(parents=True, exist_ok=True)
                aside.write_bytes(content)
                _sync(aside)
                if not _linked(aside, target):
                    return False
                _sync(target.parent)
        finally:
            shutil.rmtree(aside.parent, ignore_errors=True)
        return True

    def read(self, place: str) -> bytes | None:
        try:
            return (self.root / place).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def local(self, place: str, name: str, sha256: str) -> Path | None:
        path = self.root / place / name
        return path if path.is_file() else None

    def forget(self, path: Path) -> bool:
        return False

    def digest(self, place: str, name: str, sha256: str) -> str | None:
        path = self.local(place, name, sha256)
        return digest_file(path) if path else None

    def names(self, place: str) -> list[str]:
        folder = self.root / place
        return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []

    def move(self, place: str, target: str) -> None:
        with disk_errors(str(self.root)), contextlib.suppress(FileNotFoundError):  # somebody else moved it
            (self.root / target).parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.root / place, self.root / target)

    def remove(self, place: str) -> None:
        aside = self.staging()
        self.move(place, f"staging/{aside.name}/removed")
        shutil.rmtree(aside, ignore_errors=True)

    def use(self, place: str) -> None:
        """The manifest's time is that of last use. A store that may only be read can be used, it just forgets when."""
        mark = self.root / "users" / this_process()
        with contextlib.suppress(OSError):
            if not mark.exists():
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
            os.utime(self.root / place / MANIFEST)

    def unused_since(self, place: str) -> float:
        return (self.root / place / MANIFEST).stat().st_mtime

    def in_use_since(self) -> float:
        others = [name for name in self.names("users") if name != this_process()]
        began = {name: (self.root / "users" / name).stat().st_mtime for name in others}
        return min((at for name, at in began.items() if not is_gone(name, time.time() - at)), default=math.inf)

    def leftovers(self) -> Iterator[str]:
        for name in self.names("staging"):
            folder = self.root / "staging" / name
            with contextlib.suppress(FileNotFoundError):  # it was published meanwhile
                written = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
                if is_gone(name.rpartition("-")[0], time.time() - written):
                    yield f"staging/{name}"
        for name in self.names("users"):
            if is_gone(name, time.time() - (self.root / "users" / name).stat().st_mtime):
                yield f"users/{name}"


def _renamed(staged: Path, target: Path) -> bool:
    try:
        os.rename(staged, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _linked(aside: Path, target: Path) -> bool:
    """Give a whole file its name unless the name is taken; a rename would overwrite."""
    try:
        os.link(aside, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A disk without hard links: take the name first, then fill it. Killed in between, an empty record stays, which
        # is told as damaged; two writers at once still cannot both succeed.
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            return False
        os.replace(aside, target)
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
