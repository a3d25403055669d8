"""CSV records that span lines, put together so that one stray quote cannot swallow the rest of the file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from crosscal.corpora.records import excerpt
from crosscal.corpora.streams import Broken, Line


def records(physical: Iterator[Line | Broken], max_bytes: int) -> Iterator[Line | Broken]:
    """Join lines until their quotes are even.

    A quote that is not closed within `max_bytes`, or before the stream ends or breaks, costs only the line that
    opens it: the lines after it are read afresh.
    """
    again: deque[Line | Broken] = deque()
    held: list[Line] = []
    held_bytes = 0
    while True:
        line = again.popleft() if again else next(physical, None)
        if held and (not isinstance(line, Line) or held_bytes + len(line.data) > max_bytes):
            yield Broken(held[0].number, "unclosed quote", excerpt(held[0].data))
            again.extendleft([line, *reversed(held[1:])] if line is not None else reversed(held[1:]))
            held, held_bytes = [], 0
        elif not isinstance(line, Line):
            if line is None:
                return
            yield line
        elif _closes(line) == bool(held):
            yield Line(held[0].number, b"\n".join(part.data for part in (*held, line))) if held else line
            held, held_bytes = [], 0
        else:
            held.append(line)
            held_bytes += len(line.data)


def _closes(line: Line) -> bool:
    """An odd number of quotes opens a record that spans lines, or closes it."""
    return line.data.count(b'"') % 2 == 1
