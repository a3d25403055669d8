"""Files from outside: what they are by name, decompressed, decoded, and cut into lines or JSON records.

The only place that opens compressed files: documents and questions are read through it alike; and that writes files
which must appear whole.
"""

from crosscal.files.broken import Broken, excerpt
from crosscal.files.json_records import JsonRecord, json_records
from crosscal.files.lines import Line, lines
from crosscal.files.names import COMPRESSIONS, FORMATS, JSON_FORMATS, format_of, stem_of
from crosscal.files.whole import sync, whole_file, write_whole

__all__ = [
    "COMPRESSIONS",
    "FORMATS",
    "JSON_FORMATS",
    "Broken",
    "JsonRecord",
    "Line",
    "excerpt",
    "format_of",
    "json_records",
    "lines",
    "stem_of",
    "sync",
    "whole_file",
    "write_whole",
]
