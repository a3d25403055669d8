"""CSV records, as Python's csv reads them, except that a stray quote cannot swallow the lines after it."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from crosscal.files import Broken, Line, excerpt

MOST_READINGS = 8
"""Lines after an unclosed quote are parsed again: in total at most this many times the bytes of the file."""


@dataclass(frozen=True)
class Row:
    number: int
    """Its first line, counted from 1."""

    fields: list[str]


def records(physical: Iterator[Line | Broken], delimiter: str, max_bytes: int) -> Iterator[Row | Broken]:
    """Yield every row of at least one field, in the order of the lines.

    A quote opens a field only at the field's start. A row that spans lines must be well-formed: its quotes closed
    within `max_bytes` and before the stream ends or breaks, nothing between a closing quote and the next delimiter,
    and as many fields as the header. Otherwise the quote counts as stray: only its line is lost, and the lines after
    it are parsed again. A row within one line is parsed as csv does it without `strict`, well-formed or not.
    """
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))  # process-wide; the default is 128 KiB
    feed = _Feed(physical, max_bytes)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    width = 0
    while True:
        feed.held, feed.held_bytes = [], 0
        try:
            fields = next(reader, None)
        except csv.Error:
            fields = _of_one_line(feed.held, delimiter)
        if not feed.held:
            if feed.broken is None:
                return
            yield feed.broken
            feed.broken = None
        elif fields is None or (len(feed.held) > 1 and width not in (0, len(fields))):
            yield from feed.give_back()
        elif fields:
            width = width or len(fields)
            yield _row(feed.held[0], fields)


def _of_one_line(held: list[Line], delimiter: str) -> list[str] | None:
    """Parse one line without `strict`; None for several lines, or if a quote is still open at the end."""
    if len(held) > 1:
        return None
    reader = csv.reader([_text(held[0]), ""], delimiter=delimiter)
    fields = next(reader)
    return fields if reader.line_num == 1 else None


def _row(first: Line, fields: list[str]) -> Row | Broken:
    joined = ",".join(fields)
    try:
        joined.encode("utf-8")
    except UnicodeEncodeError:
        return Broken(first.number, "invalid UTF-8", excerpt(joined.encode("utf-8", "surrogateescape")))
    return Row(first.number, fields)


def _text(line: Line) -> str:
    return line.data.decode("utf-8", "surrogateescape")  # invalid UTF-8 stays detectable, as lone surrogates


class _Feed:
    """Feeds lines to a `csv.reader` and keeps the lines of the current record."""

    def __init__(self, physical: Iterator[Line | Broken], max_bytes: int) -> None:
        self.held: list[Line] = []
        self.held_bytes = 0
        self.broken: Broken | None = None
        """The `Broken` that ended the lines, until it is reported."""
        self._physical = physical
        self._again: deque[Line | Broken] = deque()
        self._max_bytes = max_bytes
        self._budget_bytes = 0

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._next_physical()
        if isinstance(line, Broken) and not self.held:
            self.broken = line
            raise StopIteration
        if isinstance(line, Broken) or (self.held and self.held_bytes + len(line.data) > self._max_bytes):
            self._again.appendleft(line)
            raise StopIteration
        self.held.append(line)
        self.held_bytes += len(line.data)
        return _text(line)

    def _next_physical(self) -> Line | Broken:
        line = next(self._physical)
        if isinstance(line, Line):
            self._budget_bytes += MOST_READINGS * len(line.data)
        return line

    def give_back(self) -> Iterator[Broken]:
        """Give up the first held line and queue the others to be parsed again; without budget, give up all of them."""
        self._budget_bytes -= self.held_bytes
        lost = 1 if self._budget_bytes >= 0 else len(self.held)
        self._again.extendleft(reversed(self.held[lost:]))
        for line in self.held[:lost]:
            yield Broken(line.number, "unclosed quote", excerpt(line.data.rstrip(b"\r\n")))
