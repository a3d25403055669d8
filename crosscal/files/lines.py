"""The lines of a file, up to where it can be read, in bounded memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crosscal.files.broken import EXCERPT_CHARACTERS, Broken, BrokenStream, excerpt
from crosscal.files.streams import MOST_FILE_BYTES, chunks

MOST_LINE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Line:
    number: int
    data: bytes
    """Including its line end."""


def lines(
    path: Path,
    most_line_bytes: int = MOST_LINE_BYTES,
    most_file_bytes: int = MOST_FILE_BYTES,
    *,
    universal: bool = False,
) -> Iterator[Line | Broken]:
    r"""Yield the lines of a file (see `streams.chunks`), which end with \n or, if `universal`, with \n, \r\n or \r.

    A line over `most_line_bytes` becomes a `Broken` and is not kept in memory. A stream that is damaged, cut off, or
    longer than `most_file_bytes` yields the lines before that place and then one `Broken`, without the unfinished line.
    """
    number, parts, held_bytes = 1, [], 0
    ends = (b"\n", b"\r") if universal else b"\n"
    try:
        for chunk in _whole_ends(chunks(path, most_file_bytes)) if universal else chunks(path, most_file_bytes):
            for piece in chunk.splitlines(keepends=True) if universal else io.BytesIO(chunk):
                held_bytes += len(piece)
                if held_bytes <= most_line_bytes:
                    parts.append(piece)
                else:
                    parts = [(parts[0] if parts else piece)[:EXCERPT_CHARACTERS]]  # only an excerpt of such a line
                if piece.endswith(ends):
                    yield _finished(number, parts, held_bytes, most_line_bytes)
                    number, parts, held_bytes = number + 1, [], 0
    except BrokenStream as error:
        yield Broken(number, str(error))
        return
    if held_bytes:
        yield _finished(number, parts, held_bytes, most_line_bytes)


def _whole_ends(stream: Iterator[bytes]) -> Iterator[bytes]:
    r"""Yield the same bytes, in chunks that do not split \r\n."""
    held = b""
    for chunk in stream:
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""
        yield chunk.removesuffix(held)
    yield held


def _finished(number: int, parts: list[bytes], held_bytes: int, most_line_bytes: int) -> Line | Broken:
    data = b"".join(parts)
    if held_bytes > most_line_bytes:
        return Broken(number, f"line longer than {most_line_bytes} bytes", excerpt(data))
    return Line(number, data)
