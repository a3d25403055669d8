"""A store behind any fsspec URL, such as `s3://bucket/prefix`.

Objects cannot be renamed, so an artifact's files are written first, each named by its digest, and the manifest last.
Two writers of one artifact whose bytes differ (sums in another order, say) therefore never mix: whichever manifest
stands, its files are there. Passing failures are retried; what was fetched is kept in a local cache named by content.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

from crosscal.errors import StoreError
from crosscal.store.home import MANIFEST, disk_errors
from crosscal.store.keys import digest_file

R = TypeVar("R")
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_CARRIERS = ("aiohttp", "aiobotocore", "botocore", "urllib3")
"""Libraries under some file systems, whose errors of transport are no OSErrors."""


class ShortRead(OSError):
    """Fewer bytes came than the object has."""


def _is_of_transport(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CARRIERS


_retried = retry(
    retry=retry_if_exception(lambda error: _is_of_transport(error) and not isinstance(error, _ANSWERS)),
    stop=stop_after_attempt(5),
    wait=wait_exponential(multiplier=0.2, max=5),
    reraise=True,
)


class RemoteHome:
    keeps_times = False

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                "this store URL cannot be opened", where=url, got=str(error), do="Install `crosscal[s3]`?"
            ) from error
        self.root = str(root).rstrip("/")
        self.cache = Path(os.environ.get("CROSSCAL_CACHE", Path.home() / ".cache" / "crosscal"))

    def staging(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="crosscal-"))

    def publish(self, staged: Path, place: str) -> bool:
        if self.read(f"{place}/{MANIFEST}") is not None:
            return False
        files = json.loads((staged / MANIFEST).read_bytes())["files"]
        for name, file in files.items():
            self._write(self.fs.put_file, str(staged / name), self._file(place, name, file["sha256"]))
        self._write(self.fs.pipe_file, self._at(f"{place}/{MANIFEST}"), (staged / MANIFEST).read_bytes())
        return True

    def create(self, place: str, content: bytes) -> bool:
        """Atomic where the backend has conditional writes, as S3 has (If-None-Match).

        A refusal may mean another's record, or one of ours whose answer was lost: contents tell them apart, so no two
        writers may write the same.
        """
        try:
            self._write(self.fs.pipe_file, self._at(place), content, mode="create")
        except FileExistsError:
            pass
        except StoreError:  # some servers refuse without saying which condition it was
            if self.read(place) is None:
                raise
        return self.read(place) == content

    def read(self, place: str) -> bytes | None:
        def fetch() -> bytes:
            content: Any = self.fs.cat_file(self._at(place))
            self._check_size(self._at(place), len(content))
            return content

        try:
            return self._do(fetch)
        except FileNotFoundError:
            return None

    def local(self, place: str, name: str, sha256: str) -> Path | None:
        cached = self.cache / sha256[:2] / sha256
        if not cached.exists():
            with disk_errors(str(self.cache)):
                cached.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=cached.parent) as aside:
                    copy = Path(aside, sha256)
                    if not self._fetch(place, name, sha256, copy):
                        return None
                    os.replace(copy, cached)
        return cached

    def forget(self, path: Path) -> bool:
        path.unlink(missing_ok=True)
        return True

    def digest(self, place: str, name: str, sha256: str) -> str | None:
        """Fetches the file again: what the local cache holds says nothing about the home."""
        folder = self.staging()
        try:
            copy = folder / sha256
            return digest_file(copy) if self._fetch(place, name, sha256, copy) else None
        finally:
            shutil.rmtree(folder)

    def names(self, place: str) -> list[str]:
        try:
            found = self._do(self.fs.ls, self._at(place), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)

    def move(self, place: str, target: str) -> None:
        # The manifest leaves first: a folder that is half moved must not look complete.
        for name in sorted(self.names(place), key=lambda name: name != MANIFEST):
            self._do(self.fs.mv, self._at(f"{place}/{name}"), self._at(f"{target}/{name}"))

    def remove(self, place: str) -> None:
        for name in sorted(self.names(place), key=lambda name: name != MANIFEST):
            with contextlib.suppress(FileNotFoundError):  # somebody else removed it
                self._do(self.fs.rm_file, self._at(f"{place}/{name}"))

    def use(self, place: str) -> None:
        """Object stores keep no time of last use."""

    def unused_since(self, place: str) -> float:
        raise StoreError(
            "an object store does not know when an artifact was last used",
            where=self.url,
            do="Expire objects with a lifecycle rule of the bucket.",
        )

    def in_use_since(self) -> float:
        return 0.0

    def leftovers(self) -> Iterable[str]:
        return ()  # work in progress lies in the system's folder for temporary files

    def _at(self, place: str) -> str:
        return f"{self.root}/{place}"

    def _file(self, place: str, name: str, sha256: str) -> str:
        return self._at(f"{place}/{sha256[:16]}-{name}")

    def _fetch(self, place: str, name: str, sha256: str, copy: Path) -> bool:
        path = self._file(place, name, sha256)

        def fetch() -> None:
            self.fs.get_file(path, str(copy))
            self._check_size(path, copy.stat().st_size)

        try:
            self._do(fetch)
        except FileNotFoundError:
            return False
        return True

    def _check_size(self, path: str, got_bytes: int) -> None:
        stored_bytes = self.fs.size(path)
        if stored_bytes not in (None, got_bytes):
            raise ShortRead(f"{path}: {got_bytes} bytes of {stored_bytes}")

    def _write(self, move: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        try:
            return self._do(move, *args, **kwargs)
        except FileNotFoundError as error:
            raise StoreError(
                "the store cannot be written", where=self.url, got=str(error), do="Does the bucket exist?"
            ) from error

    def _do(self, move: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """One move on the file system, retried while it fails for a reason that may pass."""
        self.fs.invalidate_cache()
        try:
            return _retried(functools.partial(move, *args, **kwargs))()
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            if not _is_of_transport(error):
                raise
            raise StoreError(
                "the store does not answer", where=self.url, got=str(error), do="Check network, address and rights."
            ) from error
