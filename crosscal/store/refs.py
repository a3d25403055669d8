"""Refs: small mutable records. Each version is a file of its own, so that no writer can overwrite another."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random

from crosscal.errors import CorruptArtifact, StoreConflict, StoreError
from crosscal.store.home import Home
from crosscal.store.keys import digest_of

R = TypeVar("R")
_VERSION = re.compile(r"(\d{8})\.json")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")


class Refs:
    """Named records with history. Versions start at 1. A write succeeds only on top of the newest version."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def versions(self, name: str) -> list[int]:
        """Version numbers, ascending."""
        matches = (_VERSION.fullmatch(file) for file in self.home.names(_folder(name)))
        return [int(match[1]) for match in matches if match]

    def read(self, name: str, version: int | None = None) -> tuple[int, dict[str, Any] | None]:
        """Return (version, value) of the newest or the given version; (0, None) if there is none.

        Raises `CorruptArtifact` for a damaged record.
        """
        version = version or max(self.versions(name), default=0)
        content = self.home.read(f"{_folder(name)}/{version:08d}.json") if version else None
        if content is None:
            return 0, None
        try:
            record = json.loads(content)
            if digest_of(record["value"]) != record["digest"]:
                raise ValueError("digest")
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptArtifact(
                "a stored record is damaged",
                where=f"{_folder(name)}/{version:08d}.json",
                do="Remove that file of the store: the version before it counts again.",
            ) from error
        return version, record["value"]

    def append(self, name: str, expected_version: int, value: dict[str, Any]) -> int:
        """Write the next version; return its number. Raises `StoreConflict` if `expected_version` is not the newest."""
        version = expected_version + 1
        # `writer` distinguishes two writers of the same value: only one of them wrote this version.
        record = {"value": value, "digest": digest_of(value), "writer": secrets.token_hex(8)}
        content = json.dumps(record, indent=1, sort_keys=True).encode()
        newest = max(self.versions(name), default=0)
        if newest != expected_version or not self.home.create(f"{_folder(name)}/{version:08d}.json", content):
            raise StoreConflict("another process changed it meanwhile", where=name, do="Read it again and retry.")
        return version

    def remove(self, name: str) -> None:
        """Remove a record with all its versions."""
        self.home.remove(_folder(name))

    def published_models(self) -> set[str]:
        """Return the keys of all models that any move of any domain's pointer named (see `crosscal.publication`).

        Raises `CorruptArtifact` for a damaged record: then it is unknown which models may be removed.
        """
        moves = [(name, version) for name in self.names("published") for version in self.versions(name)]
        values = (self.read(name, version)[1] for name, version in moves)
        return {value["model"] for value in values if value is not None}

    def names(self, folder: str) -> list[str]:
        """Return the names of the refs in a folder, such as `corpora`."""
        return [f"{folder}/{name}" for name in self.home.names(f"refs/{folder}")]


def again_on_conflict(attempt: Callable[[], R], *, attempts: int = 50) -> R:
    """Call `attempt` until it raises no `StoreConflict`; after `attempts` calls, raise the last one."""
    retrying = Retrying(
        retry=retry_if_exception_type(StoreConflict),
        stop=stop_after_attempt(attempts),
        wait=wait_random(0, 0.05),
        reraise=True,
    )
    return retrying(attempt)


def _folder(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise StoreError("not a valid name", got=name, do="Use lower-case letters, digits, '.', '_' and '-'.")
    return f"refs/{name}"
