"""JSON records of a file: one per line or, in `.json` files, in any layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscal.files.broken import Broken, BrokenStream, excerpt
from crosscal.files.json_text import JsonText
from crosscal.files.lines import MOST_LINE_BYTES, Line, lines
from crosscal.files.names import format_of
from crosscal.files.streams import MOST_FILE_BYTES


@dataclass(frozen=True)
class JsonRecord:
    number: int
    """The line in which it begins, counted from 1."""

    value: Any
    excerpt: str


def json_records(
    path: Path, most_record_bytes: int = MOST_LINE_BYTES, most_file_bytes: int = MOST_FILE_BYTES
) -> Iterator[JsonRecord | Broken]:
    """Yield every record of a `.jsonl`, `.ndjson` or `.json` file, and a `Broken` for each that cannot be read."""
    if format_of(path) == ".json":
        yield from _of_text(JsonText(path, most_record_bytes, most_file_bytes))
        return
    for line in lines(path, most_record_bytes, most_file_bytes):
        if isinstance(line, Broken):
            yield line
        elif line.data.strip():
            yield _of_line(line)


def _of_line(line: Line) -> JsonRecord | Broken:
    try:
        value = json.loads(line.data.decode("utf-8"))
    except UnicodeDecodeError:
        return Broken(line.number, "invalid UTF-8", excerpt(line.data.strip()))
    except (ValueError, RecursionError):  # also integers with more digits than Python converts, and deep nesting
        return Broken(line.number, "invalid JSON", excerpt(line.data.strip()))
    return JsonRecord(line.number, value, excerpt(line.data.strip()))


def _of_text(text: JsonText) -> Iterator[JsonRecord | Broken]:
    """Yield consecutive values, with or without commas between them, and the elements of arrays one by one."""
    opened = 0
    try:
        while begin := text.next_character():
            if begin in "[]" and (begin == "]") == bool(opened):
                opened = text.number if begin == "[" else 0
                text.at += 1
            else:
                number, found = text.number, text.take()
                yield found if isinstance(found, Broken) else JsonRecord(number, *found)
    except BrokenStream as error:
        yield Broken(text.number, str(error))
        return
    if opened and not text.is_end_lost:
        yield Broken(opened, "JSON array without an end")
