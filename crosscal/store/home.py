"""Where a store lives: a local folder, or any fsspec URL such as `s3://bucket/prefix`.

Both homes offer the same few moves. What differs is how a folder appears all at once: locally by a rename,
remotely by writing its `manifest.json` last, which is why a folder counts as existing only with its manifest.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential

from crosscal.errors import StoreError, StoreFull

MANIFEST = "manifest.json"


class Home(Protocol):
    """The moves a store needs of its place; paths are relative to the home, with forward slashes."""

    def staging(self) -> Path: ...
    def publish(self, staged: Path, place: str) -> bool: ...
    def create(self, place: str, content: bytes) -> bool: ...
    def read(self, place: str) -> bytes | None: ...
    def local(self, place: str, sha256: str) -> Path | None: ...
    def names(self, place: str) -> list[str]: ...
    def move(self, place: str, target: str) -> None: ...
    def remove(self, place: str) -> None: ...
    def touch(self, place: str) -> None: ...
    def age_seconds(self, place: str, now: float) -> float: ...


def open_home(location: str) -> Home:
    """The home at a local path or an fsspec URL."""
    if "://" in location and not location.startswith("file://"):
        return RemoteHome(location)
    return LocalHome(Path(location.removeprefix("file://")).expanduser())


@contextmanager
def disk_errors(place: str) -> Iterator[None]:
    """Say a full or forbidden disk plainly."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(
                "the disk is full, nothing was stored",
                where=place,
                do="Free space (`crosscal store gc`) or move CROSSCAL_HOME, then run again: finished parts are kept.",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise StoreError(
                "the store cannot be written",
                where=place,
                got=os.strerror(error.errno),
                do="Choose another CROSSCAL_HOME.",
            ) from error
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalHome:
    """A folder on a local or shared POSIX disk."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def staging(self) -> Path:
        """A fresh folder on the same disk, so that publishing is one rename."""
        parent = self.root / "staging"
        with disk_errors(str(self.root)):
            parent.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))

    def publish(self, staged: Path, place: str) -> bool:
        """Rename a finished folder into place; False when somebody else was first."""
        target = self.root / place
        with disk_errors(str(target)):
            for file in staged.iterdir():
                _sync(file)
            _sync(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(staged, target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    shutil.rmtree(staged)
                    return False
                raise
            _sync(target.parent)
        return True

    def create(self, place: str, content: bytes) -> bool:
        """Write a new file whole; False when it exists. A link fails where a rename would overwrite."""
        target = self.root / place
        with disk_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-") as aside:
                aside.write(content)
                aside.flush()
                os.fsync(aside.fileno())
                try:
                    os.link(aside.name, target)
                except FileExistsError:
                    return False
            _sync(target.parent)
        return True

    def read(self, place: str) -> bytes | None:
        try:
            return (self.root / place).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def local(self, place: str, sha256: str) -> Path | None:
        path = self.root / place
        return path if path.is_file() else None

    def names(self, place: str) -> list[str]:
        folder = self.root / place
        return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []

    def move(self, place: str, target: str) -> None:
        (self.root / target).parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.root / place, self.root / target)

    def remove(self, place: str) -> None:
        # The manifest goes first: a half-removed folder must not look complete.
        path = self.root / place
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)

    def touch(self, place: str) -> None:
        try:
            os.utime(self.root / place)
        except (FileNotFoundError, PermissionError):
            return  # a read-only store can be used; it only loses the time of last use

    def age_seconds(self, place: str, now: float) -> float:
        return now - (self.root / place).stat().st_mtime


_retrying = retry(
    retry=retry_if_exception_type((OSError, TimeoutError)),
    stop=stop_after_attempt(5),
    wait=wait_exponential(multiplier=0.2, max=5),
    reraise=True,
)


class RemoteHome:
    """Any fsspec file system. Transient failures are retried; downloads go to a local cache named by content."""

    def __init__(self, url: str) -> None:
        try:
            self.fs, self.root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                "this store URL cannot be opened", where=url, got=str(error), do="Install `crosscal[s3]`?"
            ) from error
        self.cache = Path(os.environ.get("CROSSCAL_CACHE", Path.home() / ".cache" / "crosscal"))

    def _at(self, place: str) -> str:
        return f"{self.root}/{place}"

    def staging(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="crosscal-"))

    def publish(self, staged: Path, place: str) -> bool:
        if self.read(f"{place}/{MANIFEST}") is not None:
            shutil.rmtree(staged)
            return False
        # The manifest goes last: without it the folder does not exist.
        for file in sorted(staged.iterdir(), key=lambda f: f.name == MANIFEST):
            _retrying(self.fs.put_file)(str(file), self._at(f"{place}/{file.name}"))
        shutil.rmtree(staged)
        self.fs.invalidate_cache()
        return True

    def create(self, place: str, content: bytes) -> bool:
        if self.read(place) is not None:
            return False
        _retrying(self.fs.pipe_file)(self._at(place), content)
        self.fs.invalidate_cache()
        return self.read(place) == content

    def read(self, place: str) -> bytes | None:
        @_retrying
        def fetch() -> bytes | None:
            try:
                content: Any = self.fs.cat_file(self._at(place))
            except FileNotFoundError:
                return None
            return content

        return fetch()

    def local(self, place: str, sha256: str) -> Path | None:
        cached = self.cache / sha256[:2] / sha256
        if not cached.exists():
            content = self.read(place)
            if content is None:
                return None
            cached.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as aside:
                aside.write(content)
            os.replace(aside.name, cached)
        return cached

    def names(self, place: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            return sorted(
                str(name).rstrip("/").rsplit("/", 1)[-1] for name in self.fs.ls(self._at(place), detail=False)
            )
        except FileNotFoundError:
            return []

    def move(self, place: str, target: str) -> None:
        self.fs.mv(self._at(place), self._at(target), recursive=True)
        self.fs.invalidate_cache()

    def remove(self, place: str) -> None:
        self.fs.rm(self._at(place), recursive=True)
        self.fs.invalidate_cache()

    def touch(self, place: str) -> None:
        """Object stores keep no time of last use."""

    def age_seconds(self, place: str, now: float) -> float:
        return now - self.fs.modified(self._at(place)).timestamp()
