"""What is seen of a landing place, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from crosscal.store import digest_of


@dataclass(frozen=True)
class Item:
    """What stands under one name of a folder."""

    name: str
    is_folder: bool = False
    bytes: int = 0
    modified: float | None = None
    """Seconds since 1970; None when the place does not say."""
    problem: str | None = None
    """Why it cannot be read at all."""


@dataclass(frozen=True)
class LandedFile:
    """A complete file, as it was seen."""

    domain: str
    name: str
    bytes: int
    modified: float | None
    marker_bytes: int = 0
    """Of its marker, which may promise something if it is not empty; 0 without a marker."""
    marker_modified: float | None = None

    @property
    def signature(self) -> str:
        """Changes when the file or a marker that promises something does: neither is read again under its signature."""
        marker = f"-{digest_of([self.marker_bytes, self.marker_modified])[:16]}" if self.marker_bytes else ""
        return self.own_signature + marker

    @property
    def own_signature(self) -> str:
        """Changes when the file does."""
        return digest_of([self.bytes, self.modified, None, None])[:16]


@dataclass(frozen=True)
class Refusal:
    """What is not taken. Names are as on the screen: unprintable characters are escaped, long ones cut."""

    domain: str
    name: str
    reason: str
    signature: str = ""
    """Of a file that was read: it is not read again until it changes."""
    do: str = ""


class Place(Protocol):
    """A folder or bucket that documents land in. Paths are relative to it; nothing outside it is ever opened."""

    def items(self, folder: str = "") -> Iterator[Item]: ...

    def read(self, path: str, most_bytes: int) -> bytes:
        """The first bytes of a small file."""
        ...

    def fetch(self, file: LandedFile, to: Path) -> str | None:
        """Copy a file; its SHA-256, or None when it is not (or no longer) the file that was seen."""
        ...
