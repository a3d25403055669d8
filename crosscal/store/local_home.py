"""A store in a folder of a local or shared POSIX disk."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from crosscal.files import sync
from crosscal.store.heartbeat import USERS, begin, heartbeats
from crosscal.store.home import MANIFEST, disk_errors
from crosscal.store.keys import digest_file
from crosscal.store.processes import this_process

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalHome:
    """A home in a local folder. Artifacts and records appear and vanish by one rename or link: none is ever partial."""

    keeps_times = True

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def location(self) -> str:
        return str(self.root)

    def staging(self) -> Path:
        """Create a folder on the same disk, named after the process that fills it."""
        folder = self.root / "staging" / f"{this_process()}-{secrets.token_hex(6)}"
        with disk_errors(str(self.root)):
            folder.parent.mkdir(parents=True, exist_ok=True)
            begin(self)
            folder.mkdir()
        return folder

    def publish(self, staged: Path, place: str) -> bool:
        target = self.root / place
        with disk_errors(str(self.root)):
            for file in staged.rglob("*"):
                sync(file)
            sync(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            while not _renamed(staged, target):
                if (target / MANIFEST).exists():
                    return False
                self.remove(place)  # a folder without a manifest is not an artifact and must not block one
            sync(target.parent)
        return True

    def create(self, place: str, content: bytes) -> bool:
        target = self.root / place
        aside = self.staging() / target.name
        try:
            with disk_errors(str(self.root)):
                target.parent.mkdir(parents=True, exist_ok=True)
                aside.write_bytes(content)
                sync(aside)
                if not _linked(aside, target):
                    return False
                sync(target.parent)
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

    def touch(self, place: str, *, is_first: bool = False) -> None:
        """Writes the creation time into a new file, to be kept when later touches change the modification time."""
        path = self.root / place
        try:
            os.utime(path)
        except FileNotFoundError:
            if is_first:  # later, a missing folder is not created again: the home may be being removed
                path.parent.mkdir(exist_ok=True)
            path.touch()
            path.write_text(str(path.stat().st_mtime), encoding="ascii")

    def times(self, place: str) -> dict[str, float]:
        found = {}
        for name in self.names(place):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found[name] = (self.root / place / name).stat().st_mtime
        return found

    def stamps(self, place: str) -> dict[str, str]:
        """Without the time of a manifest, which is that of last use; a manifest contains its own digest."""
        found = {}
        for folder, _, names in os.walk(self.root / place):
            for file in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    seen = file.stat()
                    at = 0 if file.name == MANIFEST else seen.st_mtime_ns
                    found[file.relative_to(self.root / place).as_posix()] = f"time {at} {seen.st_size}"
        return found

    def move(self, place: str, target: str) -> None:
        with disk_errors(str(self.root)), contextlib.suppress(FileNotFoundError):  # another process moved it
            (self.root / target).parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.root / place, self.root / target)

    def remove(self, place: str) -> None:
        aside = self.staging()
        self.move(place, f"staging/{aside.name}/removed")
        shutil.rmtree(aside, ignore_errors=True)

    def use(self, place: str) -> None:
        """Sets the manifest's modification time, which is the time of last use; not in a read-only store."""
        with contextlib.suppress(OSError):
            begin(self)
            os.utime(self.root / place / MANIFEST)

    def unused_since(self, place: str) -> float:
        return (self.root / place / MANIFEST).stat().st_mtime

    def in_use_since(self) -> float:
        seen = heartbeats(self)
        others = (process for process in seen.last if process != this_process() and not seen.is_gone(process))
        began = ((self.read(f"{USERS}/{process}"), seen.last[process]) for process in others)
        return min((float(content or last) for content, last in began), default=math.inf)

    def leftovers(self) -> Iterator[str]:
        seen = heartbeats(self)
        for name in self.names("staging"):
            folder = self.root / "staging" / name
            with contextlib.suppress(FileNotFoundError):  # published meanwhile
                written = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
                if seen.is_gone(name.rpartition("-")[0], otherwise=written):
                    yield f"staging/{name}"
        yield from (f"{USERS}/{process}" for process in seen.last if seen.is_gone(process))


def _renamed(staged: Path, target: Path) -> bool:
    try:
        os.rename(staged, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _linked(aside: Path, target: Path) -> bool:
    """Give a complete file its final name; return False if the name is taken. A rename would overwrite."""
    try:
        os.link(aside, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A disk without hard links: reserve the name first, then fill it. A process killed in between leaves an empty
        # record, which is reported as damaged. Two concurrent writers still cannot both succeed.
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            return False
        os.replace(aside, target)
    return True
