"""The bytes of a plain or compressed file, decompressed and converted to UTF-8, in bounded memory.

A stream that is cut off, damaged or too long yields what precedes that place and then raises, so that no caller can
mistake a part for the whole.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from crosscal.files.broken import BrokenStream

CHUNK_BYTES = 2**18
MOST_FILE_BYTES = 64 * 2**30
MOST_WINDOW_BYTES = 2**31
"""Largest window of a decoder, which it holds in memory: that of `zstd --ultra --long=31`, zstd's largest."""
ZSTD_INPUT_BYTES = 2**8  # a block of 4 bytes may expand to 128 KiB: this much input yields at most 8 MiB

_ENCODINGS = (  # UTF-32 first: its byte-order mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, None),
)
_DAMAGE = (zlib.error, lzma.LZMAError, zstandard.ZstdError)


def chunks(path: Path, most_bytes: int = MOST_FILE_BYTES) -> Iterator[bytes]:
    """Yield a file's bytes: `.gz`, `.zst`, `.bz2` and `.xz` decompressed, UTF-16 and UTF-32 with a byte-order mark as
    UTF-8, without the mark.

    Bytes that are not valid UTF-8 pass unchanged. Raises `BrokenStream` where the rest cannot be read, or after
    `most_bytes` decompressed bytes.
    """
    return _in_utf8(_bounded(_decompressed(path), most_bytes))


def _bounded(stream: Iterator[bytes], most_bytes: int) -> Iterator[bytes]:
    read_bytes = 0
    for chunk in stream:
        read_bytes += len(chunk)
        if read_bytes > most_bytes:
            raise BrokenStream(f"file longer than {most_bytes} bytes, rest not read")
        yield chunk


def _decompressed(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as raw:
            match path.suffix.lower():
                case ".gz":
                    with gzip.GzipFile(fileobj=raw) as stream:
                        # read1 returns what is available: the data before a damaged place is not lost
                        yield from iter(lambda: stream.read1(CHUNK_BYTES), b"")
                case ".zst":
                    yield from _zstd_frames(raw)
                case ".bz2":
                    yield from _frames(raw, bz2.BZ2Decompressor)
                case ".xz":
                    yield from _frames(raw, lambda: lzma.LZMADecompressor(memlimit=MOST_WINDOW_BYTES))
                case _:
                    yield from iter(lambda: raw.read(CHUNK_BYTES), b"")
    except (EOFError, OSError, *_DAMAGE) as error:
        raise BrokenStream(_problem(error)) from error


def _zstd_frames(raw: BinaryIO) -> Iterator[bytes]:
    """Decompress all frames of a stream. zstandard's own reader accepts a truncated stream as complete."""
    frame = None
    while data := raw.read(ZSTD_INPUT_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW_BYTES).decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame has no end")


def _frames(raw: BinaryIO, begin: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> Iterator[bytes]:
    """Decompress all streams of a bzip2 or xz file. Python's own readers end silently at one with an invalid header."""
    frame = None
    while data := raw.read(CHUNK_BYTES):
        while data or (frame and not frame.needs_input):
            if frame is None:
                data = data.lstrip(b"\0")  # padding between the streams of an xz file
                if not data:
                    break
                frame = begin()
            yield frame.decompress(data, CHUNK_BYTES)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last stream has no end")


def _problem(error: Exception) -> str:
    text = str(error)
    if isinstance(error, EOFError):
        return "compressed stream is cut off, rest not read"
    if isinstance(error, OSError) and error.errno is not None:
        return f"file cannot be read: {error.strerror or type(error).__name__}"
    if "too much memory" in text or "Memory usage limit" in text or "not enough memory" in text:
        return f"compressed stream needs more than {MOST_WINDOW_BYTES} bytes of memory or than there are, rest not read"
    return "compressed stream is damaged, rest not read"


def _in_utf8(stream: Iterator[bytes]) -> Iterator[bytes]:
    head = b""
    for chunk in stream:
        head += chunk
        if len(head) >= 4:  # the longest mark
            break
    mark, encoding = next(((m, e) for m, e in _ENCODINGS if head.startswith(m)), (b"", None))
    if encoding:
        yield from _recoded(head.removeprefix(mark), stream, encoding)
    else:
        yield head.removeprefix(mark)
        yield from stream


def _recoded(head: bytes, stream: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Convert to UTF-8. An unpaired surrogate becomes bytes that are not valid UTF-8: only its line is lost."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        yield decoder.decode(head).encode("utf-8", "surrogatepass")
        for chunk in stream:
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise BrokenStream(f"invalid {encoding[:6].upper()}, rest not read") from error
