"""Reading errors: the place in the file, the reason, and an excerpt."""

from __future__ import annotations

from dataclasses import dataclass

EXCERPT_CHARACTERS = 200


class BrokenStream(Exception):
    """The rest of a file cannot be read; the message is the reason."""


@dataclass(frozen=True)
class Broken:
    """A place where reading failed: one line or record, or the rest of the file."""

    number: int
    """Line, counted from 1."""

    reason: str
    excerpt: str = ""


def excerpt(data: str | bytes) -> str:
    """Return the first characters of `data`, escaped so that they can be stored as UTF-8."""
    head = data[:EXCERPT_CHARACTERS]
    encoded = head.encode("utf-8", "backslashreplace") if isinstance(head, str) else head
    return encoded.decode("utf-8", "backslashreplace")[:EXCERPT_CHARACTERS]
