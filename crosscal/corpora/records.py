"""Candidates from a file: each is a usable document, or a reject with its reason."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from crosscal.corpora.conversation import TAG, Conversation
from crosscal.corpora.limits import DocumentLimits
from crosscal.files import Broken, excerpt
from crosscal.files.broken import EXCERPT_CHARACTERS

COLUMNS_KEPT = 20
TEXT = "text"
"""The default text column; also the form of documents that are not conversations."""


@dataclass(frozen=True)
class Document:
    """A document that satisfies the limits: a text or a conversation."""

    text: str
    """Stripped of white space at both ends, so that `digest` determines it; for a conversation, its stored JSON."""

    source: str
    """File name relative to the given source; never an absolute path."""

    digest: bytes
    """SHA-256 of the text in UTF-8; for a conversation, with `TAG` in front."""

    characters: int
    """For a conversation, those of its turns (`Conversation.plain`)."""

    form: str = TEXT
    """The columns it was read from."""

    is_conversation: bool = False


@dataclass(frozen=True)
class Reject:
    source: str
    line: int
    """Line or row, counted from 1; 0 means the file as a whole."""

    reason: str
    excerpt: str = ""
    columns: tuple[str, ...] = ()
    """The existing columns, if the text column is missing; at most `COLUMNS_KEPT`."""

    records: int = 1
    """Number of records lost, if the file states it."""


Candidates = Iterator[Document | Reject]


def judge(text: object, source: str, line: int, limits: DocumentLimits, form: str = TEXT) -> Document | Reject:
    """Return the text as a document, or a reject with the reason."""
    if not isinstance(text, str):
        return Reject(source, line, "text is not a string", excerpt(repr(text)[:EXCERPT_CHARACTERS]))
    text = text.strip()
    if not text:
        return Reject(source, line, "empty")
    encoded = _encoded(text, len(text), source, line, limits)
    if isinstance(encoded, Reject):
        return encoded
    return Document(text, source, hashlib.sha256(encoded).digest(), len(text), form)


def judge_conversation(
    found: Conversation, source: str, line: int, limits: DocumentLimits, form: str
) -> Document | Reject:
    """Return the conversation, turns not stripped, as a document, or a reject with the reason. The minimum length
    applies to the characters of its turns, the maximum to its stored JSON."""
    text = found.stored()
    encoded = _encoded(text, found.characters, source, line, limits)
    if isinstance(encoded, Reject):
        return encoded
    return Document(text, source, hashlib.sha256(TAG + encoded).digest(), found.characters, form, is_conversation=True)


def _encoded(text: str, characters: int, source: str, line: int, limits: DocumentLimits) -> bytes | Reject:
    """Return the UTF-8 bytes of a document, or a reject; `characters` is compared with the minimum length."""
    if characters < limits.min_characters:
        return Reject(source, line, "too short", excerpt(text))
    if len(text) > limits.max_characters:
        return Reject(source, line, "too long", excerpt(text))
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return Reject(source, line, "lone surrogate", excerpt(text))


def rejected(source: str, broken: Broken) -> Reject:
    return Reject(source, broken.number, broken.reason, broken.excerpt)


def no_column(source: str, line: int, text: str, columns: Iterable[str]) -> Reject:
    return Reject(source, line, no_column_reason(text), columns=tuple(map(excerpt, islice(columns, COLUMNS_KEPT))))


def no_column_reason(text: str) -> str:
    return f"no column {text!r}"
