"""Entries of a landing place, and the interface to read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from crosscal.store import digest_of


@dataclass(frozen=True)
class LandingItem:
    """One entry of a folder."""

    name: str
    is_folder: bool = False
    bytes: int = 0
    modified: float | None = None
    """Seconds since 1970; None if the place does not report it."""
    problem: str | None = None
    """Why it cannot be read at all."""


@dataclass(frozen=True)
class LandedFile:
    """A complete file, as it was listed."""

    domain: str
    name: str
    bytes: int
    modified: float | None
    marker_bytes: int = 0
    """Size of its marker, which may promise a digest and a size unless it is empty; 0 without a marker."""
    marker_modified: float | None = None

    @property
    def signature(self) -> str:
        """Changes when the file or its non-empty marker does. A file is not read again under a known signature."""
        marker = f"-{digest_of([self.marker_bytes, self.marker_modified])[:16]}" if self.marker_bytes else ""
        return self.own_signature + marker

    @property
    def own_signature(self) -> str:
        """Changes when the file does."""
        return digest_of([self.bytes, self.modified, None, None])[:16]


@dataclass(frozen=True)
class Refusal:
    """A file or folder that is not ingested. Names are for display: unprintable characters escaped, long names cut."""

    domain: str
    name: str
    reason: str
    signature: str = ""
    """Signature of the refused file, which is not read again until it changes; empty if every sweep tries it again."""
    do: str = ""


class LandingPlace(Protocol):
    """A folder or bucket that documents land in. Paths are relative to it; nothing outside it is ever opened."""

    def items(self, folder: str = "") -> Iterator[LandingItem]: ...

    def read(self, path: str, most_bytes: int) -> bytes:
        """The first bytes of a small file."""
        ...

    def fetch(self, file: LandedFile, to: Path) -> str | None:
        """Copy a file; return its SHA-256, or None if it is not (or no longer) the file that was listed."""
        ...
