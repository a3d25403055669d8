"""A store behind any fsspec URL, such as `s3://bucket/prefix`.

Objects cannot be renamed, so an artifact's files are written first, each named by its digest, and the manifest last.
Two writers of one artifact whose bytes differ (for example, sums in another order) therefore never mix: whichever
manifest remains, its files exist. Transient failures are retried. A local cache, named by content, keeps fetched files.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

from crosscal.errors import StoreError
from crosscal.store.heartbeat import USERS, heartbeats
from crosscal.store.home import MANIFEST, disk_errors
from crosscal.store.keys import digest_file

R = TypeVar("R")
PROBE = "conditional-writes"
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
"""Keys of the modification time in fsspec entries. `created` is one: a changed object is a new object."""
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_CARRIERS = ("aiohttp", "aiobotocore", "botocore", "urllib3")
"""Libraries below some file systems, whose transport errors are not OSErrors."""


_CHECKSUMS = ("ETag", "etag", "md5Hash", "md5", "content_md5", "crc32c")
"""Keys of the storage's own checksum of an object in fsspec entries."""


class ShortRead(OSError):
    """The number of bytes received is not the object's size."""


def _is_of_transport(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CARRIERS


_retried = retry(
    retry=retry_if_exception(lambda error: _is_of_transport(error) and not isinstance(error, _ANSWERS)),
    stop=stop_after_attempt(5),
    wait=wait_exponential(multiplier=0.2, max=5),
    reraise=True,
)


class RemoteHome:
    """A home on an fsspec file system. It needs conditional writes and keeps no times of last use."""

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
        self._is_conditional = False
        self.cache = Path(os.environ.get("CROSSCAL_CACHE", Path.home() / ".cache" / "crosscal"))

    @property
    def location(self) -> str:
        return self.url

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
        """Atomic through conditional writes, as in S3 (If-None-Match). Raises `StoreError` if the backend lacks them.

        A refusal means another writer's record, or our own whose response was lost. The contents distinguish them, so
        no two writers may write the same bytes.
        """
        self._require_conditional_writes()
        self._is_refused(place, content)
        return self.read(place) == content

    def _is_refused(self, place: str, content: bytes) -> bool:
        """Write a file that must not exist yet; return whether the backend refused because it exists."""
        try:
            self._write(self.fs.pipe_file, self._at(place), content, mode="create")
        except FileExistsError:
            return True
        except StoreError:  # some servers refuse without naming the failed condition
            if self.read(place) is None:
                raise
            return True
        return False

    def _require_conditional_writes(self) -> None:
        """Check once, before the first record, that the backend refuses to overwrite a file. Raises `StoreError`.

        The first of two attempts may create the probe file. It stays, so that later processes need one attempt. Each
        process checks for itself, because its installed file system library may lack the condition.
        """
        if self._is_conditional:
            return
        if not any(self._is_refused(PROBE, secrets.token_bytes(16)) for _ in range(2)):
            raise StoreError(
                "this storage has no conditional writes, so claims and records in it would not be safe",
                where=self.url,
                got=f"{type(self.fs).__name__} writes over a file that it was to create (mode='create')",
                do="Use storage with conditional writes, such as S3 (and a recent s3fs or gcsfs), or a folder.",
            )
        self._is_conditional = True

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
        """Fetches the file again: the local cache is no evidence of what the home stores."""
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

    def touch(self, place: str, *, is_first: bool = False) -> None:
        self._write(self.fs.pipe_file, self._at(place), b"")

    def times(self, place: str) -> dict[str, float]:
        """Raises `StoreError` for a file system that does not report them."""
        try:
            found = self._do(self.fs.ls, self._at(place), detail=True)
        except FileNotFoundError:
            return {}
        times = {str(info["name"]).rsplit("/", 1)[-1]: modified_of(info) for info in found}
        if None in times.values():
            raise StoreError(
                "this storage does not report modification times, so expired claims cannot be detected",
                where=self.url,
                do="Use storage that does, such as S3, or a folder.",
            )
        return {name: at for name, at in times.items() if at is not None}

    def stamps(self, place: str) -> dict[str, str]:
        """Lists all objects (1,000 per S3 response) and fetches none."""
        at = self._at(place)
        found: Any = self._do(self.fs.find, at, detail=True)
        return {str(path).partition(f"{at}/")[2]: _stamp(info) for path, info in found.items()}

    def move(self, place: str, target: str) -> None:
        # The manifest moves first: a half-moved folder must not look complete.
        for name in sorted(self.names(place), key=lambda name: name != MANIFEST):
            self._do(self.fs.mv, self._at(f"{place}/{name}"), self._at(f"{target}/{name}"))

    def remove(self, place: str) -> None:
        names = sorted(self.names(place), key=lambda name: name != MANIFEST)
        for path in (*(f"{place}/{name}" for name in names), place):  # the last exists if `place` is a file
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                self._do(self.fs.rm_file, self._at(path))

    def use(self, place: str) -> None:
        """Does nothing: object stores keep no time of last use."""

    def unused_since(self, place: str) -> float:
        raise StoreError(
            "an object store does not know when an artifact was last used",
            where=self.url,
            do="Expire objects with a lifecycle rule of the bucket.",
        )

    def in_use_since(self) -> float:
        return 0.0

    def leftovers(self) -> Iterable[str]:
        """Only heartbeat files: work in progress is in the system's folder for temporary files."""
        if self.names(USERS):
            seen = heartbeats(self)
            yield from (f"{USERS}/{process}" for process in seen.last if seen.is_gone(process))

    def _at(self, place: str) -> str:
        return f"{self.root}/{place}"

    def _file(self, place: str, name: str, sha256: str) -> str:
        return self._at(f"{place}/{sha256[:16]}-{name.replace('/', '-')}")  # all in one folder: `names` finds them

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
        """Run one file-system operation, retried on transient failures; then raise `StoreError`."""
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


def modified_of(info: dict[str, Any]) -> float | None:
    """Return the modification time of an fsspec entry in seconds since 1970, or None if it has none."""
    value = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value)
    if isinstance(value, datetime.datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
        return aware.timestamp()
    return None if value is None else float(value)


def _stamp(info: dict[str, Any]) -> str:
    checksum = next((info[name] for name in _CHECKSUMS if info.get(name)), None)
    return f"{f'time {modified_of(info)}' if checksum is None else checksum} {info['size']}"
