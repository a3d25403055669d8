"""A JSON text of any length, parsed value by value through a sliding window."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosscal.files.broken import Broken, BrokenStream, excerpt
from crosscal.files.streams import CHUNK_BYTES, chunks

_SOMETHING = re.compile(r"[^\s,]")
_INLINE_RECORD = re.compile(r"\}\s*,\s*(?=\{)")
_LONGEST_TOKEN = 16
"""Characters: an error nearer to the window's end may come from a literal, number or escape that is cut off there."""
_LONGEST_INDENT = 4096


class JsonText:
    """Parser of consecutive values. The position is `at`, in line `number` of the file. If the rest of the file cannot
    be read, a call that needs more text raises `BrokenStream`."""

    def __init__(self, path: Path, most_value_bytes: int, most_file_bytes: int) -> None:
        self.at = 0
        self.number = 1
        self.is_end_lost = False
        """Whether the end of the file was skipped together with a value that could not be parsed."""
        self._text = ""
        self._most_value_bytes = most_value_bytes
        self._stream = _decoded(chunks(path, most_file_bytes))
        self._broken: BrokenStream | None = None
        self._decode = json.JSONDecoder().raw_decode

    def next_character(self) -> str:
        """Move to the next value and return its first character; empty at the end."""
        while True:
            if match := _SOMETHING.search(self._text, self.at):
                self._advance(match.start())
                return match[0]
            self._advance(len(self._text))
            if not self._grow():
                return ""

    def take(self) -> tuple[Any, str] | Broken:
        """Return the next value and its first characters, or a `Broken` if it cannot be parsed. In that case `at` moves
        to where the next value may begin."""
        indent = self.at - (self._text.rfind("\n", 0, self.at) + 1)
        while True:
            value, end, where = None, 0, self.at
            try:
                value, end = self._decode(self._text, self.at)
                is_cut = end == len(self._text) and isinstance(value, int | float)
            except json.JSONDecodeError as error:
                where = error.pos
                is_cut = error.msg.startswith("Unterminated") or where > len(self._text) - _LONGEST_TOKEN
            except (ValueError, RecursionError):  # integers with more digits than Python converts, deep nesting
                is_cut = False
            if max(end, len(self._text) if is_cut else 0) - self.at > self._most_value_bytes:
                reason = f"record longer than {self._most_value_bytes} bytes"
                return self._passed_over(reason, max(end, where), indent)
            if not (is_cut and self._grow()):
                return self._taken(value, end) if end else self._passed_over("invalid JSON", where, indent)

    def _taken(self, value: Any, end: int) -> tuple[Any, str] | Broken:
        number, source = self.number, self._text[self.at : end]
        self._advance(end)
        try:
            source.encode("utf-8")
        except UnicodeEncodeError:
            return Broken(number, "invalid UTF-8", excerpt(source))
        return value, excerpt(source)

    def _passed_over(self, reason: str, where: int, indent: int) -> Broken:
        """Skip a value that cannot be parsed. The next record begins on a line indented no more than this one or, in a
        text without line breaks, after the next `},`. A value that is not a record costs only its line."""
        found = Broken(self.number, reason, excerpt(self._text[self.at :].partition("\n")[0]))
        is_record = self._text[self.at] == "{"
        next_line = re.compile(rf"\n[ \t]{{0,{indent}}}([\[,][ \t]*)?(?=\{{)" if is_record else r"\n")
        while True:
            match = next_line.search(self._text, where)
            if not match and self._text.find("\n", where) < 0:
                match = _INLINE_RECORD.search(self._text, where)
            if match:
                self._advance(match.end())
                return found
            self._advance(max(where, len(self._text) - CHUNK_BYTES))
            if not self._grow():
                self._advance(len(self._text))
                self.is_end_lost = True
                return found
            where = self.at

    def _advance(self, to: int) -> None:
        self.number += self._text.count("\n", self.at, to)
        self.at = to

    def _grow(self) -> bool:
        """Double the text from `at` on, so that a value is parsed again only after its size has doubled. Return whether
        there was more text."""
        begin = self._text.rfind("\n", 0, self.at) + 1  # keeps the indentation of the line
        begin = begin if self.at - begin <= _LONGEST_INDENT else self.at
        self._text, self.at = self._text[begin:], self.at - begin
        parts, size = [self._text], len(self._text)
        wanted = max(CHUNK_BYTES, min(size, self._most_value_bytes - size))
        try:
            while wanted > 0 and (part := next(self._stream, "")):
                parts.append(part)
                wanted -= len(part)
        except BrokenStream as error:
            self._broken = error  # raised once all text before that place is parsed
        self._text = "".join(parts)
        if self._broken and len(parts) == 1:
            raise self._broken
        return len(parts) > 1


def _decoded(stream: Iterator[bytes]) -> Iterator[str]:
    """Decode UTF-8. Invalid bytes remain recognisable, as lone surrogates."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for chunk in stream:
        if text := decoder.decode(chunk):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
