"""Lines of plain, gzip or Zstandard files, in bounded memory, as far as they can be read."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.records import EXCERPT_CHARACTERS, excerpt

CHUNK_BYTES = 2**18
ZSTD_INPUT_BYTES = 2**8  # one block of 4 bytes may expand to 128 KiB: at most 8 MiB come out of this much input


@dataclass(frozen=True)
class Line:
    number: int
    data: bytes


@dataclass(frozen=True)
class Broken:
    """A place where reading failed: one line, or the rest of the file."""

    number: int
    reason: str
    excerpt: str = ""


def lines(path: Path, limits: DocumentLimits) -> Iterator[Line | Broken]:
    """The lines of a file, `.gz` and `.zst` decompressed.

    A line over `max_line_bytes` is passed over without being held. A stream that is damaged, cut off, or longer
    than `max_file_bytes` gives the lines before that place and then one `Broken`; the unfinished line is left out.
    """
    number, parts, held_bytes, read_bytes = 1, [], 0, 0
    try:
        for chunk in _chunks(path):
            read_bytes += len(chunk)
            if read_bytes > limits.max_file_bytes:
                yield Broken(number, f"file longer than {limits.max_file_bytes} bytes, rest not read")
                return
            pieces = chunk.split(b"\n")
            for index, piece in enumerate(pieces):
                held_bytes += len(piece)
                if held_bytes <= limits.max_line_bytes:
                    parts.append(piece)
                else:
                    parts = [(parts[0] if parts else piece)[:EXCERPT_CHARACTERS]]  # all that is kept of such a line
                if index < len(pieces) - 1:
                    yield _finished(number, parts, held_bytes, limits)
                    number, parts, held_bytes = number + 1, [], 0
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        yield Broken(number, _damage(path, error))
        return
    if held_bytes:
        yield _finished(number, parts, held_bytes, limits)


def _finished(number: int, parts: list[bytes], held_bytes: int, limits: DocumentLimits) -> Line | Broken:
    data = b"".join(parts)
    if held_bytes > limits.max_line_bytes:
        return Broken(number, f"line longer than {limits.max_line_bytes} bytes", excerpt(data))
    return Line(number, data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        match path.suffix.lower():
            case ".gz":
                with gzip.GzipFile(fileobj=raw) as stream:
                    # read1 hands over what is there: the data before a damaged place is not lost
                    while chunk := stream.read1(CHUNK_BYTES):
                        yield chunk
            case ".zst":
                yield from _zstd_chunks(raw)
            case _:
                while chunk := raw.read(CHUNK_BYTES):
                    yield chunk


def _zstd_chunks(raw: BinaryIO) -> Iterator[bytes]:
    """All frames of a stream. zstandard's own reader takes a cut-off stream for a complete one."""
    frame = None
    while data := raw.read(ZSTD_INPUT_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame has no end")


def _damage(path: Path, error: Exception) -> str:
    if isinstance(error, EOFError):
        return "compressed stream is cut off, rest not read"
    if isinstance(error, zlib.error | zstandard.ZstdError | gzip.BadGzipFile):
        return "compressed stream is damaged, rest not read"
    return f"file cannot be read: {getattr(error, 'strerror', None) or type(error).__name__}"
