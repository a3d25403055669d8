"""A landing place behind an fsspec URL, such as `s3://bucket/landing`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from tenacity import retry, retry_if_not_exception_type, stop_after_attempt, wait_exponential

from crosscal.errors import CorpusError, UsageError
from crosscal.landing.items import LandedFile, LandingItem
from crosscal.landing.local_place import copy_hashed
from crosscal.store.remote_home import modified_of

_retried = retry(
    retry=retry_if_not_exception_type(FileNotFoundError),
    stop=stop_after_attempt(5),
    wait=wait_exponential(multiplier=0.2, max=2),
    reraise=True,
)


class RemotePlace:
    def __init__(self, url: str) -> None:
        try:
            self.fs, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError("this landing place cannot be opened", where=url, got=str(error)) from error
        self.url, self.root = url, str(root).rstrip("/")

    def items(self, folder: str = "") -> Iterator[LandingItem]:
        """Empty if nothing has landed yet: objects have no folders. Raises `CorpusError` if listing fails."""
        at = f"{self.root}/{folder}".rstrip("/")
        try:
            found = self._list(at)
        except FileNotFoundError:
            return
        except OSError as error:
            raise CorpusError("the landing place does not answer", where=self.url, got=str(error)) from error
        for info in sorted(found, key=lambda info: info["name"]):
            name = str(info["name"]).rstrip("/").rsplit("/", 1)[-1]
            if str(info["name"]).rstrip("/") == at or not name:
                continue  # the folder's own marker object
            if name in (".", ".."):
                yield LandingItem(name=f"/{name}", problem="a name that leads out of the landing place")
            elif info["type"] == "directory":
                yield LandingItem(name, is_folder=True)
            else:
                yield LandingItem(name, bytes=int(info["size"] or 0), modified=modified_of(info))

    def read(self, path: str, most_bytes: int) -> bytes:
        with self.fs.open(f"{self.root}/{path}", "rb") as stream:
            content: Any = stream.read(most_bytes)
        return content

    def fetch(self, file: LandedFile, to: Path) -> str | None:
        path = f"{self.root}/{file.domain}/{file.name}"
        with self.fs.open(path, "rb") as stream, to.open("wb") as copy:
            digest = copy_hashed(stream, copy, file.bytes)  # type: ignore[arg-type]
        self.fs.invalidate_cache()
        after = self.fs.info(path)
        return digest if (after["size"], modified_of(after)) == (file.bytes, file.modified) else None

    @_retried
    def _list(self, at: str) -> list[dict[str, Any]]:
        self.fs.invalidate_cache()
        return self.fs.ls(at, detail=True)
